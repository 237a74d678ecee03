"""MobileNetV2: published counts, strides, rounded widths, removed units."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from depthprune.models import build
from depthprune.models.mobilenet import MobileNetV2, rounded
from tests.models.test_resnet import macs, named, parameters

X = jax.random.normal(jax.random.key(0), (2, 8, 8, 3))


@pytest.mark.parametrize(
  ('name', 'width', 'size', 'expected', 'millions'),
  [  # torchvision's counts; CIFAR by hand from the first one
    ('mobilenet_v2_imagenet', 1.0, 224, 3_504_872, 300.77),
    ('mobilenet_v2_imagenet', 0.5, 224, 1_968_680, 97.13),
    ('mobilenet_v2_imagenet', 1.4, 224, 6_108_776, 582.20),
    ('mobilenet_v2', 1.0, 32, 3_504_872 - 1281 * 990, 87.98),
  ],
)
def test_parameters_and_macs_equal_the_published_counts(
  name, width, size, expected, millions
):
  model, x = build(name, width=width), jnp.ones((1, size, size, 3))
  variables = jax.eval_shape(model.init, jax.random.key(0), x)
  assert parameters(variables['params']) == expected
  jaxpr = jax.make_jaxpr(lambda v: named(name, width=width).apply(v, x)['main'])(
    variables
  )
  assert macs(jaxpr.jaxpr) / 1e6 == pytest.approx(millions, abs=0.005)


def test_parameters_of_a_thin_network_by_hand():
  """Everything is 8 wide but for the 1280 in front of the head, and 48 inside."""
  model = MobileNetV2(blocks=(1, 2), width=0.1, classes=5)
  first = (9 * 8 + 2 * 8) + (8 * 8 + 2 * 8)
  unit = (8 * 48 + 2 * 48) + (9 * 48 + 2 * 48) + (48 * 8 + 2 * 8)
  ends = (27 * 8 + 2 * 8) + (8 * 1280 + 2 * 1280) + 1281 * 5
  shapes = jax.eval_shape(model.init, jax.random.key(0), X)
  assert parameters(shapes['params']) == ends + first + 2 * unit


def test_units_have_a_gate_where_the_shortcut_is_the_identity():
  gated = lambda model: [key for key in model.widths if key.endswith('branch')]
  assert len(gated(MobileNetV2())) == 10
  assert gated(MobileNetV2(blocks=(1, 3), width=0.5)) == [
    'stage2/block1/branch', 'stage2/block2/branch'
  ]  # fmt: skip


@pytest.mark.parametrize(
  ('imagenet', 'sizes'),
  [(True, [32, 16, 8, 4, 4, 2, 2]), (False, [64, 64, 32, 16, 16, 8, 8])],
)
def test_where_the_resolution_halves(imagenet, sizes):
  model = MobileNetV2(imagenet=imagenet)
  outputs, _ = jax.eval_shape(
    model.init_with_output, jax.random.key(0), jnp.ones((1, 64, 64, 3))
  )
  assert [outputs[f'stage{i}/block0'].shape[1] for i in range(1, 8)] == sizes
  widths = [outputs[tap].shape[-1] for tap in ('stage7/block0', 'last')]
  assert widths == [320, 1280]


def test_widths_are_multiples_of_8_and_lose_no_tenth():
  assert [rounded(n) for n in (1, 8, 11.9, 12, 16.8, 33.6, 44.8)] == [
    8, 8, 16, 16, 16, 32, 48
  ]  # fmt: skip
  assert MobileNetV2(width=0.35).widths['last/conv'] == 1280
  assert MobileNetV2(width=1.4).widths['last/conv'] == 1792


def test_a_unit_is_a_linear_bottleneck_behind_relu6(randomised):
  """By the equations: what is inside ends at 6, what is added up is not rectified."""
  model = MobileNetV2(blocks=(1, 2), width=0.1)
  variables = randomised(model, X)
  variables['batch_stats'] = jax.tree.map(jnp.ones_like, variables['batch_stats'])
  outputs = jax.jit(model.apply)(variables, X)
  part = jax.tree.map(np.asarray, variables['params']['stage2']['block1'])

  def normalised(x, layer):
    scale, bias = (part[layer]['norm'][leaf] for leaf in ('scale', 'bias'))
    return (x - 1) / np.sqrt(1 + 1e-5) * scale + bias

  def around(x, i, j):
    return np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))[:, i : i + 8, j : j + 8]

  before = np.asarray(outputs['stage2/block0'])
  x = before @ part['expand']['conv']['kernel'][0, 0]
  x = np.clip(normalised(x, 'expand'), 0, 6)
  kernel = part['depthwise']['conv']['kernel'][:, :, 0]
  x = sum(around(x, i, j) * kernel[i, j] for i in range(3) for j in range(3))
  x = np.clip(normalised(x, 'depthwise'), 0, 6)
  assert (x == 6).any() and (x == 0).any()
  x = normalised(x @ part['project']['conv']['kernel'][0, 0], 'project')
  gate = variables['branches']['stage2']['block1']['branch']
  after = before + np.asarray(gate) * x
  assert (after < 0).any()
  np.testing.assert_allclose(outputs['stage2/block1'], after, rtol=1e-4, atol=1e-4)


def test_a_depthwise_width_other_than_what_it_reads_is_refused():
  for width in (4, 6):
    model = MobileNetV2(blocks=(1, 1), width=0.1, arch={'stem/conv': 3})
    arch = {**model.arch, 'stage1/block0/depthwise/conv': width}
    with pytest.raises(ValueError, match=rf'stage1/block0/depthwise: .* {width} .* 3 '):
      jax.eval_shape(model.clone(arch=arch).init, jax.random.key(0), X)
