"""What a cascade may be asked for, and runs that only sidenet has: joint, texts."""

import dataclasses

import jax
import numpy as np
import pytest

from depthprune import models
from depthprune.cascades.risk import halves
from depthprune.exports.networks import load_cascade
from depthprune.methods.sidenet import SideNetOptions
from depthprune.run import early_exit, heads, rounds
from depthprune.run.config import ConfigError, default
from depthprune.run.early_exit import choose_held_out, decide
from depthprune.run.job import prepare
from depthprune.train.result import to_json

SMALL = dataclasses.replace(
  default('sidenet'),
  options=SideNetOptions(('layer0', 'layer1'), hidden=32, drop=3.0),
  model='mlp',
  subset=256,
  batch=64,
  train_epochs=2,
  gate_epochs=4,
  finetune_epochs=1,
)


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
  """(job, its network with heads as trained)."""
  config = dataclasses.replace(SMALL, workdir=str(tmp_path_factory.mktemp('requests')))
  job = choose_held_out(prepare(config, show=False))
  with jax.numpy_dtype_promotion('standard'):
    return job, heads.train(job)


def decided(trained, **changes):
  """What held-out data decides where the options differ so."""
  job, network = trained
  options = dataclasses.replace(job.config.options, **changes)
  job = job._replace(config=dataclasses.replace(job.config, options=options))
  return decide(job, network)


def mine(found):
  """The request that was asked for, as the result has it."""
  return next(row for row in early_exit.requests(found, 1.25) if row['chosen'])


def test_a_threshold_is_taken_as_it_is_given(trained):
  found = decided(trained, threshold=0.75)
  assert found.chosen.thresholds.tolist() == [0.75, 0.75]
  row = mine(found)
  assert (row['kind'], row['requested'], row['refused']) == ('threshold', 0.75, None)
  # 0 lets everybody go at the first exit, who is surer than that.
  assert decided(trained, threshold=0.0).chosen.held_out.exits[0] == 1.0


def test_milliseconds_are_measured_and_kept_to(trained, monkeypatch):
  clock = np.array([1.0, 2.0, 4.0]), 3.5
  seen = []
  monkeypatch.setattr(
    early_exit, 'exit_milliseconds', lambda *given: seen.append(given) or clock
  )
  found = decided(trained, milliseconds=2.5)
  early, *inputs = seen[0]
  assert early.exits == ('exit1', 'exit2', 'main') and inputs[0].shape == (64, 8, 8, 1)
  assert found.chosen.held_out.cost <= 2.5
  row = mine(found)
  shares = np.array(early_exit.thresholds.achieved(found.chosen, found.test).exits)
  assert row['test']['milliseconds'] == 1.25  # as executed
  # Besides, it is told in FLOPs, as everything else.
  assert row['test']['cost'] == pytest.approx(shares @ found.test.cost)
  assert row['held_out']['cost'] != found.chosen.held_out.cost
  with pytest.raises(ValueError, match='budget 0.5 is below the floor'):
    decided(trained, milliseconds=0.5)


def test_what_was_asked_for_is_certified_as_it_was_asked(trained):
  row = mine(decided(trained, risk=0.2, delta=0.4))
  assert row['test']['certificate']['delta'] == 0.4


@pytest.mark.parametrize(
  ('options', 'message'),
  [
    ({'budget': 0.5, 'threshold': 0.9}, 'budget, threshold: expected one of them'),
    ({'milliseconds': 1.0, 'risk': 0.1}, 'milliseconds, risk: expected one'),
    ({'milliseconds': 0.0}, 'milliseconds'),
    ({'threshold': float('nan')}, 'threshold'),
  ],
)
def test_requests_that_make_no_sense(options, message):
  with pytest.raises(ConfigError, match=message):
    SideNetOptions(**options)


@pytest.mark.parametrize('confidence', ['probability', 'learned'])
def test_an_answer_that_is_no_number_stays_and_is_told(trained, confidence):
  job, network = trained
  logits = {name: getattr(network, name).logits.copy() for name in ('held_out', 'test')}
  for values in logits.values():
    values[0, :7] = np.nan
  broken = network._replace(
    **{name: getattr(network, name)._replace(logits=v) for name, v in logits.items()}
  )
  found = decided((job, broken), threshold=0.0, confidence=confidence)
  assert np.isfinite(found.temperatures).all()
  behaviour = early_exit.behaviour(found, 1.0)
  calibrated = behaviour['calibration']['exit1']
  n = len(network.test.labels)
  assert calibrated['all']['n'] == calibrated['exited']['n'] == n - 7
  assert behaviour['shares']['exit1'] == pytest.approx((n - 7) / n)
  # An exit that has no answer at all is never left at.
  broken.held_out.logits[0] = np.nan
  found = decided((job, broken), threshold=0.0, confidence=confidence)
  assert found.chosen.held_out.exits[0] == 0


def test_joint_trains_everything_at_once(tmp_path):
  options = dataclasses.replace(SMALL.options, regime='joint')
  config = dataclasses.replace(SMALL, options=options, workdir=str(tmp_path))
  result = to_json(rounds.run(config, show=False))
  # Nothing was trained before, so there is nothing to compare with.
  assert result['cascade']['original'] == {}
  assert [path.name for path in (tmp_path / 'checkpoints').iterdir()] == ['joint']
  assert min(result['cascade']['exit_accuracy'].values()) > 0.2
  assert load_cascade(tmp_path / 'cascade').exits[-1] == 'main'


def test_what_the_network_was_before_is_kept(trained, tmp_path):
  job, frozen = trained
  says = {'held_out': frozen.held_out.accuracy, 'test': frozen.test.accuracy}
  assert frozen.original == says
  variables = frozen.variables.items()
  trunk = {name: tree['trunk'] for name, tree in variables if 'trunk' in tree}
  measure = job.scores(frozen.model.trunk)
  splits = {'held_out': job.images.held_out, 'test': job.images.test}
  alone = {name: measure(trunk, split)['accuracy'] for name, split in splits.items()}
  assert alone == pytest.approx(says)


# ---- who decides what ----------------------------------------------------------------


def scrambled(answers, rows):
  """Answers whose labels are others in those rows."""
  labels = answers.labels.copy()
  labels[rows] = (labels[rows] + 1) % 10
  return answers._replace(labels=labels)


def test_temperatures_are_of_the_half_that_certifies_nothing(trained):
  job, network = trained
  searched, certifies = halves(len(network.held_out.labels))
  found = decided(trained).temperatures
  other = network._replace(held_out=scrambled(network.held_out, certifies))
  assert decided((job, other)).temperatures.tolist() == found.tolist()
  other = network._replace(held_out=scrambled(network.held_out, searched))
  assert decided((job, other)).temperatures.tolist() != found.tolist()


def test_test_data_chooses_nothing(trained):
  job, network = trained
  every = np.arange(len(network.test.labels))
  other = network._replace(test=scrambled(network.test, every))
  a, b = decided(trained), decided((job, other))
  assert a.chosen.thresholds.tolist() == b.chosen.thresholds.tolist()
  lines = [early_exit.curve(found) for found in (a, b)]
  costs = [[(p['cost_held_out'], p['cost']) for p in line] for line in lines]
  assert costs[0] == costs[1] and len(costs[0]) > 1
  assert [p['accuracy'] for p in lines[0]] != [p['accuracy'] for p in lines[1]]


# ---- how heads are trained -----------------------------------------------------------


def test_heads_see_the_data_as_it_is_and_augmented(trained):
  job, network = trained
  features = heads.feature_set(job, network.model, network.variables)
  assert len(features.train['label']) == 2 * 256  # views
  first, second = features.train['features']['exit1'][: 2 * 256].reshape(2, 256, -1)
  assert np.abs(first - second).max() > 0.1
  rows = features.train['label'][:256]
  assert rows.tolist() == np.asarray(job.images.train['label']).tolist()


def test_heads_are_spread_over_the_depth():
  numbers = lambda count: [int(27 * part) for part in heads.spread(count)]
  assert numbers(5) == [6, 9, 13, 18, 22]  # as before there was a number of them
  assert numbers(8) == [6, 7, 9, 12, 14, 17, 19, 22]
  assert numbers(1) == [6]


def test_positions_are_pooled_to_what_heads_can_use(trained):
  job, network = trained
  assert heads.pool_of(network.model.trunk, job) == 'avg'
  assert heads.pool_of(models.build('resnet8', classes=10), job) == 'grid4'


def test_what_is_trained_already_moves_slowly(trained, monkeypatch):
  job, network = trained
  seen = {}

  def stage(job, name, *given, epochs, peak, **rest):
    seen[name] = epochs, peak
    raise StopIteration

  monkeypatch.setattr(heads, 'stage', stage)
  for name, rate in (('mixed', 0.1), ('joint', 1.0)):
    with pytest.raises(StopIteration):
      heads.together(job, name, network.model, network.variables, 3, {})
    assert seen[name] == (3, pytest.approx(rate * job.config.learning_rate))
