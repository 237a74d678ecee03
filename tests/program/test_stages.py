"""Splitting at exits: stages are the whole; what crosses is found, with its axis."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import depthprune as dp
from depthprune.models.heads import Head, WithHeads
from depthprune.models.resnet import ResNet
from depthprune.models.vit import ViT
from depthprune.program.modules import runnable
from depthprune.program.stages import split
from tests import zoo
from tests.masking import quick


class Masked(nn.Module):
  """Embedded tokens through two layers of masked attention, an exit after each."""

  @nn.compact
  def __call__(self, tokens, mask):
    position = nn.Embed(9, 8, name='position')(jnp.arange(tokens.shape[1]))
    x = nn.Embed(20, 8, name='embed')(tokens) + position
    allowed = nn.make_attention_mask(mask, mask)
    out = {}
    for i in range(2):
      attend = nn.MultiHeadDotProductAttention(2, name=f'attention{i}')
      x = x + attend(x, x, mask=allowed)
      out[f'exit{i}'] = nn.Dense(4, name=f'head{i}')(x[:, 0])
    return {'exit0': out['exit0'], 'main': out['exit1']}


class Folded(nn.Module):
  """Positions become examples of a convolution, as video models do with frames."""

  @nn.compact
  def __call__(self, x):
    frames = x.reshape(-1, *x.shape[2:])
    y = nn.relu(nn.Conv(4, (3, 3), name='first')(frames))
    pool = lambda y: y.mean((1, 2)).reshape(x.shape[0], -1)
    z = nn.relu(nn.Conv(4, (3, 3), name='second')(y))
    return {
      'early': nn.Dense(3, name='early')(pool(y)),
      'main': nn.Dense(3, name='head')(pool(z)),
    }


def resnet(**fields):
  heads = {
    'a': Head('stage1/block0', hidden=5, pool='grid4'),
    'b': Head('stage2/block0'),
  }
  return WithHeads(ResNet(depth=8, width=4, **fields), heads)


IMAGES = jax.random.normal(jax.random.key(0), (5, 8, 8, 3))
VIT = ViT(width=8, depth=4, heads=2, inner=6)
CASES = {
  'resnet': (resnet(), (IMAGES,)),
  'resnet scanned': (resnet(scan=True), (IMAGES,)),
  'vit': (WithHeads(VIT, {'a': Head('block1', pool='cls')}), (IMAGES,)),
  'vit scanned': (
    WithHeads(VIT.clone(scan=True, segments=2), {'a': Head('block1', pool='cls')}),
    (IMAGES,),
  ),
  'masked': (
    Masked(),
    (jnp.arange(35).reshape(5, 7) % 20, jnp.arange(35).reshape(5, 7) % 7 < 6),
  ),
  'folded': (Folded(), (jax.random.normal(jax.random.key(1), (5, 3, 6, 6, 2)),)),
}


@pytest.mark.parametrize('name', CASES)
def test_stages_one_after_the_other_are_the_whole(name):
  model, inputs = CASES[name]
  variables = zoo.randomised(jax.eval_shape(model.init, jax.random.key(2), *inputs))
  stages = split(model, variables, *inputs)

  def both(variables, inputs):
    crossed, exits = [inputs], {}
    for stage, run in zip(stages, stages.runs(5), strict=True):
      exits[stage.exit], carried = run(variables, crossed[-1])
      crossed.append(carried)
    return exits, runnable(model)(variables, *inputs), crossed[1:]

  exits, whole, crossed = quick(both)(variables, inputs)
  for stage, carried in zip(stages, crossed, strict=True):
    np.testing.assert_allclose(exits[stage.exit], whole[stage.exit], 1e-5, 1e-5)
    for crossing, value in zip(stage.crossing, carried, strict=True):
      counts = [
        5 * n if i == crossing.axis else n for i, n in enumerate(crossing.shape)
      ]
      assert (list(value.shape), value.dtype) == (counts, crossing.dtype)
  assert not crossed[-1]


@pytest.mark.parametrize('name', CASES)
def test_costs_of_stages_add_up_to_the_whole(name):
  model, inputs = CASES[name]
  variables = jax.eval_shape(model.init, jax.random.key(2), *inputs)
  stages = split(model, variables, *inputs)
  coupling = dp.couple(model, variables, *(x[:1] for x in inputs))
  assert sum(stage.flops for stage in stages) == dp.cost.flops(coupling)
  assert stages.flops[-1] == dp.cost.flops(coupling)
  assert sum(stage.params for stage in stages) == dp.cost.params(coupling)
  only = {'exits': {name: name == 'main' for name in coupling.exits}}
  assert stages.whole == dp.cost.flops(coupling, only)


def test_one_activation_crosses_in_a_residual_network():
  model, inputs = CASES['resnet']
  stages = split(model, jax.eval_shape(model.init, jax.random.key(0), *inputs), *inputs)
  found = [[(c.shape, c.axis) for c in stage.crossing] for stage in stages]
  assert found == [[((1, 8, 8, 4), 0)], [((1, 4, 4, 8), 0)], []]
  assert stages.exits == ('a', 'b', 'main')
  first, *_ = stages.explain().splitlines()
  assert first.startswith(f'a: {stages[0].flops:,} FLOPs')
  assert first.endswith('then float32[1, 8, 8, 4] crosses')


def test_hidden_states_and_the_mask_cross_in_a_masked_transformer():
  model, inputs = CASES['masked']
  stages = split(model, jax.eval_shape(model.init, jax.random.key(0), *inputs), *inputs)
  crossing = {(c.shape, str(c.dtype), c.axis) for c in stages[0].crossing}
  assert ((1, 7, 8), 'float32', 0) in crossing
  assert len(crossing) == 2 and any(shape[-2:] == (7, 7) for shape, _, _ in crossing)


def test_examples_that_were_folded_into_another_axis_are_still_counted():
  model, inputs = CASES['folded']
  stages = split(model, jax.eval_shape(model.init, jax.random.key(0), *inputs), *inputs)
  assert [(c.shape, c.axis) for c in stages[0].crossing] == [((3, 6, 6, 4), 0)]


def test_what_is_the_same_for_all_examples_crosses_whole():
  def fn(w, x):
    table = jnp.cumsum(w, 0)
    return {'early': x @ table, 'main': jnp.tanh(x @ table) @ table}

  stages = split(fn, jnp.ones((3, 3)), jnp.ones((1, 3)))
  assert {c.axis for c in stages[0].crossing} == {0, None}


def test_other_shapes_are_split_anew():
  model, inputs = CASES['masked']
  stages = split(model, jax.eval_shape(model.init, jax.random.key(0), *inputs), *inputs)
  longer = [jnp.zeros((2, 9), x.dtype) for x in inputs]
  again = stages.again(*longer)
  assert again.exits == stages.exits and again.whole > stages.whole
  assert stages.again(*longer) is again and stages.again(*inputs) is stages


def test_the_order_of_exits_may_be_given():
  model, inputs = CASES['resnet']
  variables = jax.eval_shape(model.init, jax.random.key(0), *inputs)
  assert split(model, variables, *inputs, exits=['b', 'main']).exits == ('b', 'main')


# ---- refused -------------------------------------------------------------------------


def test_a_function_without_exits():
  with pytest.raises(ValueError, match='dict of two exits or more, got none'):
    split(lambda w, x: x @ w, jnp.ones((3, 3)), jnp.ones((1, 3)))


def test_an_exit_that_there_is_not():
  fn = lambda w, x: {'early': x, 'main': x @ w}
  with pytest.raises(ValueError, match="no exit 'late'; there are: early, main"):
    split(fn, jnp.ones((3, 3)), jnp.ones((1, 3)), exits=('late', 'main'))


def test_train_mode_where_examples_see_each_other():
  model = resnet()
  variables = jax.eval_shape(model.init, jax.random.key(0), IMAGES)
  train = lambda v, x: model.apply(v, x, train=True, mutable=['batch_stats'])[0]
  with pytest.raises(ValueError, match=r'look at each other.*train=False'):
    split(lambda v, x: {e: train(v, x)[e] for e in model.exits}, variables, IMAGES)


def test_exits_out_of_one_scan_cost_nothing_apart():
  def fn(w, x):
    _, each = jax.lax.scan(lambda x, w: (jnp.tanh(x @ w),) * 2, x, w)
    return {'early': each[0], 'main': each[2]}

  with pytest.raises(ValueError, match='main costs nothing after early.*one scan'):
    split(fn, jnp.ones((3, 4, 4)), jnp.ones((1, 4)))


def test_examples_that_are_sorted_among_each_other():
  def fn(w, x):
    mixed = jnp.sort(x @ w, axis=0)
    return {'early': mixed, 'main': mixed @ w}

  with pytest.raises(ValueError, match='look at each other .sorted along'):
    split(fn, jnp.ones((3, 3)), jnp.ones((1, 3)))


@pytest.mark.parametrize(
  'mix',
  [
    lambda h: (h @ h.T) @ h,
    lambda h: jnp.ones((h.shape[0],) * 2) @ h,
    lambda h: jax.lax.dynamic_slice(jnp.concatenate([h, h]), (1, 0), h.shape),
    lambda h: jax.pure_callback(lambda h: h - h.mean(0), h, h),
    lambda h: h / jnp.linalg.norm(h, axis=0),
    jax.vmap(lambda h: h - jax.lax.pmean(h, 'n'), axis_name='n'),
  ],
  ids=['contracted', 'averaged', 'shifted', 'opaque', 'normalised', 'collective'],
)
def test_examples_that_look_at_each_other_in_other_ways(mix):
  def fn(w, x):
    h = jnp.tanh(x @ w)
    return {'early': h @ w, 'main': mix(h) @ w}

  with pytest.raises(ValueError, match='examples look at each other'):
    split(fn, jnp.ones((3, 3)), jnp.ones((1, 3)))


def test_exits_in_an_order_that_is_none():
  fn = lambda w, x: {'early': x @ w, 'main': x @ w @ w}
  for exits in (('main',), ('main', 'early'), ('early', 'early')):
    with pytest.raises(ValueError, match="'main' the last of them"):
      split(fn, jnp.ones((3, 3)), jnp.ones((1, 3)), exits=exits)


def test_what_crosses_without_an_axis_of_examples():
  def fn(w, x):
    turned = (x @ w).T.reshape(-1)  # examples vary fastest
    back = lambda y: y.reshape(-1, x.shape[0]).T
    return {'early': back(jnp.sin(turned)), 'main': back(jnp.cos(turned)) @ w}

  with pytest.raises(ValueError, match=r'float32\[6\].* no axis of it counts examples'):
    split(fn, jnp.ones((3, 3)), jnp.ones((1, 3)))


def test_an_input_without_examples():
  fn = lambda w, x: {'early': w, 'main': x @ w}
  with pytest.raises(ValueError, match='examples along axis 0'):
    split(fn, jnp.ones((3, 3)), jnp.float32(1))


def embedded(v, tokens, positions, mask, scale):
  """Exits after two layers that mix the places of a text, as the mask allows."""
  x, out = v['embed'][tokens] + v['position'][positions], {}
  for name in ('early', 'main'):
    x = jnp.tanh(jnp.einsum('ij,bjc->bic', mask, x) @ v[name]) * scale
    out[name] = x.mean(1) @ v['head']
  return out


def test_inputs_that_all_examples_share_are_passed_as_they_are():
  shapes = {'embed': (9, 4), 'position': (6, 4), 'early': (4, 4), 'main': (4, 4)}
  variables = {k: jnp.ones(shape) / 4 for k, shape in shapes.items()}
  variables['head'] = jnp.arange(12.0).reshape(4, 3)
  shared = jnp.arange(6), jnp.tri(6), jnp.float32(0.5)
  tokens = jax.random.randint(jax.random.key(0), (16, 6), 0, 9)
  stages = split(embedded, variables, tokens, *shared)
  assert stages.counts == (True, False, False, False)
  assert [x.shape for x in stages.inputs] == [(1, 6), (6,), (6, 6), ()]
  crossing = {(c.shape, c.axis) for c in stages[0].crossing}
  assert crossing == {((1, 6, 4), 0), ((6, 6), None), ((), None)}
  batch = tokens[:5], *shared
  first, second = stages.runs(5)
  early, crossed = first(variables, batch)
  expected = embedded(variables, *batch)
  np.testing.assert_allclose(early, expected['early'], rtol=1e-6)
  np.testing.assert_allclose(second(variables, crossed)[0], expected['main'], rtol=1e-6)
  assert stages.again(tokens[:6], *shared) is stages.again(*batch)


def test_an_array_by_keyword_that_counts_examples_is_refused_naming_it():
  def fn(w, x, mask=None, scale=1.0):
    x = x * scale if mask is None else x * mask
    return {'early': x @ w, 'main': x @ w @ w}

  w, x = jnp.ones((3, 3)), jnp.ones((2, 3))
  with pytest.raises(
    ValueError, match=r'mask is an array by keyword.*lambda v, x, mas'
  ):
    split(fn, w, x, mask=jnp.ones((2, 1)))
  assert split(fn, w, x, scale=jnp.float32(2)).exits == ('early', 'main')


def test_inputs_are_written_one_by_one():
  model, tokens = Masked(), jnp.zeros((2, 4), jnp.int32)
  inputs = (tokens, tokens > -1)
  variables = model.init(jax.random.key(0), *inputs)
  with pytest.raises(TypeError, match='one tuple.*one by one'):
    split(model, variables, inputs)
