"""Gates that stay open without being 1 become part of the arrays.

Of branches: y·g with y = BN(conv(x)) is the same as BN with its scale and bias
multiplied by g. Which arrays carry the factor is read from the program: backwards from
each product, through sums (both sides), products (one side) and what only moves values,
to variables that are read once.

Of channels: the gate is plugged in where their axis is contracted, on the weight that
reads them, so the weight carries it.
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
  view: View, variables: Any, open_: Mapping[str, np.ndarray], exits: Mapping[str, Any]
) -> Any:
  """The variables with every branch gate multiplied into the arrays of its branch.

  open_: by path, the value of each gate that stays, 0 where a layer of a scan is
    closed; gates that are 1 everywhere are left alone. exits: which outputs are kept;
    what only the others need is left alone too. variables keep their branch gates.

  Raises: ValueError where a gate cannot be folded."""
  leaves, program = paths_of(variables), view.kept(exits)
  for branch, value in open_.items():
    if np.all(value == 1):
      continue
    path = f'branches/{branch}'
    names = {v: p for p, v in view.leaves.items() if not p.startswith('branches/')}
    found = _carriers(program, view.leaves[path], set(names))
    if found is None:
      raise ValueError(
        f'{path}: its value {np.round(value, 4)} cannot be folded: all that it scales '
        'must end in weights of its own; set the gate to 1 or close the branch'
      )
    for v in found:
      leaf = leaves[names[v]]
      factor = np.reshape(value, np.shape(value) + (1,) * (leaf.ndim - np.ndim(value)))
      if not isinstance(leaf, Tracer):  # on the host, where nothing is compiled
        leaf = np.asarray(leaf)
      leaves[names[v]] = jnp.asarray(leaf * factor.astype(leaf.dtype))
  return jax.tree.unflatten(jax.tree.structure(variables), list(leaves.values()))


def fold_channels(
  view: View, variables: Any, open_: Mapping[str, np.ndarray], exits: Mapping[str, Any]
) -> Any:
  """The variables with every channel gate multiplied into the weights that read it.

  Args:
    view: of the full network.
    variables: its arrays.
    open_: {group: [slices]}, the gates' values where slices are kept, else 1.
    exits: which outputs are kept; what only the others need is left alone.

  Raises: ValueError for a gate that is not 1 and is read by something else than weights
    that are read once.
  """
  soft = {group: value for group, value in open_.items() if not np.all(value == 1)}
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
  """(path of a variable, factor that broadcasts to it) for every gated contraction.

  paths: {value: (path of the variable, number of axes that loops run over in front)}.
  """
  equations, _ = jx.live(program)
  made_by = {v: e for e in equations for v in e.outputs}
  uses = Counter(v for e in equations for v in e.inputs)
  made = gating.made_of_variables(view)
  for e in equations:
    for k, axis in gating.gated_side(e, made):
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
  """The variable behind input k of an equation, and the factor that it carries."""
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
  program: jx.Program, gate: jx.Value, variables: set[jx.Value]
) -> set[jx.Value] | None:
  """The variables that can carry the factor `gate` in its place, or None."""
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
  if not readers:  # nothing that is left needs it
    return set()
  if all(e.name == 'mul' for e in readers) and not gate.shape:
    return _apart([_factor(e, aliases, made_by, uses, variables) for e in readers])
  if len(readers) != 1 or readers[0].name != 'scan' or gate not in readers[0].inputs:
    return None
  (e,) = readers
  at = dict(zip(e.bodies[0].inputs, e.inputs, strict=True))
  consts, _, xs = jx.scan_parts(e, list(at))
  per_layer = gate in (at[v] for v in xs)  # then arrays of all layers cannot carry it
  inside = {
    v
    for v in (xs if per_layer else [*consts, *xs])
    if at[v] in variables and uses[at[v]] == 1
  }
  found = _carriers(e.bodies[0], next(v for v in at if at[v] is gate), inside)
  return None if found is None else {at[v] for v in found}


def _is_moved(e: jx.Equation, aliases: set[jx.Value]) -> bool:
  """Whether an equation gives one of the aliases again: laid out anew, or times 1."""
  one = lambda v: isinstance(v, jx.Literal) and v.shape == () and v.val == 1
  if e.name == 'mul' and any(map(one, e.inputs)):
    return any(v in aliases for v in e.inputs)
  return e.name in LAYOUT and e.inputs[0] in aliases


def _factor(e: jx.Equation, aliases, made_by, uses, variables) -> set[jx.Value] | None:
  """The carriers of a gate that is one of the two factors of a product."""
  other = [v for v in e.inputs if v not in aliases]
  return _absorb(other[0], made_by, uses, variables) if len(other) == 1 else None


def _apart(found: list[set[jx.Value] | None]) -> set[jx.Value] | None:
  """All carriers of several products; None where one lies within another."""
  sets = [carriers for carriers in found if carriers is not None]
  union = set().union(*sets)
  whole = len(sets) == len(found) and len(union) == sum(map(len, sets))
  return union if whole else None


def _absorb(v: jx.Value, made_by, uses, variables) -> set[jx.Value] | None:
  """The variables to scale so that v is scaled; None where there are none."""
  if uses[v] > 1:
    return None
  if v not in made_by:
    return {v} if v in variables else None
  e = made_by[v]
  inner = [_absorb(u, made_by, uses, variables) for u in e.inputs]
  if e.name in SUMS or e.name == 'concatenate':
    return None if None in inner else set().union(*(i for i in inner if i))
  if e.name in LAYOUT or e.name in ('neg', 'reduce_sum', 'div'):
    return inner[0]
  if e.name in ('mul', 'dot_general', 'conv_general_dilated'):
    return next((i for i in reversed(inner) if i is not None), None)
  return None
