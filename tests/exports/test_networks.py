"""Pruned networks on disk: the same network comes back, or an error names the leaf."""

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from depthprune import models
from depthprune.data.images import Normalisation
from depthprune.exports.networks import load, save
from depthprune.models.foreign import trunk as trunk_of
from depthprune.models.heads import Head, WithHeads
from depthprune.models.vit import ViT
from depthprune.program.coupling import couple
from depthprune.storage.checkpoint import CheckpointError
from depthprune.surgery.oneshot import oneshot
from depthprune.surgery.prune import Pruned, prune

X = jax.ShapeDtypeStruct((1, 8, 8, 1), jnp.float32)
SMALL = models.build('resnet8', classes=4, width=4)


def images(batch: int = 3, like=X) -> jax.Array:
  return jax.random.normal(jax.random.key(9), (batch, *like.shape[1:]))


def cut_to(target, model, variables, example=X, **keep) -> Pruned:
  coupling = couple(model, variables, example)
  decision = {**oneshot(coupling, variables, target), **keep}
  return prune(model, variables, decision, example, coupling=coupling)


def assert_same(a: Pruned, b: Pruned, x: jax.Array) -> None:
  """The same arrays, decision and answers."""
  assert jax.tree.structure(a.variables) == jax.tree.structure(b.variables)
  for one, two in zip(*map(jax.tree.leaves, (a.variables, b.variables)), strict=True):
    assert one.dtype == two.dtype
    np.testing.assert_array_equal(one, two)
  for one, two in zip(*map(jax.tree.leaves, (a.keep, b.keep)), strict=True):
    np.testing.assert_array_equal(one, two)
  assert (a.arch, a.report) == (b.arch, b.report)
  for one, two in zip(
    *(jax.tree.leaves(p.apply(p.variables, x)) for p in (a, b)), strict=True
  ):
    np.testing.assert_array_equal(one, two)


@pytest.fixture(scope='module')
def resnet() -> Pruned:
  variables = jax.jit(SMALL.init)(jax.random.key(0), images(1))
  return cut_to(0.6, SMALL, variables, branches={'stage2/block0/branch': False})


def test_our_model_comes_back_by_name(resnet, tmp_path):
  save(tmp_path / 'small', resnet)
  back = load(tmp_path / 'small')
  assert back.model == resnet.model
  assert_same(resnet, back, images())
  native = back.model.apply(back.variables, images())['main']
  np.testing.assert_array_equal(back.apply(back.variables, images())['main'], native)


def test_what_was_pruned_twice_comes_back(resnet, tmp_path):
  twice = cut_to(0.7, resnet.model, resnet.variables)
  save(tmp_path / 'smaller', twice)
  back = load(tmp_path / 'smaller')
  assert back.model == twice.model
  assert back.coupling.groups == twice.coupling.groups
  assert_same(twice, back, images())
  assert twice.arch['stage2/block0/branch'] == 0


def test_heads_that_were_cut_come_back_cut(tmp_path):
  model = ViT(classes=4, width=8, depth=1, heads=4, inner=12)
  variables = jax.jit(model.init)(jax.random.key(0), images(1))
  group = 'block0/attention/query:1'  # no last axis of a kernel tells its size
  keep = {'channels': {group: np.array([True, False, True, True])}}
  small = prune(model, variables, keep, X)
  assert small.arch == {group: 3}
  save(tmp_path / 'vit', small)
  assert_same(small, load(tmp_path / 'vit'), images())


def test_dropped_exits_come_back_dropped(tmp_path):
  model = WithHeads(SMALL, {'early': Head(tap='stage1/block0', classes=4)})
  variables = jax.jit(model.init)(jax.random.key(0), images(1))
  small = cut_to(0.8, model, variables, exits={'main': False})
  save(tmp_path / 'early', small)
  back = load(tmp_path / 'early')
  assert [*back.apply(back.variables, images())] == ['early']
  assert back.model == small.model
  assert_same(small, back, images())


class Foreign(nn.Module):
  """A linen model of somebody else."""

  @nn.compact
  def __call__(self, x, train: bool = False):
    x = nn.relu(nn.BatchNorm(use_running_average=not train)(nn.Conv(6, (3, 3))(x)))
    return nn.Dense(3)(x.mean((1, 2)))


def test_a_foreign_model_comes_back_around_its_own_code(tmp_path):
  variables = Foreign().init(jax.random.key(0), images(1))
  small = cut_to(0.5, Foreign(), variables)
  save(tmp_path / 'foreign', small)
  back = load(tmp_path / 'foreign', model=Foreign())
  assert_same(small, back, images())
  out, stats = back.apply(
    back.variables, images(16), train=True, mutable=['batch_stats']
  )
  assert out.shape == (16, 3) and jax.tree.leaves(stats)[0].shape != (6,)
  with pytest.raises(CheckpointError, match=r'Foreign is not a model of .*model='):
    load(tmp_path / 'foreign')


def test_a_function_of_lists_and_tuples_comes_back(tmp_path):
  def f(variables, x):
    layers, (scale,) = variables['layers'], variables['scale']
    for kernel, bias in layers[:-1]:
      x = jax.nn.relu(x @ kernel + bias)
    return x @ layers[-1][0] * scale

  keys = jax.random.split(jax.random.key(0), 3)
  shapes = [(5, 8), (8, 8), (8, 2)]
  kernels = [jax.random.normal(k, s) for k, s in zip(keys, shapes, strict=True)]
  layers = [(k, jnp.ones(k.shape[1])) for k in kernels]
  variables = {'layers': layers, 'scale': (jnp.float32(2),), 'spare': None}
  example = jax.ShapeDtypeStruct((1, 5), jnp.float32)
  small = cut_to(0.5, f, variables, example)
  save(tmp_path / 'f', small)
  assert_same(small, load(tmp_path / 'f', model=f), images(4, example))


def test_an_nnx_model_comes_back_with_its_state_as_the_structure(tmp_path):
  class Net(nnx.Module):
    def __init__(self, rngs):
      self.first = nnx.Linear(5, 8, rngs=rngs)
      self.last = nnx.Linear(8, 2, rngs=rngs)

    def __call__(self, x):
      return self.last(nnx.relu(self.first(x)))

  graph, state = nnx.split(Net(nnx.Rngs(0)))
  f = lambda state, x: nnx.merge(graph, state)(x)
  example = jax.ShapeDtypeStruct((1, 5), jnp.float32)
  small = cut_to(0.5, f, state, example)
  save(tmp_path / 'nnx', small)
  with pytest.raises(CheckpointError, match='pass variables='):
    load(tmp_path / 'nnx', model=f)
  back = load(tmp_path / 'nnx', model=f, variables=state)
  assert_same(small, back, images(4, example))


def test_the_normalisation_is_recorded_with_the_network(resnet, tmp_path):
  by = Normalisation((0.25, 0.5), (1.0, 2.0), 16.0)
  save(tmp_path / 'small', resnet, normalisation=by)
  recorded = load(tmp_path / 'small').report['normalisation']
  assert recorded == {'mean': [0.25, 0.5], 'std': [1.0, 2.0], 'scale': 16.0}


def test_what_was_fine_tuned_is_what_is_saved(resnet, tmp_path):
  tuned = resnet._replace(variables=jax.tree.map(lambda x: x + 1, resnet.variables))
  save(tmp_path / 'small', resnet)
  save(tmp_path / 'small', tuned)
  assert_same(tuned, load(tmp_path / 'small'), images())


@pytest.mark.parametrize(
  ('change', 'words'),
  [
    (lambda x: x.astype(jnp.bfloat16), r'params/stem/conv/kernel: .*got bfloat16'),
    (lambda x: x[..., :1], r'params/stem/conv/kernel: .*got float32\[3,3,1,1\]'),
    (None, r'params/stem/conv/kernel: expected float32.*got no such leaf'),
  ],
)
def test_arrays_that_are_not_what_the_cut_left_are_not_saved(
  resnet, tmp_path, change, words
):
  variables = jax.tree.map(lambda x: x, resnet.variables)
  conv = variables['params']['stem']['conv']
  kernel = conv.pop('kernel')
  if change:
    conv['kernel'] = change(kernel)
  with pytest.raises(CheckpointError, match=words):
    save(tmp_path / 'small', resnet._replace(variables=variables))
  assert not (tmp_path / 'small').exists()


def test_another_model_than_the_one_that_was_pruned_is_refused(resnet, tmp_path):
  save(tmp_path / 'ours', resnet)
  assert load(tmp_path / 'ours', model=SMALL).model == resnet.model
  with pytest.raises(CheckpointError, match='depth: expected 8, got 14'):
    load(tmp_path / 'ours', model=models.build('resnet14', classes=4, width=4))

  def one(variables, x):
    return jax.nn.relu(x @ variables['a']) @ variables['b']

  def two(variables, x):
    return x @ variables['a'] + variables['b'].sum()

  variables = {
    'a': jax.random.normal(jax.random.key(0), (5, 8)),
    'b': jax.random.normal(jax.random.key(1), (8, 2)),
  }
  example = jax.ShapeDtypeStruct((1, 5), jnp.float32)
  save(tmp_path / 'one', cut_to(0.5, one, variables, example))
  with pytest.raises(CheckpointError, match='not the one that was pruned.*a:1'):
    load(tmp_path / 'one', model=two)
  wide = {**variables, 'a': jnp.zeros((5, 8), jnp.bfloat16)}
  with pytest.raises(
    CheckpointError, match=r'a: expected bfloat16\[5,4\], got float32'
  ):
    load(tmp_path / 'one', model=lambda v, x: one(jax.tree.map(jnp.float32, v), x),
         variables=wide)  # fmt: skip


def test_a_damaged_network_is_an_error_and_no_guess(resnet, tmp_path):
  save(tmp_path / 'small', resnet)
  record = tmp_path / 'small' / 'arch.json'
  text = record.read_text()
  record.write_text(text.replace('"classes": 4', '"classes": 5'))
  with pytest.raises(CheckpointError, match='damaged: arch.json is not what was'):
    load(tmp_path / 'small')
  record.write_text(text)
  data = max((tmp_path / 'small' / 'arrays').rglob('*'), key=lambda p: p.stat().st_size)
  data.write_bytes(data.read_bytes()[:-9])
  with pytest.raises(CheckpointError, match=f'damaged: arrays/.*{data.name}'):
    load(tmp_path / 'small')


class Graph(NamedTuple):
  """An input of several arrays."""

  nodes: jax.Array
  senders: jax.Array


def test_arrays_by_keyword_come_back(tmp_path):
  def f(variables, x, mask=None, rngs=None, scale=1.0):
    noise = jax.random.normal(rngs['noise'][0], x.shape)
    x = jnp.where(mask, x, 0) + noise
    return nn.relu(x @ variables['a'] * scale) @ variables['b']

  variables = {'a': jnp.eye(5, 8), 'b': jnp.eye(8, 2)}
  x, mask = jnp.ones((3, 5)), jnp.ones((3, 1), bool)
  kwargs = {'mask': mask, 'rngs': {'noise': [jax.random.key(0, impl='rbg')]}}
  keep = {'channels': {'a:1': np.arange(8) < 5}}
  small = prune(f, variables, keep, x, scale=2.0, **kwargs)
  save(tmp_path / 'f', small)
  back = load(tmp_path / 'f', model=f)
  assert back.coupling.kwargs == small.coupling.kwargs
  again = [p.apply(p.variables, x, scale=2.0, **kwargs) for p in (small, back)]
  np.testing.assert_array_equal(*again)


def test_a_namedtuple_is_one_input_and_a_list_is_several(tmp_path):
  def f(variables, graph, scale=2.0):
    h = nn.relu(graph.nodes @ variables['a'])
    return (h + h[graph.senders]) @ variables['b'] * scale

  variables = {'a': jnp.eye(5, 8), 'b': jnp.eye(8, 2)}
  graph = Graph(jnp.ones((3, 5)), jnp.array([1, 2, 0]))
  keep = {'channels': {'a:1': np.arange(8) < 5}}
  small = prune(f, variables, keep, graph)
  save(tmp_path / 'f', small)
  with pytest.raises(CheckpointError, match='pass example='):
    load(tmp_path / 'f', model=f)
  assert_same(small, load(tmp_path / 'f', model=f, example=graph), graph)
  save(tmp_path / 'g', prune(f, variables, keep, [graph, 3.0]))
  two = load(tmp_path / 'g', model=f, example=[graph, 3.0])
  assert two.coupling.inputs[1] == 3.0


class Layered(nn.Module):
  """A linen model of somebody else, of any widths."""

  widths: tuple[int, ...] = (16,)

  @nn.compact
  def __call__(self, x):
    for width in self.widths:
      x = nn.relu(nn.Dense(width)(x))
    return nn.Dense(3)(x)


def cut_again(small: Pruned, target, x) -> Pruned:
  """The network after one more cut, of its `apply`."""
  coupling = couple(small.apply, small.variables, x)
  keep = oneshot(coupling, small.variables, target)
  return prune(small.apply, small.variables, keep, x, coupling=coupling)


def test_what_was_pruned_twice_by_its_apply_comes_back_around_the_full_model(tmp_path):
  x, model = jnp.ones((2, 8)), Layered((16, 12))
  one = cut_to(0.7, model, model.init(jax.random.key(0), x), x)
  two = cut_again(one, 0.7, x)
  three = cut_again(two, 0.8, x)
  probe = images(5, x)
  for name, saved in (('one', one), ('two', two), ('three', three)):
    save(tmp_path / name, saved)
    assert_same(saved, load(tmp_path / name, model=model), probe)
  by_way = load(tmp_path / 'three', model=load(tmp_path / 'two', model=model).apply)
  assert_same(three, by_way, probe)
  save(tmp_path / 'again', by_way)
  assert_same(three, load(tmp_path / 'again', model=model), probe)


def test_our_model_that_was_pruned_by_its_apply_comes_back_by_name(resnet, tmp_path):
  twice = cut_again(resnet, 0.8, images(1))
  save(tmp_path / 'smaller', twice)
  assert_same(twice, load(tmp_path / 'smaller'), images())


@pytest.mark.parametrize(
  ('widths', 'words'),
  [
    ((32,), r'params/Dense_0/bias: expected float32\[16\], got float32\[32\]'),
    (
      (16, 16),
      r'params/Dense_1/bias: expected float32\[3\], got float32\[16\]',
    ),
    ((), r'params/Dense_0/bias: expected float32\[16\], got float32\[3\]'),
  ],
)
def test_a_linen_module_that_is_another_one_is_refused_naming_a_leaf(
  tmp_path, widths, words
):
  x = jnp.ones((2, 8))
  save(
    tmp_path / 'one', cut_to(0.7, Layered(), Layered().init(jax.random.key(0), x), x)
  )
  with pytest.raises(CheckpointError, match=words):
    load(tmp_path / 'one', model=Layered(widths))


class Layers(nnx.Module):
  def __init__(self, rngs):
    self.a, self.b = nnx.Linear(6, 16, rngs=rngs), nnx.Linear(16, 4, rngs=rngs)

  def __call__(self, x):
    return self.b(nnx.relu(self.a(x)))


def test_a_module_that_holds_its_arrays_comes_back_small(tmp_path):
  full, x = Layers(nnx.Rngs(0)), jnp.ones((2, 6))
  variables = nnx.state(full)
  coupling = couple(full, variables, x)
  keep = {'channels': {'a:1': np.arange(16) % 2 == 0}}
  small = prune(full, variables, keep, x, coupling=coupling)
  save(tmp_path / 'small', small)
  back = load(tmp_path / 'small', model=Layers(nnx.Rngs(1)))
  assert isinstance(back.model, Layers) and back.model.a.kernel[...].shape == (6, 8)
  np.testing.assert_array_equal(back.model(x), small.model(x))


def test_a_trunk_comes_back_around_the_network_alone(tmp_path):
  """In any kind, with the mask that heads read; but a function holds no arrays."""

  class Masked(nn.Module):
    @nn.compact
    def __call__(self, tokens, attention_mask):
      x = nn.Embed(11, 6, name='embed')(tokens)
      x = x + nn.Dense(6, name='mix')(x * attention_mask[..., None].astype(x.dtype))
      return nn.Dense(2, name='head')(x[:, 0])

  tokens = jnp.arange(12).reshape(3, 4) % 11
  mask, model = jnp.ones((3, 4), jnp.int32).at[0, 2:].set(0), Masked()
  variables = model.init(jax.random.key(0), tokens, mask)
  plain = lambda v, tokens, attention_mask: model.apply(v, tokens, attention_mask)
  for network, arrays in ((model, variables), (plain, variables)):
    trunk = trunk_of(network, arrays, tokens, attention_mask=mask)
    wide = WithHeads(trunk, {'early': Head('mix', 2)})
    mine = wide.init(jax.random.key(1), tokens, mask)
    small = prune(wide, mine, {'exits': {'main': False}}, (tokens, mask))
    want = small.apply(small.variables, tokens, mask)['early']
    save(tmp_path / 'small', small)
    for given in ({'model': wide}, {'model': network, 'variables': arrays}):
      back = load(tmp_path / 'small', **given)
      np.testing.assert_array_equal(
        back.apply(back.variables, tokens, mask)['early'], want
      )
  assert load(tmp_path / 'small', model).arch == small.arch
  with pytest.raises(CheckpointError, match='pass model=trunk.*holds no variables'):
    load(tmp_path / 'small', plain)
