"""Runs that start from a pruned network, a folder: its arch, arrays, normalisation."""

import dataclasses

import jax
import numpy as np
import pytest

import depthprune as dp
from depthprune import models
from depthprune.data.dataset import DataError
from depthprune.data.images import Normalisation
from depthprune.methods.auxiliary import AuxiliaryOptions
from depthprune.methods.sidenet import SideNetOptions
from depthprune.methods.trainable_gates import GateOptions
from depthprune.models.auxiliary_path import beside
from depthprune.models.heads import WithHeads, every_tap
from depthprune.run import data, rounds
from depthprune.run.config import default
from depthprune.run.job import prepare
from depthprune.run.network import initial_variables, network
from depthprune.storage.checkpoint import CheckpointError
from depthprune.train.result import to_json

NORMALISATION = Normalisation((0.25,), (0.5,), 16.0)
CONFIG = dataclasses.replace(
  default('sidenet'),
  options=SideNetOptions(hidden=8),
  model='resnet8',
  subset=64,
  batch=32,
)
EXAMPLE = np.zeros((1, 8, 8, 1), np.float32)


def cut(model, example, target=0.5):
  variables = jax.jit(model.init)(jax.random.key(0), example)
  coupling = dp.couple(model, variables, example)
  keep = dp.oneshot(coupling, variables, target)
  return dp.prune(model, variables, keep, example, coupling=coupling)


@pytest.fixture(scope='module')
def saved(tmp_path_factory):
  """(folder, what was saved there)."""
  folder = tmp_path_factory.mktemp('run') / 'pruned'
  small = cut(models.build('resnet8'), EXAMPLE)
  dp.save(folder, small, NORMALISATION)
  return folder, small


def config_of(folder, tmp_path, **fields):
  return dataclasses.replace(
    CONFIG, pretrained=str(folder), workdir=str(tmp_path), **fields
  )


def test_a_run_starts_from_the_network_of_a_folder(saved, tmp_path):
  folder, small = saved
  config = config_of(folder, tmp_path)
  job = prepare(config, show=False)
  assert job.images.normalisation == NORMALISATION
  model = network(config, job.images.classes)
  assert model == small.model and dict(model.arch) == small.arch != {}
  variables = initial_variables(job, model)
  gates = jax.tree.leaves(variables.pop('branches'))
  assert gates and all(gate == 1 for gate in gates)
  assert variables.keys() == small.variables.keys()
  jax.tree.map(np.testing.assert_array_equal, variables, small.variables)


def test_a_method_that_weighs_exits_puts_its_own_on_that_network(saved, tmp_path):
  folder, small = saved
  config = dataclasses.replace(
    default('netcut'), model='resnet8', pretrained=str(folder), workdir=str(tmp_path)
  )
  job = prepare(dataclasses.replace(config, subset=64), show=False)
  model = network(config, 10)
  trunk = initial_variables(job, model)['params']['trunk']
  expected = {k: v for k, v in small.variables['params'].items() if k != 'head'}
  assert trunk.keys() == expected.keys()
  jax.tree.map(np.testing.assert_array_equal, trunk, expected)


def test_the_heads_of_an_attention_are_no_exits(tmp_path):
  small = cut(models.build('decoder_tiny'), np.zeros((1, 8), np.int32), '60%')
  dp.save(tmp_path / 'pruned', small)
  config = dataclasses.replace(
    default('gates'), model='decoder_tiny', pretrained=str(tmp_path / 'pruned')
  )
  assert network(config, classes=64) == small.model


def test_a_network_without_normalisation_has_that_of_the_data(tmp_path):
  dp.save(tmp_path / 'pruned', cut(models.build('mlp'), EXAMPLE))
  config = config_of(tmp_path / 'pruned', tmp_path, model='mlp')
  assert data.normalisation(str(tmp_path / 'pruned')) is None
  plain = dataclasses.replace(config, pretrained=None)
  found, expected = (data.read(c).normalisation for c in (config, plain))
  assert found == expected


def test_another_model_is_refused_before_the_data_is_read(saved, tmp_path):
  config = config_of(saved[0], tmp_path, model='resnet14')
  with pytest.raises(CheckpointError, match='depth 14, got one with depth 8: pass the'):
    network(config, classes=1)
  config = config_of(saved[0], tmp_path, model='mlp')
  with pytest.raises(CheckpointError, match=r'mlp\.MLP.*got one with.*resnet\.ResNet'):
    network(config, classes=1)


def test_another_number_of_classes_is_refused(saved, tmp_path):
  config = config_of(saved[0], tmp_path)
  job = prepare(config, show=False)
  with pytest.raises(CheckpointError, match='network of 7 classes.*got one of 10'):
    initial_variables(job, network(config, classes=7))


def test_a_function_of_someone_else_is_refused(tmp_path):
  def foreign(variables, x):
    return x.reshape(len(x), -1) @ variables['a'] @ variables['b']

  arrays = {'a': np.ones((64, 8), np.float32), 'b': np.ones((8, 10), np.float32)}
  coupling = dp.couple(foreign, arrays, EXAMPLE)
  keep = dp.oneshot(coupling, arrays, 0.5)
  dp.save(tmp_path / 'pruned', dp.prune(foreign, arrays, keep, EXAMPLE))
  with pytest.raises(CheckpointError, match='got one with.*foreign'):
    network(config_of(tmp_path / 'pruned', tmp_path), classes=10)


def test_a_folder_without_a_network_is_refused(tmp_path):
  for call in (network, lambda config, classes: data.read(config)):
    with pytest.raises(CheckpointError, match=r'no file arch\.json'):
      call(config_of(tmp_path, tmp_path), 10)


def test_a_network_that_lost_its_path_is_the_compact_one(tmp_path):
  trunk = models.build('resnet8')
  wide = WithHeads(trunk, {'aux': beside(trunk.taps, width=4)})
  variables = jax.jit(wide.init)(jax.random.key(0), EXAMPLE)
  whole = dp.prune(wide, variables, {'exits': {'main': True}}, EXAMPLE)
  bare = dp.prune(wide, variables, {'exits': {'main': True, 'aux': False}}, EXAMPLE)
  dp.save(tmp_path / 'whole', whole, NORMALISATION)
  dp.save(tmp_path / 'bare', bare, NORMALISATION)
  config = dataclasses.replace(CONFIG, pretrained=str(tmp_path / 'bare'))
  model = network(config, 10)
  assert model == trunk
  found = initial_variables(prepare(config, show=False), model)
  same = jax.tree.map(np.array_equal, found['params'], variables['params']['trunk'])
  assert jax.tree.all(same)
  with pytest.raises(
    CheckpointError, match='sidenet can put exits on, got one that has main, aux'
  ):
    network(dataclasses.replace(config, pretrained=str(tmp_path / 'whole')), 10)


@pytest.mark.slow
def test_a_network_of_several_tasks_loses_its_path_and_goes_on(tmp_path, tfds_data):
  """Trained beside a path for both tasks, then pruned with trainable gates."""
  fields = {'data': 'multi_fashion', 'model': 'resnet8', 'resize': 12, 'subset': 64}
  fields |= {'gate_epochs': 1, 'finetune_epochs': 0, 'batch': 32}
  config = dataclasses.replace(
    default('auxiliary'),
    options=AuxiliaryOptions('search', width=4),
    workdir=str(tmp_path / 'wide'),
    **fields,
  )
  result = to_json(rounds.run(config, show=False))
  assert {'accuracy_left', 'accuracy_right'} <= {*result['scores']['after']}
  folder = tmp_path / 'wide' / 'pruned'
  stripped = dp.load(folder)
  config = dataclasses.replace(
    default('trainable_gates'),
    pretrained=str(folder),
    options=GateOptions(target=0.8),
    workdir=str(tmp_path / 'thin'),
    train_epochs=0,
    **fields,
  )
  job = prepare(config, show=False)
  model = network(config, 10)
  assert {*model.exits} == {'left', 'right'}
  variables = initial_variables(job, model)
  same = jax.tree.map(np.array_equal, variables['params'], stripped.variables['params'])
  assert jax.tree.all(same)
  result = to_json(rounds.run(config, show=False))
  assert result['flops']['after'] < 0.82 * result['flops']['before']
  netcut = dataclasses.replace(default('netcut'), data='multi_fashion')
  with pytest.raises(DataError, match='several tasks .left, right.: expected the meth'):
    network(netcut, 10)


def test_a_model_of_another_kind_than_the_labels(tmp_path):
  config = dataclasses.replace(
    default('auxiliary'), model='segnet8', subset=64, workdir=str(tmp_path)
  )
  with pytest.raises(DataError, match='a class of every image.*segnet8 answers'):
    to_json(rounds.run(config, show=False))


def test_a_network_that_was_cut_trains_beside_a_path(tmp_path):
  """NetCut's network, with the one exit it has left, and then its channels."""
  fields = {'model': 'resnet8', 'batch': 32, 'subset': 64, 'finetune_epochs': 0}
  trunk = models.build('resnet8')
  heads = every_tap(trunk)
  variables = jax.jit(heads.init)(jax.random.key(0), EXAMPLE)
  keep = {'exits': {name: name == 'exit2' for name in heads.exits}}
  cut_at = dp.prune(heads, variables, keep, EXAMPLE)
  dp.save(tmp_path / 'cut', cut_at, NORMALISATION)
  wide = dataclasses.replace(
    default('auxiliary'),
    options=AuxiliaryOptions(width=4),
    pretrained=str(tmp_path / 'cut'),
    workdir=str(tmp_path / 'wide'),
    gate_epochs=1,
    **fields,
  )
  model = network(wide, 10)
  assert model.exits == ('exit2', 'aux')
  assert model.heads['aux'].reads == ('stage1/block0', 'stage2/block0')
  variables = initial_variables(prepare(wide, show=False), model)
  given = cut_at.variables['params']
  same = jax.tree.map(np.array_equal, {k: variables['params'][k] for k in given}, given)
  assert jax.tree.all(same)
  result = to_json(rounds.run(wide, show=False))
  assert result['params']['after'] == dp.cost.params(
    dp.couple(cut_at.apply, cut_at.variables, EXAMPLE)
  )
  thin = dataclasses.replace(
    default('trainable_gates'),
    options=GateOptions(target=0.7),
    pretrained=str(tmp_path / 'wide' / 'pruned'),
    workdir=str(tmp_path / 'thin'),
    train_epochs=0,
    gate_epochs=1,
    **fields,
  )
  found = to_json(rounds.run(thin, show=False))
  assert found['flops']['after'] < 0.72 * found['flops']['before']
  for method in ('netcut', 'sidenet'):
    again = dataclasses.replace(
      default(method), model='resnet8', pretrained=str(tmp_path / 'cut')
    )
    with pytest.raises(
      CheckpointError, match='can put exits on, got one that has exit2'
    ):
      network(again, 10)
