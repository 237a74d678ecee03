"""A function at one set of input shapes and in one mode: traced, its axes solved."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.core import Tracer

from depthprune.program import axes as ax
from depthprune.program import jaxpr as jx
from depthprune.program import rules
from depthprune.program.axes import Facts, fresh
from depthprune.program.deadcode import dependent, simplify

GONE = object()  # stands in a pytree for what is to be taken out of it


class Decision(NamedTuple):
  """What a `keep` says of depth.

  Attributes:
    branches: by path, is the branch kept. exits: by name, is the output kept.
    dead: paths of the variables that nothing needs any more."""

  branches: Mapping[str, Any]
  exits: Mapping[str, Any]
  dead: frozenset[str] = frozenset()


class View(NamedTuple):
  """A traced function.

  Attributes:
    program, facts: its equations, and the axes of every value.
    leaves: the program's input for every variable, by path.
    groups: the axis that each group of a coupling has here.
    tree: structure of what the function returns; dropped: which of its leaves are not
      among the program's outputs."""

  program: jx.Program
  facts: Facts
  leaves: dict[str, jx.Value]
  groups: dict[str, ax.Axis]
  tree: Any
  dropped: frozenset[int]

  def unpack(self, flat: Sequence) -> Any:
    """What the function returns, from the program's outputs, some of them GONE."""
    rest = iter(flat)
    full = [
      GONE if i in self.dropped else next(rest) for i in range(self.tree.num_leaves)
    ]
    out = jax.tree.unflatten(self.tree, full)
    return without(out) if any(x is GONE for x in full) else out

  def decided(self, decision: Decision) -> jx.Program:
    """The program after a decision on branches and exits."""
    return _decided(self.program, self.tree, self.leaves, decision)[0]

  def kept(self, exits: Mapping[str, Any]) -> jx.Program:
    """The program without the outputs of exits that are not kept."""
    gone = _outputs_of(exits, self.tree)
    outputs = tuple(v for i, v in enumerate(self.program.outputs) if i not in gone)
    return dataclasses.replace(self.program, outputs=outputs)

  def unneeded(self, decision: Decision) -> frozenset[str]:
    """Paths of the variables that a decision leaves without a reader."""
    _, needed = jx.live(self.decided(decision))
    return frozenset(p for p, v in self.leaves.items() if v not in needed)


def runnable(model: Any) -> Callable:
  """A model's `apply`, restricted to its exits; a function as it is.

  Taps that no exit needs are then dead code."""
  apply = getattr(model, 'apply', model)
  exits = getattr(model, 'exits', None)
  if not isinstance(exits, tuple):
    return apply

  def fn(variables, *inputs, **kwargs):
    out = apply(variables, *inputs, **kwargs)
    if kwargs.get('mutable'):
      return chosen(out[0]), out[1]
    return chosen(out)

  def chosen(out):
    named = isinstance(out, Mapping) and all(name in out for name in exits)
    return {name: out[name] for name in exits} if named else out

  return fn


def paths_of(tree: Any) -> dict[str, Any]:
  """The leaves of a pytree by their paths, joined with '/'.

  Raises: ValueError where two leaves have the same path."""
  flat = jax.tree_util.tree_flatten_with_path(tree)[0]
  named = [(jax.tree_util.keystr(p, simple=True, separator='/'), x) for p, x in flat]
  if len(dict(named)) < len(named):
    twice = next(p for p, _ in named if sum(p == q for q, _ in named) > 1)
    raise ValueError(f'{twice}: two leaves have this path; rename one of them')
  return dict(named)


def look(
  fn: Callable, variables: Any, inputs: tuple, kwargs: dict,
  dims: Mapping[str, ax.Dims], decision: Decision | None = None,
) -> View:  # fmt: skip
  """Traces fn(variables, *inputs, **kwargs) on shapes and solves its axes.

  dims: the axes of every variable, by path. decision: what is dropped first; branches
  that stay open then count as 1, which is what folding leaves behind."""
  arrays, merge = split_arrays((inputs, kwargs))

  def call(variables, arrays):
    args, named = merge(arrays)
    return fn(variables, *args, **named)

  program, tree = jx.trace(call, (variables, arrays))
  leaves = dict(zip(paths_of(variables), program.inputs, strict=False))
  dropped = frozenset()
  if decision is not None:
    program, dropped = _decided(program, tree, leaves, decision)
  facts = Facts()
  data = [fresh(v.shape, 'input') for v in program.inputs[len(leaves) :]]
  rules.infer(facts, program, [*(dims[p] for p in leaves), *data])
  return View(program, facts, leaves, {}, tree, dropped)


def split_arrays(arguments: Any) -> tuple[list, Callable]:
  """The arrays among arguments, and merge(arrays) -> arguments; the rest is static."""
  leaves, tree = jax.tree.flatten(arguments)
  array = (jax.Array, np.ndarray, np.generic, jax.ShapeDtypeStruct)
  is_array = [isinstance(x, array) for x in leaves]

  def merge(arrays):
    rest = iter(arrays)
    both = [next(rest) if a else x for x, a in zip(leaves, is_array, strict=True)]
    return jax.tree.unflatten(tree, both)

  return [x for x, a in zip(leaves, is_array, strict=True) if a], merge


def abstract(tree: Any) -> Any:
  """The tree with ShapeDtypeStructs for its arrays."""
  arrays, merge = split_arrays(tree)
  return merge(jax.eval_shape(lambda x: x, arrays))


def remembered(build: Callable) -> Callable:
  """look-ups of build(inputs, kwargs) -> View by shapes, dtypes and static arguments.

  A view that closes over arrays of an outer trace is never kept."""
  views: dict[Any, View] = {}

  def view(inputs: tuple, kwargs: dict) -> View:
    arguments = abstract((inputs, kwargs))
    leaves, tree = jax.tree.flatten(arguments)
    key = (tree, *(_signature(x) for x in leaves))
    if key in views:
      return views[key]
    built = build(*arguments)
    constants = built.program.constants.values()
    if not any(isinstance(c, Tracer) for c in constants):
      views[key] = built
    return built

  return view


def _signature(x: Any) -> Any:
  if isinstance(x, jax.ShapeDtypeStruct):
    return x.shape, x.dtype, x.weak_type
  return type(x), x


def _decided(program, tree, leaves, decision) -> tuple[jx.Program, frozenset[int]]:
  """Closes branches, drops exits, and drops the outputs that dead variables feed
  (the running statistics of a closed branch)."""
  known = {
    leaf: int(np.any(decision.branches.get(path.removeprefix('branches/'), True)))
    for path, leaf in leaves.items()
    if path.startswith('branches/')
  }
  gone = _outputs_of(decision.exits, tree)
  absent = [leaf for path, leaf in leaves.items() if path in decision.dead]
  reduced = simplify(program, known)
  fed = dependent(reduced, absent)
  gone |= {i for i, v in enumerate(reduced.outputs) if v in fed}
  return simplify(program, known, gone), frozenset(gone)


def _outputs_of(exits: Mapping[str, Any], tree: Any) -> set[int]:
  """Positions of the outputs that belong to exits which are not kept."""
  out = jax.tree.unflatten(tree, list(range(tree.num_leaves)))
  named: Any = out[0] if isinstance(out, tuple) and out else out  # beside updates
  closed = [name for name, kept in exits.items() if not kept]
  return {i for name in closed for i in jax.tree.leaves(named[name])}


def without(tree: Any) -> Any:
  """The tree, its dict entries that hold nothing but GONE taken out; None elsewhere."""
  leaves = jax.tree.leaves(tree)
  if leaves and all(x is GONE for x in leaves):
    return GONE
  if isinstance(tree, Mapping):
    below, _ = jax.tree_util.tree_flatten_with_path(
      tree, is_leaf=lambda x: x is not tree
    )
    parts = {path[0].key: without(x) for path, x in below}
    make: Any = type(tree)
    return make({k: v for k, v in parts.items() if v is not GONE})
  if isinstance(tree, tuple | list) and any(x is GONE for x in leaves):
    empty = {} if type(tree) is tuple else None  # (outputs, updates) keep their places
    parts = [empty if (v := without(x)) is GONE else v for x in tree]
    make = type(tree)
    return make(*parts) if hasattr(tree, '_fields') else make(parts)
  return tree
