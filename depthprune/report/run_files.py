"""Reading what a run left in its directory."""

import json
from pathlib import Path
from typing import Any, NamedTuple

from depthprune import methods
from depthprune.train.result import Result, from_json


class RunError(ValueError):
  """A directory that no report can be made of: which file, what to do."""


class Run(NamedTuple):
  """A finished run: result.json, history.jsonl and gates.jsonl, read.

  Attributes:
    path: its directory. result: what it reached.
    history: a line for every few steps of training. gates: what the method had learnt.
    notes: what could not be read.
  """

  path: Path
  result: Result
  history: list[dict[str, Any]]
  gates: list[dict[str, Any]]
  notes: list[str]


def read(path: str | Path) -> Run:
  """Reads a run directory; raises RunError where there is nothing to report on.

  A resumed run repeats the steps since its last checkpoint: the later record of a
  step replaces the earlier one. Lines cut short by a kill are skipped and noted.
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
  return Run(path, result, _latest(history), _latest(gates), damaged + damaged_gates)


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
  """The records of a .jsonl file (none where it is absent), and what was skipped."""
  records, damaged = [], 0
  for line in path.read_text().splitlines() if path.is_file() else []:
    try:
      records.append(json.loads(line))
    except ValueError:
      damaged += 1
  notes = [f'{path.name}: {damaged} unreadable line(s) skipped'] if damaged else []
  return records, notes


def _latest(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
  """One record per step, the last written; stages in order of appearance, by step."""
  last = {(record.get('stage'), record.get('step')): record for record in records}
  stages = {record.get('stage'): None for record in records}
  order = {stage: index for index, stage in enumerate(stages)}
  return sorted(
    last.values(), key=lambda record: (order[record.get('stage')], record['step'])
  )
