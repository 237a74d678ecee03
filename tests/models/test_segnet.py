"""The segmentation network: counts by hand, any size, skips, the head's squares."""

import jax
import numpy as np
import pytest

from depthprune.models import build
from depthprune.models.layers import ConvNorm
from depthprune.models.segnet import SegNet
from depthprune.program.coupling import couple
from depthprune.surgery.prune import prune
from tests import masking as m
from tests import zoo
from tests.models.test_resnet import macs, named, parameters

SMALL = SegNet(blocks=(1, 2, 1), width=4, classes=3)


def images(height, width, batch=2):
  return jax.random.normal(jax.random.key(0), (batch, height, width, 3))


def outputs_of(model, x):
  return jax.eval_shape(model.init_with_output, jax.random.key(0), x)


@pytest.mark.parametrize(('name', 'w'), [('segnet', 16), ('segnet8', 8)])
def test_parameters_and_macs_equal_hand_counts(name, w):
  """On CamVid's 180 × 240; stages 2 to 4 have 32 squares of their width each."""
  _, variables = outputs_of(build(name), images(8, 8))
  squares = 36 + 32 * (2**2 + 4**2 + 8**2) + (2 + 9) + (8 + 36) + (32 + 144)
  linear = 27 + 2 * (1 + 4 + 5 * (2 + 4 + 8) + 2 * (1 + 2 + 4))
  assert parameters(variables['params']) == squares * w**2 + linear * w + 44 * (w + 1)
  half, quarter, eighth, last = 90 * 120, 45 * 60, 23 * 30, 12 * 15
  encoder = 36 * half + 32 * (2**2 * quarter + 4**2 * eighth + 8**2 * last)
  decoder = (
    2 * quarter + 9 * half + 8 * eighth + 36 * quarter + 32 * last + 144 * eighth
  )
  x = images(180, 240, batch=1)
  jaxpr = jax.make_jaxpr(lambda v: named(name).apply(v, x)['main'])(variables)
  assert macs(jaxpr.jaxpr) == (encoder + decoder) * w**2 + (27 + 44) * w * half


@pytest.mark.parametrize('size', [(180, 240), (181, 239), (9, 11), (2, 5), (1, 1)])
def test_the_answer_has_the_size_of_the_image(size):
  outputs, _ = outputs_of(SMALL, images(*size))
  assert outputs['main'].shape == (2, *size, 3)
  half = tuple(-(-n // 2) for n in size)
  quarter = tuple(-(-n // 2) for n in half)
  assert outputs['up1'].shape == outputs['stage1/block0'].shape == (2, *half, 4)
  assert outputs['up2'].shape == outputs['stage2/block1'].shape == (2, *quarter, 8)


def test_what_comes_up_is_repeated_cropped_and_added_to_the_skip(randomised):
  x = images(9, 11)
  variables = randomised(SMALL, x)
  outputs = m.quick(SMALL.apply)(variables, x)

  def layer(name, x, width, size):
    arrays = {kind: variables[kind]['up2'][name] for kind in ('params', 'batch_stats')}
    return np.asarray(ConvNorm(width, size).apply(arrays, x, False))

  small = layer('reduce', outputs['stage3/block0'], 8, 1)
  skip = np.array(outputs['stage2/block1'])
  for i, j in np.ndindex(*skip.shape[1:3]):
    skip[:, i, j] += small[:, i // 2, j // 2]
  assert skip.shape == (2, 3, 3, 8) and small.shape == (2, 2, 2, 8)
  expected = layer('merge', skip, 8, 3)
  np.testing.assert_allclose(outputs['up2'], expected, rtol=1e-4, atol=1e-4)
  kernel, bias = (variables['params']['head'][leaf] for leaf in ('kernel', 'bias'))
  kernel, bias = np.reshape(kernel, (4, 2, 2, 3)), np.reshape(bias, (2, 2, 3))
  for i, j in np.ndindex(9, 11):
    logits = outputs['up1'][:, i // 2, j // 2] @ kernel[:, i % 2, j % 2]
    logits += bias[i % 2, j % 2]
    np.testing.assert_allclose(outputs['main'][:, i, j], logits, rtol=1e-4, atol=1e-4)


def test_a_cut_network_takes_images_of_any_size():
  """It was coupled and cut with images of another size."""
  x = zoo.image(2)
  variables = zoo.randomised(jax.eval_shape(SMALL.init, jax.random.key(0), x))
  coupling = couple(SMALL, variables, x)
  assert not [name for name, group in coupling.groups.items() if group.ungated]
  keep = m.random_keep(coupling, gated=True)
  pruned = prune(SMALL, variables, keep, x, coupling=coupling)
  odd = images(9, 11)
  ours, native = (
    m.quick(f)(pruned.variables, odd)['main']
    for f in (pruned.apply, pruned.model.apply)
  )
  masked = m.quick(SMALL.apply)(m.zeroed(coupling, variables, keep), odd)['main']
  assert ours.shape == (2, 9, 11, 3)
  np.testing.assert_array_equal(ours, native)
  assert m.difference(masked, ours) <= 1e-5


def test_a_decoder_that_does_not_meet_its_skip_is_refused():
  for width in (1, 3):
    model = SMALL.clone(arch={'up1/reduce/conv': width})
    with pytest.raises(
      ValueError, match=r'up1: the upsampled features have .* the skip'
    ):
      outputs_of(model, images(8, 8))
