"""A tree of arrays and a JSON record in one folder, written at once or not at all.

The arrays are an orbax checkpoint or a file of safetensors (`arrays`), one entry per
leaf, named by its path in the tree. The record has dtype and shape of every leaf,
because orbax casts silently, and the checksum of every file, because orbax does not
notice every flipped bit, and what it notices leaves its event loop in pieces. Nothing
is pickled.
"""

import json
import shutil
import zlib
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from depthprune.training import arrays as files
from depthprune.training import disk, hosts
from depthprune.training.leaf import described, kind, placed, stored

FORMAT = 1


class CheckpointError(ValueError):
  """A checkpoint that is absent, damaged, or of another network, run or program."""


def paths(tree: Any) -> dict[str, Any]:
  """The leaves of a tree by path: 'params/stem/conv/kernel', 'opt_state/0/mu'."""
  leaves = jax.tree_util.tree_leaves_with_path(tree)
  named = {jax.tree_util.keystr(p, simple=True, separator='/'): x for p, x in leaves}
  if len(named) < len(leaves):
    raise CheckpointError(
      f'expected {len(leaves)} different paths, got {len(named)}: rename keys with "/"'
    )
  return named


def write(
  folder: Path, name: str, tree: Any, record: Mapping[str, Any], tensors: bool = False
) -> None:
  """Writes a tree and its record (the file called `name`) as `folder`.

  tensors: as a file of safetensors in place of an orbax checkpoint.

  A checkpoint that was there is replaced. Killed at any moment, the folder is what it
  was, or the new one, whole; or, in the instant of replacing, both are beside it.

  Raises CheckpointError where the folder holds something else, and WriteError where
  there is no room; what was there is then still there.
  """
  hosts.together(start(folder, name, tree, record, tensors).result)


def start(
  folder: Path,
  name: str,
  tree: Any,
  record: Mapping[str, Any],
  tensors: bool = False,
  then: Callable[[], None] = lambda: None,
) -> 'Future[None]':
  """As `write`, but goes on in the background once the arrays are copied.

  The Future ends, or raises, when `folder` is there and `then` was called, which the
  process that writes does.
  """
  if folder.exists() and not (folder / name).exists() and any(folder.iterdir()):
    raise CheckpointError(
      f'{folder}: expected a checkpoint to replace (with {name}) or nothing, got other '
      'files: choose another path'
    )
  leaves = paths(tree)
  arrays = {path: stored(leaf) for path, leaf in leaves.items()}
  content = {
    'format': FORMAT,
    'library': _library(),
    **record,
    'leaves': {path: described(leaves[path], array) for path, array in arrays.items()},
  }
  fresh = folder.with_name(f'.unfinished-{folder.name}')
  hosts.together(lambda: _emptied(fresh) if hosts.writes() else None)

  def finish():
    where = written()
    if hosts.writes():
      content['files'] = files.checksums(where)
      content['crc32'] = zlib.crc32(_json(content).encode())
      (fresh / name).write_text(_json(content) + '\n')
      if folder.exists():
        disk.discard(folder)
      fresh.rename(folder)
      then()

  with _room(fresh):
    written = files.begin(fresh, arrays, tensors)
  thread = ThreadPoolExecutor(1, 'checkpoint')
  future = thread.submit(_room(fresh)(finish))
  thread.shutdown(wait=False)
  return future


@contextmanager
def _room(fresh: Path) -> Iterator[None]:
  """Gives back the room of what was begun, where it does not come to an end."""
  try:
    yield
  except Exception as error:  # orbax and tensorstore raise whatever they meet
    shutil.rmtree(fresh, ignore_errors=True)
    raise disk.failed(fresh, error) from error


def _emptied(folder: Path) -> None:
  shutil.rmtree(folder, ignore_errors=True)
  with disk.writing(folder):
    folder.mkdir(parents=True)


def read(folder: Path, name: str) -> tuple[dict[str, Any], dict[str, Any]]:
  """(leaves by path, record) as `write` got them; numpy arrays and typed key arrays.

  Raises CheckpointError where there is no checkpoint, where one is of a newer format,
  and where any file is not what was written.
  """
  record = read_record(folder, name)
  about = record['leaves']
  where = files.inside(folder, record['files'])
  found = files.checksums(where)
  for file, crc32 in record['files'].items():
    if found.get(file) != crc32:
      what = 'is not what was written' if file in found else 'is missing'
      raise _damaged(folder, f'{"" if file == where.name else "arrays/"}{file} {what}')
  filled = {path for path, leaf in about.items() if all(leaf['shape'])}
  try:
    there = files.load(where, filled)
  except Exception as error:  # orbax and tensorstore raise whatever they meet
    first = ' '.join(str(error).splitlines()[:1])
    raise _damaged(folder, f'{where.name} cannot be read ({first})') from error
  leaves = {}
  for path, leaf in about.items():
    array = there.get(path, np.empty(leaf['shape'], np.dtype(leaf['dtype'])))
    key = leaf.pop('key', None)
    if described(array, array) != leaf:
      raise _damaged(folder, f'{path}: expected {leaf}, got {kind(array)}')
    leaves[path] = (
      jax.random.wrap_key_data(jnp.asarray(array), impl=key) if key else array
    )
  return leaves, record


def read_record(folder: Path, name: str) -> dict[str, Any]:
  """The record alone; raises as `read` does."""
  try:
    text = (folder / name).read_text()
  except (FileNotFoundError, NotADirectoryError) as error:
    raise CheckpointError(
      f'{folder}: expected a checkpoint, got no file {name} in it: check the path'
    ) from error
  except (OSError, UnicodeDecodeError) as error:
    raise _damaged(folder, f'{name} cannot be read ({error})') from error
  try:
    record = json.loads(text)
    crc32 = record.pop('crc32')
  except (ValueError, TypeError, KeyError, AttributeError) as error:
    raise _damaged(folder, f'{name} is not a record ({error})') from error
  if zlib.crc32(_json(record).encode()) != crc32:
    raise _damaged(folder, f'{name} is not what was written')
  if record['format'] > FORMAT:
    raise CheckpointError(
      f'{folder}: expected format {FORMAT}, got {record["format"]} by '
      f'{record["library"]}: read it with that version of the library'
    )
  return record


def matched(like: Any, leaves: Mapping[str, Any], where: str) -> Any:
  """The leaves in the structure of `like`, on its devices.

  Raises CheckpointError naming the leaf that is missing, that nothing expects, or that
  has another shape or dtype: nothing is cast, cut or made up.
  """
  expected = paths(like)
  for path in [*expected, *leaves]:
    want = kind(expected[path]) if path in expected else 'no such leaf'
    got = kind(leaves[path]) if path in leaves else 'no such leaf'
    if want != got:
      raise CheckpointError(
        f'{where}: {path}: expected {want}, got {got}: this is the checkpoint of '
        'another network, optimizer or version of the program'
      )
  back = [placed(leaves[path], leaf) for path, leaf in expected.items()]
  return jax.tree.unflatten(jax.tree.structure(like), back)


def _damaged(folder: Path, what: str) -> CheckpointError:
  return CheckpointError(
    f'{folder}: damaged: {what}. Copy it again from where it came, or write it again'
  )


def _library() -> str:
  try:
    return f'depthprune {metadata.version("depthprune")}'
  except metadata.PackageNotFoundError:  # used from a source folder
    return 'depthprune, not installed'


def _json(content: Mapping[str, Any]) -> str:
  """JSON with one line per entry: to be read, and compared line by line."""
  plain = lambda value: json.dumps(value, default=lambda array: array.tolist())
  lines = (f'{json.dumps(key)}: {plain(value)}' for key, value in content.items())
  return '{\n' + ',\n'.join(lines) + '\n}'
