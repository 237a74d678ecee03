"""Layers of scans in networks of any kind: their gates, their cut, their influence."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import depthprune as dp
from depthprune.models.heads import every_tap
from depthprune.program.trace import paths_of
from depthprune.program.units import units

KEY = jax.random.key(0)
LAYERS, WIDTH = 4, 4
X = jax.random.normal(KEY, (6, 3, WIDTH))
DATA = {'image': X, 'label': jnp.arange(6, dtype=jnp.int32) % 3}
TX = optax.sgd(1e-2)


def drawn(*shape, seed):
  return 0.5 * jax.random.normal(jax.random.key(seed), shape)


def attention(x, p):
  """What it adds to tokens x [batch, tokens, width]."""
  q, k, v = (x @ p[name] for name in 'qkv')
  return jax.nn.softmax(q @ k.mT) @ v @ p['o']


def function(variables, x, remat=False):
  """Stacked arrays, two units in the body, and a carry beside the stream."""

  def body(carry, p):
    x, total = carry
    x = x + attention(x, p['mix'])
    x = x + jax.nn.relu(x @ p['up']) @ p['down']
    return (x, total + jnp.square(x).mean()), x.mean()

  body = jax.checkpoint(body) if remat else body
  stack = {'mix': variables['mix'], 'up': variables['up'], 'down': variables['down']}
  (x, total), means = jax.lax.scan(body, (x, jnp.zeros(())), stack)
  return {'main': x.mean(1) @ variables['out'], 'total': total, 'means': means}


def plain(remat=False):
  square = (LAYERS, WIDTH, WIDTH)
  variables = {
    'mix': {name: drawn(*square, seed=i) for i, name in enumerate('qkvo')},
    'up': drawn(LAYERS, WIDTH, 6, seed=4),
    'down': drawn(LAYERS, 6, WIDTH, seed=5),
    'out': drawn(WIDTH, 3, seed=6),
  }
  call = lambda v, x: function(v, x, remat)['main']
  return call, variables, lambda v: call(v, X)


class Layer(nn.Module):
  """A unit of a scan of linen, with dropout and without a gate."""

  @nn.compact
  def __call__(self, x, deterministic):
    y = nn.relu(nn.Dense(6, name='up')(nn.LayerNorm(name='norm')(x)))
    y = nn.Dense(WIDTH, name='down')(y)
    return x + nn.Dropout(0.3, deterministic=deterministic)(y), None


class Linen(nn.Module):
  remat: bool = False

  @nn.compact
  def __call__(self, x, deterministic=True):
    layer = nn.remat(Layer, static_argnums=(2,)) if self.remat else Layer
    stack = nn.scan(
      layer, {'params': 0}, split_rngs={'params': True, 'dropout': True},
      in_axes=nn.broadcast, length=LAYERS,  # pyright: ignore[reportArgumentType]
    )(name='layers')  # fmt: skip
    x, _ = stack(nn.Dense(WIDTH, name='embed')(x), deterministic)
    return nn.Dense(3, name='head')(x.mean(1))


def linen(remat=False):
  model = Linen(remat)
  variables = model.init(KEY, X)
  return model, variables, lambda v: model.apply(v, X)


class NNXLayer(nnx.Module):
  def __init__(self, rngs):
    self.up = nnx.Linear(WIDTH, 6, rngs=rngs)
    self.down = nnx.Linear(6, WIDTH, rngs=rngs)

  def __call__(self, x):
    return x + self.down(nnx.relu(self.up(x)))


class NNX(nnx.Module):
  def __init__(self, rngs):
    make = nnx.split_rngs(splits=LAYERS)(nnx.vmap(NNXLayer, in_axes=0, out_axes=0))
    self.layers = make(rngs)
    self.head = nnx.Linear(WIDTH, 3, rngs=rngs)

  def __call__(self, x):
    run = nnx.scan(
      lambda x, layer: layer(x), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry
    )
    return self.head(run(x, self.layers).mean(1))


def nnx_module():
  net = NNX(nnx.Rngs(0))
  return net, nnx.state(net), lambda v: nnx.merge(nnx.graphdef(net), v)(X)


KINDS = {
  'function': plain,
  'checkpoint': functools.partial(plain, remat=True),
  'linen': linen,
  'linen, remat': functools.partial(linen, remat=True),
  'nnx': nnx_module,
}
UNITS = dict.fromkeys(KINDS, ('layers',))
UNITS |= dict.fromkeys(('function', 'checkpoint'), ('mix', 'down'))


@pytest.fixture(params=KINDS)
def kind(request):
  model, variables, call = KINDS[request.param]()
  return dp.trunk(model, variables, X), call, variables, UNITS[request.param]


def gates_of(trunk, **closed):
  """Gates with these layers closed, as booleans by path."""
  keep = {f'{unit}/branch': np.ones(LAYERS, bool) for unit in trunk.units}
  for unit, layers in closed.items():
    keep[f'{unit}/branch'][layers] = False
  return keep


def closed_in(trunk, layers):
  """Gates with these layers of all units closed."""
  return gates_of(trunk, **dict.fromkeys(trunk.units, layers))


def masked(variables, keep):
  gates = {path.removesuffix('/branch'): kept for path, kept in keep.items()}
  gates = {u: {'branch': jnp.asarray(k, jnp.float32)} for u, k in gates.items()}
  return {**variables, 'branches': gates}


def test_units_of_the_body_have_a_gate_for_every_layer(kind):
  trunk, call, variables, names = kind
  mine = trunk.init(KEY, X)
  assert trunk.units == names
  assert trunk.widths == {f'{name}/branch': LAYERS for name in names}
  np.testing.assert_array_equal(trunk.apply(mine, X)['main'], call(variables))
  found = units(dp.couple(trunk, mine, X))
  assert [unit.layer for unit in found] == [*range(LAYERS)]
  assert not any(unit.why_not for unit in found)
  assert [unit.name for unit in found] == [f'{"+".join(names)}[{i}]' for i in range(4)]


def test_closed_layers_are_removed(kind):
  """Also those that are not the last ones; the arrays and the loop become shorter."""
  trunk, *_, names = kind
  mine = trunk.init(KEY, X)
  keep = closed_in(trunk, [0, 2])
  pruned = dp.prune(trunk, mine, {'branches': keep}, X)
  want = trunk.apply(masked(mine, keep), X)['main']
  for run in (pruned.apply, pruned.model.apply):
    np.testing.assert_allclose(run(pruned.variables, X)['main'], want, rtol=1e-5)
  full, small = (paths_of(v['params']) for v in (mine, pruned.variables))
  stacked = {p for p, x in full.items() if x.shape[0] == LAYERS and x.ndim > 1}
  stacked -= {'embed/kernel', 'head/kernel', 'out', 'head/kernel/value'}
  assert stacked
  for path in stacked:
    np.testing.assert_array_equal(small[path], full[path][np.array([1, 3])])
  assert pruned.arch == {f'{name}/branch': 2 for name in names}
  again = pruned.model.init(KEY, X)
  assert jax.tree.map(jnp.shape, again['params']) == jax.tree.map(
    jnp.shape, pruned.variables['params']
  )


def test_a_layer_stays_where_one_of_its_branches_does():
  model, variables, _ = plain()
  trunk = dp.trunk(model, variables, X)
  mine = trunk.init(KEY, X)
  keep = gates_of(trunk, mix=[1, 3], down=[2, 3])
  pruned = dp.prune(trunk, mine, {'branches': keep}, X)
  want = trunk.apply(masked(mine, keep), X)['main']
  got = pruned.model.apply(pruned.variables, X)['main']
  np.testing.assert_allclose(got, want, rtol=1e-5)
  assert pruned.arch == {'mix/branch': 3, 'down/branch': 3}
  # One of two branches gone in all layers: its arrays are, the layers are not.
  keep = gates_of(trunk, mix=[0, 1, 2, 3])
  pruned = dp.prune(trunk, mine, {'branches': keep}, X)
  want = trunk.apply(masked(mine, keep), X)['main']
  got = pruned.model.apply(pruned.variables, X)['main']
  np.testing.assert_allclose(got, want, rtol=1e-5)
  assert {*pruned.variables['params']} == {'up', 'down', 'out'}
  assert pruned.arch == {'mix/branch': 0}


def test_every_layer_may_go(kind):
  trunk, *_ = kind
  mine = trunk.init(KEY, X)
  keep = closed_in(trunk, [0, 1, 2, 3])
  pruned = dp.prune(trunk, mine, {'branches': keep}, X)
  want = trunk.apply(masked(mine, keep), X)['main']
  got = pruned.model.apply(pruned.variables, X)['main']
  np.testing.assert_allclose(got, want, rtol=1e-5)


def test_gates_that_are_neither_0_nor_1_are_folded_layer_by_layer(kind):
  trunk, *_, names = kind
  mine = trunk.init(KEY, X)
  gates = {
    name: {'branch': jnp.array([0.5, 2.0, -1.0, 3.0]) + i}
    for i, name in enumerate(names)
  }
  soft = {**mine, 'branches': gates}
  keep = closed_in(trunk, [1])
  closed = {u: {'branch': g['branch'].at[1].set(0)} for u, g in gates.items()}
  want = trunk.apply({**mine, 'branches': closed}, X)['main']
  pruned = dp.prune(trunk, soft, {'branches': keep}, X)
  got = pruned.model.apply(pruned.variables, X)['main']
  np.testing.assert_allclose(got, want, rtol=1e-4)


def test_rounds_of_implosion_shorten_the_loop():
  """Of a network with dropout, one layer in every round."""
  model, variables, _ = linen()
  trunk = dp.trunk(model, variables, X)
  stages = []

  def train(step, state, stage):
    stages.append(stage)
    return dp.fit(step, state, KEY, lambda d, i: d, DATA, steps=1, show=False)

  small = dp.shrink(
    trunk, trunk.init(KEY, X), X, task=dp.classification(3), tx=TX, train=train,
    held_out=[DATA], build=lambda coupling: dp.implosion(coupling, depth=2),
  )  # fmt: skip
  assert stages == ['round1', 'round2', 'finetune']
  assert small.arch == {'layers/branch': 2}
  assert small.variables['params']['layers']['up']['kernel'].shape[0] == 2


def test_a_cut_network_is_saved_and_loaded(tmp_path):
  model, variables, _ = linen()
  trunk = dp.trunk(model, variables, X)
  keep = gates_of(trunk, layers=[1])
  pruned = dp.prune(trunk, trunk.init(KEY, X), {'branches': keep}, X)
  dp.save(tmp_path / 'short', pruned)
  again = dp.load(tmp_path / 'short', trunk)
  np.testing.assert_array_equal(
    again.apply(again.variables, X)['main'], pruned.apply(pruned.variables, X)['main']
  )


def test_influence_of_the_layers_of_a_foreign_scan():
  model, variables, _ = plain()
  trunk = dp.trunk(model, variables, X)
  mine = trunk.init(KEY, X)
  mine['branches']['down']['branch'] = jnp.array([1.0, 1, 0, 1])
  influence = dp.block_influence(dp.couple(trunk, mine, X), mine, [X])
  assert influence.pop('down[2]') == pytest.approx(0, abs=1e-6)
  assert len(influence) == 7 and min(influence.values()) > 1e-3


def test_what_layers_emit_besides_the_logits_is_no_obstacle():
  _, variables, _ = plain()
  trunk = dp.trunk(function, variables, X)
  mine = trunk.init(KEY, X)
  keep = gates_of(trunk, mix=[1], down=[1])
  pruned = dp.prune(trunk, mine, {'branches': keep}, X)
  want = trunk.apply(masked(mine, keep), X)
  got = pruned.model.apply(pruned.variables, X)
  np.testing.assert_allclose(got['main'], want['main'], rtol=1e-5)
  np.testing.assert_allclose(
    got['means'], want['means'][np.array([0, 2, 3])], rtol=1e-4
  )


def test_layers_that_are_returned_one_by_one_can_be_closed_but_not_removed():
  _, variables, _ = plain()
  trunk = dp.trunk(function, variables, X, output=lambda out: out['means'])
  mine = trunk.init(KEY, X)
  coupling = dp.couple(trunk, mine, X)
  assert not any(group.kind == 'layer' for group in coupling.groups.values())
  assert 'ends in an output: params/up axis 0 (4)' in coupling.explain()
  keep = gates_of(trunk, mix=[1], down=[1])
  pruned = dp.prune(trunk, mine, {'branches': keep}, X)
  want = trunk.apply(masked(mine, keep), X)['main']
  np.testing.assert_allclose(pruned.apply(pruned.variables, X)['main'], want, rtol=1e-5)
  assert pruned.variables['params']['up'].shape[0] == LAYERS


def test_layers_that_the_logits_count_are_not_removed():
  """The mean over layers: a closed layer still counts, one that is gone does not."""
  _, variables, _ = plain()
  main = lambda out: out['main'] * out['means'].mean()
  trunk = dp.trunk(function, variables, X, output=main)
  keep = gates_of(trunk, mix=[1], down=[1])
  with pytest.raises(dp.InexactCut, match='differ by'):
    dp.prune(trunk, trunk.init(KEY, X), {'branches': keep}, X)


def subtracted(x, v):
  body = lambda x, p: (x + jax.nn.relu(x @ p[0]) - jax.nn.relu(x @ p[1]), None)
  return jax.lax.scan(body, x, (v['up'], v['down']))[0]


def biased(x, v):
  body = lambda x, p: (x + jax.nn.relu(x @ p[0]) + p[1], None)
  return jax.lax.scan(body, x, (v['up'], v['bias']))[0]


def read_elsewhere(x, v):
  body = lambda x, w: (x + jax.nn.relu(x @ w), None)
  return jax.lax.scan(body, x, v['up'])[0] + x @ v['up'].sum(0)


@pytest.mark.parametrize('net', [subtracted, biased, read_elsewhere])
def test_arrays_of_a_closed_layer_that_others_read_are_not_zero(net):
  """Zeros would add nothing there, as a layer that is gone; closed gates are others."""
  square = (LAYERS, WIDTH, WIDTH)
  variables = {
    'up': drawn(*square, seed=1), 'down': drawn(*square, seed=2),
    'bias': drawn(LAYERS, WIDTH, seed=3),
  }  # fmt: skip
  trunk = dp.trunk(lambda v, x: net(x, v), variables, X)
  with pytest.raises(dp.InexactCut, match=': off by .*: a layer of a scan'):
    keep = closed_in(trunk, [1])
    dp.prune(trunk, trunk.init(KEY, X), {'branches': keep}, X)


def test_what_is_no_stack_of_layers_has_no_gates():
  """Steps of time, with arrays that all of them share."""
  shared = {'w': drawn(WIDTH, WIDTH, seed=1), 'out': drawn(WIDTH, 3, seed=2)}

  def steps(variables, x):
    body = lambda h, now: (h + jnp.tanh((h + now) @ variables['w']), None)
    h, _ = jax.lax.scan(body, jnp.zeros((6, WIDTH)), x.transpose(1, 0, 2))
    return h @ variables['out']

  assert dp.trunk(steps, shared, X).units == ()


def test_arch_of_a_trunk_is_checked():
  model, variables, _ = plain()
  trunk = dp.trunk(model, variables, X)
  short = trunk.clone(arch={'mix/branch': 2, 'down/branch': 2})
  mine = short.init(KEY, X)
  assert mine['params']['up'].shape[0] == mine['branches']['mix']['branch'].size == 2
  first = jax.tree.map(
    lambda x: x[:2] if x.shape[0] == LAYERS and x.ndim == 3 else x, variables
  )
  np.testing.assert_allclose(short.apply(mine, X)['main'], model(first, X), rtol=1e-5)
  uneven = trunk.clone(arch={'mix/branch': 2, 'down/branch': 3})
  with pytest.raises(ValueError, match='leaves 2 and 3 layers of one scan'):
    uneven.init(KEY, X)


def test_heads_stand_before_and_after_a_scan():
  model, variables, _ = linen()
  network = every_tap(dp.trunk(model, variables, X))
  mine = network.init(KEY, X)
  assert network.exits == ('exit1', 'exit2')
  assert network.apply(mine, X).keys() >= {'exit1', 'exit2'}
