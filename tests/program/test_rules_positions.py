"""Tables made inside a network, and windows that take an axis whole."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import depthprune as dp

KEY = jax.random.key(0)
X = jax.random.normal(KEY, (2, 5, 6))


def weights(**shapes):
  return {
    name: jax.random.normal(jax.random.fold_in(KEY, i), shape) / 2
    for i, (name, shape) in enumerate(shapes.items())
  }


def rotary(x):
  """Rotates pairs of channels of [batch, length, heads, size] by their position."""
  half = x.shape[-1] // 2
  positions = jnp.arange(x.shape[1], dtype=jnp.float32)[:, None]
  angle = positions / 1e4 ** (jnp.float32(jnp.arange(half)) / half)
  sin, cos = jnp.sin(angle)[:, None], jnp.cos(angle)[:, None]
  a, b = x[..., :half], x[..., half:]
  return jnp.concatenate([a * cos - b * sin, a * sin + b * cos], -1)


def attention(v, x):
  q, k = (rotary(jnp.einsum('btd,dhk->bthk', x, v[name])) for name in 'qk')
  values = jnp.einsum('btd,dhk->bthk', x, v['v'])
  share = jax.nn.softmax(jnp.einsum('bthk,bshk->bhts', q, k))
  return jnp.einsum('bhts,bshk,hkd->btd', share, values, v['out'])


def fourier(v, x):
  """Fourier features: the frequencies are counted."""
  angle = (x @ v['a'])[..., :1] * (1 + jnp.arange(8, dtype=jnp.float32))
  return jnp.sin(angle) @ v['b']


def shifted(v, x):
  """A roll by another number of steps for every example: a gather of whole slices."""
  h = x @ v['a']
  return (
    jax.vmap(lambda row, n: jnp.roll(row, n, axis=0))(h, jnp.array([1, 3])) @ v['b']
  )


def window(v, x):
  """Two steps of every example, from where it says."""
  part = lambda row, i: jax.lax.dynamic_slice_in_dim(row, i, 2, 0)
  return jax.vmap(part)(x @ v['a'], jnp.array([1, 2])) @ v['b']


def written(v, x):
  """A step of every example is overwritten: a scatter of whole slices."""
  h = x @ v['a']
  put = lambda row, i: jax.lax.dynamic_update_slice_in_dim(row, row[:1], i, 0)
  return jax.vmap(put)(h, jnp.array([1, 2])) @ v['b']


NETWORKS = {
  'rotary': (
    attention,
    weights(q=(6, 2, 8), k=(6, 2, 8), v=(6, 2, 4), out=(2, 4, 6)),
    {'q:1': 2, 'q:2': 4, 'v:2': 4},
  ),
  'fourier': (fourier, weights(a=(6, 1), b=(8, 3)), {'b:0': 8}),
  'shifted': (shifted, weights(a=(6, 8), b=(8, 3)), {'a:1': 8}),
  'window': (window, weights(a=(6, 8), b=(8, 3)), {'a:1': 8}),
  'written': (written, weights(a=(6, 8), b=(8, 3)), {'a:1': 8}),
}


@pytest.mark.parametrize('name', NETWORKS)
def test_they_are_cut_exactly_and_train_alike(name):
  fn, variables, groups = NETWORKS[name]
  coupling = dp.couple(fn, variables, X)
  assert {g: x.size for g, x in coupling.groups.items()} == groups
  keep = {g: np.arange(n) % 2 == 1 for g, n in groups.items()}
  small = dp.prune(fn, variables, {'channels': keep}, X, coupling=coupling)
  assert small.report['verify']['difference'] < 1e-5
  gates = {g: jnp.asarray(k, jnp.float32) for g, k in keep.items()}
  masked = lambda v: dp.plug(fn, coupling)(v, {'channels': gates}, X)
  np.testing.assert_allclose(
    small.apply(small.variables, X), masked(variables), atol=1e-5
  )
  full = jax.grad(lambda v: (masked(v) ** 2).mean())(variables)
  part = jax.grad(lambda v: (small.apply(v, X) ** 2).mean())(small.variables)
  for path, cut in small.report['tensors'].items():
    for axis, kept in cut['kept'].items():
      full[path] = jnp.take(full[path], np.array(kept), axis=int(axis))
  for path in part:
    np.testing.assert_allclose(part[path], full[path], atol=1e-5)


def one_hot(v, x):
  words = jnp.int32(jnp.abs(x[..., 0])) % 8
  return jax.nn.one_hot(words, 8) @ v['a'] @ v['b']


def looked_up(v, x):
  return x @ v['a'][jnp.arange(6)] @ v['b']


def shifted_words(v, x):
  """The numbers go through arithmetic and another shape before they are compared."""
  words = jnp.int32(jnp.abs(x[..., 0])) % 8
  codes = jnp.float32((jnp.arange(8)[None] + 1) * 2 == (words[..., None] + 1) * 2)
  return codes @ v['a'] @ v['b']


@pytest.mark.parametrize(
  ('fn', 'rows'), [(one_hot, 8), (looked_up, 6), (shifted_words, 8)]
)
def test_what_is_told_apart_by_its_number_is_pinned(fn, rows):
  variables = weights(a=(rows, 4), b=(4, 3))
  coupling = dp.couple(fn, variables, X)
  assert list(coupling.groups) == ['a:1']
  pinned = {(p.path, p.axis) for p in coupling.pinned}
  assert fn is looked_up or ('a', 0) in pinned


def test_a_part_of_an_axis_that_an_index_chooses_is_pinned():
  def fn(v, x):
    h = x @ v['a']
    part = lambda row, i: jax.lax.dynamic_slice_in_dim(row, i, 4, 1)
    return jax.vmap(part)(h, jnp.array([1, 2])) @ v['b']

  coupling = dp.couple(fn, weights(a=(6, 8), b=(4, 3)), X)
  assert not coupling.groups and {p.path for p in coupling.pinned} >= {'a'}
