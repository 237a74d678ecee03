import jax.numpy as jnp
import numpy as np
import pytest

from depthprune.train.evaluate import evaluate
from depthprune.train.task import classification

TASK = classification(2)
IMAGES = np.asarray([[2.0, 0.0], [0.0, 1.0], [3.0, 1.0]], np.float32)


def batches():
  """Three images in batches of two; the padding is far from right."""
  yield {'image': IMAGES[:2], 'label': np.asarray([0, 1]), 'weight': np.ones(2, 'f4')}
  yield {
    'image': np.stack([IMAGES[2], 100 * IMAGES[2]]),
    'label': np.asarray([1, 1]),
    'weight': np.asarray([1, 0], 'f4'),
  }


def apply(variables, image, train):
  assert not train
  return image * variables['scale']


def test_means_over_examples_not_over_batches():
  found = evaluate(apply, {'scale': jnp.ones(2)}, batches(), TASK)
  losses = [np.log1p(np.exp(-2.0)), np.log1p(np.exp(-1.0)), np.log1p(np.exp(2.0))]
  assert found['accuracy'] == pytest.approx(2 / 3, rel=1e-6)
  assert found['loss'] == pytest.approx(np.mean(losses), rel=1e-5)


def test_an_empty_split_is_an_error():
  with pytest.raises(ValueError, match='at least one batch'):
    evaluate(apply, {'scale': jnp.ones(2)}, [], TASK)
