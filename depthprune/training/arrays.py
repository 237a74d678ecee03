"""Arrays on disk by name: an orbax checkpoint, or a file of safetensors."""

import logging
import zlib
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import orbax.checkpoint as ocp
import safetensors.numpy

from depthprune.training import hosts

ORBAX, TENSORS = 'arrays', 'weights.safetensors'


def inside(folder: Path, files: Collection[str]) -> Path:
  """Where the arrays of a folder lie, of which `checksums` told the names of files."""
  return folder / (TENSORS if TENSORS in files else ORBAX)


def checksums(where: Path) -> dict[str, int]:
  """{name: CRC-32} of a file, or of all files in a folder."""
  files = [where] if where.is_file() else sorted(where.rglob('*'))
  top = where.parent if where.is_file() else where
  return {
    p.relative_to(top).as_posix(): zlib.crc32(p.read_bytes())
    for p in files
    if p.is_file()
  }


def begin(
  folder: Path, arrays: Mapping[str, np.ndarray], tensors: bool
) -> Callable[[], Path]:
  """Begins to write arrays into a folder, which may be changed once this returns.

  Of an array that is split over processes each writes its part; not of `tensors`.

  Returns: what waits for the end, raises what orbax met, and returns the file or folder
    in `folder` that holds the arrays.
  """
  if tensors:
    whole = folder / TENSORS
    if hosts.writes():
      save_tensors(whole, arrays)
    return lambda: whole
  # Orbax refuses empty arrays; who reads them knows their shapes.
  filled = {name: array for name, array in arrays.items() if array.size}
  orbax = ocp.AsyncCheckpointer(ocp.PyTreeCheckpointHandler())
  if filled:
    with _quiet():
      orbax.save((folder / ORBAX).absolute(), args=ocp.args.PyTreeSave(filled))

  def end():
    with _quiet():
      orbax.close()
    return folder / ORBAX

  return end


@contextmanager
def _quiet() -> Iterator[None]:
  """What orbax logs of an error, many times, is raised as well."""
  log, others = logging.getLogger('absl'), lambda record: 'orbax' not in record.pathname
  log.addFilter(others)
  try:
    yield
  finally:
    log.removeFilter(others)


def save_tensors(path: Path, arrays: Mapping[str, np.ndarray]) -> Path:
  """Writes arrays as one file of safetensors; returns its path."""
  # Memory is written as it lies, whatever the strides of an array say.
  rows = {name: np.array(array, order='C') for name, array in arrays.items()}
  path.write_bytes(safetensors.numpy.save(rows))  # save_file lets only us read it
  return path


def load(where: Path, names: Collection[str]) -> dict[str, np.ndarray]:
  """The arrays that `save` wrote there, none of them empty; raises what readers do."""
  if not names:
    return {}
  if where.name == TENSORS:
    return safetensors.numpy.load_file(where)
  wanted = {name: ocp.RestoreArgs(restore_type=np.ndarray) for name in names}
  with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as orbax:
    return orbax.restore(
      where.absolute(), args=ocp.args.PyTreeRestore(restore_args=wanted)
    )
