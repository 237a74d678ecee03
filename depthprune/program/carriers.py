"""The arrays that can carry a factor: y·g with y = BN(conv(x)) is a BN scaled by g.

They are found in the program, backwards from what is multiplied: through sums (both
sides), products (one side), operations that only move values and, for a factor that is
not negative, ReLU and maxima, to variables that are read once.
"""

from __future__ import annotations

from collections import Counter

from depthprune.program import jaxpr as jx
from depthprune.program.deadcode import LAYOUT, SUMS


def carries(
  program: jx.Program,
  v: jx.Value,
  variables: set[jx.Value],
  scan: jx.Equation | None = None,
) -> bool:
  """Whether variables can be scaled to scale v by any factor, also a negative one.

  Args:
    program: the program that computes v.
    v: a value in it that is read once.
    variables: the inputs of the program that may be scaled.
    scan: the equation in whose body v is; every layer has a factor of its own.
  """
  _, made_by, uses = _used(program)
  if scan is not None:
    variables = _within(scan, variables, uses, per_layer=True)
    _, made_by, uses = _used(scan.bodies[0])
  return _absorb(v, made_by, uses, variables, False) is not None


def carriers_of(
  program: jx.Program, gate: jx.Value, variables: set[jx.Value], positive: bool
) -> set[jx.Value] | None:
  """Returns the variables that can carry the factor `gate` in its place, or None.

  `positive` says that the gate is not negative.
  """
  equations, made_by, uses = _used(program)
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
  per_layer = gate in jx.scan_parts(e, e.inputs)[2]
  inside = _within(e, variables, uses, per_layer)
  within = next(v for v in at if at[v] is gate)
  inner = carriers_of(e.bodies[0], within, inside, positive)
  return None if inner is None else {at[v] for v in inner}


def _within(
  e: jx.Equation, variables: set[jx.Value], uses: Counter, per_layer: bool
) -> set[jx.Value]:
  """The inputs of the body of a scan that are variables which it alone reads.

  With a factor per layer, an array that all layers share cannot carry it.
  """
  pairs = [*zip(e.bodies[0].inputs, e.inputs, strict=True)]
  consts, _, xs = jx.scan_parts(e, pairs)
  among = xs if per_layer else [*consts, *xs]
  return {v for v, outer in among if outer in variables and uses[outer] == 1}


def _used(program: jx.Program) -> tuple[list[jx.Equation], dict, Counter]:
  """The live equations, which of them makes a value, and how often it is read."""
  equations, _ = jx.live(program)
  uses = Counter(v for e in equations for v in e.inputs)
  uses.update(program.outputs)
  return equations, {v: e for e in equations for v in e.outputs}, uses


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
