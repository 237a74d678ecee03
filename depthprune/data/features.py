"""Features of a frozen trunk, computed once and kept on disk.

A head that reads frozen features need not run the trunk to be trained: what it reads,
pooled, is a few kilobytes an image. The arrays are .npy files, written in place batch
by batch, so that they need not fit in memory and a killed run goes on where it was.
"""

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
SHARE = 4  # features up to one part in so many of the machine's memory are read into it


class FeatureSet(NamedTuple):
  """A `Dataset` of features of a frozen network.

  Splits are {'features': {name: float32 [n, ...]}, 'label': int32 [n]}, in memory or
  mapped from disk.
  """

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
  augments = False  # views were augmented before
  streamed = False

  @property
  def shape(self) -> tuple[int, ...]:
    """Of the features of one example, by name: there is not one shape."""
    return ()

  def on_device(self, put: Callable[[Split], Any] = jax.device_put) -> Any:
    """The training split to read batches from; what is mapped from disk stays there."""
    return self.train if self.mapped else put(self.train)

  @property
  def mapped(self) -> bool:
    """Whether the training split is on disk."""
    return any(isinstance(x, np.memmap) for x in self.train['features'].values())

  def example(self) -> tuple:
    """The features of one example, zeros."""
    one = lambda x: jnp.zeros((1, *x.shape[1:]), x.dtype)
    return (jax.tree.map(one, self.train['features']),)

  def sampler(self, key: jax.Array, size: int, augment: bool) -> 'FeatureSampler':
    """(train, step) -> training batch."""
    del augment
    return FeatureSampler(key, size, self.mapped)

  def batches(
    self, split: Split, size: int, place: Placement = HERE
  ) -> Iterator[Batch]:
    """All rows once, in order; the last batch is padded, with 'weight' 0 there."""
    n = len(split['label'])
    for start in range(0, n, size):
      rows = np.arange(start, start + size)
      taken = jax.tree.map(lambda x: jnp.asarray(x[rows.clip(max=n - 1)]), split)  # noqa: B023
      yield place.whole({**taken, 'weight': jnp.asarray(rows < n, jnp.float32)})

  def probe(self) -> dict[str, Split]:
    """All arrays."""
    return {'train': self.train, 'held_out': self.held_out, 'test': self.test}


class FeatureSampler(NamedTuple):
  """batch_at(split, step): every epoch goes through the rows in its own order.

  on_host: rows are on disk, so that batches are made outside of jit.
  """

  key: jax.Array
  size: int
  on_host: bool = False

  def __call__(self, split: Any, step: jax.Array | int) -> Any:
    if self.on_host:
      return self.stepwise()(split, int(step))
    steps = epoch_steps(split, self.size)
    step = jnp.asarray(step, jnp.int32)
    order = shuffled(self.key, step // steps, len(split['label']))
    start = step % steps * self.size
    rows = jax.lax.dynamic_slice_in_dim(order, start, self.size)
    return jax.tree.map(lambda x: x[rows], split)

  def stepwise(self, place: Placement = HERE) -> Callable[[Any, int], Any]:
    """The same for a loop on the host, for rows in memory or on disk."""
    found: dict[int, np.ndarray] = {}

    def batch_at(split, step):
      epoch, at = divmod(int(step), epoch_steps(split, self.size))
      if epoch not in found:
        found.clear()
        found[epoch] = np.asarray(shuffled(self.key, epoch, len(split['label'])))
      rows = found[epoch][at * self.size : (at + 1) * self.size]
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
  """{'features': {name: float32 [n, ...]}, 'label': int32 [n]} of all batches.

  Args:
    apply: f(variables, *inputs) -> {name: [batch, ...]}, such as `WithHeads.features`.
    batches: in an order that is always the same; rows with 'weight' 0 are left out.
    most: number of rows that they can have together.
    folder: where the arrays are kept; features that are there are read, unfinished
      ones are gone on with.
    about: what they depend on, plain JSON. Raises CheckpointError where the folder has
      those of something else.
  """
  folder.mkdir(parents=True, exist_ok=True)
  progress = folder / PROGRESS
  done = {'about': dict(about), 'batches': 0, 'rows': 0}
  before = directory.read(progress)
  if before is not None:
    done = before
    same_config(done['about'], about, str(folder))
    if done.get('finished'):
      return _read(folder, done['names'], done['rows'])
  one = jax.jit(apply)
  files: dict[str, np.memmap] = {}
  for batch in itertools.islice(batches, done['batches'], None):
    found = fetch(one(variables, *inputs_of(batch)))
    batch = fetch({k: batch[k] for k in ('label', 'weight') if k in batch})
    real = real_rows(batch)
    found = {k: np.asarray(v, np.float32) for k, v in found.items()}
    rows = {**found, 'label': np.asarray(batch['label'], np.int32)}
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
  """{name: array of `most` rows on disk}."""
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
        os.posix_fallocate(file.fileno(), 0, size)  # a full disk is no SIGBUS later
  return files


@contextmanager
def _usable(folder: Path) -> Iterator[None]:
  """Raises WriteError where there is no room, CheckpointError for a file cut short."""
  with directory.writing(folder):
    try:
      yield
    except ValueError as error:  # numpy's, of mapping a file
      raise CheckpointError(
        f'{folder}: damaged: {error}. Delete the folder: it is computed again'
      ) from error


def _read(folder: Path, names: Sequence[str], rows: int) -> Any:
  """What is there: in memory where it is small, else mapped."""
  paths = [_path(folder, i) for i in range(len(names))]
  there = dataset.of_process()
  size = sum(path.stat().st_size for path in paths)
  small = distributed.agreed(np.bool_(size * SHARE <= there))
  with _usable(folder):
    arrays = {
      name: np.load(path, mmap_mode=None if small else 'r')[:rows]
      for name, path in zip(names, paths, strict=True)
    }
  return {'label': np.array(arrays.pop('label')), 'features': arrays}


def _path(folder: Path, i: int) -> Path:
  return folder / f'{i}.npy'  # names may have a slash
