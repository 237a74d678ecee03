"""The result files of the experiments: how they are filled, found, read and shown.

A result file is PAPER/results/NAME.json, or NAME_full.json at the size for an
accelerator. It holds the config, the command, the versions, the device, and a row for
every run.
"""

import contextlib
import dataclasses
import fcntl
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from depthprune.report.numbers import spread
from depthprune.run.config import Config, from_json
from depthprune.run.job import surroundings
from depthprune.storage import directory as record
from depthprune.storage.keeper import same_config

HERE = Path(__file__).parent
Row = dict[str, Any]
Case = dict[str, Any]
"""The entries of a row that say which one it is."""


def path_of(paper: str, name: str, full: bool) -> Path:
  """The result file of an experiment at one of its two sizes."""
  return HERE / paper / 'results' / f'{name}{"_full" if full else ""}.json'


def read(path: str | Path) -> dict[str, Any]:
  """The content of a result file; `path` is absolute or relative to experiments/."""
  return json.loads((HERE / path).read_text())


def files_with(paper: str, *keys: str) -> dict[Path, dict[str, Any]]:
  """{path: content} of those result files of a paper that have rows with these keys."""
  contents = {p: read(p) for p in sorted((HERE / paper / 'results').glob('*.json'))}
  has_keys = lambda row: all(key in row for key in keys)
  return {p: c for p, c in contents.items() if any(map(has_keys, c.get('rows', [])))}


class Rows:
  """The rows of one result file: those that are there, and new ones as they come.

  Several processes may add rows to the same file.
  """

  def __init__(self, path: Path, config: Any, keys: Sequence[str]):
    """Reads the rows that the file has.

    Args:
      path: The file; it need not exist.
      config: What the rows depend on, as JSON.
      keys: The entries of a row that say which one it is.

    Raises:
      CheckpointError: Where the file has rows of another config.
    """
    self.path, self.keys, self.config = path, keys, config
    content = self._content()
    self.rows = content.get('rows', [])
    self.header = {
      'config': config,
      'command': record.command(),
      **surroundings(),
      **{k: content[k] for k in ('notes',) if k in content},  # written by hand
    }

  def missing(self, **case: Any) -> bool:
    self.rows = self._content().get('rows', [])  # another process may have added rows
    return all(any(row.get(k) != case.get(k) for k in self.keys) for row in self.rows)

  def add(self, row: Row) -> None:
    with _alone_in(self.path.parent):
      if not self.missing(**row):
        which = [row.get(k) for k in self.keys]
        print(f'another process has added this row: {which}')
        return
      self.rows = [*self.rows, row]
      record.write(self.path, {**self.header, 'rows': self.rows})
    print({k: v for k, v in row.items() if not isinstance(v, list | dict)}, flush=True)

  def _content(self) -> dict[str, Any]:
    content = json.loads(self.path.read_text()) if self.path.is_file() else {}
    if content:
      same_config(_completed(content['config']), self.config, str(self.path))
    return content


def _completed(stored: dict[str, Any]) -> dict[str, Any]:
  """A stored config, and those in it, with the fields that later versions added."""
  values = {k: _completed(v) if isinstance(v, dict) else v for k, v in stored.items()}
  if 'method' not in values:
    return values
  known = {'method', *(field.name for field in dataclasses.fields(Config))}
  now = from_json({k: v for k, v in values.items() if k in known}).to_json()
  return {**now, **values, 'options': now['options']}


@contextlib.contextmanager
def _alone_in(folder: Path) -> Iterator[None]:
  """Waits until no other process is in this block with the same folder."""
  folder.mkdir(parents=True, exist_ok=True)
  handle = os.open(folder, os.O_RDONLY)
  try:
    fcntl.flock(handle, fcntl.LOCK_EX)
    yield
  finally:
    os.close(handle)


def link(path: str | Path, up: str = '') -> str:
  """The Markdown link to a path, absolute or below experiments/.

  `up` leads from the folder of the file that has the link to that of the README.
  """
  relative = (HERE / path).relative_to(HERE)
  return f'[{relative}]({up}experiments/{relative})'


def notes(content: dict[str, Any]) -> str:
  """The notes beside the rows of a result file, as sentences."""
  return ''.join(f' Note: {note}.' for note in content.get('notes', ()))


def percent(fractions: Iterable[float]) -> str:
  """The mean of fractions in percent, with its standard deviation."""
  return spread(100 * fraction for fraction in fractions)


def table(head: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
  """A Markdown table."""
  cells = [head, ['---'] * len(head), *lines]
  return '\n'.join('| ' + ' | '.join(line) + ' |' for line in cells)
