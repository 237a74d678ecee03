"""Programs are kept where they may be, and a kept one computes the same bits."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache

from depthprune import cli
from depthprune.exports import networks
from depthprune.run import compilation, rounds, sweep
from depthprune.run.config import default

ROOT = Path(__file__).parents[2]
HIT = '/jax/compilation_cache/cache_hits'
SETTINGS = (
  'jax_enable_compilation_cache',
  'jax_compilation_cache_dir',
  'jax_persistent_cache_min_compile_time_secs',
)


@pytest.fixture
def home(tmp_path, monkeypatch) -> Iterator[Path]:
  """A cache directory of the test, in which every program is worth keeping."""
  monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'home'))
  monkeypatch.setattr(compilation, 'LEAST_S', 0.0)
  before = {name: getattr(jax.config, name) for name in SETTINGS}
  jax.config.update('jax_enable_compilation_cache', True)
  compilation_cache.reset_cache()
  yield tmp_path / 'home'
  for name, value in before.items():
    jax.config.update(name, value)
  compilation_cache.reset_cache()


@pytest.fixture
def hits() -> Iterator[list[str]]:
  """A list that grows by one for every program that is loaded."""
  found: list[str] = []
  note: Callable = lambda event, **_: found.append(event) if event == HIT else None
  jax.monitoring.register_event_listener(note)
  yield found
  jax.monitoring.unregister_event_listener(note)


def trained(scale: float) -> np.ndarray:
  """Some steps of a program that overwrites its arguments, compiled or loaded anew."""
  jax.clear_caches()

  def step(weights, x):
    loss = lambda w: jnp.sum(jnp.tanh(x @ w) ** 2) * scale
    return weights - 0.01 * jax.grad(loss)(weights)

  step = jax.jit(step, donate_argnums=0)
  weights = jax.random.normal(jax.random.key(0), (32, 32))
  x = jax.random.normal(jax.random.key(1), (64, 32))
  for _ in range(5):
    weights = step(weights, x)
  return np.asarray(weights)


def test_a_kept_program_is_loaded_and_computes_the_same_bits(home, hits):
  folder = compilation.keep_programs()
  assert folder is not None and folder.parent == home / 'depthprune' / 'programs'
  assert folder.stat().st_mode & 0o777 == 0o700
  compiled = trained(1.0)
  assert any(folder.iterdir()) and not hits
  assert (trained(1.0) == compiled).all()
  assert hits


def test_a_damaged_program_is_compiled_again_without_a_word(home, hits):
  folder = compilation.keep_programs()
  assert folder is not None
  compiled = trained(2.0)
  for path in folder.iterdir():
    path.write_bytes(path.read_bytes()[:50])
  compilation_cache.reset_cache()
  assert (trained(2.0) == compiled).all()  # warnings are errors here
  assert not hits


def test_a_folder_that_is_gone_is_no_error(home):
  folder = compilation.keep_programs()
  assert folder is not None
  compiled = trained(3.0)
  for path in folder.iterdir():
    path.unlink()
  folder.rmdir()
  folder.touch()  # a file, in which nothing can be written
  assert (trained(3.0) == compiled).all()


def test_settings_of_jax_win(home, tmp_path):
  jax.config.update('jax_compilation_cache_dir', str(tmp_path / 'own'))
  assert compilation.keep_programs() is None
  assert jax.config.jax_compilation_cache_dir == str(tmp_path / 'own')
  jax.config.update('jax_compilation_cache_dir', None)
  jax.config.update('jax_enable_compilation_cache', False)
  assert compilation.keep_programs() is None
  assert jax.config.jax_compilation_cache_dir is None
  assert not home.exists()


def in_a_file(home: Path, monkeypatch) -> None:
  home.touch()


def where_nothing_can_be_written(home: Path, monkeypatch) -> None:
  monkeypatch.setenv('XDG_CACHE_HOME', '/proc/here')


def on_a_full_disk(home: Path, monkeypatch) -> None:
  monkeypatch.setattr(compilation, 'ROOM_BYTES', 2**62)


def without_a_home(home: Path, monkeypatch) -> None:
  def nowhere():
    raise RuntimeError('Could not determine home directory.')

  monkeypatch.delenv('XDG_CACHE_HOME')
  monkeypatch.setattr(compilation.Path, 'home', nowhere)


def not_loaded_again(home: Path, monkeypatch) -> None:
  def refuse(*_):
    raise ValueError('Target machine feature is not supported on the host machine')

  monkeypatch.setattr(compilation.serialize_executable, 'deserialize_and_load', refuse)


def one_of_several(home: Path, monkeypatch) -> None:
  monkeypatch.setattr(jax, 'process_count', lambda: 2)


@pytest.mark.parametrize(
  'hinder',
  [
    in_a_file,
    where_nothing_can_be_written,
    on_a_full_disk,
    without_a_home,
    not_loaded_again,
    one_of_several,
  ],
)
def test_where_programs_cannot_be_kept_they_are_not(hinder, home, monkeypatch):
  hinder(home, monkeypatch)
  assert compilation.keep_programs() is None
  assert jax.config.jax_compilation_cache_dir is None


def test_what_was_longest_not_read_is_removed(tmp_path):
  for age, name in enumerate(('new', 'a/used', 'old', 'a/older')):
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(bytes(100))
    os.utime(path, (1e9 - age, 1e9 - age))
  os.utime(tmp_path / 'a/used', (1e9 + 1, 1e9 - 50))  # written long ago, read since
  compilation.trim(tmp_path, 399)
  left = lambda: {p.name for p in tmp_path.rglob('*') if p.is_file()}
  assert left() == {'new', 'used', 'old'}
  compilation.trim(tmp_path, 150)
  assert left() == {'used'}


def test_folders_are_bounded_together(home, monkeypatch):
  folder = compilation.programs_folder()
  other = folder.parent / 'another-version'
  other.mkdir(parents=True)
  (other / 'program').write_bytes(bytes(100))
  monkeypatch.setattr(compilation, 'MOST_BYTES', 50)
  assert compilation.keep_programs() == folder
  assert not [*other.iterdir()]


def test_another_machine_or_version_has_another_folder(tmp_path, monkeypatch):
  info = tmp_path / 'cpuinfo'
  monkeypatch.setattr(compilation, 'CPU_INFO', info)
  info.write_text('model name\t: one\nflags\t\t: avx avx2\ncpu MHz\t\t: 1\n')
  first = compilation.programs_folder()
  info.write_text('model name\t: one\nflags\t\t: avx avx2\ncpu MHz\t\t: 2\n')
  assert compilation.programs_folder() == first
  info.write_text('model name\t: one\nflags\t\t: avx\n')
  assert compilation.programs_folder() != first
  info.write_text('model name\t: one\nflags\t\t: avx avx2\n')
  monkeypatch.setattr('jaxlib.version.__version__', '0.0.1')
  assert compilation.programs_folder() != first


def test_the_command_line_keeps_programs_and_functions_do_not(monkeypatch, tmp_path):
  kept, ran = [], []
  monkeypatch.setattr(compilation, 'keep_programs', lambda: kept.append(len(ran)))
  monkeypatch.setattr(rounds, 'run', lambda *given: ran.append(given))
  monkeypatch.setattr(cli, '_report', lambda path: None)
  words = ['run', 'gates', '--workdir', str(tmp_path / 'run')]
  assert cli.main(words) == 0
  assert kept == [0] and len(ran) == 1  # before the run
  assert sweep.attempt(default('gates', workdir=str(tmp_path / 'a')), (), False) is None
  assert kept == [0, 1]


RUN = (
  '-m depthprune run gates --model mlp --subset 160 --batch 16 --train-epochs 1 '
  '--gate-epochs 2 --finetune-epochs 1 --target 0.6'
)


@pytest.mark.slow
def test_a_run_with_kept_programs_reaches_the_same_bits(tmp_path):
  """In processes of their own: one without, one that keeps, two that load."""

  def run(name: str, **environment: str) -> tuple[list[bytes], str]:
    given = {**os.environ, 'XDG_CACHE_HOME': str(tmp_path / 'home'), **environment}
    words = [sys.executable, *RUN.split(), '--workdir', name]
    done = subprocess.run(
      words, cwd=tmp_path, env={**given, 'PYTHONPATH': str(ROOT)},
      capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    arrays = jax.tree.leaves(networks.load(tmp_path / name / 'pruned').variables)
    return [np.asarray(x).tobytes() for x in arrays], done.stderr

  kept = lambda: {p.name for p in (tmp_path / 'home').rglob('*-cache')}
  on = {'JAX_ENABLE_COMPILATION_CACHE': 'true', compilation.LEAST.upper(): '0'}
  alone, _ = run('alone', JAX_ENABLE_COMPILATION_CACHE='false')
  assert alone and not kept()
  first, _ = run('first', **on)
  written = kept()
  second, said = run('second', **on)
  assert written and alone == first == second
  assert 'rror' not in said and 'Warning' not in said
  (tmp_path / 'second' / 'result.json').unlink()
  resumed, _ = run('second', **on)
  assert resumed == alone
  unwritable, said = run('unwritable', **on, XDG_CACHE_HOME='/proc/here')
  assert unwritable == alone and 'Traceback' not in said
