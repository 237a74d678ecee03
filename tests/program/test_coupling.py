"""Which slices go together: counted by closed forms, and looked at one by one."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend import core as jex

from depthprune.models import build
from depthprune.program.coupling import couple
from tests.zoo import INEXACT, NETWORKS, Case, image
from tests.zoo.images import DenseNet
from tests.zoo.sequences import EncoderBlock, ScannedViT, ViT

IMAGENET = jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32)
X = jax.ShapeDtypeStruct((2, 5), jnp.float32)


def vit(make, width, depth, heads):
  block = partial(EncoderBlock, heads=heads, inner=4 * width)
  return make(width=width, depth=depth, patch=16, block=block)


# The numbers are the same on every jax: CI runs this file on the oldest and the newest.
COUNTS = {
  'ResNet-50': (lambda: build('resnet50'), 1 + 16 * 2 + 4),
  'ResNet-152': (lambda: build('resnet152'), 1 + 50 * 2 + 4),
  'DenseNet-121': (lambda: DenseNet(32, (6, 12, 24, 16)), 1 + 58 * 2 + 3),
  'ViT-B/16': (lambda: vit(ViT, 768, 12, 12), 12 * 4 + 1),
  'ViT-L/16 scanned': (lambda: vit(ScannedViT, 1024, 24, 16), 4 + 1 + 1),
}


@pytest.mark.parametrize('name', COUNTS)
def test_group_counts_are_the_closed_forms(name):
  """On shapes alone: nothing of this size is ever computed."""
  make, expected = COUNTS[name]
  model = make()
  variables = jax.eval_shape(model.init, jax.random.key(0), IMAGENET)
  coupling = couple(model, variables, IMAGENET)
  assert len(coupling.groups) == expected
  assert not coupling.unknown
  kinds = [g.kind for g in coupling.groups.values()]
  assert kinds.count('layer') == ('scanned' in name)


# name: number of groups, of those that cannot be gated, of pinned axes worth telling.
EXPECTED = {
  'resnet basic': (5, 0, 0), 'resnet bottleneck': (9, 0, 0), 'resnext': (12, 0, 0),
  'resnet option A': (4, 0, 14), 'mobilenet': (6, 0, 0), 'densenet': (10, 0, 0),
  'vgg': (3, 0, 1), 'multi-exit': (4, 0, 0), 'u-net': (7, 0, 0), 'atrous': (4, 0, 0),
  'squeeze-excite': (3, 0, 0), 'group norm': (3, 2, 0), 'vit': (9, 1, 1),
  'vit fused': (7, 1, 1), 'vit scanned': (6, 2, 0), 'char cnn': (4, 0, 1),
  'rotary': (4, 0, 1), 'gated units': (3, 0, 1), 'gru': (3, 0, 1), 'square': (1, 0, 0),
  'branching': (1, 0, 0), 'recurrent': (1, 0, 0), 'strided': (2, 0, 2),
}  # fmt: skip


@pytest.mark.parametrize('name', EXPECTED)
def test_what_is_found_in_each_network(name):
  case = NETWORKS[name]
  coupling = couple(case.model, case.variables(), case.inputs(2))
  ungated = sum(bool(g.ungated) for g in coupling.groups.values())
  found = len(coupling.groups), ungated, len(coupling.pinned)
  assert found == EXPECTED[name], coupling.explain()
  assert all(g.size > 1 for g in coupling.groups.values())


def members(coupling, group):
  return set(coupling.groups[group].members)


def test_members_of_a_residual_stream():
  case = NETWORKS['resnet basic']
  coupling = couple(case.model, case.variables(), case.inputs(2))
  norms = ('BatchNorm_0', 'Basic_0/BatchNorm_1', 'Basic_1/BatchNorm_1')
  arrays = (
    'params/{}/scale',
    'params/{}/bias',
    'batch_stats/{}/mean',
    'batch_stats/{}/var',
  )
  kernels = {
    'Conv_0': 3, 'Basic_0/Conv_0': 2, 'Basic_0/Conv_1': 3, 'Basic_1/Conv_0': 2,
    'Basic_1/Conv_1': 3, 'Basic_2/Conv_0': 2, 'Basic_2/conv_proj': 2,
  }  # fmt: skip
  expected = {(a.format(n), 0) for a in arrays for n in norms}
  expected |= {(f'params/{k}/kernel', axis) for k, axis in kernels.items()}
  assert members(coupling, 'Conv_0:3') == expected
  assert list(coupling.groups) == [
    'Conv_0:3', 'Basic_0/Conv_0:3', 'Basic_1/Conv_0:3', 'Basic_2/Conv_0:3',
    'Basic_2/Conv_1:3',
  ]  # fmt: skip


def test_flattening_reads_each_channel_at_every_position():
  case = NETWORKS['vgg']
  coupling = couple(case.model, case.variables(), case.inputs(2))
  group = coupling.groups['Conv_1:3']
  assert ('params/Dense_0/kernel', 0) in group.members and group.size == 12
  axis = coupling.axes['params/Dense_0/kernel'][0]
  assert axis.size == 2 * 2 * 12


def test_one_array_may_hold_a_group_twice():
  f = lambda p, x: jnp.tanh(x @ p['in'] @ p['square']) @ p['square'] @ p['out']
  case = Case(f, image, {'in': (5, 8), 'square': (8, 8), 'out': (8, 3)})
  coupling = couple(f, case.variables(), X)
  assert members(coupling, 'in:1') == {
    ('in', 1), ('square', 0), ('square', 1), ('out', 0)
  }  # fmt: skip


def arrays(**shapes):
  return {n: jax.ShapeDtypeStruct(s, jnp.float32) for n, s in shapes.items()}


def pins(f, **shapes) -> dict:
  coupling = couple(f, arrays(**shapes), X)
  return {f'{p.path}:{p.axis}': ' / '.join(p.reasons) for p in coupling.pinned}


def test_axes_that_must_stay_say_why():
  both = {'a': (5, 8), 'b': (8, 3)}
  assert pins(lambda p, x: jnp.sort(x @ p['a']) @ p['b'], **both) == {
    'a:1': 'sorted along', 'b:0': 'sorted along'
  }  # fmt: skip
  assert 'reversed' in pins(lambda p, x: (x @ p['a'])[:, ::-1] @ p['b'], **both)['a:1']
  taken = pins(lambda p, x: (x @ p['a'])[:, np.array([1, 0, 5])] @ p['b'][:3], **both)
  assert 'indexed' in taken['a:1']
  half = pins(lambda p, x: (x @ p['a']).argmin(-1) + p['b'].argmin(), **both)
  assert 'argmin' in half['a:1']


def test_single_channels_are_nobody_s_group():
  def f(p, x):
    return jnp.stack(jnp.unstack(x @ p['a'], axis=1)[:3], -1) @ p['b']

  coupling = couple(f, arrays(a=(5, 8), b=(3, 3)), X)
  assert not coupling.groups and not coupling.unknown


def test_outputs_stay_and_fixed_selects_which():
  f = lambda p, x: (x @ p['a'] @ p['b'], x @ p['a'])
  both = arrays(a=(5, 8), b=(8, 3))
  assert not couple(f, both, X).groups
  coupling = couple(f, both, X, fixed=lambda out: out[0])
  assert set(coupling.groups) == {'a:1'}


def test_exits_are_named_and_unread_taps_free():
  model = build('resnet20', width=4)
  x = jnp.ones((1, 8, 8, 3))
  variables = jax.eval_shape(model.init, jax.random.key(0), x)
  coupling = couple(model, variables, x)
  assert coupling.exits == ('main',)
  assert len(coupling.branches) == 9 and 'stage1/block0/branch' in coupling.branches
  gates = coupling.gates()
  assert gates['channels'].keys() == {g.name for g in coupling.groups.values()}
  assert all(
    g.dtype == np.float32 and (g == 1).all() for g in gates['channels'].values()
  )
  assert {g.shape for g in gates['branches'].values()} == {()}


def test_a_primitive_without_a_rule_pins_and_is_reported():
  mystery = jex.Primitive('mystery')
  mystery.def_abstract_eval(lambda a: a)
  f = lambda p, x: mystery.bind(x @ p['a']) @ p['b'] + (x @ p['c']) @ p['d']
  coupling = couple(f, arrays(a=(5, 8), b=(8, 3), c=(5, 8), d=(8, 3)), X)
  assert coupling.unknown == ('mystery',)
  assert set(coupling.groups) == {'c:1'}
  reasons = {p.path: p.reasons for p in coupling.pinned}
  assert reasons['a'] == reasons['b'] == ('no rule for the primitive mystery',)
  assert 'no rule for the primitive mystery: all that it' in coupling.explain()


def test_linear_algebra_pins():
  def whitened(p, x):
    h = x @ p['a']
    return jnp.linalg.cholesky(h.T @ h + jnp.eye(8))[:2] @ p['b']

  coupling = couple(whitened, arrays(a=(5, 8), b=(8, 3)), X)
  assert not coupling.groups and 'cholesky' in coupling.unknown


@pytest.mark.parametrize('name', INEXACT)
def test_normalised_axes_cannot_be_gated(name):
  case = INEXACT[name]
  coupling = couple(case.model, case.variables(), case.inputs(2))
  [group] = [g for g in coupling.groups.values() if g.ungated]
  assert 'reduced over by reduce_' in group.ungated
  assert group.name not in coupling.gates()['channels']
