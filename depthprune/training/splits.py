"""Which rows of a data set are trained on, held out and tested on."""

from typing import NamedTuple

import numpy as np

from depthprune.training.catalogue import DataError


class Rows(NamedTuple):
  """Which rows go where, each [n] and sorted; those of `test` are of the split `of`."""

  train: np.ndarray
  held_out: np.ndarray
  test: np.ndarray
  of: str


def divide(
  name: str,
  sizes: tuple[int, int],
  seed: int = 0,
  held_out: int | None = None,
  subset: int | None = None,
  noun: str = 'images',
) -> Rows:
  """The rows of every split of a set with `sizes` rows in train and in test.

  Those of test are always the same: all, or a fixed quarter of train where test has
  none. `seed` chooses `held_out` (a tenth, 5000 at most, unless given) of the rest and
  the `subset` to train on (all the others, unless given).

  Raises DataError where there are not so many; `noun` says of what.
  """
  count, tests = sizes
  rest, test, of = np.arange(count), np.arange(tests), 'test'
  if not tests:
    # RandomState, because its streams are frozen for all versions of numpy.
    of, mixed = 'train', np.random.RandomState(0).permutation(count)
    test, rest = np.split(mixed, [count // 4])
  rest = np.random.RandomState(seed).permutation(np.sort(rest))
  held = min(5000, len(rest) // 10) if held_out is None else held_out
  many = len(rest) - held if subset is None else subset
  if held < 0 or many < 1 or held + many > len(rest):
    raise DataError(
      f'data {name!r}: has {len(rest)} {noun} to train on, got held_out={held}, '
      f'subset={many}: together at most {len(rest)}, and subset at least 1'
    )
  train = np.sort(rest[held : held + many])
  return Rows(train, np.sort(rest[:held]), np.sort(test), of)
