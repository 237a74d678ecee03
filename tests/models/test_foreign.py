"""Networks of any kind as trunks: heads, gates at units, training, cutting, storing."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import depthprune as dp
from depthprune.models.auxiliary_path import beside
from depthprune.models.heads import Head, WithHeads, every_tap
from depthprune.program.trace import paths_of
from depthprune.program.units import units
from depthprune.train.method import plain as untouched

KEY = jax.random.key(0)
X = jax.random.normal(KEY, (6, 5, 5, 2))
DATA = {'image': X, 'label': jnp.arange(6, dtype=jnp.int32) % 3}
TASK = dp.classification(3)
TX = optax.sgd(1e-2)


class LinenUnit(nn.Module):
  @nn.compact
  def __call__(self, x, deterministic):
    y = nn.Conv(4, (3, 3), use_bias=False, name='conv')(x)
    y = nn.BatchNorm(use_running_average=deterministic, name='norm')(y)
    return x + nn.Dropout(0.3, deterministic=deterministic)(nn.relu(y))


class Linen(nn.Module):
  @nn.compact
  def __call__(self, x, *, deterministic=True):
    x = nn.relu(nn.Conv(4, (3, 3), name='stem')(x))
    for i in range(3):
      x = LinenUnit(name=f'unit{i}')(x, deterministic)
    return nn.Dense(3, name='head')(x.mean((1, 2)))


class NNXUnit(nnx.Module):
  def __init__(self, rngs):
    self.conv = nnx.Conv(4, 4, (3, 3), use_bias=False, rngs=rngs)
    self.norm = nnx.BatchNorm(4, rngs=rngs)
    self.drop = nnx.Dropout(0.3, rngs=rngs)

  def __call__(self, x):
    return x + self.drop(nnx.relu(self.norm(self.conv(x))))


class NNX(nnx.Module):
  def __init__(self, rngs):
    self.stem = nnx.Conv(2, 4, (3, 3), rngs=rngs)
    self.unit = nnx.List([NNXUnit(rngs) for _ in range(3)])
    self.head = nnx.Linear(4, 3, rngs=rngs)

  def __call__(self, x):
    x = nnx.relu(self.stem(x))
    for unit in self.unit:
      x = unit(x)
    return self.head(x.mean((1, 2)))


def function(variables, x):
  """Convolutions in a list, channels last, without normalisation."""
  conv = functools.partial(
    jax.lax.conv_general_dilated, window_strides=(1, 1), padding='SAME',
    dimension_numbers=('NHWC', 'HWIO', 'NHWC'),
  )  # fmt: skip
  first, *rest = variables['convs']
  x = jax.nn.relu(conv(x, first))
  for w in rest:
    x = x + jax.nn.relu(conv(x, w))
  return x.mean((1, 2)) @ variables['out']


def linen():
  model = Linen()
  return model, model.init(KEY, X), lambda v: model.apply(v, X)


def nnx_module():
  net = NNX(nnx.Rngs(0))
  net.eval()
  return net, nnx.state(net), lambda v: nnx.merge(nnx.graphdef(net), v)(X)


def plain():
  keys = jax.random.split(KEY, 5)
  convs = [0.3 * jax.random.normal(k, (3, 3, n, 4)) for k, n in zip(keys, (2, 4, 4, 4))]
  variables = {'convs': convs, 'out': jax.random.normal(keys[4], (4, 3))}
  return function, variables, lambda v: function(v, X)


KINDS = {'linen': linen, 'nnx': nnx_module, 'function': plain}


@pytest.fixture(params=KINDS)
def kind(request):
  model, variables, call = KINDS[request.param]()
  return dp.trunk(model, variables, X), variables, call


def trained(model, method, variables, coupling=None, steps=2):
  state = dp.init_state(model, method, TX, variables, coupling, batch=DATA)
  step = dp.make_step(model, method, TASK, TX, coupling)
  with jax.numpy_dtype_promotion('standard'):  # the gates' own Adam needs it
    return dp.fit(step, state, KEY, lambda d, i: d, DATA, steps=steps, show=False)


def test_a_trunk_computes_what_its_network_does(kind):
  trunk, variables, call = kind
  mine = trunk.init(KEY, X)
  np.testing.assert_array_equal(trunk.apply(mine, X)['main'], call(variables))
  restored = trunk.original(mine)
  assert jax.tree.structure(restored) == jax.tree.structure(variables)
  np.testing.assert_array_equal(call(restored), call(variables))


def test_units_have_gates_that_scale_their_branches(kind):
  trunk, *_ = kind
  variables = trunk.init(KEY, X)
  assert len(trunk.units) == 3
  found = units(dp.couple(trunk, variables, X))
  assert [u.name for u in found] == list(trunk.units)
  assert not any(u.why_not for u in found)
  gates = jax.tree.map(jnp.zeros_like, variables['branches'])
  outputs = trunk.apply({**variables, 'branches': gates}, X)
  np.testing.assert_array_equal(outputs[trunk.taps[-1]], outputs[trunk.taps[0]])


def test_training_updates_statistics_and_draws_dropout():
  for make in (linen, nnx_module):
    model, variables, _ = make()
    trunk = dp.trunk(model, variables, X)
    mine = trunk.init(KEY, X)
    run = functools.partial(trunk.apply, mine, X, train=True, mutable=['batch_stats'])
    one, new = run(rngs={'dropout': jax.random.key(1)})
    two, _ = run(rngs={'dropout': jax.random.key(2)})
    again, _ = run(rngs={'dropout': jax.random.key(1)})
    assert not np.array_equal(one['main'], two['main'])
    np.testing.assert_array_equal(one['main'], again['main'])
    moved = paths_of(new)
    assert len(moved) == 6
    old = paths_of({'batch_stats': mine['batch_stats']})
    assert all(not np.array_equal(x, old[p]) for p, x in moved.items())


def test_statistics_in_training_are_those_of_the_network():
  model = Linen()
  variables = model.init(KEY, X)
  trunk = dp.trunk(model, variables, X)
  rngs = {'dropout': jax.random.key(1)}
  _, theirs = model.apply(
    variables, X, deterministic=False, rngs=rngs, mutable=['batch_stats']
  )
  _, ours = trunk.apply(
    trunk.init(KEY, X), X, train=True, rngs=rngs, mutable=['batch_stats']
  )
  first = lambda stats: stats['batch_stats']['unit0']['norm']['mean']
  np.testing.assert_allclose(first(ours), first(theirs), rtol=1e-6)


def test_netcut_on_any_network(kind, tmp_path):
  trunk, *_ = kind
  network = every_tap(trunk)
  assert network.exits == tuple(f'exit{i}' for i in range(1, 5))
  variables = network.init(KEY, X)
  method = dp.netcut(dp.couple(network, variables, X), force=True)
  state = trained(network, method, variables)
  state = state.replace(theta={'importance': jnp.array([0.0, 1, 0, 0])})
  keep = method.decide(state.theta, {}, dp.judge(network, method, TASK, state, [DATA]))
  pruned = dp.prune(network, state.variables, keep, X)
  assert pruned.model.exits == ('exit2',)
  paths = paths_of(pruned.variables)
  assert not any('unit1' in p or 'unit/1' in p or 'convs/2' in p for p in paths)
  want = network.apply(state.variables, X)['exit2']
  np.testing.assert_allclose(
    pruned.apply(pruned.variables, X)['exit2'], want, rtol=1e-5, atol=1e-5
  )
  native = pruned.model.apply(pruned.variables, X)['exit2']
  np.testing.assert_allclose(native, want, rtol=1e-5, atol=1e-5)
  dp.save(tmp_path / 'short', pruned)
  again = dp.load(tmp_path / 'short', network)
  np.testing.assert_array_equal(
    again.apply(again.variables, X)['exit2'], pruned.apply(pruned.variables, X)['exit2']
  )


def test_exits_of_any_network_are_executed_early(kind):
  trunk, *_ = kind
  network = WithHeads(trunk, {'early': Head(trunk.taps[1], 3, hidden=4)})
  variables = network.init(KEY, X)
  state = trained(network, dp.sidenet(dp.couple(network, variables, X)), variables)
  early = dp.cascade(network, state.variables, X, thresholds={'early': 0.0})
  answer = early(X)
  assert not answer.exit.any()
  np.testing.assert_allclose(
    answer.logits, network.apply(state.variables, X)['early'], rtol=1e-5, atol=1e-5
  )
  # Frozen: only the heads have moved.
  same = lambda part: np.array_equal(part(state.params), part(variables['params']))
  leaf = lambda tree: jax.tree.leaves(tree)[0]
  assert same(lambda p: leaf(p['trunk']))
  assert not same(lambda p: p['head_early']['out']['kernel'])


def test_an_auxiliary_path_leaves_the_network_as_it_was(kind):
  trunk, _, call = kind
  network = WithHeads(
    trunk, {'aux': beside(trunk.taps, search=True, classes=3, width=8)}
  )
  variables = network.init(KEY, X)
  coupling = dp.couple(network, variables, X)
  method = dp.auxiliary(coupling, weight=1.0, steps=2)
  state = trained(network, method, variables, coupling)
  pruned = dp.prune(network, state.variables, method.decide(state.theta, {}, None), X)
  own = pruned.variables['params']['trunk']
  restored = {c: tree['trunk'] for c, tree in pruned.variables.items()}
  got = call(trunk.original(restored))
  np.testing.assert_allclose(
    got, pruned.apply(pruned.variables, X)['main'], rtol=1e-5, atol=1e-5
  )
  assert paths_of(own).keys() == paths_of(trunk.init(KEY, X)['params']).keys()


def test_a_unit_that_is_erased_is_not_created(kind):
  trunk, *_ = kind
  gone = trunk.units[1]
  small = trunk.clone(arch={f'{gone}/branch': 0})
  variables = small.init(KEY, X)
  assert len(jax.tree.leaves(variables)) < len(jax.tree.leaves(trunk.init(KEY, X)))
  masked = trunk.init(KEY, X)
  masked = jax.tree_util.tree_map_with_path(
    lambda p, x: 0 * x if f'branches/{gone}' in dp_path(p) else x, masked
  )
  np.testing.assert_allclose(
    small.apply(variables, X)['main'],
    trunk.apply(masked, X)['main'],
    rtol=1e-5,
    atol=1e-5,
  )


def dp_path(path):
  return jax.tree_util.keystr(path, simple=True, separator='/')


def test_arrays_by_keyword_are_further_inputs():
  class Masked(nn.Module):
    @nn.compact
    def __call__(self, tokens, attention_mask):
      x = nn.Embed(11, 6, name='embed')(tokens)
      weight = attention_mask.astype(jnp.float32)[..., None]
      x = x + nn.Dense(6, name='mix')((weight * x).mean(1, keepdims=True) + x)
      return {'logits': nn.Dense(2, name='head')(x[:, 0]), 'hidden': x}

  tokens = jnp.arange(12).reshape(3, 4) % 11
  mask = jnp.ones((3, 4), jnp.int32).at[0, 2:].set(0)
  model = Masked()
  variables = model.init(KEY, tokens, mask)
  trunk = dp.trunk(model, variables, tokens, attention_mask=mask)
  outputs = trunk.apply(trunk.init(KEY, tokens, mask), tokens, mask)
  want = model.apply(variables, tokens, mask)['logits']
  np.testing.assert_array_equal(outputs['main'], want)
  assert outputs['mask'].dtype == bool
  network = WithHeads(trunk, {'early': Head('mix', 2)})
  logits = network.apply(network.init(KEY, tokens, mask), tokens, mask)['early']
  assert logits.shape == (3, 2)


def test_what_cannot_be_told_is_asked_for():
  pair = lambda v, x: (x @ v['a'], x)
  with pytest.raises(ValueError, match='says which of it are the logits'):
    print(dp.trunk(pair, {'a': jnp.ones((2, 3))}, X[:, 0, 0]).classes)
  chosen = dp.trunk(
    pair, {'a': jnp.ones((2, 3))}, X[:, 0, 0], output=lambda out: out[0]
  )
  assert chosen.classes == 3
  trunk = dp.trunk(*linen()[:2], X)
  with pytest.raises(ValueError, match="no tap 'unit9'.*unit0"):
    WithHeads(trunk, {'early': Head('unit9')})
  with pytest.raises(ValueError, match='missing in the variables of .*Linen'):
    trunk.apply({'params': {}}, X)


def test_the_mode_of_a_network_may_have_any_name():
  def f(variables, x, phase):
    assert phase in ('fit', 'test')
    return x @ variables['a'] * (2.0 if phase == 'fit' else 1.0)

  mode = lambda train: {'phase': 'fit' if train else 'test'}
  x = X[:, 0, 0]
  trunk = dp.trunk(f, {'a': jnp.ones((2, 3))}, x, mode=mode)
  variables = trunk.init(KEY, x)
  here, there = (trunk.apply(variables, x, train=t)['main'] for t in (False, True))
  np.testing.assert_array_equal(there, 2 * here)


def test_the_networks_own_dictionary_of_outputs_is_kept():
  f = lambda v, x: {'main': x @ v['a'], 'side': x @ v['b']}
  x = X[:, 0, 0]
  variables = {'a': jnp.ones((2, 3)), 'b': jnp.ones((2, 4))}
  trunk = dp.trunk(f, variables, x)
  outputs = trunk.apply(trunk.init(KEY, x), x)
  assert outputs['side'].shape == (6, 4)


def test_a_sequential_needs_no_flag():
  x, layers = X[:, 0, 0], (nn.Dense(4), nn.relu, nn.Dense(3))
  linen = nn.Sequential(layers)
  rngs = nnx.Rngs(0)
  net = nnx.Sequential(nnx.Linear(2, 4, rngs=rngs), nnx.Dropout(0.5, rngs=rngs),
                       nnx.Linear(4, 3, rngs=rngs))  # fmt: skip
  for model, variables in ((linen, linen.init(KEY, x)), (net, nnx.state(net))):
    trunk = dp.trunk(model, variables, x)
    mine = trunk.init(KEY, x)
    for train in (False, True):
      outputs = trunk.apply(mine, x, train=train, rngs={'dropout': KEY})
      assert outputs['main'].shape == (6, 3)


def test_random_streams_may_have_any_name():
  class Noisy(nn.Module):
    @nn.compact
    def __call__(self, x, train=False):
      y = nn.Dense(3, name='out')(x)
      return y + jax.random.normal(self.make_rng('noise'), y.shape) if train else y

  model, x = Noisy(), X[:, 0, 0]
  variables = model.init(KEY, x)
  trunk = dp.trunk(model, variables, x)
  one, two = (
    trunk.apply(trunk.init(KEY, x), x, train=True, rngs={'dropout': jax.random.key(i)})
    for i in (1, 2)
  )
  assert not np.allclose(one['main'], two['main'])
  state = dp.init_state(model, untouched(), TX, variables)
  batch = {'image': x, 'label': DATA['label']}
  dp.make_step(model, untouched(), TASK, TX)(state, batch, KEY)


class Counted(NamedTuple):
  """A transform in the form of haiku, with a mean that counts its updates."""

  init: Callable
  apply: Callable


def counted():
  def apply(params, state, rng, x, is_training=False):
    del rng
    y, state = x @ params['a']['w'], state['mean']
    if is_training:
      count = state['count'] + 1
      mean = state['mean'] + (y.mean(0) - state['mean']) / count
      state = {'count': count, 'mean': mean}
    y = x + jax.nn.relu(y - state['mean'])
    return y @ params['b']['w'], {'mean': state}

  params = {'a': {'w': jnp.ones((2, 2))}, 'b': {'w': jnp.ones((2, 3))}}
  state = {'mean': {'count': jnp.zeros(()), 'mean': jnp.zeros(2)}}
  return Counted(lambda key: (params, state), apply), {'params': params, 'state': state}


def test_statistics_that_only_training_reads_come_and_go_with_the_others():
  (model, variables), x = counted(), X[:, 0, 0]
  trunk = dp.trunk(model, variables, x)
  mine = trunk.init(KEY, x)
  _, new = trunk.apply(mine, x, train=True, mutable=['state'])
  assert new['state']['mean']['count'] == 1
  np.testing.assert_allclose(
    new['state']['mean']['mean'], (x @ jnp.ones((2, 2))).mean(0), rtol=1e-5
  )
  assert jax.tree.structure(trunk.original(mine)) == jax.tree.structure(variables)
  pruned = dp.prune(trunk, mine, {'branches': {'a/branch': False}}, x)
  assert {*pruned.variables} == {'params'} and pruned.model is not None
  with pytest.raises(ValueError, match='params/a/w: missing.*no smaller form'):
    trunk.original(pruned.variables)


def test_mistakes_are_named_where_they_are_made():
  model, variables, _ = linen()
  with pytest.raises(ValueError, match="'params'.*write {'params': params}"):
    dp.trunk(model, variables['params'], X)
  with pytest.raises(TypeError, match='one list'):
    dp.trunk(model, variables, [X])
  for call in (dp.trunk, dp.taps, dp.couple):
    with pytest.raises(TypeError, match='got an array .* no inputs'):
      call(model, X)


def test_a_number_per_example_is_one_output():
  trunk = dp.trunk(lambda w, x: (x @ w)[:, 0], jnp.ones((2, 1)), X[:, 0, 0])
  assert trunk.classes == 1


def test_statistics_that_only_training_reads_are_kept():
  """As haiku has them: a sum and a count beside the average that evaluation reads."""

  class Centred(nn.Module):
    @nn.compact
    def __call__(self, x, train=False):
      zero = lambda: jnp.zeros(())
      total, count, mean = (
        self.variable('batch_stats', name, zero) for name in ('total', 'count', 'mean')
      )
      if train:
        total.value, count.value = total.value + x.mean(), count.value + 1
        mean.value = total.value / count.value
      return x - mean.value

  class Net(nn.Module):
    @nn.compact
    def __call__(self, x, train=False):
      return nn.Dense(3, name='head')(Centred(name='centred')(x, train))

  model, x = Net(), jnp.ones((4, 2))
  variables = model.init(KEY, x)
  net = dp.trunk(model, variables, x)
  full = net.init(KEY, x)
  _, new = net.apply(full, x, train=True, mutable=['batch_stats'])
  _, expected = model.apply(variables, x, train=True, mutable=['batch_stats'])
  assert jax.tree.all(jax.tree.map(jnp.array_equal, new, expected))
  assert paths_of(new)['batch_stats/centred/count'] == 1
