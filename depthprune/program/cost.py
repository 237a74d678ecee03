"""The FLOPs, parameters and memory of a network as functions of its channel gates.

The number of slices of an axis follows from its expression: a variable counts the sum
of its gates, a product multiplies and a concatenation adds. A contraction costs 2 × the
product of its counts, so one multiply-accumulate is 2 FLOPs, and a scan costs its body
times its length. The cost of a hard decision is therefore exact, and the cost of gates
is differentiable in the inputs and the outputs of every layer.

As in the literature, only convolutions and dot products count as FLOPs. Kernel taps
that fall on padding count, taps that fall on the holes of a transposed convolution do
not. The most expensive branch of a `cond` counts. A `while` counts as one iteration,
because its length is not known.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from depthprune.program import arguments, rounding, rules
from depthprune.program import axes as ax
from depthprune.program import jaxpr as jx
from depthprune.program.rounding import RoundTo
from depthprune.program.trace import Decision, Source, View, sources

if TYPE_CHECKING:
  from depthprune.program.coupling import Coupling

Count = Callable[[ax.Axis], Any]


def flops(coupling: Coupling, gates: Mapping | None = None) -> Any:
  """Returns the FLOPs of one call, where one multiply-accumulate is 2 FLOPs.

  Args:
    coupling: of the network, made by `couple`. The FLOPs are those at its input shapes;
      couple with a batch of 1 for the FLOPs of one example.
    gates: what is kept. None counts the whole network. A keep tree of bool arrays,
      {'channels': {group: [n]}, 'branches': {path: ()}, 'exits': {name: bool}}, counts
      the network that is left. A tree of float gates counts their sums.

  Returns:
    An int for None or a keep tree; for float gates a float32 scalar that can be
    differentiated.
  """
  view, count, alive = _reading(coupling, gates)
  return _flops(view, view.program, count, alive)


def of_program(view: View, program: jx.Program) -> int:
  """Returns the FLOPs of an uncut program made of equations of a view."""
  return int(_flops(view, program, lambda axis: axis.size, lambda _: 1))


def params(coupling: Coupling, gates: Mapping | None = None) -> Any:
  """Returns the number of trainable parameters.

  These are the `nnx.Param` of an NNX module, the leaves under 'params' of other trees,
  or all variables where there are none of these.

  Args:
    coupling: of the network, made by `couple`.
    gates: what is kept: None, a keep tree or float gates, as in `flops`.

  Returns:
    An int for None or a keep tree; for float gates a float32 scalar that can be
    differentiated.
  """
  view, count, alive = _reading(coupling, gates)
  return sum(
    alive(view.leaves[path]) * math.prod(map(count, axes))
    for path, axes in coupling.axes.items()  # in order, so that sums never differ
    if path in coupling.trainable
  )


def stored_bytes(coupling: Coupling, gates: Mapping | None = None) -> Any:
  """Returns the bytes of the variables, and of what is carried from call to call.

  That is what a network that writes keeps in memory: its weights, and a key/value cache
  if it was coupled with one, of the batch and length of that cache.

  Args:
    coupling: of the network, made by `couple`.
    gates: what is kept: None, a keep tree or float gates, as in `flops`.

  Returns:
    An int for None or a keep tree; for float gates a float32 scalar that can be
    differentiated.
  """
  view, count, alive = _reading(coupling, gates)
  stored = {view.leaves[p]: dims for p, dims in coupling.axes.items()}
  carried = {v: view.facts.dims[v] for v in view.carried}
  return sum(
    alive(v) * math.prod(map(count, dims)) * v.dtype.itemsize
    for v, dims in {**stored, **carried}.items()
  )


def peak_bytes(coupling: Coupling, gates: Mapping | None = None) -> Any:
  """Returns the most bytes of inputs and intermediate values held at the same time.

  Equations run in program order and nothing is fused, so this is an upper bound of what
  a compiler needs. Variables are not counted.

  Args:
    coupling: of the network, made by `couple`; the batch is that of its inputs.
    gates: what is kept: None, a keep tree or float gates, as in `flops`.

  Returns:
    An int for None or a keep tree; for float gates a float32 scalar that can be
    differentiated.
  """
  view, count, alive = _reading(coupling, gates)
  held = {*view.leaves.values(), *view.program.constants}
  return _peak(view, view.program, count, alive, held)


class Layer(NamedTuple):
  """What a layer is after a decision.

  Attributes:
    outputs: the axes of its array that the inputs of the layer do not share, whose
      product is the width of what it returns; () for a product of two activations.
    width: number of slices of these axes that are kept.
    flops: FLOPs of all calls of the layer.
  """

  outputs: tuple[int, ...]
  width: int
  flops: int


def layers(coupling: Coupling, keep: Mapping | None = None) -> dict[str, Layer]:
  """Returns the layers that are left, each with its part of `flops`.

  A layer is an array that convolutions or products contract, under its path. Products
  of two activations, such as those of an attention, are one layer under the name of
  their module.

  Args:
    coupling: of the network, made by `couple`; the FLOPs are those at its input shapes.
    keep: a keep tree of bool arrays; None counts the whole network.

  Returns:
    {path: layer}, in the order in which they are first called.
  """
  view, count, alive = reading = _reading(coupling, keep)
  found: dict[str, Layer] = {}
  for name, outputs, e, times in _contractions(*reading):
    width = math.prod(count(coupling.axes[name][i]) for i in outputs)
    flops = times * _of_equation(view, e, count, alive)
    before = found[name].flops if name in found else 0
    found[name] = Layer(outputs, width, before + flops)
  return found


def contractions(
  coupling: Coupling,
) -> Iterator[tuple[str, tuple[int, ...], jx.Equation, int]]:
  """Returns the convolutions and products of a network, also those in loops.

  Args:
    coupling: of the network, made by `couple`.

  Returns:
    (path of the layer, its output axes, equation, how often it is called) of each, as
    in `layers`, in the order of the calls.
  """
  return _contractions(*_reading(coupling, None))


def _contractions(
  view: View, count: Count, alive: Callable
) -> Iterator[tuple[str, tuple[int, ...], jx.Equation, int]]:
  arrays = sources(view)

  def walk(program: jx.Program, times: int) -> Iterator:
    for e in program.equations:
      if not any(map(alive, e.outputs)):
        continue
      bodies = e.bodies
      if e.name == 'cond':
        bodies = [max(bodies, key=lambda body: _flops(view, body, count, alive))]
      for body in bodies:
        inside = count(view.facts.hidden[e]) if e.name == 'scan' else 1
        yield from walk(body, times * inside)
      if e.name in (*rules.PRODUCTS, 'conv_general_dilated'):
        yield *_array_of(e, arrays), e, times

  yield from walk(view.program, 1)


def _array_of(
  e: jx.Equation, arrays: Mapping[jx.Value, Source]
) -> tuple[str, tuple[int, ...]]:
  """Returns the path of the array that an equation contracts, and its output axes."""
  for k in (1, 0):  # a kernel is mostly the second
    if (array := arrays.get(e.inputs[k])) is None:
      continue
    if e.name in rules.PRODUCTS:
      contracting, batch = (axes[k] for axes in rules.product_axes(e))
      ragged = e.params.get('ragged_dot_dimension_numbers')
      groups = ragged.rhs_group_dimensions if ragged and k == 1 else ()
      outputs = {*range(len(array.axes))} - {*contracting, *batch, *groups}
    else:
      outputs = {e.params['dimension_numbers'].rhs_spec[0]}
    return array.path, tuple(sorted(array.axes[i] for i in outputs))
  scope = str(e.source.name_stack).split('/') if e.source else []
  modules = [part for part in scope[1:] if not {'.', '>'} & {*part}]
  return '/'.join(modules) or e.name, ()


def rounded(gates: Mapping, round_to: RoundTo) -> dict:
  """Scales channel gates so that they sum to the widths that rounding would build.

  The gradient stays the one of the unscaled gates.

  Args:
    gates: {'channels': {group: float [n]}}; other entries are returned as they are.
    round_to: widths are multiples of this, or 'auto'.

  Returns:
    The gates, to pass to `flops`, `params` or `peak_bytes`.
  """

  def one(gate):
    n = jnp.sum(gate)
    width = rounding.built(n, gate.size, round_to, jnp)
    scale = jnp.where(n > 0, width / n, 1.0)
    return gate + jax.lax.stop_gradient(gate * scale - gate)

  channels = {g: one(gate) for g, gate in gates.get('channels', {}).items()}
  return {**gates, 'channels': channels}


# ---- what a decision keeps -----------------------------------------------------------


def _reading(coupling: Coupling, gates: Mapping | None):
  """Returns the view, a function that counts an axis, and one that weighs a value.

  The weight of a value is 0 where it is dead, 1 where it is alive, and the gate of its
  branch where that is soft.
  """
  arguments.coupling(coupling)
  gates = arguments.parts('gates', {} if gates is None else gates, known=('exits',))
  gates = {part: {**entries} for part, entries in gates.items()}
  for part in gates.keys() - {'exits'}:
    for name, g in gates[part].items():
      gates[part][name] = np.asarray(g) if isinstance(g, list | tuple) else g
  channels = gates.get('channels', {})
  for group, gate in channels.items():
    coupling.has_size(group, gate)
  hard = all(
    isinstance(g, (np.ndarray, np.bool_, bool)) and np.asarray(g).dtype == bool
    for g in [*channels.values(), *gates.get('branches', {}).values()]
  )
  total = lambda w: int(np.sum(w)) if hard else jnp.sum(w)
  totals = {coupling.axis(g): total(w) for g, w in channels.items()}

  def count(axis: ax.Axis):
    axis = ax.norm(axis)
    if isinstance(axis, ax.Var):
      return totals.get(axis, axis.size)
    parts = [count(p) for p in axis.parts]
    return math.prod(parts) if isinstance(axis, ax.Prod) else sum(parts)

  decision = Decision(gates.get('branches', {}), gates.get('exits', {}))
  if hard:
    needed = coupling.needed(decision)
    return coupling.view, count, lambda v: int(v in needed)
  return coupling.view, count, _soft_life(coupling, decision)


def _soft_life(coupling: Coupling, decision: Decision) -> Callable[[jx.Value], Any]:
  """Weighs a value by the gates of all branches that make it dead when they close."""
  always = coupling.needed(Decision({}, decision.exits))
  killed = {
    branch: always - coupling.needed(Decision({branch: False}, decision.exits))
    for branch in decision.branches
  }

  def alive(v: jx.Value):
    if v not in always:
      return 0
    factors = [g for b, g in decision.branches.items() if v in killed[b]]
    return math.prod(jnp.mean(g) for g in factors) if factors else 1

  return alive


# ---- the walks -----------------------------------------------------------------------


def _flops(view: View, program: jx.Program, count: Count, alive: Callable) -> Any:
  total = 0
  for e in program.equations:
    lives = [alive(v) for v in e.outputs]
    # One output that is alive (1) outweighs a soft gate, which outweighs a dead one.
    life = max(lives, key=lambda x: x if isinstance(x, int) else 0.5, default=0)
    if isinstance(life, int) and life == 0:
      continue
    # A soft gate that weighs the whole equation must not weigh its body a second time.
    inner = alive if isinstance(life, int) else lambda _: 1
    total = total + life * _of_equation(view, e, count, inner)
  return total


def _of_equation(view: View, e: jx.Equation, count: Count, alive: Callable) -> Any:
  dims = view.facts.dims
  if e.name in rules.PRODUCTS:  # a row of a ragged one meets one group
    summed, _ = rules.contracted(view.facts, e)
    lhs, out = dims[e.inputs[0]], dims[e.outputs[0]]
    return 2 * math.prod(map(count, [*out, *(lhs[i] for _, i in summed)]))
  if e.name == 'conv_general_dilated':
    return _of_convolution(e, dims, count)
  inside = [_flops(view, body, count, alive) for body in e.bodies]
  if e.name == 'scan':
    return count(view.facts.hidden[e]) * inside[0]
  if e.name == 'cond':
    return functools.reduce(_larger, inside)
  return sum(inside)


def _of_convolution(e: jx.Equation, dims: Mapping, count: Count) -> Any:
  """Returns 2 × batch × outputs × inputs per group × (position, tap) pairs."""
  p, dn = e.params, e.params['dimension_numbers']
  lhs, kernel, out = (dims[v] for v in (*e.inputs, *e.outputs))
  batch, features, *spatial = dn.out_spec
  _, per_group, *window = dn.rhs_spec
  pairs = 1
  for i, (o, k) in enumerate(zip(spatial, window, strict=True)):
    pairs *= _pairs(
      size=lhs[dn.lhs_spec[2 + i]].size,
      taps=kernel[k].size,
      out=out[o].size,
      stride=p['window_strides'][i],
      pad=p['padding'][i][0],
      holes=p['lhs_dilation'][i],
      spread=p['rhs_dilation'][i],
    )
  channels = math.prod(map(count, (out[batch], out[features], kernel[per_group])))
  return 2 * pairs * channels


def _pairs(size: int, taps: int, out: int, stride, pad, holes, spread) -> int:
  """Counts the (position, tap) pairs that multiply along one axis of `size` inputs.

  Padding counts as input and holes do not: in a transposed convolution every input
  meets every tap once.
  """
  if holes == 1:
    return out * taps
  if stride == 1:
    return size * taps
  at = np.arange(out)[:, None] * stride - pad + np.arange(taps)[None, :] * spread
  return int(np.sum(at % holes == 0))


def _peak(view: View, program, count: Count, alive, held: set) -> Any:
  """Returns the most bytes alive at one equation, without those of `held`."""
  last = {v: i for i, e in enumerate(program.equations) for v in e.inputs}
  last.update(dict.fromkeys(program.outputs, len(program.equations)))

  def size(v):
    is_key = jnp.issubdtype(v.dtype, jax.dtypes.extended)
    bytes_ = 8 if is_key else np.dtype(v.dtype).itemsize
    return bytes_ * alive(v) * math.prod(map(count, view.facts.dims[v]))

  live = {v: size(v) for v in program.inputs if v in last and v not in held}
  peak = sum(live.values())
  for i, e in enumerate(program.equations):
    live.update((v, size(v)) for v in e.outputs if v in last)
    now = sum(live.values())
    for body in e.bodies:
      now += _peak(view, body, count, alive, {*body.inputs, *body.constants})
    peak = _larger(peak, now)
    live = {v: n for v, n in live.items() if last[v] > i}
  return peak


def _larger(a: Any, b: Any) -> Any:
  if isinstance(a, int) and isinstance(b, int):
    return max(a, b)
  return jnp.maximum(a, b)
