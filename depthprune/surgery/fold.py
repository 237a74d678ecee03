"""Multiplies gates that stay open without being 1 into the arrays of the network.

Branches: y·g with y = BN(conv(x)) equals BN with its scale and bias multiplied by g.
The arrays that can carry the factor are found in the program, backwards from each
product with the gate: through sums (both sides), products (one side), operations that
only move values and, for a positive gate, ReLU and maxima, to variables that are read
once.

Channels: a gate acts where its axis is contracted, so the weight that is contracted
carries it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from depthprune.program import axes as ax
from depthprune.program import gating
from depthprune.program import jaxpr as jx
from depthprune.program.deadcode import LAYOUT, SUMS
from depthprune.program.trace import View, paths_of


def fold(
  view: View, variables: Any, values: Mapping[str, np.ndarray], exits: Mapping[str, Any]
) -> Any:
  """Returns the variables with each branch gate multiplied into its branch's arrays.

  Args:
    view: of the full network.
    variables: its arrays. They keep their branch gates.
    values: {path: value} of each gate that stays, with 0 where a layer of a scan is
      closed. Gates that are 1 everywhere change nothing.
    exits: {name: bool}. Arrays that only a dropped exit needs are not changed.

  Raises:
    ValueError: some value that the gate scales cannot be traced back to variables that
      are read only there.
  """
  leaves, program = paths_of(variables), view.kept(exits)
  names = {v: p for p, v in view.leaves.items() if not p.startswith('branches/')}
  for branch, value in values.items():
    if np.all(value == 1):
      continue
    path = f'branches/{branch}'
    positive = bool(np.all(value >= 0))
    carriers = _carriers(program, view.leaves[path], set(names), positive)
    if carriers is None:
      raise ValueError(
        f'{path}: its value {np.round(value, 4)} cannot be folded: all that it scales '
        'must end in weights of its own; set the gate to 1 or close the branch'
      )
    for v in carriers:
      leaf = leaves[names[v]]
      factor = np.reshape(value, np.shape(value) + (1,) * (leaf.ndim - np.ndim(value)))
      if not isinstance(leaf, Tracer):  # on the host, where nothing is compiled
        leaf = np.asarray(leaf)
      leaves[names[v]] = jnp.asarray(leaf * factor.astype(leaf.dtype))
  return jax.tree.unflatten(jax.tree.structure(variables), list(leaves.values()))


def fold_channels(
  view: View, variables: Any, values: Mapping[str, np.ndarray], exits: Mapping[str, Any]
) -> Any:
  """Returns the variables with channel gates multiplied into the weights they scale.

  Args:
    view: of the full network.
    variables: its arrays.
    values: {group: [slices]}, the values of the gates where slices are kept, else 1.
    exits: {name: bool}. Arrays that only a dropped exit needs are not changed.

  Raises:
    ValueError: a gate that is not 1 is read by something other than weights that are
      read once.
  """
  soft = {group: value for group, value in values.items() if not np.all(value == 1)}
  if not soft:
    return variables
  gates: dict[ax.Axis, Any] = {}
  for group, value in soft.items():
    gating.place(group, view.groups[group], jnp.asarray(value, jnp.float32), gates)
  leaves = paths_of(variables)
  paths = {v: (path, 0) for path, v in view.leaves.items()}
  for path, factor in _channel_factors(view, view.kept(exits), paths, gates):
    leaf = leaves[path]
    leaves[path] = jnp.asarray(leaf * factor.astype(leaf.dtype))
  return jax.tree.unflatten(jax.tree.structure(variables), list(leaves.values()))


def _channel_factors(
  view: View, program: jx.Program, paths: Mapping, gates: Mapping
) -> Iterator[tuple[str, jax.Array]]:
  """Yields (path of a variable, factor that broadcasts to it) per gated contraction.

  `paths` is {value: (path of the variable, number of its leading axes that loops run
  over)}.
  """
  equations, _ = jx.live(program)
  made_by = {v: e for e in equations for v in e.outputs}
  uses = Counter(v for e in equations for v in e.inputs)
  data = gating.activations(view)
  for e in equations:
    for k, axis in gating.gated_side(view, e, data):
      gate = gating.expand(view.facts.dims[e.inputs[k]][axis], gates)
      if gate is not None:
        yield _carried_by(e, k, axis, gate, made_by, uses, paths)
    for body, inputs in jx.bodies_with_inputs(e):
      loops = set(jx.scan_parts(e, list(body.inputs))[2]) if e.name == 'scan' else set()
      inside = {
        inner: (paths[v][0], paths[v][1] + (inner in loops))
        for inner, v in zip(body.inputs, inputs)
        if v in paths and uses[v] == 1
      }
      yield from _channel_factors(view, body, inside, gates)


def _carried_by(e, k: int, axis: int, gate, made_by, uses, paths):
  """Returns the path behind input k of an equation, and the factor that it carries."""
  v = e.inputs[k]
  shape = [-1 if i == axis else 1 for i in range(len(v.shape))]
  factor = jnp.broadcast_to(gate.reshape(shape), v.shape)
  while v not in paths and v in made_by and uses[v] == 1:
    move = made_by[v]
    if move.name not in ('transpose', 'reshape', 'squeeze', 'convert_element_type'):
      break
    if move.name == 'transpose':
      factor = factor.transpose(np.argsort(move.params['permutation']))
    v = move.inputs[0]
    factor = factor.reshape(v.shape)
  if v not in paths or uses[v] != 1:
    raise ValueError(
      f'{e.where}: a channel gate that is neither 0 nor 1 cannot be folded: what reads '
      'the channels has to be a weight that is read once. Round the gates to 0 or 1, '
      'or keep the group whole'
    )
  path, loops = paths[v]
  return path, factor.reshape((1,) * loops + factor.shape)


def _carriers(
  program: jx.Program, gate: jx.Value, variables: set[jx.Value], positive: bool
) -> set[jx.Value] | None:
  """Returns the variables that can carry the factor `gate` in its place, or None.

  `positive` says that the gate is not negative.
  """
  equations, _ = jx.live(program)
  made_by = {v: e for e in equations for v in e.outputs}
  uses = Counter(v for e in equations for v in e.inputs)
  uses.update(program.outputs)
  aliases, readers = {gate}, []
  for e in equations:
    if _is_moved(e, aliases):
      aliases.add(e.outputs[0])
    elif any(v in aliases for v in e.inputs):
      readers.append(e)
  if aliases & set(program.outputs):
    return None
  if not readers:  # the kept exits do not need the gate
    return set()
  if all(e.name == 'mul' for e in readers) and not gate.shape:
    all_carriers: set[jx.Value] = set()
    for e in readers:
      scaled = [v for v in e.inputs if v not in aliases]
      if len(scaled) != 1:
        return None
      carriers = _absorb(scaled[0], made_by, uses, variables, positive)
      if (
        carriers is None or all_carriers & carriers
      ):  # a shared carrier would be scaled twice
        return None
      all_carriers |= carriers
    return all_carriers
  if len(readers) != 1 or readers[0].name != 'scan' or gate not in readers[0].inputs:
    return None
  (e,) = readers
  at = dict(zip(e.bodies[0].inputs, e.inputs, strict=True))
  consts, _, xs = jx.scan_parts(e, list(at))
  # With a gate per layer, an array that all layers share cannot carry it.
  per_layer = gate in (at[v] for v in xs)
  inside = {
    v
    for v in (xs if per_layer else [*consts, *xs])
    if at[v] in variables and uses[at[v]] == 1
  }
  within = next(v for v in at if at[v] is gate)
  inner = _carriers(e.bodies[0], within, inside, positive)
  return None if inner is None else {at[v] for v in inner}


def _is_moved(e: jx.Equation, aliases: set[jx.Value]) -> bool:
  """Whether an equation returns one of the aliases: in another layout, or times 1."""
  one = lambda v: isinstance(v, jx.Literal) and v.shape == () and v.val == 1
  if e.name == 'mul' and any(map(one, e.inputs)):
    return any(v in aliases for v in e.inputs)
  return e.name in LAYOUT and e.inputs[0] in aliases


def _absorb(
  v: jx.Value, made_by, uses, variables, positive: bool
) -> set[jx.Value] | None:
  """Returns the variables to scale in order to scale v; None where there are none."""
  if uses[v] > 1:
    return None
  if v not in made_by:
    return {v} if v in variables else None
  e = made_by[v]
  if positive and _is_homogeneous(e):
    v = next(u for u in e.inputs if not isinstance(u, jx.Literal))
    return _absorb(v, made_by, uses, variables, positive)
  inner = [_absorb(u, made_by, uses, variables, positive) for u in e.inputs]
  if e.name in SUMS or e.name == 'concatenate':
    return None if None in inner else set().union(*(i for i in inner if i))
  if e.name in LAYOUT or e.name in ('neg', 'reduce_sum', 'div'):
    return inner[0]
  if e.name in ('mul', 'dot_general', 'conv_general_dilated'):
    return next((i for i in reversed(inner) if i is not None), None)
  return None


def _is_homogeneous(e: jx.Equation) -> bool:
  """Whether an equation of one array has g f(x) = f(g x) for all g >= 0."""
  if e.name == 'custom_jvp_call' and len(e.inputs) == 1:  # as ReLU is
    (body,) = e.bodies
    return len(body.equations) == 1 and _is_homogeneous(body.equations[0])
  zero = any(isinstance(v, jx.Literal) and v.val == 0 for v in e.inputs)
  return e.name in ('reduce_max', 'reduce_window_max') or (e.name == 'max' and zero)
