"""Files that are forged: a value of a JSON file is another one, and checksums match."""

import copy
import json
import random
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from depthprune.storage import checkpoint


def sign(path: Path, record: Any) -> None:
  """Writes the record of a checkpoint with the checksums of what is there."""
  if isinstance(record, dict):
    record = {k: v for k, v in record.items() if k != 'crc32'}
    record['crc32'] = zlib.crc32(checkpoint._json(record).encode())
  path.write_text(json.dumps(record))


def deep(levels: int) -> Any:
  value: Any = 1
  for _ in range(levels):
    value = [value]
  return value


KINDS: dict[str, Callable[[Any], Any]] = {
  'dropped': lambda value: None,
  'string': lambda value: 'nobody',
  'null': lambda value: None,
  'list': lambda value: [value],
  'object': lambda value: {'nobody': value},
  'negative': lambda value: -7,
  'huge': lambda value: 10**30,
  'large': lambda value: 10**9,
  'NaN': lambda value: float('nan'),
  'infinite': lambda value: float('inf'),
  'nested': lambda value: deep(90),
  'long': lambda value: [0] * 100_000,
  'renamed': lambda value: value,
}


def places(values: Any) -> Iterator[tuple]:
  """Yields the path of every entry, at any depth."""
  entries = values.items() if isinstance(values, dict) else enumerate(values)
  for key, value in entries:
    yield (key,)
    if isinstance(value, dict | list):
      yield from ((key, *rest) for rest in places(value))


def mutated(values: Any, rng: random.Random) -> tuple[str, Any]:
  """Returns what was changed, and the values with one entry changed.

  Shallow entries are as likely as all of those beneath them.
  """
  changed = copy.deepcopy(values)
  every = [*places(changed)]
  depth = rng.randint(1, max(map(len, every)))
  place = rng.choice([p for p in every if len(p) <= depth])
  kind = rng.choice([*KINDS])
  parent = changed
  for key in place[:-1]:
    parent = parent[key]
  value, key = parent[place[-1]], place[-1]
  if kind == 'dropped':
    del parent[key]
  elif kind == 'renamed' and isinstance(parent, dict):
    del parent[key]
    parent[f'{key}x'] = value
  else:
    parent[key] = KINDS[kind](value)
  return f'{kind} {"/".join(map(str, place))}', changed
