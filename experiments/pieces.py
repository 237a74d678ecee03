"""Long experiments in pieces: stop after some minutes, go on with the next call.

Rows are written as they are done, and a row that was interrupted resumes from the
checkpoints of its run. Calls for different seeds may run side by side.
"""

import argparse
import contextlib
import fcntl
import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from depthprune.training import record, results
from depthprune.training.keeper import same_config


class TimeIsUp(BaseException):
  """Raised wherever the program is when its minutes are over."""


class Arguments(NamedTuple):
  """full: the accelerator's size instead of the CPU's. minutes: 0 is no limit. seeds:
  of the rows to add; none are all of the experiment."""

  full: bool
  minutes: float
  seeds: tuple[int, ...]


def arguments(description: str | None) -> Arguments:
  """`--full`, `--minutes` and `--seeds`, which every experiment understands."""
  parser = argparse.ArgumentParser(
    description=description, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('--full', action='store_true', help='the size for an accelerator')
  parser.add_argument('--minutes', type=float, default=0, help='stop after; 0: never')
  parser.add_argument(
    '--seeds', type=int, nargs='+', default=(), help='of the rows to add; default all'
  )
  given = parser.parse_args()
  return Arguments(given.full, given.minutes, tuple(given.seeds))


@contextlib.contextmanager
def within(minutes: float) -> Iterator[None]:
  """Ends what is inside when the minutes are over, and says how to go on."""

  def stop(signum, frame):
    raise TimeIsUp

  before = signal.signal(signal.SIGALRM, stop)
  signal.setitimer(signal.ITIMER_REAL, 60 * minutes)
  try:
    yield
  except TimeIsUp:
    print(f'stopped after {minutes:g} minutes; the same command goes on from here')
  finally:
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, before)


class Rows:
  """The rows of one result file: those that are there, and new ones as they come."""

  def __init__(self, path: Path, config: Any, keys: tuple[str, ...]):
    """`keys`: the entries of a row that say which one it is.

    Raises: CheckpointError where the file has rows of another config.
    """
    self.path, self.keys, self.config = path, keys, config
    found = self._there()
    self.rows = found.get('rows', [])
    self.header = {
      'config': config,
      'command': record.command(),
      **results.surroundings(),
      **{k: found[k] for k in ('notes',) if k in found},  # written beside the rows
    }

  def missing(self, **which: Any) -> bool:
    self.rows = self._there().get('rows', [])  # other calls may have added to it
    return all(any(row.get(k) != which.get(k) for k in self.keys) for row in self.rows)

  def add(self, row: dict[str, Any]) -> None:
    with _alone_in(self.path.parent):  # others may have added rows of other seeds
      if not self.missing(**row):
        print(f'another call has added this row: {[row.get(k) for k in self.keys]}')
        return
      self.rows = [*self.rows, row]
      record.write(self.path, {**self.header, 'rows': self.rows})
    print({k: v for k, v in row.items() if not isinstance(v, list | dict)}, flush=True)

  def _there(self) -> dict[str, Any]:
    found = json.loads(self.path.read_text()) if self.path.is_file() else {}
    if found:
      same_config(found['config'], self.config, str(self.path))
    return found


@contextlib.contextmanager
def _alone_in(folder: Path) -> Iterator[None]:
  """Waits for other processes that are in here with the same folder."""
  folder.mkdir(parents=True, exist_ok=True)
  handle = os.open(folder, os.O_RDONLY)
  try:
    fcntl.flock(handle, fcntl.LOCK_EX)
    yield
  finally:
    os.close(handle)
