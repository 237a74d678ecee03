"""Gates of branches, written into a model, and the step function that trains gates.

Gates of channels need no code in a model: `depthprune.program.gating` inserts them into
the traced program.
"""

from functools import partial
from typing import Literal, get_args

import flax.linen as nn
import jax
import jax.numpy as jnp

Surrogate = Literal['constant', 'sigmoid', 'tanh']


def branch(module: nn.Module, y: jax.Array, name: str = 'branch') -> jax.Array:
  """Multiplies the output of a branch by a scalar gate, so that it can be pruned.

      class Unit(nn.Module):
        @nn.compact
        def __call__(self, x):
          return x + dp.branch(self, nn.relu(nn.Dense(x.shape[-1])(x)))

  The gate is `variables['branches'][*module.path][name]`, float32 of shape (), and 1 at
  first. Without that collection the branch is open, so that variables without gates,
  pretrained or pruned, run unchanged.

  Args:
    module: the linen module of the branch, which owns the gate.
    y: the output of the branch, any shape and float dtype.
    name: name of the gate, for a module with several branches.

  Returns:
    y times the gate, in the dtype of y.
  """
  if not hasattr(module, 'is_initializing') or module.scope is None:
    raise TypeError(
      f'branch: module: expected the linen module that is being called, got a '
      f'{type(module).__name__}; write x + branch(self, F(x)) in its __call__'
    )
  if not (module.is_initializing() or module.has_variable('branches', name)):
    return y
  gate = module.variable('branches', name, jnp.ones, (), jnp.float32)
  return y * gate.value.astype(y.dtype)


def surrogate_gradient(w: jax.Array, surrogate: Surrogate = 'constant') -> jax.Array:
  """Returns g(w), which `straight_through` has as its derivative instead of zero.

  Args:
    w: gate weights, any shape and float dtype.
    surrogate: 'constant' for g = 1, or the derivative of 'sigmoid' or 'tanh'.

  Raises:
    ValueError: there is no such surrogate.
  """
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


def straight_through(w: jax.Array, surrogate: Surrogate = 'constant') -> jax.Array:
  """A trainable gate: a step, 1 where w > 0 and else 0, with a useful gradient.

      gate = dp.straight_through(w)  # [channels], exactly 0 or 1
      y = y * gate  # its gradient reaches w, as if the gate were w

  The derivative of the step is zero almost everywhere; g(w) is used instead.

  Args:
    w: gate weights, any shape and float dtype.
    surrogate: the derivative g: 'constant' for 1, or that of 'sigmoid' or 'tanh'.

  Returns:
    0 or 1 in the shape and dtype of `w`.

  Raises:
    ValueError: there is no such surrogate.

  Source: Kim, Park, Jung, Choe, arXiv 1904.10921: TG(w; g) = b(w) + s(w) g(w) with the
  step b and a sawtooth s of height 1/M and slope 1, in the limit M → ∞. The formula at
  finite M overflows in float16 and leaks through closed gates.
  """
  if not hasattr(w, 'astype'):
    raise TypeError(
      f'straight_through: w: expected an array of floats, got a {type(w).__name__}; '
      'write jax.numpy.asarray(w)'
    )
  surrogate_gradient(w, surrogate)  # refuses a wrong name in the forward pass already
  return _step(w, surrogate)


@partial(jax.custom_jvp, nondiff_argnums=(1,))
def _step(w: jax.Array, surrogate: Surrogate) -> jax.Array:
  del surrogate
  return (w > 0).astype(w.dtype)


@_step.defjvp
def _step_jvp(surrogate, primals, tangents):
  (w,), (dw,) = primals, tangents
  return _step(w, surrogate), surrogate_gradient(w, surrogate) * dw
