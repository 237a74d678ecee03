"""Traced programs in a form of our own; no other file depends on jax's internals.

A `Program` is a flat list of equations over `Value`s. Calls without a meaning of their
own (jit, remat, closed calls) are inlined. Control flow, and functions with their own
derivative rule, keep their bodies as nested programs. Every call site is decoded anew,
so each Value is written exactly once in the whole tree of programs.

The differences between jax 0.10, 0.11 and 0.12 (ClosedJaxpr against Jaxpr, the layout
of scan) are handled here and nowhere else.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax._src import source_info_util
from jax.extend import core as jex

INLINED = {
  'jit': 'jaxpr', 'pjit': 'jaxpr', 'remat': 'jaxpr', 'remat2': 'jaxpr',
  'checkpoint': 'jaxpr', 'closed_call': 'call_jaxpr', 'core_call': 'call_jaxpr',
}  # fmt: skip
OWN_DERIVATIVE = ('custom_jvp_call', 'custom_vjp_call')
BODIES = {
  'scan': ('jaxpr',), 'while': ('cond_jaxpr', 'body_jaxpr'),
  'custom_jvp_call': ('call_jaxpr',), 'custom_vjp_call': ('call_jaxpr',),
}  # fmt: skip
NOTHING: Mapping[Any, Any] = MappingProxyType({})  # the default of optional mappings


@dataclasses.dataclass(frozen=True, eq=False)
class Value:
  """One array of a program."""

  shape: tuple[int, ...]
  dtype: Any


@dataclasses.dataclass(frozen=True, eq=False)
class Literal(Value):
  """A constant written into an equation."""

  val: Any


@dataclasses.dataclass(frozen=True, eq=False)
class Equation:
  """outputs = primitive(inputs; params); `bodies` are the programs of control flow."""

  primitive: Any
  inputs: tuple[Value, ...]
  outputs: tuple[Value, ...]
  params: dict[str, Any]
  bodies: tuple[Program, ...] = ()
  source: Any = None

  @property
  def name(self) -> str:
    return self.primitive.name

  @property
  def where(self) -> str:
    """Says where the equation comes from, for messages.

    For example 'reduce_sum in Net/LayerNorm_0 (normalization.py:122)'.
    """
    if self.source is None:
      return self.name
    scope = str(self.source.name_stack)
    line = source_info_util.summarize(self.source).split(' ')[0].rsplit('/', 1)[-1]
    place = f' ({line})' if ':' in line else ''
    return f'{self.name}{" in " + scope if scope else ""}{place}'


@dataclasses.dataclass(frozen=True, eq=False)
class Program:
  """A function from inputs and constants to outputs, as a sequence of equations."""

  inputs: tuple[Value, ...]
  constants: dict[Value, Any]
  equations: tuple[Equation, ...]
  outputs: tuple[Value, ...]


class Traced(NamedTuple):
  """A program, and the tree structure of its flat outputs."""

  program: Program
  out_tree: Any


# ---- decoding ----------------------------------------------------------------------


def trace(fn: Callable, args: tuple) -> Traced:
  """Traces fn(*args) on shapes.

  Args:
    fn: a traceable function.
    args: trees of arrays or ShapeDtypeStructs, whose leaves become the program's
      inputs in this order.
  """
  closed, out = jax.make_jaxpr(lambda *xs: fn(*xs), return_shape=True)(*args)
  return Traced(decode(closed), jax.tree.structure(out))


def decode(jaxpr: Any) -> Program:
  """Converts a jax Jaxpr or ClosedJaxpr into a Program."""
  env: dict[Any, Value] = {}
  equations: list[Equation] = []
  jaxpr, consts = _open(jaxpr)
  constants = dict(zip(map(_value, jaxpr.constvars), consts, strict=True))
  inputs = tuple(map(_value, jaxpr.invars))
  env.update(zip(jaxpr.constvars, constants, strict=True))
  env.update(zip(jaxpr.invars, inputs, strict=True))
  _decode_into(jaxpr, env, equations, constants, source_info_util.NameStack())
  outputs = tuple(_read(v, env) for v in jaxpr.outvars)
  return Program(inputs, constants, tuple(equations), outputs)


def _decode_into(jaxpr, env, equations, constants, scope):
  for e in jaxpr.eqns:
    # The scopes within a call that is inlined are relative to those around it.
    names = scope + e.source_info.name_stack
    inputs = tuple(_read(v, env) for v in e.invars)
    if e.primitive.name in INLINED:
      body, consts = _open(e.params[INLINED[e.primitive.name]])
      inner: dict[Any, Value] = dict(zip(body.invars, inputs, strict=True))
      for v, c in zip(body.constvars, consts, strict=True):
        inner[v] = _value(v)
        constants[inner[v]] = c
      _decode_into(body, inner, equations, constants, names)
      outputs = [_read(v, inner) for v in body.outvars]
    else:
      outputs = [_value(v) for v in e.outvars]
      params, source = e.params, e.source_info.replace(name_stack=names)
      if e.primitive.name == 'reshape' and (order := params['dimensions']) is not None:
        # vmap of a convolution writes a transpose and a reshape as one equation.
        x, *rest = inputs
        moved = Value(tuple(x.shape[i] for i in order), x.dtype)
        permutation = {'permutation': tuple(order)}
        equations.append(
          Equation(jax.lax.transpose_p, (x,), (moved,), permutation, (), source)
        )
        inputs, params = (moved, *rest), {**params, 'dimensions': None}
      bodies = tuple(decode(b) for b in _bodies(e))
      equations.append(
        Equation(e.primitive, inputs, tuple(outputs), params, bodies, source)
      )
    env.update(zip(e.outvars, outputs, strict=True))


def _open(jaxpr) -> tuple[Any, Sequence]:
  return getattr(jaxpr, 'jaxpr', jaxpr), getattr(jaxpr, 'consts', ())


def _value(v: Any) -> Value:
  return Value(tuple(v.aval.shape), v.aval.dtype)


def _read(v, env) -> Value:
  if isinstance(v, jex.Literal):
    value = _value(v)
    return Literal(value.shape, value.dtype, v.val)
  return env[v]


def _bodies(e) -> tuple:
  if e.primitive.name == 'cond':
    return tuple(e.params['branches'])
  return tuple(e.params[key] for key in BODIES.get(e.primitive.name, ()))


def scan_parts(e: Equation, values: Sequence) -> tuple[list, list, list]:
  """Splits values at the inputs of a scan into (constants, carry, scanned)."""
  if 'num_consts' in e.params:
    consts, carry = e.params['num_consts'], e.params['num_carry']
  else:  # jax >= 0.12
    consts, carry = (len(part) for part in list(e.params['ft_in'].unpack())[:2])
  cut = consts + carry
  return list(values[:consts]), list(values[consts:cut]), list(values[cut:])


def while_parts(e: Equation, values: Sequence) -> tuple[list, list, list]:
  """Splits the inputs of a while into (test constants, body constants, carry)."""
  a = e.params['cond_nconsts']
  b = a + e.params['body_nconsts']
  return list(values[:a]), list(values[a:b]), list(values[b:])


def bodies_with_inputs(e: Equation) -> list[tuple[Program, list]]:
  """Returns each body of an equation with the values that are passed to its inputs."""
  if e.name == 'while':
    test, body, carry = while_parts(e, e.inputs)
    return [(e.bodies[0], [*test, *carry]), (e.bodies[1], [*body, *carry])]
  inputs = list(e.inputs[1:] if e.name == 'cond' else e.inputs)
  return [(body, inputs) for body in e.bodies]


# ---- walking -------------------------------------------------------------------------


def walk(program: Program) -> Iterator[Equation]:
  """Yields every equation; those of bodies follow the equation that holds them."""
  for e in program.equations:
    yield e
    for body in e.bodies:
      yield from walk(body)


def live(program: Program) -> tuple[list[Equation], set[Value]]:
  """Returns the equations and the values that the outputs depend on."""
  needed = set(program.outputs)
  kept = []
  for e in reversed(program.equations):
    if any(v in needed for v in e.outputs):
      kept.append(e)
      needed.update(e.inputs)
  return kept[::-1], needed


def lean(program: Program) -> Program:
  """Returns the program without equations that its outputs do not depend on."""
  return dataclasses.replace(program, equations=tuple(live(program)[0]))


def same(a: Program, b: Program) -> bool:
  """Whether two programs are known to compute the same: equation by equation.

  Derivative rules are not compared.
  """
  matching: dict[Value, Value] = {}

  def alike(x: Value, y: Value) -> bool:
    if isinstance(x, Literal) and isinstance(y, Literal):
      return x.dtype == y.dtype and np.array_equal(x.val, y.val)
    return matching.get(x) is y

  def pair(xs: Sequence[Value], ys: Sequence[Value]) -> bool:
    matching.update(zip(xs, ys, strict=False))
    kinds = lambda values: [(v.shape, v.dtype) for v in values]
    return kinds(xs) == kinds(ys)

  def agree(a: Program, b: Program) -> bool:
    constants = zip(a.constants.values(), b.constants.values(), strict=False)
    return (
      pair(a.inputs, b.inputs)
      and pair([*a.constants], [*b.constants])
      and all(_is_equal(c, d) for c, d in constants)
      and len(a.equations) == len(b.equations)
      and all(map(equal, a.equations, b.equations))
      and len(a.outputs) == len(b.outputs)
      and all(map(alike, a.outputs, b.outputs))
    )

  def equal(e: Equation, f: Equation) -> bool:
    return (
      e.primitive is f.primitive
      and len(e.inputs) == len(f.inputs)
      and all(map(alike, e.inputs, f.inputs))
      and _settings(e) == _settings(f)
      and len(e.bodies) == len(f.bodies)
      and all(map(agree, e.bodies, f.bodies))
      and pair(e.outputs, f.outputs)
    )

  return agree(a, b)


def _is_equal(x: Any, y: Any) -> bool:
  numbers = not any(jnp.issubdtype(v.dtype, jax.dtypes.extended) for v in (x, y))
  return x is y or (numbers and np.array_equal(np.asarray(x), np.asarray(y)))


def _settings(e: Equation) -> dict:
  """The parameters of an equation without its bodies and derivative rules."""
  if e.name in OWN_DERIVATIVE:
    return {}
  bodies = ('branches', *BODIES.get(e.name, ()))
  return {k: v for k, v in e.params.items() if k not in bodies}


# ---- functions with a derivative rule of their own -----------------------------------


def original(e: Equation, inputs: Sequence) -> list:
  """Binds a custom_jvp or custom_vjp call as traced, with its derivative rule."""
  params = e.primitive.get_bind_params(e.params)
  if isinstance(params, tuple):  # jax 0.10 returns the functions separately
    return e.primitive.bind(*params[0], *inputs, **params[1])
  return e.primitive.bind(*inputs, **params)


def differentiable(v) -> bool:
  """Returns whether a value has a tangent: whether it is of a float type."""
  return jnp.issubdtype(v.dtype, np.inexact)


def no_tangent(v) -> np.ndarray:
  """Returns what jax expects as the tangent of an integer value."""
  return np.zeros(np.shape(v), jax.dtypes.float0)


def interpret(
  program: Program,
  args: Sequence,
  execute: Callable,
  written: Mapping[Literal, Any] = NOTHING,
) -> list:
  """Runs a program with a function of yours for each equation.

  Args:
    program: the program.
    args: its inputs.
    execute: (equation, list of its inputs) -> list of its outputs.
    written: values that replace those of some literals.

  Returns:
    The list of outputs.
  """
  env = {**program.constants, **dict(zip(program.inputs, args, strict=True))}

  def read(v):
    return written.get(v, v.val) if isinstance(v, Literal) else env[v]

  scope = source_info_util.current_name_stack()
  for e in program.equations:
    # A program that is traced again keeps the lines and the scopes of the first trace.
    source = e.source or source_info_util.new_source_info()
    with source_info_util.user_context(
      source.traceback, name_stack=scope + source.name_stack
    ):
      outputs = execute(e, [read(v) for v in e.inputs])
    env.update(zip(e.outputs, outputs, strict=True))
  return [read(v) for v in program.outputs]


def run(program: Program, args: Sequence) -> list:
  """Runs a program as it was traced, and returns the list of outputs."""
  return interpret(program, args, lambda e, ins: bind(e, ins, e.params, run))


def bind(e: Equation, ins: Sequence, params: dict, run: Callable, derive=None) -> list:
  """Returns the outputs of one equation.

  Args:
    e: the equation.
    ins: its inputs.
    params: the primitive's parameters, which may be for other sizes than were traced.
    run: (program, inputs) -> outputs, which runs a body.
    derive: (equation) -> the function that computes `derivative` at the new sizes. It
      is called only where a function with its own derivative rule changes size.
  """
  if e.name == 'scan':
    return scan_with(e, ins, params, lambda body, ins, _: (run(body, ins), None))[0]
  if e.name == 'while':
    return _while(e, ins, run)
  if e.name == 'cond':
    branches = [lambda *a, body=body: run(body, a) for body in e.bodies]
    return jax.lax.switch(ins[0], branches, *ins[1:])
  if e.name in OWN_DERIVATIVE:
    if all(np.shape(x) == v.shape for x, v in zip(ins, e.inputs, strict=True)):
      return original(e, ins)
    rule = _resized_jvp if e.name == 'custom_jvp_call' else _resized_vjp
    return rule(e, run, derive)(*ins)
  outputs = e.primitive.bind(*ins, **params)
  return list(outputs) if e.primitive.multiple_results else [outputs]


def scan_with(
  e: Equation, ins: Sequence, params: dict, run: Callable, along: Any = None
) -> tuple[list, Any]:
  """Runs a scan that also reads further arrays and stacks further results.

  Args:
    e: the equation of the scan.
    ins: its inputs.
    params: its parameters, which may be for another length than was traced.
    run: (body, inputs, slices of `along`) -> (outputs, a tree of further results).
    along: a tree of arrays [length, ...].

  Returns:
    The outputs of the scan, and the tree of further results, stacked [length, ...].
  """
  (body,) = e.bodies
  consts, carry, xs = scan_parts(e, ins)
  n = len(carry)

  def step(carry, slices):
    xs, more = slices
    outputs, stacked = run(body, [*consts, *carry, *xs], more)
    return outputs[:n], (outputs[n:], stacked)

  carry, (ys, stacked) = jax.lax.scan(
    step,
    carry,
    (xs, along),
    length=params['length'],
    reverse=params['reverse'],
    unroll=params['unroll'],
  )
  return [*carry, *ys], stacked


def _while(e, ins, run):
  test, body = e.bodies
  test_consts, body_consts, carry = while_parts(e, ins)
  return jax.lax.while_loop(
    lambda c: run(test, [*test_consts, *c])[0],
    lambda c: run(body, [*body_consts, *c]),
    carry,
  )


def _smooth(values: Sequence[Value], xs: Sequence) -> list:
  """Of one entry per value, those of the values that have a tangent."""
  return [x for v, x in zip(values, xs, strict=True) if differentiable(v)]


def _with_gaps(values: Sequence[Value], tangents: Sequence, xs: Sequence) -> list:
  """The tangents of all `values`, from those of the values that have one."""
  rest = iter(tangents)
  pairs = zip(values, xs, strict=True)
  return [next(rest) if differentiable(v) else no_tangent(x) for v, x in pairs]


def derivative(e: Equation) -> Program:
  """Returns the derivative rule of a custom call at its traced shapes, as a program.

  A custom_jvp maps (inputs, tangents of float inputs) to (outputs, tangents of float
  outputs); a custom_vjp maps (inputs, cotangents of float outputs) to cotangents of
  float inputs.
  """
  call = lambda *args: original(e, args)

  def jvp(args, tangents):
    full = _with_gaps(e.inputs, tangents, e.inputs)
    outs, dots = jax.jvp(call, args, full)
    return outs, _smooth(e.outputs, dots)

  def vjp(args, cotangents):
    _, pull = jax.vjp(call, *args)
    return _smooth(e.inputs, pull(_with_gaps(e.outputs, cotangents, e.outputs)))

  abstract = lambda values: [jax.ShapeDtypeStruct(v.shape, v.dtype) for v in values]
  forward = e.name == 'custom_jvp_call'
  moved = e.inputs if forward else e.outputs
  traced = jax.make_jaxpr(jvp if forward else vjp)
  return decode(traced(abstract(e.inputs), _smooth(moved, abstract(moved))))


def _resized_jvp(e, run, derive):
  """Runs the body at its new sizes, with the derivative rule at these sizes."""

  @jax.custom_jvp
  def call(*ins):
    return run(e.bodies[0], ins)

  @call.defjvp
  def rule(ins, tangents):
    both = derive(e)([*ins, *_smooth(e.inputs, tangents)])
    outs, dots = both[: len(e.outputs)], both[len(e.outputs) :]
    return outs, _with_gaps(e.outputs, dots, outs)

  return call


def _resized_vjp(e, run, derive):
  @jax.custom_vjp
  def call(*ins):
    return run(e.bodies[0], ins)

  def backward(ins, cotangents):
    back = derive(e)([*ins, *_smooth(e.outputs, cotangents)])
    return tuple(_with_gaps(e.inputs, back, ins))

  call.defvjp(lambda *ins: (call(*ins), ins), backward)
  return call
