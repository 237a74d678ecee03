"""Image classification data: read once into memory, batched and augmented inside jit.

`load` gives numpy arrays with deterministic splits; `batch` is a pure function of
(key, step), so a run that is stopped and resumed sees the same images; `batches` goes
through a split once, in order, for evaluation.
"""

import os
from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from depthprune.training import catalogue, splits
from depthprune.training.augment import Augment, Normalisation, augmented, normalise
from depthprune.training.catalogue import DataError, Split

Batch = dict[str, jax.Array]
"""{'image': float32 [batch, height, width, channels], 'label': int32 [batch]}, and in
evaluation 'weight': float32 [batch], 0 where the batch was padded."""

# A mirrored character is another one, or none.
_CHARACTERS = frozenset(
  ('digits', 'emnist', 'kmnist', 'mnist', 'mnist_corrupted', 'omniglot', 'svhn_cropped')
)


class Dataset(NamedTuple):
  """One data set in memory.

  `shape` is that of one image, (height, width, channels). `normalisation` was computed
  on `train` alone. `augment` is what is usual for such images.
  """

  name: str
  train: Split
  held_out: Split
  test: Split
  classes: int
  shape: tuple[int, int, int]
  normalisation: Normalisation
  augment: Augment

  def example(self) -> tuple[jax.Array, ...]:
    """One image of zeros, ([1, height, width, channels],)."""
    return (jnp.zeros((1, *self.shape), jnp.float32),)

  def sampler(self, key: jax.Array, size: int, augment: bool) -> 'Sampler':
    """(train, step) -> training batch; with `augment` as is usual for such images."""
    by = self.augment if augment else Augment()
    return Sampler(key, size, self.normalisation, by)

  def batches(self, split: Split, size: int) -> Iterator[Batch]:
    """All images of a split once, for evaluation."""
    return batches(split, size, self.normalisation)

  def on_device(self) -> Batch:
    """The training images, where the sampler reads them."""
    return jax.device_put(self.train)

  @property
  def notes(self) -> tuple[str, ...]:
    """What a reader of results must know: nothing, the images are as published."""
    return ()


def load(
  name: str = 'digits',
  seed: int = 0,
  held_out: int | None = None,
  subset: int | None = None,
  resize: int | None = None,
  download: bool = False,
) -> Dataset:
  """Reads a data set: 'digits', or any TFDS image classification set by its name.

  The test images are always the same: the set's own, or a fixed quarter where it has
  none. `seed` chooses the `held_out` images out of the training images (a tenth, 5000
  at most, unless given) and the `subset` that is trained on (all the others, unless
  given). Only chosen images are decoded. `resize` makes them square, with that side;
  `download` lets TFDS fetch a set that is not in TFDS_DATA_DIR.

  Raises DataError where the set is unknown, absent, not one of image classification,
  or too large for the memory of this machine.
  """
  source = catalogue.source(name, resize, download)
  sizes = source.train, source.test
  rows = splits.divide(name, sizes, seed, held_out, subset)
  count = sum(map(len, rows[:3]))
  _fits(name, count * int(np.prod(source.shape)))
  train = source.read('train', rows.train)
  return Dataset(
    name,
    train,
    source.read('train', rows.held_out),
    source.read(rows.of, rows.test),
    source.classes,
    source.shape,
    _normalisation(train['image'], source.scale),
    # An eighth of the side: 4 pixels of 32, 1 of 8.
    Augment(-(-source.shape[0] // 8), name.split(':')[0] not in _CHARACTERS),
  )


def _fits(name: str, size: int) -> None:
  memory = os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES')
  if size > memory // 2:
    raise DataError(
      f'data {name!r}: {size / 2**30:.0f} GiB of images, expected at most half of the '
      f'{memory / 2**30:.0f} GiB of this machine: pass subset=N or resize=SIDE'
    )


def _normalisation(image: np.ndarray, scale: float) -> Normalisation:
  """Mean and standard deviation per channel, exact: from counts of pixel values."""
  value = np.arange(256) / scale
  mean, std = [], []
  for channel in range(image.shape[-1]):
    share = np.bincount(image[..., channel].ravel(), minlength=256) / image[..., 0].size
    mean.append(float(share @ value))
    std.append(float(share @ (value - mean[-1]) ** 2) ** 0.5 or 1.0)
  return Normalisation(tuple(mean), tuple(std), scale)


def order(key: jax.Array, epoch: jax.Array | int, n: int) -> jax.Array:
  """The order of n images in an epoch, int32 [n]: a pure function of (key, epoch)."""
  # One sort of random bits; jax.random.permutation sorts twice.
  bits = jax.random.bits(jax.random.fold_in(key, epoch), (n,))
  return jnp.argsort(bits).astype(jnp.int32)


def epoch_steps(split: Split | Batch, size: int) -> int:
  """Batches of `size` in one epoch; what is left over takes its turn in another."""
  n = len(split['label'])
  if not 0 < size <= n:
    raise DataError(
      f'data: a batch has 1 to {n} examples, as many as there are: got {size}'
    )
  return n // size


def batch(
  split: Split | Batch,
  step: jax.Array | int,
  key: jax.Array,
  size: int,
  normalisation: Normalisation,
  augment: Augment = Augment(),
  ordered: jax.Array | None = None,
) -> Batch:
  """The training batch of a step: pure, to be called inside jit.

  `split` lives on the device; the key is the run's, the same in every step. Every
  epoch goes through the images in its own order. All of `size`, `normalisation` and
  `augment` are static. `ordered` is the order of the step's epoch, if it is known.
  """
  n = len(split['label'])
  steps = epoch_steps(split, size)
  ordering, augmenting = jax.random.split(key)
  step = jnp.asarray(step, jnp.int32)
  start = step % steps * size
  if ordered is None:
    ordered = order(ordering, step // steps, n)
  rows = jax.lax.dynamic_slice_in_dim(ordered, start, size)
  image = jnp.asarray(split['image'])[rows]
  image = augmented(image, jax.random.fold_in(augmenting, step), augment)
  return {
    'image': normalise(image, normalisation),
    'label': jnp.asarray(split['label'])[rows],
  }


class Sampler(NamedTuple):
  """batch_at(split, step): `batch` with all but these two given."""

  key: jax.Array
  size: int
  normalisation: Normalisation
  augment: Augment = Augment()

  def __call__(self, split: Split | Batch, step: jax.Array | int) -> Batch:
    return batch(split, step, *self)

  def stepwise(self) -> Callable[[Split | Batch, int], Batch]:
    """The same, compiled, for a loop on the host: one sort per epoch, not per step."""
    one = jax.jit(lambda split, step, ordered: batch(split, step, *self, ordered))
    ordering, _ = jax.random.split(self.key)
    found: dict[int, jax.Array] = {}

    def batch_at(split, step):
      epoch = step // epoch_steps(split, self.size)
      if epoch not in found:
        found.clear()
        found[epoch] = order(ordering, epoch, len(split['label']))
      return one(split, step, found[epoch])

    return batch_at


def batches(split: Split, size: int, normalisation: Normalisation) -> Iterator[Batch]:
  """All images once, in order, for evaluation.

  Every batch has `size` rows, so that one compilation serves them all: the last is
  padded, with 'weight' 0 on the padding and 1 elsewhere.
  """
  for start in range(0, len(split['label']), size):
    image = split['image'][start : start + size]
    label = split['label'][start : start + size]
    missing = size - len(label)
    yield {
      'image': normalise(
        jnp.pad(jnp.asarray(image), ((0, missing), (0, 0), (0, 0), (0, 0))),
        normalisation,
      ),
      'label': jnp.pad(jnp.asarray(label), (0, missing)),
      'weight': (jnp.arange(size) < len(label)).astype(jnp.float32),
    }
