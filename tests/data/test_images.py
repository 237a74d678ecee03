"""Data: splits that never move, batches that are a pure function of (key, step)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from depthprune.data import images, tfds
from depthprune.data.augment import measure_normalisation
from depthprune.data.dataset import epoch_steps
from depthprune.data.images import Augment, DataError, Normalisation

SPLITS = ('train', 'held_out', 'test')
PLAIN = Normalisation((0.0,), (1.0,), 1.0)


def numbered(n: int, side: int = 2) -> images.Split:
  """n images, each filled with its own number."""
  image = np.arange(n, dtype=np.uint8)[:, None, None, None]
  label = np.arange(n, dtype=np.int32)
  return {'image': np.broadcast_to(image, (n, side, side, 1)), 'label': label}


def fingerprints(split: images.Split) -> set[bytes]:
  return {image.tobytes() for image in split['image']}


def test_digits_have_three_splits_of_all_their_images():
  digits = images.load('digits')
  sizes = {s: len(getattr(digits, s)['label']) for s in SPLITS}
  assert sizes == {'train': 1214, 'held_out': 134, 'test': 449}
  assert sum(sizes.values()) == 1797
  assert (digits.classes, digits.shape) == (10, (8, 8, 1))
  everything = set().union(*(fingerprints(getattr(digits, s)) for s in SPLITS))
  assert len(everything) == 1797, 'no image is in two splits'
  for name in SPLITS:
    split = getattr(digits, name)
    assert split['image'].dtype == np.uint8 and split['label'].dtype == np.int32
    assert set(split['label']) == set(range(10))


def test_the_seed_moves_what_is_held_out_and_never_the_test_images():
  first, again, other = images.load(seed=0), images.load(seed=0), images.load(seed=1)
  for name in SPLITS:
    np.testing.assert_array_equal(
      getattr(first, name)['image'], getattr(again, name)['image']
    )
  np.testing.assert_array_equal(first.test['image'], other.test['image'])
  assert fingerprints(first.held_out) != fingerprints(other.held_out)
  assert not fingerprints(other.held_out) & fingerprints(other.test)


def test_subset_and_held_out_are_counted():
  few = images.load(subset=100, held_out=0)
  assert len(few.train['label']) == 100 and len(few.held_out['label']) == 0
  with pytest.raises(DataError, match='has 1348 images.*subset=1300'):
    images.load(subset=1300, held_out=49)
  with pytest.raises(DataError, match='subset at least 1'):
    images.load(subset=0)


def test_normalisation_is_that_of_the_training_images_alone():
  digits = images.load(subset=300)
  inputs = np.asarray(
    images.normalise(jnp.asarray(digits.train['image']), digits.normalisation)
  )
  assert inputs.dtype == np.float32
  np.testing.assert_allclose(inputs.mean(), 0, atol=1e-5)
  np.testing.assert_allclose(inputs.std(), 1, atol=1e-5)
  scaled = digits.train['image'] / 16.0
  np.testing.assert_allclose(digits.normalisation.mean, [scaled.mean()])
  np.testing.assert_allclose(digits.normalisation.std, [scaled.std()])


def test_a_channel_without_variance_is_left_alone():
  image = np.stack([np.full((2, 2), 51), np.eye(2) * 255], -1)[None].astype(np.uint8)
  by = measure_normalisation(image, 255.0)
  np.testing.assert_allclose((by.mean, by.std), ((0.2, 0.5), (1.0, 0.5)), rtol=1e-12)
  assert np.isfinite(images.normalise(jnp.asarray(image), by)).all()


def test_each_epoch_shows_every_image_once_in_its_own_order():
  split, key = numbered(12), jax.random.key(0)
  get = jax.jit(images.batch, static_argnums=(3, 4, 5))
  epochs = [
    [get(split, step, key, 4, PLAIN, Augment()) for step in range(start, start + 3)]
    for start in (0, 3)
  ]
  orders = [
    np.concatenate([b['label'] for b in batches]).tolist() for batches in epochs
  ]
  assert sorted(orders[0]) == sorted(orders[1]) == list(range(12))
  assert orders[0] != orders[1]
  for batch in epochs[0]:
    np.testing.assert_array_equal(batch['image'][:, 0, 0, 0], batch['label'])


def test_what_does_not_fill_a_batch_takes_its_turn_in_another_epoch():
  seen = set()
  for step in range(12):
    batch = images.batch(numbered(7), step, jax.random.key(0), 3, PLAIN)
    assert batch['label'].shape == (3,)
    seen |= set(batch['label'].tolist())
  assert seen == set(range(7))
  assert epoch_steps(numbered(7), 3) == 2
  for size in (0, 8):
    with pytest.raises(DataError, match=f'expected 1 to 7, .*got {size}'):
      images.batch(numbered(7), 0, jax.random.key(0), size, PLAIN)


def test_a_batch_is_a_pure_function_of_key_and_step():
  split, augment = numbered(16, side=4), Augment(1, True)
  get = jax.jit(images.batch, static_argnums=(3, 4, 5))
  one, two = (
    get(split, jnp.int32(5), jax.random.key(1), 4, PLAIN, augment) for _ in range(2)
  )
  np.testing.assert_array_equal(one['image'], two['image'])
  other = get(split, jnp.int32(5), jax.random.key(2), 4, PLAIN, augment)
  assert one['label'].tolist() != other['label'].tolist()


@pytest.mark.parametrize('augment', [Augment(0, True), Augment(2), Augment(1, True)])
def test_augmented_images_are_crops_and_mirror_images(augment):
  image = np.random.RandomState(0).randint(1, 255, (6, 4, 4, 3)).astype(np.uint8)
  pad = augment.pad
  padded = np.pad(image, ((0, 0), (pad, pad), (pad, pad), (0, 0)))
  possible = [
    {
      crop[:, ::way].tobytes()
      for top in range(2 * pad + 1)
      for left in range(2 * pad + 1)
      for way in ((1, -1) if augment.flip else (1,))
      for crop in [padded[i, top : top + 4, left : left + 4]]
    }
    for i in range(len(image))
  ]
  seen = [set() for _ in image]
  shown = jax.jit(images.crop_and_flip, static_argnums=2)
  for step in range(60):
    out = np.asarray(shown(jnp.asarray(image), jax.random.key(step), augment))
    assert out.dtype == np.uint8 and out.shape == image.shape
    for found, one in zip(seen, out, strict=True):
      found.add(one.tobytes())
  for found, allowed in zip(seen, possible, strict=True):
    assert found <= allowed and len(found) >= min(len(allowed), 14)


def test_images_of_one_batch_are_augmented_each_in_its_own_way():
  image = jnp.tile(jnp.arange(16, dtype=jnp.uint8).reshape(1, 4, 4, 1), (32, 1, 1, 1))
  out = np.asarray(images.crop_and_flip(image, jax.random.key(0), Augment(1, True)))
  assert len({one.tobytes() for one in out}) > 8


def test_evaluation_sees_every_image_once_and_pads_the_last_batch():
  batches = list(images.batches(numbered(7), 3, Normalisation((2.0,), (4.0,), 1.0)))
  assert [b['weight'].tolist() for b in batches] == [[1, 1, 1], [1, 1, 1], [1, 0, 0]]
  assert all(b['image'].shape == (3, 2, 2, 1) for b in batches)
  real = np.concatenate([b['label'][b['weight'] > 0] for b in batches])
  assert real.tolist() == list(range(7))
  np.testing.assert_array_equal(batches[1]['image'][:, 0, 0, 0], [0.25, 0.5, 0.75])
  assert list(images.batches(numbered(0), 3, PLAIN)) == []


def test_too_many_images_for_the_memory_are_refused_before_they_are_read(monkeypatch):
  huge = tfds.ImageSource(99, 0, (2**20, 2**20, 3), 2, 255.0, lambda *_: pytest.fail())
  monkeypatch.setattr(images, 'source', lambda *_: huge)
  with pytest.raises(DataError, match='GiB of images.*subset=N'):
    images.load('huge')
