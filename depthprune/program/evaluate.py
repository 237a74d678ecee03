"""Running a program equation by equation, with its control flow and derivatives."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from depthprune.program import jaxpr as jx
from depthprune.program.axes import NOTHING

Run = Callable[[jx.Program, Sequence], list]  # runs a body


def interpret(
  program: jx.Program,
  args: Sequence,
  execute: Callable,
  written: Mapping[jx.Literal, Any] = NOTHING,
) -> list:
  """Runs a program; execute(equation, inputs) -> outputs does each step.

  written: other values of some literals.
  """
  env = {**program.constants, **dict(zip(program.inputs, args, strict=True))}

  def read(v):
    return written.get(v, v.val) if isinstance(v, jx.Literal) else env[v]

  for e in program.equations:
    outputs = execute(e, [read(v) for v in e.inputs])
    env.update(zip(e.outputs, outputs, strict=True))
  return [read(v) for v in program.outputs]


def run(program: jx.Program, args: Sequence) -> list:
  """Runs a program as it was traced."""
  return interpret(program, args, lambda e, ins: bind(e, ins, e.params, run))


def bind(e: jx.Equation, ins: Sequence, params: dict, run: Run, derive=None) -> list:
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
  if e.name in jx.OWN_DERIVATIVE:
    if all(np.shape(x) == v.shape for x, v in zip(ins, e.inputs, strict=True)):
      return jx.original(e, ins)
    rule = _resized_jvp if e.name == 'custom_jvp_call' else _resized_vjp
    return rule(e, run, derive)(*ins)
  outputs = e.primitive.bind(*ins, **params)
  return list(outputs) if e.primitive.multiple_results else [outputs]


def _scan(e, ins, params, run):
  (body,) = e.bodies
  consts, carry, xs = jx.scan_parts(e, ins)
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
  test_consts, body_consts, carry = jx.while_parts(e, ins)
  return jax.lax.while_loop(
    lambda c: run(test, [*test_consts, *c])[0],
    lambda c: run(body, [*body_consts, *c]),
    carry,
  )


def derivative(e: jx.Equation) -> jx.Program:
  """The derivative rule of a custom call at its traced shapes, as a program.

  custom_jvp: (inputs, tangents of float inputs) -> (outputs, tangents of float outputs)
  custom_vjp: (inputs, cotangents of float outputs) -> cotangents of float inputs"""
  avals = [jax.ShapeDtypeStruct(v.shape, v.dtype) for v in e.inputs]
  smooth = [a for v, a in zip(e.inputs, avals, strict=True) if jx.differentiable(v)]
  if e.name == 'custom_jvp_call':

    def jvp(args, tangents):
      rest = iter(tangents)
      full = [
        next(rest) if jx.differentiable(v) else jx.no_tangent(v) for v in e.inputs
      ]
      outs, dots = jax.jvp(lambda *a: jx.original(e, a), args, full)
      return outs, [
        d for v, d in zip(e.outputs, dots, strict=True) if jx.differentiable(v)
      ]

    return jx.decode(jax.make_jaxpr(jvp)(avals, smooth))

  def vjp(args, cotangents):
    rest = iter(cotangents)
    _, pull = jax.vjp(lambda *a: jx.original(e, a), *args)
    full = [next(rest) if jx.differentiable(v) else jx.no_tangent(v) for v in e.outputs]
    back = pull(full)
    return [d for v, d in zip(e.inputs, back, strict=True) if jx.differentiable(v)]

  outs = [
    jax.ShapeDtypeStruct(v.shape, v.dtype) for v in e.outputs if jx.differentiable(v)
  ]
  return jx.decode(jax.make_jaxpr(vjp)(avals, outs))


def _resized_jvp(e, run, derive):
  """The forward body at its new sizes with the rebound rule as its derivative."""

  @jax.custom_jvp
  def call(*ins):
    return run(e.bodies[0], ins)

  @call.defjvp
  def rule(ins, tangents):
    smooth = [
      t for v, t in zip(e.inputs, tangents, strict=True) if jx.differentiable(v)
    ]
    both = derive(e)([*ins, *smooth])
    outs, rest = both[: len(e.outputs)], iter(both[len(e.outputs) :])
    dots = [
      next(rest) if jx.differentiable(v) else jx.no_tangent(o)
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
    back = iter(derive(e)([*ins, *(c for v, c in pairs if jx.differentiable(v))]))
    return tuple(
      next(back) if jx.differentiable(v) else jx.no_tangent(x)
      for v, x in zip(e.inputs, ins, strict=True)
    )

  call.defvjp(lambda *ins: (call(*ins), ins), backward)
  return call
