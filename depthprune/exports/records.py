"""The records of saved networks: what `arch.json` and `cascade.json` hold.

They are checked against the types here before anything is built of them.
"""

import math
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal, NotRequired, TypedDict

import jax
import jax.numpy as jnp
import numpy as np

from depthprune.storage import checkpoint, files
from depthprune.storage.checkpoint import CheckpointError, is_key, kind
from depthprune.storage.files import Rule, at_least

RECORD, CASCADE_RECORD, EXITS_RECORD = 'arch.json', 'cascade.json', 'exits.json'
KEYS = 'threefry2x32', 'rbg', 'unsafe_rbg'  # the kinds of random keys that jax has
LONGEST = 2**40  # of an axis
LARGEST_FIELD = 4096  # of a model, where no axis of its arrays is longer
_OTHER = '?'  # a node or leaf of a tree that JSON cannot express
_KIND = re.compile(r'([\w<>]+)\[((?:\d{1,13}(?:,\d{1,13})*)?)\]')  # float32[3,16]


def _is_tree(tree: Any) -> bool:
  """Whether `described` could have written a value."""
  if isinstance(tree, dict):
    return all(map(_is_tree, tree.values()))
  if isinstance(tree, list):
    return tree[:1] in (['tuple'], ['list']) and all(map(_is_tree, tree[1:]))
  if not isinstance(tree, str) or tree == _OTHER:
    return True
  match = _KIND.fullmatch(tree)
  sizes = map(int, filter(None, match[2].split(','))) if match else ()
  known = match is not None and (
    checkpoint.is_dtype(match[1]) or match[1] in _key_dtypes()
  )
  return known and all(size <= LONGEST for size in sizes)


def _key_dtypes() -> dict[str, Any]:
  """The dtypes of random keys by name, such as 'key<fry>'."""
  dtypes = (jax.eval_shape(lambda i=i: jax.random.key(0, impl=i)).dtype for i in KEYS)
  return {str(dtype): dtype for dtype in dtypes}


def _is_branch(kept: Any) -> bool:
  return all(map(_is_branch, kept)) if isinstance(kept, list) else type(kept) is bool


Tree = Annotated[Any, Rule('arrays such as float32[3,16]', _is_tree)]
Count = Annotated[int, at_least(0)]
Open = Annotated[Any, Rule('true or false, or a list of them', _is_branch)]
Positive = Annotated[float, Rule('a number above 0', lambda value: value > 0)]
Threshold = float | Literal['inf', '-inf']


def threshold(value: float) -> float | str:
  """Returns a threshold as a record has it: JSON has no infinity."""
  return float(value) if math.isfinite(value) else str(float(value))


class Keep(TypedDict):
  """What a cut kept: indices of channels, branches and exits."""

  channels: dict[str, list[Count]]
  branches: dict[str, Open]
  exits: dict[str, bool]


class CutRecord(TypedDict):
  """One cut: the call, the variables before it, and what it kept."""

  inputs: Tree
  kwargs: dict[str, Any]
  arrays_by_keyword: NotRequired[dict[str, Tree]]  # none in version 0.1
  keep: Keep
  variables: Tree


class NormalisationRecord(TypedDict):
  """A `data.augment.Normalisation`."""

  mean: list[float]
  std: list[Positive]
  scale: Positive


class Described(TypedDict):
  """A model of ours, as `models.describe` describes it."""

  name: str
  fields: dict[str, Any]


class Foreign(TypedDict):
  """A model that is not ours, by its name."""

  foreign: str


class NetworkRecord(CutRecord, checkpoint.Record):
  """The entries of `arch.json`: the last cut, those before it, and the model."""

  model: Described | Foreign
  arch: dict[str, Count]
  before: NotRequired[list[CutRecord]]  # none in version 0.1
  report: dict[str, Any]
  not_finite: NotRequired[list[str]]  # arrays with NaN or infinities


class CascadeRecord(TypedDict):
  """The entries of `cascade.json`."""

  exits: list[str]
  thresholds: dict[str, Threshold]
  temperatures: dict[str, Positive]
  confidence: str
  weights: list[list[float]] | None
  steps: Annotated[int, Rule('a number from 1 to 65536', lambda n: 1 <= n <= 2**16)]
  flops: list[float]
  whole: float


class ExitsRecord(TypedDict):
  """The entries of `exits.json`."""

  thresholds: dict[str, Threshold]
  confidence: Literal['probability', 'entropy', 'margin', 'patience']


class ReportRecord(TypedDict):
  """The entries of a report that are read."""

  exits: NotRequired[dict[str, bool]]
  normalisation: NotRequired[NormalisationRecord]


def read(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
  """Reads the arrays by path and the record of a network that `save` wrote.

  Raises:
    CheckpointError: as for `load`.
  """
  leaves, record = checkpoint.read(path, RECORD, NetworkRecord)
  _check(path, record)
  if 'not_finite' in record:
    checkpoint.finite(leaves, str(path), record['not_finite'])
  return leaves, record


def is_network(path: str | Path) -> bool:
  """Whether a path is the folder of a network that was saved by this library."""
  return (Path(path) / RECORD).is_file()


def read_record(path: Path) -> dict[str, Any]:
  """Reads the record alone; raises as `load` does."""
  record = checkpoint.read_record(path, RECORD, NetworkRecord)
  _check(path, record)
  return record


def _check(path: Path, record: Mapping[str, Any]) -> None:
  """Checks the report, and that no number of the model is beyond its arrays."""
  report, file = record['report'], path / RECORD
  read = {k: v for k, v in report.items() if k in ReportRecord.__annotations__}
  files.checked(read, ReportRecord, f'{file}: report', CheckpointError)
  first = [*record.get('before', []), record][0]
  leaves = [*_leaves([first['variables'], first['inputs']])]
  sizes = [int(n) for x in leaves for n in re.findall(r'[\[,](\d+)', str(x))]
  most = max([LARGEST_FIELD, len(leaves), *sizes])
  for value in _leaves(record['model']):
    if isinstance(value, int) and not -most <= value <= most:
      raise CheckpointError(
        f'{file}: model: expected no number above {most}, the largest size of its '
        f'arrays, got {value!r:.80}'
      )


def _leaves(values: Any) -> Iterator[Any]:
  """Yields the numbers, strings and the like in nested lists and objects."""
  inside = values.values() if isinstance(values, dict) else values
  if isinstance(values, dict | list):
    for value in inside:
      yield from _leaves(value)
  else:
    yield values


def read_cascade(path: Path) -> CascadeRecord:
  """Reads the record of a cascade that `save_cascade` wrote.

  Raises:
    CheckpointError: there is none, or an entry is not as expected.
  """
  file = path / CASCADE_RECORD
  if not file.exists():
    writes = (path / EXITS_RECORD).is_file()
    raise CheckpointError(
      f'{path}: expected a cascade (with {CASCADE_RECORD} and network/), got '
      f'{"a language model with exits: load_exits reads it" if writes else "none"}'
    )
  record = files.read_json(file, CascadeRecord, CheckpointError)
  early, weights = record['exits'][:-1], record['weights']
  for entry in ('thresholds', 'temperatures'):
    if {*record[entry]} != {*early}:
      raise CheckpointError(
        f'{file}: {entry}: expected one for each of {", ".join(early) or "no exit"}, '
        f'got {", ".join(record[entry]) or "none"}'
      )
  shape = [len(row) for row in weights or ()]
  if weights is not None and shape != [4] * len(early):
    raise CheckpointError(
      f'{file}: weights: expected {len(early)} lists of 4 numbers or null, got '
      f'lists of {shape!r:.80}'
    )
  if weights is None and record['confidence'] == 'learned':
    raise CheckpointError(f'{file}: weights: expected those of "learned", got null')
  return record


@contextmanager
def refused(where: Any) -> Iterator[None]:
  """Turns any error of what a file describes into one that names the entry."""
  try:
    yield
  except CheckpointError:
    raise
  except Exception as error:  # a description that is wrong fails in a way of its own
    first = (str(error) or type(error).__name__).splitlines()[0]
    raise CheckpointError(f'{where}: {first:.300}') from error


def described(tree: Any) -> Any:
  """Describes the shapes and dtypes of a tree in JSON, where tuples are not lists."""
  if isinstance(tree, dict) and all(isinstance(key, str) for key in tree):
    return {key: described(value) for key, value in tree.items()}
  if type(tree) in (list, tuple):
    return [type(tree).__name__, *map(described, tree)]
  if tree is None or isinstance(tree, bool | int | float):
    return tree
  if is_key(tree):
    return kind(tree)
  plain = isinstance(getattr(tree, 'dtype', None), np.dtype)
  return kind(tree) if plain else _OTHER


def structs(abstract: Any, where: str) -> Any:
  """Returns the tree of ShapeDtypeStructs that `_abstract` described."""
  if isinstance(abstract, dict):
    return {key: structs(value, where) for key, value in abstract.items()}
  if isinstance(abstract, list):
    parts = [structs(value, where) for value in abstract[1:]]
    return tuple(parts) if abstract[0] == 'tuple' else parts
  if abstract is None or isinstance(abstract, bool | int | float):
    return abstract
  if abstract == _OTHER:
    raise CheckpointError(f'{where} of a kind that JSON cannot express')
  dtype, shape = abstract.removesuffix(']').split('[')
  sizes = tuple(int(size) for size in shape.split(',') if size)
  return jax.ShapeDtypeStruct(sizes, _key_dtypes().get(dtype) or jnp.dtype(dtype))
