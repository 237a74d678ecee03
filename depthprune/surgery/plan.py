"""Cutting variables and optimizer state by one plan: the slices that stay of each.

A decision says what stays of groups, branches and exits; `complete` fills in what it
does not name, and `index_plan` reads off it what stays of every array.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from typing import Any

import jax
import numpy as np
from jax.core import Tracer
from jax.sharding import NamedSharding, PartitionSpec
from jax.tree_util import GetAttrKey, SequenceKey

from depthprune.program import arguments, routing
from depthprune.program import axes as ax
from depthprune.program.arguments import listed
from depthprune.program.coupling import Coupling
from depthprune.program.trace import GONE, paths_of, without

IndexPlan = Mapping[str, tuple[np.ndarray, ...]]  # path: bool mask of each axis
BOX = '/value'  # ends the path of an array within an `nnx.Variable`


def complete(coupling: Coupling, keep: Mapping) -> tuple[dict, dict, dict]:
  """Returns channels, branches and exits with every entry present, as bool arrays.

  A layer of a scan is kept where any of its branch gates is.

  Raises:
    KeyError: an unknown group, branch or exit.
    ValueError: an entry has the wrong shape or is not bool, fewer experts are left than
      are chosen at a time, or no exit is left.
  """
  arguments.parts('keep', keep, known=('exits',))
  channels = {g.name: np.ones(g.size, bool) for g in coupling.groups.values()}
  for name, kept in keep.get('channels', {}).items():
    coupling.axis(name)
    path, axis = coupling.groups[name].members[0]
    shape = channels[name].shape
    channels[name] = _entry(name, kept, shape, where=f' ({path}, axis {axis})')
    least = fewest(coupling, name)
    if 0 < (left := int(channels[name].sum())) < least:
      has = f'{name}: keep leaves {left} experts, and {least} are chosen at a time'
      raise arguments.wrong('', has)
  shapes = {b: coupling.branch_shape(b) for b in coupling.branches}
  branches = {b: np.ones(shape, bool) for b, shape in shapes.items()}
  for name, kept in keep.get('branches', {}).items():
    if name not in branches:
      raise KeyError(f'keep: no branch {name!r}; there are: {listed(branches)}')
    branches[name] = _entry(name, kept, shapes[name])
  exits = dict.fromkeys(coupling.exits, True)
  for name, kept in keep.get('exits', {}).items():
    if name not in exits:
      raise KeyError(f'keep: no exit {name!r}; there are: {listed(exits)}')
    exits[name] = bool(kept)
  if exits and not any(exits.values()):
    raise ValueError(f'keep: all exits are dropped ({listed(exits)}); keep one')
  for name, group in coupling.groups.items():
    if group.kind == 'layer':
      gates = [branches[b] for b in gates_of(coupling, name)]
      if gates:
        channels[name] = channels[name] & np.any(gates, axis=0)
  return channels, branches, exits


def fewest(coupling: Coupling, group: str) -> int:
  """Returns how many slices of a group have to be left, if any: 1 but for experts."""
  return routing.experts(coupling.view.facts).get(coupling.axis(group), 1)


def gates_of(coupling: Coupling, group: str) -> list[str]:
  """Returns the branches that have a gate for every layer of a group of layers."""
  axis = coupling.axis(group)
  dims = {b: coupling.axes[f'branches/{b}'] for b in coupling.branches}
  return [b for b, own in dims.items() if own and ax.norm(own[0]) is axis]


def _entry(name: str, kept: Any, shape: tuple, where: str = '') -> np.ndarray:
  kept = np.asarray(kept)
  if kept.dtype != bool:
    has = f'{name}: keep has dtype {kept.dtype}, expected bool'
    raise arguments.wrong('', has, 'write gate > 0, or astype(bool)')
  if kept.shape != shape:
    has = f'{name}: keep has shape {kept.shape}, its axis {shape}{where}'
    raise arguments.wrong('', has)
  return kept.copy()


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
  compiled on the device. What lay on a mesh lies on it again: along the same axes where
  the mesh divides what is left, else whole on every device.
  """
  if all(m.all() for m in masks):
    return x
  if isinstance(x, Tracer):
    return x[np.ix_(*masks)]
  small = np.asarray(x)
  for axis, mask in enumerate(masks):
    if not mask.all():
      small = small.compress(mask, axis)
  small = jax.device_put(small)
  place = getattr(x, 'sharding', None)
  if not isinstance(place, NamedSharding):
    return small
  try:
    place.shard_shape(small.shape)
  except ValueError:
    place = NamedSharding(place.mesh, PartitionSpec())
  return jax.device_put(small, place)


def widest(x: Any) -> np.ndarray:
  """Returns x on the host in double precision, float64 or complex128."""
  x = np.asarray(x)
  return x.astype(np.complex128 if np.iscomplexobj(x) else np.float64)


def cut_optimizer(
  tx: Any, opt_state: Any, full: Any, small: Any, plan: IndexPlan, prefix: str
) -> tuple[Any, list[str]]:
  """Cuts the state of an optimizer by the same plan as its variables.

  A leaf is cut where the path of a variable is part of its path and it has the shape of
  that variable. Other statistics of a variable that is cut, and all leaves that would
  not fit the small variables, start anew; where a step count lies beside them, so does
  all that it counts for. Everything else is carried over.

  Args:
    tx: the optax optimizer.
    opt_state: its state, or that of an `nnx.Optimizer` with this tx.
    full: the tree of variables that it optimized. Without a prefix it may have others
      too, such as the statistics beside the `nnx.Param`s.
    small: the tree of variables that it will optimize.
    plan: the plan.
    prefix: where this tree is in the paths of the plan: 'params/' for the parameters.

  Returns:
    The state for the small variables, and one sentence per leaf that starts anew.

  Raises:
    ValueError: opt_state is not a state of tx over `full`.
  """
  old = {_unboxed(path): leaf for path, leaf in paths_of(opt_state).items()}
  full, small = _optimized(tx, opt_state, full, small, whole=bool(prefix))
  plans = {
    keys: plan.get(prefix + path, tuple(np.ones(n, bool) for n in np.shape(x)))
    for keys, (path, x) in zip(_keys(full), paths_of(full).items(), strict=True)
  }
  fresh = tx.init(small)
  templates = dict(zip(_keys(fresh), paths_of(fresh).values(), strict=True))
  names = dict(zip(templates, map(_unboxed, paths_of(fresh)), strict=True))
  children, had = (_children(_keys(s)) for s in (fresh, jax.eval_shape(tx.init, full)))
  owners = {keys: _owner(keys, plans, children) for keys in templates}
  if () in plans:  # the only variable; scalars are not its statistics
    owners = {k: (len(k), len(k)) if np.ndim(x) else None for k, x in templates.items()}
  counted = {
    keys[:-1] for keys, x in templates.items() if not (owners[keys] or np.ndim(x))
  }
  leaves, anew, restarted = {}, [], {}
  for keys, template in templates.items():
    leaf, owner = old.get(names[keys], template), owners[keys]
    masks = plans[keys[slice(*owner)]] if owner else ()
    whole, left = (tuple(f(m) for m in masks) for f in (np.size, np.sum))
    if owner and (np.shape(leaf), np.shape(template)) == (whole, left):
      leaf = take(leaf, masks)
    elif (
      np.shape(leaf) != np.shape(template)
      or (np.size(leaf) > 1 and not all(m.all() for m in masks))
      or (not owner and _has_moved(keys, had, children))
    ):
      anew.append(f'optimizer state {names[keys]} has no slices to cut: it starts anew')
      restarted[_restarted(keys, owner, counted)] = None
    leaves[keys] = leaf
  for part in restarted:
    leaves |= {k: x for k, x in templates.items() if k[: len(part)] == part}
    if part in counted:
      name = jax.tree_util.keystr(part, simple=True, separator='/')
      anew.append(
        f'{f"optimizer state {name}" if name else "the optimizer state"} starts anew '
        'as a whole, since its step count belongs to its statistics'
      )
  if not _is_boxed(opt_state):
    return jax.tree.unflatten(jax.tree.structure(fresh), list(leaves.values())), anew
  named = dict(zip(names.values(), leaves.values(), strict=True))
  boxed = [named.get(path, GONE) for path in old]
  return without(jax.tree.unflatten(jax.tree.structure(opt_state), boxed)), anew


def _optimized(
  tx: Any, opt_state: Any, full: Any, small: Any, whole: bool
) -> tuple[Any, Any]:
  """The variables that the state is of, before and after the cut.

  Unless they are to be the whole tree, only those count that the state knows.
  """

  def known(tree):
    inside = [f'/{path}/' for path in paths_of(opt_state)]
    leaves = [
      x if any(f'/{path}/' in where for where in inside) else GONE
      for path, x in paths_of(tree).items()
    ]
    part = without(jax.tree.unflatten(jax.tree.structure(tree), leaves))
    return tree if part is GONE else part

  def shapes(state):
    return {_unboxed(path): np.shape(x) for path, x in paths_of(state).items()}

  given, expected = shapes(opt_state), shapes(jax.eval_shape(tx.init, full))
  if given != expected and not whole:
    full, small = known(full), known(small)
    expected = shapes(jax.eval_shape(tx.init, full))
  for path in {**expected, **given}:
    want, got = (s.get(path, 'absent') for s in (expected, given))
    if want != got:
      raise ValueError(
        f'opt_state is not that of tx over these variables: {path}: expected {want}, '
        f'got {got}; pass the tx and the state that belong together'
      )
  return full, small


def _is_boxed(opt_state: Any) -> bool:
  """Whether there is an `nnx.Variable` around every leaf, as `nnx.Optimizer` has it."""
  paths = paths_of(opt_state)
  return bool(paths) and all(path.endswith(BOX) for path in paths)


def _unboxed(path: str) -> str:
  """The path of a leaf, whether or not an `nnx.Variable` is around it."""
  return path.removesuffix(BOX)


def _keys(tree: Any) -> list[tuple]:
  """The keys of every leaf; unlike paths they tell a field from an entry of a dict."""
  return [keys for keys, _ in jax.tree_util.tree_flatten_with_path(tree)[0]]


def _children(leaves: Iterable[tuple]) -> Counter:
  """How many children every node of a tree has, by its keys; 0 for leaves."""
  nodes = {keys[:i]: None for keys in leaves for i in range(len(keys) + 1)}
  children = Counter(dict.fromkeys(nodes, 0))
  children.update(keys[:-1] for keys in nodes if keys)
  return children


def _has_moved(keys: tuple, had: Mapping, children: Mapping) -> bool:
  """Whether a leaf lies in a list that became shorter, where positions tell nothing."""
  above = [keys[:i] for i, key in enumerate(keys) if isinstance(key, SequenceKey)]
  return any(had[node] != children[node] for node in above)


def _owner(keys: tuple, plans: Mapping, nodes: Mapping) -> tuple[int, int] | None:
  """Where the keys of a variable begin and end in those of a leaf of a state, or None.

  Where there are several (w and mu/w, in the mu of Adam), it is the one for which the
  state holds most of the other variables too.
  """
  ends = range(len(keys) + 1)
  parts = [(i, j) for i in ends for j in ends if i <= j and keys[i:j] in plans]
  if len(parts) < 2:
    return parts[0] if parts else None
  return max(
    parts, key=lambda part: sum((*keys[: part[0]], *k) in nodes for k in plans)
  )


def _restarted(keys: tuple, owner: tuple[int, int] | None, counted: Collection):
  """The keys of what starts anew together with a leaf of a state.

  It is the state of one optax transformation if that counts steps, and else what is
  stored for the leaf's variable.
  """
  start, end = owner or (len(keys), len(keys))
  for i in reversed(range(start)):
    if keys[:i] in counted:
      return keys[:i]
    if isinstance(keys[i], GetAttrKey):  # a field of that transformation's state
      break
  return keys[:end]
