"""Image data sets: which there are, how they are read, split and batched.

`load` reads a data set by name, into memory or, where it is too large, as
`streaming.StreamedImages`. An `ImageSet` is in memory: its training batches are a pure
function of (key, step) inside jit, so a resumed run sees the same images. The set
'multi_fashion', two fashion_mnist images in one and two tasks, is made here.
"""

import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from depthprune.data import dataset, labels, masks, streaming
from depthprune.data.augment import (
  Augment,
  Normalisation,
  crop_and_flip,
  default_augment,
  measure_normalisation,
  mixup,
  normalise,
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
  ImageSource,
  Records,
  decoded,
  find,
  one_shape,
  open_split,
  open_splits,
  sized,
  tested,
)


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
  """Reads a data set of images with one class each, or with one class per pixel.

  The test images are always the same: the set's own, or a fixed quarter of the training
  images where it has none. Only the images that are chosen are decoded.

  Args:
    name: 'digits', 'multi_fashion', or the name of any TFDS set of images.
    seed: chooses the held-out images and the subset out of the training images.
    held_out: number of held-out images; None takes a tenth of the training images, at
      most 5000. A set with masks and a validation split holds that out instead.
    subset: number of images to train on; None takes all that are left.
    resize: side in pixels of the square that images are scaled and cropped to.
    download: whether TFDS may fetch a set that is not in TFDS_DATA_DIR.
    stream: whether images are read from disk as they are needed; None streams a set
      that would take more than half of the memory.
    normalisation: the one that weights were trained with; None measures it on the
      training images.
    mixup: images are blended in pairs, by shares from Beta(mixup, mixup); 0 for none.
    randaugment: magnitude of RandAugment, 1 to 30, for streamed images; 0 for none.
    workers: processes that read streamed images; 0 uses threads of this one.

  Raises:
    DataError: the set is unknown, absent, of another kind, or too large for the memory
      and cannot be streamed; or the augmentation does not suit its images.
  """
  how = stream, normalisation, mixup, randaugment, workers
  return divided(name, source(name, resize, download), seed, held_out, subset, *how)


def divided(
  name: str,
  stored: ImageSource,
  seed: int = 0,
  held_out: int | None = None,
  subset: int | None = None,
  stream: bool | None = None,
  normalisation: Normalisation | None = None,
  mixup: float = 0.0,
  randaugment: int = 0,
  workers: int = 0,
) -> 'ImageSet | streaming.StreamedImages':
  """Divides and reads a source of images; all else is as for `load`."""
  rows = dataset.divide(
    name,
    (stored.train, stored.test),
    seed,
    held_out,
    subset,
    validation=stored.validation,
  )
  augment = default_augment(name, stored)._replace(mixup=mixup, randaugment=randaugment)
  size = sum(map(len, rows[:3])) * int(np.prod(stored.shape))
  if _streams(name, stored, size, stream):
    return streaming.streamed(name, stored, rows, augment, normalisation, workers)
  if randaugment:
    raise DataError(
      f'data {name!r}: randaugment is for images that are streamed, these are '
      'in memory: leave it out, or pass --stream always'
    )
  if mixup and (stored.tasks or stored.ignore is not None):
    raise DataError(
      f'data {name!r}: mixup is for images with one class each: leave it out'
    )
  parts = {
    'train': stored.read('train', rows.train),
    'held_out': stored.read(rows.held_of, rows.held_out),
    'test': stored.read(rows.of, rows.test),
  }
  classes, notes = stored.classes, stored.notes
  if stored.ignore is not None:
    classes = classes or masks.highest(list(parts.values()), stored.ignore)
    notes = masks.notes(parts, classes, stored)
  elif not stored.tasks:
    notes += labels.untrained(stored.names, classes, parts['train']['label'])
  if normalisation is None:
    normalisation = measure_normalisation(parts['train']['image'], stored.scale)
  return ImageSet(
    name,
    **parts,
    classes=classes,
    shape=stored.shape,
    normalisation=normalisation,
    augment=augment,
    ignore=stored.ignore,
    names=stored.names,
    tasks=stored.tasks,
    notes=notes,
  )


def _streams(name: str, source: ImageSource, size: int, asked: bool | None) -> bool:
  """Decides whether images that take `size` bytes are streamed."""
  memory = min(dataset.memory_of_process(), dataset.memory_of_device())
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


def source(name: str, resize: int | None = None, download: bool = False) -> ImageSource:
  """Returns a data set before it is read: what it holds and how to read its rows.

  Args:
    name: 'digits', 'multi_fashion', or a TFDS set that is prepared in TFDS_DATA_DIR.
    resize: side in pixels of the square that images are scaled and cropped to.
    download: whether TFDS may fetch a set that is not on this machine.

  Raises:
    DataError: the name is unknown, or the set is not on this machine, or has no images
      or no classes.
  """
  if name == 'digits':
    return _digits()
  if name == NAME:
    return overlaid(_tfds(OF, find(OF, download), None), resize)
  builder = find(name, download)
  if keys := masks.keys(builder):
    return masks.source(name, builder, *keys, resize)
  return _tfds(name, builder, resize)


def _digits() -> ImageSource:
  from sklearn.datasets import load_digits

  digits: Any = load_digits()
  image = digits.images[..., None].astype(np.uint8)  # [1797, 8, 8, 1], 0 to 16
  label = digits.target.astype(np.int32)
  read = lambda split, rows: {'image': image[rows], 'label': label[rows]}
  return ImageSource(len(label), 0, image.shape[1:], 10, 16.0, read)


def _tfds(name: str, builder: Any, resize: int | None) -> ImageSource:
  image_key, label_key = _keys(name, builder)
  shape = one_shape(name, builder.info.features[image_key].shape, resize)
  opened = open_splits(name, builder)
  splits = {'train': opened['train']}
  test = tested(opened, label_key)
  if test:
    splits['test'] = opened[test]

  def read(split, rows):
    image = np.empty((len(rows), *shape), np.uint8)
    label = np.empty(len(rows), np.int32)
    for i, record in enumerate(decoded(splits[split], rows)):
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
  """Returns the names of the features that are the image and its class."""
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
    shape: (height, width, channels) of an image, or (features,) of rows of numbers.
    normalisation: measured on `train`, or the one that pretrained weights need.
    augment: how training images are augmented, where that is asked for.

  All other attributes are those of `Dataset`.
  """

  name: str
  train: Split
  held_out: Split
  test: Split
  classes: int
  shape: tuple[int, ...]
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
    """Returns one image of zeros, ([1, height, width, channels],)."""
    return (jnp.zeros((1, *self.shape), jnp.float32),)

  def sampler(self, key: jax.Array, size: int, augment: bool) -> 'ImageSampler':
    """Returns the sampler of training batches of `size` images."""
    by = self.augment if augment else Augment()
    return ImageSampler(key, size, self.normalisation, by)

  def batches(
    self, split: Split, size: int, place: Placement = HERE
  ) -> Iterator[Batch]:
    """Yields all images of a split once, in order, for evaluation."""
    return map(place.whole, batches(split, size, self.normalisation))

  def on_device(self, put: Callable[[Split], Batch] = jax.device_put) -> Batch:
    """Returns the training split on the device."""
    return put(self.train)

  def probe(self) -> dict[str, Split]:
    """Returns all arrays."""
    return {'train': self.train, 'held_out': self.held_out, 'test': self.test}


def batch(
  split: Split | Batch,
  step: jax.Array | int,
  key: jax.Array,
  size: int,
  normalisation: Normalisation,
  augment: Augment = Augment(),
  ordered: jax.Array | None = None,
) -> Batch:
  """Returns the training batch of a step, inside jit.

  Args:
    split: the training split, on the device.
    step: number of the step; every epoch goes through the images in a new order.
    key: random key, the same for all steps.
    size: images in a batch.
    normalisation: of the pixels.
    augment: random changes of the images.
    ordered: the order of the step's epoch, int32 [n], where the caller has it.
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
  image = crop_and_flip(image, way, augment)
  if augment.ignore is not None:
    label = crop_and_flip(label[..., None], way, augment, augment.ignore)[..., 0]
  made = {'image': normalise(image, normalisation), 'label': label.astype(jnp.int32)}
  return mixup(made, jax.random.fold_in(way, 0), augment.mixup)


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
    """Returns the same function, compiled, which shuffles once per epoch."""
    make = jax.jit(
      lambda split, step, ordered: place.whole(batch(split, step, *self, ordered))
    )
    ordering, _ = jax.random.split(self.key)
    order_of = functools.lru_cache(1)(functools.partial(shuffled, ordering))

    def batch_at(split, step):
      epoch = step // epoch_steps(split, self.size)
      return make(split, step, order_of(epoch, len(split['label'])))

    return batch_at


def batches(split: Split, size: int, normalisation: Normalisation) -> Iterator[Batch]:
  """Yields all images of a split once, in order, for evaluation.

  Every batch has `size` rows, so that one compilation serves all of them; the last is
  padded, and 'weight' is 0 on the padding and 1 elsewhere.
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


# ---- two images in one --------------------------------------------------------------

NAME, OF = 'multi_fashion', 'fashion_mnist'
TASKS = 'left', 'right'  # the columns of the labels
SIDE, PIECE = 36, 28  # pixels: side of the canvas, and of the image in each corner


def overlaid(pieces: ImageSource, resize: int | None = None) -> ImageSource:
  """Returns a source whose images show two images of another source, with both labels.

  Pairs are made among the rows that are read together and depend only on their number,
  so training images lie over training images, and held-out over held-out ones.

  Args:
    pieces: source of images [n, 28, 28, 1] and labels int32 [n].
    resize: side in pixels of the result; None leaves 36.

  Returns:
    A source of images [n, 36, 36, 1] and labels int32 [n, 2]. The two images lie in
    opposite corners, and where they overlap the brighter pixel is seen.
  """

  def read(split, rows):
    piece, partner = pieces.read(split, rows), pairs(len(rows))
    image = np.zeros((len(rows), SIDE, SIDE, 1), piece['image'].dtype)
    image[:, :PIECE, :PIECE] = piece['image']
    corner = image[:, -PIECE:, -PIECE:]
    np.maximum(corner, piece['image'][partner], out=corner)
    if resize is not None:
      small = [sized(one, resize) for one in image]
      image = np.array(small, np.uint8).reshape(-1, resize, resize, 1)
    label = np.stack([piece['label'], piece['label'][partner]], axis=1)
    return {'image': image, 'label': label}

  side = resize or SIDE
  return pieces._replace(shape=(side, side, 1), read=read, tasks=TASKS, records=None)


def tasks(name: str) -> tuple[str, ...]:
  """Returns the names of a data set's tasks, () where there is only one."""
  return TASKS if name == NAME else ()


def pairs(n: int) -> np.ndarray:
  """Returns which image is laid over each of n images, int64 [n].

  The pairs form one circle, so that no image lies over itself.
  """
  # RandomState, because its streams are frozen for all versions of numpy.
  circle = np.random.RandomState(0).permutation(n)
  partner = np.empty(n, np.int64)
  partner[circle] = np.roll(circle, -1)
  return partner
