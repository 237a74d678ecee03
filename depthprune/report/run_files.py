"""Reading the files of a finished run: its result, its history and its gates."""

import json
from pathlib import Path
from typing import Any, NamedTuple

from depthprune import methods
from depthprune.train.result import Result, from_json


class RunError(ValueError):
  """No report can be made of a directory; the message says why and what to do."""


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
  result = _result(path / 'result.json')
  history, damaged = _lines(path / 'history.jsonl')
  gates, damaged_gates = _lines(path / 'gates.jsonl')
  return FinishedRun(
    path, result, _latest(history), _latest(gates), damaged + damaged_gates
  )


def _result(path: Path) -> Result:
  if not path.is_file():
    raise RunError(
      f'{path}: not there, so the run has not finished (or never began); '
      'start the same `depthprune run` again and it continues where it stopped'
    )
  try:
    values = json.loads(path.read_text())
  except ValueError as error:
    raise RunError(f'{path}: expected JSON, got {error}; run it again') from error
  try:
    result = from_json(values)
    methods.check(result.method)
    return result
  except ValueError as error:
    raise RunError(
      f'{path}: {error}; it was written by another program or version'
    ) from error


def _lines(path: Path) -> tuple[list[dict[str, Any]], list[str]]:
  """Returns the records of a .jsonl file, if it exists, and notes about bad lines."""
  records, damaged = [], 0
  for line in path.read_text().splitlines() if path.is_file() else []:
    try:
      records.append(json.loads(line))
    except ValueError:
      damaged += 1
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
