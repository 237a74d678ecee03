"""What every data set offers, and which of its rows are trained on, held out, tested on.

Images in memory, images streamed from disk, texts and features of a frozen network are
read in files of their own; training and evaluation know them by `Dataset` alone.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

Split = dict[str, Any]
"""The examples of a split: arrays with one entry per example along the first axis.

Of images {'image': uint8 [n, height, width, channels], 'label': int32 [n]}; labels are
uint8 [n, height, width] where every pixel has a class, int32 [n, tasks] where several
tasks have one each. Of streamed images {'record': int64 [n]}, which of the records are
in the split. Of texts {'tokens': int32 [n, length], 'mask': bool [n, length], 'label':
int32 [n]}, with 'types' for pairs. Of features {'features': {name: float32 [n, ...]},
'label': int32 [n]}."""

Batch = dict[str, jax.Array]
"""What a network is trained or evaluated on: the inputs by name, 'label', and in
evaluation 'weight': float32 [batch], 0 where the batch was padded."""

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


def shuffled(key: jax.Array, epoch: jax.Array | int, n: int) -> jax.Array:
  """The order of n images in an epoch, int32 [n]: a pure function of (key, epoch)."""
  # One sort of random bits; jax.random.permutation sorts twice.
  bits = jax.random.bits(jax.random.fold_in(key, epoch), (n,))
  return jnp.argsort(bits).astype(jnp.int32)


def epoch_steps(split: Split | Batch, size: int) -> int:
  """Batches of `size` in one epoch; what is left over takes its turn in another."""
  n = count(split)
  if not 0 < size <= n:
    raise DataError(
      f'batch: expected 1 to {n}, as many as there are training examples, got {size}'
    )
  return n // size


class Placement(NamedTuple):
  """Where a batch lies on the devices.

  Attributes:
    whole: (batch) -> batch, of one that this process has whole.
    rows: (size) -> which rows of a batch this process has to read, sorted int [n].
    joined: (size, rows of a batch) -> batch, of one that every process has a part of.
  """

  whole: Callable[[Any], Any]
  rows: Callable[[int], np.ndarray]
  joined: Callable[[int, Any], Any]


HERE = Placement(jax.device_put, np.arange, lambda size, rows: jax.device_put(rows))
"""All of it on the default device."""


class Sampler(Protocol):
  """batch_at(split, step): the training batch of a step, a pure function of both.

  `on_host` says that batches are made outside of jit, `split` is then on the host.
  """

  @property
  def on_host(self) -> bool: ...

  def __call__(self, split: Any, step: Any) -> Any: ...

  def stepwise(self, place: Placement = HERE) -> Callable[[Any, int], Any]:
    """The same function, faster, for a loop on the host that goes step by step."""
    ...


class Dataset(Protocol):
  """A data set, split and ready to be batched.

  Attributes:
    name: what it is called. train, held_out, test: its splits.
    classes: of every label. shape: of one example.
    normalisation: what inputs go through, None for none.
    notes: what a reader of results must know of the data.
    tasks: names of the tasks, where there are several; labels are then [n, tasks].
    ignore: label of pixels without a class, where every pixel has one, else None.
    names: of the classes, () if they are not known.
    tokenizer: path of the tokenizer.json of texts, else None.
    augments: whether a sampler can augment.
    streamed: whether examples are read from disk as they are needed.
  """

  @property
  def name(self) -> str: ...
  @property
  def train(self) -> Split: ...
  @property
  def held_out(self) -> Split: ...
  @property
  def test(self) -> Split: ...
  @property
  def classes(self) -> int: ...
  @property
  def shape(self) -> tuple[int, ...]: ...
  @property
  def normalisation(self) -> Any: ...
  @property
  def notes(self) -> tuple[str, ...]: ...
  @property
  def tasks(self) -> tuple[str, ...]: ...
  @property
  def ignore(self) -> int | None: ...
  @property
  def names(self) -> tuple[str, ...]: ...
  @property
  def tokenizer(self) -> str | None: ...
  @property
  def augments(self) -> bool: ...
  @property
  def streamed(self) -> bool: ...

  def example(self) -> tuple[Any, ...]:
    """One example as a network reads it, [1, ...] each: zeros, or made up."""
    ...

  def on_device(self, put: Callable[[Split], Any] = jax.device_put) -> Any:
    """The training split, where the sampler reads it."""
    ...

  def sampler(self, key: jax.Array, size: int, augment: bool) -> Sampler:
    """Training batches of so many examples; with `augment` as suits the data."""
    ...

  def batches(
    self, split: Split, size: int, place: Placement = HERE
  ) -> Iterator[Batch]:
    """All examples of a split once, in an order that is always the same."""
    ...

  def probe(self) -> dict[str, Any]:
    """Arrays by which two processes see that they read the same data."""
    ...

  def _replace(self, **fields: Any) -> Any: ...


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
