"""Which values say how large an activation is, so that a sum of them is a norm.

A sum of squares does not see slices that are 0. An axis that is normalised by one (an
L2 norm, RMSNorm) can therefore be cut: the sum reads the axis as a contraction does,
and is gated like one. A plain sum is no norm: what subtracts it from the activation
(LayerNorm) writes to closed slices. Nor is the norm of a weight one, because a weight
is not 0 where an activation is closed.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from depthprune.program import jaxpr as jx

KEEPING = frozenset(
  """convert_element_type copy name real reduce_max reduce_precision reduce_sum reshape
  squeeze stop_gradient transpose""".split()
)


def degrees(
  program: jx.Program, activations: Collection[jx.Value]
) -> dict[jx.Value, int]:
  """Finds the values to which a factor g of an activation is a factor |g|^d.

  These are squares (d = 2) and absolute values (d = 1) of activations, and whatever is
  computed from them in proportion.

  Args:
    program: the program, whose bodies are searched too.
    activations: the values that depend on data.

  Returns:
    {value: d}.
  """
  found: dict[jx.Value, int] = {}
  _find(program, activations, found, {})
  return found


def _find(program: jx.Program, activations: Collection, found: dict, conjugates: dict):
  for e in program.equations:
    for body, given in jx.bodies_with_inputs(e):
      called = e.name in jx.OWN_DERIVATIVE
      if called:
        _pass_on(found, given, body.inputs)
      _find(body, activations, found, conjugates)
      if called:
        _pass_on(found, body.outputs, e.outputs)
    if not e.inputs or e.inputs[0] not in activations:
      continue
    if e.name == 'conj':
      conjugates[e.outputs[0]] = e.inputs[0]
    d = _degree(e, found, conjugates)
    if d and jx.differentiable(e.inputs[0]):
      found[e.outputs[0]] = d


def _pass_on(found: dict, values: Sequence[jx.Value], same: Sequence[jx.Value]):
  pairs = zip(values, same, strict=True)
  found |= {other: found[v] for v, other in pairs if v in found}


def _degree(e: jx.Equation, found: dict, conjugates: dict) -> int | None:
  """The degree of an equation's output; None where it is no magnitude."""
  x, y = e.inputs[0], e.inputs[-1]
  d = found.get(x)
  squared = x is y or conjugates.get(x) is y or conjugates.get(y) is x
  if e.name == 'square' or (e.name == 'mul' and squared):
    return 2 * (d or 1)
  if e.name == 'abs':
    return d or 1
  if e.name == 'integer_pow' and (power := e.params['y']) > 0:
    return power * (d or 1) if d or power % 2 == 0 else None
  if d is None:
    return None
  if e.name == 'sqrt':
    return d // 2 if d % 2 == 0 else None
  if e.name == 'add':
    return d if found.get(y) == d else None
  same_size = math.prod(x.shape) == math.prod(e.outputs[0].shape)
  keeps = e.name in KEEPING or (e.name == 'broadcast_in_dim' and same_size)
  scaled = e.name in ('mul', 'div') and isinstance(y, jx.Literal) and np.all(y.val > 0)
  return d if keeps or scaled else None


@jax.custom_jvp
def root(x: jax.Array) -> jax.Array:
  """The square root of a sum of squares, whose derivative is 0 where the sum is.

  In JAX the norm of a zero vector has a NaN for its gradient. A vector that is nowhere
  zero in the full network may be in the small one, where fewer channels are left.
  """
  return jax.lax.sqrt(x)


@root.defjvp
def _(primals, tangents):
  (x,), (dx,) = primals, tangents
  y, zero = root(x), x == 0
  return y, jnp.where(zero, 0, dx / (2 * jnp.where(zero, 1, y)))
