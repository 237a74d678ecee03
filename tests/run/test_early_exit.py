"""Whole runs of sidenet: a frozen network in, a cascade out; resumed; loaded again."""

import dataclasses
import json

import jax
import numpy as np
import optax
import pytest

from depthprune.data.features import FeatureSet
from depthprune.exports.networks import load_cascade
from depthprune.methods.sidenet import SideNetOptions
from depthprune.run import early_exit, heads, rounds
from depthprune.run.config import default, from_json
from depthprune.run.early_exit import ALSO, choose_held_out
from depthprune.run.job import prepare
from depthprune.storage.checkpoint import CheckpointError
from depthprune.train.result import to_json
from depthprune.train.step import init_state, make_step
from depthprune.train.task import classification

SMALL = dataclasses.replace(
  default('sidenet'),
  options=SideNetOptions(hidden=16, drop=3.0),
  model='mlp',
  subset=256,
  batch=64,
  train_epochs=2,
  gate_epochs=4,
  finetune_epochs=1,
  checkpoint_every_s=0.0,
)


@pytest.fixture(scope='module', autouse=True)
def adam():
  with jax.numpy_dtype_promotion('standard'):  # as a user has it; optax.adam needs it
    yield


@pytest.fixture(scope='module')
def ran(tmp_path_factory):
  """(config, result, network with heads as trained)."""
  kept = []
  with pytest.MonkeyPatch.context() as patch:

    def train(job):
      kept.append(heads.train(job))
      return kept[-1]

    patch.setattr(early_exit, 'train', train)
    config = dataclasses.replace(SMALL, workdir=str(tmp_path_factory.mktemp('sidenet')))
    return config, to_json(rounds.run(config, show=False)), kept[0]


def test_the_result_says_what_was_asked_and_what_was_reached(ran):
  config, result, trained = ran
  found = result['cascade']
  assert found['exits'] == ['exit1', 'main'] == list(trained.exits)
  assert found['taps'] == {'exit1': 'layer0'}
  assert result['flops']['before'] == found['whole'] < found['cost']['main']
  assert sum(found['shares'].values()) == pytest.approx(1)
  asked = {(r['kind'], r['requested']) for r in found['requests']}
  assert asked == {('drop', 3.0), *((k, v) for k, vs in ALSO.items() for v in vs)}
  (chosen,) = [r for r in found['requests'] if r['chosen']]
  assert chosen['requested'] == 3.0
  before = result['held_out']['before']
  assert chosen['held_out']['accuracy'] >= before - 0.03 - 1e-9
  for entry in found['requests']:
    assert (entry['test'] is None) == (entry['refused'] is not None)
  costs = [point['cost_held_out'] for point in found['curve']]
  assert costs == sorted(costs, reverse=True) and costs[0] == found['cost']['main']
  assert json.loads((config.path / 'result.json').read_text()) == json.loads(
    json.dumps(result)
  )


def test_what_is_executed_is_what_was_simulated(ran):
  _, result, _ = ran
  executed = result['cascade']['executed']
  assert executed['n'] == result['images']['test'] and executed['differ'] == 0
  assert executed['ideal'] <= executed['padded'] and executed['ms'] > 0
  chosen = next(r for r in result['cascade']['requests'] if r['chosen'])
  assert result['accuracy']['after'] == pytest.approx(chosen['test']['accuracy'])
  assert executed['ideal'] <= chosen['test']['cost'] * (1 + 1e-6)


def test_the_network_is_frozen_to_the_bit(ran):
  config, _, trained = ran
  job = prepare(dataclasses.replace(config, workdir=f'{config.path}/plain'), show=False)
  # The same first stage again, without any heads.
  from depthprune.run.job import stage
  from depthprune.run.network import initial_variables, network
  from depthprune.train.method import plain

  trunk = network(config, 10)
  state = stage(
    job,
    'train',
    trunk,
    plain(),
    initial_variables(job, trunk),
    epochs=2,
    peak=config.learning_rate,
  )
  for name, tree in state.variables.items():
    inside = trained.variables[name]['trunk']
    jax.tree.map(np.testing.assert_array_equal, tree, inside)


def test_a_saved_cascade_needs_nothing_but_its_folder(ran):
  config, result, trained = ran
  found = load_cascade(config.path / 'cascade')
  job = choose_held_out(prepare(config, show=False))
  batch = next(job.batches(job.images.test))
  answer = found(batch['image'])
  assert answer.logits.shape == (64, 10)
  whole = trained.model.apply(trained.variables, batch['image'])
  said = np.stack([np.asarray(whole[name]) for name in found.exits])
  at_exit = said[np.asarray(answer.exit), np.arange(64)]
  np.testing.assert_allclose(np.asarray(answer.logits), at_exit, atol=1e-5)
  decided = json.loads((config.path / 'cascade' / 'cascade.json').read_text())
  assert list(found.exits) == decided['exits'] and found.steps == 8
  assert list(found.stages.flops) == decided['flops']
  taken = {e for e, share in result['cascade']['shares'].items() if share > 0}
  assert taken <= {*found.exits}


def test_a_run_that_is_started_again_goes_on_to_the_same_end(ran):
  config, result, _ = ran
  again = to_json(rounds.run(config, show=False))
  for key in ('accuracy', 'held_out', 'flops', 'params'):
    assert again[key] == result[key]
  for key in ('thresholds', 'temperatures', 'curve', 'requests'):
    assert again['cascade'][key] == result['cascade'][key]
  with pytest.raises(CheckpointError, match='options'):
    options = dataclasses.replace(config.options, hidden=8)
    to_json(rounds.run(dataclasses.replace(config, options=options), show=False))


def test_mixed_trains_the_network_too(ran, tmp_path):
  config, _, frozen = ran
  options = dataclasses.replace(config.options, regime='mixed', confidence='learned')
  mixed = dataclasses.replace(config, options=options, workdir=str(tmp_path))
  result = to_json(rounds.run(mixed, show=False))
  assert result['cascade']['confidence'] == 'learned'
  found = load_cascade(tmp_path / 'cascade')
  kernel = lambda tree: np.asarray(tree['params']['trunk']['layer0']['dense']['kernel'])
  assert (kernel(found.variables) != kernel(frozen.variables)).any()


def test_dropout_and_smoothing_reach_the_heads(ran, monkeypatch):
  config, _, trained = ran
  seen = {}

  def stage(job, name, model, method, variables, **kwargs):
    seen.update(model=model, method=method, task=job.task)
    raise StopIteration

  monkeypatch.setattr(heads, 'stage', stage)
  options = dataclasses.replace(config.options, dropout=0.9, smoothing=0.5)
  job = prepare(config, show=False)
  job = job._replace(config=dataclasses.replace(config, options=options))
  model = heads.with_sides(heads.cascade_plan(job.config), trained.model.trunk, job)
  drawn = np.random.default_rng(0).normal(size=(8, 200)).astype(np.float32)
  batch: dict = {'features': {'exit1': drawn}}
  batch |= {'label': np.arange(8, dtype=np.int32)}
  batch['features']['main'] = np.ones((8, 10), np.float32)
  features = FeatureSet('x', batch, batch, batch, 10)
  with pytest.raises(StopIteration):
    heads.fit_heads(job, model, trained.variables, features)
  tx = optax.sgd(0.0)
  mine = {
    name: {k: v for k, v in tree.items() if k != 'trunk'}
    for name, tree in trained.variables.items()
  }
  state = init_state(seen['model'], seen['method'], tx, mine, batch=batch)
  step = make_step(seen['model'], seen['method'], seen['task'], tx)
  losses = []
  for _ in range(3):
    state, metrics = step(state, batch, jax.random.key(0))
    losses.append(float(metrics['loss']))
  assert len({*losses}) > 1  # nothing is learnt at rate 0: only dropout moves it
  logits = np.eye(10, dtype=np.float32)[:8] * 9
  sharp = classification(10).loss(logits, batch)
  assert seen['task'].loss(logits, batch) > sharp + 1


@pytest.mark.slow
def test_heads_that_read_earlier_answers_run_as_simulated(tmp_path):
  options = SideNetOptions(hidden=16, drop=30.0, sees_earlier=True, views=1)
  config = dataclasses.replace(
    SMALL, options=options, model='resnet8', train_epochs=1, workdir=str(tmp_path)
  )
  found = to_json(rounds.run(config, show=False))['cascade']
  assert found['exits'] == ['exit1', 'exit2', 'main']
  assert found['executed']['differ'] == 0
  stored = json.loads((tmp_path / 'cascade/network/arch.json').read_text())
  assert stored['model']['fields']['heads']['exit2']['fields']['after'] == 'exit1'


def test_heads_have_statistics_of_their_own_features(ran):
  _, _, trained = ran
  stats = trained.variables['batch_stats']['head_exit1']['norm']
  assert np.abs(stats['mean']).max() > 0.01


def test_runs_of_an_earlier_version_have_heads_without_normalisation():
  values = SMALL.to_json()
  for name in ('normalise', 'sees_earlier', 'taught', 'heads'):
    del values['options'][name]
  assert from_json(values).options.normalise is False
  assert SMALL.options.normalise is True


def test_another_request_goes_on_from_the_same_heads(ran):
  config, result, _ = ran
  options = dataclasses.replace(config.options, drop=50.0, confidence='patience')
  again = to_json(rounds.run(dataclasses.replace(config, options=options), show=False))
  assert again['cascade']['confidence'] == 'patience'
  assert again['cascade']['exit_accuracy'] == result['cascade']['exit_accuracy']
  decided = json.loads((config.path / 'cascade' / 'cascade.json').read_text())
  assert decided['exits'] == ['exit1', 'main']  # all are asked


def test_which_images_decide(ran):
  config, _, _ = ran
  job = prepare(config, show=False)
  assert (
    choose_held_out(job).images.test is job.images.test
  )  # trained here: held out of training
  for options in (SideNetOptions(decide_on='test'), SideNetOptions()):
    mine = dataclasses.replace(
      config,
      options=options,
      pretrained='weights.npz' if options.decide_on == 'auto' else None,
      train_epochs=None if options.decide_on == 'auto' else 2,
    )
    images = choose_held_out(job._replace(config=mine)).images
    half = len(job.images.test['label']) // 2
    test = job.images.test['label']
    assert images.held_out['label'].tolist() == test[:half].tolist()
    assert images.test['label'].tolist() == test[half:].tolist()


@pytest.mark.parametrize(
  ('options', 'message'),
  [
    (SideNetOptions(taps=('layer9',)), r"no tap 'layer9'.*All: layer0, layer1"),
    (SideNetOptions(budget=0.01), 'below the floor: exit exit1'),
    (SideNetOptions(risk=0.0001), 'reached by no thresholds'),
  ],
)
def test_requests_that_cannot_be_met(ran, options, message, tmp_path):
  config, _, trained = ran
  if options.taps:
    with pytest.raises(ValueError, match=message):
      rounds.run(
        dataclasses.replace(config, options=options, workdir=str(tmp_path)), show=False
      )
    return
  from depthprune.run.early_exit import decide

  job = choose_held_out(prepare(config, show=False))
  job = job._replace(config=dataclasses.replace(config, options=options))
  with pytest.raises(ValueError, match=message):
    decide(job, trained)
