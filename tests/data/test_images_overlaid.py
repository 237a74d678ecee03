"""Multi-Fashion: the right halves, always the same, and never across splits."""

import dataclasses

import jax
import numpy as np
import pytest

from depthprune.data import images as data
from depthprune.data import images as overlaid
from depthprune.data.dataset import DataError
from depthprune.data.tfds import ImageSource
from depthprune.run import data as datasets
from depthprune.run import rounds
from depthprune.run.config import default
from depthprune.train import task as tasks
from depthprune.train.result import to_json


def pieces(n: int = 40) -> ImageSource:
  """n images with their number in every pixel; labels are their numbers too."""

  def read(split, rows):
    image = np.broadcast_to(rows[:, None, None, None] + 1, (len(rows), 28, 28, 1))
    return {'image': image.astype(np.uint8), 'label': rows.astype(np.int32)}

  return ImageSource(n, 10, (28, 28, 1), 40, 255.0, read)


def test_halves_lie_where_their_labels_say():
  rows = np.arange(3, 20)
  found = overlaid.overlaid(pieces()).read('train', rows)
  image, label = found['image'][..., 0], found['label']
  assert image.shape == (17, 36, 36) and label.shape == (17, 2)
  assert label.dtype == np.int32 and image.dtype == np.uint8
  np.testing.assert_array_equal(image[:, 0, 0], label[:, 0] + 1)
  np.testing.assert_array_equal(image[:, 35, 35], label[:, 1] + 1)
  assert (image[:, 0, 35] == 0).all() and (image[:, 35, 0] == 0).all()
  np.testing.assert_array_equal(image[:, 18, 18], label.max(1) + 1)
  # Each of the rows once on the left and once on the right, and never over itself.
  np.testing.assert_array_equal(label[:, 0], rows)
  assert sorted(label[:, 1]) == rows.tolist() and (label[:, 0] != label[:, 1]).all()


@pytest.mark.parametrize('n', [0, 1, 2, 7])
def test_pairs_are_one_circle_and_always_the_same(n):
  partner = overlaid.pairs(n)
  assert sorted(partner) == list(range(n))
  np.testing.assert_array_equal(partner, overlaid.pairs(n))
  at, seen = 0, set()
  while n and at not in seen:
    seen.add(at)
    at = partner[at]
  assert len(seen) == n
  few = overlaid.overlaid(pieces(), resize=18).read('train', np.arange(n))
  assert few['image'].shape == (n, 18, 18, 1)


def test_it_is_made_of_fashion_mnist_within_every_split(tfds_data):
  found = data.load('multi_fashion', subset=60, held_out=20)
  same = data.load('multi_fashion', subset=60, held_out=20)
  plain = data.load('fashion_mnist', subset=60, held_out=20)
  assert found.tasks == ('left', 'right') and found.classes == 10
  assert found.shape == (36, 36, 1) and not found.augment.flip
  for name in ('train', 'held_out', 'test'):
    mine, theirs = getattr(found, name), getattr(plain, name)
    partner = overlaid.pairs(len(theirs['label']))
    np.testing.assert_array_equal(mine['label'][:, 0], theirs['label'])
    np.testing.assert_array_equal(mine['label'][:, 1], theirs['label'][partner])
    corner = mine['image'][:, :8, :8]
    np.testing.assert_array_equal(corner, theirs['image'][:, :8, :8])
    corner = mine['image'][:, 28:, 28:]
    np.testing.assert_array_equal(corner, theirs['image'][partner][:, 20:, 20:])
    np.testing.assert_array_equal(mine['image'], getattr(same, name)['image'])


def test_a_cascade_of_two_labels_is_refused(tfds_data, tmp_path):
  config = dataclasses.replace(
    default('sidenet'), data='multi_fashion', subset=30, workdir=str(tmp_path)
  )
  with pytest.raises(
    DataError, match='several tasks .left, right.: expected the method'
  ):
    to_json(rounds.run(config, show=False))


def test_a_config_names_it_and_its_task_has_both(tfds_data):
  images = datasets.read(default('gates', data='multi_fashion', subset=30))
  task = tasks.task_of(images)
  batch = next(images.batches(images.train, 16))
  assert batch['label'].shape == (16, 2)
  logits = {name: jax.numpy.zeros((16, 10)) for name in images.tasks}
  assert {*task.metrics(logits, batch)} >= {'accuracy_left', 'accuracy_right'}
  with pytest.raises(ValueError, match='each of left, right, got main'):
    task.answer({'main': logits['left']})
