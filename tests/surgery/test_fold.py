"""Soft branch gates become part of the arrays, or it is said why they cannot."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import depthprune as dp
from depthprune.gates import branch
from depthprune.models.mobilenet import MobileNetV2
from depthprune.models.resnet import ResNet
from depthprune.models.vgg import VGG
from depthprune.program.trace import paths_of
from depthprune.surgery.prune import prune
from tests import masking as m
from tests import zoo

X = zoo.image(2)
UNROLLED = ResNet(depth=8, width=4, shortcut='B')
SCANNED = ResNet(depth=20, width=2, scan=True)


def arrays(model, gates: dict):
  """Random arrays; every branch gate is 1 but for those given by path."""
  variables = zoo.randomised(jax.eval_shape(model.init, jax.random.key(0), X))
  ones = jax.tree.map(jnp.ones_like, variables.get('branches', {}))
  leaves = [jnp.asarray(gates.get(p, x), x.dtype) for p, x in paths_of(ones).items()]
  if leaves:
    variables['branches'] = jax.tree.unflatten(jax.tree.structure(ones), leaves)
  return variables


SOFT = {
  'unrolled': (
    UNROLLED,
    {'stage1/block0/branch': 0.7, 'stage3/block0/branch': -0.3},
    {'stage1/block0/norm2', 'stage3/block0/norm2'},
  ),
  'scanned': (
    SCANNED,
    {'stage1/block0/branch': 0.7, 'stage2/blocks/branch': [0.7, 1.4]},
    {'stage1/block0/norm2', 'stage2/blocks/norm2'},
  ),
}


@pytest.mark.parametrize('name', SOFT)
def test_a_soft_gate_is_folded_into_the_last_normalisation(name):
  """The same outputs without gates, and no other array is touched."""
  model, gates, scaled = SOFT[name]
  variables = arrays(model, gates)
  pruned = prune(model, variables, {}, X)
  assert 'branches' not in pruned.variables and pruned.model == model
  x = zoo.image(3)
  run = m.quick(lambda v: model.apply(v, x)['main'])
  expected = run(variables)
  got = m.quick(lambda v: pruned.apply(v, x)['main'])(pruned.variables)
  assert m.difference(expected, got) <= 1e-6
  open_ = {**variables, 'branches': jax.tree.map(jnp.ones_like, variables['branches'])}
  assert m.difference(expected, run(open_)) > 1e-2
  old, new = paths_of(variables), paths_of(pruned.variables)
  changed = {p for p in new if not np.array_equal(old[p], new[p])}
  assert changed == {f'params/{s}/{leaf}' for s in scaled for leaf in ('bias', 'scale')}


def test_gates_of_a_stack_are_cut_with_their_layers():
  """The layer that goes takes its priority along; the other's is folded."""
  path = 'stage2/blocks/branch'
  variables = arrays(SCANNED, {path: [0.4, 0.7]})
  keep = {'branches': {path: np.asarray([False, True])}}
  pruned = prune(SCANNED, variables, keep, X)
  assert pruned.arch == {path: 1}
  assert pruned.report['verify']['difference'] <= 1e-5
  unit = variables['params']['stage2']['blocks']['norm2']
  left = pruned.variables['params']['stage2']['blocks']['norm2']
  for name in ('scale', 'bias'):
    np.testing.assert_allclose(left[name], 0.7 * unit[name][1:], rtol=1e-6)


def test_the_priority_of_a_closed_branch_vanishes():
  """Whatever it was: the small network is that of any other value."""
  path = 'stage3/block0/branch'
  keep = {'branches': {path: np.asarray(False)}}
  results = []
  for priority in (0.3, -4.0):
    pruned = prune(UNROLLED, arrays(UNROLLED, {path: priority}), keep, X)
    assert 'branches' not in pruned.variables and pruned.arch == {path: 0}
    assert pruned.report['branches'][path] is False
    assert pruned.report['verify']['difference'] <= 1e-5
    results.append(pruned.variables)
  jax.tree.map(np.testing.assert_array_equal, *results)
  assert results[0]['params']['stage3']['block0'].keys() == {'shortcut'}


# ---- branches written by others ------------------------------------------------------


class Branch(nn.Module):
  """x + gate · F(x) with `end` as the last thing that F does."""

  end: str

  @nn.compact
  def __call__(self, x):
    x = nn.Dense(6, name='stem')(x.mean((1, 2)))
    y = nn.relu(nn.Dense(5, name='inner')(x))
    if self.end == 'shared':  # the weights are read by the trunk, too
      dense = nn.Dense(6, name='last')
      x, y = dense(x), dense(nn.Dense(6, name='grow')(y))
    elif self.end == 'sum':
      y = nn.Dense(6, name='left')(y) - nn.Dense(6, name='right', use_bias=False)(y)
    elif self.end == 'weights':  # not what the layer gives is scaled, but the layer
      shapes = {'kernel': (5, 6), 'bias': (6,)}
      made = nn.initializers.normal()
      layer = {k: self.param(k, made, shape) for k, shape in shapes.items()}
      gate = branch(self, jnp.ones(()))
      y = y @ (gate * layer['kernel']) + gate * layer['bias']
      return nn.Dense(4, name='head')(x + y)
    elif self.end == 'squared':
      gate = branch(self, jnp.ones(()))
      y = gate * nn.Dense(6, name='last')(y) + nn.Dense(6, name='other')(y)
      return nn.Dense(4, name='head')(x + gate * y)
    elif self.end == 'twice':  # what is gated has another reader
      y = nn.Dense(6, name='last')(y)
      x = x + jnp.tanh(y)
    else:
      y = nn.Dense(6, name='last')(y)
      y = {'tanh': jnp.tanh, 'dense': lambda y: y}[self.end](y)
    return nn.Dense(4, name='head')(x + branch(self, y))


FOLDED = {
  'dense': {'last/kernel', 'last/bias'},
  'sum': {'left/kernel', 'left/bias', 'right/kernel'},
  'weights': {'kernel', 'bias'},
}


@pytest.mark.parametrize('end', FOLDED)
def test_every_summand_carries_the_factor(end):
  model = Branch(end)
  variables = arrays(model, {'branch': 0.7})
  pruned = prune(model, variables, {}, X)
  assert pruned.report['verify']['difference'] <= 1e-6
  x = zoo.image(3)
  got = pruned.apply(pruned.variables, x)
  assert m.difference(model.apply(variables, x), got) <= 1e-6
  old, new = paths_of(variables), paths_of(pruned.variables)
  changed = {p for p in new if not np.array_equal(old[p], new[p])}
  assert changed == {f'params/{p}' for p in FOLDED[end]}


@pytest.mark.parametrize('end', ['tanh', 'shared', 'twice', 'squared'])
def test_a_gate_that_no_array_can_carry_is_named(end):
  model = Branch(end)
  with pytest.raises(
    ValueError, match='branches/branch: its value .* cannot be folded'
  ):
    prune(model, arrays(model, {'branch': 0.7}), {}, X)
  for gate, keep in ((1.0, {}), (0.7, {'branches': {'branch': np.asarray(False)}})):
    pruned = prune(model, arrays(model, {'branch': gate}), keep, X)
    assert pruned.report['verify']['difference'] <= 1e-5


def test_layers_that_share_their_weights_cannot_have_gates_of_their_own():
  """A stack that reads the same kernel in every turn, gated turn by turn."""

  def f(v, x):
    def turn(h, gate):
      return h + gate * (h @ v['params']['shared']), None

    h = x.mean((1, 2)) @ v['params']['in']
    return jax.lax.scan(turn, h, v['branches']['gate'])[0] @ v['params']['out']

  shapes = {'in': (3, 5), 'shared': (5, 5), 'out': (5, 2)}
  params = zoo.Case(f, shapes=shapes).variables()
  variables = {'params': params, 'branches': {'gate': jnp.asarray([0.7, 0.2])}}
  with pytest.raises(ValueError, match=r'branches/gate: its value .* cannot be folded'):
    prune(f, variables, {}, X)


def test_a_gate_whose_parts_scale_different_things_is_named():
  def f(v, x):
    h = x.mean((1, 2)) @ v['params']['in']
    for i in range(2):
      h = h + v['branches']['gate'][i] * (h @ v['params'][f'w{i}'])
    return h @ v['params']['out']

  shapes = {'in': (3, 5), 'w0': (5, 5), 'w1': (5, 5), 'out': (5, 2)}
  params = zoo.Case(f, shapes=shapes).variables()
  variables = {'params': params, 'branches': {'gate': jnp.asarray([0.7, 0.2])}}
  with pytest.raises(ValueError, match=r'branches/gate: its value .* cannot be folded'):
    prune(f, variables, {}, X)


def test_a_layer_stays_for_the_branch_that_stays():
  """Two branches per layer, one of them closed in one layer: it becomes zeros."""

  def f(v, x):
    def turn(h, layer):
      p, gate = layer
      h = h + gate['one'] * (jnp.tanh(h @ p['a']) @ p['b'])
      return h + gate['two'] * (h @ p['c']), None

    h = x.mean((1, 2)) @ v['params']['in']
    h, _ = jax.lax.scan(turn, h, (v['params']['stack'], v['branches']))
    return h @ v['params']['out']

  stack = {'a': (2, 5, 4), 'b': (2, 4, 5), 'c': (2, 5, 5)}
  shapes = {'in': (3, 5), 'stack': stack, 'out': (5, 2)}
  params = zoo.Case(f, shapes=shapes).variables()
  gates = {'one': jnp.asarray([0.7, 0.5]), 'two': jnp.asarray([1.0, 0.2])}
  keep = {'branches': {'one': np.asarray([True, False])}}
  pruned = prune(f, {'params': params, 'branches': gates}, keep, X)
  assert pruned.report['verify']['difference'] <= 1e-5
  masked = {'one': jnp.asarray([0.7, 0.0]), 'two': gates['two']}
  expected = f({'params': params, 'branches': masked}, X)
  assert m.difference(expected, pruned.apply(pruned.variables, X)) <= 1e-5
  assert not np.any(pruned.variables['params']['stack']['b'][1])


# ---- channels ------------------------------------------------------------------------


class Tied(nn.Module):
  """One kernel that is read twice, so that it cannot carry a gate of one reading."""

  @nn.compact
  def __call__(self, x):
    kernel = self.param('kernel', nn.initializers.normal(), (4, 4))
    y = nn.Dense(4, name='first')(x)
    for _ in range(2):
      y = nn.relu(y @ kernel)
    return nn.Dense(2, name='last')(y)


def soft_gates(coupling, seed: int = 0) -> dict[str, np.ndarray]:
  """Every channel half open, more or less."""
  rng = np.random.default_rng(seed)
  sizes = {g: v.size for g, v in coupling.gates()['channels'].items()}
  return {g: rng.uniform(0.3, 1.7, n).astype(np.float32) for g, n in sizes.items()}


@pytest.mark.parametrize(
  'model',
  [
    ResNet(depth=8, width=4),
    ResNet(depth=8, width=4, preact=True, shortcut='B'),
    VGG(blocks=(1, 2), width=4),
    VGG(blocks=(1, 3), width=4, scan=True),
    MobileNetV2(blocks=(1, 2), width=0.5),
  ],
  ids=lambda model: f'{type(model).__name__}{"-scan" * model.scan}',
)
def test_soft_channel_gates_are_folded_into_the_weights_that_read_them(model):
  """The small network is the one that the gates scaled, without any gate in it."""
  variables = arrays(model, {})
  coupling = dp.couple(model, variables, X)
  soft = soft_gates(coupling)
  keep = {'channels': {g: np.arange(v.size) % 3 > 0 for g, v in soft.items()}}
  pruned = prune(model, variables, keep, X, gates={'channels': soft}, coupling=coupling)
  gates = {g: jnp.asarray(v * keep['channels'][g]) for g, v in soft.items()}
  masked = dp.plug(model, coupling)(variables, {'channels': gates}, X)
  small = pruned.apply(pruned.variables, X)
  np.testing.assert_allclose(small['main'], masked['main'], rtol=2e-4, atol=1e-5)
  assert pruned.report['verify']['difference'] < 1e-4


def test_closed_gates_among_soft_ones_count_as_a_change():
  """The full network is the one without gates, so closing a slice shows in `moved`."""
  model = ResNet(depth=8, width=4)
  variables = arrays(model, {})
  coupling = dp.couple(model, variables, X)
  keep = {g: np.arange(x.size) % 3 > 0 for g, x in coupling.groups.items()}
  gates = {g: np.asarray(kept, np.float32) for g, kept in keep.items()}
  pruned = prune(
    model,
    variables,
    {'channels': keep},
    X,
    gates={'channels': gates},
    coupling=coupling,
  )
  assert pruned.report['verify']['moved'] > 1e-3 and not pruned.report['notes']


def test_gates_of_one_change_no_array():
  model = ResNet(depth=8, width=4)
  variables = arrays(model, {})
  coupling = dp.couple(model, variables, X)
  ones = {g: np.ones(v.shape) for g, v in soft_gates(coupling).items()}
  pruned = prune(model, variables, {}, X, gates={'channels': ones})
  jax.tree.map(
    np.testing.assert_array_equal, pruned.variables['params'], variables['params']
  )


def test_a_channel_gate_that_no_weight_can_carry_is_refused():
  x = jnp.ones((2, 3))
  model = Tied()
  variables = model.init(jax.random.key(0), x)
  coupling = dp.couple(model, variables, x)
  soft = {'channels': soft_gates(coupling)}
  assert soft['channels']
  with pytest.raises(ValueError, match='neither 0 nor 1 cannot be folded'):
    prune(model, variables, {}, x, gates=soft)


def test_layers_that_are_cut_out_need_no_factor():
  """Of a stack whose layers lie along axis 1, which could not carry one."""

  class Layer(nn.Module):
    @nn.compact
    def __call__(self, x, _):
      inner = nn.Dense(6, use_bias=False)(x)
      return x + dp.branch(self, nn.Dense(8, use_bias=False)(nn.relu(inner))), None

  class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
      axes, split = {'params': 1, 'branches': 0}, {'params': True}
      layers = nn.scan(Layer, variable_axes=axes, split_rngs=split, length=3)
      return nn.Dense(2)(layers()(nn.Dense(8)(x), None)[0])

  x = jax.random.normal(jax.random.key(0), (4, 5))
  variables = Net().init(jax.random.key(1), x)
  coupling = dp.couple(Net(), variables, x)
  (branch,) = coupling.branches
  keep = {'branches': {branch: np.array([True, False, True])}}
  small = dp.prune(Net(), variables, keep, x, coupling=coupling)
  masked = dp.plug(Net(), coupling)(
    variables, {'branches': {branch: jnp.array([1.0, 0, 1])}}, x
  )
  np.testing.assert_allclose(small.apply(small.variables, x), masked, atol=1e-6)
