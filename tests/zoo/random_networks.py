"""Random networks: graphs of operations that move, join, split and couple channels.

A network is a list of steps. Each reads nodes that exist and adds one. An operation is
a function (draw, array, widths, i) -> (channels, step) with step(p, h): the new node
from the arrays p and the nodes h; or None where it does not suit a node that wide.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from tests.zoo.functions import convolve

WIDEST = 96


def divisor(draw, c):
  return int(draw.choice([k for k in (2, 3, 4) if c % k == 0] or [1]))


def conv(draw, array, widths, i):
  o = int(draw.choice([12, 24, 48]))
  w = array(3, 3, widths[i], o)
  return o, lambda p, h: convolve(h[i], p[w])


def depthwise(draw, array, widths, i):
  c, w = widths[i], array(3, 3, 1, widths[i])
  return c, lambda p, h: convolve(h[i], p[w], c)


def depthwise_doubled(draw, array, widths, i):
  c = widths[i]
  if c > 24:
    return None
  w = array(3, 3, 1, 2 * c)
  return 2 * c, lambda p, h: convolve(h[i], p[w], c)


def grouped(draw, array, widths, i):
  c = widths[i]
  groups = divisor(draw, c)
  w = array(1, 1, c // groups, c)
  return c, lambda p, h: convolve(h[i], p[w], groups)


def add(draw, array, widths, i):
  same = [j for j in range(1, len(widths)) if widths[j] == widths[i]]
  j = int(draw.choice(same))
  return widths[i], lambda p, h: h[i] + h[j]


def join(draw, array, widths, i):
  j = int(draw.integers(1, len(widths)))
  c = widths[i] + widths[j]
  return (c, lambda p, h: jnp.concatenate([h[i], h[j]], -1)) if c <= WIDEST else None


def upper_half(draw, array, widths, i):
  c = widths[i] // 2
  return (c, lambda p, h: h[i][..., -c:]) if c * 2 == widths[i] and c > 3 else None


def swap_thirds(draw, array, widths, i):
  def step(p, h):
    return jnp.concatenate(jnp.split(h[i], 3, -1)[::-1], -1)

  return (widths[i], step) if widths[i] % 3 == 0 else None


def shuffle(draw, array, widths, i):
  groups = divisor(draw, widths[i])

  def step(p, h):
    x = h[i].reshape(*h[i].shape[:3], groups, -1)
    return x.swapaxes(3, 4).reshape(h[i].shape)

  return widths[i], step


def affine(draw, array, widths, i):
  a, b = array(widths[i]), array(widths[i])
  return widths[i], lambda p, h: h[i] * p[a] + p[b]


def relu(draw, array, widths, i):
  return widths[i], lambda p, h: jax.nn.relu(h[i])


def squeeze_excite(draw, array, widths, i):
  a, b = array(widths[i], 8), array(8, widths[i])

  def step(p, h):
    scale = jax.nn.sigmoid(jax.nn.relu(h[i].mean((1, 2)) @ p[a]) @ p[b])
    return h[i] * scale[:, None, None]

  return widths[i], step


def gated_halves(draw, array, widths, i):
  c = widths[i] // 2

  def step(p, h):
    a, b = jnp.split(h[i], 2, -1)
    return a * jnp.tanh(b)

  return (c, step) if c * 2 == widths[i] and c > 3 else None


def per_head(draw, array, widths, i):
  c, heads = widths[i], divisor(draw, widths[i])
  w = array(heads, c // heads, c // heads)

  def step(p, h):
    x = h[i].reshape(*h[i].shape[:3], heads, c // heads)
    return jnp.einsum('nxyhd,hde->nxyhe', x, p[w]).reshape(h[i].shape)

  return c, step


def padded_sum(draw, array, widths, i):
  """A narrower node, its channels padded with zeros, added: option A."""
  narrow = [j for j in range(1, len(widths)) if 0 < widths[i] - widths[j] <= 24]
  if not narrow:
    return None
  j = int(draw.choice(narrow))
  lo = (widths[i] - widths[j]) // 2
  ends = ((0, 0),) * 3 + ((lo, widths[i] - widths[j] - lo),)
  return widths[i], lambda p, h: h[i] + jnp.pad(h[j], ends)


def looped(draw, array, widths, i):
  """One square kernel used in a scan whose state is the node."""
  if widths[i] > 24:
    return None
  w = array(widths[i], widths[i])

  def step(p, h):
    turn = lambda x, _: (0.5 * x + jnp.tanh(x @ p[w]), None)
    return lax.scan(turn, h[i], None, length=2)[0]

  return widths[i], step


def every_other(draw, array, widths, i):
  c = widths[i] // 2
  return (c, lambda p, h: h[i][..., ::2]) if c * 2 == widths[i] and c > 3 else None


def stacked(draw, array, widths, i):
  """Two nodes along a new axis, which is then merged, indexed or summed over."""
  same = [j for j in range(1, len(widths)) if widths[j] == widths[i]]
  j, axis = int(draw.choice(same)), int(draw.choice([1, 3, 4]))
  how = int(draw.integers(3 if axis > 1 else 2))
  if how == 2 and 2 * widths[i] > WIDEST:
    return None

  def step(p, h):
    both = jnp.stack([jnp.tanh(h[i]), h[j]], axis)
    if how == 0:
      return both.sum(axis)
    if how == 1:
      return jnp.take(both, 0, axis) * lax.index_in_dim(both, 1, axis, False)
    return both.reshape(*h[i].shape[:3], -1)

  return (1 + (how == 2)) * widths[i], step


def l2_normalised(draw, array, widths, i):
  kind = int(draw.integers(3))

  def step(p, h):
    x = h[i]
    if kind == 0:
      return x * lax.rsqrt((x**2).sum(-1, keepdims=True) + 0.1)
    if kind == 1:
      return x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), 0.3)
    return x / (jnp.abs(x).max(-1, keepdims=True) + 0.1)

  return widths[i], step


def rms_normalised(draw, array, widths, i):
  scale, offset = array(widths[i]), float(draw.integers(2))

  def step(p, h):
    mean = jnp.mean(jnp.square(h[i]), axis=-1, keepdims=True)
    return h[i] * lax.rsqrt(mean + 0.1) * (offset + p[scale])

  return widths[i], step


def global_response(draw, array, widths, i):
  scale = array(widths[i])

  def step(p, h):
    size = jnp.linalg.norm(h[i], axis=(1, 2), keepdims=True)
    return h[i] + p[scale] * h[i] * size / (size.mean(-1, keepdims=True) + 0.1)

  return widths[i], step


def group_normalised(draw, array, widths, i):
  """Over the groups of a divisor; what is within a group is not cut alone."""
  c, groups = widths[i], divisor(draw, widths[i])
  scale, bias = array(c), array(c)

  def step(p, h):
    x = h[i].reshape(*h[i].shape[:3], groups, -1)
    mean, square = (t.mean((1, 2, 4), keepdims=True) for t in (x, x * x))
    x = (x - mean) * lax.rsqrt(square - mean * mean + 0.1)
    return x.reshape(h[i].shape) * p[scale] + p[bias]

  return c, step


def groups_of_squares(draw, array, widths, i):
  groups = divisor(draw, widths[i])

  def step(p, h):
    x = h[i].reshape(*h[i].shape[:3], groups, -1)
    return (x * lax.rsqrt((x * x).mean(-1, keepdims=True) + 0.1)).reshape(h[i].shape)

  return widths[i], step


def rolled(draw, array, widths, i):
  """Rows are rolled, by another number of steps for every example."""
  roll = jax.vmap(lambda x, n: jnp.roll(x, n, 0))
  return widths[i], lambda p, h: h[i] + roll(h[i], jnp.arange(len(h[i])))


def collective(draw, array, widths, i):
  combine = (lax.pmean, lax.psum)[int(draw.integers(2))]
  each = jax.vmap(lambda x: x - combine(x, 'n') / 3, axis_name='n')
  return widths[i], lambda p, h: each(h[i])


def counted(draw, array, widths, i):
  """Multiplied by a table of the number of the row and the number of the channel."""

  def step(p, h):
    row = jnp.arange(h[i].shape[1], dtype=jnp.float32)[:, None, None]
    return h[i] * jnp.cos(row / (1 + jnp.arange(widths[i], dtype=jnp.float32)))

  return widths[i], step


def scattered(draw, array, widths, i):
  where = draw.integers(0, widths[i], widths[i])
  return widths[i], lambda p, h: h[i].at[..., where].add(h[i])


def kernels_per_example(draw, array, widths, i):
  c, o = widths[i], int(draw.choice([6, 12]))
  make, w = array(c, 2), array(2, 1, 1, c, o)

  def step(p, h):
    share = jax.nn.sigmoid(h[i].mean((1, 2)) @ p[make])
    kernels = jnp.einsum('be,ehwio->bhwio', share, p[w])
    return jax.vmap(lambda x, k: convolve(x[None], k)[0])(h[i], kernels)

  return o, step


OPERATIONS = (
  conv, conv, depthwise, depthwise_doubled, grouped, add, join, upper_half,
  swap_thirds, shuffle, affine, relu, squeeze_excite, gated_halves, per_head,
  padded_sum, looped, every_other, stacked, stacked, l2_normalised, rms_normalised,
  global_response, group_normalised, groups_of_squares, rolled, collective, counted,
  scattered, kernels_per_example,
)  # fmt: skip


def random_network(seed: int):
  """(f, arrays): f(arrays, x [batch, h, w, 3]) reads every node at its end."""
  draw = np.random.default_rng(seed)
  arrays = {}

  def array(*shape):
    name = f'{len(arrays):02d}'
    value = draw.normal(size=shape) / np.sqrt(np.prod(shape[:-1]) or 1)
    arrays[name] = jnp.asarray(value, jnp.float32)
    return name

  first = array(1, 1, 3, 24)
  widths, steps = [3, 24], [lambda p, h: convolve(h[0], p[first])]
  for _ in range(draw.integers(6, 14)):
    i = int(draw.integers(1, len(widths)))
    operation = OPERATIONS[int(draw.integers(len(OPERATIONS)))]
    if (made := operation(draw, array, widths, i)) is not None:
      widths.append(made[0])
      steps.append(made[1])
  readers = [array(c, 5) for c in widths[1:]]

  def f(p, x):
    h = [x]
    for step in steps:
      h.append(step(p, h))
    ends = zip(h[1:], readers, strict=True)
    return sum((jnp.tanh(a.mean((1, 2))) @ p[w] for a, w in ends), jnp.float32(0))

  return f, arrays
