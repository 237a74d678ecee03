"""The `Dataset` protocol, how rows are split, and how much memory data may take.

Images in memory, images streamed from disk, texts, and features of a frozen network
each have a file of their own; training and evaluation use them only as a `Dataset`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from depthprune.program import arguments

Split = dict[str, Any]
"""The examples of a split: arrays with one entry per example along the first axis.

- Images: {'image': uint8 [n, height, width, channels], 'label': int32 [n]}. Labels are
  uint8 [n, height, width] where every pixel has a class, and int32 [n, tasks] where
  there are several tasks.
- Streamed images: {'record': int64 [n]}, the numbers of the split's records.
- Texts: {'tokens': int32 [n, length], 'mask': bool [n, length], 'label': int32 [n]},
  and 'types' int32 [n, length] for pairs of texts.
- Features: {'features': {name: float32 [n, ...]}, 'label': int32 [n]}.
"""

Batch = dict[str, jax.Array]
"""A batch to train or evaluate on: the inputs by name, 'label', and for evaluation
'weight', float32 [batch], which is 0 on rows that only pad the batch."""

INPUTS = ('image', 'tokens', 'mask', 'types', 'features', 'input')
"""The entries of a batch that a network may read, in the order of its arguments.

'input' is what none of the others names; a tuple there is several arguments."""


class DataError(ValueError):
  """A data set cannot be found, or is not of the kind that the run needs."""


def count(split: Any) -> int:
  """Returns the number of examples of a split or a batch of any kind."""
  return len(jax.tree.leaves(split)[0])


def inputs_of(batch: Mapping[str, Any]) -> tuple[Any, ...]:
  """Returns a network's inputs from a batch: `apply(variables, *inputs_of(batch))`.

  Returns:
    For images (image [batch, height, width, channels],); for texts (tokens int32
    [batch, length], mask bool [batch, length]), followed by types int32 [batch,
    length] for pairs; for precomputed features ({name: [batch, n]},). An entry 'input'
    comes last; if it is a tuple, these are several inputs.

  Raises:
    TypeError: the batch is no dict.
    ValueError: the batch has none of these entries.
  """
  pair = "write {'image': x, 'label': y}; several batches are a list of such dicts"
  arguments.kind_of('batch', batch, Mapping, 'a dict such as {"image": x}', pair)
  given = [batch[name] for name in INPUTS if name in batch]
  inputs = tuple(x for g in given for x in (g if isinstance(g, tuple) else (g,)))
  if not inputs:
    expected = f'expected an entry for the network to read ({", ".join(INPUTS)})'
    raise arguments.wrong('batch', f'{expected}, got {arguments.listed(batch)}', pair)
  return inputs


def real_rows(batch: Mapping[str, Any]) -> np.ndarray:
  """Returns which rows of a batch are examples and not padding, bool [batch]."""
  if 'weight' not in batch:
    return np.ones(len(batch['label']), bool)
  return np.asarray(batch['weight']) > 0


def shuffled(key: jax.Array, epoch: jax.Array | int, n: int) -> jax.Array:
  """Returns the order of n examples in an epoch, int32 [n], from key and epoch only."""
  # One sort of random bits; jax.random.permutation sorts twice.
  bits = jax.random.bits(jax.random.fold_in(key, epoch), (n,))
  return jnp.argsort(bits).astype(jnp.int32)


def epoch_steps(split: Split | Batch, size: int) -> int:
  """Returns the number of full batches of `size` in an epoch.

  The examples left over are others in every epoch, as each has its own order.
  """
  n = count(split)
  if not 0 < size <= n:
    raise DataError(
      f'batch: expected 1 to {n}, as many as there are training examples, got {size}'
    )
  return n // size


class Placement(NamedTuple):
  """How a batch is put on the devices.

  Attributes:
    whole: (batch) -> batch, for a process that holds the complete batch.
    rows: (size) -> the rows of a batch that this process reads, sorted int [n].
    joined: (size, those rows) -> batch, where every process holds a part.
  """

  whole: Callable[[Any], Any]
  rows: Callable[[int], np.ndarray]
  joined: Callable[[int, Any], Any]


HERE = Placement(jax.device_put, np.arange, lambda size, rows: jax.device_put(rows))
"""The placement of everything on the default device."""


class Sampler(Protocol):
  """batch_at(split, step) -> the training batch of a step, a pure function of both.

  `on_host` is True where batches are made outside jit, from a split on the host.
  """

  @property
  def on_host(self) -> bool: ...

  def __call__(self, split: Any, step: Any) -> Any: ...

  def stepwise(self, place: Placement = HERE) -> Callable[[Any, int], Any]:
    """Returns the same function in a form that is fast in a loop over steps."""
    ...


class Dataset(Protocol):
  """A data set, split and ready to be batched.

  Attributes:
    name: name of the data set.
    train: the training split.
    held_out: the split on which decisions are made.
    test: the split on which results are reported.
    classes: number of classes of every label.
    shape: shape of one example.
    normalisation: the `Normalisation` of the inputs, or None.
    notes: sentences about the data that belong beside any result.
    tasks: names of the tasks if there are several (labels are [n, tasks]), else ().
    ignore: label of unlabelled pixels where every pixel has a label, else None.
    names: names of the classes, () if they are not known.
    tokenizer: path of the tokenizer.json for texts, else None.
    augments: whether the sampler can augment.
    streamed: whether examples are read from disk while training.
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
    """Returns a made-up example as a network reads it, arrays [1, ...]."""
    ...

  def on_device(self, put: Callable[[Split], Any] = jax.device_put) -> Any:
    """Returns the training split where the sampler reads it."""
    ...

  def sampler(self, key: jax.Array, size: int, augment: bool) -> Sampler:
    """Returns the sampler of training batches of `size` examples."""
    ...

  def batches(
    self, split: Split, size: int, place: Placement = HERE
  ) -> Iterator[Batch]:
    """Yields all examples of a split once, in a fixed order."""
    ...

  def probe(self) -> dict[str, Any]:
    """Returns arrays that differ if two processes read different data."""
    ...

  def _replace(self, **fields: Any) -> Any: ...


class Rows(NamedTuple):
  """Sorted row numbers [n] of each split.

  `train` counts rows of the stored split 'train', `test` those of the stored split
  named by `of`, and `held_out` those of the one named by `held_of`.
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
  """Divides the rows of a stored data set into training, held-out and test rows.

  The test rows never depend on the seed.

  Args:
    name: name of the data set, for messages.
    sizes: rows stored for training and for testing. Without any for testing, a fixed
      quarter of the training rows becomes the test split.
    seed: chooses the held-out rows and the subset.
    held_out: number of held-out rows; None takes a tenth of the training rows, at most
      5000, or all validation rows.
    subset: number of rows to train on; None takes all that are left.
    noun: what the rows are called in messages.
    validation: rows of a stored validation split; with any, the held-out rows are
      chosen from these and not from the training rows.

  Raises:
    DataError: fewer rows are stored than are asked for.
  """
  count, tests = sizes
  rest, test, of = np.arange(count), np.arange(tests), 'test'
  if not tests:
    # RandomState, because its streams are frozen for all versions of numpy.
    of, mixed = 'train', np.random.RandomState(0).permutation(count)
    test, rest = np.split(mixed, [count // 4])
  rest = np.random.RandomState(seed).permutation(np.sort(rest))
  if validation:
    held = validation if held_out is None else held_out
    size = len(rest) if subset is None else subset
    if not (0 <= held <= validation and 1 <= size <= len(rest)):
      raise DataError(
        f'data {name!r}: has {len(rest)} {noun} to train on and {validation} for '
        f'validation, got held_out={held}, subset={size}: at most these, and subset '
        'at least 1'
      )
    chosen = np.random.RandomState(seed).permutation(validation)[:held]
    return Rows(np.sort(rest[:size]), np.sort(chosen), np.sort(test), of, 'validation')
  held = min(5000, len(rest) // 10) if held_out is None else held_out
  size = len(rest) - held if subset is None else subset
  if held < 0 or size < 1 or held + size > len(rest):
    raise DataError(
      f'data {name!r}: has {len(rest)} {noun} to train on, got held_out={held}, '
      f'subset={size}: together at most {len(rest)}, and subset at least 1'
    )
  train = np.sort(rest[held : held + size])
  return Rows(train, np.sort(rest[:held]), np.sort(test), of)


# Limits that containers and batch systems set (control groups 2 and 1).
LIMITS = '/sys/fs/cgroup/memory.max', '/sys/fs/cgroup/memory/memory.limit_in_bytes'


def memory_of_process() -> int:
  """Returns the bytes that this process may use, by the machine or its container."""
  limits = [os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES')]
  for path in LIMITS:
    text = Path(path).read_text().strip() if Path(path).is_file() else ''
    limits += [int(text)] if text.isdecimal() else []
  return min(limits)


def memory_of_device() -> int:
  """Returns the bytes of this process's smallest device; a CPU has the machine's."""
  stats = [device.memory_stats() or {} for device in jax.local_devices()]
  return min(each.get('bytes_limit', memory_of_process()) for each in stats)
