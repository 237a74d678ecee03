"""Names of values inside networks, and the residual units that are found in them."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import depthprune as dp
from depthprune.program import jaxpr as jx
from depthprune.program.taps import inside

X = jax.random.normal(jax.random.key(0), (3, 6))


class Unit(nn.Module):
  @nn.compact
  def __call__(self, x, train: bool = False):
    y = nn.Dense(6, name='a')(x)
    y = nn.BatchNorm(use_running_average=not train)(y)
    y = nn.Dropout(0.5, deterministic=not train)(nn.relu(y))
    return nn.relu(x + nn.Dense(6, name='b')(y))


class Linen(nn.Module):
  @nn.compact
  def __call__(self, x, train: bool = False):
    x = nn.Dense(6, name='stem')(x)
    for i in range(2):
      x = Unit(name=f'unit{i}')(x, train)
    return nn.Dense(4, name='head')(x)


class NNXUnit(nnx.Module):
  def __init__(self, rngs):
    self.a, self.b = nnx.Linear(6, 6, rngs=rngs), nnx.Linear(6, 6, rngs=rngs)

  def __call__(self, x):
    return nnx.relu(x + self.b(nnx.relu(self.a(x))))


class NNX(nnx.Module):
  def __init__(self, rngs):
    self.stem = nnx.Linear(6, 6, rngs=rngs)
    self.units = nnx.List([NNXUnit(rngs) for _ in range(2)])
    self.head = nnx.Linear(6, 4, rngs=rngs)

  def __call__(self, x):
    x = self.stem(x)
    for unit in self.units:
      x = unit(x)
    return self.head(x)


def traced(f, params, *inputs):
  """What is inside of a function of ({path: array}, *inputs)."""
  params = {f'params/{name}': x for name, x in sorted(params.items())}
  short = lambda params, *inputs: f(
    {name.removeprefix('params/'): x for name, x in params.items()}, *inputs
  )
  program = jx.trace(short, (params, *inputs)).program
  return inside(program, dict(zip(params, program.inputs)))


def test_taps_of_a_linen_network_are_the_outputs_of_its_modules():
  model = Linen()
  variables = model.init(jax.random.key(0), X)
  taps = {tap.name: tap for tap in dp.taps(model, variables, X)}
  _, state = model.apply(variables, X, capture_intermediates=True)
  captured = dp.trunk(model, variables, X)
  outputs = captured.apply(captured.init(jax.random.key(0), X), X)
  for name in ('stem', 'unit0/a', 'unit0/BatchNorm_0', 'unit0/b', 'unit1', 'head'):
    value = state['intermediates']
    for part in name.split('/'):
      value = value[part]
    np.testing.assert_array_equal(outputs[name], value['__call__'][0])
    assert taps[name].shape == value['__call__'][0].shape


def test_the_cost_of_a_tap_is_that_of_the_network_up_to_it():
  model = Linen()
  taps = {t.name: t for t in dp.taps(model, model.init(jax.random.key(0), X), X)}
  dense = 3 * 2 * 6 * 6  # FLOPs of a layer for three examples, 1 MAC = 2 FLOPs
  assert taps['stem'].flops == dense
  assert taps['unit0'].flops == 3 * dense
  assert taps['unit0'].params == 3 * (36 + 6) + 12  # a normalisation has two vectors
  assert [t.name for t in taps.values() if t.narrow] == ['stem', 'unit0', 'unit1']
  assert '* unit1' in repr(dp.taps(model, model.init(jax.random.key(0), X), X))


def test_modules_without_written_names_are_known_by_the_arrays_they_read():
  net = NNX(nnx.Rngs(0))
  taps = dp.taps(net, nnx.state(net), X)
  names = ['stem', 'units/0/a', 'units/0/b', 'units/0', 'units/1/a', 'units/1/b']
  assert [tap.name for tap in taps] == [*names, 'units/1', 'head']
  assert [tap.name for tap in taps if tap.narrow] == ['stem', 'units/0', 'units/1']
  trunk = dp.trunk(net, nnx.state(net), X)
  outputs = trunk.apply(trunk.init(jax.random.key(0), X), X)
  np.testing.assert_array_equal(outputs['units/0'], net.units[0](net.stem(X)))
  np.testing.assert_array_equal(outputs['units/0/a'], net.units[0].a(net.stem(X)))


def test_training_has_the_names_of_evaluation():
  """Dropout and batch statistics are computed by functions that jax inlines."""
  model = Linen()
  variables = model.init(jax.random.key(0), X)
  trunk = dp.trunk(model, variables, X)
  rngs = {'dropout': jax.random.key(1)}
  variables = trunk.init(jax.random.key(0), X)
  here, there = (
    trunk.apply(variables, X, train=t, rngs=rngs, mutable=['batch_stats'])[0]
    for t in (False, True)
  )
  assert {*there} - {*here} == {f'unit{i}/Dropout_0' for i in range(2)}


def test_a_network_that_calls_a_module_twice_has_numbered_taps():
  class Twice(nn.Module):
    @nn.compact
    def __call__(self, x):
      layer = nn.Dense(6, name='layer')
      return nn.Dense(2, name='head')(layer(nn.relu(layer(x))))

  model = Twice()
  variables = model.init(jax.random.key(0), X)
  names = [tap.name for tap in dp.taps(model, variables, X)]
  assert names == ['layer', 'layer/out', 'layer:1', 'head']


def test_values_beside_a_shortcut_are_not_narrow():
  f = lambda p, x: (x + jnp.tanh(x @ p['a/w']) @ p['b/w']) @ p['c/w']
  found = traced(f, {'a/w': jnp.ones((6, 6)), 'b/w': jnp.ones((6, 6)),
                     'c/w': jnp.ones((6, 2))}, X)  # fmt: skip
  assert found.narrow == ('b/out',)
  assert list(found.units) == ['b']


EYE = jnp.eye(6)


def quantised(x, codes):
  """Straight through: the nearest codes, with the gradient of x."""
  return x + jax.lax.stop_gradient(jax.nn.softmax(x @ codes) @ codes.T - x)


@pytest.mark.parametrize(
  ('f', 'units'),
  [
    (lambda p, x: x + x @ p['a/w'], ['a']),
    (lambda p, x: x @ p['a/w'] + x, ['a']),
    (lambda p, x: x + 0.1 * (x @ p['a/w'] @ p['a/v']), ['a']),
    (lambda p, x: (x + x @ p['a/w']) + jnp.tanh(x) @ p['b/w'], ['a', 'b']),
    (lambda p, x: x + (x @ p['a/w'] + x @ p['b/w']), ['b']),  # one branch, two layers
    (lambda p, x: x @ p['a/w'] + x @ p['b/w'], []),  # no shortcut
    (lambda p, x: (x @ p['a/w']) + 0.04 * (x @ p['a/w']) ** 3, []),  # part of a GELU
    (lambda p, x: jax.nn.gelu(x @ p['a/w'] + p['b/w'][0]) @ p['a/v'], []),
    (lambda p, x: x + jax.nn.gelu(x @ p['a/w']) @ p['b/w'], ['b']),
    (lambda p, x: jax.nn.gelu(x @ p['a/w'] + p['a/v'][0]) @ p['b/w'], []),
    (lambda p, x: x + jax.nn.gelu(x @ p['a/w'] + p['a/v'][0]) @ p['a/v'], ['a']),
    (lambda p, x: x * jax.nn.sigmoid(x @ p['a/w']), []),
    (lambda p, x: quantised(x @ p['a/w'], p['b/w']), []),
    (lambda p, x: x @ p['a/w'] + p['b/w'][0], []),  # a bias
  ],
)
def test_residual_units_are_sums_with_what_a_layer_reads(f, units):
  p = dict.fromkeys(('a/w', 'a/v', 'b/w'), EYE)
  assert list(traced(f, p, X).units) == units


def test_a_shortcut_around_everything_is_no_unit():
  def f(p, x):
    y = x + jnp.tanh(x @ p['a/w'])
    y = y + jnp.tanh(y @ p['b/w'])
    return x + y @ p['c/w']

  p = dict.fromkeys(('a/w', 'b/w', 'c/w'), EYE)
  assert list(traced(f, p, X).units) == ['a', 'b']


def test_a_bias_of_attention_that_layers_share_is_no_shortcut():
  """As in T5: the bias of the first attention is added in the second one, too."""

  def f(p, x):
    bias = x[0, 0] * p['bias/w']
    for name in 'ab':
      scores = (x @ p[f'{name}/q']) @ x.T
      x = x + jax.nn.softmax(scores + bias) @ (x @ p[f'{name}/v'])
    return x @ p['out/w']

  n = len(X)
  p = dict.fromkeys(('a/q', 'a/v', 'b/q', 'b/v', 'out/w'), EYE)
  found = traced(f, p | {'bias/w': jnp.ones((n, n))}, X)
  assert list(found.units) == ['a', 'b']


def test_units_of_a_module_that_is_called_twice_are_numbered():
  def f(p, x):
    for _ in range(2):
      x = x + jax.nn.relu(x @ p['block/attn/w'])
      x = x + jax.nn.relu(x @ p['block/in/w']) @ p['block/out/w']
    return x @ p['head/w']

  p = dict.fromkeys(('block/attn/w', 'block/in/w', 'block/out/w', 'head/w'), EYE)
  units = ['block/attn', 'block', 'block/attn:1', 'block:1']
  assert list(traced(f, p, X).units) == units


def test_units_are_called_by_their_own_layers_alone():
  """And not by the layer that makes the value at which they begin."""
  f = lambda p, x: (lambda y: y + jnp.tanh(y @ p['net/a/w']))(x @ p['net/stem/w'])
  assert list(traced(f, {'net/stem/w': EYE, 'net/a/w': EYE}, X).units) == ['net/a']


def test_only_modules_are_in_names():
  """Not einsum, which writes its own scope, nor transformations around a module."""

  class Block(nn.Module):
    @nn.compact
    def __call__(self, x):
      y = jnp.einsum('...i,ij->...j', nn.Dense(6, name='in')(x), EYE)
      return x + nn.Dense(6, name='out')(nn.relu(y))

  class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
      axes = {'variable_axes': {'params': None}, 'split_rngs': {'params': False}}
      x = nn.vmap(Block, **axes)(name='block')(nn.Dense(6, name='stem')(x))
      return nn.Dense(2, name='head')(jnp.einsum('bi,ij->bj', x, EYE))

  model = Net()
  variables = model.init(jax.random.key(0), X)
  names = [tap.name for tap in dp.taps(model, variables, X)]
  after_einsum = ['block/in/out', 'block/out/out']
  assert [name for name in names if name not in after_einsum] == [
    'stem', 'block/in', 'block/out', 'block', 'head'
  ]  # fmt: skip


def test_haiku_names_its_modules_without_the_marks_of_their_constructor():
  def f(p, x):
    for place in ('a', 'b'):
      with jax.named_scope(f'net/{place}'):  # as haiku writes them
        x = x @ p[f'net/~/{place}/w']
        x = x - p[f'net/~/{place}/~/mean/average'][0]
      with jax.named_scope('net'):
        x = jnp.tanh(x)
    return x

  p = dict.fromkeys(('net/~/a/w', 'net/~/b/w'), EYE)
  p |= dict.fromkeys(('net/~/a/~/mean/average', 'net/~/b/~/mean/average'), EYE)
  assert [*traced(f, p, X).values] == ['net/a', 'net/a/out', 'net/b', 'net']


def test_a_value_is_called_by_what_it_comes_from():
  """A sum before a normalisation is not called by the normalisation."""

  def f(p, x):
    y = x @ p['embed/w'] + 1
    z = y / jnp.sqrt((y**2).mean(-1, keepdims=True)) * p['norm/w'][0]
    return y + z @ p['a/w']

  found = traced(f, dict.fromkeys(('embed/w', 'norm/w', 'a/w'), EYE), X)
  assert found.narrow == ('embed/out',)


def test_arrays_with_dots_in_their_names_are_told_apart():
  f = lambda p, x: jnp.tanh(x @ p['net.a']) @ p['net.b']
  assert [*traced(f, dict.fromkeys(('net.a', 'net.b'), EYE), X).values] == [
    'net.a', 'net.a/out', 'net.b'
  ]  # fmt: skip


def test_a_value_of_several_modules_has_a_name():
  f = lambda p, x: jnp.tanh(x @ (p['a/w'] @ p['b/w'])) @ p['c/w']
  assert traced(f, dict.fromkeys(('a/w', 'b/w', 'c/w'), EYE), X).narrow == ('out',)


def test_a_tap_is_the_sequence_and_not_the_token_that_is_selected():
  tokens = jnp.ones((2, 5, 6))
  for select in (lambda y: y[:, :1], lambda y: y[:, jnp.arange(1)]):
    f = lambda p, x: (select(x @ p['a/w'])[:, 0]) @ p['head/w']  # noqa: B023
    found = traced(f, dict.fromkeys(('a/w', 'head/w'), EYE), tokens)
    assert [found.values[name].shape for name in found.narrow] == [(2, 5, 6)]


def test_channels_are_where_the_convolution_has_them():
  def conv(x, w):
    return jax.lax.conv_general_dilated(x, w, (1, 1), 'SAME')  # channels first

  f = lambda p, x: conv(conv(x, p['a/w']), p['b/w']).mean((2, 3))
  p = {'a/w': jnp.ones((4, 3, 3, 3)), 'b/w': jnp.ones((2, 4, 3, 3))}
  found = traced(f, p, jnp.ones((2, 3, 8, 8)))
  assert found.channels == {4: 1}
  trunk = dp.trunk(f, p, jnp.ones((2, 3, 8, 8)))
  outputs = trunk.apply(trunk.init(jax.random.key(0), jnp.ones((2, 3, 8, 8))),
                        jnp.ones((2, 3, 8, 8)))  # fmt: skip
  assert outputs['a'].shape == (2, 8, 8, 4)


def test_units_side_by_side_have_the_common_paths_of_their_layers():
  def f(p, x):
    return x + x @ p['a/attention/w'] + jax.nn.gelu(x @ p['a/in/w']) @ p['a/out/w']

  p = {f'a/{name}/w': EYE for name in ('attention', 'in', 'out')}
  assert list(traced(f, p, X).units) == ['a/attention', 'a']


def test_networks_in_half_precision_have_taps_and_units():
  half = lambda x: x.astype(jnp.bfloat16)
  f = lambda p, x: (half(x) + half(x) @ half(p['a/w'])) @ half(p['b/w'])
  found = traced(f, {'a/w': EYE, 'b/w': EYE}, X)
  assert [*found.units] == ['a'] and [*found.values] == ['a', 'a/out', 'b']


def test_what_follows_a_recurrent_layer_is_narrow():
  class Recurrent(nn.Module):
    @nn.compact
    def __call__(self, x):
      for i in range(2):
        x = x + nn.RNN(nn.GRUCell(6, name=f'gru{i}'))(x)
      return nn.Dense(2, name='head')(x[:, -1])

  model, x = Recurrent(), jnp.ones((3, 4, 6))
  taps = dp.taps(model, model.init(jax.random.key(0), x), x)
  assert [tap.shape for tap in taps if tap.narrow] == [(3, 4, 6), (3, 6)]


def test_names_have_no_empty_parts():
  class Attention(nn.Module):
    @nn.compact
    def __call__(self, x):
      x = x + nn.MultiHeadDotProductAttention(2, name='attention')(
        x, mask=x[:, None, :, :1] > 0
      )
      return nn.Dense(2, name='head')(x[:, 0])

  model, x = Attention(), jnp.ones((3, 4, 6))
  taps = dp.taps(model, model.init(jax.random.key(0), x), x)
  assert all(all(tap.name.split(':')[0].split('/')) for tap in taps)


def test_a_method_that_calls_another_is_no_place_of_its_own():
  class Setup(nn.Module):
    def setup(self):
      self.layers = [nn.Dense(6) for _ in range(2)]
      self.head = nn.Dense(2)

    def encode(self, x):
      for layer in self.layers:
        x = x + nn.gelu(layer(x))
      return x

    def __call__(self, x, train):
      return self.head(self.encode(x))

  model = Setup()
  variables = model.init(jax.random.key(0), X, False)
  names = {tap.name for tap in dp.taps(model, variables, X)}  # train=False by itself
  assert {'layers_0', 'layers_1', 'head'} <= names
  assert not any('Setup/' in name for name in names)
  encoder = dp.trunk(model, variables, X, method='encode')
  outputs = encoder.apply(encoder.init(jax.random.key(0), X), X)
  want = model.apply(variables, X, method='encode')
  np.testing.assert_array_equal(outputs['main'], want)


def test_a_sum_before_a_normalisation_is_named_by_the_layer_before_it():
  def f(p, x):
    x = x @ p['stem/w']
    x = x + x @ p['a/w']
    y = p['norm/scale'] * (x - x.mean(-1, keepdims=True))
    return (x + y @ p['b/w']) @ p['head/w']

  p = dict.fromkeys(('stem/w', 'a/w', 'b/w', 'head/w'), EYE)
  found = traced(f, p | {'norm/scale': jnp.ones(6)}, X)
  assert found.narrow == ('stem', 'a/out', 'b/out')
