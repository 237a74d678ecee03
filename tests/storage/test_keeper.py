"""Training state: exact to the bit, and never lost to a kill."""

import errno
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from depthprune.storage import checkpoint
from depthprune.storage.checkpoint import CheckpointError, kind
from depthprune.storage.directory import WriteError
from depthprune.storage.keeper import Keeper, same_config


@flax.struct.dataclass
class State:
  params: dict
  opt_state: optax.OptState
  key: jax.Array
  step: jax.Array


class Extra(NamedTuple):
  half: jax.Array
  host: np.ndarray
  count: int
  nothing: None
  empty: jax.Array


def make_state(seed: int = 0):
  kernel = jax.random.normal(jax.random.key(seed), (3, 3, 2, 4))
  params = {'conv': {'kernel': kernel, 'bias': jnp.zeros(4)}}
  tx = optax.adamw(1e-3)
  extra = Extra(
    kernel.astype(jnp.bfloat16), np.arange(3), 7, None, jnp.zeros((2, 0), jnp.int8)
  )
  state = State(params, tx.init(params), jax.random.key(seed, impl='rbg'), jnp.int32(5))
  return {'state': state, 'extra': extra, 'mask': jnp.array([True, False])}


def assert_identical(a, b):
  assert jax.tree.structure(a) == jax.tree.structure(b)
  for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
    assert type(x) is type(y) and kind(x) == kind(y)
    if kind(x).startswith('key'):
      assert jax.random.key_impl(x) == jax.random.key_impl(y)
      x, y = jax.random.key_data(x), jax.random.key_data(y)
    assert np.asarray(x).tobytes() == np.asarray(y).tobytes()


def write(keeper: Keeper, step: int, state, **kwargs) -> None:
  keeper.save(step, state, **kwargs)
  keeper.wait()


def test_every_kind_of_leaf_comes_back_bit_for_bit(tmp_path):
  keeper = Keeper(tmp_path)
  state = make_state()
  assert keeper.restore_latest(state) is None
  keeper.save(5, state, {'stage': 'gates', 'best': 0.5})
  back = keeper.restore_latest(make_state(1))
  assert back is not None
  assert (back.step, back.meta) == (5, {'stage': 'gates', 'best': 0.5})
  assert_identical(back.state, state)


def test_an_abstract_state_says_what_is_expected(tmp_path):
  state = {'w': jnp.arange(3.0), 'key': jax.random.key(3)}
  write(Keeper(tmp_path), 1, state)
  back = Keeper(tmp_path).restore_latest(jax.eval_shape(lambda: state))
  assert back is not None
  assert_identical(back.state, state)


def test_values_that_are_not_finite_are_kept(tmp_path):
  bits = np.array([0x7FC00001, 0xFF800000, 0x80000000, 1], np.uint32)
  state = {'w': jnp.asarray(bits.view(np.float32))}
  write(Keeper(tmp_path), 1, state)
  back = Keeper(tmp_path).restore_latest(state)
  assert back is not None
  assert np.asarray(back.state['w']).tobytes() == bits.tobytes()


def test_keeps_the_newest_and_drops_a_future_that_was_given_up(tmp_path):
  keeper = Keeper(tmp_path, keep=2)
  for step in (10, 20, 30):
    keeper.save(step, {'w': jnp.full(2, float(step))})
  assert keeper.steps() == [20, 30]
  keeper.save(25, {'w': jnp.zeros(2)})
  assert keeper.steps() == [20, 25]
  keeper.save(25, {'w': jnp.ones(2)})
  back = keeper.restore_latest({'w': jnp.zeros(2)})
  assert back is not None and back.state['w'].tolist() == [1, 1]


def test_the_best_is_kept_besides_the_newest(tmp_path):
  keeper = Keeper(tmp_path, keep=2)
  assert keeper.restore_best({'w': jnp.zeros(2)}) is None
  for step, score in ((10, 0.5), (20, 0.1), (30, 0.3), (40, 0.2), (50, None)):
    keeper.save(step, {'w': jnp.full(2, float(step))}, score=score)
  assert keeper.steps() == [20, 40, 50]
  best = keeper.restore_best({'w': jnp.zeros(2)})
  assert best is not None and best.step == 20 and best.state['w'].tolist() == [20, 20]
  newest = keeper.restore_latest({'w': jnp.zeros(2)})
  assert newest is not None and newest.step == 50
  keeper.save(60, {'w': jnp.zeros(2)}, score=0.05)
  assert keeper.steps() == [50, 60]


def test_training_goes_on_while_a_state_is_written(tmp_path, monkeypatch):
  """Nothing is there before the write has ended, and it is of the state as it was."""
  keeper, go_on, checksums = Keeper(tmp_path), threading.Event(), checkpoint.checksums
  monkeypatch.setattr(
    checkpoint, 'checksums', lambda f: (go_on.wait(60), checksums(f))[1]
  )
  state = {'host': np.arange(4.0), 'device': jnp.arange(4.0)}
  keeper.save(1, state)
  state['host'] += 1
  state['device'] = jax.jit(lambda x: x + 1, donate_argnums=0)(state['device'])
  assert [path.name for path in tmp_path.iterdir()] == ['.unfinished-00000001']
  go_on.set()
  back = keeper.restore_latest(state)
  assert back is not None and back.step == 1
  for array in back.state.values():
    np.testing.assert_array_equal(array, np.arange(4.0))


FULL = OSError(errno.ENOSPC, 'No space left on device')


@pytest.mark.parametrize(
  ('where', 'name'),
  [
    (Path, 'mkdir'),
    (checkpoint.ocp.AsyncCheckpointer, 'save'),
    (checkpoint, 'checksums'),
    (Path, 'write_text'),
    (Path, 'rename'),
  ],
)
def test_a_full_disk_costs_one_state_and_none_that_was_there(
  tmp_path, monkeypatch, where, name
):
  keeper = Keeper(tmp_path, keep=2)
  for step in (1, 2):
    write(keeper, step, {'w': jnp.full(2, float(step))})

  def full(*args, **kwargs):
    raise FULL

  with monkeypatch.context() as patch:
    patch.setattr(where, name, full)
    with pytest.raises(WriteError, match=r'No space left.*continues .*\(step 2\)'):
      write(keeper, 3, {'w': jnp.full(2, 3.0)})
  assert sorted(path.name for path in tmp_path.iterdir()) == ['00000001', '00000002']
  back = keeper.restore_latest({'w': jnp.zeros(2)})
  assert back is not None and back.state['w'].tolist() == [2, 2]
  keeper.save(3, back.state)
  assert keeper.steps() == [2, 3]


def test_arrays_that_find_no_room_leave_what_was_there(tmp_path, caplog):
  """The limit is the system's: what fails is tensorstore, in a thread of its own."""
  keeper, w = Keeper(tmp_path), jax.random.normal(jax.random.key(0), (512, 512))
  write(keeper, 1, {'w': w})
  before = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, before[1]))
  try:
    with pytest.raises(WriteError, match=r'written: File too large. .*\(step 1\)'):
      write(keeper, 2, {'w': w + 1})
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
  assert [path.name for path in tmp_path.iterdir()] == ['00000001']
  back = keeper.restore_latest({'w': w})
  assert back is not None
  np.testing.assert_array_equal(back.state['w'], w)
  assert not caplog.records


@pytest.mark.parametrize('damage', ['cut', 'flipped', 'removed'])
def test_any_file_of_the_newest_state_damaged_gives_way_to_the_one_before(
  tmp_path, damage
):
  whole = tmp_path / 'whole'
  for step in (1, 2):
    write(Keeper(whole), step, {'w': jnp.full(64, float(step))})
  files = sorted(path for path in (whole / '00000002').rglob('*') if path.is_file())
  assert len({len(path.relative_to(whole).parts) for path in files}) >= 3
  for i, file in enumerate(path for path in files if path.stat().st_size):
    folder = tmp_path / str(i)
    shutil.copytree(whole, folder)
    broken = folder / file.relative_to(whole)
    content = bytearray(broken.read_bytes())
    content[len(content) // 3] ^= 8
    if damage == 'removed':
      broken.unlink()
    else:
      broken.write_bytes(
        content if damage == 'flipped' else content[: len(content) // 2]
      )
    with pytest.warns(UserWarning, match=f'{file.name}.*going on from step 1'):
      back = Keeper(folder).restore_latest({'w': jnp.zeros(64)})
    assert back is not None and back.step == 1 and (back.state['w'] == 1).all()


def test_leftovers_of_a_kill_are_swept_and_never_read(tmp_path):
  keeper = Keeper(tmp_path)
  (tmp_path / '.unfinished-00000009' / 'arrays').mkdir(parents=True)
  assert keeper.restore_latest({'w': jnp.zeros(2)}) is None
  write(keeper, 1, {'w': jnp.zeros(2)})
  assert [path.name for path in tmp_path.iterdir()] == ['00000001']


def test_another_config_is_refused_naming_the_fields(tmp_path):
  state = {'w': jnp.zeros(2)}
  write(Keeper(tmp_path, config={'target': 0.5, 'seed': 0, 'dims': (1, 2)}), 1, state)
  asked = {'target': 0.25, 'seed': 0, 'dims': (1, 2), 'of': 'params'}
  with pytest.raises(CheckpointError, match='another config') as error:
    Keeper(tmp_path, config=asked).restore_latest(state)
  assert 'target (asked for 0.25, there 0.5)' in str(error.value)
  assert "of (asked for 'params', there None)" in str(error.value)
  assert 'seed' not in str(error.value) and 'dims' not in str(error.value)


@pytest.mark.parametrize(
  ('like', 'words'),
  [
    ({'w': jnp.zeros(3), 'b': jnp.zeros(1)}, r'w: expected float32\[3\].*float32\[2'),
    ({'w': jnp.zeros(2, jnp.int32), 'b': jnp.zeros(1)}, r'w: expected int32\[2\]'),
    ({'w': jnp.zeros(2)}, r'b: expected no such leaf, got float32\[1\]'),
    (
      {'w': jnp.zeros(2), 'b': jnp.zeros(1), 'mu': jnp.zeros(1)},
      r'mu: expected float32\[1\], got no such leaf',
    ),
  ],
)
def test_a_leaf_that_does_not_fit_is_named(tmp_path, like, words):
  write(Keeper(tmp_path), 1, {'w': jnp.zeros(2), 'b': jnp.zeros(1)})
  with pytest.raises(CheckpointError, match=words):
    Keeper(tmp_path).restore_latest(like)


def test_a_damaged_newest_state_gives_way_to_the_one_before(tmp_path):
  keeper = Keeper(tmp_path)
  for step in (1, 2, 3):
    write(keeper, step, {'w': jnp.full(2, float(step))})
  for step in (2, 3):
    record = tmp_path / f'{step:08d}' / 'state.json'
    record.write_bytes(record.read_bytes()[:-40])
  with pytest.warns(UserWarning, match='damaged.*going on from step 1'):
    back = keeper.restore_latest({'w': jnp.zeros(2)})
  assert back is not None and back.step == 1 and back.state['w'].tolist() == [1, 1]
  assert keeper.steps() == [1]
  keeper.save(2, {'w': jnp.zeros(2)})
  assert keeper.steps() == [1, 2]


def test_when_all_are_damaged_nothing_is_started_over_silently(tmp_path):
  keeper = Keeper(tmp_path)
  write(keeper, 1, {'w': jnp.zeros(2)})
  (tmp_path / '00000001' / 'state.json').unlink()
  with pytest.raises(CheckpointError, match='no state is whole.*delete the folder'):
    keeper.restore_latest({'w': jnp.zeros(2)})
  assert keeper.steps() == [1]


LOOP = """
import sys
import jax.numpy as jnp
from depthprune.storage.keeper import Keeper

keeper = Keeper(sys.argv[1], keep=2)
like = {'w': jnp.zeros((64, 64)), 'step': jnp.int32(0)}
back = keeper.restore_latest(like)
start = back.step + 1 if back else 0
assert back is None or int(back.state['step']) == back.step
for step in range(start, 100_000):
  keeper.save(step, {'w': jnp.full((64, 64), float(step)), 'step': jnp.int32(step)})
  keeper.wait()
  print(step, flush=True)
"""


def killed_in_the_middle(folder: Path, rng: np.random.RandomState) -> int:
  """Saves in a loop until killed at random; returns the last step that was reported."""
  command = [sys.executable, '-W', 'error', '-c', LOOP, str(folder)]
  with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
    assert process.stdout is not None
    first = process.stdout.readline()
    assert first, 'the loop ended before it saved anything'
    time.sleep(rng.uniform(0, 0.3))
    process.send_signal(signal.SIGKILL)
    said = process.stdout.read().split()
  return int((said or [first])[-1])


@pytest.mark.parametrize('kills', [2, pytest.param(12, marks=pytest.mark.slow)])
def test_a_kill_at_any_moment_loses_nothing_that_was_saved(tmp_path, kills):
  rng = np.random.RandomState(0)
  like = {'w': jnp.zeros((64, 64)), 'step': jnp.int32(0)}
  for _ in range(kills):
    said = killed_in_the_middle(tmp_path, rng)
    back = Keeper(tmp_path, keep=2).restore_latest(like)  # a warning would be an error
    # The last save may have been complete before it was reported.
    assert back is not None and back.step in (said, said + 1)
    assert np.all(np.asarray(back.state['w']) == back.step)


def test_a_field_that_came_later_and_is_not_used_is_no_difference():
  before = {'options': {'drop': 0.5}}
  same_config(before, {'options': {'drop': 0.5, 'threshold': None}}, 'here')
  same_config(before, {'options': {'drop': 0.5, 'keep': ()}}, 'here')
  with pytest.raises(CheckpointError, match='options'):
    same_config(before, {'options': {'drop': 0.5, 'threshold': 0.9}}, 'here')
