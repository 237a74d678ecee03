"""Images and their classes: read once into memory, batched and augmented inside jit.

What does not fit there is `streamed`.

`load` gives numpy arrays with deterministic splits; `batch` is a pure function of
(key, step), so a run that is stopped and resumed sees the same images; `batches` goes
through a split once, in order, for evaluation.
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from depthprune.data import dataset, masks, streaming
from depthprune.data.augment import (
  Augment,
  Normalisation,
  augmented,
  measured,
  mixed,
  normalise,
  usual,
)
from depthprune.data.dataset import (
  HERE,
  Batch,
  DataError,
  Placement,
  Split,
  epoch_steps,
  shuffled,
)
from depthprune.data.tfds import (
  BLOCK,
  ImageSource,
  Records,
  find,
  one_shape,
  open_split,
  sized,
  tested,
)

NAME, OF = 'multi_fashion', 'fashion_mnist'
TASKS = 'left', 'right'  # the columns of the labels
SIDE, PIECE = 36, 28  # of the canvas, and of what lies in two of its corners


def overlaid(pieces: ImageSource, resize: int | None = None) -> ImageSource:
  """Images [n, 36, 36, 1] and labels int32 [n, 2] of a source of images [n, 28, 28, 1].

  Pairs are made among the rows that are read together, always the same for as many:
  training images lie over training images, held-out over held-out ones.
  """

  def read(split, rows):
    found = pieces.read(split, rows)
    partner = pairs(len(rows))
    image = overlay(found['image'], found['image'][partner])
    if resize is not None:
      small = [sized(one, resize) for one in image]
      image = np.array(small, np.uint8).reshape(-1, resize, resize, 1)
    label = np.stack([found['label'], found['label'][partner]], axis=1)
    return {'image': image, 'label': label}

  side = resize or SIDE
  return pieces._replace(shape=(side, side, 1), read=read, tasks=TASKS, records=None)


def tasks(name: str) -> tuple[str, ...]:
  """The tasks of the data set of that name, () where it has but one."""
  return TASKS if name == NAME else ()


def pairs(n: int) -> np.ndarray:
  """[n]: which image lies over each; all in one circle, so that none is over itself."""
  # RandomState, because its streams are frozen for all versions of numpy.
  circle = np.random.RandomState(0).permutation(n)
  partner = np.empty(n, np.int64)
  partner[circle] = np.roll(circle, -1)
  return partner


def overlay(left: np.ndarray, right: np.ndarray) -> np.ndarray:
  """The brighter pixel of two images [n, 28, 28, 1], on a canvas [n, 36, 36, 1]."""
  canvas = np.zeros((len(left), SIDE, SIDE, 1), left.dtype)
  canvas[:, :PIECE, :PIECE] = left
  corner = canvas[:, -PIECE:, -PIECE:]
  np.maximum(corner, right, out=corner)
  return canvas


def source(name: str, resize: int | None = None, download: bool = False) -> ImageSource:
  """The data set called `name`: 'digits', or anything TFDS has in TFDS_DATA_DIR.

  'multi_fashion' is made of fashion_mnist, and where a set has masks every pixel has
  a class.

  Raises DataError for a name nobody knows, a set that is not prepared on this machine,
  and a set without images or without classes.
  """
  if name == 'digits':
    return _digits()
  if name == NAME:
    pieces = _tfds(OF, find(OF, download), None)
    return overlaid(pieces, resize)
  builder = find(name, download)
  if found := masks.keys(builder):
    return masks.source(name, builder, *found, resize)
  return _tfds(name, builder, resize)


def _digits() -> ImageSource:
  from sklearn.datasets import load_digits

  digits: Any = load_digits()
  image = digits.images[..., None].astype(np.uint8)  # [1797, 8, 8, 1], 0 to 16
  label = digits.target.astype(np.int32)

  def read(split, rows):
    return {'image': image[rows], 'label': label[rows]}

  return ImageSource(len(label), 0, image.shape[1:], 10, 16.0, read)


def _tfds(name: str, builder: Any, resize: int | None) -> ImageSource:
  image_key, label_key = _keys(name, builder)
  shape = one_shape(name, builder.info.features[image_key].shape, resize)
  opened = {split: open_split(name, builder, split) for split in builder.info.splits}
  if 'train' not in opened:
    raise DataError(f"data {name!r}: expected a split 'train', got {[*opened]}")
  splits = {'train': opened['train']}
  test = tested(opened, label_key)
  if test:
    splits['test'] = opened[test]

  def read(split, rows):
    image = np.empty((len(rows), *shape), np.uint8)
    label = np.empty(len(rows), np.int32)
    for start in range(0, len(rows), BLOCK):
      records = splits[split].__getitems__(rows[start : start + BLOCK].tolist())
      for i, record in enumerate(records, start):
        image[i] = sized(record[image_key], resize)
        label[i] = record[label_key]
    return {'image': image, 'label': label}

  def records():
    raw = lambda split: open_split(name, builder, split, (image_key,)) if split else ()
    return Records(raw('train'), raw(test), image_key, label_key)

  classes = builder.info.features[label_key].num_classes
  sizes = len(splits['train']), len(splits.get('test', ()))
  return ImageSource(*sizes, shape, classes, 255.0, read, records=records)


def _keys(name: str, builder: Any) -> tuple[str, str]:
  """The names of the image and of the class among the features."""
  import tensorflow_datasets as tfds

  features = dict(builder.info.features)
  images = [k for k, f in features.items() if isinstance(f, tfds.features.Image)]
  labels = [k for k, f in features.items() if isinstance(f, tfds.features.ClassLabel)]
  first = (*images, '')[0], (*labels, '')[0]
  image, label, *_ = builder.info.supervised_keys or first
  if image not in images or label not in labels or features[image].np_dtype != np.uint8:
    raise DataError(
      f'data {name!r}: expected an 8-bit image and a class to tell from it, or a mask '
      f'with one for every pixel, got {features}'
    )
  return image, label


class ImageSet(NamedTuple):
  """A `Dataset` of images in memory.

  Attributes:
    shape: of one image, (height, width, channels).
    normalisation: computed on `train` alone, or what pretrained weights want.
    augment: what is usual for such images. The others are those of `Dataset`.
  """

  name: str
  train: Split
  held_out: Split
  test: Split
  classes: int
  shape: tuple[int, int, int]
  normalisation: Normalisation
  augment: Augment
  ignore: int | None = None
  names: tuple[str, ...] = ()
  tasks: tuple[str, ...] = ()
  notes: tuple[str, ...] = ()

  tokenizer = None
  augments = True
  streamed = False

  def example(self) -> tuple[jax.Array, ...]:
    """One image of zeros, ([1, height, width, channels],)."""
    return (jnp.zeros((1, *self.shape), jnp.float32),)

  def sampler(self, key: jax.Array, size: int, augment: bool) -> 'ImageSampler':
    """(train, step) -> training batch; with `augment` as is usual for such images."""
    by = self.augment if augment else Augment()
    return ImageSampler(key, size, self.normalisation, by)

  def batches(
    self, split: Split, size: int, place: Placement = HERE
  ) -> Iterator[Batch]:
    """All images of a split once, for evaluation."""
    return map(place.whole, batches(split, size, self.normalisation))

  def on_device(self, put: Callable[[Split], Batch] = jax.device_put) -> Batch:
    """The training images, where the sampler reads them."""
    return put(self.train)

  def probe(self) -> dict[str, Split]:
    """All arrays."""
    return {'train': self.train, 'held_out': self.held_out, 'test': self.test}


def load(
  name: str = 'digits',
  seed: int = 0,
  held_out: int | None = None,
  subset: int | None = None,
  resize: int | None = None,
  download: bool = False,
  stream: bool | None = None,
  normalisation: Normalisation | None = None,
  mixup: float = 0.0,
  randaugment: int = 0,
  workers: int = 0,
) -> 'ImageSet | streaming.StreamedImages':
  """Reads a data set: 'digits', 'multi_fashion', or any TFDS set of images by its name,
  which have a class each, or a mask with one for every pixel.

  The test images are always the same: the set's own, or a fixed quarter where it has
  none. `seed` chooses the `held_out` images out of the training images (a tenth, 5000
  at most, unless given) and the `subset` that is trained on (all the others, unless
  given). Where a set with masks has a test and a validation split, the latter is held
  out. Only chosen images are decoded. `resize` makes them square, with that side;
  `download` lets TFDS fetch a set that is not in TFDS_DATA_DIR.

  What would take more than half of the memory of this machine is streamed, which is
  read as it is needed; `stream` says so, or that it must not be. `normalisation`: what
  weights were trained on, instead of that of the training images.

  mixup blends images in pairs, by shares from Beta(mixup, mixup); randaugment is a
  magnitude from 1 to 30, of images that are streamed; 0 is none of them. `workers` are
  processes that read what is streamed.

  Raises DataError where the set is unknown, absent, without classes to tell from its
  images, or too large for the memory and not to be streamed; and for augmentation that
  is not for such images.
  """
  found = source(name, resize, download)
  sizes = found.train, found.test
  own = found.validation
  rows = dataset.divide(name, sizes, seed, held_out, subset, validation=own)
  size = sum(map(len, rows[:3])) * int(np.prod(found.shape))
  if _streams(name, found, size, stream):
    by = usual(name, found)._replace(mixup=mixup, randaugment=randaugment)
    return streaming.streamed(name, found, rows, by, normalisation, workers)
  if randaugment:
    raise DataError(
      f'data {name!r}: randaugment is for images that are streamed, these are '
      'in memory: leave it out, or pass --stream always'
    )
  if mixup and (found.tasks or found.ignore is not None):
    raise DataError(
      f'data {name!r}: mixup is for images with one class each: leave it out'
    )
  parts = {
    'train': found.read('train', rows.train),
    'held_out': found.read(rows.held_of, rows.held_out),
    'test': found.read(rows.of, rows.test),
  }
  classes, notes = found.classes, ()
  if found.ignore is not None:
    classes = classes or masks.highest(list(parts.values()), found.ignore)
    notes = masks.notes(parts, classes, found)
  return ImageSet(
    name,
    **parts,
    classes=classes,
    shape=found.shape,
    normalisation=normalisation or measured(parts['train']['image'], found.scale),
    augment=usual(name, found)._replace(mixup=mixup),
    ignore=found.ignore,
    names=found.names,
    tasks=found.tasks,
    notes=notes,
  )


def _streams(name: str, source: ImageSource, size: int, asked: bool | None) -> bool:
  memory = min(dataset.of_process(), dataset.of_device())
  large = size > memory // 2
  if (asked or (large and asked is None)) and source.records is not None:
    return True
  if asked:
    raise DataError(
      f'data {name!r}: expected a TFDS set of images with a class each to be streamed: '
      'leave stream out'
    )
  if large:
    raise DataError(
      f'data {name!r}: {size / 2**30:.0f} GiB of images, expected at most half of the '
      f'{memory / 2**30:.0f} GiB that are there: pass subset=N or resize=SIDE'
    )
  return False


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
    ordered = shuffled(ordering, step // steps, n)
  rows = jax.lax.dynamic_slice_in_dim(ordered, start, size)
  image, label = jnp.asarray(split['image'])[rows], jnp.asarray(split['label'])[rows]
  way = jax.random.fold_in(augmenting, step)
  image = augmented(image, way, augment)
  if augment.ignore is not None:
    label = augmented(label[..., None], way, augment, augment.ignore)[..., 0]
  found = {'image': normalise(image, normalisation), 'label': label.astype(jnp.int32)}
  return mixed(found, jax.random.fold_in(way, 0), augment.mixup)


class ImageSampler(NamedTuple):
  """batch_at(split, step): `batch` with all its other arguments filled in."""

  key: jax.Array
  size: int
  normalisation: Normalisation
  augment: Augment = Augment()

  def __call__(self, split: Split | Batch, step: jax.Array | int) -> Batch:
    return batch(split, step, *self)

  @property
  def on_host(self) -> bool:
    return False

  def stepwise(self, place: Placement = HERE) -> Callable[[Split | Batch, int], Batch]:
    """The same, compiled, for a loop on the host: one sort per epoch, not per step."""
    one = jax.jit(
      lambda split, step, ordered: place.whole(batch(split, step, *self, ordered))
    )
    ordering, _ = jax.random.split(self.key)
    found: dict[int, jax.Array] = {}

    def batch_at(split, step):
      epoch = step // epoch_steps(split, self.size)
      if epoch not in found:
        found.clear()
        found[epoch] = shuffled(ordering, epoch, len(split['label']))
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
    padded = lambda x: jnp.pad(x, ((0, missing), *((0, 0),) * (x.ndim - 1)))  # noqa: B023
    yield {
      'image': normalise(padded(jnp.asarray(image)), normalisation),
      'label': padded(jnp.asarray(label)).astype(jnp.int32),
      'weight': (jnp.arange(size) < len(label)).astype(jnp.float32),
    }
