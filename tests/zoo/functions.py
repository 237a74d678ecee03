"""Networks as plain functions of (arrays, x): tuples, [out, in], control flow."""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax


def convolve(x, w, groups=1):
  """Same-padded convolution of [batch, h, w, c] by [h, w, c / groups, o]."""
  return lax.conv_general_dilated(
    x, w, (1, 1), 'SAME', feature_group_count=groups,
    dimension_numbers=('NHWC', 'HWIO', 'NHWC'),
  )  # fmt: skip


def torch_style(layers, x):
  """Kernels [out, in], biases beside them, in a tuple."""
  x = x.mean((1, 2))
  for kernel, bias in layers[:-1]:
    x = jax.nn.relu(x @ kernel.T + bias)
  kernel, bias = layers[-1]
  return x @ kernel.T + bias


TORCH_STYLE = tuple(((o, i), (o,)) for i, o in ((3, 10), (10, 8), (8, 4)))


def recurrent(p, x):
  """An Elman network over the rows of an image, by lax.scan."""

  def step(state, row):
    state = jnp.tanh(row @ p['read'] + state @ p['state'] + p['bias'])
    return state, state

  first = jnp.zeros((x.shape[0], p['bias'].shape[0]), x.dtype)
  last, states = lax.scan(step, first, jnp.moveaxis(x.mean(2), 1, 0))
  return last @ p['out'] + jnp.moveaxis(states, 0, 1).max(1) @ p['out']


RECURRENT = {'read': (3, 8), 'state': (8, 8), 'bias': (8,), 'out': (8, 4)}


def branching(p, x):
  """`cond` between two layers of one width, and a `while` that halves large states."""
  h = jax.nn.relu(x.mean((1, 2)) @ p['in'])
  h = lax.cond(
    x.mean() > 0.5,
    lambda h: jnp.tanh(h @ p['one']) + h,
    lambda h: jax.nn.relu(h @ p['two']) - h,
    h,
  )

  def turn(carry):
    i, h = carry
    return i + 1, h + 0.5 * jnp.tanh(h @ p['turn'])

  _, h = lax.while_loop(lambda carry: carry[0] < 3, turn, (0, h))
  return h @ p['out']


BRANCHING = {
  'in': (3, 8), 'one': (8, 8), 'two': (8, 8), 'turn': (8, 8), 'out': (8, 4),
}  # fmt: skip


def strided(p, x):
  """Every other channel goes another way, so that pairs of channels stay together."""
  h = jax.nn.relu(convolve(x, p['in']))
  h = jax.nn.relu(convolve(h[..., ::2], p['even']) + convolve(h, p['all']))
  return h.mean((1, 2)) @ p['out']


STRIDED = {
  'in': (3, 3, 3, 8), 'even': (3, 3, 4, 6), 'all': (1, 1, 8, 6), 'out': (6, 4),
}  # fmt: skip


def gathered(p, x):
  """Channels picked by a list of indices (pinned), beside some that are not."""
  h = jax.nn.relu(convolve(x, p['in']))
  h = jax.nn.relu(convolve(h[..., np.array([5, 0, 3, 3])], p['next']))
  return h.mean((1, 2)) @ p['out']


GATHERED = {'in': (3, 3, 3, 8), 'next': (3, 3, 4, 6), 'out': (6, 4)}


@jax.custom_vjp
def clipped(x):
  """The identity that lets through gradients of at most 0.1: a rule of its own."""
  return x * 1.0


clipped.defvjp(lambda x: (x * 1.0, None), lambda _, g: (jnp.clip(g, -0.1, 0.1),))


@jax.custom_jvp
def hard_sign(x):
  """sign(x) with the gradient of tanh."""
  return jnp.sign(x)


@hard_sign.defjvp
def _hard_sign_jvp(primals, tangents):
  (x,), (dx,) = primals, tangents
  return hard_sign(x), (1 - jnp.tanh(x) ** 2) * dx


def own_rules(p, x):
  """custom_vjp and custom_jvp functions on channels, ours and jax's."""
  h = jax.nn.relu(convolve(x, p['in']))
  h = clipped(jax.nn.silu(convolve(h, p['mid'])))
  h = hard_sign(convolve(h, p['next'])) * jax.nn.relu6(h)
  return h.mean((1, 2)) @ p['out']


OWN_RULES = {
  'in': (3, 3, 3, 8), 'mid': (3, 3, 8, 6), 'next': (1, 1, 6, 6), 'out': (6, 4),
}  # fmt: skip


@jax.custom_vjp
def damped(x, w):
  """A matrix product that sends half the gradient down."""
  return x @ w


def _damped_back(residuals, g):
  x, w = residuals
  return 0.5 * g @ w.T, x.T @ g


damped.defvjp(lambda x, w: (x @ w, (x, w)), _damped_back)


def own_contraction(p, x):
  """A contraction inside a custom_vjp: it can be cut, but not be gated."""
  h = jnp.tanh(damped(x.mean((1, 2)), p['in']))
  return damped(h, p['out'])


OWN_CONTRACTION = {'in': (3, 8), 'out': (8, 4)}


def square(p, x):
  """A square kernel on a residual stream, and one that is used twice."""
  h = x.mean((1, 2)) @ p['in']
  h = h + jnp.tanh(h @ p['square'])
  for _ in range(2):
    h = h + jax.nn.relu(h @ p['shared'])
  return h @ p['out']


SQUARE = {'in': (3, 8), 'square': (8, 8), 'shared': (8, 8), 'out': (8, 4)}


def channels_first(p, x):
  """[batch, c, h, w] images and [o, i, h, w] kernels."""
  h = jnp.moveaxis(x, -1, 1)
  for name in ('one', 'two'):
    h = lax.conv_general_dilated(h, p[name], (2, 2), 'SAME')
    h = jax.nn.relu(h + p[f'{name}_bias'][:, None, None])
  return jnp.einsum('nchw,cd->nd', h, p['out'])


CHANNELS_FIRST = {
  'one': (8, 3, 3, 3), 'one_bias': (8,), 'two': (6, 8, 3, 3), 'two_bias': (6,),
  'out': (6, 4),
}  # fmt: skip
