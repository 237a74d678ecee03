"""The auxiliary path: attaches to any trunk, leaves without a trace."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import depthprune as dp
from depthprune import models
from depthprune.models.auxiliary_path import Adaptor, Auxiliary, AuxiliaryPath, beside
from depthprune.models.convnet import ConvNet
from depthprune.models.heads import WithHeads
from depthprune.models.mobilenet import MobileNetV2
from depthprune.models.segnet import SegNet
from depthprune.models.vgg import VGG
from tests import zoo
from tests.test_conformance import canonical

X = jax.random.normal(jax.random.key(0), (2, 8, 8, 3))
TRUNKS = {
  'mlp': (models.build('mlp', hidden=(6, 5, 4)), X),
  'resnet': (models.build('resnet8', width=4), X),
  'preact': (models.build('resnet8', width=4, preact=True, shortcut='B'), X),
  'vit': (models.build('vit_tiny', depth=2, width=8, heads=2, patch=4), X),
  'convnet': (ConvNet(layers=3, width=6, size=3), X),
  'vgg': (VGG(blocks=(1, 3, 2), width=4), X),
  'mobilenet': (MobileNetV2(blocks=(1, 3), width=0.5), X),
  'segnet': (SegNet(blocks=(1, 2), width=4), X),
  'bert': (
    models.build('bert_tiny', vocab=50, positions=8, width=8, inner=8),
    jnp.arange(8).reshape(2, 4),
  ),
}


def made(trunk, x, search=True, **fields):
  """(trunk with a path, its variables: random, all gates open)."""
  path = beside(trunk.taps, search, width=6, pool=trunk.pool, **fields)
  model = WithHeads(trunk, {'aux': path})
  variables = zoo.randomised(jax.eval_shape(model.init, jax.random.key(1), x))
  gates = jax.tree.map(jnp.ones_like, variables.pop('branches', {}))
  return model, variables | ({'branches': gates} if gates else {})


def test_taps_feed_the_stage_that_they_are_in():
  taps = ('stage1/block0', 'stage1/block1', 'stage2/block0')
  assert beside(taps).stages == (taps[:2], taps[2:])
  assert beside(taps, search=True).stages == (taps[:2], taps)
  assert not beside(taps).gated and beside(taps, search=True).gated
  chain = tuple(f'layer{i}' for i in range(5))
  assert beside(chain).stages == (chain[:2], chain[2:4], chain[4:])
  assert beside(('layer0',)).stages == (('layer0',),)
  with pytest.raises(ValueError, match='no taps'):
    beside(())


def test_a_path_is_what_its_equation_says():
  """relu(D(h) + sum g phi(out)), by hand on vectors of two numbers."""
  path = Auxiliary((('a',), ('b',)), classes=2, width=2, gated=True)
  run = AuxiliaryPath(path, path.widths, jnp.float32)
  a, b = jnp.array([[1.0, -2.0]]), jnp.array([[3.0]])
  v = run.init(jax.random.key(0), {'a': a, 'b': b})
  scale = 1 / np.sqrt(1 + 1e-5)  # what a normalisation does at first
  p = jax.tree.map(np.asarray, v['params'])
  dense = lambda s, t: p[f'stage{s}'][t]['dense']['kernel'] * scale
  for g in (1.0, 0.0):
    gates = jax.tree.map(jnp.ones_like, v['branches'])
    gates['stage1']['b']['branch'] = jnp.float32(g)
    h0 = np.maximum(a @ dense(0, 'a'), 0)
    h1 = np.maximum(h0 @ dense(1, 'before') + g * (b @ dense(1, 'b')), 0)
    said = run.apply({**v, 'branches': gates}, {'a': a, 'b': b})
    expected = h1 @ p['head']['kernel'] + p['head']['bias']
    np.testing.assert_allclose(said, expected, rtol=1e-5)


@pytest.mark.parametrize('name', TRUNKS)
@pytest.mark.parametrize('search', [True, False])
def test_stripped_is_the_compact_network_itself(name, search):
  trunk, x = TRUNKS[name]
  model, variables = made(trunk, x, search)
  keep = {'exits': {'main': True, 'aux': False}}
  pruned = dp.prune(model, variables, keep, x)
  alone = {k: v['trunk'] for k, v in variables.items() if 'trunk' in v}
  left = {k: v['trunk'] for k, v in pruned.variables.items()}
  assert all([*v] == ['trunk'] for v in pruned.variables.values())
  # Open gates of residual units are folded into the arrays and change nothing there.
  alone.pop('branches', None)
  assert jax.tree.all(jax.tree.map(np.array_equal, left, alone))
  main = lambda v, x: pruned.apply({k: {'trunk': t} for k, t in v.items()}, x)['main']
  plain = lambda v, x: trunk.apply(v, x)['main']
  assert canonical(main, left, x) == canonical(plain, alone, x)
  whole = model.apply(variables, x)['main']
  np.testing.assert_allclose(main(left, x), whole, atol=1e-6)


def test_features_of_any_size_are_brought_to_that_of_the_stage():
  path = Auxiliary((('a', 'b', 'c'),), classes=3, width=4, pool=None)
  run = AuxiliaryPath(path, path.widths, jnp.float32)
  sizes = {'a': (15, 9), 'b': (4, 4), 'c': (7, 5)}
  features = {n: jnp.ones((2, *size, 3)) for n, size in sizes.items()}
  said, v = run.init_with_output(jax.random.key(0), features, size=(30, 20))
  assert said.shape == (2, 30, 20, 3)
  assert v['params']['stage0']['a']['dense']['kernel'].shape == (3, 4)


@pytest.mark.parametrize('own', [(), (12, 8)], ids=['class', 'pixels'])
def test_an_answer_of_every_pixel_is_as_large_as_the_networks_own(own):
  """Or as the image, wherever among the inputs that is."""

  class Net(nn.Module):
    @nn.compact
    def __call__(self, inputs):
      x = nn.Conv(4, (3, 3), (2, 2), name='stem')(inputs['pixels'])
      x = x + nn.Dense(4, name='shift')(inputs['angle'])[:, None, None]
      x = nn.relu(nn.Conv(3, (3, 3), name='last')(x))
      return jax.image.resize(x, (2, *own, 3), 'linear') if own else x.mean((1, 2))

  inputs = {'angle': jnp.ones((2, 1)), 'pixels': jnp.ones((2, 6, 4, 3))}
  net, key = Net(), jax.random.key(0)
  trunk = dp.trunk(net, net.init(key, inputs), inputs)
  model = WithHeads(trunk, {'aux': beside(['stem', 'last'], classes=3, pool=None)})
  outputs = model.apply(model.init(key, inputs), inputs)
  assert outputs['aux'].shape == (2, *(own or (6, 4)), 3)


@pytest.mark.parametrize('dtype', [jnp.float32, jnp.bfloat16])
def test_it_is_normalised_as_a_dense_layer_and_batch_normalisation(dtype):
  """Values, statistics and derivatives, though nothing wide is ever normalised."""

  class Plain(nn.Module):
    @nn.compact
    def __call__(self, x, train):
      y = nn.Dense(6, use_bias=False, name='dense')(x.astype(jnp.float32))
      norm = nn.BatchNorm(not train, momentum=0.9, epsilon=1e-5, name='norm')
      return norm(y)

  ours, plain = Adaptor(6, False, dtype), Plain()
  draw = lambda i, *shape: jax.random.normal(jax.random.key(i), shape)
  x = (3 + 2 * draw(0, 4, 5, 5, 3)).astype(dtype)  # a mean that must not cost digits
  scale, bias = 1 + 0.1 * draw(1, 6), draw(2, 6)
  kernel, stats = draw(3, 3, 6), {'mean': draw(4, 6), 'var': 1 + draw(5, 6) ** 2}
  v = {
    'params': {'dense': {'kernel': kernel, 'scale': scale, 'bias': bias}},
    'batch_stats': {'dense': stats},
  }
  w = {
    'params': {'dense': {'kernel': kernel}, 'norm': {'scale': scale, 'bias': bias}},
    'batch_stats': {'norm': stats},
  }
  near = (2e-4, 2e-4) if dtype == jnp.float32 else (0.02, 0.1)  # relative, absolute
  close = lambda a, b: np.testing.assert_allclose(a.astype(jnp.float32), b, *near)
  size = x.shape[1:-1]
  close(ours.apply(v, x, size, False), plain.apply(w, x, False))

  def loss(model, variables, x, *args):
    y, new = model.apply(variables, x, *args, mutable=['batch_stats'])
    return (jnp.sin(y.astype(jnp.float32)) ** 2).sum(), (y, new['batch_stats'])

  slope = jax.value_and_grad(loss, argnums=(1, 2), has_aux=True)
  (_, (a, mine)), (by_v, by_x) = slope(ours, v, x, size, True)
  (_, (b, theirs)), (by_w, there) = slope(plain, w, x, True)
  close(a, b)
  for name in ('mean', 'var'):
    np.testing.assert_allclose(mine['dense'][name], theirs['norm'][name], rtol=1e-4)
  if dtype == jnp.float32:
    close(by_x, there)
    close(by_v['params']['dense']['kernel'], by_w['params']['dense']['kernel'])
    close(by_v['params']['dense']['scale'], by_w['params']['norm']['scale'])


def test_a_stage_is_no_larger_than_what_is_read_of_it():
  """Where the next stage has half the side, every second pixel is all that counts."""
  path = Auxiliary((('a',), ('b',)), classes=3, width=4)
  run = AuxiliaryPath(path, path.widths, jnp.float32)
  draw = lambda i, side: jax.random.normal(jax.random.key(i), (2, side, side, 3))
  features = {'a': draw(0, 8), 'b': draw(1, 4)}
  v = run.init(jax.random.key(2), features)
  slope = jax.grad(lambda f: run.apply(v, f).sum())(features)['a']
  read = np.abs(slope).sum((0, 3)) > 0
  assert read[::2, ::2].all() and read.sum() == 16
  larger = {'a': draw(0, 4), 'b': draw(1, 8)}  # of a decoder: nothing is left out
  slope = jax.grad(lambda f: run.apply(v, f).sum())(larger)['a']
  assert (np.abs(slope).sum((0, 3)) > 0).all()


def test_closed_connections_can_be_cut_while_the_path_stays():
  trunk, x = TRUNKS['resnet']
  model, variables = made(trunk, x)
  gates = [p for p in dp.couple(model, variables, x).branches if 'head_aux' in p]
  keep = {'branches': {p: not p.startswith('head_aux/stage1') for p in gates}}
  pruned = dp.prune(model, variables, keep, x)
  cut = [k for k, n in pruned.arch.items() if 'head_aux' in k and n == 0]
  assert {k.rsplit('/', 1)[0] for k in cut} == {
    'head_aux/stage1/stage1_block0', 'head_aux/stage1/stage2_block0'
  }  # fmt: skip
  built = jax.eval_shape(pruned.model.init, jax.random.key(0), x)
  shapes = lambda tree: jax.tree.map(lambda a: a.shape, tree)
  assert shapes(pruned.variables['params']) == shapes(built['params'])


@pytest.mark.parametrize('stays', [True, False])
def test_what_a_search_leaves_in_its_gates_is_carried_or_goes(stays):
  trunk, x = TRUNKS['resnet']
  model, variables = made(trunk, x)
  leaves, structure = jax.tree.flatten(variables['branches']['head_aux'])
  gates = [jnp.full_like(g, (0.0, 1.0, 0.5)[i % 3]) for i, g in enumerate(leaves)]
  variables['branches']['head_aux'] = jax.tree.unflatten(structure, gates)
  pruned = dp.prune(model, variables, {'exits': {'main': True, 'aux': stays}}, x)
  assert 'branches' not in pruned.variables
  whole = model.apply(variables, x)
  small = pruned.apply(pruned.variables, x)
  assert {*small} == ({'main', 'aux'} if stays else {'main'})
  for name, logits in small.items():
    np.testing.assert_allclose(logits, whole[name], atol=1e-5)


def test_a_description_holds_the_path():
  trunk, _ = TRUNKS['resnet']
  model = WithHeads(trunk, {'aux': beside(trunk.taps, classes=10)})
  found = models.describe(model)
  again = models.build(found['name'], **found['fields'])
  assert again == model and hash(again.heads['aux']) == hash(model.heads['aux'])


def test_a_tap_that_there_is_not():
  trunk, _ = TRUNKS['resnet']
  path = dataclasses.replace(beside(trunk.taps), stages=(('stage9/block0',),))
  with pytest.raises(ValueError, match=r"no tap 'stage9/block0'.*All: stage1/block0"):
    WithHeads(trunk, {'aux': path})


def test_a_path_reads_images_sequences_and_vectors():
  key = jax.random.key(0)
  features = {
    'image': jax.random.normal(key, (2, 4, 4, 3)),
    'tokens': jax.random.normal(key, (2, 16, 5)),
    'vector': jax.random.normal(key, (2, 6)),
  }
  for order in (['image', 'tokens', 'vector'], ['vector', 'tokens', 'image']):
    path = beside(tuple(order), search=True, classes=3, width=8)
    module = AuxiliaryPath(path, path.widths, jnp.float32)
    logits, _ = module.init_with_output(key, features)
    assert logits.shape == (2, 3)
