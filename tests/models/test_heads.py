"""Exits on a trunk: arrays drop in, dropped exits disappear, pooling."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from depthprune.exports import networks
from depthprune.models import build, small
from depthprune.models.heads import Head, WithHeads, every_tap, multitask
from depthprune.models.layers import pooled
from depthprune.surgery.prune import prune
from tests import zoo

X = jax.random.normal(jax.random.key(0), (2, 8, 8, 3))
TRUNK = build('resnet14', width=4)
HEADS = {
  'early': Head('stage1/block1', classes=3, hidden=5, pool='grid4'),
  'late': Head('stage2/block1', classes=4, pool='max'),
}


def shapes(model):
  tree = jax.eval_shape(model.init, jax.random.key(0), X)
  return jax.tree.map(jnp.shape, tree)


@pytest.fixture
def run(randomised):
  """model → its outputs on X, and the random arrays they were computed with."""

  def outputs_and_variables(model, seed=0):
    variables = randomised(model, X, seed)
    return jax.jit(model.apply)(variables, X), variables

  return outputs_and_variables


def test_the_arrays_of_a_trunk_drop_in_unchanged(run):
  outputs, trunk = run(TRUNK)
  model = WithHeads(TRUNK, HEADS)
  _, variables = run(model, seed=1)
  for name, tree in trunk.items():
    assert jax.tree.map(jnp.shape, variables[name]['trunk']) == jax.tree.map(
      jnp.shape, tree
    )
    variables[name]['trunk'] = tree
  assert set(variables['params']) == {'trunk', 'head_early', 'head_late'}
  both = jax.jit(model.apply)(variables, X)
  assert model.exits == ('main', 'early', 'late')
  assert (both['early'].shape, both['late'].shape) == ((2, 3), (2, 4))
  for name, value in outputs.items():
    np.testing.assert_array_equal(both[name], value)


def test_a_head_is_a_perceptron_on_the_pooled_tap(run):
  outputs, variables = run(WithHeads(TRUNK, HEADS))
  params = jax.tree.map(np.asarray, variables['params'])
  out = params['head_late']['out']
  late = outputs['stage2/block1'].max((1, 2)) @ out['kernel'] + out['bias']
  np.testing.assert_allclose(outputs['late'], late, rtol=1e-5, atol=1e-6)
  hidden, out = params['head_early']['hidden'], params['head_early']['out']
  grid = np.asarray(outputs['stage1/block1']).reshape(2, 4, 2, 4, 2, 4).mean((2, 4))
  z = np.maximum(grid.reshape(2, -1) @ hidden['kernel'] + hidden['bias'], 0)
  early = z @ out['kernel'] + out['bias']
  np.testing.assert_allclose(outputs['early'], early, rtol=1e-4, atol=1e-5)


CHAINED = {
  'early': Head('stage1/block1', classes=3, hidden=5, pool='grid4', norm=True),
  'late': Head('stage2/block1', classes=3, norm=True, after='early'),
}


def test_a_head_may_normalise_its_features_and_read_the_answer_before_it(run):
  outputs, variables = run(WithHeads(TRUNK, CHAINED))
  params = jax.tree.map(np.asarray, variables['params']['head_late'])
  stats = variables['batch_stats']['head_late']['norm']
  h = outputs['stage2/block1'].mean((1, 2))
  h = (h - stats['mean']) / np.sqrt(stats['var'] + 1e-5)
  h = h * params['norm']['scale'] + params['norm']['bias']
  log_p = jax.nn.log_softmax(outputs['early'])
  kernel, bias = params['out']['kernel'], params['out']['bias']
  z = np.concatenate([h, log_p], -1) @ kernel + bias
  np.testing.assert_allclose(outputs['late'], z, rtol=1e-4, atol=1e-5)


def test_no_gradient_goes_into_the_head_before(run):
  model = WithHeads(TRUNK, CHAINED)
  _, variables = run(model)
  loss = lambda params: model.apply({**variables, 'params': params}, X)['late'].var()
  slopes = jax.grad(loss)(variables['params'])
  assert not any(leaf.any() for leaf in jax.tree.leaves(slopes['head_early']))
  assert all(leaf.any() for leaf in jax.tree.leaves(slopes['head_late']['out']))


def test_a_head_whose_exit_is_dropped_stays_where_a_later_one_reads_its_answer(run):
  model = WithHeads(TRUNK, CHAINED)
  outputs, variables = run(model)
  small = model.clone(arch={'exit/early': 0})
  assert small.exits == ('main', 'late')
  assert shapes(small) == shapes(model)
  left = jax.jit(small.apply)(variables, X)
  assert set(outputs) - set(left) == {'early'}
  np.testing.assert_array_equal(left['late'], outputs['late'])
  smaller = model.clone(arch={'exit/late': 0})
  assert 'head_late' not in shapes(smaller)['params']


def test_a_dropped_exit_has_no_arrays_and_changes_nothing_else(run):
  model = WithHeads(TRUNK, HEADS)
  outputs, variables = run(model)
  small = model.clone(arch={'exit/early': 0})
  assert small.exits == ('main', 'late')
  expected = shapes(model)
  del expected['params']['head_early']
  assert shapes(small) == expected
  left = jax.jit(small.apply)(variables, X)
  assert set(outputs) - set(left) == {'early'}
  for name, value in left.items():
    np.testing.assert_array_equal(value, outputs[name])


def test_without_main_the_trunk_ends_at_the_last_tap_still_read(run):
  model = WithHeads(TRUNK, HEADS)
  outputs, variables = run(model)
  small = model.clone(arch={'exit/main': 0})
  assert small.exits == ('early', 'late')
  expected = shapes(model)
  for tree in expected.values():
    tree['trunk'].pop('stage3')
  expected['params']['trunk'].pop('head')
  assert shapes(small) == expected
  np.testing.assert_array_equal(
    jax.jit(small.apply)(variables, X)['late'], outputs['late']
  )
  smaller = small.clone(arch={**small.arch, 'exit/late': 0})
  assert set(shapes(smaller)['params']['trunk']) == {'stem', 'stage1'}
  assert smaller.exits == ('early',)
  whole = smaller.clone(arch={'exit/main': 1, 'exit/late': 1})
  assert shapes(whole) == shapes(model)


def test_arch_reaches_into_the_trunk_and_the_heads():
  arch = {'trunk/stage1/block0/conv1': 2, 'trunk/stage3/block1/branch': 0}
  params = shapes(WithHeads(TRUNK, HEADS, {**arch, 'head_early/hidden': 3}))['params']
  assert params['trunk']['stage1']['block0']['conv1']['kernel'] == (3, 3, 4, 2)
  assert 'block1' not in params['trunk']['stage3']
  assert params['head_early']['hidden']['kernel'] == (16 * 4, 3)
  assert params['head_early']['out']['kernel'] == (3, 3)


def test_a_pruned_trunk_stays_pruned_when_it_gets_heads():
  thin = TRUNK.clone(arch={'stage1/block0/conv1': 2})
  model = WithHeads(thin, HEADS)
  assert model.arch == {'trunk/stage1/block0/conv1': 2}
  again = model.clone(arch={**model.arch, 'exit/late': 0})
  kernel = shapes(again)['params']['trunk']['stage1']['block0']['conv1']['kernel']
  assert kernel == (3, 3, 4, 2)


@pytest.mark.parametrize(
  ('heads', 'arch', 'message'),
  [
    ({'a': Head('stage1/block9')}, {}, "no tap 'stage1/block9'.*Nearest: stage1/block"),
    ({'main': Head('stage1/block0')}, {}, "head 'main': the trunk has an output"),
    ({'a': Head('stage1/block0')}, {'exit/main': 0, 'exit/a': 0}, 'keep at least one'),
    ({'a': Head('stage1/block0', after='a')}, {}, "head 'a' comes after itself"),
    (
      {'a': Head('stage1/block0', after='b'), 'b': Head('stage1/block1', after='a')},
      {},
      "head 'a' comes after itself",
    ),
    (
      {'a': Head('stage1/block0', after='main'), 'b': Head('stage1/block1')},
      {},
      "head 'a': expected to come after one of a, b, got 'main'",
    ),
  ],
)
def test_impossible_heads_are_refused(heads, arch, message):
  with pytest.raises(ValueError, match=message):
    WithHeads(TRUNK, heads, arch)


def test_an_answer_to_several_tasks_cannot_be_read():
  with pytest.raises(ValueError, match="after 'a': expected one task, got x, y"):
    Head('stage1/block0', classes={'x': 2, 'y': 3}, after='a')


def test_taps_inside_a_scan_are_refused_with_advice():
  with pytest.raises(ValueError, match=r'scan=False gives one per block'):
    WithHeads(build('resnet20', scan=True), {'a': Head('stage1/block1')})


def test_pooling():
  x = jnp.arange(2 * 7 * 2 * 3.0).reshape(2, 7, 2, 3)
  np.testing.assert_allclose(pooled(x, 'avg'), x.mean((1, 2)))
  np.testing.assert_array_equal(pooled(x, 'max'), x.max((1, 2)))
  rows = np.stack([np.asarray(x)[:, i : i + 4].mean(1) for i in range(4)], 1)
  np.testing.assert_allclose(pooled(x, 'grid4'), rows.reshape(2, -1), rtol=1e-6)
  tokens = x.reshape(2, 14, 3)
  np.testing.assert_array_equal(pooled(tokens, 'cls'), tokens[:, 0])
  np.testing.assert_array_equal(pooled(tokens[:, 0], 'max'), tokens[:, 0])
  with pytest.raises(ValueError, match=r"\(2, 14, 3\) by 'grid4'"):
    pooled(tokens, 'grid4')


def test_every_tap_gets_a_linear_head_in_order_of_depth():
  model = every_tap(build('resnet20', width=4, classes=7))
  assert model.exits == tuple(f'exit{i}' for i in range(1, 10))
  assert [head.tap for head in model.heads.values()] == [*model.taps]
  params = shapes(model)['params']
  assert params['head_exit4'] == {'out': {'kernel': (8, 7), 'bias': (7,)}}
  assert 'head' not in params['trunk']
  many = every_tap(build('resnet32'))
  assert many.exits == tuple(sorted(many.exits)) and many.exits[0] == 'exit01'


@pytest.mark.parametrize(
  ('name', 'pool'), [('resnet8', 'avg'), ('vgg11', 'max'), ('mlp', 'max')]
)
def test_every_tap_pools_as_the_trunk_says_unless_told(name, pool):
  trunk = build(name)
  assert {head.pool for head in every_tap(trunk).heads.values()} == {pool}
  told = every_tap(trunk, classes=3, pool='grid4').heads['exit1']
  assert told == Head(trunk.taps[0], 3, pool='grid4')


def test_the_exits_of_a_decoder_share_its_logits(tmp_path):
  """They have no arrays; cut to one of them, it is the network of its first layers."""
  trunk, tokens = small('decoder')[0], zoo.tokens(2)
  model = every_tap(trunk)
  variables = zoo.randomised(jax.eval_shape(model.init, jax.random.key(0), tokens))
  assert set(variables['params']) == {'trunk'}
  outputs = model.apply(variables, tokens)
  own = {name: tree['trunk'] for name, tree in variables.items()}
  for i in (1, 2, 3):
    first = trunk.first(i).apply(own, tokens)['main']
    np.testing.assert_allclose(outputs[f'exit{i}'], first, rtol=1e-5, atol=1e-5)
  keep = {'exits': {f'exit{i}': i == 2 for i in (1, 2, 3)}}
  cut = prune(model, variables, keep, tokens)
  assert set(cut.variables['params']['trunk']) == {'embed', 'layer0', 'layer1', 'norm'}
  networks.save(tmp_path / 'cut', cut)
  again = networks.load(tmp_path / 'cut')
  assert again.model.exits == ('exit2',)
  found = again.apply(again.variables, tokens)['exit2']
  np.testing.assert_allclose(found, outputs['exit2'], rtol=1e-5, atol=1e-5)


def test_what_a_decoder_has_no_use_for_is_refused():
  trunk = small('decoder')[0]
  with pytest.raises(ValueError, match='classes=3, pool=None: a decoder tells the tok'):
    every_tap(trunk, classes=3)
  model = every_tap(trunk)
  tokens = zoo.tokens(1)
  variables = model.init(jax.random.key(0), tokens)
  with pytest.raises(ValueError, match='features: exit1 is no head on a tap with its'):
    model.apply(variables, tokens, method='features')


def test_every_tap_of_a_model_without_taps_is_refused():
  with pytest.raises(ValueError, match='Dense has no taps'):
    every_tap(nn.Dense(3))


def test_tasks_share_a_trunk_and_have_no_main(run):
  trunk_outputs, trunk = run(TRUNK)
  model = multitask(TRUNK, {'left': 3, 'right': 4})
  _, variables = run(model, seed=1)
  assert model.exits == ('left', 'right') and model.taps == TRUNK.taps
  for name, tree in trunk.items():
    tree = {key: part for key, part in tree.items() if key != 'head'}
    same = jax.tree.map(jnp.shape, tree)
    assert jax.tree.map(jnp.shape, variables[name]['trunk']) == same
    variables[name]['trunk'] = tree
  outputs = jax.jit(model.apply)(variables, X)
  assert set(outputs) == {*TRUNK.taps, 'left', 'right'}
  assert outputs['left'].shape == (2, 3) and outputs['right'].shape == (2, 4)
  for tap in TRUNK.taps:
    np.testing.assert_array_equal(outputs[tap], trunk_outputs[tap])
  out = variables['params']['head_left']['out']
  left = outputs[TRUNK.taps[-1]].mean((1, 2)) @ out['kernel'] + out['bias']
  np.testing.assert_allclose(outputs['left'], left, rtol=1e-5, atol=1e-5)
  one = model.clone(arch={**model.arch, 'exit/right': 0})
  assert one.exits == ('left',) and 'head_right' not in shapes(one)['params']


def test_impossible_tasks_are_refused():
  for trunk, tasks, message in [
    (TRUNK, {}, 'multitask: expected .* got none'),
    (TRUNK, {'main': 3}, "head 'main': the trunk has an output"),
    (nn.Dense(3), {'left': 3}, 'multitask: Dense has no taps'),
  ]:
    with pytest.raises(ValueError, match=message):
      multitask(trunk, tasks)


KEPT = {  # trunk, image, {exit: parameters of the network that ends there}
  'mlp20x200': ((28, 28, 1), {1: 159_010, 5: 319_810, 20: 922_810}),
  'convnet20': ((32, 32, 3), {5: 255_010, 10: 568_260, 20: 1_194_760}),
  'resnet110': ((32, 32, 3), {18: 84_730, 36: 414_362, 54: 1_727_962}),
}


@pytest.mark.parametrize('name', KEPT)
def test_parameters_at_every_kept_depth_are_those_of_the_paper(name):
  size, expected = KEPT[name]
  model = every_tap(build(name))

  def parameters(depth):
    kept = model.exits[depth - 1]
    arch = {f'exit/{exit}': 0 for exit in ('main', *model.exits) if exit != kept}
    init = model.clone(arch=arch).init
    tree = jax.eval_shape(init, jax.random.key(0), jnp.ones((1, *size)))
    return sum(leaf.size for leaf in jax.tree.leaves(tree['params']))

  depths = sorted({*expected, *range(1, len(model.exits), 7)})
  counts = {depth: parameters(depth) for depth in depths}
  assert {depth: counts[depth] for depth in expected} == expected
  assert [*counts.values()] == sorted(set(counts.values()))
