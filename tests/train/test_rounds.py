"""Rounds of training and cutting."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import depthprune as dp

KEY = jax.random.key(0)
X = jax.random.normal(KEY, (12, 6))
DATA = {'image': X, 'label': jnp.arange(12, dtype=jnp.int32) % 3}


class Net(nnx.Module):
  def __init__(self, rngs):
    self.stem = nnx.Linear(6, 8, rngs=rngs)
    self.units = nnx.List([nnx.Linear(8, 8, rngs=rngs) for _ in range(4)])
    self.norms = nnx.List([nnx.BatchNorm(8, rngs=rngs) for _ in range(4)])
    self.head = nnx.Linear(8, 3, rngs=rngs)

  def __call__(self, x):
    x = self.stem(x)
    for unit, norm in zip(self.units, self.norms):
      x = x + nnx.relu(norm(unit(x)))
    return self.head(x)


def shrunk(build, stages, **kwargs):
  net = Net(nnx.Rngs(0))
  trunk = dp.trunk(net, nnx.state(net), X)

  def train(step, state, stage):
    stages.append(stage)
    return dp.fit(step, state, KEY, lambda d, i: d, DATA, steps=3, show=False)

  return trunk, dp.shrink(
    trunk, trunk.init(KEY, X), X, build, train, task=dp.classification(3),
    tx=optax.sgd(1e-2), held_out=[DATA], calibration=[DATA], **kwargs,
  )  # fmt: skip


def test_units_of_a_foreign_network_go_in_rounds(tmp_path):
  stages = []
  trunk, small = shrunk(lambda c: dp.implosion(c, depth=1), stages)
  assert stages == ['round1', 'round2', 'round3', 'finetune']
  assert len(small.model.arch) == 3
  reports = small.report['rounds']
  widths = [r['params']['after'] for r in reports]
  assert widths == sorted(widths, reverse=True)
  assert small.report['params'] == {
    'before': reports[0]['params']['before'],
    'after': widths[-1],
  }
  # 8 · 8 + 8 parameters of a layer and 16 of a normalisation for each unit
  assert reports[0]['params']['before'] - widths[-1] == 3 * (64 + 8 + 16)
  dp.save(tmp_path / 'small', small)
  again = dp.load(tmp_path / 'small', trunk)
  want = small.apply(small.variables, X)['main']
  np.testing.assert_array_equal(again.apply(again.variables, X)['main'], want)
  native = small.model.apply(small.variables, X)['main']
  np.testing.assert_allclose(native, want, rtol=1e-5, atol=1e-5)


def test_one_round_of_channels_is_a_special_case():
  stages = []
  build = lambda c: dp.trainable_gates(c, target=0.6)
  _, small = shrunk(build, stages)
  assert stages == ['round1', 'finetune']
  flops = small.report['flops']
  assert flops['after'] / flops['before'] == pytest.approx(0.6, abs=0.05)


def test_auto_rounds_the_widths_that_are_cut_and_counts_them():
  build = lambda c: dp.trainable_gates(c, target=0.6, round_to='auto')
  _, small = shrunk(build, [], round_to='auto')
  widths = small.report['widths'].values()
  assert all((before, after % 2) == (8, 0) for before, after in widths)
  flops = small.report['flops']
  assert flops['after'] / flops['before'] == pytest.approx(0.6, abs=0.1)
  notes = small.report['notes']
  assert not any('a multiple of' in note for note in notes)  # decided as it is cut


def test_statistics_are_measured_anew_after_a_cut():
  stages = []
  _, small = shrunk(lambda c: dp.implosion(c, depth=3), stages)
  (units,) = [
    u for u in small.variables['batch_stats']['norms'] if u not in small.arch
  ][:1]
  mean = small.variables['batch_stats']['norms'][units]['mean']
  assert np.abs(mean).max() > 0


def test_a_unit_that_carries_no_factor_keeps_the_value_of_its_gate(tmp_path):
  """No array can be scaled behind a tanh, nor by a negative factor behind a ReLU."""

  def f(v, x):
    x = x @ v['stem']
    x = x + jnp.tanh(x @ v['a'])
    x = x + jax.nn.relu(x @ v['b'])
    return (x + jax.nn.gelu(x @ v['c']) @ v['d']) @ v['head']

  keys, widths = jax.random.split(KEY, 6), {'stem': (6, 8), 'head': (8, 3)}
  names = ('stem', 'a', 'b', 'c', 'd', 'head')
  variables = {
    name: jax.random.normal(key, widths.get(name, (8, 8))) / 3
    for name, key in zip(names, keys)
  }
  trunk = dp.trunk(f, variables, X)
  mine = trunk.init(KEY, X)
  assert [*mine['constants']] == ['a', 'b']
  values = {'a': 0.3, 'b': -0.4, 'd': 0.5}
  mine['branches'] = {unit: {'branch': jnp.float32(g)} for unit, g in values.items()}
  for gone in ((), ('a',), ('b', 'd')):
    keep = {'branches': {f'{unit}/branch': unit not in gone for unit in values}}
    pruned = dp.prune(trunk, mine, keep, X)
    closed = {unit: {'branch': jnp.zeros(())} for unit in gone}
    masked = {**mine, 'branches': mine['branches'] | closed}
    want = trunk.apply(masked, X)['main']
    for run in (pruned.apply, pruned.model.apply):
      np.testing.assert_allclose(run(pruned.variables, X)['main'], want, atol=1e-5)
    dp.save(tmp_path / 'small', pruned)
    again = dp.load(tmp_path / 'small', trunk)
    got = again.apply(again.variables, X)['main']
    np.testing.assert_allclose(got, want, atol=1e-5)
