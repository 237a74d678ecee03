"""A tree of arrays and a JSON record in one folder, written at once or not at all.

The arrays are an orbax checkpoint or a file of safetensors, one entry per leaf, named
by its path in the tree. The record has the dtype and shape of every leaf, because orbax
casts silently, and the checksum of every file, because orbax misses some flipped bits
and crashes in its event loop on others. Nothing is pickled.
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
from typing import Annotated, Any, NotRequired, TypedDict

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import safetensors
import safetensors.numpy

from depthprune import distributed
from depthprune.storage import directory, files
from depthprune.storage.files import CheckpointError as CheckpointError
from depthprune.storage.files import Rule, at_least

FORMAT = 1
ORBAX, TENSORS = 'arrays', 'weights.safetensors'


def is_dtype(name: str) -> bool:
  """Whether a name is that of a type of numbers, as `kind` writes it."""
  try:
    dtype = jnp.dtype(name)
  except (TypeError, ValueError, SyntaxError):  # numpy parses 'i4, (2' and the like
    return False
  number = jnp.issubdtype(dtype, np.number) or jnp.issubdtype(dtype, np.bool_)
  return number and dtype.name == name


AXES = Rule('at most 32 sizes', lambda shape: len(shape) <= 32)


class Leaf(TypedDict):
  """The kind of an array, and for random keys also theirs."""

  dtype: Annotated[str, Rule('the name of a type of numbers', is_dtype)]
  shape: Annotated[list[Annotated[int, at_least(0)]], AXES]
  key: NotRequired[str]


class Record(TypedDict):
  """What every record has; those of one kind of checkpoint have more entries."""

  format: Annotated[int, at_least(1)]
  library: str
  leaves: dict[str, Leaf]
  files: dict[str, int]


def kind(leaf: Any) -> str:
  """Writes the dtype and shape of a leaf, such as 'float32[3,3,16,16]'."""
  leaf = leaf if hasattr(leaf, 'dtype') else np.asarray(leaf)
  return f'{leaf.dtype}[{",".join(map(str, leaf.shape))}]'


def paths(tree: Any) -> dict[str, Any]:
  """Returns the leaves of a tree by path: 'params/stem/conv/kernel', 'opt_state/0/mu'.

  Raises:
    CheckpointError: two leaves have the same path.
  """
  leaves = jax.tree_util.tree_leaves_with_path(tree)
  named = {jax.tree_util.keystr(p, simple=True, separator='/'): x for p, x in leaves}
  if len(named) < len(leaves):
    raise CheckpointError(
      f'expected {len(leaves)} different paths, got {len(named)}: rename keys with "/"'
    )
  return named


# ---- writing -------------------------------------------------------------------------


def write(
  folder: Path, name: str, tree: Any, record: Mapping[str, Any], tensors: bool = False
) -> None:
  """Writes a tree and its record as a folder.

  A checkpoint that was there is replaced. If the process is killed, the folder is the
  old one or the new one, complete; or, at the instant of replacing, both are beside it.

  Args:
    folder: the folder.
    name: name of the record's file.
    tree: the tree of arrays.
    record: plain JSON data.
    tensors: whether to write a file of safetensors instead of an orbax checkpoint.

  Raises:
    CheckpointError: the folder holds something else.
    WriteError: the disk is full; what was there is unchanged.
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
  """Begins to write as `write` does, and goes on in the background.

  The arrays are copied before this returns. The Future ends, or raises, when the folder
  is there and `then` was called, in the process that writes.
  """
  if folder.exists() and not (folder / name).exists() and any(folder.iterdir()):
    raise CheckpointError(
      f'{folder}: expected a checkpoint to replace (with {name}) or nothing, got other '
      'files: choose another path'
    )
  leaves = paths(tree)
  arrays = {path: _stored(leaf) for path, leaf in leaves.items()}
  try:
    library = f'depthprune {metadata.version("depthprune")}'
  except metadata.PackageNotFoundError:  # imported from a source folder
    library = 'depthprune, not installed'
  content = {
    'format': FORMAT,
    'library': library,
    **record,
    'leaves': {path: _described(leaves[path], array) for path, array in arrays.items()},
  }
  fresh = folder.with_name(f'.unfinished-{folder.name}')
  distributed.together(lambda: _emptied(fresh) if distributed.writes() else None)

  def finish():
    where = wait()
    if distributed.writes():
      content['files'] = checksums(where)
      content['crc32'] = zlib.crc32(_json(content).encode())
      (fresh / name).write_text(_json(content) + '\n')
      if folder.exists():
        directory.discard(folder)
      fresh.rename(folder)
      then()

  with _removed_on_error(fresh):
    wait = _begin_arrays(fresh, arrays, tensors)
  thread = ThreadPoolExecutor(1, 'checkpoint')
  future = thread.submit(_removed_on_error(fresh)(finish))
  thread.shutdown(wait=False)
  return future


def save_tensors(
  path: Path, arrays: Mapping[str, np.ndarray], metadata: dict[str, str] | None = None
) -> Path:
  """Writes arrays and text about them as a file of safetensors; returns its path."""
  # Safetensors writes memory as it lies and ignores the strides of an array.
  rows = {name: np.array(array, order='C') for name, array in arrays.items()}
  # `save_file` would deny others to read it.
  path.write_bytes(safetensors.numpy.save(rows, metadata))
  return path


def checksums(where: Path) -> dict[str, int]:
  """Returns {name: CRC-32} of a file, or of all files in a folder."""
  found = [where] if where.is_file() else sorted(where.rglob('*'))
  top = where.parent if where.is_file() else where
  return {p.relative_to(top).as_posix(): _crc32(p) for p in found if p.is_file()}


def _crc32(path: Path) -> int:
  total = 0
  with path.open('rb') as file:
    while part := file.read(2**20):
      total = zlib.crc32(part, total)
  return total


def _begin_arrays(
  folder: Path, arrays: Mapping[str, np.ndarray], tensors: bool
) -> Callable[[], Path]:
  """Begins to write arrays, which may change once this returns.

  Every process writes its part of an array that is split, except as safetensors. The
  function that is returned waits for the end, raises the errors of orbax, and returns
  the file or folder of the arrays.
  """
  if tensors:
    if distributed.writes():
      save_tensors(folder / TENSORS, arrays)
    return lambda: folder / TENSORS
  # Orbax refuses empty arrays; their shapes in the record are enough.
  filled = {name: array for name, array in arrays.items() if array.size}
  orbax = ocp.AsyncCheckpointer(ocp.PyTreeCheckpointHandler())
  if filled:
    with _quiet():
      orbax.save((folder / ORBAX).absolute(), args=ocp.args.PyTreeSave(filled))

  def wait():
    with _quiet():
      orbax.close()
    return folder / ORBAX

  return wait


@contextmanager
def _quiet() -> Iterator[None]:
  """Silences the logs of orbax about an error, which it also raises."""
  log, others = logging.getLogger('absl'), lambda record: 'orbax' not in record.pathname
  log.addFilter(others)
  try:
    yield
  finally:
    log.removeFilter(others)


@contextmanager
def _removed_on_error(fresh: Path) -> Iterator[None]:
  """Removes an unfinished folder if writing fails."""
  try:
    yield
  except Exception as error:  # orbax and tensorstore raise errors of many kinds
    shutil.rmtree(fresh, ignore_errors=True)
    raise directory.failed(fresh, error) from error


def _emptied(folder: Path) -> None:
  directory.remove(folder)
  with directory.writing(folder):
    folder.mkdir(parents=True)


def _stored(leaf: Any) -> Any:
  """Copies a leaf to numpy, unless it is split over processes."""
  if is_key(leaf):
    leaf = jax.random.key_data(leaf)
  if getattr(leaf, 'is_fully_addressable', True) or leaf.is_fully_replicated:
    return np.asarray(jax.device_get(leaf))
  return jnp.copy(leaf)  # it is read while the next step may consume the original


def _described(leaf: Any, array: Any) -> dict[str, Any]:
  """Describes a leaf, stored as `array`, in the record."""
  about = {'dtype': str(array.dtype), 'shape': list(array.shape)}
  return {**about, 'key': str(jax.random.key_impl(leaf))} if is_key(leaf) else about


def is_key(leaf: Any) -> bool:
  """Whether a leaf is an array of typed random keys."""
  dtype = getattr(leaf, 'dtype', None)
  return dtype is not None and jnp.issubdtype(dtype, jax.dtypes.prng_key)


def _json(content: Mapping[str, Any]) -> str:
  """Writes JSON with one line per entry, which is easy to read and to compare."""
  plain = lambda value: json.dumps(value, default=lambda array: array.tolist())
  lines = (f'{json.dumps(key)}: {plain(value)}' for key, value in content.items())
  return '{\n' + ',\n'.join(lines) + '\n}'


# ---- reading -------------------------------------------------------------------------


def read(
  folder: Path, name: str, kind: Any = dict[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
  """Reads the leaves by path, as numpy and typed key arrays, and the record.

  Args:
    folder: the folder.
    name: name of the record's file.
    kind: type of the record, a TypedDict like Record with further entries.

  Raises:
    CheckpointError: there is no checkpoint, it has a newer format, an entry of the
      record is not as expected, or a file is not what was written.
  """
  record = read_record(folder, name, kind)
  about, written = record['leaves'], record['files']
  where = folder / (TENSORS if TENSORS in written else ORBAX)
  for path in where.rglob('*'):
    if not path.is_dir():
      files.regular(path, CheckpointError)  # orbax waits for a pipe
  sums = checksums(where)
  for file, crc32 in written.items():
    if sums.get(file) != crc32:
      what = 'is not what was written' if file in sums else 'is missing'
      raise _damaged(folder, f'{"" if file == where.name else "arrays/"}{file} {what}')
  try:
    arrays = _read_arrays(where, about)
  except CheckpointError:
    raise
  except Exception as error:  # orbax and tensorstore raise errors of many kinds
    first = ' '.join(str(error).splitlines()[:1])
    raise _damaged(folder, f'{where.name} cannot be read ({first:.200})') from error
  leaves = {}
  for path, leaf in about.items():
    if all(leaf['shape']):
      array = arrays[path]
    else:
      array = np.empty(leaf['shape'], jnp.dtype(leaf['dtype']))
    _same(where, path, leaf, str(array.dtype), array.shape)
    leaves[path] = _keys(where, path, leaf, array) if 'key' in leaf else array
  return leaves, record


def read_record(folder: Path, name: str, kind: Any = dict[str, Any]) -> dict[str, Any]:
  """Reads the record alone; raises as `read` does."""
  path = folder / name
  if not path.exists():
    raise CheckpointError(
      f'{folder}: expected a checkpoint, got no file {name} in it: check the path'
    )
  content = dict(files.read_json(path, dict[str, Any], CheckpointError))
  crc32 = content.pop('crc32', None)
  try:
    same = crc32 is not None and zlib.crc32(_json(content).encode()) == crc32
  except UnicodeEncodeError:  # half of a character
    same = False
  if crc32 is None:
    raise _damaged(folder, f'{name} is not a record: it has no crc32')
  if not same:
    raise _damaged(folder, f'{name} is not what was written')
  if type(stored := content.get('format')) is int and stored > FORMAT:
    raise CheckpointError(
      f'{folder}: expected format {FORMAT}, got {stored} by {content.get("library")}: '
      'read it with that version of the library'
    )
  common = {k: v for k, v in content.items() if k in Record.__annotations__}
  files.checked(common, Record, str(path), CheckpointError)
  return files.checked(content, kind, str(path), CheckpointError)


def finite(leaves: Mapping[str, Any], where: str, but: Collection[str] = ()) -> None:
  """Checks that arrays have neither NaN nor infinities.

  Args:
    leaves: the arrays by path.
    where: the folder, for errors.
    but: paths of arrays that may have them.

  Raises:
    CheckpointError: one of them does; the message names it.
  """
  for path in infinite(leaves):
    if path not in but:
      raise CheckpointError(
        f'{where}: {path}: expected finite numbers, got NaN or infinities, which were '
        'not there when it was saved'
      )


def infinite(leaves: Mapping[str, Any]) -> list[str]:
  """Returns the paths of arrays that have NaN or infinities."""
  numbers = {p: x for p, x in leaves.items() if not is_key(x) and hasattr(x, 'dtype')}
  return [
    path
    for path, x in numbers.items()
    if jnp.issubdtype(x.dtype, jnp.inexact) and not jnp.isfinite(x).all()
  ]


def matched(like: Any, leaves: Mapping[str, Any], where: str) -> Any:
  """Puts leaves, by path, into the structure of a tree `like`, and on its devices.

  Nothing is cast, cut or made up. `like` may be abstract; `where` is for errors.

  Raises:
    CheckpointError: a leaf is missing, not expected, or has another shape or dtype.
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
  placed = [_placed(leaves[path], leaf) for path, leaf in expected.items()]
  return jax.tree.unflatten(jax.tree.structure(like), placed)


def _placed(leaf: Any, like: Any) -> Any:
  """Converts a leaf to the kind of `like`: a number, a numpy array, or a jax array."""
  if not hasattr(like, 'dtype'):
    return leaf.item()
  if isinstance(like, np.ndarray | np.generic):
    return leaf
  where = like.sharding if getattr(like, 'committed', False) else None
  # The next step could donate an alias of numpy's memory.
  return jax.device_put(leaf, where, may_alias=False)


def _same(
  where: Path, path: str, leaf: Leaf, dtype: str | None, shape: Collection[int]
) -> None:
  """Checks the kind of an array, whose dtype may be unknown, against the record."""
  if [*shape] != leaf['shape'] or dtype not in (None, leaf['dtype']):
    sizes = lambda shape: f'[{",".join(map(str, shape))}]'
    raise CheckpointError(
      f'{where}: {path}: expected {leaf["dtype"]}{sizes(leaf["shape"])}, got '
      f'{dtype or "an array"}{sizes(shape)}'
    )


def _keys(where: Path, path: str, leaf: Leaf, array: np.ndarray) -> jax.Array:
  impl = leaf.get('key', '')
  try:
    return jax.random.wrap_key_data(jnp.asarray(array), impl=impl)
  except (TypeError, ValueError) as error:
    raise CheckpointError(
      f'{where}: {path}: expected random keys of the kind {impl:.40}, got {kind(array)}'
    ) from error


def _read_arrays(where: Path, about: Mapping[str, Leaf]) -> dict[str, np.ndarray]:
  """Reads arrays, if the file has those that are expected in their shapes."""
  filled = [path for path, leaf in about.items() if all(leaf['shape'])]
  if not filled:
    return {}
  if where.name == TENSORS:
    with safetensors.safe_open(where, 'numpy') as file:
      shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
    _all_there(where, about, shapes)
    return safetensors.numpy.load_file(where)
  with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as orbax:
    found = orbax.metadata(where.absolute()).item_metadata
    shapes = {name: array.shape for name, array in dict(found.tree).items()}
    _all_there(where, about, shapes)
    wanted = {name: ocp.RestoreArgs(restore_type=np.ndarray) for name in filled}
    return orbax.restore(
      where.absolute(), args=ocp.args.PyTreeRestore(restore_args=wanted)
    )


def _all_there(
  where: Path, about: Mapping[str, Leaf], shapes: Mapping[str, Collection[int]]
) -> None:
  for path in [*about, *shapes]:
    if path not in about:
      raise _damaged(where, f'{path}: expected no such leaf, got one')
    if path in shapes:
      _same(where, path, about[path], None, shapes[path])
    elif all(about[path]['shape']):
      raise _damaged(where, f'{path}: expected {about[path]}, got no such leaf')


def _damaged(folder: Path, what: str) -> CheckpointError:
  return CheckpointError(
    f'{folder}: damaged: {what}. Copy it again from where it came, or write it again'
  )
