"""The whole run, small: an MLP on the digits; and two rounds of a made-up method."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from depthprune.config import Config
from depthprune.training import checkpoint, record, rounds, store
from depthprune.training.data import Augment, Dataset, Normalisation
from depthprune.training.keeper import CheckpointError
from depthprune.training.method import Method
from depthprune.training.stage import Job
from depthprune.training.tasks import classification
from depthprune.training.train import NonFiniteLoss

CONFIG = Config(
  model='mlp',
  subset=512,
  batch=32,
  train_epochs=2,
  gate_epochs=4,
  finetune_epochs=1,
  learning_rate=0.05,
  checkpoint_every_s=0,
)


@pytest.fixture(scope='module')
def finished(tmp_path_factory) -> tuple[Config, dict]:
  folder = tmp_path_factory.mktemp('finished')
  config = dataclasses.replace(CONFIG, workdir=str(folder))
  return config, rounds.run(config, show=False)


def lines(path: Path) -> list[dict]:
  return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_run_reaches_its_target_and_keeps_its_accuracy(finished):
  _, result = finished
  flops = result['flops']
  assert abs(flops['after'] / flops['before'] - 0.5) <= 0.01
  assert flops['target'] == 0.5 * flops['before'] == 0.5 * 2 * (64 * 200 + 200 * 210)
  assert result['accuracy']['after'] > 0.75
  assert result['accuracy']['pruned'] > 0.5
  assert result['verify']['difference'] <= 1e-5
  assert result['widths']['layer0/dense:1'][0] == 200
  assert set(result['latency_ms']) == {'1', '128'}


def test_a_run_writes_what_the_report_reads(finished):
  config, result = finished
  assert json.loads((config.path / 'result.json').read_text()) == result
  history = lines(config.path / 'history.jsonl')
  assert [*dict.fromkeys(row['stage'] for row in history)] == [
    'train',
    'gates',
    'finetune',
  ]
  assert {'step', 'loss', 'accuracy', 'flops', 'images_per_second', 'time'} <= set(
    history[0]
  )
  assert all(row['flops'] for row in history if row['stage'] == 'gates')
  gates = lines(config.path / 'gates.jsonl')
  assert 20 <= len(gates) <= 80
  assert gates[-1]['open'].keys() == {'layer0/dense:1', 'layer1/dense:1'}
  stored = json.loads((config.path / 'config.json').read_text())
  assert stored['config'] == config.to_json()
  assert {'versions', 'device', 'command'} <= set(stored)


def test_the_saved_network_is_the_one_that_was_measured(finished):
  config, result = finished
  pruned = checkpoint.load(config.path / 'pruned')
  job = rounds.prepare(config, show=False)
  measured = rounds.evaluator(pruned.apply, job.task)(
    pruned.variables, job.batches(job.images.test)
  )
  assert measured['accuracy'] == pytest.approx(result['accuracy']['after'], abs=1e-6)
  kernel = pruned.variables['params']['layer0']['dense']['kernel']
  assert kernel.shape == (64, result['widths']['layer0/dense:1'][1])


def test_a_finished_run_is_not_trained_again(finished, monkeypatch):
  config, result = finished

  def train_again(*args, **kwargs):
    raise AssertionError('a step was taken')

  monkeypatch.setattr('depthprune.training.train._one_by_one', train_again)
  again = rounds.run(config, show=False)
  assert again['accuracy'] == result['accuracy']
  assert again['widths'] == result['widths']


def test_a_directory_of_another_run_is_refused(finished):
  config, _ = finished
  with pytest.raises(CheckpointError, match='target .*seed|seed.* target'):
    rounds.run(dataclasses.replace(config, target=0.6, seed=1), show=False)


@pytest.mark.parametrize(
  ('change', 'said'),
  [
    ({'model': 'mlpp'}, "no model 'mlpp'"),
    ({'method': 'gate'}, "no method 'gate'"),
    ({'data': 'digit'}, 'digits'),
    ({'target': 1e-4}, 'cannot be reached'),
  ],
)
def test_wrong_input_is_found_before_any_training(change, said, tmp_path, monkeypatch):
  monkeypatch.setattr(rounds, 'stage', None)
  config = dataclasses.replace(CONFIG, workdir=str(tmp_path / 'run'), **change)
  with pytest.raises(ValueError, match=said):
    rounds.run(config, show=False)


def start(config: Config) -> subprocess.Popen:
  code = (
    'from depthprune.config import Config; from depthprune.training import rounds; '
    f'rounds.run({config!r}, show=False)'
  )
  root = Path(__file__).parents[2]
  return subprocess.Popen([sys.executable, '-c', code], cwd=root, env=os.environ)


def arrays(config: Config) -> dict[str, np.ndarray]:
  """Everything the last stage ended with."""
  folder = sorted((config.path / 'checkpoints' / 'finetune').glob('0*'))[-1]
  return store.read(folder, 'state.json')[0]


def test_a_run_killed_in_the_middle_ends_with_the_same_bits(finished, tmp_path):
  config = dataclasses.replace(finished[0], workdir=str(tmp_path / 'run'))
  gates = config.path / 'gates.jsonl'
  process = start(config)
  while not gates.exists() or len(gates.read_text().splitlines()) < 10:
    assert process.poll() is None, 'the run ended before it could be killed'
    time.sleep(0.01)
  process.send_signal(signal.SIGKILL)
  assert process.wait() == -signal.SIGKILL
  assert not (config.path / 'result.json').exists()
  assert start(config).wait() == 0
  expected, found = arrays(finished[0]), arrays(config)
  assert expected.keys() == found.keys()
  for path, value in expected.items():
    np.testing.assert_array_equal(found[path], value, err_msg=path)


class Net(nn.Module):
  """Two gated branches with batch statistics, and a module without `arch`."""

  @nn.compact
  def __call__(self, x, train=False):
    x = nn.Dense(6, name='first')(x.reshape(len(x), -1))
    for i in range(2):
      y = nn.relu(
        nn.BatchNorm(not train, name=f'norm{i}')(nn.Dense(8, name=f'in{i}')(x))
      )
      gate = self.variable('branches', f'branch{i}', jnp.ones, ())
      x = x + gate.value * nn.Dense(6, name=f'out{i}')(y)
    return {'main': nn.Dense(3, name='head')(x)}


def images() -> Dataset:
  rng = np.random.default_rng(0)
  split = lambda n: {
    'image': rng.integers(0, 255, (n, 2, 2, 1)).astype(np.uint8),
    'label': rng.integers(0, 3, n).astype(np.int32),
  }
  how = (3, (2, 2, 1), Normalisation((0.5,), (0.25,)), Augment())
  return Dataset('made up', split(32), split(8), split(8), *how)


def test_rounds_are_repeated_and_held_out_data_decides(tmp_path):
  """Closes half of the gated units in each of two rounds, the better half kept."""
  set_, asked = images(), []

  def build(coupling, steps, scores):
    group = next(g for g in coupling.groups if g.startswith('in'))
    n = coupling.groups[group].size

    def decide(theta, stats, evaluate):
      halves = [{'channels': {group: np.arange(n) % 2 == half}} for half in (0, 1)]
      losses = [evaluate(keep) for keep in halves]
      asked.append((n, scores[group].shape, losses))
      return halves[int(np.argmin(losses))]

    return Method(decide=decide, rounds=2)

  config = dataclasses.replace(
    CONFIG, batch=8, gate_epochs=1, finetune_epochs=1, workdir=str(tmp_path)
  )
  job = Job(
    config, tmp_path, set_, jax.device_put(set_.train), classification(3), False
  )
  variables = Net().init(jax.random.key(0), jnp.zeros((1, 2, 2, 1)))
  small = rounds.shrink(job, Net(), variables, build)
  assert [n for n, _, _ in asked] == [8, 4]
  assert all(shape == (n,) and len(set(losses)) == 2 for n, shape, losses in asked)
  assert small.variables['params']['in0']['kernel'].shape == (6, 2)
  assert small.variables['batch_stats']['norm0']['mean'].shape == (2,)
  assert len(small.reports) == 2
  stages = sorted(path.name for path in (tmp_path / 'checkpoints').iterdir())
  assert stages == ['finetune-1', 'finetune-2', 'gates-1', 'gates-2']


def test_distillation_is_an_option_of_a_run(finished, tmp_path):
  config = dataclasses.replace(
    finished[0], distill=True, workdir=str(tmp_path), train_epochs=1, gate_epochs=2
  )
  rounds.run(config, show=False)
  rows = lines(tmp_path / 'history.jsonl')
  assert all('distillation' in r for r in rows if r['stage'] != 'train')


def test_a_run_that_diverges_keeps_its_last_good_state(tmp_path):
  config = dataclasses.replace(CONFIG, learning_rate=1e6, workdir=str(tmp_path))
  with pytest.raises(NonFiniteLoss, match=r'train: .* at step \d+'):
    rounds.run(config, show=False)
  kept = sorted((tmp_path / 'checkpoints' / 'train').glob('0*'))
  for folder in kept:
    leaves, _ = store.read(folder, 'state.json')
    assert all(np.isfinite(x).all() for x in leaves.values())
  logged = [row['step'] for row in lines(tmp_path / 'history.jsonl')]
  assert int(kept[-1].name) == logged[-1] < 32


def test_starting_anew_forgets_the_old_run_and_nothing_else(finished, tmp_path):
  config = dataclasses.replace(CONFIG, workdir=str(tmp_path), resume=False)
  mine = tmp_path / 'checkpoints' / 'mine.txt'
  mine.parent.mkdir()
  mine.write_text('not of a run')
  rounds.prepare(config)
  assert mine.exists()
  record.write(tmp_path / 'config.json', {'config': finished[0].to_json()})
  record.append(tmp_path / 'history.jsonl', {'step': 1})
  rounds.prepare(dataclasses.replace(config, seed=7))
  assert not (tmp_path / 'history.jsonl').exists()


def test_rounded_widths_parameters_and_bfloat16_in_one_run(tmp_path):
  config = dataclasses.replace(
    CONFIG, of='params', round_to=8, bfloat16=True, workdir=str(tmp_path)
  )
  result = rounds.run(config, show=False)
  assert all(after % 8 == 0 for _, after in result['widths'].values())
  params = result['params']
  assert abs(params['after'] / params['before'] - 0.5) <= 0.03
  assert params['target'] == 0.5 * params['before']
