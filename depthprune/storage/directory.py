"""The directory of a run: locked by one run at a time, intact when a disk is full.

JSON files in it are complete or absent, lines are appended whole, and errors of the
system become messages that say whether to make room or to correct the path.
"""

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

import numpy as np
from etils import epy

from depthprune.storage import files

with epy.lazy_imports():  # a report is written without them, in half the time
  import jax

  from depthprune import distributed

LOCK = '.lock'
PACKAGES = (
  'depthprune jax jaxlib flax optax orbax-checkpoint numpy grain pillow'.split()
)
# Wrong paths and missing rights; any other error may be gone at the next attempt.
MISTAKES = {
  getattr(errno, f'E{name}')
  for name in 'ACCES PERM ROFS EXIST NOTDIR ISDIR NOENT NAMETOOLONG LOOP'.split()
}
NO_LOCKS = {errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK}
ERROR_NUMBER = re.compile(r"os_error_code='(\d+)'")


class WriteError(OSError):
  """A file could not be written, but may be later, as on a full disk."""


class PathError(ValueError):
  """A path where nothing can be written, however often it is tried."""


class InUse(ValueError):
  """A directory is locked by another run that is alive; the message says which."""


@contextmanager
def writing(path: Path) -> Iterator[None]:
  """Turns an OSError within into the WriteError or PathError of `failed`."""
  try:
    yield
  except WriteError:
    raise
  except OSError as error:
    raise failed(path, error) from error


@contextmanager
def complete(path: Path) -> Iterator[Path]:
  """Makes a folder that appears at a path at once, with all that is written within.

  Yields the folder to write to. It is removed if something is raised, and an OSError
  becomes the WriteError or PathError of `failed`.
  """
  fresh = path.with_name(f'.unfinished-{path.name}')
  remove(fresh)
  with writing(path):
    fresh.mkdir(parents=True)
    try:
      yield fresh
      fresh.rename(path)
    except BaseException:
      shutil.rmtree(fresh, ignore_errors=True)
      raise


def failed(path: Path, error: BaseException) -> WriteError | PathError:
  """Converts an error of the system, possibly wrapped by tensorstore, for the user.

  Returns:
    PathError if another attempt cannot help, otherwise WriteError.
  """
  if isinstance(error, WriteError | PathError):
    return error
  text = str(error) or type(error).__name__
  number = getattr(error, 'errno', None) or (ERROR_NUMBER.findall(text) or [None])[-1]
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
  """Removes a folder so that it is never seen half empty, by renaming it first."""
  away = folder.with_name(f'.discarded-{folder.name}')
  remove(away)
  folder.rename(away)
  shutil.rmtree(away)


def remove(path: Path) -> None:
  """Removes a folder, a file or a link at a path, not what a link leads to."""
  if path.is_dir() and not path.is_symlink():
    shutil.rmtree(path, ignore_errors=True)
  else:
    path.unlink(missing_ok=True)


def empty(folder: Path) -> None:
  """Removes everything in a directory.

  Raises:
    InUse: a run that is alive has locked it.
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
  """Locks a directory for this run, as a context manager; it is made if necessary.

  The lock ends with the process, however it dies. Of several processes, one takes it
  and all raise its error. On a file system without locks there is a warning.

  Raises:
    InUse: a run that is alive has locked it.
    PathError: it cannot be made.
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
    lock = open(folder / LOCK, 'a+', opener=_opened_itself)  # noqa: SIM115
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


def _opened_itself(path: str, flags: int) -> int:
  """Opens a file, which must not be a link to one elsewhere."""
  return os.open(path, flags | os.O_NOFOLLOW, 0o666)


def write(path: Path, values: Mapping[str, Any]) -> None:
  """Writes a JSON object; if the run is killed, the old file or the new one is there.

  Raises:
    WriteError: the disk is full.
  """
  if distributed.writes():
    write_text(path, json.dumps(values, indent=1) + '\n')


def write_text(path: Path, text: str) -> None:
  """Writes a file beside, and renames it: the old file or the new one is there.

  A link is replaced, not followed.

  Raises:
    WriteError: the disk is full.
  """
  scratch = path.with_suffix('.partial')
  with writing(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    remove(scratch)
    with scratch.open('x', encoding='utf-8') as file:
      file.write(text)
    os.replace(scratch, path)


def read(path: Path, kind: Any = dict[str, Any]) -> Any:
  """Reads what `write` wrote; returns None if there is no file.

  A damaged file, as a crash of the machine leaves it, also gives None, with a warning.

  Args:
    path: the file.
    kind: type of the values, as in `storage.files`. A file with others is damaged.
  """
  if not path.exists():
    return None
  try:
    return files.read_json(path, kind, ValueError)
  except ValueError as error:
    warnings.warn(f'{path}: damaged, and not looked at: {error}', stacklevel=2)
    return None


def append(path: Path, values: Mapping[str, Any]) -> None:
  """Appends a JSON object as one line, also after a line that was cut short.

  A step that was repeated has several lines, of which readers take the last.

  Raises:
    WriteError: the disk is full.
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
  """Converts a tree of arrays to numbers and lists, for JSON."""
  return jax.tree.map(lambda x: np.asarray(x).tolist(), jax.device_get(tree))


def versions() -> dict[str, str]:
  """Returns the installed versions of Python and of packages that results depend on."""
  installed = {'python': sys.version.split()[0]}
  for package in PACKAGES:
    try:
      installed[package] = importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
      installed[package] = 'not installed'
  return installed


def command() -> str:
  """Returns the command of this process, without the path to the interpreter."""
  spec = getattr(sys.modules['__main__'], '__spec__', None)
  if spec is not None:
    module = spec.name.removesuffix('.__main__')
    return shlex.join(['python', '-m', module, *sys.argv[1:]])
  return shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])
