"""Files that are read: regular, of bounded size, and with the values that are expected.

A file may be damaged, of another program, or forged. So nothing is built, allocated or
looked up before its values were checked against a schema, which is a type:

    class Point(TypedDict):
      name: str
      at: list[float]
      colour: NotRequired[Literal['red', 'blue'] | None]

    point = files.read_json(path, Point, CheckpointError)

A `float` is a finite number, an `int` has at most 64 bits, and a TypedDict has no other
entries. `Annotated[kind, rule]` adds a `Rule`, and Any is anything that JSON holds.
"""

import json
import math
import reprlib
import struct
import types
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import (
  TYPE_CHECKING,
  Annotated,
  Any,
  Literal,
  NamedTuple,
  NotRequired,
  TypeVar,
  Union,
  cast,
  get_args,
  get_origin,
  get_type_hints,
  is_typeddict,
)

if TYPE_CHECKING:
  import numpy as np

T = TypeVar('T')
LARGEST = 2**28  # bytes of a JSON file
DEEPEST = 64  # levels of lists and objects
INTEGERS = range(-(2**63), 2**64)


class CheckpointError(ValueError):
  """A checkpoint is absent or damaged, or of another network, run or version."""


class Rule(NamedTuple):
  """What a value has to fulfil besides its type.

  Attributes:
    expected: what is expected, for errors: 'a number above 0'.
    holds: whether a value of the type fulfils it.
  """

  expected: str
  holds: Callable[[Any], bool]


class Wrong(NamedTuple):
  """A value that is not as expected, and its entry: 'keep.exits', 'runs[2]'."""

  entry: str
  expected: str
  got: str


def at_least(least: int) -> Rule:
  """Returns the rule for numbers that are not below `least`."""
  return Rule(f'a number of at least {least}', lambda value: value >= least)


def regular(path: Path, error: type[ValueError]) -> None:
  """Checks that a path is a file that can be read to its end, or a link to one.

  A pipe would wait for a writer, and a device may never end.

  Raises:
    ValueError: it is not, as an `error`.
  """
  try:
    if path.is_file():
      return
    there = path.exists()
  except (OSError, ValueError) as reason:
    raise error(f'{path}: cannot be read: {reason}: check the path') from reason
  what = 'a folder' if path.is_dir() else 'a pipe or device' if there else 'none'
  raise error(f'{path}: expected a file, got {what}: check the path')


def read_json(path: Path, kind: type[T], error: type[ValueError]) -> T:
  """Reads a JSON file whose values are of a type.

  Args:
    path: the file.
    kind: the type, as above.
    error: class of the error.

  Raises:
    ValueError: it is no regular file, not JSON, too large, nested too deeply, or an
      entry is missing, unknown or of another type; as an `error`.
  """
  regular(path, error)
  try:
    if (size := path.stat().st_size) > LARGEST:
      raise error(f'{path}: expected at most {LARGEST} bytes of JSON, got {size}')
    return parsed(path.read_bytes(), kind, str(path), error)
  except OSError as reason:
    raise error(f'{path}: cannot be read: {reason.strerror or reason}') from reason


def read_npz(path: Path, error: type[ValueError]) -> dict[str, 'np.ndarray']:
  """Reads all arrays of an .npz file, by name.

  Nothing is allocated before the shape that an array claims to have was compared with
  the bytes that are there.

  Args:
    path: the file.
    error: class of the error.

  Raises:
    ValueError: it is no regular file or damaged, or an array holds objects; as an
      `error`.
  """
  regular(path, error)
  try:
    with zipfile.ZipFile(path) as file:
      names = file.namelist()
      return {name.removesuffix('.npy'): _array(file, name) for name in names}
  except (
    OSError, EOFError, ValueError, NotImplementedError, RuntimeError, MemoryError,
    zipfile.BadZipFile, zlib.error, struct.error,
  ) as reason:  # fmt: skip
    raise error(
      f'{path}: cannot be read as an .npz file of plain arrays ({reason!s:.200})'
    ) from reason


def _array(file: zipfile.ZipFile, name: str) -> 'np.ndarray':
  """Reads one array of an .npz file; raises errors of many kinds."""
  import numpy as np  # the schemas of this file are used where --help answers at once

  with file.open(name) as stream:
    version = np.lib.format.read_magic(stream)
    head = 'read_array_header_1_0' if version == (1, 0) else 'read_array_header_2_0'
    shape, _, dtype = getattr(np.lib.format, head)(stream)
    claimed = math.prod(shape) * dtype.itemsize
    found = file.getinfo(name).file_size - stream.tell()
  if dtype.hasobject:
    raise ValueError(f'{name}: an array of objects')
  if min(shape, default=0) < 0 or claimed != found:
    raise ValueError(f'{name}: {shape} of {dtype} is not {found} bytes')
  with file.open(name) as stream:
    return np.lib.format.read_array(stream)


def parsed(text: bytes, kind: type[T], where: str, error: type[ValueError]) -> T:
  """Reads values of a type from JSON text, as `read_json` does."""
  try:
    values = json.loads(text)
  except RecursionError as reason:
    raise error(f'{where}: expected {DEEPEST} levels at most, got more') from reason
  except ValueError as reason:
    raise error(f'{where}: expected JSON, got {reason}') from reason
  return checked(values, kind, where, error)


def checked(values: Any, kind: type[T], where: str, error: type[ValueError]) -> T:
  """Returns plain values that were read, if they are of a type.

  Args:
    values: what JSON holds: numbers, strings, lists, dicts.
    kind: the type, as above.
    where: the file, for errors.
    error: class of the error.

  Raises:
    ValueError: an entry is missing, unknown or of another type; as an `error`.
  """
  for wrong in (*_excess(values), *_wrong(values, kind, '')):
    entry = f'{wrong.entry.lstrip(".")}: ' * bool(wrong.entry)
    raise error(f'{where}: {entry}expected {wrong.expected}, got {wrong.got}')
  return cast(T, values)


def _excess(values: Any) -> Iterator[Wrong]:
  """Yields that values are nested too deeply; it does not recurse itself."""
  level = [values]
  for _ in range(DEEPEST):
    inside = [x for x in level if isinstance(x, dict | list)]
    level = [y for x in inside for y in (x.values() if isinstance(x, dict) else x)]
  if level:
    yield Wrong('', f'{DEEPEST} levels at most', 'more')


def _wrong(value: Any, kind: Any, entry: str) -> Iterator[Wrong]:
  """Yields what differs from a type, beginning with the first."""
  origin, args = get_origin(kind), get_args(kind)
  if origin is Annotated:
    first = next(_wrong(value, args[0], entry), None)
    if first is not None:
      yield first
      return
    for rule in args[1:]:
      if isinstance(rule, Rule) and not rule.holds(value):
        yield Wrong(entry, rule.expected, _shown(value))
  elif origin in (Union, types.UnionType):
    faults = [next(_wrong(value, each, entry), None) for each in args]
    if all(faults):
      # An object within which something is wrong says more than that none fits.
      deep = [f for f in faults if f and f.entry != entry]
      yield deep[0] if deep else Wrong(entry, _named(kind), _shown(value))
  elif is_typeddict(kind) and isinstance(value, dict):
    hints = get_type_hints(kind, include_extras=True)
    for name in sorted(kind.__required_keys__):
      if name not in value:
        yield Wrong(f'{entry}.{name}', _named(_bare(hints[name])), 'no such entry')
    for name, each in value.items():
      if name not in hints:
        yield Wrong(entry, f'entries {", ".join(sorted(hints))}', _shown(name))
      else:
        yield from _wrong(each, _bare(hints[name]), f'{entry}.{name}')
  elif origin is dict and isinstance(value, dict):
    for name, each in value.items():
      yield from _wrong(each, args[1], f'{entry}.{name}')
  elif origin is tuple and args[-1] is not ... and isinstance(value, list | tuple):
    if len(value) != len(args):
      yield Wrong(entry, f'a list of {len(args)}', _shown(value))
    for i, (each, of) in enumerate(zip(value, args)):
      yield from _wrong(each, of, f'{entry}[{i}]')
  elif origin in (list, tuple) and isinstance(value, list | tuple):
    for i, each in enumerate(value):
      yield from _wrong(each, args[0], f'{entry}[{i}]')
  elif not _fits(value, kind):
    yield Wrong(entry, _named(kind), _shown(value))


def _fits(value: Any, kind: Any) -> bool:
  if kind is Any:
    return True
  if kind is None or kind is types.NoneType:
    return value is None
  if get_origin(kind) is Literal:
    return any(type(value) is type(x) and value == x for x in get_args(kind))
  if kind is int:
    return type(value) is int and value in INTEGERS
  if kind is float:
    number = type(value) is float or _fits(value, int)
    return number and math.isfinite(value)
  return kind in (str, bool) and type(value) is kind


def _bare(kind: Any) -> Any:
  """Returns a type without the NotRequired around it."""
  return get_args(kind)[0] if get_origin(kind) is NotRequired else kind


def _shown(value: Any) -> str:
  return f'{reprlib.repr(value):.80}'


def _named(kind: Any) -> str:
  """Writes a type as English."""
  origin, args = get_origin(kind), get_args(kind)
  if origin is Annotated:
    rules = [rule.expected for rule in args[1:] if isinstance(rule, Rule)]
    return rules[0] if rules else _named(args[0])
  if origin in (Union, types.UnionType):
    return ' or '.join(map(_named, args))
  if origin is Literal:
    return ' or '.join(map(repr, args))
  if origin in (list, tuple):
    return 'a list'
  if origin is dict or is_typeddict(kind):
    return 'an object'
  words = {int: 'a whole number', float: 'a finite number', str: 'a string'}
  words |= {bool: 'true or false', types.NoneType: 'null'}
  return words.get(kind, getattr(kind, '__name__', str(kind)))
