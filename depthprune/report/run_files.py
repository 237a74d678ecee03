"""Reading the files of a finished run: its result, its history and its gates."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, NamedTuple, TypedDict

from depthprune import methods
from depthprune.run.config import check_options
from depthprune.storage import files
from depthprune.train.result import Result, from_json


class RunError(ValueError):
  """No report can be made of a directory; the message says why and what to do."""


# What was measured may be NaN or infinite, and is drawn with a gap.
Number = Annotated[Any, files.Rule('a number', lambda x: type(x) in (int, float, bool))]


class Place(TypedDict):
  """What every line says of where it belongs."""

  stage: str | None
  step: Annotated[int, files.at_least(0)]


class FinishedRun(NamedTuple):
  """The files of a finished run.

  Attributes:
    path: the run's directory.
    result: the result, from result.json.
    history: lines of history.jsonl, one for every few steps of training.
    gates: lines of gates.jsonl, with what the method had learnt.
    notes: sentences about lines that could not be read.
  """

  path: Path
  result: Result
  history: list[dict[str, Any]]
  gates: list[dict[str, Any]]
  notes: list[str]


def read(path: str | Path) -> FinishedRun:
  """Reads the directory of a run.

  A resumed run repeats the steps since its last checkpoint, and the later record of a
  step replaces the earlier one. Lines cut short by a kill are skipped and noted.

  Raises:
    RunError: the run has not finished, or the directory is not that of a run.
  """
  path = Path(path)
  if not path.is_dir():
    raise RunError(
      f'{path}: expected the directory of a run, found '
      f'{"a file" if path.exists() else "nothing"}; '
      'give the one that `depthprune run` wrote'
    )
  result = read_result(path / 'result.json')
  history, damaged = _lines(path / 'history.jsonl')
  gates, damaged_gates = _lines(path / 'gates.jsonl')
  return FinishedRun(
    path, result, _latest(history), _latest(gates), damaged + damaged_gates
  )


@contextmanager
def fitting(path: Path) -> Iterator[None]:
  """Says of the files in a directory that they do not fit together.

  Each may be as expected, and yet a line of one may name what the other does not have.

  Raises:
    RunError: what is made of them within fails.
  """
  try:
    yield
  except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
    said = str(error).splitlines() or ['']
    raise RunError(
      f'{path}: its files do not fit together ({type(error).__name__}: '
      f'{said[0]:.200}); they were changed, or written by another program or version'
    ) from error


def read_result(path: Path) -> Result:
  """Reads a result.json; raises RunError if there is none, or it is of another kind."""
  if not path.exists():
    raise RunError(
      f'{path}: not there, so the run has not finished (or never began); '
      'start the same `depthprune run` again and it continues where it stopped'
    )
  values = files.read_json(path, dict[str, Any], RunError)
  try:
    result = from_json(values)
    methods.check(result.method)
    check_options(result.method, result.options)
    return result
  except ValueError as error:
    raise RunError(
      f'{path}: {error}; it was written by another program or version'
    ) from error


def _lines(path: Path) -> tuple[list[dict[str, Any]], list[str]]:
  """Returns the records of a .jsonl file, if it exists, and notes about bad lines."""
  records, damaged = [], 0
  for line in path.read_bytes().splitlines() if path.is_file() else []:
    try:
      record = files.parsed(line, dict[str, Any], path.name, RunError)
      place = {'stage': record.get('stage'), 'step': record.get('step')}
      files.checked(place, Place, path.name, RunError)
      rest = [v for v in record.values() if not isinstance(v, str | None)]
      files.checked(rest, list[Number | dict[str, Number]], path.name, RunError)
    except RunError:
      damaged += 1
    else:
      records.append(record)
  notes = [f'{path.name}: {damaged} unreadable line(s) skipped'] if damaged else []
  return records, notes


def _latest(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
  """Returns the last record of every step, by stage in order of appearance."""
  last = {(record.get('stage'), record.get('step')): record for record in records}
  stages = {record.get('stage'): None for record in records}
  order = {stage: index for index, stage in enumerate(stages)}
  return sorted(
    last.values(), key=lambda record: (order[record.get('stage')], record['step'])
  )
