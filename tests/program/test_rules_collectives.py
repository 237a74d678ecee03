"""Collectives over a named axis: a cut network under vmap and shard_map."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import depthprune as dp

X = jax.random.normal(jax.random.key(0), (4, 3, 6, 6, 2))  # [devices, batch, ...]
TRAIN = {'train': True, 'mutable': ['batch_stats']}


class Net(nn.Module):
  """A BatchNorm over all devices, as examples for ImageNet have it."""

  @nn.compact
  def __call__(self, x, train=False):
    x = nn.Conv(8, (3, 3))(x)
    x = nn.BatchNorm(use_running_average=not train, axis_name='batch')(x)
    return nn.Dense(4)(nn.relu(x).mean((1, 2)))


def by_vmap(fn):
  return jax.vmap(fn, in_axes=(None, 0), axis_name='batch')


def by_shard_map(fn):
  mesh = jax.make_mesh((1,), ('batch',), axis_types=(jax.sharding.AxisType.Auto,))
  shard = jax.shard_map(
    lambda v, x: jax.vmap(fn, in_axes=(None, 0), axis_name='rest')(v, x),
    mesh=mesh,
    in_specs=(P(), P('batch')),
    out_specs=P('batch'),
    check_vma=False,
  )
  return jax.jit(shard)


@pytest.fixture(scope='module')
def cut():
  """The network, pruned in evaluation, and the same with its closed slices zeroed."""
  model = Net()
  variables = model.init(jax.random.key(0), X[0])
  coupling = dp.couple(model, variables, X[0])
  keep = {'channels': {'Conv_0:3': np.arange(8) % 3 > 0}}
  small = dp.prune(model, variables, keep, X[0], coupling=coupling)
  gates = {g: jnp.asarray(k, jnp.float32) for g, k in keep['channels'].items()}
  plugged = dp.plug(model, coupling)
  masked = lambda v, x: plugged(v, {'channels': gates}, x, **TRAIN)
  return variables, masked, small


@pytest.mark.parametrize('spread', [by_vmap, by_shard_map])
def test_a_network_with_statistics_over_devices_trains_on(cut, spread):
  variables, masked, small = cut
  step = lambda v, x: small.apply(v, x, **TRAIN)
  expected, _ = spread(masked)(variables, X)
  got, updates = spread(step)(small.variables, X)
  np.testing.assert_allclose(got, expected, atol=1e-5)
  assert updates['batch_stats']['BatchNorm_0']['mean'].shape == (4, 5)
  norm = lambda fn: lambda v: (spread(fn)(v, X)[0] ** 2).mean()
  full = jax.grad(norm(masked))(variables)['params']['Conv_0']['kernel']
  part = jax.grad(norm(step))(small.variables)['params']['Conv_0']['kernel']
  np.testing.assert_allclose(part, full[..., np.arange(8) % 3 > 0], atol=1e-5)


@pytest.mark.parametrize(
  'combine',
  [
    lambda x: jax.lax.psum(x, 'batch'),
    lambda x: jax.lax.pmean(x, 'batch'),
    lambda x: jax.lax.pmax(x, 'batch'),
    lambda x: jax.lax.pmin(x, 'batch'),
    lambda x: jax.lax.all_gather(x, 'batch').mean(0),
    lambda x: jax.lax.all_gather(x, 'batch', axis=1, tiled=True).reshape(3, 4, -1)[
      :, 0
    ],
    lambda x: jax.lax.ppermute(x, 'batch', [(i, (i + 1) % 4) for i in range(4)]),
    lambda x: x + jnp.float32(jax.lax.axis_index('batch')),
  ],
  ids='psum pmean pmax pmin all_gather tiled ppermute axis_index'.split(),
)
def test_each_combines_the_slices_that_are_left(combine):
  x = X.mean((2, 3))  # [devices, batch, 2]
  key = jax.random.key(1)
  variables = {
    'a': jax.random.normal(key, (2, 8)),
    'b': jax.random.normal(key, (8, 3)),
  }

  def fn(v, x, together=False):
    h = jnp.tanh(x @ v['a'])
    return (combine(h) if together else h) @ v['b']

  coupling = dp.couple(fn, variables, x[0])
  kept = np.arange(8) % 3 > 0
  small = dp.prune(fn, variables, {'channels': {'a:1': kept}}, x[0], coupling=coupling)
  plugged = dp.plug(fn, coupling)
  gates = {'channels': {'a:1': jnp.asarray(kept, jnp.float32)}}
  masked = by_vmap(lambda v, x: plugged(v, gates, x, together=True))
  got = by_vmap(lambda v, x: small.apply(v, x, together=True))(small.variables, x)
  np.testing.assert_allclose(got, masked(variables, x), atol=1e-5)


@pytest.mark.parametrize(
  'combine',
  [
    lambda a: a + jax.lax.psum(a, 'n'),
    lambda a: a - jax.lax.pmean(a, 'n'),
    lambda a: a * jax.lax.pmax(a, 'n'),
    lambda a: a * jax.lax.all_gather(a, 'n').mean(0),
    lambda a: a * jax.lax.ppermute(a, 'n', [(i, (i + 1) % 4) for i in range(4)]),
  ],
  ids='psum pmean pmax all_gather ppermute'.split(),
)
def test_an_axis_named_inside_of_the_network_disappears(combine):
  """A vmap in the network turns a collective into a reduction of an axis of arrays."""
  x = X.mean((2, 3))
  key = jax.random.key(1)
  variables = {
    'a': jax.random.normal(key, (2, 8)),
    'b': jax.random.normal(key, (8, 3)),
  }
  each = jax.vmap(combine, axis_name='n')
  fn = lambda v, x: each(jnp.tanh(x @ v['a'])) @ v['b']
  coupling = dp.couple(fn, variables, x)
  assert not coupling.unknown and not coupling.groups['a:1'].ungated
  keep = {'channels': {'a:1': np.arange(8) % 3 > 0}}
  small = dp.prune(fn, variables, keep, x, coupling=coupling)
  assert small.report['verify']['difference'] < 1e-5 < small.report['verify']['moved']
