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
  norms = norms_of(linen[2].view).values()
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


def by_hand(p, x):
  """A normalisation of [examples, positions, channels] behind a layer."""
  y = jnp.tanh(x @ p['a']) @ p['b']
  e = {k: p[k].astype(y.dtype)[None, None] for k in ('mean', 'var', 'scale')}
  bias = p['bias'] if p['bias'].ndim > 1 else p['bias'][None, None]
  centred = y - e['mean']
  factor = jax.lax.rsqrt(e['var'] + 1e-5) * e['scale']
  return centred, jnp.square(centred * factor + bias)


def hand_made(**shapes):
  normal = lambda seed, *shape: jax.random.normal(jax.random.key(seed), shape)
  shapes = dict.fromkeys(('mean', 'var', 'scale', 'bias'), (4,)) | shapes
  p = {name: abs(normal(i, *n)) + 0.5 for i, (name, n) in enumerate(shapes.items())}
  return p | {'a': normal(5, 4, 8), 'b': normal(6, 8, 4)}, normal(7, 60, 4, 4)


normed = lambda p, x: by_hand(p, x)[1]


def test_what_is_not_one_number_for_each_channel_stays():
  assert len(norms_of(dp.couple(normed, *hand_made()).view)) == 1
  for name in ('mean', 'var', 'scale', 'bias'):
    assert not norms_of(dp.couple(normed, *hand_made(**{name: (1,)})).view)
  # along the positions, of which there are as many
  assert not norms_of(dp.couple(normed, *hand_made(bias=(4, 1))).view)


def test_what_is_returned_before_its_end_stays():
  assert not norms_of(dp.couple(by_hand, *hand_made()).view)


def test_without_examples_statistics_stay():
  p, x = hand_made()
  coupling, keep = dp.couple(normed, p, x), {'channels': {'a:1': np.arange(8) > 3}}
  new = dp.refit(coupling, p, keep, [x[:0]])
  jax.tree.map(np.testing.assert_array_equal, new, p)


def test_a_channel_that_is_constant_keeps_its_variance():
  """From one number no scale can be told with which to train on more."""
  p, x = hand_made()
  x, keep = x[:1, :1], {'channels': {'a:1': np.arange(8) > 3}}
  new = dp.refit(dp.couple(normed, p, x), p, keep, [x])
  for name in ('var', 'scale'):
    np.testing.assert_allclose(new[name], p[name], rtol=1e-6)
  assert np.all(new['mean'] != p['mean'])


def test_scale_and_bias_make_up_for_rounded_statistics():
  p, x = hand_made()
  half = {name: p[name].astype(jnp.bfloat16) for name in ('mean', 'var')}
  p |= half | {'mean': half['mean'] + 10}
  coupling, keep = dp.couple(normed, p, x), {'channels': {'a:1': np.arange(8) > 3}}
  new = dp.refit(coupling, p, keep, [x])
  assert new['mean'].dtype == new['var'].dtype == jnp.bfloat16
  found, expected = (normed({**p, **each}, x) for each in (new, {'b': new['b']}))
  assert np.any(new['mean'] != p['mean'])
  np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-3)


def test_a_small_variance_far_from_the_stored_mean_is_measured():
  p, x = hand_made()
  p['mean'] = p['mean'] - 30000
  coupling, keep = dp.couple(normed, p, x), {'channels': {'a:1': np.arange(8) > 3}}
  new = dp.refit(coupling, p, keep, [x])
  read = np.tanh(x @ p['a'])[..., 4:] @ new['b'][4:]
  np.testing.assert_allclose(new['var'], read.var((0, 1)), rtol=1e-2)
