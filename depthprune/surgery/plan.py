"""One index plan, and everything that is cut by it."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from depthprune.program import axes as ax
from depthprune.program.coupling import Coupling
from depthprune.program.trace import GONE, paths_of, without

Plan = Mapping[str, tuple[np.ndarray, ...]]  # path -> kept slices of each axis, bool


def index_plan(coupling: Coupling, keep: Mapping) -> Plan:
  """What stays of every variable: a mask per axis, by path.

  Variables that are dead or have no slice left are absent.

  keep: settled. Branch gates have no entry: their value is folded into the arrays."""
  kept: dict[ax.Var, np.ndarray] = {}
  for group, slices in keep.get('channels', {}).items():
    kept[coupling.axis(group)] = np.asarray(slices)
  dead = coupling.decision(keep).dead
  plan = {
    path: tuple(ax.mask(d, kept) for d in dims)
    for path, dims in coupling.axes.items()
    if path not in dead and not path.startswith('branches/')
  }
  return {path: masks for path, masks in plan.items() if all(m.any() for m in masks)}


def cut(tree: Any, plan: Plan) -> Any:
  """The variables that the plan leaves, in the structure they had.

  Dict entries of dead variables go; a pytree of another kind keeps them uncut."""
  named = isinstance(tree, Mapping)
  small = [
    take(x, plan[path]) if path in plan else GONE if named else x
    for path, x in paths_of(tree).items()
  ]
  return without(jax.tree.unflatten(jax.tree.structure(tree), small))


def take(x: Any, masks: tuple[np.ndarray, ...]) -> Any:
  """x without the slices that are masked out.

  On the host, but for traced arrays: every new shape would be a program to compile."""
  if all(m.all() for m in masks):
    return x
  x = x if isinstance(x, Tracer) else np.asarray(x)
  return jnp.asarray(x[np.ix_(*masks)])


def cut_optimizer(
  tx: Any, opt_state: Any, full: Any, small: Any, plan: Plan, prefix: str
) -> tuple[Any, list[str]]:
  """The optimizer state for the small variables, and what had to start anew.

  full, small: the tree that tx optimised and the one it will. prefix: where that tree
    stands in the paths of the plan ('params/' for the tree of parameters).
  A leaf whose path ends in a variable's path and that has the variable's shape is cut
  as the variable is; statistics of another shape (factored ones) of a variable that is
  cut take the value of tx.init(small), and are named; the rest is carried over.

  Raises: ValueError when opt_state is not a state of tx over full."""
  expected, old = paths_of(jax.eval_shape(tx.init, full)), paths_of(opt_state)
  for path in {**expected, **old}:
    want, got = (np.shape(t[path]) if path in t else 'absent' for t in (expected, old))
    if want != got:
      raise ValueError(
        f'opt_state is not that of tx over these variables: {path}: expected {want}, '
        f'got {got}; pass the tx and the state that belong together'
      )
  named = zip(_keys(full), paths_of(full), strict=True)
  plans = {keys: plan[prefix + p] for keys, p in named if prefix + p in plan}
  fresh, leaves, anew = tx.init(small), [], []
  at = dict.fromkeys(_keys(fresh))
  for keys, (path, template) in zip(at, paths_of(fresh).items(), strict=True):
    leaf, masks = old[path], _masks_for(keys, plans, at)
    if masks is not None and np.shape(leaf) == tuple(m.size for m in masks):
      leaf = take(leaf, masks)
    elif masks is not None and np.ndim(leaf) and not all(m.all() for m in masks):
      anew.append(f'optimizer state {path} has no slices to cut: it starts anew')
      leaf = template
    leaves.append(leaf)
  return jax.tree.unflatten(jax.tree.structure(fresh), leaves), anew


def _keys(tree: Any) -> list[tuple]:
  """Where every leaf stands; unlike a path it tells a field from a dict's entry."""
  return [keys for keys, _ in jax.tree_util.tree_flatten_with_path(tree)[0]]


def _masks_for(keys: tuple, plans: Mapping, state: Collection) -> Any:
  """The plan of the variable whose keys end `keys`, or None.

  Where several do (w and mu/w, in Adam's mu), the one whose neighbours stand beside."""
  ends = [(keys[:i], keys[i:]) for i in range(len(keys) + 1) if keys[i:] in plans]

  def neighbours(end):
    return sum((*end[0], *k) in state for k in plans)

  return plans[max(ends, key=neighbours)[1]] if ends else None
