"""The whole run, small: an MLP on the digits."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import jax
import numpy as np
import pytest

from depthprune import methods
from depthprune.data.dataset import DataError
from depthprune.exports import networks
from depthprune.methods.trainable_gates import GateOptions, trainable_gates
from depthprune.program.coupling import couple
from depthprune.program.rounding import Suited
from depthprune.run import rounds
from depthprune.run.config import Config, default
from depthprune.run.config import from_json as from_config
from depthprune.run.job import prepare, rounding
from depthprune.run.network import initial_variables, network
from depthprune.storage import checkpoint, directory
from depthprune.storage.checkpoint import CheckpointError
from depthprune.timing import layers
from depthprune.train.evaluate import evaluator
from depthprune.train.importance import taylor
from depthprune.train.loop import NonFiniteLoss
from depthprune.train.result import from_json, to_json

CONFIG = default(
  'gates',
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
  return config, to_json(rounds.run(config, show=False))


def lines(path: Path) -> list[dict]:
  return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_run_reaches_its_target_and_keeps_its_accuracy(finished):
  _, result = finished
  flops = result['flops']
  assert abs(flops['after'] / flops['before'] - 0.5) <= 0.01
  assert flops['before'] == 2 * (64 * 200 + 200 * 210)
  assert result['accuracy']['after'] > 0.75
  assert result['accuracy']['pruned'] > 0.5
  assert result['verify']['difference'] <= 1e-5
  assert result['widths']['layer0/dense:1'][0] == 200
  assert set(result['latency_ms']) == {'1', '128'}
  assert result['layers_batch'] == 128
  for layer in result['layers'].values():
    assert len(layer['ms']) == 2 and min(layer['ms']) > 0


def test_frozen_weights_rest_until_the_cut_and_are_refitted(tmp_path, monkeypatch):
  states, cuts, stage, cut = {}, [], rounds.stage, rounds.cut_round

  def recorded_stage(job, name, *args, **kwargs):
    states[name] = stage(job, name, *args, **kwargs)
    return states[name]

  def recorded_cut(model, method, state, keep, coupling, *args):
    cuts.append((state.params['layer1']['dense']['kernel'], keep))
    return cut(model, method, state, keep, coupling, *args)

  monkeypatch.setattr(rounds, 'stage', recorded_stage)
  monkeypatch.setattr(rounds, 'cut_round', recorded_cut)
  config = dataclasses.replace(
    CONFIG,
    options=GateOptions(frozen=True),
    gate_epochs=1.5,
    finetune_epochs=0,
    workdir=str(tmp_path),
  )
  result = to_json(rounds.run(config, show=False))
  assert int(states['gates'].step) == 1.5 * 512 / 32
  before, after = states['train'].params, states['gates'].params
  jax.tree.map(np.testing.assert_array_equal, before, after)
  ((refitted, keep),) = cuts
  kept = keep['channels']['layer0/dense:1']
  changed = np.any(refitted != before['layer1']['dense']['kernel'], axis=1)
  np.testing.assert_array_equal(changed, kept)
  assert abs(result['flops']['after'] / result['flops']['before'] - 0.5) <= 0.01
  assert result['accuracy']['pruned'] > 0.7
  assert rounds.NOT_REFITTED not in result['rounds'][0]['notes']


def test_a_refit_that_does_harm_on_held_out_data_is_left_out(tmp_path, monkeypatch):
  negated = lambda coupling, variables, keep, batches: jax.tree.map(
    lambda x: -x, variables
  )
  monkeypatch.setattr(rounds, 'refit', negated)
  config = dataclasses.replace(
    CONFIG,
    options=GateOptions(frozen=True),
    finetune_epochs=0,
    workdir=str(tmp_path),
  )
  result = to_json(rounds.run(config, show=False))
  assert rounds.NOT_REFITTED in result['rounds'][0]['notes']
  assert result['accuracy']['pruned'] > 0.5


@pytest.fixture(scope='module')
def tuned(tmp_path_factory):
  """The config of a run of a network with batch statistics."""
  return dataclasses.replace(
    CONFIG,
    options=GateOptions(0.8, frozen=True),
    model='resnet8',
    train_epochs=6,
    gate_epochs=0.5,
    finetune_epochs=0.5,
    workdir=str(tmp_path_factory.mktemp('tuned')),
  )


def test_the_result_has_statistics_that_were_measured_after_training(
  tuned, monkeypatch
):
  measured, recalibrate = [], rounds.recalibrate

  def recorded(*args):
    measured.append(recalibrate(*args))
    return measured[-1]

  monkeypatch.setattr(rounds, 'recalibrate', recorded)
  rounds.run(tuned, show=False)
  assert len(measured) == 2  # after the cut, and at the end
  stored = networks.load(tuned.path / 'pruned').variables['batch_stats']
  jax.tree.map(np.testing.assert_array_equal, stored, measured[-1]['batch_stats'])


@pytest.mark.parametrize('epochs', [0, 0.5])
def test_fresh_statistics_that_do_harm_are_not_the_result(
  epochs, tuned, tmp_path, monkeypatch
):
  zeros = lambda model, variables, batches: {
    **variables,
    'batch_stats': jax.tree.map(np.zeros_like, variables['batch_stats']),
  }
  monkeypatch.setattr(rounds, 'recalibrate', zeros)
  config = dataclasses.replace(tuned, finetune_epochs=epochs, workdir=str(tmp_path))
  accuracy = to_json(rounds.run(config, show=False))['accuracy']
  assert accuracy['recalibrated'] < min(accuracy['pruned'], accuracy['after'])
  assert epochs or accuracy['pruned'] == accuracy['after']


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
  pruned = networks.load(config.path / 'pruned')
  job = prepare(config, show=False)
  measured = evaluator(pruned.apply, job.task)(
    pruned.variables, job.batches(job.images.test)
  )
  assert measured['accuracy'] == pytest.approx(result['accuracy']['after'], abs=1e-6)
  kernel = pruned.variables['params']['layer0']['dense']['kernel']
  assert kernel.shape == (64, result['widths']['layer0/dense:1'][1])


def test_a_finished_run_is_not_trained_again(finished, monkeypatch):
  config, result = finished

  def train_again(*args, **kwargs):
    raise AssertionError('a step was taken')

  monkeypatch.setattr('depthprune.train.loop._one_by_one', train_again)
  again = to_json(rounds.run(config, show=False))
  assert again['accuracy'] == result['accuracy']
  assert again['widths'] == result['widths']


def test_a_directory_of_another_run_is_refused(finished):
  config, _ = finished
  with pytest.raises(CheckpointError, match='options .*seed|seed.* options'):
    rounds.run(
      dataclasses.replace(config, options=GateOptions(0.6), seed=1), show=False
    )


def test_a_command_that_was_mended_may_have_the_directory(tmp_path):
  config = dataclasses.replace(CONFIG, workdir=str(tmp_path), batch=513)
  with pytest.raises(DataError, match='batch: expected 1 to 512, .* got 513'):
    to_json(rounds.run(config, show=False))
  assert directory.read(tmp_path / 'config.json')
  prepare(dataclasses.replace(config, batch=32))


@pytest.mark.parametrize(
  ('change', 'said'),
  [
    ({'model': 'mlpp'}, "no model 'mlpp'"),
    ({'data': 'digit'}, 'digits'),
    ({'options': GateOptions(1e-4)}, 'cannot be reached'),
  ],
)
def test_wrong_input_is_found_before_any_training(change, said, tmp_path, monkeypatch):
  monkeypatch.setattr(rounds, 'stage', None)
  config = dataclasses.replace(CONFIG, workdir=str(tmp_path / 'run'), **change)
  with pytest.raises(ValueError, match=said):
    to_json(rounds.run(config, show=False))


def test_a_target_in_milliseconds_is_measured_once_and_reported(tmp_path, monkeypatch):
  """A slice of any layer is made to take a millisecond."""
  measured = lambda session: np.array([sum(n.values()) for _, n in session.rows], float)
  monkeypatch.setattr(layers.Session, 'measure', measured)
  config = dataclasses.replace(
    CONFIG, options=GateOptions(0.7, 'milliseconds', 16), workdir=str(tmp_path)
  )
  result = to_json(rounds.run(config, show=False))
  kept = sum(after for _, after in result['widths'].values())
  assert abs(kept / 400 - 0.7) <= 0.01
  here = result['latency_ms']['16']
  medians = {'before': here['before'], 'after': here['after']}
  assert result['milliseconds'] == {'batch': 16, **medians}
  gates = [r for r in lines(tmp_path / 'history.jsonl') if r['stage'] == 'gates']
  assert all(0.6 <= row['milliseconds'] <= 1 for row in gates)
  told = json.loads((tmp_path / 'costs.json').read_text())
  assert (told['batch'], told['table'][-1]['layer']) == (16, 'network')

  def again(session):
    raise AssertionError('what is known was measured again')

  monkeypatch.setattr(layers.Session, 'measure', again)
  assert to_json(rounds.run(config, show=False))['widths'] == result['widths']


def test_a_run_that_keeps_a_layer_resumes_and_tells(tmp_path, monkeypatch):
  options = GateOptions(0.6, keep=('layer0/*',))
  config = dataclasses.replace(CONFIG, options=options, workdir=str(tmp_path))
  result = to_json(rounds.run(config, show=False))
  widths = result['widths']
  assert widths['layer0/dense:1'] == [200, 200]
  assert widths['layer1/dense:1'][1] < 200
  assert abs(result['flops']['after'] / result['flops']['before'] - 0.6) <= 0.01
  assert lines(tmp_path / 'gates.jsonl')[-1]['open'].keys() == {'layer1/dense:1'}
  assert config.recipe.sentence is not None
  assert 'with layer0/* left whole' in config.recipe.sentence(from_json(result))
  stored = json.loads((tmp_path / 'config.json').read_text())
  assert from_config(stored['config']) == config
  monkeypatch.setattr('depthprune.train.loop._one_by_one', None)
  assert to_json(rounds.run(config, show=False))['widths'] == widths
  with pytest.raises(CheckpointError, match='options .*layer1'):
    rounds.run(
      dataclasses.replace(config, options=GateOptions(0.6, keep=('layer1',))),
      show=False,
    )


def start(config: Config) -> subprocess.Popen:
  code = (
    'from depthprune.run.config import Config; '
    'from depthprune.methods.trainable_gates import GateOptions; '
    'from depthprune.run import rounds; '
    f'rounds.run({config!r}, show=False)'
  )
  root = Path(__file__).parents[2]
  return subprocess.Popen([sys.executable, '-c', code], cwd=root, env=os.environ)


def arrays(config: Config) -> dict[str, np.ndarray]:
  """Everything the last stage ended with."""
  folder = sorted((config.path / 'checkpoints' / 'finetune').glob('0*'))[-1]
  return checkpoint.read(folder, 'state.json')[0]


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


def test_a_config_that_a_dying_machine_broke_is_written_anew(finished, monkeypatch):
  config, _ = finished
  file = config.path / 'config.json'
  before = json.loads(file.read_text())
  file.write_bytes(bytes(100))
  monkeypatch.setattr('depthprune.train.loop._one_by_one', None)
  with pytest.warns(UserWarning, match=r'config\.json: damaged, and not looked at'):
    to_json(rounds.run(config, show=False))
  assert json.loads(file.read_text())['config'] == before['config']


def test_distillation_is_an_option_of_a_run(finished, tmp_path):
  config = dataclasses.replace(
    finished[0], distill=True, workdir=str(tmp_path), train_epochs=1, gate_epochs=2
  )
  to_json(rounds.run(config, show=False))
  rows = lines(tmp_path / 'history.jsonl')
  assert all('distillation' in r for r in rows if r['stage'] != 'train')


def test_a_run_that_diverges_keeps_its_last_good_state(tmp_path):
  config = dataclasses.replace(CONFIG, learning_rate=1e6, workdir=str(tmp_path))
  with pytest.raises(NonFiniteLoss, match=r'train: .* at step \d+'):
    to_json(rounds.run(config, show=False))
  kept = sorted((tmp_path / 'checkpoints' / 'train').glob('0*'))
  for folder in kept:
    leaves, _ = checkpoint.read(folder, 'state.json')
    assert all(np.isfinite(x).all() for x in leaves.values())
  logged = [row['step'] for row in lines(tmp_path / 'history.jsonl')]
  assert int(kept[-1].name) == logged[-1] < 32


def test_starting_anew_forgets_the_old_run_and_nothing_else(finished, tmp_path):
  config = dataclasses.replace(CONFIG, workdir=str(tmp_path), resume=False)
  mine = tmp_path / 'checkpoints' / 'mine.txt'
  mine.parent.mkdir()
  mine.write_text('not of a run')
  prepare(config)
  assert mine.exists()
  directory.write(tmp_path / 'config.json', {'config': finished[0].to_json()})
  directory.append(tmp_path / 'history.jsonl', {'step': 1})
  (tmp_path / 'pruned').mkdir()
  prepare(dataclasses.replace(config, seed=7))
  assert not (tmp_path / 'history.jsonl').exists()
  assert not (tmp_path / 'pruned').exists()


def test_widths_suit_the_device_unless_asked_otherwise(finished):
  config, result = finished
  assert config.options.round_to == result['options']['round_to'] == 'auto'
  assert json.loads((config.path / 'rounding.json').read_text())['multiple'] == 8
  assert set(result['multiples'].values()) == {8}
  assert all(after % 8 == 0 < after < 200 for _, after in result['widths'].values())


def test_a_run_goes_on_with_the_rounding_that_it_began_with(tmp_path):
  config = dataclasses.replace(CONFIG, workdir=str(tmp_path))
  job = prepare(config, show=False)
  stored = tmp_path / 'rounding.json'
  assert rounding(job) == Suited(8) == rounding(job)
  assert json.loads(stored.read_text())['multiple'] == 8
  stored.write_text('{"multiple": 128, "device": "TPU v5e"}')
  assert rounding(job) == Suited(128)
  asked = dataclasses.replace(config, options=GateOptions(round_to=3))
  assert rounding(job._replace(config=asked)) == 3
  for wrong in ('{"multiple": 3}', '{"multiple": [8]}', '{}'):
    stored.write_text(wrong)
    with pytest.raises(CheckpointError, match=r'rounding\.json: .* delete it'):
      rounding(job)
  stored.write_bytes(bytes(10))
  with pytest.warns(UserWarning, match=r'rounding\.json: damaged'):
    assert rounding(job) == Suited(8)


def test_gates_that_start_by_loss_close_first_what_the_loss_misses_least(tmp_path):
  """Without training, the decision is that of the scores, per FLOP of a channel."""
  options = GateOptions(by_loss=True, round_to=1)
  asked = {'options': options, 'train_epochs': 0, 'gate_epochs': 0}
  config = dataclasses.replace(CONFIG, **asked, workdir=str(tmp_path))
  job = prepare(config, show=False)
  model = network(config, job.images.classes, *job.inputs)
  variables = initial_variables(job, model)
  small = rounds.shrink(job, model, variables, partial(methods.build, options))
  coupling = couple(model, variables, *job.inputs)
  batches = list(rounds._augmented_batches(job, 'scores', rounds.SCORING))
  scores = taylor(model, coupling, variables, job.task, batches)
  method = trainable_gates(coupling, scores=scores, scope='global')
  expected = method.decide(method.init({}, {}), {}, None)['channels']
  for group, kept in small.pruned.keep['channels'].items():
    np.testing.assert_array_equal(kept, expected[group])
  assert len(batches) == 16 and not expected['layer0/dense:1'].all()


def test_rounded_widths_parameters_and_bfloat16_in_one_run(tmp_path):
  config = dataclasses.replace(
    CONFIG,
    options=GateOptions(of='params', round_to=8),
    bfloat16=True,
    workdir=str(tmp_path),
  )
  result = to_json(rounds.run(config, show=False))
  assert all(after % 8 == 0 for _, after in result['widths'].values())
  params = result['params']
  assert abs(params['after'] / params['before'] - 0.5) <= 0.03
