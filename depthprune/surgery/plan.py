"""Cutting variables and optimizer state by one plan: the slices that stay of each."""

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

IndexPlan = Mapping[str, tuple[np.ndarray, ...]]  # path: bool mask of each axis


def index_plan(coupling: Coupling, keep: Mapping) -> IndexPlan:
  """Returns which slices stay of every variable.

  Args:
    coupling: of the network, made by `couple`.
    keep: a settled decision.

  Returns:
    {path: one bool mask per axis}. Variables that are dead or have no slice left are
    absent, and so are branch gates, whose values are multiplied into the arrays.
  """
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


def cut(tree: Any, plan: IndexPlan) -> Any:
  """Returns the variables that the plan leaves, in the structure they had.

  Dict entries of variables that are not in the plan disappear; a pytree that is no dict
  keeps them uncut.
  """
  named = isinstance(tree, Mapping)
  small = [
    take(x, plan[path]) if path in plan else GONE if named else x
    for path, x in paths_of(tree).items()
  ]
  return without(jax.tree.unflatten(jax.tree.structure(tree), small))


def take(x: Any, masks: tuple[np.ndarray, ...]) -> Any:
  """Returns x without the slices that are masked out.

  Unless x is traced this happens on the host, because every new shape would have to be
  compiled on the device.
  """
  if all(m.all() for m in masks):
    return x
  x = x if isinstance(x, Tracer) else np.asarray(x)
  return jnp.asarray(x[np.ix_(*masks)])


def cut_optimizer(
  tx: Any, opt_state: Any, full: Any, small: Any, plan: IndexPlan, prefix: str
) -> tuple[Any, list[str]]:
  """Cuts the state of an optimizer by the same plan as its variables.

  A leaf is cut where its path ends in the path of a variable and it has the shape of
  that variable. Statistics of another shape (factored ones) of a variable that is cut
  start anew. Everything else is carried over.

  Args:
    tx: the optax optimizer.
    opt_state: its state.
    full: the tree of variables that it optimized.
    small: the tree of variables that it will optimize.
    plan: the plan.
    prefix: where this tree is in the paths of the plan: 'params/' for the parameters.

  Returns:
    The state for the small variables, and one sentence per leaf that starts anew.

  Raises:
    ValueError: opt_state is not a state of tx over `full`.
  """
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
  """The keys of every leaf; unlike paths they tell a field from an entry of a dict."""
  return [keys for keys, _ in jax.tree_util.tree_flatten_with_path(tree)[0]]


def _masks_for(keys: tuple, plans: Mapping, state: Collection) -> Any:
  """The masks of the variable whose keys are the end of `keys`, or None.

  Where there are several (w and mu/w, in the mu of Adam), it is the one for which the
  state holds most of the other variables too.
  """
  ends = [(keys[:i], keys[i:]) for i in range(len(keys) + 1) if keys[i:] in plans]

  def neighbours(end):
    return sum((*end[0], *k) in state for k in plans)

  return plans[max(ends, key=neighbours)[1]] if ends else None
