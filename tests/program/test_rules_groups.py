"""Channels in groups: group norms, grouped kernels, kernels made for each example."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import depthprune as dp
from tests import masking as m
from tests.zoo.functions import convolve

KEY = jax.random.key(0)
X = jax.random.normal(KEY, (2, 6, 6, 3))


class Net(nn.Module):
  """A group norm between two convolutions, the second of them grouped."""

  groups: int
  convolution: int = 1

  @nn.compact
  def __call__(self, x):
    x = nn.relu(nn.GroupNorm(self.groups)(nn.Conv(12, (3, 3))(x)))
    x = nn.Conv(24, (3, 3), feature_group_count=self.convolution)(x)
    return nn.Dense(3)(nn.relu(x).mean((1, 2)))


@pytest.mark.parametrize(
  ('groups', 'convolution', 'free'),
  [
    (4, 1, {'Conv_0:3.0': 4}),  # whole groups of the norm
    (4, 2, {'Conv_0:3.0': 2, 'Conv_0:3.1': 2}),
    (2, 4, {'Conv_0:3.0': 2}),
    (4, 4, {'Conv_0:3.0': 4}),
    (6, 4, {'Conv_0:3.0': 2}),  # 2 * (3 * 2) = 2 * (2 * 3): halves
    (12, 1, {'Conv_0:3': 12}),
    (1, 1, {}),
    (4, 3, {}),
  ],
)
def test_a_group_norm_is_cut_in_whole_groups(groups, convolution, free):
  net = Net(groups, convolution)
  coupling = m.agree(net, net.init(KEY, X), X)
  first = {n: g for n, g in coupling.groups.items() if n.startswith('Conv_0:3')}
  assert {n: g.size for n, g in first.items() if not g.ungated} == free
  for group in first.values():  # those within a group change its mean
    assert not group.ungated or 'GroupNorm_0' in group.ungated


def test_layouts_that_do_not_divide_are_pinned_with_both_and_the_line():
  for groups, convolution, layouts in (
    (4, 3, '(4*3) with (3*4)'),
    (6, 4, '(3*2) with'),
  ):
    net = Net(groups, convolution)
    coupling = dp.couple(net, net.init(KEY, X), X)
    [reason] = {
      r for p in coupling.pinned if p.path == 'params/Conv_0/kernel' for r in p.reasons
    }
    assert reason.startswith(f'incompatible layouts: {layouts}')
    assert 'in Net/Conv_1' in reason


def test_a_norm_of_squares_in_groups_is_cut_alike_in_all():
  def f(p, x):
    h = jnp.tanh(convolve(x, p['a'])).reshape(2, 6, 6, 3, 4)
    h = h * jax.lax.rsqrt(jnp.mean(h**2, -1, keepdims=True) + jnp.float32(0.1))
    return convolve(h.reshape(2, 6, 6, 12), p['b'])

  variables = {'a': jax.random.normal(KEY, (3, 3, 3, 12)), 'b': jnp.ones((1, 1, 12, 2))}
  groups = m.agree(f, variables, X).groups.values()
  assert {g.name: g.size for g in groups} == {'a:3.0': 3, 'a:3.1': 4}


def dynamic(p, x):
  """A mixture of kernels for each example."""
  x = jax.nn.relu(convolve(x, p['stem']))
  share = jax.nn.sigmoid(x.mean((1, 2)) @ p['route'])
  kernels = jnp.einsum('be,ehwio->bhwio', share, p['experts'])
  y = jax.vmap(lambda a, w: convolve(a[None], w)[0])(x, kernels)
  return jax.nn.relu(y).mean((1, 2)) @ p['head']


def modulated(p, x):
  """The input channels of one kernel are scaled for each example, and normalised."""
  x = jax.nn.relu(convolve(x, p['stem']))
  style = x.mean((1, 2)) @ p['style']
  w = p['kernel'] * style[:, None, None, :, None]
  w = w * jax.lax.rsqrt((w**2).sum((1, 2, 3), keepdims=True) + jnp.float32(0.1))
  y = jax.vmap(lambda a, w: convolve(a[None], w)[0])(x, w)
  return jax.nn.relu(y).mean((1, 2)) @ p['head']


def depthwise(p, x):
  """A depthwise kernel for each example."""
  x = jax.nn.relu(convolve(x, p['stem']))
  w = (x.mean((1, 2)) @ p['make']).reshape(len(x), 3, 3, 1, -1)
  y = jax.vmap(lambda a, w: convolve(a[None], w, a.shape[-1])[0])(x, w)
  return jax.nn.relu(y).mean((1, 2)) @ p['head']


def correlated(p, x):
  """Each example is its own kernel."""
  x = jax.nn.relu(convolve(x, p['stem']))
  y = jax.vmap(lambda a: convolve(a[None], a[:3, :3, :, None])[0])(x)
  return y.mean((1, 2)) @ p['end']


SHAPES = {
  'stem': (3, 3, 3, 12), 'route': (12, 4), 'experts': (4, 3, 3, 12, 8),
  'head': (8, 5), 'style': (12, 12), 'kernel': (3, 3, 12, 8), 'make': (12, 108),
}  # fmt: skip
PER_EXAMPLE = {
  'dynamic': (dynamic, 'stem route experts head'),
  'modulated': (modulated, 'stem style kernel head'),
  'depthwise': (depthwise, 'stem make head'),
  'correlated': (correlated, 'stem end'),
}


@pytest.mark.parametrize('name', PER_EXAMPLE)
def test_kernels_made_for_each_example_are_cut_at_every_batch_size(name):
  f, names = PER_EXAMPLE[name]
  shapes = {**SHAPES, 'end': (1, 5)}
  if name == 'depthwise':
    shapes['head'] = (12, 5)
  variables = {
    n: jax.random.normal(jax.random.fold_in(KEY, i), shapes[n]) / 4
    for i, n in enumerate(names.split())
  }
  groups = m.agree(f, variables, X).groups
  assert 'stem:3' in groups
  for batch in (1, 3):
    x = jax.ShapeDtypeStruct((batch, *X.shape[1:]), X.dtype)
    assert dp.couple(f, variables, x).groups == groups
  keep = {'channels': {'stem:3': np.arange(12) % 2 == 0}}
  small = dp.prune(f, variables, keep, X[:1])
  got = small.apply(small.variables, X)
  masked = dp.plug(f, small.coupling)(variables, m.as_gates(keep), X)
  np.testing.assert_allclose(got, masked, atol=1e-5)
