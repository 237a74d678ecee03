"""Sweeps: ordinary runs that share what they have in common, resumed, spread."""

import dataclasses
import errno
import json
import multiprocessing
import operator
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from depthprune.methods.netcut import NetCutOptions
from depthprune.methods.sidenet import SideNetOptions
from depthprune.methods.trainable_gates import GateOptions
from depthprune.run import result as results
from depthprune.run import rounds, sweep
from depthprune.run.config import Config, default
from depthprune.storage import checkpoint, directory
from depthprune.train.loop import NonFiniteLoss
from depthprune.train.options import ConfigError
from depthprune.train.result import to_json

SMALL = default(
  'gates',
  model='mlp',
  subset=256,
  batch=64,
  train_epochs=1,
  gate_epochs=2,
  finetune_epochs=1,
  learning_rate=0.05,
)


def over(workdir: Path, *targets: float, seeds=(0,), **fields) -> list[Config]:
  config = dataclasses.replace(SMALL, workdir=str(workdir), **fields)
  return [
    dataclasses.replace(config, options=GateOptions(target), seed=seed)
    for target in targets
    for seed in seeds
  ]


def made_up(config: Config) -> dict:
  part = config.options.target
  cost = {'before': 100, 'after': 100 * part}
  accuracy = {'before': 0.9, 'after': 0.8 + part / 10}
  found = {'accuracy': accuracy, 'held_out': accuracy, 'flops': cost, 'params': cost}
  return {'config': config.to_json(), **found, 'device': 'CPU', 'wall_seconds': 1.0}


@pytest.fixture
def ran(monkeypatch) -> list[str]:
  """The folders of runs that were begun; they end at once, with a made-up result."""
  begun: list[str] = []

  def run(config: Config, show: bool) -> None:
    begun.append(config.path.name)
    if config.options.target == 0.1:
      raise NonFiniteLoss('the loss is nan')
    directory.write(config.path / 'result.json', made_up(config))

  monkeypatch.setattr(rounds, 'run', run)
  return begun


def test_a_plan_is_over_what_differs_each_run_in_a_folder_of_its_own(tmp_path):
  planned = sweep.plan(over(tmp_path, 0.3, 0.5, seeds=(0, 2)))
  assert planned.folder == tmp_path
  assert planned.swept == {'target': (0.3, 0.5), 'seed': (0, 2)}
  names = [run.path.relative_to(tmp_path).as_posix() for run in planned.runs]
  assert names == [f'target{t}-seed{s}' for t in (0.3, 0.5) for s in (0, 2)]
  assert [run.options.target for run in planned.runs] == [0.3, 0.3, 0.5, 0.5]


def test_a_sweep_has_a_folder_named_after_what_is_swept_and_no_slash_too_many():
  configs = [default('gates', data=data) for data in ('digits', 'glue/sst2')]
  planned = sweep.plan(configs)
  assert str(planned.folder) == 'runs/sweep-trainable_gates-resnet20-over-data'
  assert [run.path.name for run in planned.runs] == ['datadigits', 'dataglue_sst2']


@pytest.mark.parametrize(
  ('configs', 'said'),
  [
    ([default('gates')], 'an option with several values, each of them once'),
    ([Config(GateOptions('50%')), Config(GateOptions(0.5))], 'each of them once'),
    (
      [default('gates', seed=0), default('gates', seed=1), default('gates', seed=0)],
      'each of them once',
    ),
    (
      [default('gates', workdir='a'), default('gates', workdir='b')],
      'workdir: expected one for the whole',
    ),
    (
      [default('gates', mesh='data=1'), default('gates', mesh='data=2')],
      'mesh: expected one',
    ),
  ],
)
def test_what_is_no_sweep_is_refused(configs, said):
  with pytest.raises(ConfigError, match=said):
    sweep.plan(configs)


def test_finished_runs_are_read_and_others_go_on(tmp_path, ran):
  planned = sweep.plan(over(tmp_path, 0.3, 0.5, 0.7))
  found = sweep.run(planned, at_once=1)
  assert ran == ['target0.3', 'target0.5', 'target0.7']
  assert json.loads((tmp_path / 'sweep.json').read_text()) == json.loads(
    json.dumps(found)
  )
  assert [row['result']['flops']['after'] for row in found['runs']] == [30, 50, 70]
  (tmp_path / 'target0.5/result.json').unlink()
  ran.clear()
  assert sweep.run(planned, at_once=1)['runs'] == found['runs']
  assert ran == ['target0.5']


def test_another_config_in_the_same_folder_is_not_taken_for_this_one(tmp_path, ran):
  sweep.run(sweep.plan(over(tmp_path, 0.3, 0.5)), at_once=1)
  ran.clear()
  sweep.run(sweep.plan(over(tmp_path, 0.3, 0.5, batch=32)), at_once=1)
  assert ran == ['target0.3', 'target0.5']


def test_no_resume_starts_all_anew(tmp_path, ran):
  sweep.run(sweep.plan(over(tmp_path, 0.3, 0.5)), at_once=1)
  (tmp_path / 'target0.3/checkpoints').mkdir()
  ran.clear()
  sweep.run(sweep.plan(over(tmp_path, 0.3, 0.5, resume=False)), at_once=1)
  assert ran == ['target0.3', 'target0.5']
  assert not (tmp_path / 'target0.3/checkpoints').exists()


def test_a_run_that_is_refused_is_left_out_and_says_why(tmp_path, ran, capsys):
  found = sweep.run(sweep.plan(over(tmp_path, 0.1, 0.5)), at_once=1)
  refused, done = found['runs']
  assert (refused['result'], refused['refused']) == (None, 'the loss is nan')
  assert done['result'] and done['refused'] is None
  assert 'target0.1: the loss is nan' in capsys.readouterr().out


def test_a_sweep_without_any_result_is_an_error(tmp_path, ran):
  with pytest.raises(ConfigError, match=r'no run .* was possible: the loss is nan'):
    sweep.run(sweep.plan(over(tmp_path, 0.1, seeds=(0, 1))), at_once=1)


def test_a_mistake_of_ours_ends_the_sweep(tmp_path, monkeypatch):
  monkeypatch.setattr(rounds, 'run', lambda config, show: [][1])
  with pytest.raises(IndexError):
    sweep.run(sweep.plan(over(tmp_path, 0.3, 0.5)), at_once=1)


def test_a_full_disk_ends_the_sweep_and_a_full_device_one_run(tmp_path, monkeypatch):
  def run(config, show):
    if config.options.target == 0.3:
      raise RuntimeError('RESOURCE_EXHAUSTED: Out of memory\nand more')
    raise directory.failed(config.path, OSError(errno.ENOSPC, 'No space left'))

  monkeypatch.setattr(rounds, 'run', run)
  with pytest.raises(directory.WriteError, match=r'target0\.5: .*No space left'):
    sweep.run(sweep.plan(over(tmp_path, 0.3, 0.5)), at_once=1)
  told = directory.read(tmp_path / 'sweep.json')
  assert told and told['runs'][0]['refused'] == 'RESOURCE_EXHAUSTED: Out of memory'


def test_nothing_is_taken_from_a_live_run(tmp_path, ran):
  planned = sweep.plan(over(tmp_path, 0.3, 0.5, resume=False))
  first = planned.runs[0].path
  with directory.held(first):
    (first / 'history.jsonl').touch()
    with pytest.raises(directory.InUse, match='in use by a run that is alive'):
      sweep.run(planned, at_once=1)
  assert (first / 'history.jsonl').exists() and not ran


def test_a_damaged_result_is_found_anew(tmp_path, ran):
  planned = sweep.plan(over(tmp_path, 0.3, 0.5))
  sweep.run(planned, at_once=1)
  (tmp_path / 'target0.5/result.json').write_text('{"confi')
  with pytest.warns(UserWarning, match='damaged'):
    sweep.run(planned, at_once=1)
  assert ran == ['target0.3', 'target0.5', 'target0.5']


def arrays(folder: Path) -> dict[str, np.ndarray]:
  return checkpoint.read(folder / 'pruned', 'arch.json')[0]


def test_what_runs_share_is_trained_once_and_changes_no_bit(tmp_path, monkeypatch):
  monkeypatch.setattr(results, '_times', lambda *_: {})
  planned = sweep.plan(over(tmp_path / 'sweep', 0.4, 0.6))
  found = sweep.run(planned, at_once=1, show=False)
  (alone,) = over(tmp_path / 'alone', 0.6)
  result = to_json(rounds.run(alone, show=False))
  assert found['runs'][1]['result']['accuracy'] == result['accuracy']
  mine, theirs = arrays(planned.runs[1].path), arrays(alone.path)
  assert mine.keys() == theirs.keys()
  assert all(np.array_equal(mine[name], theirs[name]) for name in mine)
  # Lines of history have the speed that was measured: the same only if it is copied.
  trained = [
    [x for x in (run.path / 'history.jsonl').read_text().splitlines() if '"train"' in x]
    for run in planned.runs
  ]
  assert trained[0] == trained[1] != []


@pytest.mark.parametrize(
  ('one', 'other', 'parts'),
  [
    (default('gates'), Config(GateOptions(0.3)), ('checkpoints/train',)),
    (
      default('gates'),
      default('gates', gate_epochs=3, distill=True),
      ('checkpoints/train',),
    ),
    (default('gates'), default('gates', seed=1), ()),
    (default('gates'), default('gates', train_epochs=3), ()),
    (default('gates', pretrained='a'), Config(GateOptions(0.3), pretrained='a'), ()),
    (
      default('netcut'),
      dataclasses.replace(default('netcut'), options=NetCutOptions(0)),
      (),
    ),
    (Config(SideNetOptions()), Config(SideNetOptions(budget=0.5)), sweep.WHOLE),
    (
      Config(SideNetOptions()),
      Config(SideNetOptions(hidden=8)),
      ('checkpoints/train',),
    ),
  ],
)
def test_what_runs_share_follows_from_their_configs(one, other, parts):
  assert sweep.shared(one, other) == sweep.shared(other, one) == parts


def test_nobody_trains_beside_a_run_what_can_be_inherited_from_it(tmp_path):
  first, second = sweep.plan(over(tmp_path, 0.3, 0.5)).runs
  elsewhere = dataclasses.replace(second, seed=3)
  assert sweep.ready(second, []) and not sweep.ready(second, [first])
  assert sweep.ready(elsewhere, [first])
  line = lambda stage: json.dumps({'stage': stage, 'step': 1}) + '\n'
  history = first.path / 'history.jsonl'
  history.parent.mkdir()
  history.write_text(line('train'))
  assert not sweep.ready(second, [first])
  history.write_text(line('train') + line('gates') + '{"stage": "tr')
  assert sweep.ready(second, [first])
  history.write_text(line('train'))
  (second.path / 'checkpoints/train').mkdir(parents=True)
  assert sweep.ready(second, [first])


def test_runs_are_spread_over_processes_and_one_that_dies_is_told(tmp_path):
  here, dies = sweep.plan(over(tmp_path, 0.3, 0.5)).runs
  object.__setattr__(dies, 'subset', 1j)  # which JSON cannot express
  work: Any = operator.methodcaller('to_json')
  both = sweep.run_in_processes([here, dies], work, 2, 1, lambda *_: True)
  told = {config.path.name: found for config, found in both}
  assert told['target0.3'] == here.to_json()
  output = dies.path / sweep.OUTPUT
  assert told['target0.5'] == f'ended with exit code 1, see {output}'
  assert 'TypeError: Object of type complex' in output.read_text()


def test_a_spread_run_may_have_processes_of_its_own_and_tells_of_a_full_disk(tmp_path):
  (config, _) = sweep.plan(over(tmp_path, 0.3, 0.5)).runs
  begun = sweep._begin(config, sweep.finished, 0, 1, False)  # pyright: ignore
  begun.process.join()
  assert not begun.process.daemon and begun.answer.recv() is None
  told, tell = multiprocessing.Pipe(duplex=False)
  tell.send(directory.WriteError('no room'))
  with pytest.raises(directory.WriteError, match='no room'):
    sweep._answer(begun._replace(answer=told))


@pytest.mark.slow
def test_ctrl_c_of_a_terminal_reaches_a_sweep_once_and_all_its_runs_save(tmp_path):
  """A terminal sends it to every process, and the sweep tells its runs."""
  words = (
    '-m depthprune sweep gates --model mlp --target 0.3 0.5 --subset 160 --batch 16 '
    '--train-epochs 0 --gate-epochs 5000 --finetune-epochs 1 --at-once 2 --workdir '
  )
  started = subprocess.Popen(
    [sys.executable, *words.split(), str(tmp_path)], cwd=Path(__file__).parents[2],
    stderr=subprocess.PIPE, text=True, start_new_session=True,
  )  # fmt: skip
  runs = tmp_path / 'target0.3', tmp_path / 'target0.5'
  while not all((run / 'history.jsonl').exists() for run in runs):
    assert started.poll() is None, started.communicate()
    time.sleep(0.01)
  os.killpg(started.pid, signal.SIGINT)
  said = started.communicate(timeout=300)[1]
  assert said == 'stopped by Ctrl-C; the same command continues\n'
  assert started.returncode == 130
  for run in runs:
    (state,) = (run / 'checkpoints' / 'gates').iterdir()
    last = (run / sweep.OUTPUT).read_text().splitlines()[-1]
    assert (
      last == f'gates: stopped by SIGTERM and saved at step {int(state.name)} of 50000'
    )


@pytest.mark.slow
def test_cascades_at_several_budgets_share_all_that_is_trained(tmp_path):
  config = Config(
    SideNetOptions(hidden=8), 'resnet8', subset=256, train_epochs=1, gate_epochs=1,
    workdir=str(tmp_path),
  )  # fmt: skip
  budgets = [dataclasses.replace(config.options, budget=b) for b in (0.7, 0.9)]
  each = [dataclasses.replace(config, options=options) for options in budgets]
  with jax.numpy_dtype_promotion('standard'):  # optax.adam needs it
    found = sweep.run(sweep.plan(each), at_once=1, show=False)
  assert all(row['result'] for row in found['runs'])
  one, other = (
    (tmp_path / row['folder'] / 'history.jsonl').read_text() for row in found['runs']
  )
  assert one == other and '"heads"' in one
