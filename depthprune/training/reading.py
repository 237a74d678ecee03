"""How grain reads encoded images: in what order, and how many at once.

What the example at a place of the run is, and how it is augmented, depends on the seed
and the place alone.
"""

import dataclasses
import os
import sys
from collections.abc import Callable
from typing import Any

import numpy as np

from depthprune.training.crops import Crops
from depthprune.training.prepared import Records

ROUNDS = 4  # of the cipher that shuffles: grain's own choice
AHEAD = 2  # batches that wait on the devices
MOST = 16  # threads of a process: Python lets one at a time run what is not decoding


Put = Callable[[dict[str, np.ndarray]], Any]


@dataclasses.dataclass(frozen=True)
class Share:
  """A source for grain: the rows `own` of every batch of `size`, batch after batch.

  seed: of the order and of the augmentation; without one every image comes in order,
  and behind the end the last.
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
    """(encoded image, its class, random numbers for it)"""
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
  """Of a step by itself: {'image': uint8 [own, ...], 'label': int32 [own]}."""
  return _batches(share, crops)[step]


def stream(
  share: Share, crops: Crops, put: Put, first: int = 0, workers: int = 0
) -> Any:
  """grain's iterator over the batches of a step and all that follow it, read ahead.

  put: onto the devices, where two of them wait. workers: processes that read; 0 are
  threads of this one.
  """
  import grain
  from absl import flags

  if workers and not flags.FLAGS.is_parsed():
    flags.FLAGS.mark_as_parsed()  # grain tells its workers what its flags are
  count = threads(workers)
  options = grain.ReadOptions(count, prefetch_buffer_size=count)
  read = _batches(share, crops)[first:].to_iter_dataset(options)
  read = read.mp_prefetch(grain.MultiprocessingOptions(workers)).map(put)
  prefetch = grain.experimental.ThreadPrefetchIterDataset
  return iter(prefetch(read, prefetch_buffer_size=AHEAD))


def depth(workers: int) -> int:
  """Batches of a stream that are on their way at once, when nobody takes any."""
  return (workers or 1) * (threads(workers) + bool(workers)) + AHEAD


def threads(workers: int) -> int:
  """Of each process that reads; each makes a batch at a time."""
  return max(1, min(MOST, (os.cpu_count() or 1) // (workers or 1)))


def _batches(share: Share, crops: Crops) -> Any:
  import grain

  def decoded(example):
    encoded, label, rng = example
    return {'image': crops(encoded, rng), 'label': np.int32(label)}

  return grain.MapDataset.source(share).map(decoded).batch(len(share.own))
