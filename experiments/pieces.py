"""Long experiments in pieces: stop after some minutes, go on with the next call.

Rows are written as they are done, and a row that was interrupted resumes from the
checkpoints of its run. Calls for different seeds may run side by side.
"""

import argparse
import contextlib
import dataclasses
import fcntl
import functools
import json
import os
import shutil
import signal
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from depthprune.run import result as results
from depthprune.run.config import Config
from depthprune.storage import directory as record
from depthprune.storage.keeper import same_config

HERE = Path(__file__).parent
SEEDS = 3
Case = dict[str, Any]
"""The entries of a row that say which one it is."""


class TimeIsUp(BaseException):
  """Raised wherever the program is when its minutes are over."""


class Arguments(NamedTuple):
  """full: the accelerator's size instead of the CPU's. minutes: 0 is no limit. seeds:
  of the rows to add; none are all of the experiment. left: only say what is left."""

  full: bool = False
  minutes: float = 0
  seeds: tuple[int, ...] = ()
  left: bool = False


def arguments(description: str | None) -> Arguments:
  """What every experiment understands, from the command line."""
  parser = argparse.ArgumentParser(
    description=description, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('--full', action='store_true', help='the size for an accelerator')
  parser.add_argument('--minutes', type=float, default=0, help='stop after; 0: never')
  parser.add_argument(
    '--seeds', type=int, nargs='+', default=(), help='of the rows to add; default all'
  )
  parser.add_argument('--left', action='store_true', help='only say what is left')
  given = parser.parse_args()
  return Arguments(given.full, given.minutes, tuple(given.seeds), given.left)


def main(doc: str | None, run: Callable[[Arguments], list[Case]]) -> None:
  """The command of one experiment: run(arguments) -> the cases that are left."""
  left = run(arguments(doc))
  print(f'{len(left)} rows are left{":" if left else ""}', *left[:5], sep='\n  ')


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


def fill(
  rows: Rows,
  cases: Callable[[], Iterable[Case]],
  make: Callable[[Case], Mapping[str, Any]],
  given: Arguments,
  scratch: Callable[[Case], Path],
) -> list[Case]:
  """Adds the rows that are missing, case by case, within the minutes given.

  Args:
    cases: all there are to be, in order; they may depend on rows that are there.
    make: the rest of the row of a case. scratch: a folder that goes when it is added.

  Returns: the cases that are left.
  """
  if not given.left:
    with within(given.minutes):
      for case in cases():
        if rows.missing(**case):
          rows.add({**case, **make(case)})
          shutil.rmtree(scratch(case), ignore_errors=True)
  return [case for case in cases() if rows.missing(**case)]


def sized(
  paper: str, name: str, full: Config, small: Mapping[str, Any], given: Arguments
) -> tuple[Path, Config]:
  """(file for the rows, config) of an experiment, at one of its two sizes.

  small: what differs from `full` in the size for a CPU.
  """
  name = f'{name}_full' if given.full else name
  config = full if given.full else dataclasses.replace(full, **small)
  config = dataclasses.replace(config, workdir=f'runs/{paper}/{name}')
  return HERE / paper / 'results' / f'{name}.json', config


def folder_of(config: Config, case: Case) -> Path:
  """Where the run of a case lies."""
  return config.path / '-'.join(f'{k}{v}' for k, v in case.items())


def compare(
  to: Path,
  config: Config,
  cases: Sequence[Case],
  row: Callable[[Config, Case, list[dict[str, Any]]], Mapping[str, Any]],
  given: Arguments,
) -> list[Case]:
  """Fills the file `to`, a run for each case, those of a seed one after the other.

  Args:
    config: of all. cases: what differs, but for the seed.
    row: (config of the run, case, rows of its seed) -> the rest of its row.

  Returns: the cases that are left.
  """
  rows = Rows(to, config.to_json(), ('seed', *cases[0]))
  every = [{'seed': s, **case} for s in given.seeds or range(SEEDS) for case in cases]
  folder = functools.partial(folder_of, config)

  def make(case: Case) -> Mapping[str, Any]:
    seed, found = case['seed'], [r for r in rows.rows if r['seed'] == case['seed']]
    run = dataclasses.replace(config, seed=seed, workdir=str(folder(case)))
    return row(run, case, found)

  return fill(rows, lambda: every, make, given, folder)


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
