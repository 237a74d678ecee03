"""Texts in batches of about one length, so that little is computed for padding.

A batch is as long as the smallest bucket that holds its longest text: a network is
compiled once for every bucket. Batches are put together on the host.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
import numpy as np

from depthprune.training.data import epoch_steps
from depthprune.training.prepared import DataError

Split = dict[str, np.ndarray]
"""{'tokens': int32 [n, length], 'mask': bool [n, length], 'label': int32 [n]}, and of
pairs 'types': int32 [n, length]. A row is padded at its end."""

SMALLEST = 8
CHUNK = 50  # batches whose texts are sorted by length together


def buckets(length: int) -> tuple[int, ...]:
  """8, 16, 32 and so on, each below `length`, and then `length`."""
  powers = iter(SMALLEST << i for i in range(32))
  return (*(p for p in powers if p < length), length)


def lengths(split: Split) -> np.ndarray:
  """Tokens of every text, int32 [n]."""
  return split['mask'].sum(1, dtype=np.int32)


def bucket(split: Split, longest: int) -> int:
  """The smallest bucket of a split that holds `longest` tokens."""
  return next(b for b in buckets(split['tokens'].shape[1]) if b >= longest)


def _rows(split: Split, rows: np.ndarray, width: int) -> Split:
  return {k: v[rows] if v.ndim == 1 else v[rows, :width] for k, v in split.items()}


class TextSampler(NamedTuple):
  """batch_at(split, step): the training batch of a step, pure in (key, step).

  Every epoch goes through the texts in an order of its own, what does not fill a batch
  takes its turn in another. The order is cut into chunks of 50 batches; each is sorted
  by length and cut into batches, and all batches of the epoch are shuffled.
  """

  key: jax.Array
  size: int
  on_host = True  # how long a batch is depends on the step, so it cannot be traced

  def __call__(self, split: Split, step: int) -> dict[str, jax.Array]:
    return self.stepwise()(split, int(step))

  def stepwise(
    self, put: Callable[[Split], dict[str, jax.Array]] = jax.device_put
  ) -> Callable[[Split, int], dict[str, jax.Array]]:
    """The same for many steps: an epoch is put in order once. put: onto the device."""
    found: dict[int, np.ndarray] = {}

    def batch_at(split, step):
      epoch, at = divmod(step, epoch_steps(split, self.size))
      if epoch not in found:
        found.clear()
        found[epoch] = self.order(lengths(split), epoch)
      rows = found[epoch][at]
      longest = int(split['mask'][rows].sum(1).max())
      return put(_rows(split, rows, bucket(split, longest)))

    return batch_at

  def order(self, length: np.ndarray, epoch: int) -> np.ndarray:
    """The texts of every batch of an epoch, int [steps, size], by their lengths [n]."""
    # RandomState, because its streams are frozen for all versions of numpy.
    seed = [*np.asarray(jax.random.key_data(self.key)).ravel().tolist(), epoch]
    random, steps = np.random.RandomState(seed), len(length) // self.size
    rows = random.permutation(len(length))[: steps * self.size]
    chunk = CHUNK * self.size
    chunks = (rows[start : start + chunk] for start in range(0, len(rows), chunk))
    by_length = [c[np.argsort(length[c], kind='stable')] for c in chunks]
    batches = np.concatenate(by_length).reshape(steps, self.size)
    return batches[random.permutation(steps)]


def batches(split: Split, size: int) -> Iterator[dict[str, jax.Array]]:
  """All texts once, from short to long, for evaluation.

  Every batch has `size` rows and is as long as its bucket. The last of a bucket repeats
  a text, with 'weight' 0 (float32 [batch]), for padding alone has nothing to attend to.

  Raises DataError for a size below 1.
  """
  if size < 1:
    raise DataError(f'data: expected at least one text in a batch, got {size}')
  length = lengths(split)
  widths = buckets(split['tokens'].shape[1])
  of = np.searchsorted(widths, length)
  for i, width in enumerate(widths):
    inside = np.flatnonzero(of == i)
    inside = inside[np.argsort(length[inside], kind='stable')]
    for start in range(0, len(inside), size):
      places = np.arange(start, start + size)
      rows = inside[places.clip(max=len(inside) - 1)]
      weight = (places < len(inside)).astype(np.float32)
      yield jax.device_put({**_rows(split, rows, width), 'weight': weight})
