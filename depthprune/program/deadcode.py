"""Dead code: what a program still needs once some of its inputs are known to be 0.

Closing a branch gate, dropping an exit and removing an auxiliary path are all this one
operation. Channel pruning never needs it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping

import jax
import numpy as np

from depthprune.program import jaxpr as jx

# All of these give 0 for 0; those of LAYOUT also give 1 for 1.
LAYOUT = frozenset(
  """broadcast_in_dim convert_element_type copy reshape slice squeeze
  stop_gradient tile transpose""".split()
)
ZERO_TO_ZERO = LAYOUT | frozenset(
  """abs cbrt erf integer_pow neg real reduce_max reduce_min reduce_sum sign sin sinh
  sqrt square tan tanh""".split()
)
BILINEAR = frozenset(('mul', 'dot_general', 'conv_general_dilated', 'and'))
SUMS = frozenset(('add', 'add_any', 'sub', 'or'))


def simplify(
  program: jx.Program, known: Mapping[jx.Value, int], drop: Collection[int] = ()
) -> jx.Program:
  """Returns the program without everything that cannot matter, with the same inputs.

  Args:
    program: the program.
    known: inputs that are 0 or 1 everywhere.
    drop: positions of outputs to leave out.
  """
  number = dict(known)
  same: dict[jx.Value, jx.Value] = {}
  equations = []
  constants = dict(program.constants)

  def read(v: jx.Value) -> jx.Value:
    v = same.get(v, v)
    if v not in number:
      return v
    # A known number becomes an equation that fills an array with it.
    scalar, filled = jx.Value((), v.dtype), jx.Value(v.shape, v.dtype)
    constants[scalar] = np.asarray(number[v], v.dtype)
    params = {'shape': v.shape, 'broadcast_dimensions': (), 'sharding': None}
    fill = jx.Equation(jax.lax.broadcast_in_dim_p, (scalar,), (filled,), params)
    equations.append(fill)
    return filled

  for e in program.equations:
    ins = [same.get(v, v) for v in e.inputs]
    answer = fold(e, ins, [number.get(v) for v in ins])
    if isinstance(answer, jx.Value):
      same[e.outputs[0]] = answer
    elif answer is not None:
      number.update(dict.fromkeys(e.outputs, answer))
    else:
      bodies = _scanned(e, ins, number) or e.bodies
      inputs = tuple(read(v) for v in e.inputs)
      equations.append(
        jx.Equation(e.primitive, inputs, e.outputs, e.params, bodies, e.source)
      )
  outputs = tuple(read(v) for i, v in enumerate(program.outputs) if i not in drop)
  return _trimmed(jx.Program(program.inputs, constants, tuple(equations), outputs))


def fold(e: jx.Equation, ins: list, known: list) -> jx.Value | int | None:
  """Returns the value of an equation: a number, the input it equals, or None.

  Args:
    e: the equation.
    ins: its inputs.
    known: the number, 0 or 1, that each input holds everywhere, or None.
  """
  if not e.outputs or all(k is None for k in known):
    return None
  name, out = e.name, e.outputs[0]
  if name == 'integer_pow' and e.params['y'] <= 0:
    return None
  if 0 in known and name in BILINEAR:
    return 0
  if all(k == 0 for k in known) and name in ZERO_TO_ZERO | SUMS | {'concatenate'}:
    return 0
  if name in LAYOUT and known[0] == 1:
    return 1
  if name == 'div' and known[0] == 0:
    return 0
  neutral = {'mul': 1, 'div': 1}.get(name, 0 if name in SUMS else None)
  for other, k, position in ((0, known[-1], 1), (1, known[0], 0)):
    if len(ins) != 2 or neutral is None or k != neutral or known[other] is not None:
      continue
    if position == 0 and name in ('div', 'sub'):
      continue
    if (ins[other].shape, ins[other].dtype) == (out.shape, out.dtype):
      return ins[other]
  return None


def dependent(program: jx.Program, values: Collection[jx.Value]) -> set[jx.Value]:
  """Returns every value that is computed from any of `values`, including these.

  Values inside loops and branches are among them.
  """
  affected = set(values)
  for e in program.equations:
    fed = any(v in affected for v in e.inputs)
    for body, outer in jx.bodies_with_inputs(e):
      inside = {v for v, o in zip(body.inputs, outer, strict=True) if o in affected}
      if e.name == 'while' and fed:
        inside.update(body.inputs[len(body.inputs) - len(e.outputs) :])
      carry = jx.scan_parts(e, body.inputs)[1] if e.name == 'scan' else ()
      size = -1
      while size != len(inside):  # the carry of one iteration feeds the next one
        size = len(inside)
        inside = dependent(body, inside)
        inside |= {v for v, o in zip(carry, body.outputs) if o in inside}
      affected |= inside
    if e.name == 'scan':
      pairs = zip(e.bodies[0].outputs, e.outputs, strict=True)
      affected.update(o for v, o in pairs if v in affected)
    elif fed:
      affected.update(e.outputs)
  return affected


def _trimmed(program: jx.Program) -> jx.Program:
  """Removes equations that no output needs, those inside of scans included."""
  needed, kept = set(program.outputs), []
  for e in reversed(program.equations):
    if not needed.isdisjoint(e.outputs):
      kept.append(_trimmed_scan(e, needed) if e.name == 'scan' else e)
      needed.update(kept[-1].inputs)
  constants = {v: c for v, c in program.constants.items() if v in needed}
  return jx.Program(program.inputs, constants, tuple(kept[::-1]), program.outputs)


def _trimmed_scan(e: jx.Equation, needed: Collection[jx.Value]) -> jx.Equation:
  """Removes from a scan the inputs it does not read and the outputs nobody reads.

  None takes their places, which jax scans over and stacks as nothing.
  """
  (body,) = e.bodies
  _, carry, scanned = jx.scan_parts(e, body.inputs)
  nothing: Callable[[jx.Value], jx.Value] = lambda v: jx.Literal(v.shape, v.dtype, None)
  pairs = enumerate(zip(body.outputs, e.outputs, strict=True))
  outputs = (v if i < len(carry) or o in needed else nothing(v) for i, (v, o) in pairs)
  body = _trimmed(
    jx.Program(body.inputs, body.constants, body.equations, tuple(outputs))
  )
  read = {*body.outputs, *(v for inner in body.equations for v in inner.inputs)}
  if scanned and read.isdisjoint(scanned) and e.params['length'] > 1:
    return e  # without a scanned input, cutting layers could not shorten the loop
  read.update(carry)
  inputs = (o if v in read else nothing(o) for v, o in zip(body.inputs, e.inputs))
  return jx.Equation(e.primitive, tuple(inputs), e.outputs, e.params, (body,), e.source)


def _scanned(e: jx.Equation, ins: list, number: Mapping) -> tuple[jx.Program, ...]:
  """Simplifies the body of a scan, some inputs of which are known."""
  if e.name != 'scan' or not any(v in number for v in ins):
    return ()
  consts, carry, xs = jx.scan_parts(e, [number.get(v) for v in ins])
  known = [*consts, *[None] * len(carry), *xs]
  pairs = zip(e.bodies[0].inputs, known, strict=True)
  return (simplify(e.bodies[0], {v: k for v, k in pairs if k is not None}),)
