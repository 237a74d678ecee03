"""Reading what a run left in its directory."""

import json
from pathlib import Path
from typing import Any, NamedTuple

NEEDED = ('accuracy', 'flops', 'params', 'widths', 'model', 'data')
NAMED = ('options', 'rounds')  # where 'method' says which it is
GATES = ('target', 'of')


class RunError(ValueError):
  """A directory that no report can be made of: which file, what to do."""


class Run(NamedTuple):
  """A finished run: result.json, history.jsonl and gates.jsonl, read."""

  path: Path
  result: dict[str, Any]
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
  return Run(
    path,
    result,
    _latest(history, 'stage', 'step'),
    _latest(gates, 'stage', 'step'),
    damaged + damaged_gates,
  )


def _result(path: Path) -> dict[str, Any]:
  if not path.is_file():
    raise RunError(
      f'{path}: not there, so the run has not finished (or never began); '
      'start the same `depthprune run` again and it continues where it stopped'
    )
  try:
    result = json.loads(path.read_text())
  except ValueError as error:
    raise RunError(f'{path}: expected JSON, got {error}; run it again') from error
  needed = NEEDED + (NAMED if 'method' in result else GATES)
  missing = [key for key in needed if key not in result]
  if missing:
    raise RunError(
      f'{path}: expected the keys {", ".join(needed)}, {", ".join(missing)} missing; '
      'it was written by another program or version'
    )
  return result if 'method' in result else _named(result)


def _named(result: dict[str, Any]) -> dict[str, Any]:
  """A result from when there was one method: its options stood beside the rest."""
  options = {key: result[key] for key in GATES}
  return {**result, 'method': 'trainable_gates', 'options': options}


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


def _latest(records: list[dict[str, Any]], *keys: str) -> list[dict[str, Any]]:
  """One record per key, the last written; stages in order of appearance, by step."""
  last = {tuple(record.get(key) for key in keys): record for record in records}
  stages = {record.get('stage'): None for record in records}
  order = {stage: index for index, stage in enumerate(stages)}
  return sorted(
    last.values(), key=lambda record: (order[record.get('stage')], record['step'])
  )
