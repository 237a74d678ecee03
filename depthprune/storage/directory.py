"""A run's directory: of one run at a time, and still whole where the disk is full."""

import contextlib
import errno
import fcntl
import importlib.metadata
import json
import os
import re
import shlex
import shutil
import socket
import sys
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

import jax
import numpy as np

from depthprune import distributed

LOCK = '.lock'
# Mistakes in a path, or rights that are missing; all else may be over the next time.
MISTAKES = {
  getattr(errno, name)
  for name in 'EACCES EPERM EROFS EEXIST ENOTDIR EISDIR ENOENT ENAMETOOLONG'.split()
}
NO_LOCKS = {errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK}
OF_SYSTEM = re.compile(r"os_error_code='(\d+)'")


class WriteError(OSError):
  """Something could not be written: where, why, and that what was saved is whole."""


class PathError(ValueError):
  """A path at which nothing can be written, whoever tries again."""


class InUse(ValueError):
  """A directory in which another run is alive; the message says which."""


@contextmanager
def writing(path: Path) -> Iterator[None]:
  """Raises WriteError for an OSError within, or PathError: as `failed` says."""
  try:
    yield
  except WriteError:
    raise
  except OSError as error:
    raise failed(path, error) from error


def failed(path: Path, error: BaseException) -> WriteError | PathError:
  """What to say of an error of the system, or one in which tensorstore tells of it:
  PathError where trying again does not help, WriteError where it may."""
  if isinstance(error, WriteError | PathError):
    return error
  text = str(error) or type(error).__name__
  number = getattr(error, 'errno', None) or (OF_SYSTEM.findall(text) or [None])[-1]
  reason = os.strerror(int(number)) if number else text.splitlines()[0]
  if number and int(number) in MISTAKES:
    return PathError(
      f'{path}: cannot be written: {reason}: check the path and who may write there, '
      'or choose another directory (--workdir)'
    )
  return WriteError(
    f'{path}: cannot be written: {reason}. What was saved before is whole: make room, '
    'and the same command continues from there'
  )


def discard(folder: Path) -> None:
  """Removes a folder so that it is never seen half empty."""
  away = folder.with_name(f'.discarded-{folder.name}')
  shutil.rmtree(away, ignore_errors=True)
  folder.rename(away)
  shutil.rmtree(away)


def empty(folder: Path) -> None:
  """Removes all that a directory holds.

  Raises: InUse where a live run has it.
  """
  if not folder.is_dir():
    return
  with contextlib.closing(_locked(folder)):
    for path in folder.iterdir():
      if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
      elif path.name != LOCK:
        path.unlink()


@contextmanager
def held(folder: Path) -> Iterator[None]:
  """Within, the directory is this run's alone; a process that dies lets go of it.

  Raises: InUse where a live run has it, PathError where it cannot be made; of several
    processes all do. Where a file system has no locks a warning says so.
  """
  lock = distributed.together(lambda: _locked(folder) if distributed.writes() else None)
  try:
    yield
  finally:
    if lock is not None:
      lock.close()


def _locked(folder: Path) -> TextIO:
  with writing(folder):
    folder.mkdir(parents=True, exist_ok=True)
    lock = (folder / LOCK).open('a+')
  try:
    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
  except BlockingIOError as error:
    lock.seek(0)
    owner = lock.read().strip() or 'it does not say which'
    lock.close()
    raise InUse(
      f'{folder}: in use by a run that is alive: {owner}. Wait for its end, stop it, '
      'or choose another directory (--workdir)'
    ) from error
  except OSError as error:
    if error.errno not in NO_LOCKS:
      raise
    warnings.warn(
      f'{folder}: this file system has no locks ({error.strerror}): start no second '
      'run in this directory',
      stacklevel=2,
    )
  with writing(folder):
    lock.truncate(0)
    lock.write(json.dumps({'process': os.getpid(), 'host': socket.gethostname()}))
    lock.flush()
  return lock


PACKAGES = (
  'depthprune',
  'jax',
  'jaxlib',
  'flax',
  'optax',
  'orbax-checkpoint',
  'numpy',
  'grain',
  'pillow',
)


def write(path: Path, values: Mapping[str, Any]) -> None:
  """Writes one JSON object; the file is whole or absent, whenever the run is killed.

  Raises: WriteError where there is no room.
  """
  if not distributed.writes():
    return
  scratch = path.with_suffix('.partial')
  with writing(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch.write_text(json.dumps(values, indent=1) + '\n')
    os.replace(scratch, path)


def read(path: Path) -> dict[str, Any] | None:
  """What `write` wrote; None where there is nothing, and, with a warning, where a
  machine that died broke it."""
  if not path.is_file():
    return None
  try:
    return json.loads(path.read_bytes())
  except ValueError as error:
    warnings.warn(f'{path}: damaged, and not looked at: {error}', stacklevel=2)
    return None


def append(path: Path, values: Mapping[str, Any]) -> None:
  """Adds one line; a reader takes the last line of a step that was repeated.

  Raises: WriteError where there is no room.
  """
  if not distributed.writes():
    return
  with writing(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open('ab+') as lines:
      if lines.tell():  # the last line may have been cut short
        lines.seek(-1, os.SEEK_END)
        lines.write(b'\n' * (lines.read(1) != b'\n'))
      lines.write(json.dumps(values).encode() + b'\n')


def plain(tree: Any) -> Any:
  """A tree of arrays as numbers and lists, for JSON."""
  return jax.tree.map(lambda x: np.asarray(x).tolist(), jax.device_get(tree))


def versions() -> dict[str, str]:
  """The installed versions of what a result depends on."""
  found = {'python': sys.version.split()[0]}
  for package in PACKAGES:
    try:
      found[package] = importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
      found[package] = 'not installed'
  return found


def command() -> str:
  """How this process was started, without the path to the interpreter."""
  spec = getattr(sys.modules['__main__'], '__spec__', None)
  if spec is not None:
    module = spec.name.removesuffix('.__main__')
    return shlex.join(['python', '-m', module, *sys.argv[1:]])
  return shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])
