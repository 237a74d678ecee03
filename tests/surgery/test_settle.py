"""Settling: a decision made coherent, with every change explained; misfits refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from depthprune.models.heads import Head, WithHeads
from depthprune.models.resnet import ResNet
from depthprune.program.coupling import couple
from depthprune.surgery.oneshot import norms
from depthprune.surgery.prune import prune
from depthprune.surgery.settle import settle
from tests import zoo

X = jax.ShapeDtypeStruct((1, 8, 8, 3), jnp.float32)


def coupled(model):
  variables = zoo.randomised(jax.eval_shape(model.init, jax.random.key(0), X))
  return couple(model, variables, X), variables


@pytest.fixture(scope='module')
def resnet():
  return coupled(ResNet(depth=8, width=4))


@pytest.fixture(scope='module')
def exits():
  trunk = ResNet(depth=8, width=4)
  return coupled(WithHeads(trunk, {'early': Head('stage1/block0', hidden=5)}))


def hidden(n):
  """x @ a @ b with n hidden units whose L1 norms are a permutation of 1 … n."""
  norm = np.random.default_rng(0).permutation(n) + 1.0
  arrays = {
    'a': jnp.asarray(np.outer([0.25, -0.75], norm), jnp.float32),
    'b': jnp.ones((n, 2)),
  }
  coupling = couple(lambda p, x: x @ p['a'] @ p['b'], arrays, jnp.ones((1, 2)))
  return coupling, arrays, norm


def test_a_width_is_rounded_down_and_the_smallest_go():
  coupling, arrays, norm = hidden(24)
  kept = np.random.default_rng(1).permutation(24) < 19
  settled = settle(coupling, {'channels': {'a:1': kept}}, arrays, round_to=8)
  assert settled.notes == ('a:1: 19 became 16, a multiple of 8 (of 24)',)
  after = settled.keep['channels']['a:1']
  assert after.sum() == 16 and not (after & ~kept).any()
  assert sorted(norm[kept & ~after]) == sorted(norm[kept])[:3]


def test_less_than_one_multiple_becomes_one_and_the_largest_come_back():
  coupling, arrays, norm = hidden(24)
  kept = np.arange(24) < 5
  settled = settle(coupling, {'channels': {'a:1': kept}}, arrays, round_to=8)
  after = settled.keep['channels']['a:1']
  assert settled.notes == ('a:1: 5 became 8, a multiple of 8 (of 24)',)
  assert after.sum() == 8 and after[kept].all()
  assert sorted(norm[after & ~kept]) == sorted(norm[~kept])[-3:]


@pytest.mark.parametrize(
  ('size', 'left', 'width', 'by'),
  [(40, 30, 24, 8), (24, 19, 16, 8), (12, 7, 6, 2), (40, 7, 4, 4)],
)
def test_auto_rounds_a_narrow_group_to_less(size, left, width, by):
  coupling, arrays, _ = hidden(size)
  kept = {'channels': {'a:1': np.arange(size) < left}}
  settled = settle(coupling, kept, arrays, round_to='auto')
  said = f'a:1: {left} became {width}, a multiple of {by} (of {size})'
  assert settled.notes == (said,)
  assert settled.keep['channels']['a:1'].sum() == width


def test_auto_leaves_a_group_of_few_channels_as_it_was_decided():
  coupling, arrays, _ = hidden(7)
  kept = {'channels': {'a:1': np.arange(7) < 5}}
  assert settle(coupling, kept, arrays, round_to='auto').notes == ()
  assert settle(coupling, kept, arrays, round_to=8).notes != ()


@pytest.mark.parametrize(('size', 'left'), [(24, 24), (24, 16), (20, 20), (6, 6)])
def test_what_fits_already_stays(size, left):
  coupling, arrays, _ = hidden(size)
  kept = np.arange(size) < left
  settled = settle(coupling, {'channels': {'a:1': kept}}, arrays, round_to=8)
  assert settled.notes == ()
  np.testing.assert_array_equal(settled.keep['channels']['a:1'], kept)


def test_an_empty_trunk_keeps_its_largest_slice(resnet):
  coupling, variables = resnet
  keep = {'channels': {'stem/conv:3': np.zeros(4, bool)}}
  settled = settle(coupling, keep, variables)
  after = settled.keep['channels']['stem/conv:3']
  largest = norms(coupling, dict(_leaves(variables)), 'stem/conv:3').argmax()
  assert np.flatnonzero(after).tolist() == [largest]
  [note] = settled.notes
  assert note.startswith('stem/conv:3 would be empty and lies in no branch')
  assert all(settled.keep['branches'].values())


def _leaves(variables):
  for path, leaf in jax.tree_util.tree_leaves_with_path(variables):
    yield jax.tree_util.keystr(path, simple=True, separator='/'), leaf


def test_an_emptied_branch_is_closed_and_what_that_changes_is_told_apart(resnet):
  """Its last normalisation would still add a constant; without the branch it is 0."""
  coupling, variables = resnet
  group, branch = 'stage2/block0/conv1:3', 'stage2/block0/branch'
  keep = {'channels': {group: np.zeros(8, bool)}}
  settled = settle(coupling, keep, variables)
  assert settled.notes == (f'{group} is empty, so the branch {branch} is closed',)
  assert not settled.keep['branches'].pop(branch)
  assert all(settled.keep['branches'].values())
  assert group not in settled.keep['channels']
  assert keep['channels'].keys() == {group}  # the caller's is left alone

  model = ResNet(depth=8, width=4)
  report = prune(model, variables, keep, jnp.ones(X.shape), coupling=coupling).report
  assert report['verify']['settled'] > 1e-3 > report['verify']['difference']
  assert settled.notes[0] in report['notes']
  assert report['widths'][group] == [8, 0] and report['requested'] == {group: 0}
  keep = {'branches': {branch: np.asarray(False)}}
  verify = prune(model, variables, keep, jnp.ones(X.shape), coupling=coupling).report
  assert verify['verify']['settled'] == 0 and verify['notes'] == []


def test_a_closed_branch_takes_its_groups_along(resnet):
  coupling, variables = resnet
  keep = {'branches': {'stage3/block0/branch': False}}
  settled = settle(coupling, keep, variables, round_to=2)
  gone = set(coupling.groups) - set(settled.keep['channels'])
  assert gone == {'stage3/block0/conv1:3'} and settled.notes == ()
  keep['channels'] = {'stage3/block0/conv1:3': np.zeros(16, bool)}
  assert settle(coupling, keep, variables).notes == ()


def test_layers_of_a_stack_go_with_their_branches():
  coupling, variables = coupled(ResNet(depth=20, width=4, scan=True))
  one, none = np.asarray([True, False]), np.zeros(2, bool)
  keep = {'branches': {'stage1/blocks/branch': one, 'stage2/blocks/branch': none}}
  channels = settle(coupling, keep, variables).keep['channels']
  layers = {g.name: g for g in coupling.groups.values() if g.kind == 'layer'}
  by_stage = {name[:6]: channels.get(name) for name in layers}
  np.testing.assert_array_equal(by_stage['stage1'], one)
  assert by_stage['stage3'].all() and not by_stage['stage2'].any()


def test_a_layer_of_a_stack_stays_for_one_of_its_branches():
  def f(v, x):
    def turn(h, layer):
      w, gate = layer
      h = h + gate['one'] * (h @ w['a'])
      return h + gate['two'] * (h @ w['b']), None

    return jax.lax.scan(turn, x, (v['params'], v['branches']))[0]

  variables = {
    'params': {'a': jnp.ones((3, 2, 2)), 'b': jnp.ones((3, 2, 2))},
    'branches': {'one': jnp.ones(3), 'two': jnp.ones(3)},
  }
  one, two = np.array([True, False, False]), np.array([False, True, False])
  coupling = couple(f, variables, jnp.ones((1, 2)))
  keep = {'branches': {'one': one, 'two': two}}
  [layers] = settle(coupling, keep, variables).keep['channels'].values()
  np.testing.assert_array_equal(layers, one | two)


def test_a_dropped_exit_takes_what_it_alone_needs(exits):
  coupling, variables = exits
  settled = settle(coupling, {'exits': {'main': False}}, variables).keep
  assert settled['exits'] == {'main': False, 'early': True}
  left = set(settled['channels'])
  assert left == {
    'trunk/stem/conv:3', 'trunk/stage1/block0/conv1:3', 'head_early/hidden:1',
  }  # fmt: skip


@pytest.mark.parametrize(
  ('keep', 'error', 'message'),
  [
    (
      {'channels': {'stage1/block0/conv:3': np.ones(4, bool)}},
      KeyError,
      'stage1/block0/conv:3: no such group; nearest: .*stage1/block0/conv1:3',
    ),
    (
      {'channels': {'stage2/block0/conv2:3': np.ones(8, bool)}},
      KeyError,
      r'stage2/block0/conv2:3: this axis is pinned \(padding\), so it has no gate',
    ),
    (
      {'channels': {'stage2/block0/conv1:3': np.ones(7, bool)}},
      ValueError,
      r'stage2/block0/conv1:3: keep has shape \(7,\), its axis \(8,\) '
      r'\(\S*stage2/block0/\S+, axis \d\)',
    ),
    (
      {'channels': {'stage2/block0/conv1:3': np.ones(8)}},
      ValueError,
      'stage2/block0/conv1:3: keep has dtype float64, expected bool',
    ),
    (
      {'branches': {'stage2/block1/branch': False}},
      KeyError,
      "no branch 'stage2/block1/branch'; there are: stage1/block0/branch, stage2",
    ),
    (
      {'branches': {'stage2/block0/branch': np.ones(1, bool)}},
      ValueError,
      r'stage2/block0/branch: keep has shape \(1,\), its axis \(\)',
    ),
    (
      {'branches': {'stage2/block0/branch': 0.0}},
      ValueError,
      'stage2/block0/branch: keep has dtype float64, expected bool',
    ),
    (
      {'exits': {'early': True}},
      KeyError,
      "keep: no exit 'early'; there are: main",
    ),
    ({'exits': {'main': False}}, ValueError, r'all exits are dropped \(main\)'),
    (
      {'channel': {}},
      KeyError,
      "keep has the entry 'channel': expected channels, branches, exits",
    ),
  ],
)  # fmt: skip
def test_what_does_not_fit_is_refused(resnet, keep, error, message):
  coupling, variables = resnet
  with pytest.raises(error, match=message):
    settle(coupling, keep, variables)


def test_all_exits_of_several_are_named(exits):
  keep = {'exits': {'main': False, 'early': False}}
  with pytest.raises(ValueError, match=r'dropped \(early, main\); keep one'):
    settle(exits[0], keep, exits[1])
