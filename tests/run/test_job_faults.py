"""Runs that are killed, told to end, locked out, out of room: each ends with its bits.

The processes are real, and so are the signals.
"""

import dataclasses
import errno
import json
import multiprocessing
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from depthprune import cli
from depthprune.methods.auxiliary import AuxiliaryOptions
from depthprune.methods.implosion import ImplosionOptions
from depthprune.methods.netcut import NetCutOptions
from depthprune.methods.sidenet import SideNetOptions
from depthprune.run import rounds
from depthprune.run.config import Config, default
from depthprune.storage import checkpoint, directory
from depthprune.storage.directory import InUse
from depthprune.train.result import to_json
from tests.train.test_mesh import ended, launch

ROOT = Path(__file__).parents[2]
BRIEF = {
  'subset': 160,
  'batch': 16,
  'train_epochs': 1,
  'gate_epochs': 1,
  'finetune_epochs': 1,
  'checkpoint_every_s': 0.0,
}
NO_TRAINING = {'train_epochs': 0}
METHODS = {
  'trainable_gates': {'model': 'mlp'},
  'netcut': {
    'model': 'mlp', 'options': NetCutOptions(beta=0.001, force=True), **NO_TRAINING
  },
  'implosion': {
    'model': 'resnet14', 'options': ImplosionOptions(depth=4), 'learning_rate': 0.01,
    **NO_TRAINING,
  },
  'sidenet': {'model': 'mlp', 'options': SideNetOptions(hidden=16, regime='mixed')},
  'auxiliary': {
    'model': 'mlp', 'options': AuxiliaryOptions(structure='search'), **NO_TRAINING
  },
}  # fmt: skip


def config_of(method: str, folder: Path) -> Config:
  given = {**BRIEF, **METHODS[method]}
  return dataclasses.replace(default(method), **given, workdir=str(folder))


def left(folder: Path) -> dict[str, np.ndarray]:
  """Everything that a run ends with, by path: of each stage, and what was saved."""
  found = {}
  for stage in sorted((folder / 'checkpoints').iterdir()):
    newest = sorted(stage.glob('[0-9]*'))[-1]
    leaves, _ = checkpoint.read(newest, 'state.json')
    found |= {f'{stage.name}/{newest.name}/{k}': v for k, v in leaves.items()}
  (arch,) = [*folder.glob('pruned/arch.json'), *folder.glob('cascade/*/arch.json')]
  leaves, record = checkpoint.read(arch.parent, 'arch.json')
  keep = checkpoint.paths(record['keep'])
  return found | leaves | {f'keep/{k}': np.asarray(v) for k, v in keep.items()}


def assert_same(found: dict, expected: dict) -> None:
  assert found.keys() == expected.keys()
  for path, value in expected.items():
    np.testing.assert_array_equal(found[path], value, err_msg=path)


@pytest.fixture(scope='module')
def forks(tmp_path_factory):
  """Processes that have the library imported, and share what they compile."""
  with pytest.MonkeyPatch.context() as patch:
    cache = str(tmp_path_factory.mktemp('cache'))
    patch.setenv('JAX_COMPILATION_CACHE_DIR', cache)
    patch.setenv('JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS', '0')
    patch.setenv('PYTHONPATH', str(ROOT))
    context = multiprocessing.get_context('forkserver')
    context.set_forkserver_preload([rounds.__name__])
    yield context


def started(forks, config: Config):
  process = forks.Process(target=rounds.run, args=(config, False))
  process.start()
  return process


def completed(forks, config: Config) -> float:
  """Runs to the end; returns the seconds that took."""
  before = time.monotonic()
  process = started(forks, config)
  process.join()
  assert process.exitcode == 0
  return time.monotonic() - before


@pytest.mark.slow
@pytest.mark.parametrize('method', METHODS)
def test_killed_at_any_moment_a_run_ends_with_the_same_bits(method, tmp_path, forks):
  kills, rng, cut_short = 20, np.random.RandomState(0), 0
  completed(forks, config_of(method, tmp_path / 'first'))
  seconds = completed(forks, config_of(method, tmp_path / 'whole'))
  expected = left(tmp_path / 'whole')
  assert_same(left(tmp_path / 'first'), expected)
  for i in range(kills):
    config = config_of(method, tmp_path / f'killed{i}')
    process = started(forks, config)
    process.join(rng.uniform(0, seconds))
    process.kill()
    process.join()
    cut_short += process.exitcode == -signal.SIGKILL
    completed(forks, config)
    assert_same(left(config.path), expected)
    shutil.rmtree(config.path)
  assert cut_short >= kills // 2


# ---- by the command line -------------------------------------------------------------

LONG = 40  # epochs of ten steps


def long_config(folder: Path, **changes) -> Config:
  given = {**BRIEF, **METHODS['trainable_gates'], 'gate_epochs': LONG, **changes}
  return dataclasses.replace(default('trainable_gates'), **given, workdir=str(folder))


def command(folder: Path, every_s: float = 0.0) -> list[str]:
  """The words of `long_config`."""
  words = (
    f'-m depthprune.cli run gates --model mlp --subset 160 --batch 16 --train-epochs 1 '
    f'--gate-epochs {LONG} --finetune-epochs 1 --checkpoint-every-s {every_s}'
  )
  return [*words.split(), '--workdir', str(folder)]


def until_gates(folder: Path, process: subprocess.Popen, lines: int = 5) -> None:
  """Waits until so many lines were written of what the gates have learnt."""
  file = folder / 'gates.jsonl'
  while not file.exists() or file.read_bytes().count(b'\n') < lines:
    assert process.poll() is None, process.communicate()
    time.sleep(0.005)


def logged(folder: Path, stage: str = 'gates') -> list[int]:
  rows = map(json.loads, (folder / 'history.jsonl').read_text().splitlines())
  return [row['step'] for row in rows if row['stage'] == stage]


def saved(folder: Path, stage: str = 'gates') -> list[int]:
  return sorted(int(p.name) for p in (folder / 'checkpoints' / stage).glob('[0-9]*'))


def test_a_path_that_cannot_be_written_is_no_matter_of_trying_again(tmp_path, capsys):
  (tmp_path / 'file').touch()
  for folder in (tmp_path / 'file', tmp_path / 'file/below', Path('/proc/run')):
    assert cli.main(command(folder)[2:]) == cli.WRONG_INPUT
    assert f'error: {folder}: cannot be written: ' in capsys.readouterr().err


def test_where_there_are_no_locks_a_run_goes_on_with_a_warning(tmp_path, monkeypatch):
  def none(*_):
    raise OSError(errno.ENOLCK, 'No locks available')

  monkeypatch.setattr(directory.fcntl, 'flock', none)
  with pytest.warns(UserWarning, match='start no second run'), directory.held(tmp_path):
    pass


@pytest.fixture(scope='module')
def whole(tmp_path_factory) -> Path:
  """A run that nothing happened to."""
  folder = tmp_path_factory.mktemp('whole')
  to_json(rounds.run(long_config(folder), show=False))
  return folder


def test_told_to_end_a_run_saves_and_the_same_command_continues(whole, tmp_path):
  """And without room for what comes next it stops there once more."""
  words = command(tmp_path, every_s=1000)
  (process,) = launch(words)
  until_gates(tmp_path, process)
  process.send_signal(signal.SIGTERM)
  said = process.communicate(timeout=300)[1]
  (step,) = saved(tmp_path)
  assert process.returncode == cli.TERMINATED
  assert said.splitlines()[-1] == (
    f'gates: stopped by SIGTERM and saved at step {step} of 400; the same command '
    'continues from there'
  )
  assert logged(tmp_path)[-1] == step < 400
  few = ['bash', '-c', 'ulimit -f 64; exec "$@"', 'bash', sys.executable, *words]
  done = subprocess.run(few, cwd=ROOT, capture_output=True, text=True, timeout=300)
  assert done.returncode == cli.TRY_AGAIN, done.stderr
  # Behind it orbax may say what its threads met when they were ended.
  said = rf'^error: .*: File too large\. .* \(step {step}\)$'
  assert re.search(said, done.stderr, re.MULTILINE)
  assert saved(tmp_path) == [step]
  to_json(rounds.run(long_config(tmp_path), show=False))
  assert sorted({*logged(tmp_path)}) == sorted({*logged(whole), step})
  assert logged(tmp_path).count(step) == 1
  assert_same(left(tmp_path), left(whole))


HOLD = """
import sys, time
from pathlib import Path
from depthprune.storage import directory

with directory.held(Path(sys.argv[1])):
  print('held', flush=True)
  time.sleep(600)
"""


def test_a_directory_is_of_one_live_run_and_a_dead_one_lets_go(tmp_path, capsys):
  words = [sys.executable, '-c', HOLD, str(tmp_path)]
  with subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
    try:
      assert process.stdout is not None and process.stdout.readline() == 'held\n'
      with pytest.raises(InUse, match=rf'alive: .*"process": {process.pid}.*--workdir'):
        to_json(rounds.run(config_of('netcut', tmp_path), show=False))
      assert cli.main([*command(tmp_path)[2:], '--no-resume']) == cli.WRONG_INPUT
      assert f'error: {tmp_path}: in use' in capsys.readouterr().err
    finally:
      process.kill()
  assert [path.name for path in tmp_path.iterdir()] == [directory.LOCK]
  for _ in range(2):
    with directory.held(tmp_path), pytest.raises(InUse), directory.held(tmp_path):
      pass


@pytest.mark.parametrize(
  ('gone', 'how'),
  [
    (1, signal.SIGKILL),
    pytest.param(0, signal.SIGKILL, marks=pytest.mark.slow),
    pytest.param(1, signal.SIGSTOP, marks=pytest.mark.slow),
  ],
)
def test_when_one_of_two_processes_is_gone_the_other_says_so(tmp_path, gone, how):
  """It ends within two minutes; the run goes on, here by one process."""
  both = launch(command(tmp_path), processes=2)
  try:
    until_gates(tmp_path, both[0])
    both[gone].send_signal(how)
    said = both[1 - gone].communicate(timeout=120)[1]
  finally:
    for process in both:
      process.kill()
      process.communicate()
  assert both[1 - gone].returncode in (cli.TRY_AGAIN, -signal.SIGABRT), said
  assert re.search(
    rf'^stopped: process {1 - gone} of 0 to 1 cannot go on\. .*, continues from there',
    said,
    re.MULTILINE,
  )
  kept = saved(tmp_path)[-1]
  result = to_json(rounds.run(long_config(tmp_path), show=False))
  assert result['mesh'] == {'data': 1, 'model': 1, 'processes': 1}
  again = logged(tmp_path)
  assert [again.count(step) for step in (8, kept, 400)] == [1, 1, 1]


@pytest.mark.slow
def test_one_of_two_processes_is_told_to_end_and_both_do(tmp_path):
  both = launch(command(tmp_path, every_s=1000), processes=2)
  until_gates(tmp_path, both[0])
  both[1].send_signal(signal.SIGTERM)
  ended(both, cli.TERMINATED)
  assert saved(tmp_path) == logged(tmp_path)[-1:]


@pytest.mark.slow
def test_a_run_that_lost_a_process_ends_with_the_bits_of_one_that_did_not(tmp_path):
  lost, kept = tmp_path / 'lost', tmp_path / 'kept'
  ended(launch(command(kept), processes=2))
  both = launch(command(lost), processes=2)
  until_gates(lost, both[0])
  both[1].kill()
  for process in both:
    process.communicate(timeout=120)
  ended(launch(command(lost), processes=2))
  assert_same(left(lost), left(kept))
