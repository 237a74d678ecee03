"""A tree of arrays and a JSON record in one folder, written at once or not at all.

The arrays are an orbax checkpoint or a file of safetensors (`arrays`), one entry per
leaf, named by its path in the tree. The record has dtype and shape of every leaf,
because orbax casts silently, and the checksum of every file, because orbax does not
notice every flipped bit, and what it notices leaves its event loop in pieces. Nothing
is pickled.
"""

import json
import logging
import shutil
import zlib
from collections.abc import Callable, Collection, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import safetensors.numpy

from depthprune import distributed
from depthprune.storage import directory


def kind(leaf: Any) -> str:
  """dtype and shape in a word: 'float32[3,3,16,16]', 'key<fry>[]'."""
  leaf = leaf if hasattr(leaf, 'dtype') else np.asarray(leaf)
  return f'{leaf.dtype}[{",".join(map(str, leaf.shape))}]'


def stored(leaf: Any) -> Any:
  """A numpy array; of a leaf that is split over processes, each writes its part."""
  if _is_key(leaf):
    leaf = jax.random.key_data(leaf)
  if getattr(leaf, 'is_fully_addressable', True) or leaf.is_fully_replicated:
    return np.asarray(jax.device_get(leaf))
  return jnp.copy(leaf)  # it is read while the next step may consume the original


def placed(leaf: Any, like: Any) -> Any:
  """What was stored, as `like` is: a number, a numpy array, or on its devices."""
  if not hasattr(like, 'dtype'):
    return leaf.item()
  if isinstance(like, np.ndarray | np.generic):
    return leaf
  where = like.sharding if getattr(like, 'committed', False) else None
  # An alias of numpy's memory could be donated to the next step.
  return jax.device_put(leaf, where, may_alias=False)


def described(leaf: Any, array: Any) -> dict[str, Any]:
  """The leaf in a record; `array` is what is stored of it."""
  about = {'dtype': str(array.dtype), 'shape': list(array.shape)}
  return {**about, 'key': str(jax.random.key_impl(leaf))} if _is_key(leaf) else about


def _is_key(leaf: Any) -> bool:
  dtype = getattr(leaf, 'dtype', None)
  return dtype is not None and jnp.issubdtype(dtype, jax.dtypes.prng_key)


ORBAX, TENSORS = 'arrays', 'weights.safetensors'


def inside(folder: Path, files: Collection[str]) -> Path:
  """Where the arrays of a folder lie, of which `checksums` told the names of files."""
  return folder / (TENSORS if TENSORS in files else ORBAX)


def checksums(where: Path) -> dict[str, int]:
  """{name: CRC-32} of a file, or of all files in a folder."""
  files = [where] if where.is_file() else sorted(where.rglob('*'))
  top = where.parent if where.is_file() else where
  return {
    p.relative_to(top).as_posix(): zlib.crc32(p.read_bytes())
    for p in files
    if p.is_file()
  }


def begin(
  folder: Path, arrays: Mapping[str, np.ndarray], tensors: bool
) -> Callable[[], Path]:
  """Begins to write arrays into a folder, which may be changed once this returns.

  Of an array that is split over processes each writes its part; not of `tensors`.

  Returns: what waits for the end, raises what orbax met, and returns the file or folder
    in `folder` that holds the arrays.
  """
  if tensors:
    whole = folder / TENSORS
    if distributed.writes():
      save_tensors(whole, arrays)
    return lambda: whole
  # Orbax refuses empty arrays; who reads them knows their shapes.
  filled = {name: array for name, array in arrays.items() if array.size}
  orbax = ocp.AsyncCheckpointer(ocp.PyTreeCheckpointHandler())
  if filled:
    with _quiet():
      orbax.save((folder / ORBAX).absolute(), args=ocp.args.PyTreeSave(filled))

  def end():
    with _quiet():
      orbax.close()
    return folder / ORBAX

  return end


@contextmanager
def _quiet() -> Iterator[None]:
  """What orbax logs of an error, many times, is raised as well."""
  log, others = logging.getLogger('absl'), lambda record: 'orbax' not in record.pathname
  log.addFilter(others)
  try:
    yield
  finally:
    log.removeFilter(others)


def save_tensors(path: Path, arrays: Mapping[str, np.ndarray]) -> Path:
  """Writes arrays as one file of safetensors; returns its path."""
  # Memory is written as it lies, whatever the strides of an array say.
  rows = {name: np.array(array, order='C') for name, array in arrays.items()}
  path.write_bytes(safetensors.numpy.save(rows))  # save_file lets only us read it
  return path


def load(where: Path, names: Collection[str]) -> dict[str, np.ndarray]:
  """The arrays that `save` wrote there, none of them empty; raises what readers do."""
  if not names:
    return {}
  if where.name == TENSORS:
    return safetensors.numpy.load_file(where)
  wanted = {name: ocp.RestoreArgs(restore_type=np.ndarray) for name in names}
  with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as orbax:
    return orbax.restore(
      where.absolute(), args=ocp.args.PyTreeRestore(restore_args=wanted)
    )


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
  distributed.together(start(folder, name, tree, record, tensors).result)


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
  distributed.together(lambda: _emptied(fresh) if distributed.writes() else None)

  def finish():
    where = written()
    if distributed.writes():
      content['files'] = checksums(where)
      content['crc32'] = zlib.crc32(_json(content).encode())
      (fresh / name).write_text(_json(content) + '\n')
      if folder.exists():
        directory.discard(folder)
      fresh.rename(folder)
      then()

  with _room(fresh):
    written = begin(fresh, arrays, tensors)
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
    raise directory.failed(fresh, error) from error


def _emptied(folder: Path) -> None:
  shutil.rmtree(folder, ignore_errors=True)
  with directory.writing(folder):
    folder.mkdir(parents=True)


def read(folder: Path, name: str) -> tuple[dict[str, Any], dict[str, Any]]:
  """(leaves by path, record) as `write` got them; numpy arrays and typed key arrays.

  Raises CheckpointError where there is no checkpoint, where one is of a newer format,
  and where any file is not what was written.
  """
  record = read_record(folder, name)
  about = record['leaves']
  where = inside(folder, record['files'])
  found = checksums(where)
  for file, crc32 in record['files'].items():
    if found.get(file) != crc32:
      what = 'is not what was written' if file in found else 'is missing'
      raise _damaged(folder, f'{"" if file == where.name else "arrays/"}{file} {what}')
  filled = {path for path, leaf in about.items() if all(leaf['shape'])}
  try:
    there = load(where, filled)
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
