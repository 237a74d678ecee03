"""Stored trees: whole, or an error that says what to do."""

import os
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from depthprune.storage import checkpoint
from depthprune.storage.checkpoint import CheckpointError
from tests.mutations import sign

TREE = {'w': jnp.arange(64, dtype=jnp.bfloat16).reshape(8, 8), 'n': [np.int64(3), 0.5]}


def files_of(folder: Path) -> list[Path]:
  return sorted(path for path in folder.rglob('*') if path.is_file())


# Any file cut short, flipped or gone is an error, at every level of the folder.


@pytest.fixture(scope='module', params=['orbax', 'safetensors'])
def whole(tmp_path_factory, request):
  folder = tmp_path_factory.mktemp('whole') / 'one'
  tensors = request.param == 'safetensors'
  checkpoint.write(folder, 'arch.json', TREE, {'arch': {'a': 1}}, tensors)
  assert (folder / 'weights.safetensors').is_file() == tensors
  return {path.relative_to(folder): path.read_bytes() for path in files_of(folder)}


def lay_out(files, folder):
  for path, content in files.items():
    (folder / path).parent.mkdir(parents=True, exist_ok=True)
    (folder / path).write_bytes(content)


def test_whole_is_whole(whole, tmp_path):
  lay_out(whole, tmp_path)
  leaves, record = checkpoint.read(tmp_path, 'arch.json')
  back = checkpoint.matched(TREE, leaves, '')
  assert back['n'] == TREE['n'] and back['w'].dtype == jnp.bfloat16
  assert np.asarray(back['w']).tobytes() == np.asarray(TREE['w']).tobytes()
  assert record['arch'] == {'a': 1}


DAMAGE = {
  'cut': lambda content, rng: content[: len(content) // 2],
  'emptied': lambda content, rng: b'',
  'removed': lambda content, rng: None,
  'zeroed': lambda content, rng: bytes(len(content)),
  'flipped': lambda content, rng: flipped(content, rng.randint(8 * len(content))),
}


def flipped(content: bytes, bit: int) -> bytes:
  """One bit is another; in JSON, that may be one that means nothing."""
  changed = bytearray(content)
  changed[bit // 8] ^= 1 << bit % 8
  return bytes(changed)


@pytest.mark.parametrize('damage', DAMAGE)
def test_a_file_that_is_not_what_was_written_is_an_error(whole, tmp_path, damage):
  rng = np.random.RandomState(0)
  targets = [path for path, content in whole.items() if content]
  assert len(targets) >= (2 if Path('weights.safetensors') in whole else 5)
  for i, target in enumerate(targets):
    folder = tmp_path / str(i)
    lay_out({path: whole[path] for path in whole if path != target}, folder)
    content = DAMAGE[damage](whole[target], rng)
    if content is not None:
      lay_out({target: content}, folder)
    with pytest.raises(CheckpointError, match=target.name):
      checkpoint.read(folder, 'arch.json')


def test_safetensors_hold_what_strides_say_and_arrays_of_nothing(tmp_path):
  tree = {'t': np.arange(6.0).reshape(2, 3).T, 'none': np.zeros((0, 4))}
  checkpoint.write(tmp_path / 'it', 'arch.json', tree, {}, tensors=True)
  leaves, _ = checkpoint.read(tmp_path / 'it', 'arch.json')
  for name, array in tree.items():
    np.testing.assert_array_equal(leaves[name], array)


def test_a_foreign_folder_and_a_newer_format_say_what_to_do(tmp_path):
  with pytest.raises(CheckpointError, match='expected a checkpoint, got no file arch'):
    checkpoint.read(tmp_path / 'nowhere', 'arch.json')
  (tmp_path / 'arch.json').write_text('{"layers": [1, 2]}')
  with pytest.raises(CheckpointError, match='arch.json is not a record'):
    checkpoint.read(tmp_path, 'arch.json')
  checkpoint.write(tmp_path / 'new', 'arch.json', {}, {'format': checkpoint.FORMAT + 1})
  with pytest.raises(CheckpointError, match='expected format 1, got 2 by depthprune'):
    checkpoint.read(tmp_path / 'new', 'arch.json')


def test_a_folder_with_other_files_is_not_replaced(tmp_path):
  (tmp_path / 'thesis.txt').write_text('years of work')
  with pytest.raises(CheckpointError, match='got other files'):
    checkpoint.write(tmp_path, 'arch.json', {'w': np.zeros(1)}, {})
  assert (tmp_path / 'thesis.txt').read_text() == 'years of work'


def test_paths_that_collide_are_refused(tmp_path):
  with pytest.raises(CheckpointError, match='2 different paths, got 1'):
    checkpoint.write(
      tmp_path / 'a', 'r', {'a': {'b': np.zeros(1)}, 'a/b': np.zeros(1)}, {}
    )


@pytest.mark.parametrize('tensors', [False, True])
def test_a_leaf_that_is_not_among_the_arrays_is_named(tmp_path, tensors):
  checkpoint.write(tmp_path / 'one', 'arch.json', {'n': TREE['n']}, {}, tensors)
  record = checkpoint.read_record(tmp_path / 'one', 'arch.json')
  record['leaves']['w'] = {'dtype': 'bfloat16', 'shape': [8, 2**50]}
  sign(tmp_path / 'one' / 'arch.json', record)
  with pytest.raises(CheckpointError, match=r'damaged: w: expected .*no such leaf'):
    checkpoint.read(tmp_path / 'one', 'arch.json')


@pytest.mark.parametrize('tensors', [False, True])
def test_a_pipe_among_the_arrays_is_not_waited_for(tmp_path, tensors):
  checkpoint.write(tmp_path / 'one', 'arch.json', TREE, {}, tensors)
  record = checkpoint.read_record(tmp_path / 'one', 'arch.json')
  files = [p for p in files_of(tmp_path / 'one') if p.name != 'arch.json']
  for path in files:
    path.unlink()
    os.mkfifo(path)
    record['files'].pop(path.name, None)
  sign(tmp_path / 'one' / 'arch.json', record)
  with pytest.raises(CheckpointError):
    checkpoint.read(tmp_path / 'one', 'arch.json')
