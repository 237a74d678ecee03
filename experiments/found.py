"""Committed result files, and the Markdown that tables are made of."""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from depthprune.report.numbers import spread

HERE = Path(__file__).parent


def load(path: str | Path) -> dict[str, Any]:
  """A result file; `path` is relative to experiments/."""
  return json.loads((HERE / path).read_text())


def files(paper: str, *keys: str) -> dict[Path, dict[str, Any]]:
  """{path: content} of a paper's result files that have rows with these keys."""
  found = {p: load(p) for p in sorted((HERE / paper / 'results').glob('*.json'))}
  has = lambda row: all(key in row for key in keys)
  return {p: f for p, f in found.items() if any(map(has, f.get('rows', [])))}


def link(path: str | Path) -> str:
  """`path`, relative to experiments/ or absolute, as the README links to it."""
  relative = (HERE / path).relative_to(HERE)
  return f'[{relative}](experiments/{relative})'


def notes(found: dict[str, Any]) -> str:
  """What was written beside the rows, as sentences after the table's head."""
  return ''.join(f' Note: {note}.' for note in found.get('notes', ()))


def percent(values: Iterable[float]) -> str:
  return spread(100 * v for v in values)


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
  lines = [head, ['---'] * len(head), *rows]
  return '\n'.join('| ' + ' | '.join(line) + ' |' for line in lines)
