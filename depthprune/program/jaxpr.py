"""Our view of a traced program; the only file that knows how jax lays out a jaxpr.

A `Program` is a flat list of equations over `Value`s. Calls that mean nothing (jit,
remat, closed calls) are inlined; control flow and functions with a derivative rule of
their own keep their bodies as nested programs. Every call site is decoded anew, so a
Value is written exactly once in the whole tree of programs.

What differs between jax 0.10, 0.11 and 0.12 (ClosedJaxpr against Jaxpr, the layout of
scan) is decoded here and nowhere else.
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
NOTHING: Mapping[Any, Any] = MappingProxyType({})  # no axis or literal has a new value


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
  """outputs = primitive(inputs; params). `bodies` are the programs of control flow."""

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
    """'reduce_sum in Net/LayerNorm_0 (normalization.py:122)', for messages."""
    if self.source is None:
      return self.name
    scope = str(self.source.name_stack)
    line = source_info_util.summarize(self.source).split(' ')[0].rsplit('/', 1)[-1]
    place = f' ({line})' if ':' in line else ''
    return f'{self.name}{" in " + scope if scope else ""}{place}'


@dataclasses.dataclass(frozen=True, eq=False)
class Program:
  """inputs, constants -> outputs, by equations in order."""

  inputs: tuple[Value, ...]
  constants: dict[Value, Any]
  equations: tuple[Equation, ...]
  outputs: tuple[Value, ...]


class Traced(NamedTuple):
  """A program and how its flat inputs and outputs are packed."""

  program: Program
  out_tree: Any


# ---- decoding ----------------------------------------------------------------------


def trace(fn: Callable, args: tuple, kwargs: dict | None = None) -> Traced:
  """Traces fn(*args, **kwargs) on shapes; kwargs are static.

  args: arrays or ShapeDtypeStructs; their leaves are the program's inputs, in order."""
  closed, out = jax.make_jaxpr(lambda *a: fn(*a, **(kwargs or {})), return_shape=True)(
    *args
  )
  return Traced(decode(closed), jax.tree.structure(out))


def decode(jaxpr: Any) -> Program:
  """A jax (Closed)Jaxpr as a Program."""
  env: dict[Any, Value] = {}
  equations: list[Equation] = []
  jaxpr, consts = _open(jaxpr)
  constants = dict(zip(map(_value, jaxpr.constvars), consts, strict=True))
  inputs = tuple(map(_value, jaxpr.invars))
  env.update(zip(jaxpr.constvars, constants, strict=True))
  env.update(zip(jaxpr.invars, inputs, strict=True))
  _decode_into(jaxpr, env, equations, constants)
  outputs = tuple(_read(v, env) for v in jaxpr.outvars)
  return Program(inputs, constants, tuple(equations), outputs)


def _decode_into(jaxpr, env, equations, constants):
  for e in jaxpr.eqns:
    inputs = tuple(_read(v, env) for v in e.invars)
    if e.primitive.name in INLINED:
      body, consts = _open(e.params[INLINED[e.primitive.name]])
      inner: dict[Any, Value] = dict(zip(body.invars, inputs, strict=True))
      for v, c in zip(body.constvars, consts, strict=True):
        inner[v] = _value(v)
        constants[inner[v]] = c
      _decode_into(body, inner, equations, constants)
      outputs = [_read(v, inner) for v in body.outvars]
    else:
      outputs = [_value(v) for v in e.outvars]
      bodies = tuple(decode(b) for b in _bodies(e))
      equations.append(
        Equation(e.primitive, inputs, tuple(outputs), e.params, bodies, e.source_info)
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
  p, name = e.params, e.primitive.name
  if name == 'scan':
    return (p['jaxpr'],)
  if name == 'while':
    return p['cond_jaxpr'], p['body_jaxpr']
  if name == 'cond':
    return tuple(p['branches'])
  if name in OWN_DERIVATIVE:
    return (p['call_jaxpr'],)
  return ()


def scan_parts(e: Equation, values: Sequence) -> tuple[list, list, list]:
  """Splits what stands at a scan's inputs into (constants, carry, scanned)."""
  if 'num_consts' in e.params:
    consts, carry = e.params['num_consts'], e.params['num_carry']
  else:  # jax >= 0.12
    consts, carry = (len(part) for part in list(e.params['ft_in'].unpack())[:2])
  cut = consts + carry
  return list(values[:consts]), list(values[consts:cut]), list(values[cut:])


def while_parts(e: Equation, values: Sequence) -> tuple[list, list, list]:
  """Splits what stands at a while's inputs: (test constants, body constants, carry)."""
  a = e.params['cond_nconsts']
  b = a + e.params['body_nconsts']
  return list(values[:a]), list(values[a:b]), list(values[b:])


def bodies_with_inputs(e: Equation) -> list[tuple[Program, list]]:
  """Each body of an equation with what stands outside at its inputs."""
  if e.name == 'while':
    test, body, carry = while_parts(e, e.inputs)
    return [(e.bodies[0], [*test, *carry]), (e.bodies[1], [*body, *carry])]
  inputs = list(e.inputs[1:] if e.name == 'cond' else e.inputs)
  return [(body, inputs) for body in e.bodies]


# ---- walking -------------------------------------------------------------------------


def walk(program: Program) -> Iterator[Equation]:
  """Every equation, those of bodies after the one that holds them."""
  for e in program.equations:
    yield e
    for body in e.bodies:
      yield from walk(body)


def live(program: Program) -> tuple[list[Equation], set[Value]]:
  """The equations and values that the outputs depend on."""
  needed = set(program.outputs)
  kept = []
  for e in reversed(program.equations):
    if any(v in needed for v in e.outputs):
      kept.append(e)
      needed.update(e.inputs)
  return kept[::-1], needed


def lean(program: Program) -> Program:
  """The program without what its outputs do not depend on."""
  return dataclasses.replace(program, equations=tuple(live(program)[0]))


# ---- functions with a derivative rule of their own -----------------------------------


def original(e: Equation, inputs: Sequence) -> list:
  """Binds a custom_jvp / custom_vjp call as it was traced: its rule stays in force."""
  params = e.primitive.get_bind_params(e.params)
  if isinstance(params, tuple):  # older jax hands the functions over apart
    return e.primitive.bind(*params[0], *inputs, **params[1])
  return e.primitive.bind(*inputs, **params)


def differentiable(v) -> bool:
  return jnp.issubdtype(v.dtype, np.inexact)


def no_tangent(v) -> np.ndarray:
  return np.zeros(np.shape(v), jax.dtypes.float0)


Run = Callable[[Program, Sequence], list]  # runs a body


def interpret(
  program: Program,
  args: Sequence,
  execute: Callable,
  written: Mapping[Literal, Any] = NOTHING,
) -> list:
  """Runs a program; execute(equation, inputs) -> outputs does each step.

  written: other values of some literals.
  """
  env = {**program.constants, **dict(zip(program.inputs, args, strict=True))}

  def read(v):
    return written.get(v, v.val) if isinstance(v, Literal) else env[v]

  for e in program.equations:
    outputs = execute(e, [read(v) for v in e.inputs])
    env.update(zip(e.outputs, outputs, strict=True))
  return [read(v) for v in program.outputs]


def run(program: Program, args: Sequence) -> list:
  """Runs a program as it was traced."""
  return interpret(program, args, lambda e, ins: bind(e, ins, e.params, run))


def bind(e: Equation, ins: Sequence, params: dict, run: Run, derive=None) -> list:
  """The outputs of one equation.

  params: the primitive's parameters, possibly for other sizes than were traced.
  run: how a body is run. derive(equation): the function that computes derivative at
    the new sizes; asked for only where a function with a rule of its own changes
    size."""
  if e.name == 'scan':
    return _scan(e, ins, params, run)
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


def _scan(e, ins, params, run):
  (body,) = e.bodies
  consts, carry, xs = scan_parts(e, ins)
  n = len(carry)

  def step(carry, xs):
    outputs = run(body, [*consts, *carry, *xs])
    return outputs[:n], outputs[n:]

  carry, ys = jax.lax.scan(
    step,
    carry,
    xs,
    length=params['length'],
    reverse=params['reverse'],
    unroll=params['unroll'],
  )
  return [*carry, *ys]


def _while(e, ins, run):
  test, body = e.bodies
  test_consts, body_consts, carry = while_parts(e, ins)
  return jax.lax.while_loop(
    lambda c: run(test, [*test_consts, *c])[0],
    lambda c: run(body, [*body_consts, *c]),
    carry,
  )


def derivative(e: Equation) -> Program:
  """The derivative rule of a custom call at its traced shapes, as a program.

  custom_jvp: (inputs, tangents of float inputs) -> (outputs, tangents of float outputs)
  custom_vjp: (inputs, cotangents of float outputs) -> cotangents of float inputs"""
  avals = [jax.ShapeDtypeStruct(v.shape, v.dtype) for v in e.inputs]
  smooth = [a for v, a in zip(e.inputs, avals, strict=True) if differentiable(v)]
  if e.name == 'custom_jvp_call':

    def jvp(args, tangents):
      rest = iter(tangents)
      full = [next(rest) if differentiable(v) else no_tangent(v) for v in e.inputs]
      outs, dots = jax.jvp(lambda *a: original(e, a), args, full)
      return outs, [
        d for v, d in zip(e.outputs, dots, strict=True) if differentiable(v)
      ]

    return decode(jax.make_jaxpr(jvp)(avals, smooth))

  def vjp(args, cotangents):
    rest = iter(cotangents)
    _, pull = jax.vjp(lambda *a: original(e, a), *args)
    full = [next(rest) if differentiable(v) else no_tangent(v) for v in e.outputs]
    back = pull(full)
    return [d for v, d in zip(e.inputs, back, strict=True) if differentiable(v)]

  outs = [
    jax.ShapeDtypeStruct(v.shape, v.dtype) for v in e.outputs if differentiable(v)
  ]
  return decode(jax.make_jaxpr(vjp)(avals, outs))


def _resized_jvp(e, run, derive):
  """The forward body at its new sizes with the rebound rule as its derivative."""

  @jax.custom_jvp
  def call(*ins):
    return run(e.bodies[0], ins)

  @call.defjvp
  def rule(ins, tangents):
    smooth = [t for v, t in zip(e.inputs, tangents, strict=True) if differentiable(v)]
    both = derive(e)([*ins, *smooth])
    outs, rest = both[: len(e.outputs)], iter(both[len(e.outputs) :])
    dots = [
      next(rest) if differentiable(v) else no_tangent(o)
      for v, o in zip(e.outputs, outs, strict=True)
    ]
    return outs, dots

  return call


def _resized_vjp(e, run, derive):
  @jax.custom_vjp
  def call(*ins):
    return run(e.bodies[0], ins)

  def backward(ins, cotangents):
    pairs = zip(e.outputs, cotangents, strict=True)
    back = iter(derive(e)([*ins, *(c for v, c in pairs if differentiable(v))]))
    return tuple(
      next(back) if differentiable(v) else no_tangent(x)
      for v, x in zip(e.inputs, ins, strict=True)
    )

  call.defvjp(lambda *ins: (call(*ins), ins), backward)
  return call
