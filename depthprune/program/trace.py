"""A function traced at given input shapes and in one mode, with its axes solved."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.core import Tracer

from depthprune.program import axes as ax
from depthprune.program import jaxpr as jx
from depthprune.program import routing, rules
from depthprune.program.arguments import listed, wrong
from depthprune.program.deadcode import dependent, simplify
from depthprune.program.magnitudes import degrees

GONE = object()  # marks what `without` removes from a pytree


class Decision(NamedTuple):
  """The part of a `keep` tree that concerns depth.

  Attributes:
    branches: by path, whether the branch is kept.
    exits: by name, whether the output is kept.
    dead: paths of the variables that nothing needs any more.
  """

  branches: Mapping[str, Any]
  exits: Mapping[str, Any]
  dead: frozenset[str] = frozenset()


class View(NamedTuple):
  """A traced function.

  Attributes:
    program: its equations.
    facts: the axes of every value.
    leaves: the program's input for every variable, by path.
    groups: the axis that each group of a coupling has in this view.
    tree: structure of what the function returns.
    dropped: positions of the leaves of `tree` that are not among the program's outputs.
    carried: the program's input for every array that is carried from call to call, with
      the position in `tree` of the output that takes its place.
  """

  program: jx.Program
  facts: ax.Facts
  leaves: dict[str, jx.Value]
  groups: dict[str, ax.Axis]
  tree: Any
  dropped: frozenset[int]
  carried: Mapping[jx.Value, int] = jx.NOTHING

  def unpack(self, flat: Sequence) -> Any:
    """Packs the program's outputs, some of them GONE, as the function returns them."""
    rest = iter(flat)
    full = [
      GONE if i in self.dropped else next(rest) for i in range(self.tree.num_leaves)
    ]
    out = jax.tree.unflatten(self.tree, full)
    return without(out) if any(x is GONE for x in full) else out

  def decided(self, decision: Decision) -> jx.Program:
    """Returns the program after a decision on branches and exits."""
    return _decided(self, decision)[0]

  def outputs_left(self, decision: Decision, outputs: Any) -> Any:
    """Returns the outputs that are left after a decision, of all of the function's."""
    gone = _decided(self, decision)[1]
    leaves = [GONE if i in gone else x for i, x in enumerate(jax.tree.leaves(outputs))]
    return without(jax.tree.unflatten(self.tree, leaves))

  def kept(self, exits: Mapping[str, Any]) -> jx.Program:
    """Returns the program without the outputs of exits that are not kept."""
    gone = _outputs_of(exits, self.tree)
    outputs = tuple(v for i, v in enumerate(self.program.outputs) if i not in gone)
    return dataclasses.replace(self.program, outputs=outputs)

  def upto(self, exit_: str) -> jx.Program:
    """Returns the program that one output of a dict needs."""
    outputs = tuple(jax.tree.leaves(self.unpack(self.program.outputs)[exit_]))
    return jx.lean(dataclasses.replace(self.program, outputs=outputs))


class Source(NamedTuple):
  """The variable that a value of the program is.

  Attributes:
    path: path of the variable.
    axes: for every axis of the value, which axis of the variable it is.
  """

  path: str
  axes: tuple[int, ...]


def sources(view: View) -> dict[jx.Value, Source]:
  """Finds variables among values, through casts, transposes and control flow."""
  found = {v: Source(p, tuple(range(len(v.shape)))) for p, v in view.leaves.items()}

  def walk(program: jx.Program):
    for e in program.equations:
      known = found.get(e.inputs[0]) if e.inputs else None
      if e.name in ('convert_element_type', 'copy') and known:
        found[e.outputs[0]] = known
      elif e.name == 'transpose' and known:
        axes = tuple(known.axes[i] for i in e.params['permutation'])
        found[e.outputs[0]] = Source(known.path, axes)
      for body, outer in jx.bodies_with_inputs(e):
        scanned = len(jx.scan_parts(e, e.inputs)[2]) if e.name == 'scan' else 0
        for i, (v, o) in enumerate(zip(body.inputs, outer, strict=True)):
          if o in found:
            path, axes = found[o]
            is_layer = i >= len(outer) - scanned
            found[v] = Source(path, axes[1:] if is_layer else axes)
        walk(body)

  walk(view.program)
  return found


def paths_of(tree: Any) -> dict[str, Any]:
  """Returns the leaves of a pytree by their paths, joined with '/'.

  Raises:
    ValueError: two leaves have the same path.
  """
  flat = jax.tree_util.tree_flatten_with_path(tree)[0]
  named = [(jax.tree_util.keystr(p, simple=True, separator='/'), x) for p, x in flat]
  if len(dict(named)) < len(named):
    twice = next(p for p, _ in named if sum(p == q for q, _ in named) > 1)
    raise ValueError(f'{twice}: two leaves have this path; rename one of them')
  return dict(named)


def look(
  fn: Callable,
  variables: Any,
  inputs: tuple,
  kwargs: dict,
  dims: Mapping[str, ax.Dims],
  decision: Decision | None = None,
) -> View:
  """Traces fn(variables, *inputs, **kwargs) on shapes and solves its axes.

  Args:
    fn: a traceable function.
    variables: its first argument, a tree of arrays or ShapeDtypeStructs.
    inputs: its other positional arguments.
    kwargs: its keyword arguments; those that are not arrays are static.
    dims: the axes of every variable, by path.
    decision: what is removed first. Branches that are kept then count as 1, because
      `fold` multiplies their gates into the arrays.
  """
  arrays, merge = split_arrays((inputs, kwargs))

  def call(variables, arrays):
    args, named = merge(arrays)
    return fn(variables, *args, **named)

  variables = jax.tree.map(_anywhere, jax.eval_shape(lambda v: v, variables))
  traced = jx.trace(call, (variables, arrays))
  leaves = dict(zip(paths_of(variables), traced.program.inputs, strict=False))
  carried = _carried(traced, traced.program.inputs[len(leaves) :], inputs, kwargs)
  return solve(traced, leaves, carried, dims, decision)


def solve(
  traced: jx.Traced,
  leaves: dict[str, jx.Value],
  carried: Mapping[jx.Value, int],
  dims: Mapping[str, ax.Dims],
  decision: Decision | None = None,
) -> View:
  """Solves the axes of a program.

  Args:
    traced: the program, whose first inputs are the variables.
    leaves: the program's input for every variable, by path.
    carried: as a View has it.
    dims: the axes of every variable, by path.
    decision: as `look` takes it.
  """
  program, tree = traced
  arguments = program.inputs[len(leaves) :]
  view = View(program, ax.Facts(), leaves, {}, tree, frozenset(), carried)
  if decision is not None:
    program, dropped = _decided(view, decision)
    view = view._replace(program=program, dropped=dropped)
  activations = dependent(program, arguments)
  facts = ax.Facts(
    activations=activations,
    magnitudes=degrees(program, activations),
    varying=dependent(program, program.inputs),
  )
  data = [ax.fresh(v.shape, None if v in carried else 'input') for v in arguments]
  rules.infer(facts, program, [*(dims[p] for p in leaves), *data])
  positions = (i for i in range(tree.num_leaves) if i not in view.dropped)
  outputs = dict(zip(positions, program.outputs, strict=True))
  for v, i in carried.items():
    if i in outputs:
      for a, b in zip(facts.dims[v], facts.dims[outputs[i]], strict=True):
        ax.unify(a, b)
  routing.close(facts)
  normalised = {v for axis in facts.normalised for v in ax.leaves(axis)}
  for axis, why in facts.written:  # a norm would see it in the slices that are closed
    for v in normalised.intersection(ax.leaves(axis)):
      if not v.notes:
        v.notes.add(f'it is normalised over, and {why}')
  return view._replace(facts=facts)


def carried_names(kwargs: Mapping[str, Any], outputs: Any) -> list[str]:
  """Returns the names of what a function carries from call to call.

  That is an argument by keyword, a tree of arrays such as a key/value cache, which the
  function returns under the same name in its dict of outputs.
  """
  if not isinstance(outputs, Mapping):
    return []
  trees = (name for name, x in kwargs.items() if not is_array(x) and split_arrays(x)[0])
  return [name for name in trees if name in outputs]


def _carried(
  traced: jx.Traced, values: Sequence[jx.Value], inputs: tuple, kwargs: dict
) -> dict[jx.Value, int]:
  """The inputs that are carried, with the positions of their outputs; see View.

  `values` are the program's inputs for the arrays of the call.
  """
  program, tree = traced
  outputs = jax.tree.unflatten(tree, range(tree.num_leaves))
  names = carried_names(kwargs, outputs)
  given = split_arrays((inputs, kwargs))[1](values)[1]
  taken = paths_of({name: given[name] for name in names})
  back = paths_of({name: outputs[name] for name in names})
  for path in taken.keys() & back.keys():
    before, after = taken[path].shape, program.outputs[back[path]].shape
    if before != after:
      what = f'goes in as {before} and comes out as {after}'
      raise wrong(path, what, 'what is carried from call to call keeps its shape')
  return {v: back[path] for path, v in taken.items() if path in back}


def _anywhere(x: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
  """The same shape on no particular devices: those of a cut may lie elsewhere."""
  return jax.ShapeDtypeStruct(x.shape, x.dtype, weak_type=x.weak_type)


def split_arrays(arguments: Any) -> tuple[list, Callable]:
  """Separates the arrays among arguments from what is static.

  Returns:
    The list of arrays, and merge(arrays), which gives the arguments back.
  """
  leaves, tree = jax.tree.flatten(arguments)

  def merge(arrays):
    rest = iter(arrays)
    both = [next(rest) if is_array(x) else x for x in leaves]
    return jax.tree.unflatten(tree, both)

  return [x for x in leaves if is_array(x)], merge


def is_array(x: Any) -> bool:
  """Whether x is an array of JAX or NumPy, or the shape of one."""
  return isinstance(x, jax.Array | np.ndarray | np.generic | jax.ShapeDtypeStruct)


def several(example: Any) -> tuple:
  """Returns the inputs of a network: those in a plain tuple or list, else just one."""
  return tuple(example) if type(example) in (tuple, list) else (example,)


def counts_examples(inputs: Any, outputs: Any = ()) -> tuple[bool, ...]:
  """Returns for each array among inputs whether its axis 0 counts examples.

  The outputs, if they are known, say how many examples there are, otherwise the first
  array with an axis does. Arrays of another first size are shared by all examples, as
  positions [length] or a mask [length, length] are, and so are scalars and keys.
  """
  # A key of `jax.random.PRNGKey` has two numbers, however many examples there are.
  keys = ((2,), np.uint32)
  sizes = [
    x.shape[0] if x.shape and (x.shape, x.dtype) != keys else None
    for x in split_arrays(inputs)[0]
  ]
  answers = [x.shape[0] for x in jax.tree.leaves(outputs) if x.shape]
  known = (n for n in (*answers, *sizes) if n is not None and n in sizes)
  examples = next(known, None)
  return tuple(n is not None and n == examples for n in sizes)


def batched(inputs: Any, batch: Any, counts: Sequence[bool] | None = None) -> Any:
  """Returns the shapes of inputs for `batch` examples, a number or a symbolic size.

  Args:
    inputs: a tree of arrays; what is not an array stays, as does a shared array.
    batch: the number of examples.
    counts: whether axis 0 of each array counts examples, by default as
      `counts_examples` finds it without the outputs.

  Raises:
    ValueError: no array has examples along axis 0.
  """
  arrays, merge = split_arrays(abstract(inputs))
  counts = counts_examples(inputs) if counts is None else counts
  if not any(counts):
    expected = 'expected an array with examples along axis 0 among the inputs'
    got = listed(jax.tree.leaves(inputs))
    raise wrong('inputs', f'{expected}, got {got}')
  sized = lambda x: jax.ShapeDtypeStruct((batch, *x.shape[1:]), x.dtype)
  return merge([sized(x) if c else x for x, c in zip(arrays, counts, strict=True)])


def abstract(tree: Any) -> Any:
  """Returns the tree with ShapeDtypeStructs in the place of its arrays."""
  arrays, merge = split_arrays(tree)
  return merge(jax.eval_shape(lambda x: x, arrays))


def remembered(build: Callable) -> Callable:
  """Caches views by the shapes, dtypes, shardings and static arguments of calls.

  Args:
    build: (inputs, kwargs) -> View. A view that closes over arrays of an outer trace
      is not cached.

  Returns:
    (inputs, kwargs) -> View.
  """
  views: dict[Any, View] = {}

  def view(inputs: tuple, kwargs: dict) -> View:
    arguments = abstract((inputs, kwargs))
    key = signature(arguments)
    if key in views:
      return views[key]
    built = build(*arguments)
    constants = built.program.constants.values()
    if not any(isinstance(c, Tracer) for c in constants):
      views[key] = built
    return built

  return view


def signature(arguments: Any) -> Hashable:
  """Returns what two calls have in common that are traced to the same program.

  Args:
    arguments: of the call, as `abstract` returns them.
  """

  def kind(x: Any) -> tuple:
    if isinstance(x, jax.ShapeDtypeStruct):
      return x.shape, x.dtype, x.weak_type, x.sharding
    return type(x), x

  leaves, tree = jax.tree.flatten(arguments)
  return (tree, *map(kind, leaves))


def without(tree: Any) -> Any:
  """Removes dict entries that hold nothing but GONE; elsewhere GONE becomes None."""
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
    empty = {} if type(tree) is tuple else None  # (outputs, updates) stays a pair
    parts = [empty if (v := without(x)) is GONE else v for x in tree]
    make = type(tree)
    return make(*parts) if hasattr(tree, '_fields') else make(parts)
  return tree


def _decided(view: View, decision: Decision) -> tuple[jx.Program, frozenset[int]]:
  """Closes branches, and removes exits and the outputs that only dead variables feed.

  Such outputs are the running statistics of a closed branch. What is carried from call
  to call is removed where nothing else reads it.
  """
  program, tree, leaves = view.program, view.tree, view.leaves
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
  gone |= _unread(reduced, view.carried, gone)
  return simplify(program, known, gone), frozenset(gone)


def _unread(
  program: jx.Program, carried: Mapping[jx.Value, int], gone: set[int]
) -> set[int]:
  """Returns the positions of carried outputs that no other output needs as inputs."""
  unread, size = set(carried.values()) - gone, -1
  while size != len(unread):  # what is read keeps alive what it is computed from
    size = len(unread)
    _, needed = jx.live(simplify(program, {}, unread | gone))
    unread -= {i for v, i in carried.items() if v in needed}
  return unread


def _outputs_of(exits: Mapping[str, Any], tree: Any) -> set[int]:
  """Returns the positions of the outputs that belong to exits that are not kept."""
  out = jax.tree.unflatten(tree, list(range(tree.num_leaves)))
  # A module with mutable collections returns (outputs, updates).
  named: Any = out[0] if isinstance(out, tuple) and out else out
  closed = [name for name, kept in exits.items() if not kept]
  return {i for name in closed for i in jax.tree.leaves(named[name])}
