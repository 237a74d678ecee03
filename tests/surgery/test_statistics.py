"""Batch normalisation that is stored anew, against answers and training mode."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import depthprune as dp
from depthprune.surgery import refit as refitting
from depthprune.surgery.statistics import norms_of


class Linen(nn.Module):
  """Two convolutions with normalisations, and one of these that has no scale."""

  @nn.compact
  def __call__(self, x, train: bool = False):
    norm = lambda **kwargs: nn.BatchNorm(use_running_average=not train, **kwargs)
    x = nn.relu(norm(epsilon=1e-3)(nn.Conv(6, (3, 3))(x)))
    x = nn.relu(norm()(nn.Conv(5, (3, 3))(x)))
    x = norm(use_scale=False)(x.mean((1, 2)))
    return nn.Dense(3)(x)


class Nnx(nnx.Module):
  """A perceptron with a normalisation."""

  def __init__(self, rngs: nnx.Rngs):
    self.first = nnx.Linear(4, 8, rngs=rngs)
    self.norm = nnx.BatchNorm(8, rngs=rngs)
    self.second = nnx.Linear(8, 8, rngs=rngs)
    self.last = nnx.BatchNorm(8, rngs=rngs)
    self.head = nnx.Linear(8, 3, rngs=rngs)

  def __call__(self, x):
    x = nnx.relu(self.norm(self.first(x)))
    return self.head(nnx.relu(self.last(self.second(x))))


@pytest.fixture(scope='module')
def linen():
  """(network, variables with measured statistics, coupling, decision, images)."""
  x = jax.random.normal(jax.random.key(0), (256, 6, 6, 2)) + 1
  model = Linen()
  variables = dp.recalibrate(model, model.init(jax.random.key(1), x), [{'image': x}])
  coupling = dp.couple(model, variables, x[:1])
  return model, variables, coupling, dp.oneshot(coupling, variables, 0.5), x


def test_they_are_found_with_their_arrays(linen):
  norms = norms_of(linen[2].view)
  assert [norm.epsilon for norm in norms] == pytest.approx([1e-3, 1e-5])
  for i, norm in enumerate(norms):
    stats, params = f'batch_stats/BatchNorm_{i}/', f'params/BatchNorm_{i}/'
    assert (norm.mean, norm.var) == (f'{stats}mean', f'{stats}var')
    assert (norm.scale, norm.bias) == (f'{params}scale', f'{params}bias')
    assert norm.axis == 3


def test_answers_stay_and_statistics_are_those_of_what_is_read(linen, monkeypatch):
  _, variables, coupling, keep, x = linen
  answer = lambda v: (p := pruned(linen, v)).apply(p.variables, x)
  new = dp.refit(coupling, variables, keep, [x[:100], x[100:]])
  monkeypatch.setattr(refitting, 'restated', lambda variables, batches: {})
  old = dp.refit(coupling, variables, keep, [x[:100], x[100:]])
  np.testing.assert_allclose(answer(new), answer(old), atol=1e-5)
  small = pruned(linen, new)
  fresh = dp.recalibrate(small.model or small.apply, small.variables, [{'image': x}])
  for i in (0, 1):  # the third has no scale that could make up for anything
    for name, stored in small.variables['batch_stats'][f'BatchNorm_{i}'].items():
      measured = fresh['batch_stats'][f'BatchNorm_{i}'][name]
      np.testing.assert_allclose(stored, measured, rtol=1e-3, atol=1e-5)
      before = old['batch_stats'][f'BatchNorm_{i}'][name]
      assert i == 0 or before.shape != stored.shape or np.any(before != stored)


def pruned(linen, variables):
  model, _, coupling, keep, x = linen
  return dp.prune(model, variables, keep, x[:1], coupling=coupling)


def test_training_begins_with_the_network_that_answers():
  model = Nnx(nnx.Rngs(0))
  x = jax.random.normal(jax.random.key(0), (256, 4))
  model.train()
  model(x)
  model.eval()
  variables = nnx.state(model)
  coupling = dp.couple(model, variables, x)
  keep = dp.oneshot(coupling, variables, 0.6)
  new = dp.refit(coupling, variables, keep, [x])
  small = dp.prune(model, new, keep, x, coupling=coupling)
  network = small.model
  expected = network(x)
  network.train()
  np.testing.assert_allclose(network(x), expected, atol=1e-3)


def test_without_normalisations_there_is_nothing_to_do():
  fn = lambda p, x: jnp.tanh(x @ p['a']) @ p['b']
  p = {'a': jnp.ones((3, 4)), 'b': jnp.ones((4, 2))}
  assert not norms_of(dp.couple(fn, p, jnp.ones((2, 3))).view)
