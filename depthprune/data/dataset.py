"""Which rows of a data set are trained on, held out and tested on."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

Split = dict[str, np.ndarray]
"""{'image': uint8 [n, height, width, channels], 'label': int32 [n]}

Where every pixel has a class, labels are uint8 [n, height, width]; where several tasks
have one each, int32 [n, tasks]. A set that is streamed has {'record': int64 [n]}, which
of its records are in the split."""

INPUTS = ('image', 'tokens', 'mask', 'types', 'features')
"""What of a batch a network may read, in the order in which it takes them."""


class DataError(ValueError):
  """A data set that is not there, or is not one for what is asked of it."""


def count(split: Any) -> int:
  """How many examples a split has (or a batch), of whatever kind."""
  return len(jax.tree.leaves(split)[0])


def inputs_of(batch: Mapping[str, Any]) -> tuple[Any, ...]:
  """What the network reads of a batch: `apply(variables, *inputs_of(batch))`.

  Of images: (image [batch, height, width, channels],). Of texts: (tokens int32
  [batch, length], mask bool [batch, length]) and, of pairs, types int32 [batch,
  length]. Of precomputed features: ({name: [batch, n]},).

  Raises: ValueError for a batch without any of them.
  """
  found = tuple(batch[name] for name in INPUTS if name in batch)
  if not found:
    raise ValueError(
      f'batch: expected an entry for the network to read ({", ".join(INPUTS)}), got '
      f'{", ".join(batch) or "none"}'
    )
  return found


def real_rows(batch: Mapping[str, Any]) -> np.ndarray:
  """Which examples of a batch are no padding: bool [batch]."""
  weight = batch.get('weight')
  return (
    np.ones(len(batch['label']), bool) if weight is None else np.asarray(weight) > 0
  )


class Rows(NamedTuple):
  """Which rows go where, each [n] and sorted.

  Those of `test` are of the split `of`, those of `held_out` of `held_of`.
  """

  train: np.ndarray
  held_out: np.ndarray
  test: np.ndarray
  of: str
  held_of: str = 'train'


def divide(
  name: str,
  sizes: tuple[int, int],
  seed: int = 0,
  held_out: int | None = None,
  subset: int | None = None,
  noun: str = 'images',
  validation: int = 0,
) -> Rows:
  """The rows of every split of a set with `sizes` rows in train and in test.

  Those of test are always the same: all, or a fixed quarter of train where test has
  none. `seed` chooses `held_out` (a tenth, 5000 at most, unless given) of the rest and
  the `subset` to train on (all the others, unless given). With `validation` rows in a
  split of that name, `held_out` of those are (all, unless given), and none of train.

  Raises DataError where there are not so many; `noun` says of what.
  """
  count, tests = sizes
  rest, test, of = np.arange(count), np.arange(tests), 'test'
  if not tests:
    # RandomState, because its streams are frozen for all versions of numpy.
    of, mixed = 'train', np.random.RandomState(0).permutation(count)
    test, rest = np.split(mixed, [count // 4])
  rest = np.random.RandomState(seed).permutation(np.sort(rest))
  if validation:
    return _with_validation(name, validation, rest, test, of, seed, held_out, subset)
  held = min(5000, len(rest) // 10) if held_out is None else held_out
  many = len(rest) - held if subset is None else subset
  if held < 0 or many < 1 or held + many > len(rest):
    raise DataError(
      f'data {name!r}: has {len(rest)} {noun} to train on, got held_out={held}, '
      f'subset={many}: together at most {len(rest)}, and subset at least 1'
    )
  train = np.sort(rest[held : held + many])
  return Rows(train, np.sort(rest[:held]), np.sort(test), of)


def _with_validation(name, size, rest, test, of, seed, held_out, subset) -> Rows:
  many = len(rest) if subset is None else subset
  held = size if held_out is None else held_out
  if not (0 <= held <= size and 1 <= many <= len(rest)):
    raise DataError(
      f'data {name!r}: has {len(rest)} images to train on and {size} for validation, '
      f'got held_out={held}, subset={many}: at most these, and subset at least 1'
    )
  chosen = np.random.RandomState(seed).permutation(size)[:held]
  train, held_rows = np.sort(rest[:many]), np.sort(chosen)
  return Rows(train, held_rows, np.sort(test), of, 'validation')


# Limits that containers and batch systems set (control groups 2 and 1).
LIMITS = '/sys/fs/cgroup/memory.max', '/sys/fs/cgroup/memory/memory.limit_in_bytes'


def of_process() -> int:
  """Bytes that this process may fill: of the machine, or of its control group."""
  found = [os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES')]
  for path in LIMITS:
    text = Path(path).read_text().strip() if Path(path).is_file() else ''
    found += [int(text)] if text.isdecimal() else []
  return min(found)


def of_device() -> int:
  """Bytes of the smallest of this process's devices; of a CPU those of the machine."""
  told = [device.memory_stats() or {} for device in jax.local_devices()]
  return min(one.get('bytes_limit', of_process()) for one in told)
