"""Gates: the scalar written into a model's branches, and the step that trains any gate.

Channel gates are not here: they are plugged into the traced program
(`depthprune.program.plug`), so a model needs no code for them.
"""

from functools import partial
from typing import Literal, get_args

import flax.linen as nn
import jax
import jax.numpy as jnp

Surrogate = Literal['constant', 'sigmoid', 'tanh']


def branch(module: nn.Module, y: jax.Array, name: str = 'branch') -> jax.Array:
  """Multiplies the output `y` of a branch by the scalar gate of `module`.

  The gate lives in `variables['branches'][*module.path][name]`: float32, shape (),
  one at `init`. Where the collection is absent the branch is simply open, so weights
  without gates (pretrained, or pruned with their gates folded) run unchanged.
  """
  if not (module.is_initializing() or module.has_variable('branches', name)):
    return y
  gate = module.variable('branches', name, jnp.ones, (), jnp.float32)
  return y * gate.value.astype(y.dtype)


def surrogate_gradient(w: jax.Array, surrogate: Surrogate = 'constant') -> jax.Array:
  """g(w), the derivative that `straight_through` has in place of its own, zero."""
  if surrogate == 'constant':
    return jnp.ones_like(w)
  if surrogate == 'sigmoid':
    return jax.nn.sigmoid(w) * jax.nn.sigmoid(-w)
  if surrogate == 'tanh':
    return 1 - jnp.square(jnp.tanh(w))
  expected = ', '.join(get_args(Surrogate))
  raise ValueError(
    f'straight_through: unknown surrogate {surrogate!r}; expected one of {expected}'
  )


@partial(jax.custom_jvp, nondiff_argnums=(1,))
def straight_through(w: jax.Array, surrogate: Surrogate = 'constant') -> jax.Array:
  """The trainable gate: b(w) = 1[w > 0] forward, g(w) backward.

  Args:
    w: gate weights, any shape and float dtype.
    surrogate: g, either 'constant' (1), or the derivative of 'sigmoid' or 'tanh'.

  Returns:
    0 or 1 in the shape and dtype of `w`.

  Raises:
    ValueError: unknown surrogate.

  Source: Kim, Park, Jung, Choe, arXiv 1904.10921, TG(w; g) = b(w) + s(w) g(w) with a
  sawtooth s of height 1/M and slope 1, in the limit M → ∞. The literal formula
  overflows in float16 and leaks through closed gates.
  """
  surrogate_gradient(w, surrogate)  # refuses a wrong name in the forward pass already
  return (w > 0).astype(w.dtype)


@straight_through.defjvp
def _straight_through_jvp(surrogate, primals, tangents):
  (w,), (dw,) = primals, tangents
  return straight_through(w, surrogate), surrogate_gradient(w, surrogate) * dw
