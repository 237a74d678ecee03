"""Images that do not fit in memory: read, decoded and augmented during training.

Grain reads them some batches ahead, in threads or in processes. The images of a batch
and their augmentation depend only on the key and on the number of the step, and not on
the threads, on the workers or on how many processes share a batch. The step that every
checkpoint contains is therefore the only state of the iterator.
"""

import dataclasses
import importlib.util
import io
import os
import signal
import sys
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from depthprune.data import augment as augments
from depthprune.data.augment import (
  Augment,
  Normalisation,
  measure_normalisation,
  normalise,
)
from depthprune.data.dataset import (
  HERE,
  Batch,
  DataError,
  Placement,
  Rows,
  Split,
  count,
)
from depthprune.data.tfds import ImageSource, Records

CENTRE = 7 / 8  # part of the shorter side that evaluation sees: 224 of 256 pixels
AREA, RATIO = (0.08, 1.0), (3 / 4, 4 / 3)  # of a random crop; ratio is width / height
TRIES = 10  # random crops that are drawn before the centre is taken
STRONGEST, OPERATIONS = 30, 2  # RandAugment: largest magnitude, operations per image
MODES = {1: 'L', 3: 'RGB'}  # Pillow's name of an image by its number of channels
SAMPLE = 512  # images that a normalisation is computed from
ROUNDS = 4  # of the cipher that shuffles: grain's own choice
AHEAD = 2  # batches that wait on the devices
MOST_THREADS = 16  # of a process: all that is not decoding takes turns in Python


# ---- one image -----------------------------------------------------------------------


class Crops(NamedTuple):
  """How encoded images of any size become uint8 arrays [height, width, channels].

  Attributes:
    shape: (height, width, channels) of the result.
    random: whether a random part of the image is cropped and resized (Inception's
      crop); otherwise its centre is.
    flip: whether half of the images are mirrored.
    randaugment: magnitude of RandAugment, 1 to 30; 0 turns it off.
  """

  shape: tuple[int, ...]
  random: bool = False
  flip: bool = False
  randaugment: int = 0

  def __call__(self, encoded: bytes, rng: np.random.Generator) -> np.ndarray:
    """Decodes a JPEG or PNG file and crops it; all randomness comes from `rng`."""
    from PIL import Image

    height, width, channels = self.shape
    with Image.open(io.BytesIO(encoded)) as file:
      image = file.convert(MODES[channels])
    box = _random_box(image.size, rng) if self.random else None
    if box is None and image.size != (width, height):
      box = _centre_box(image.size, width / height, 1.0 if self.random else CENTRE)
    if box is not None:
      image = image.resize((width, height), Image.Resampling.BILINEAR, box)
    if self.flip and rng.random() < 0.5:
      image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    if self.randaugment:
      # Cubuk et al., arXiv 1909.13719; ranges as in torchvision's RandAugment.
      operations, part = _operations(), self.randaugment / STRONGEST
      for i in rng.integers(len(operations), size=OPERATIONS):
        image = operations[i](image, part * rng.choice((-1, 1)))
    return np.asarray(image).reshape(self.shape)


Box = tuple[float, float, float, float]  # left, top, right, bottom


def _random_box(size: tuple[int, int], rng: np.random.Generator) -> Box | None:
  """Draws a box of 8 to 100 % of the area, 3:4 to 4:3; None if none of 10 fits.

  Source: Szegedy et al., arXiv 1409.4842; limits as in torchvision.
  """
  width, height = size
  for _ in range(TRIES):
    area = width * height * rng.uniform(*AREA)
    ratio = np.exp(rng.uniform(*np.log(RATIO)))
    w, h = round(float(np.sqrt(area * ratio))), round(float(np.sqrt(area / ratio)))
    if 0 < w <= width and 0 < h <= height:
      left, top = int(rng.integers(width - w + 1)), int(rng.integers(height - h + 1))
      return left, top, left + w, top + h
  return None


def _centre_box(size: tuple[int, int], ratio: float, part: float) -> Box:
  """Returns a part of the largest centred box with a ratio of width to height."""
  width, height = size
  w = min(width, height * ratio) * part
  h = w / ratio
  left, top = (width - w) / 2, (height - h) / 2
  return left, top, left + w, top + h


def _operations() -> list[Any]:
  """Returns RandAugment's operations f(image, part), with part in [-1, 1].

  Those that have one direction only use |part|.
  """
  from PIL import Image, ImageEnhance, ImageOps

  def affine(image, *matrix):
    return image.transform(image.size, Image.Transform.AFFINE, matrix)

  def enhanced(of):
    return lambda image, part: of(image).enhance(1 + 0.9 * part)

  moved = lambda image, part: round(part * 150 / 331 * image.width)
  return [
    lambda image, part: image,
    lambda image, part: affine(image, 1, 0.3 * part, 0, 0, 1, 0),
    lambda image, part: affine(image, 1, 0, 0, 0.3 * part, 1, 0),
    lambda image, part: affine(image, 1, 0, moved(image, part), 0, 1, 0),
    lambda image, part: affine(image, 1, 0, 0, 0, 1, moved(image, part)),
    lambda image, part: image.rotate(30 * part),
    *map(enhanced, (ImageEnhance.Brightness, ImageEnhance.Contrast)),
    *map(enhanced, (ImageEnhance.Color, ImageEnhance.Sharpness)),
    lambda image, part: ImageOps.posterize(image, 8 - round(4 * abs(part))),
    lambda image, part: ImageOps.solarize(image, round(255 * (1 - abs(part)))),
    lambda image, part: ImageOps.autocontrast(image),
    lambda image, part: ImageOps.equalize(image),
  ]


# ---- batches, read ahead -------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Share:
  """A source for grain: this process's rows of every batch, batch after batch.

  Attributes:
    records: the encoded images.
    numbers: numbers of the split's records, int64 [n].
    size: rows of a complete batch.
    own: which of these rows this process reads.
    seed: of the order and the augmentation. With None the images come once, in order,
      and the last one is repeated to fill the last batch.
  """

  records: Records
  numbers: np.ndarray
  size: int
  own: np.ndarray
  seed: int | None = None

  def __len__(self) -> int:
    endless, once = sys.maxsize // self.size, -(-len(self.numbers) // self.size)
    return (once if self.seed is None else endless) * len(self.own)

  def __getitem__(self, index: int) -> tuple[bytes, int, Any]:
    """Returns (encoded image, its class, its random number generator)."""
    step, row = divmod(index, len(self.own))
    at = step * self.size + int(self.own[row])
    image, label = self.records[int(self.numbers[self._place(at)])]
    return image, label, np.random.default_rng((self.seed or 0, at))

  def _place(self, at: int) -> int:
    from grain.experimental import index_shuffle

    last = len(self.numbers) - 1
    if self.seed is None:
      return min(at, last)
    epoch, place = divmod(at, last + 1)
    seed = (self.seed + epoch) % 2**32
    return index_shuffle(place, max_index=last, seed=seed, rounds=ROUNDS)


def batch(share: Share, crops: Crops, step: int) -> Any:
  """Returns one batch, {'image': uint8 [own, ...], 'label': int32 [own]}."""
  return _batches(share, crops)[step]


def read_ahead(
  share: Share,
  crops: Crops,
  put: Callable[[dict[str, np.ndarray]], Any],
  first: int = 0,
  workers: int = 0,
) -> Any:
  """Returns grain's iterator over batches, which reads ahead.

  Args:
    share: the rows to read.
    crops: how images are decoded.
    put: puts a batch on the devices, where two batches wait.
    first: number of the first batch.
    workers: processes that read; 0 uses threads of this one.
  """
  import grain
  from absl import flags

  if workers and not flags.FLAGS.is_parsed():
    flags.FLAGS.mark_as_parsed()  # grain passes its flags on to its workers
  count = threads(workers)
  options = grain.ReadOptions(count, prefetch_buffer_size=count)
  read = _batches(share, crops)[first:].to_iter_dataset(options)
  read = read.mp_prefetch(grain.MultiprocessingOptions(workers), _ignore_interrupts)
  read = read.map(put)
  prefetch = grain.experimental.ThreadPrefetchIterDataset
  return iter(prefetch(read, prefetch_buffer_size=AHEAD))


def depth(workers: int) -> int:
  """Returns how many batches of a stream are read ahead of their use."""
  return (workers or 1) * (threads(workers) + bool(workers)) + AHEAD


def threads(workers: int) -> int:
  """Returns the threads of each process that reads; a thread makes one batch."""
  return max(1, min(MOST_THREADS, (os.cpu_count() or 1) // (workers or 1)))


def _ignore_interrupts(worker: int, workers: int) -> None:
  """Leaves Ctrl-C, which a terminal sends to all processes, to the one that trains."""
  del worker, workers
  signal.signal(signal.SIGINT, signal.SIG_IGN)


def _batches(share: Share, crops: Crops) -> Any:
  import grain

  def decoded(example):
    encoded, label, rng = example
    return {'image': crops(encoded, rng), 'label': np.int32(label)}

  return grain.MapDataset.source(share).map(decoded).batch(len(share.own))


# ---- the data set --------------------------------------------------------------------


class StreamedImages(NamedTuple):
  """A `Dataset` of images on disk that are read during training.

  Attributes:
    records: the encoded images; the splits contain their numbers.
    augment: how training images are augmented, where that is asked for.
    workers: processes that read training images; 0 uses threads of this one.

  All other attributes are those of `Dataset`.
  """

  name: str
  records: Records
  train: Split
  held_out: Split
  test: Split
  classes: int
  shape: tuple[int, ...]
  normalisation: Normalisation
  augment: Augment
  notes: tuple[str, ...] = ()
  workers: int = 0

  tasks = ()
  ignore = None
  names = ()
  tokenizer = None
  augments = True
  streamed = True

  def example(self) -> tuple[jax.Array, ...]:
    """Returns one image of zeros, ([1, height, width, channels],)."""
    return (jnp.zeros((1, *self.shape), jnp.float32),)

  def on_device(self, put: Any = None) -> Split:
    """Returns the training split, whose images stay on disk."""
    del put
    return self.train

  def sampler(self, key: jax.Array, size: int, augment: bool) -> 'StreamSampler':
    """Returns the sampler of training batches of `size` images."""
    by = self.augment if augment else Augment()
    return StreamSampler(
      key,
      size,
      records=self.records,
      crops=Crops(self.shape, augment, by.flip, by.randaugment),
      normalisation=self.normalisation,
      mixup=by.mixup,
      workers=self.workers,
    )

  def batches(
    self, split: Split, size: int, place: Placement = HERE
  ) -> Iterator[Batch]:
    """Yields centre crops of all images of a split once, in order, for evaluation.

    The last batch is filled with repeated images of 'weight' 0.
    """
    share = Share(self.records, split['record'], size, place.rows(size))
    put = partial(place.joined, size)
    batches = read_ahead(share, Crops(self.shape), put)
    for start in range(0, count(split), size):
      weight = np.asarray(start + share.own < count(split), np.float32)
      batch = _ready(next(batches), by=self.normalisation)
      yield {**batch, **put({'weight': weight})}
    batches.close()

  def probe(self) -> dict[str, Any]:
    """Returns the numbers of all records, and the bytes of 64 of the images."""
    splits = {'train': self.train, 'held_out': self.held_out, 'test': self.test}
    numbers = np.concatenate([split['record'] for split in splits.values()])
    few = numbers[np.linspace(0, len(numbers) - 1, 64).astype(int)]
    images = b''.join(self.records[int(i)][0] for i in few)
    return {**splits, 'records': np.frombuffer(images, np.uint8)}


def streamed(
  name: str,
  source: ImageSource,
  rows: Rows,
  augment: Augment,
  normalisation: Normalisation | None = None,
  workers: int = 0,
) -> StreamedImages:
  """Returns the rows of a source as a data set that is read during training.

  Args:
    name: name of the data set.
    source: the data set before it is read.
    rows: the rows of each split.
    augment: how training images are augmented, where that is asked for.
    normalisation: None measures it on the centres of at most 512 training images.
    workers: processes that read training images; 0 uses threads of this one.

  Raises:
    DataError: grain is not installed, or images have neither one nor three channels.
  """
  if importlib.util.find_spec('grain') is None:
    raise DataError(
      f'data {name!r}: images that are streamed are read by grain: pip install '
      "'depthprune[stream]'; or pass subset=N and stream=False"
    )
  if source.records is None or source.shape[-1] not in MODES:
    raise DataError(
      f'data {name!r}: expected images with one or three channels, got {source.shape}'
    )
  records = source.records()
  first = {'train': 0, 'test': source.train}  # number of the first record
  note = 'images were read from disk as they were needed'
  if normalisation is None:
    size = min(SAMPLE, len(rows.train))
    share = Share(records, rows.train, size, np.arange(size), seed=0)
    sample = batch(share, Crops(source.shape), 0)['image']
    normalisation = measure_normalisation(sample, source.scale)
    note += f', and normalised as {size} of them are'
  return StreamedImages(
    name,
    records,
    train={'record': rows.train},
    held_out={'record': rows.held_out + first[rows.held_of]},
    test={'record': rows.test + first[rows.of]},
    classes=source.classes,
    shape=source.shape,
    normalisation=normalisation,
    augment=augment,
    notes=(note,),
    workers=workers,
  )


class StreamSampler(NamedTuple):
  """batch_at(split, step) -> batch; every epoch goes through the images in a new order.

  Batches are cut from the epochs laid end to end.

  Attributes:
    key: random key of the order and of the augmentation.
    size: images in a batch.
    records: the encoded images.
    crops: how they are decoded.
    normalisation: of the pixels.
    mixup: alpha of `augment.mixup`; 0 turns it off.
    workers: processes that read; 0 uses threads of this one.
  """

  key: jax.Array
  size: int
  records: Records
  crops: Crops
  normalisation: Normalisation
  mixup: float = 0.0
  workers: int = 0

  @property
  def on_host(self) -> bool:
    return True

  def __call__(self, split: Split, step: int) -> Batch:
    images = batch(self._share(split, HERE), self.crops, int(step))
    return self._finish(jax.device_put(images), step)

  def stepwise(self, place: Placement = HERE) -> Callable[[Split, int], Batch]:
    """Returns the same function, which reads ahead while steps follow each other."""
    stream: Any = None
    following = -1

    def batch_at(split, step):
      nonlocal stream, following
      if step != following:
        if stream is not None:
          stream.close()
        share, put = self._share(split, place), partial(place.joined, self.size)
        stream = read_ahead(share, self.crops, put, first=step, workers=self.workers)
      following = step + 1
      return self._finish(next(stream), step)

    return batch_at

  @property
  def depth(self) -> int:
    """How many batches are read ahead of their use."""
    return depth(self.workers)

  def _share(self, split: Split, place: Placement) -> Share:
    rows, seed = place.rows(self.size), int(jax.random.bits(self.key))
    return Share(self.records, split['record'], self.size, rows, seed)

  def _finish(self, batch: Batch, step: int) -> Batch:
    key = jax.random.fold_in(self.key, step)
    return _ready(batch, key, by=self.normalisation, mixup=self.mixup)


@partial(jax.jit, static_argnames=('by', 'mixup'))
def _ready(batch: Batch, key: Any = None, *, by: Normalisation, mixup: float = 0.0):
  batch = {**batch, 'image': normalise(batch['image'], by)}
  return batch if key is None else augments.mixup(batch, key, mixup)
