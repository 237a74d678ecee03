"""Features of a frozen trunk, computed once and kept on disk.

Heads on a frozen trunk are trained without running it: the pooled features that they
read are a few kilobytes per image. The arrays are .npy files that are filled batch by
batch, so they need not fit in memory and a killed run continues where it stopped.
"""

import functools
import itertools
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from depthprune import distributed
from depthprune.data import dataset
from depthprune.data.dataset import (
  HERE,
  Batch,
  Placement,
  Split,
  epoch_steps,
  inputs_of,
  real_rows,
  shuffled,
)
from depthprune.distributed import fetch
from depthprune.storage import directory
from depthprune.storage.checkpoint import CheckpointError
from depthprune.storage.keeper import same_config

PROGRESS = 'features.json'
SHARE = 4  # features are read into memory if they take at most 1/SHARE of it


class FeatureSet(NamedTuple):
  """A `Dataset` of features of a frozen network, in memory or mapped from disk."""

  name: str
  train: Split
  held_out: Split
  test: Split
  classes: int
  notes: tuple[str, ...] = ()

  normalisation = None
  tasks = ()
  ignore = None
  names = ()
  tokenizer = None
  augments = False  # images are augmented before their features are computed
  streamed = False

  @property
  def shape(self) -> tuple[int, ...]:
    """Returns (), as every feature has a shape of its own."""
    return ()

  def on_device(self, put: Callable[[Split], Any] = jax.device_put) -> Any:
    """Returns the training split on the device, or on disk where it is mapped."""
    return self.train if self.mapped else put(self.train)

  @property
  def mapped(self) -> bool:
    """Whether the training split is mapped from disk."""
    return any(isinstance(x, np.memmap) for x in self.train['features'].values())

  def example(self) -> tuple:
    """Returns the features of one example, all zeros."""
    one = lambda x: jnp.zeros((1, *x.shape[1:]), x.dtype)
    return (jax.tree.map(one, self.train['features']),)

  def sampler(self, key: jax.Array, size: int, augment: bool) -> 'FeatureSampler':
    """Returns the sampler of training batches; features are not augmented."""
    del augment
    return FeatureSampler(key, size, self.mapped)

  def batches(
    self, split: Split, size: int, place: Placement = HERE
  ) -> Iterator[Batch]:
    """Yields all rows once, in order; 'weight' is 0 where the last batch is padded."""
    n = len(split['label'])
    for start in range(0, n, size):
      rows = np.arange(start, start + size)
      taken = jax.tree.map(lambda x: jnp.asarray(x[rows.clip(max=n - 1)]), split)  # noqa: B023
      yield place.whole({**taken, 'weight': jnp.asarray(rows < n, jnp.float32)})

  def probe(self) -> dict[str, Split]:
    """Returns all arrays."""
    return {'train': self.train, 'held_out': self.held_out, 'test': self.test}


class FeatureSampler(NamedTuple):
  """batch_at(split, step) -> batch; every epoch goes through the rows in a new order.

  Attributes:
    key: random key of the orders.
    size: examples in a batch.
    on_host: whether rows are on disk, so that batches are made outside jit.
  """

  key: jax.Array
  size: int
  on_host: bool = False

  def __call__(self, split: Any, step: jax.Array | int) -> Any:
    if self.on_host:
      return self.stepwise()(split, int(step))
    steps = epoch_steps(split, self.size)
    step = jnp.asarray(step, jnp.int32)
    order = shuffled(self.key, step // steps, dataset.count(split))
    start = step % steps * self.size
    rows = jax.lax.dynamic_slice_in_dim(order, start, self.size)
    return jax.tree.map(lambda x: x[rows], split)

  def stepwise(self, place: Placement = HERE) -> Callable[[Any, int], Any]:
    """Returns the same function, which shuffles once per epoch and not per step."""
    order_of = functools.lru_cache(1)(
      lambda epoch, n: np.asarray(shuffled(self.key, epoch, n))
    )

    def batch_at(split, step):
      epoch, at = divmod(int(step), epoch_steps(split, self.size))
      order = order_of(epoch, dataset.count(split))
      rows = order[at * self.size : (at + 1) * self.size]
      return place.whole(jax.tree.map(lambda x: x[rows], split))

    return batch_at


def collect(
  apply: Callable[..., Mapping[str, jax.Array]],
  variables: Any,
  batches: Iterable[Any],
  most: int,
  folder: Path,
  about: Mapping[str, Any],
) -> Any:
  """Computes the features of all batches, or reads those that were computed before.

  Args:
    apply: f(variables, *inputs) -> {name: [batch, ...]}, such as `WithHeads.features`.
    variables: the variables of `apply`.
    batches: batches in a fixed order; rows of 'weight' 0 are left out.
    most: upper bound of the number of rows in all batches.
    folder: where the arrays are kept; an unfinished computation is continued.
    about: plain JSON that says what the features depend on.

  Returns:
    A split {'features': {name: float32 [n, ...]}, 'label': int32 [n]}.

  Raises:
    CheckpointError: the folder holds features of something else, or damaged ones.
    ValueError: there are no batches.
  """
  folder.mkdir(parents=True, exist_ok=True)
  progress = folder / PROGRESS
  done = directory.read(progress) or {'about': dict(about), 'batches': 0, 'rows': 0}
  same_config(done['about'], about, str(folder))
  if done.get('finished'):
    return _read(folder, done['names'], done['rows'])
  features_of = jax.jit(apply)
  files: dict[str, np.memmap] = {}
  for batch in itertools.islice(batches, done['batches'], None):
    features = fetch(features_of(variables, *inputs_of(batch)))
    batch = fetch({k: batch[k] for k in ('label', 'weight') if k in batch})
    real = real_rows(batch)
    rows: dict[str, np.ndarray] = {
      **{k: np.asarray(v, np.float32) for k, v in features.items()},
      'label': np.asarray(batch['label'], np.int32),
    }
    done['names'] = sorted(rows)
    if distributed.writes() and not files:
      files = _files(folder, rows, most, anew=not done['batches'])
    end = done['rows'] + int(real.sum())
    for name, file in files.items():
      file[done['rows'] : end] = rows[name][real]
      file.flush()
    done |= {'batches': done['batches'] + 1, 'rows': end}
    directory.write(progress, done)
  if not done['rows']:
    raise ValueError(f'{folder}: expected examples to compute features of, got none')
  directory.write(progress, {**done, 'finished': True})
  distributed.wait()
  return _read(folder, done['names'], done['rows'])


def _files(folder: Path, rows: Mapping[str, np.ndarray], most: int, anew: bool):
  """Opens {name: array of `most` rows on disk}."""
  mode = 'w+' if anew else 'r+'
  shape = lambda values: (most, *values.shape[1:]) if anew else None
  opened = np.lib.format.open_memmap
  with _usable(folder):
    files = {
      name: opened(_path(folder, i), mode, rows[name].dtype, shape(rows[name]))
      for i, name in enumerate(sorted(rows))
    }
    for i in range(len(files) if hasattr(os, 'posix_fallocate') else 0):
      with _path(folder, i).open('r+b') as file:
        size = os.fstat(file.fileno()).st_size
        # Reserved now: on a full disk, a write to the mapping would be a SIGBUS.
        os.posix_fallocate(file.fileno(), 0, size)
  return files


@contextmanager
def _usable(folder: Path) -> Iterator[None]:
  """Raises WriteError on a full disk and CheckpointError for a truncated file."""
  with directory.writing(folder):
    try:
      yield
    except ValueError as error:  # numpy raises it where it cannot map a file
      raise CheckpointError(
        f'{folder}: damaged: {error}. Delete the folder, and it is computed again'
      ) from error


def _read(folder: Path, names: Sequence[str], rows: int) -> Any:
  """Reads the arrays into memory where they are small, else maps them."""
  paths = [_path(folder, i) for i in range(len(names))]
  size = sum(path.stat().st_size for path in paths)
  small = distributed.agreed(np.bool_(size * SHARE <= dataset.memory_of_process()))
  with _usable(folder):
    arrays = {
      name: np.load(path, mmap_mode=None if small else 'r')[:rows]
      for name, path in zip(names, paths, strict=True)
    }
  return {'label': np.array(arrays.pop('label')), 'features': arrays}


def _path(folder: Path, i: int) -> Path:
  return folder / f'{i}.npy'  # numbered, because names may contain a slash
