"""Channel gates for any function, placed where an axis is contracted.

x·(g∘W) = (x∘g)·W: scaling the weight of every equation that sums over an axis equals
gating the activation wherever it is read, in value and in gradient, whatever produced
it. The operand *at that equation* is scaled, never the stored array, so a square kernel
or one that is used twice is gated on its reading side only. Where two activations meet
(query · key), the smaller of them is scaled, once. A norm reads its axis too: where
activations are gated by g, their squares in its sum are scaled by g².

Source: the gate of arXiv 1904.10921 ("appended to each intermediate tensor"). Placing
it at the contraction is ours.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from depthprune.program import arguments, rules
from depthprune.program import axes as ax
from depthprune.program import jaxpr as jx
from depthprune.program.coupling import Coupling
from depthprune.program.magnitudes import root
from depthprune.program.modules import runnable
from depthprune.program.trace import View, paths_of, remembered, split_arrays

GATES = "{'channels': {group: [slices]}, 'branches': {path: ()}}"


def plug(model: Any, coupling: Coupling) -> Callable:
  """Adds channel gates to a network, with no change to its code.

  With all gates open the result is that of the network. A closed gate (0) acts as if
  its channel were removed, and gates can be trained by gradient.

  Args:
    model: the network that was coupled: a linen module, or a function of (variables,
      *inputs, **kwargs).
    coupling: made by `couple`; `coupling.gates()` are its open gates.

  Returns:
    f(variables, gates, *inputs, **kwargs), for every input shape and mode of the model.
    Its outputs are those of the model, without taps that no exit needs. `gates` is
    {'channels': {group: [slices]}, 'branches': {path: () or [layers]}}. Groups that are
    missing are open, and branch gates replace those in the variables. Gates of experts
    (groups of the kind 'expert') are 0 or 1: where one is 0, the router's logit is
    -inf. It raises KeyError for an unknown or pinned group or branch, and ValueError
    for a group that cannot be gated, a gate of the wrong shape, or a mode with other
    groups.
  """
  fn = runnable(model)
  arguments.coupling(coupling)
  views = remembered(lambda inputs, kwargs: coupling.retrace(fn, inputs, kwargs))

  def gated(variables, gates, *inputs, **kwargs):
    write = 'write plug(model, coupling)(variables, coupling.gates(), *inputs)'
    arguments.parts('gates', gates, GATES, write, known=('exits',))
    channels = gates.get('channels', {})
    channels = {group: jnp.asarray(gate) for group, gate in channels.items()}
    check(coupling, channels)
    if gates.get('branches'):
      variables = with_branches(variables, gates['branches'])
    view = views(inputs, kwargs)
    coupling.check_view(view, channels)
    execute = executor(coupling, view, channels)
    arrays, _ = split_arrays((inputs, kwargs))
    args = [*jax.tree.leaves(variables), *arrays]
    return view.unpack(jx.interpret(view.program, args, execute))

  return gated


def executor(coupling: Coupling, view: View, channels: Mapping[str, Any]) -> Callable:
  """Returns execute(equation, inputs), which runs equations of a view with gates.

  Args:
    coupling: of the network.
    view: the network, traced.
    channels: {group: gate [slices]}, of groups that can be gated or are experts.
  """
  weights: dict[ax.Axis, jax.Array] = {}
  experts: dict[ax.Axis, jax.Array] = {}
  for group, gate in channels.items():
    gates = experts if coupling.groups[group].kind == 'expert' else weights
    place(group, view.groups[group], gate, gates)

  def run(program: jx.Program, args: Sequence) -> list:
    return jx.interpret(program, args, execute)

  def execute(e: jx.Equation, ins: list) -> list:
    for k, axis in gated_side(view.facts, e):
      scale = expand(view.facts.dims[e.inputs[k]][axis], weights)
      if scale is not None:
        scale = scale ** view.facts.magnitudes.get(e.inputs[k], 1)
        shape = [-1 if i == axis else 1 for i in range(ins[k].ndim)]
        ins[k] = ins[k] * scale.astype(ins[k].dtype).reshape(shape)
    if e.name == 'sqrt' and e.inputs[0] in view.facts.magnitudes:
      return [root(*ins)]
    outs = jx.bind(e, ins, e.params, run)
    if e in view.facts.routers:
      outs = [_routed(outs[0], view.facts, e, experts)]
    return outs

  return execute


def _routed(logits: jax.Array, facts: ax.Facts, e: jx.Equation, gates: Mapping):
  """The logits of a router, -inf for the experts whose gate is 0."""
  axis = facts.routers[e]
  gate = expand(facts.dims[e.outputs[0]][axis], gates)
  if gate is None:
    return logits
  shape = [-1 if i == axis else 1 for i in range(logits.ndim)]
  return jnp.where(gate.reshape(shape) > 0, logits, -jnp.inf)


def check(coupling: Coupling, channels: Mapping):
  """Checks that every gate belongs to a group that can be gated and has its size.

  Raises:
    KeyError: no such group.
    ValueError: the group cannot be gated, or the gate has another shape.
  """
  for name, gate in channels.items():
    coupling.axis(name)
    group = coupling.groups[name]
    if group.ungated and group.kind != 'expert':
      raise ValueError(f'{name}: this group cannot be gated: {group.ungated}')
    coupling.has_size(name, gate)


def with_branches(variables: Any, branches: Mapping[str, Any]) -> Any:
  """Returns the variables with these branch gates in the place of theirs.

  Raises:
    KeyError: the variables have no such branch.
  """
  paths = paths_of(variables)
  missing = [b for b in branches if f'branches/{b}' not in paths]
  if missing:
    raise KeyError(f'{missing[0]}: the variables have no such branch gate')
  leaves = [branches.get(p.removeprefix('branches/'), x) for p, x in paths.items()]
  return jax.tree.unflatten(jax.tree.structure(variables), leaves)


def place(group: str, axis: ax.Axis, gate: jax.Array, gates: dict):
  """Adds the gate of a group to `gates`, for each of its axis variables in a view.

  Args:
    group: name of the group, for errors.
    axis: the axis of the group in the view.
    gate: the gate, [slices].
    gates: {axis variable: gate}, to which it is added.

  Raises:
    ValueError: the axis is laid out in another way than where it was coupled.
  """
  axis = ax.norm(axis)
  if isinstance(axis, ax.Cat):
    at = 0
    for p in axis.parts:
      place(group, p, gate[at : at + p.size], gates)
      at += p.size
  elif isinstance(axis, ax.Prod) or axis in gates:
    raise ValueError(
      f'{group}: this axis is laid out or coupled differently here than where it was '
      'coupled; couple() the function in this mode and at these shapes'
    )
  else:
    gates[axis] = gate


def expand(axis: ax.Axis, gates: Mapping) -> jax.Array | None:
  """Returns the gate of every slice of an axis [axis.size]; None where all are open."""
  axis = ax.norm(axis)
  if isinstance(axis, ax.Var):
    return gates.get(axis)
  parts = [expand(p, gates) for p in axis.parts]
  if all(p is None for p in parts):
    return None
  full = [
    jnp.ones(a.size, jnp.float32) if p is None else p
    for a, p in zip(axis.parts, parts, strict=True)
  ]
  if isinstance(axis, ax.Cat):
    return jnp.concatenate(full)
  out = full[0]
  for p in full[1:]:
    out = jnp.outer(out, p).ravel()
  return out


def gated_side(facts: ax.Facts, e: jx.Equation) -> list[tuple[int, int]]:
  """Returns which side of a contraction to scale: a weight, else the smaller array."""
  sides = [side for side in rules.contracted(facts, e) if side]

  def order(side):
    v = e.inputs[side[0][0]]
    return v in facts.activations, math.prod(v.shape)

  return min(sides, key=order, default=[])
