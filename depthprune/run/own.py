"""Networks and data of a user's own, as the command line names them.

  FILE.py:NAME               a class or a function in a Python file
  FOLDER                     images, see `data.folders`
  FILE.npz                   arrays, see `data.arrays`
  FILE.csv .tsv .jsonl       texts or features, see `data.tables`

Paths are made absolute, so that a run can be reported, exported and resumed from
anywhere, and what is in the files is part of a run's config: `digest`. No jax is
imported here, since configs are made for `--help`.
"""

import difflib
import hashlib
import importlib.util
import json
import re
import sys
import traceback
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from depthprune.train.options import ConfigError

TABLES = '.csv', '.tsv', '.jsonl'
ARRAYS = '.npz'
TEXTS = '.txt', '.md', '.rst'
BUILT_IN = 'digits', 'multi_fashion'  # data sets that no folder of that name replaces
_OBJECT = re.compile(r'(?P<file>.+\.py):(?P<name>\w+)')
_BLOCK = 1 << 20


def is_object(text: str) -> bool:
  """Whether a name means an object in a Python file."""
  return _OBJECT.fullmatch(text) is not None


def is_file(data: str) -> bool:
  """Whether a name of data means a file."""
  return is_object(data) or Path(data).suffix in (ARRAYS, *TABLES, *TEXTS)


def is_folder(data: str) -> bool:
  """Whether a name of data means a folder of images, and no set of TFDS."""
  path = Path(data)
  if data in BUILT_IN or is_file(data):
    return False
  if data.startswith(('.', '~')) or path.is_absolute():
    return True
  prepared = any(path.glob('*/dataset_info.json')) or any(
    path.glob('*/*/dataset_info.json')
  )
  return path.is_dir() and not prepared


def absolute(text: str) -> str:
  """Returns a name with its path made absolute, if it has one."""
  if text.endswith('.py'):
    raise ConfigError(f'{text}: expected FILE.py:NAME, got no name after the file')
  if match := _OBJECT.fullmatch(text):
    return f'{_resolved(match["file"])}:{match["name"]}'
  return _resolved(text) if is_file(text) or is_folder(text) else text


def _resolved(path: str) -> str:
  return str(Path(path).expanduser().absolute())


def word(text: str) -> str:
  """Returns a short name for folders and reports: `net.py:Net` for a longer path."""
  return Path(text).name if Path(text).is_absolute() else text


def digest(text: str) -> str | None:
  """Returns a hash of what a name means, None for names that mean no file.

  It is that of the content of a file, and of the names and sizes in a folder.
  """
  match = _OBJECT.fullmatch(text)
  path = Path(match['file'] if match else text)
  if path.is_dir() and is_folder(text):
    files = sorted(p for p in path.rglob('*') if p.is_file() and p.name[0] != '.')
    listed = [f'{p.relative_to(path).as_posix()} {p.stat().st_size}' for p in files]
    return _hash(['\n'.join(listed).encode()])
  if path.is_file() and is_file(text):
    with path.open('rb') as file:
      return _hash(iter(lambda: file.read(_BLOCK), b''))
  return None


def _hash(blocks: Iterable[bytes]) -> str:
  made = hashlib.sha256()
  for block in blocks:
    made.update(block)
  return made.hexdigest()[:16]


def load(text: str) -> Any:
  """Imports the object that FILE.py:NAME means.

  The file is imported once as long as it does not change. Its folder is searched for
  what it imports in turn, as if it were run by `python FILE.py`.

  Raises:
    ConfigError: there is no such file or name, or the import fails.
  """
  match = _OBJECT.fullmatch(text)
  assert match is not None
  path, name = Path(match['file']), match['name']
  if not path.is_file():
    raise ConfigError(f'{text}: there is no file {path}')
  module = _imported(path)
  if not hasattr(module, name):
    public = [each for each in vars(module) if not each.startswith('_')]
    near = difflib.get_close_matches(name, public, n=3, cutoff=0)
    raise ConfigError(f'{text}: {path} has no {name}; nearest: {", ".join(near)}')
  return getattr(module, name)


def _imported(path: Path) -> Any:
  name, mark = path.stem, digest(f'{path}:_')
  if name in sys.modules and getattr(sys.modules[name], '_depthprune', '') != mark:
    name = f'{name}_{mark}'  # another module has that name
  if name in sys.modules:
    return sys.modules[name]
  if str(path.parent) not in sys.path:
    sys.path.append(str(path.parent))
  spec = importlib.util.spec_from_file_location(name, path)
  assert spec is not None and spec.loader is not None
  module: Any = importlib.util.module_from_spec(spec)
  module._depthprune = mark
  sys.modules[name] = module
  try:
    spec.loader.exec_module(module)
  except Exception as error:
    del sys.modules[name]
    raise ConfigError(f'{path}: importing it failed: {told(error)}') from error
  return module


def told(error: Exception) -> str:
  """Describes an error in a user's file: its type, its text and its last line."""
  frame = traceback.extract_tb(error.__traceback__)[-1]
  first = (str(error) or 'no message').splitlines()[0]
  return f'{type(error).__name__}: {first} ({frame.filename}, line {frame.lineno})'


def arguments(words: Iterable[str]) -> dict[str, Any]:
  """Reads KEY=VALUE words, or one JSON object; a value is JSON, or else a string.

  Raises:
    ConfigError: a word has another form, or a key is there twice.
  """
  read: dict[str, Any] = {}
  for each in words:
    if each.lstrip().startswith('{'):
      try:
        pairs = json.loads(each)
      except ValueError as error:
        raise ConfigError(f'model_args: not a JSON object: {error}: {each}') from error
    else:
      key, sign, value = each.partition('=')
      if not sign or not key.isidentifier():
        raise ConfigError(
          f'model_args: expected KEY=VALUE or a JSON object, got {each!r}'
        )
      pairs = {key: _value(value)}
    for key in pairs:
      if key in read:
        raise ConfigError(f'model_args: {key} is given twice')
    read |= pairs
  return {key: _tuples(value) for key, value in read.items()}


def _value(text: str) -> Any:
  literals = {'True': True, 'False': False, 'None': None}
  try:
    return literals[text] if text in literals else json.loads(text)
  except ValueError:
    return text


def _tuples(value: Any) -> Any:
  """Lists become tuples, which modules can hash."""
  if isinstance(value, list):
    return tuple(map(_tuples, value))
  if isinstance(value, Mapping):
    return {key: _tuples(item) for key, item in value.items()}
  return value
