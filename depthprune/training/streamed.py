"""Images that do not fit in memory: read, decoded and augmented as they are needed.

Grain reads them, in threads or in processes, some batches ahead of the training. Which
images a batch has, and how each is augmented, depends on the key and on the number of
the step alone: not on the threads, the workers, or how many processes share a batch. So
the step that is in every checkpoint is all the state that the iterator has.
"""

import importlib.util
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from depthprune.training import augment as augments
from depthprune.training import reading
from depthprune.training.augment import Augment, Normalisation, measured, normalise
from depthprune.training.crops import MODES, Crops
from depthprune.training.prepared import DataError, Records, Source, Split, count
from depthprune.training.reading import Put, Share
from depthprune.training.splits import Rows

Batch = dict[str, jax.Array]
SAMPLE = 512  # images that a normalisation is computed from


class Streamed(NamedTuple):
  """A data set on disk: what `data.Dataset` is for images in memory.

  Splits are {'record': int64 [n]}, numbers for `records`. `workers` are processes that
  read training images; 0 are threads of this one. `own` are the rows of every batch
  that this process reads, None for all.
  """

  name: str
  records: Records
  train: Split
  held_out: Split
  test: Split
  classes: int
  shape: tuple[int, int, int]
  normalisation: Normalisation
  augment: Augment
  notes: tuple[str, ...] = ()
  workers: int = 0
  own: np.ndarray | None = None

  def example(self) -> tuple[jax.Array, ...]:
    """One image of zeros, ([1, height, width, channels],)."""
    return (jnp.zeros((1, *self.shape), jnp.float32),)

  def on_device(self, put: Any = None) -> Split:
    """The training split; its images stay where they are."""
    del put
    return self.train

  def sampler(self, key: jax.Array, size: int, augment: bool) -> 'StreamSampler':
    """(train, step) -> training batch; with `augment` random crops, mirrored."""
    by = self.augment if augment else Augment()
    crops = Crops(self.shape, augment, by.flip, by.randaugment)
    given = self.records, crops, self.normalisation, by.mixup, self.workers, self.own
    return StreamSampler(key, size, *given)

  def batches(
    self, split: Split, size: int, put: Put = jax.device_put
  ) -> Iterator[Batch]:
    """Centre crops of all images of a split once, in order, for evaluation.

    The last batch repeats an image, with 'weight' 0. put: onto the devices.
    """
    share = Share(self.records, split['record'], size, _rows(self.own, size))
    stream = reading.stream(share, Crops(self.shape), put)
    for start in range(0, count(split), size):
      weight = np.asarray(start + share.own < count(split), np.float32)
      batch = _ready(next(stream), by=self.normalisation)
      yield {**batch, **put({'weight': weight})}
    stream.close()

  def probe(self) -> np.ndarray:
    """The bytes of 64 images spread over all splits: whether two sets are one."""
    splits = self.train, self.held_out, self.test
    numbers = np.concatenate([split['record'] for split in splits])
    few = numbers[np.linspace(0, len(numbers) - 1, 64).astype(int)]
    return np.frombuffer(b''.join(self.records[int(i)][0] for i in few), np.uint8)


def streamed(
  name: str,
  source: Source,
  rows: Rows,
  augment: Augment,
  normalisation: Normalisation | None = None,
) -> Streamed:
  """The rows of a source, to be read when they are needed.

  normalisation: by default that of the centres of 512 training images, at most.

  Raises DataError where grain is not installed, and for images with other than one or
  three channels.
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
  behind = {'train': 0, 'test': source.train}
  train = {'record': rows.train}
  held_out = {'record': rows.held_out + behind[rows.held_of]}
  test = {'record': rows.test + behind[rows.of]}
  note = 'images were read from disk as they were needed'
  if normalisation is None:
    many = min(SAMPLE, len(rows.train))
    share = Share(records, rows.train, many, np.arange(many), seed=0)
    sample = reading.batch(share, Crops(source.shape), 0)['image']
    normalisation = measured(sample, source.scale)
    note += f', and normalised as {many} of them are'
  return Streamed(
    name,
    records,
    train,
    held_out,
    test,
    classes=source.classes,
    shape=source.shape,
    normalisation=normalisation,
    augment=augment,
    notes=(note,),
  )


class StreamSampler(NamedTuple):
  """batch_at(split, step): every epoch goes through the images in its own order.

  Batches are cut from the epochs laid end to end. `mixup` is as for `augment.mixed`,
  the other fields as in `Streamed`.
  """

  key: jax.Array
  size: int
  records: Records
  crops: Crops
  normalisation: Normalisation
  mixup: float = 0.0
  workers: int = 0
  own: np.ndarray | None = None

  @property
  def on_host(self) -> bool:
    return True

  def __call__(self, split: Split, step: int) -> Batch:
    batch = reading.batch(self._share(split), self.crops, int(step))
    return self._finish(jax.device_put(batch), step)

  def stepwise(self, put: Put = jax.device_put) -> Callable[[Split, int], Batch]:
    """The same, read ahead while steps follow each other. put: onto the devices."""
    stream: Any = None
    following = -1

    def batch_at(split, step):
      nonlocal stream, following
      if step != following:
        if stream is not None:
          stream.close()
        given = self._share(split), self.crops, put
        stream = reading.stream(*given, first=step, workers=self.workers)
      following = step + 1
      return self._finish(next(stream), step)

    return batch_at

  @property
  def depth(self) -> int:
    """Batches that are on their way at once, when nobody takes any."""
    return reading.depth(self.workers)

  def _share(self, split: Split) -> Share:
    own, seed = _rows(self.own, self.size), int(jax.random.bits(self.key))
    return Share(self.records, split['record'], self.size, own, seed)

  def _finish(self, batch: Batch, step: int) -> Batch:
    key = jax.random.fold_in(self.key, step)
    return _ready(batch, key, by=self.normalisation, mixup=self.mixup)


@partial(jax.jit, static_argnames=('by', 'mixup'))
def _ready(batch: Batch, key: Any = None, *, by: Normalisation, mixup: float = 0.0):
  batch = {**batch, 'image': normalise(batch['image'], by)}
  return batch if key is None else augments.mixed(batch, key, mixup)


def _rows(own: np.ndarray | None, size: int) -> np.ndarray:
  return np.arange(size) if own is None else own
