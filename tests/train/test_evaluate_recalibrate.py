import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from depthprune.train.evaluate import recalibrate


class Net(nn.Module):
  momentum: float = 0.9

  @nn.compact
  def __call__(self, x, train=False):
    norm = lambda m: nn.BatchNorm(not train, momentum=m)
    x = norm(self.momentum)(x)
    x = nn.Dropout(0.5, deterministic=not train)(nn.relu(nn.Dense(4)(x)))
    x = nn.BatchNorm(True, name='frozen')(x)
    return norm(0.5)(x)


def batches(count):
  rng = np.random.default_rng(0)
  for i in range(count):
    yield {'image': (rng.normal(size=(16, 3)) * (i + 1) + i).astype(np.float32)}


@pytest.mark.parametrize('momentum', [0.0, 0.9, 0.999])
def test_statistics_are_the_plain_mean_over_batches(momentum):
  net = Net(momentum)
  variables = net.init(jax.random.key(0), jnp.ones((2, 3)))
  stats = dict(variables['batch_stats'])
  stats['frozen'] = jax.tree.map(lambda s: s + 0.25, stats['frozen'])
  fresh = recalibrate(net, {**variables, 'batch_stats': stats}, batches(5))
  images = [b['image'] for b in batches(5)]
  found = fresh['batch_stats']['BatchNorm_0']
  mean, var = (
    np.mean([x.mean(0) for x in images], 0),
    np.mean([x.var(0) for x in images], 0),
  )
  np.testing.assert_allclose(found['mean'], mean, rtol=1e-4)
  np.testing.assert_allclose(found['var'], var, rtol=1e-4)
  np.testing.assert_array_equal(
    fresh['batch_stats']['frozen']['mean'], np.full(4, 0.25)
  )
  assert fresh['params'] is variables['params']


def test_the_old_statistics_leave_no_trace():
  net = Net()
  variables = net.init(jax.random.key(0), jnp.ones((2, 3)))
  other = jax.tree.map(lambda s: 7 * s + 1, variables['batch_stats'])
  other = {**other, 'frozen': variables['batch_stats']['frozen']}
  a = recalibrate(net, variables, batches(3))
  b = recalibrate(net, {**variables, 'batch_stats': other}, batches(3))
  jax.tree.map(np.testing.assert_array_equal, a['batch_stats'], b['batch_stats'])


def test_a_network_without_batch_statistics_is_refused():
  with pytest.raises(ValueError, match="expected an entry 'batch_stats'"):
    recalibrate(Net(), {'params': {}}, batches(1))


def test_no_batches_is_an_error():
  variables = Net().init(jax.random.key(0), jnp.ones((2, 3)))
  with pytest.raises(ValueError, match='at least one batch'):
    recalibrate(Net(), variables, [])
