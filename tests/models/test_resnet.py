"""Residual networks: hand counts, shortcuts, removed units, both activations."""

import math
from functools import partial, reduce
from operator import getitem
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from depthprune.models import build
from depthprune.models.layers import ConvNorm, conv
from depthprune.models.resnet import ResNet


def resnet8(**fields) -> Any:
  return ResNet(**{'depth': 8, 'width': 4, **fields})


def named(name, **fields) -> Any:
  return build(name, **fields)


def parameters(tree):
  return sum(leaf.size for leaf in jax.tree.leaves(tree))


def macs(jaxpr):
  """Multiply-adds of the convolutions and dense layers of a jaxpr without loops."""
  total = 0
  for eqn in jaxpr.eqns:
    if eqn.primitive.name in ('conv_general_dilated', 'dot_general'):
      *reduced, _ = eqn.invars[1].aval.shape  # [h, w, c, out] or [c, out]
      total += eqn.outvars[0].aval.size * math.prod(reduced)
    for inner in eqn.params.values():
      if hasattr(inner, 'jaxpr'):
        total += macs(inner.jaxpr)
  return total


@pytest.mark.parametrize(
  ('name', 'size', 'expected'),
  [
    ('resnet20', 32, 269_722),
    ('resnet56', 32, 853_018),
    ('resnet110', 32, 1_727_962),
    ('resnet18', 64, 11_689_512),
    ('resnet50', 64, 25_557_032),
    ('resnet152', 64, 60_192_808),
  ],
)
def test_parameters_equal_the_published_counts(name, size, expected):
  x = jnp.ones((1, size, size, 3))
  shapes = jax.eval_shape(build(name).init, jax.random.key(0), x)
  assert parameters(shapes['params']) == expected


@pytest.mark.parametrize('width', [4, 8, 12])
def test_thin_networks_have_the_parameters_counted_by_hand(width):
  """ResNet-20: 116 squares of the width in 3×3 kernels, 43 norms of the width."""
  x = jnp.ones((1, 32, 32, 3))
  model = build('resnet20', width=width)
  shapes = jax.eval_shape(model.init, jax.random.key(0), x)
  kernels, norms, head = 9 * 116 * width**2 + 27 * width, 2 * 43 * width, 40 * width
  assert parameters(shapes['params']) == kernels + norms + head + 10


@pytest.mark.parametrize(
  ('name', 'size', 'millions'),
  [('resnet20', 32, 40.55), ('resnet56', 32, 125.49), ('resnet50', 224, 4089.18)],
)
def test_macs_equal_hand_counts(name, size, millions):
  model, x = named(name), jnp.ones((1, size, size, 3))
  variables = jax.eval_shape(model.init, jax.random.key(0), x)
  jaxpr = jax.make_jaxpr(lambda v: model.apply(v, x)['main'])(variables)
  assert macs(jaxpr.jaxpr) / 1e6 == pytest.approx(millions, abs=0.005)


def test_stages_halve_the_resolution_and_double_the_channels():
  x = jnp.ones((2, 64, 64, 3))
  build_outputs = lambda model: jax.eval_shape(
    model.init_with_output, jax.random.key(0), x
  )[0]
  cifar = build_outputs(resnet8(depth=11, bottleneck=True))
  assert [cifar[f'stage{i}/block0'].shape[1:] for i in (1, 2, 3)] == [
    (64, 64, 16),
    (32, 32, 32),
    (16, 16, 64),
  ]
  large = build_outputs(build('resnet18', width=4, classes=7))
  assert [large[f'stage{i}/block1'].shape[1:] for i in (1, 2, 3, 4)] == [
    (16, 16, 4),
    (8, 8, 8),
    (4, 4, 16),
    (2, 2, 32),
  ]
  assert large['main'].shape == (2, 7)


def test_option_a_subsamples_and_pads_equally_on_both_sides(randomised):
  x = jax.random.normal(jax.random.key(0), (1, 8, 8, 1))
  model = resnet8(arch={'stage2/block0/branch': 0})
  outputs = model.apply(randomised(model, x), x)
  before, after = outputs['stage1/block0'], outputs['stage2/block0']
  np.testing.assert_array_equal(after[..., 2:6], before[:, ::2, ::2])
  np.testing.assert_array_equal(after[..., :2], 0)
  np.testing.assert_array_equal(after[..., 6:], 0)


def test_option_a_keeps_its_pads_when_the_stream_is_narrower(randomised):
  arch = {'stem/conv': 3, 'stage1/block0/conv2': 3, 'stage2/block0/conv2': 7}
  arch |= {'stage3/block0/conv2': 15, 'stage3/block0/branch': 0}
  x = jax.random.normal(jax.random.key(0), (1, 8, 8, 1))
  model = resnet8(arch=arch)
  outputs = model.apply(randomised(model, x), x)
  assert outputs['stage2/block0'].shape[-1] == 3 + 4
  np.testing.assert_array_equal(
    outputs['stage3/block0'][..., 4:11], outputs['stage2/block0'][:, ::2, ::2]
  )


@pytest.mark.parametrize('shortcut', 'AB')
@pytest.mark.parametrize('unit', ['stage1/block0', 'stage2/block0'])
def test_a_removed_branch_is_a_closed_gate(unit, shortcut, randomised):
  x = jax.random.normal(jax.random.key(0), (2, 8, 8, 3))
  model = resnet8(shortcut=shortcut)
  variables = randomised(model, x)
  stage, block = unit.split('/')
  gates = jax.tree.map(jnp.copy, variables['branches'])
  gates[stage][block]['branch'] = jnp.zeros(())
  closed = model.apply({**variables, 'branches': gates}, x)
  small = model.clone(arch={f'{unit}/branch': 0})
  params = jax.eval_shape(small.init, jax.random.key(0), x)['params']
  left = {'shortcut'} if shortcut == 'B' and stage == 'stage2' else set()
  assert set(params.get(stage, {}).get(block, {})) == left
  removed = small.apply(variables, x)
  for name in closed:
    np.testing.assert_array_equal(removed[name], closed[name])
  assert not np.array_equal(model.apply(variables, x)['main'], closed['main'])


def test_widths_that_do_not_meet_are_refused_also_where_they_would_broadcast():
  for width in (1, 3):
    model = resnet8(arch={'stage1/block0/conv2': width})
    with pytest.raises(ValueError, match=r'stage1/block0: the branch .* its shortcut'):
      jax.eval_shape(model.init, jax.random.key(0), jnp.ones((1, 8, 8, 1)))


def test_preactivation_normalises_before_it_convolves(randomised):
  """By the equations of the paper: stem, plain unit, resized unit, behind the last."""
  x = jax.random.normal(jax.random.key(0), (2, 8, 8, 3))
  model = ResNet(depth=14, width=4, preact=True)
  variables = randomised(model, x)
  outputs = jax.jit(model.apply)(variables, x)
  params = variables['params']

  def activated(x, *path):
    scale, bias, mean, var = (
      np.asarray(reduce(getitem, (*path, leaf), variables[kind]))
      for kind, leaves in (
        ('params', ['scale', 'bias']),
        ('batch_stats', ['mean', 'var']),
      )
      for leaf in leaves
    )
    return np.maximum((x - mean) / np.sqrt(var + 1e-5) * scale + bias, 0)

  def convolved(x, unit, i, stride=1):
    kernel = unit[f'conv{i}']['kernel']
    layer = conv(kernel.shape[-1], 3, stride, dtype=jnp.float32, name='conv')
    return np.asarray(layer.apply({'params': {'kernel': kernel}}, x))

  def unit(x, stage, block, stride=1):
    part, gate = (variables[k][stage][block] for k in ('params', 'branches'))
    kept = x
    if stride > 1 or 'norm1' in part:
      x = activated(x, stage, block, 'norm1')
    if stride > 1:  # the pad reads what is activated, too
      half = x.shape[-1] // 2
      kept = np.pad(x[:, ::stride, ::stride], ((0, 0),) * 3 + ((half, half),))
    y = activated(convolved(x, part, 1, stride), stage, block, 'norm2')
    return kept + gate['branch'] * convolved(y, part, 2)

  taps = {k: np.asarray(v) for k, v in outputs.items()}
  close = partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-3)
  close(unit(taps['stage1/block0'], 'stage1', 'block1'), taps['stage1/block1'])
  close(unit(taps['stage1/block1'], 'stage2', 'block0', 2), taps['stage2/block0'])
  last = activated(taps['stage3/block1'], 'norm').mean((1, 2))
  logits = last @ np.asarray(params['head']['kernel']) + params['head']['bias']
  close(logits, taps['main'])
  arrays = {kind: variables[kind]['stem'] for kind in ('params', 'batch_stats')}
  stem = ConvNorm(4).apply(arrays, x, False)
  assert 'norm1' not in params['stage1']['block0']
  close(unit(np.asarray(stem), 'stage1', 'block0'), taps['stage1/block0'])


@pytest.mark.parametrize(('name', 'size'), [('resnet110', 32), ('resnet34', 64)])
def test_preactivation_has_as_many_parameters(name, size):
  """Normalisations move, their number of channels does not."""

  def count(**fields):
    model = build(name, shortcut='A', **fields)
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.ones((1, size, size, 3)))
    return parameters(shapes['params'])

  assert count(preact=True) == count()


def test_impossible_depths_are_refused():
  for model, message in [
    (ResNet(depth=21), r'6n \+ 2 .* got 21; nearest is 20'),
    (ResNet(depth=21, bottleneck=True), r'9n \+ 2'),
    (ResNet(depth=20, imagenet=True), r'20 is none of \[18, 34'),
  ]:
    with pytest.raises(ValueError, match=message):
      jax.eval_shape(model.init, jax.random.key(0), jnp.ones((1, 8, 8, 1)))
