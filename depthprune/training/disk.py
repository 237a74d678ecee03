"""A run's directory: of one run at a time, and still whole where the disk is full."""

import fcntl
import json
import os
import re
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from depthprune.training import hosts

LOCK = '.lock'
OF_SYSTEM = re.compile(r"os_error_code='(\d+)'")


class WriteError(OSError):
  """Something could not be written: where, why, and that what was saved is whole."""


class InUse(ValueError):
  """A directory in which another run is alive; the message says which."""


@contextmanager
def writing(path: Path) -> Iterator[None]:
  """Raises WriteError for any OSError within: no room, no right, no such disk."""
  try:
    yield
  except WriteError:
    raise
  except OSError as error:
    raise failed(path, error) from error


def failed(path: Path, error: BaseException) -> WriteError:
  """What to say of an error of the system, or one in which tensorstore tells of it."""
  text = str(error) or type(error).__name__
  number = getattr(error, 'errno', None) or (OF_SYSTEM.findall(text) or [None])[-1]
  reason = os.strerror(int(number)) if number else text.splitlines()[0]
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


@contextmanager
def held(folder: Path) -> Iterator[None]:
  """Within, the directory is this run's alone; a process that dies lets go of it.

  Raises: InUse where a live run has it, WriteError where it cannot be made; of several
    processes all do.
  """
  lock = hosts.together(lambda: _locked(folder) if hosts.writes() else None)
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
  with writing(folder):
    lock.truncate(0)
    lock.write(json.dumps({'process': os.getpid(), 'host': socket.gethostname()}))
    lock.flush()
  return lock
