"""Tables of a user's own, .csv, .tsv or .jsonl: texts and classes, or rows of numbers.

The first line of a .csv or .tsv names the columns; every line of a .jsonl is an object.
The class is in the column label (or class, target, y), and the text in text or
sentence; a pair of texts in sentence1 and sentence2, or premise and hypothesis. With
two columns alone, the first is the text and the second the class. If all other columns
are numbers, they are the features. A column split says train, validation or test.
"""

import csv
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from depthprune.data import labels
from depthprune.data.arrays import LABELS
from depthprune.data.dataset import DataError

SUFFIXES = '.csv', '.tsv', '.jsonl'
TEXT = 'text', 'sentence'
PAIRS = (
  ('sentence1', 'sentence2'),
  ('premise', 'hypothesis'),
  ('question1', 'question2'),
)


def read(path: str) -> dict[str, Any]:
  """Reads a table as arrays: {'x_train', 'y_train', ...}, for `arrays.source`.

  Raises:
    DataError: there is no such file, a line is damaged, or the columns are not clear.
  """
  if not Path(path).is_file():
    raise DataError(f'data {path}: there is no such file')
  lines = _json_lines(path) if path.endswith('.jsonl') else _csv_lines(path)
  try:
    rows = list(lines)
  except UnicodeDecodeError as error:
    raise DataError(f'data {path}: expected text in UTF-8: {error}') from error
  if not rows:
    raise DataError(f'data {path}: expected rows, got none')
  columns = list(rows[0][1])
  for line, row in rows:
    if list(row) != columns and {*row} != {*columns}:
      raise DataError(
        f'{path}, line {line}: expected the columns {", ".join(columns)}, got '
        f'{", ".join(map(str, row))}'
      )
  split_column = next((c for c in columns if c.lower() == 'split'), None)
  values = [row for _, row in rows]
  label = _label(path, [c for c in columns if c != split_column])
  rest = [c for c in columns if c not in (label, split_column)]
  read = _features if _numeric(values, rest) else _text(path, rest)
  made: dict[str, list] = {}
  for line, row in rows:
    split = labels.split_of(str(row[split_column])) if split_column else 'train'
    y = row[label]
    if split is None or y in (None, ''):
      what = 'label' if split else 'split train, validation or test'
      raise DataError(f'{path}, line {line}: expected a {what}, got {row}')
    made.setdefault(f'x_{split}', []).append(read(row, rest))
    made.setdefault(f'y_{split}', []).append(y)
  given = {key: of for key, of in made.items() if key.startswith('y')}
  try:  # in a .csv, numbers are strings
    whole = {key: [int(y) for y in of] for key, of in given.items()}
  except (TypeError, ValueError):
    whole = {key: [str(y) for y in of] for key, of in given.items()}
  return {**made, **whole}


def _csv_lines(path: str) -> Iterator[tuple[int, dict[str, Any]]]:
  with Path(path).open(newline='', encoding='utf-8-sig') as file:
    reader = csv.DictReader(file, delimiter='\t' if path.endswith('.tsv') else ',')
    try:
      for row in reader:
        if None in row or None in row.values():
          raise DataError(
            f'{path}, line {reader.line_num}: expected {len(reader.fieldnames or ())} '
            f'columns ({", ".join(reader.fieldnames or ())}), got '
            f'{"more" if None in row else "fewer"}'
          )
        yield reader.line_num, row
    except csv.Error as error:
      raise DataError(f'{path}, line {reader.line_num}: {error}') from error


def _json_lines(path: str) -> Iterator[tuple[int, dict[str, Any]]]:
  with Path(path).open(encoding='utf-8-sig') as file:
    for number, line in enumerate(file, 1):
      if not line.strip():
        continue
      try:
        row = json.loads(line)
      except ValueError as error:
        raise DataError(f'{path}, line {number}: not JSON: {error}') from error
      if not isinstance(row, dict):
        raise DataError(f'{path}, line {number}: expected an object, got {line[:40]!r}')
      yield number, row


def _label(path: str, columns: list[str]) -> str:
  """Returns the column of the class."""
  by_name = {c.lower(): c for c in columns}
  named = [by_name[word] for word in LABELS if word in by_name]
  if not named and len(columns) != 2:
    raise DataError(
      f'data {path}: expected a column {" or ".join(LABELS)}, or two columns, got '
      f'{", ".join(columns)}'
    )
  if len(columns) < 2:
    raise DataError(f'data {path}: expected something beside {columns[0]}, got nothing')
  return (*named, columns[-1])[0]


def _numeric(rows: list[dict[str, Any]], columns: list[str]) -> bool:
  """Whether the columns hold numbers alone, and none is called a text."""
  if any(c.lower() in TEXT for c in columns):
    return False
  try:
    _ = [float(row[c]) for row in rows for c in columns]
  except (TypeError, ValueError):
    return False
  return True


def _features(row: dict[str, Any], columns: list[str]) -> list[float]:
  return [float(row[c]) for c in columns]


def _text(path: str, columns: list[str]) -> Callable[..., Any]:
  """Returns (row, columns) -> its text, or its pair of texts."""
  by_name = {c.lower(): c for c in columns}
  for pair in PAIRS:
    if all(word in by_name for word in pair):
      return lambda row, _: tuple(str(row[by_name[word]]) for word in pair)
  texts = [by_name[word] for word in TEXT if word in by_name] or columns
  if len(texts) > 1:
    raise DataError(
      f'data {path}: expected a column {" or ".join(TEXT)}, or a pair such as '
      f'{" and ".join(PAIRS[0])}, or numbers in all columns, got {", ".join(columns)}'
    )
  return lambda row, _: str(row[texts[0]])
