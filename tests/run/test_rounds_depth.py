"""Whole runs of the depth methods: cut at a head, erased unit by unit, resumed."""

import dataclasses
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from depthprune import methods
from depthprune.exports import networks
from depthprune.methods.auxiliary import AuxiliaryOptions
from depthprune.methods.implosion import ImplosionOptions
from depthprune.methods.netcut import NetCutOptions, netcut
from depthprune.methods.trainable_gates import GateOptions
from depthprune.models.heads import every_tap
from depthprune.models.mlp import MLP
from depthprune.program.coupling import couple
from depthprune.report.page import write
from depthprune.run import rounds
from depthprune.run.config import Config, default
from depthprune.run.interrupts import Preempted
from depthprune.run.job import remembering
from depthprune.storage import checkpoint, directory
from depthprune.storage.checkpoint import CheckpointError
from depthprune.storage.keeper import Keeper
from depthprune.train.method import CutRefused, plain
from depthprune.train.result import to_json
from depthprune.train.step import init_state

ROOT = Path(__file__).parents[2]
SMALL = {'subset': 512, 'batch': 32, 'checkpoint_every_s': 0.0}
NETCUT = dataclasses.replace(
  default('netcut'),
  # A price that only the first layer is worth.
  options=NetCutOptions(beta=1.0, importance_learning_rate=0.05),
  model='mlp',
  gate_epochs=6,
  **SMALL,
)
IMPLOSION = dataclasses.replace(
  default('implosion'),
  options=ImplosionOptions(depth=4),
  model='resnet14',
  gate_epochs=2,
  finetune_epochs=1,
  **{**SMALL, 'subset': 128},
)


def lines(path: Path) -> list[dict]:
  return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope='module', autouse=True)
def adam():
  with jax.numpy_dtype_promotion('standard'):  # as a user has it; optax.adam needs it
    yield


@pytest.fixture(scope='module')
def cut(tmp_path_factory) -> tuple[Config, dict]:
  config = dataclasses.replace(NETCUT, workdir=str(tmp_path_factory.mktemp('netcut')))
  return config, to_json(rounds.run(config, show=False))


def test_netcut_ends_with_a_shorter_network(cut):
  config, result = cut
  (found,) = result['rounds']
  assert found['exits'] == ['exit1'] and found['learned']['max_importance'] > 0.9
  assert result['params'] == {
    'before': 64 * 200 + 200 + 200 * 200 + 200 + 2 * 2010,
    'after': 64 * 200 + 200 + 2010,
  }
  assert result['flops']['after'] == 2 * (64 * 200 + 2000)
  accuracy = result['accuracy']
  assert accuracy['pruned'] == accuracy['after'] > 0.8
  assert abs(accuracy['before'] - accuracy['after']) < 0.02
  assert set(result['compile_s']) == {'before', 'after'}
  gates = lines(config.path / 'gates.jsonl')
  assert gates[-1]['importance'].keys() == {'exit1', 'exit2'}
  assert gates[-1]['importance'] == found['learned']['importance']


def test_the_cut_network_is_saved_and_loads_as_a_module(cut):
  config, _ = cut
  pruned = networks.load(config.path / 'pruned')
  assert pruned.model.exits == ('exit1',)
  assert set(pruned.variables['params']) == {'trunk', 'head_exit1'}
  assert set(pruned.variables['params']['trunk']) == {'layer0'}
  x = jnp.ones((3, 8, 8, 1))
  np.testing.assert_array_equal(
    pruned.apply(pruned.variables, x)['exit1'],
    pruned.model.apply(pruned.variables, x)['exit1'],
  )


def test_a_cut_that_costs_too_much_is_refused_until_forced(tmp_path, monkeypatch):
  config = dataclasses.replace(
    NETCUT,
    options=NetCutOptions(beta=0.0, gamma=1.0, tolerance=0.0),
    gate_epochs=1,
    workdir=str(tmp_path),
  )
  with pytest.raises(CutRefused, match=r'held-out accuracy falls from .*--force'):
    to_json(rounds.run(config, show=False))
  assert not (tmp_path / 'result.json').exists()
  # The same command with --force goes on from there, without training again.
  monkeypatch.setattr('depthprune.train.loop._one_by_one', None)
  forced = dataclasses.replace(config.options, force=True)
  result = to_json(rounds.run(dataclasses.replace(config, options=forced), show=False))
  assert result['held_out']['pruned'] < result['held_out']['before']


def test_what_was_trained_with_heads_teaches_what_is_left(tmp_path):
  config = dataclasses.replace(
    NETCUT, distill=True, gate_epochs=2, finetune_epochs=1, workdir=str(tmp_path)
  )
  config = dataclasses.replace(config, options=NetCutOptions(force=True))
  to_json(rounds.run(config, show=False))
  rows = lines(tmp_path / 'history.jsonl')
  assert {r['stage']: 'distillation' in r for r in rows} == {
    'gates': False,
    'finetune': True,
  }


def test_milliseconds_are_measured_once_per_run(tmp_path, monkeypatch):
  config = dataclasses.replace(
    NETCUT, options=NetCutOptions(cost='milliseconds'), workdir=str(tmp_path)
  )
  model = rounds.network(config, 10)
  x = jnp.ones((1, 8, 8, 1))
  coupling = couple(model, model.init(jax.random.key(0), x), x)
  first = methods.build(
    config.options, coupling, 0, remember=remembering(config.path / 'costs.json')
  )
  monkeypatch.setattr('depthprune.methods.netcut._milliseconds', None)
  again = methods.build(
    config.options, coupling, 0, remember=remembering(config.path / 'costs.json')
  )
  theta = {'importance': jnp.zeros(2)}
  assert first.report(theta)['cost'] == again.report(theta)['cost']


def test_a_network_without_taps_has_no_depth_to_find(tmp_path):
  config = dataclasses.replace(
    NETCUT, model='resnet8', scan=True, workdir=str(tmp_path)
  )
  assert len(rounds.network(config, 10).exits) == 3
  with pytest.raises(ValueError, match=r'tap'):
    every_tap(MLP(hidden=()))


def killed_and_resumed(config: Config, when) -> None:
  code = (
    'from depthprune.run.config import Config; '
    'from depthprune.methods.netcut import NetCutOptions; '
    f'from depthprune.run import rounds; rounds.run({config!r}, show=False)'
  )
  start = lambda: subprocess.Popen([sys.executable, '-c', code], cwd=ROOT)
  process = start()
  while not when():
    assert process.poll() is None, 'the run ended before it could be killed'
    time.sleep(0.01)
  process.send_signal(signal.SIGKILL)
  assert process.wait() == -signal.SIGKILL
  assert not (config.path / 'result.json').exists()
  assert start().wait() == 0


def same_end(one: Path, other: Path, stage: str) -> dict:
  states = []
  for path in (one, other):
    newest = sorted((path / 'checkpoints' / stage).glob('0*'))[-1]
    states.append(checkpoint.read(newest, 'state.json')[0])
  assert states[0].keys() == states[1].keys()
  for leaf, value in states[0].items():
    np.testing.assert_array_equal(states[1][leaf], value, err_msg=leaf)
  return states[0]


def test_importance_survives_a_kill_to_the_bit(cut, tmp_path):
  config = dataclasses.replace(cut[0], workdir=str(tmp_path))
  log = tmp_path / 'gates.jsonl'
  killed_and_resumed(
    config, lambda: log.exists() and len(log.read_text().splitlines()) > 20
  )
  state = same_end(cut[0].path, tmp_path, 'gates')
  assert (state['theta/importance'] != 0).all()
  assert any('mu' in leaf and 'importance' in leaf for leaf in state)


def test_a_state_without_importance_is_never_gone_on_from(tmp_path):
  model = every_tap(MLP(hidden=(4, 4), classes=3))
  x = jnp.ones((2, 5))
  variables = model.init(jax.random.key(0), x)
  batch = {'image': x, 'label': jnp.zeros(2, jnp.int32)}
  method = netcut(couple(model, variables, x))
  start = lambda method: init_state(
    model, method, optax.adam(1e-3), variables, batch=batch
  )
  keeper = Keeper(tmp_path, config={})
  keeper.save(1, start(plain()))
  with pytest.raises(CheckpointError, match='theta/importance'):
    keeper.restore_latest(start(method))


@pytest.fixture(scope='module')
def imploded(tmp_path_factory) -> tuple[Config, dict]:
  config = dataclasses.replace(
    IMPLOSION, workdir=str(tmp_path_factory.mktemp('erased'))
  )
  return config, to_json(rounds.run(config, show=False))


def test_implosion_erases_the_smallest_priority_of_each_round(imploded):
  config, result = imploded
  assert [r['units'] for r in result['rounds']] == [[6, 5], [5, 4]]
  for found in result['rounds']:
    priority = found['learned']['priority']
    assert found['erased'] == [min(priority, key=lambda unit: priority[unit])]
    assert set(found['held_out']) == {'before', 'pruned', 'recalibrated', 'after'}
  first, second = result['rounds']
  gone = set(first['erased'] + second['erased'])
  assert gone.isdisjoint({'stage2/block0', 'stage3/block0'})
  assert second['learned']['priority'].keys() == (
    first['learned']['priority'].keys() - set(first['erased'])
  )
  # Retrained between: the accuracy behind the first round is that before the second.
  assert first['held_out']['after'] == second['held_out']['before']
  assert result['flops']['after'] < result['flops']['before']
  arch = networks.load(config.path / 'pruned').model.arch
  assert dict(arch) == {f'{unit}/branch': 0 for unit in gone}


def test_units_that_stay_are_refitted_where_that_helps(tmp_path, monkeypatch):
  calls, cuts, refit, cut = [], [], rounds.refit, rounds.cut_round

  def recorded_refit(coupling, variables, keep, batches):
    calls.append((variables, keep, refit(coupling, variables, keep, batches)))
    return calls[-1][-1]

  def recorded_cut(model, method, state, *args):
    cuts.append(state.params)
    return cut(model, method, state, *args)

  monkeypatch.setattr(rounds, 'refit', recorded_refit)
  monkeypatch.setattr(rounds, 'cut_round', recorded_cut)
  options = ImplosionOptions(depth=5, units=('stage1/block0',), refit=True)
  config = dataclasses.replace(IMPLOSION, options=options, workdir=str(tmp_path))
  result = to_json(rounds.run(config, show=False))
  ((before, keep, after),), (params,), (found,) = calls, cuts, result['rounds']
  assert [b for b, kept in keep['branches'].items() if not kept] == [
    'stage1/block0/branch'
  ]
  same = lambda a, b: all(jax.tree.leaves(jax.tree.map(np.array_equal, a, b)))
  assert not same(before['params'], after['params'])
  is_left_out = rounds.NOT_REFITTED in found['notes']
  assert same(params, (before if is_left_out else after)['params'])


def test_gates_close_layers_and_channels_for_one_target(tmp_path):
  options = GateOptions(0.2, round_to=1, layers=True, frozen=True)
  config = dataclasses.replace(
    IMPLOSION,
    options=options,
    train_epochs=2,
    gate_epochs=4,
    workdir=str(tmp_path),
  )
  result = rounds.run(config, show=False)
  (found,) = result.rounds
  assert result.flops.after / result.flops.before == pytest.approx(0.2, abs=0.01)
  arch = networks.load(tmp_path / 'pruned').model.arch
  assert found.erased == [key.removesuffix('/branch') for key in arch if not arch[key]]
  assert 0 < len(found.erased) < len(found.learned['layers'])
  assert any(width > 0 for width in arch.values())  # others are narrower
  assert 'Layers over time' in write(tmp_path).read_text()


def test_priorities_go_on_from_round_to_round(imploded):
  config, _ = imploded
  rows = lines(config.path / 'gates.jsonl')
  last = [r for r in rows if r['stage'] == 'gates-1'][-1]['priority']
  first = next(r for r in rows if r['stage'] == 'gates-2')['priority']
  for unit, value in first.items():
    assert value == pytest.approx(last[unit], abs=0.05)
  assert any(abs(value - 1) > 0.01 for value in first.values())


def test_implosion_goes_on_in_the_second_round_with_what_is_left(
  imploded, tmp_path, monkeypatch
):
  """Told to end amid retraining a network from which a unit was erased."""
  config = dataclasses.replace(imploded[0], workdir=str(tmp_path), checkpoint_every_s=9)
  append = directory.append

  def told(path, line):
    append(path, line)
    if (line['stage'], line['step']) == ('gates-2', 2):
      signal.raise_signal(signal.SIGTERM)

  with monkeypatch.context() as patch:
    patch.setattr(directory, 'append', told)
    with pytest.raises(Preempted, match='gates-2: .* saved at step 2 of'):
      to_json(rounds.run(config, show=False))
  to_json(rounds.run(config, show=False))
  steps = [
    [(row['stage'], row['step']) for row in lines(path / 'history.jsonl')]
    for path in (tmp_path, imploded[0].path)
  ]
  assert steps[0] == steps[1]  # and none was taken twice
  for stage in ('gates-1', 'gates-2', 'finetune'):
    same_end(imploded[0].path, tmp_path, stage)


@pytest.mark.parametrize(
  ('options', 'message'),
  [
    (ImplosionOptions(depth=9), r'depth=9: the network has 6 units.* expected 2 to 6'),
    (
      ImplosionOptions(units=('stage2/block0',)),
      r'stage2/block0 cannot be erased: .*16.*32',
    ),
    (
      ImplosionOptions(units=('stage2/blok1',)),
      "no unit 'stage2/blok1'; nearest: stage2/bl",
    ),
  ],
)
def test_what_cannot_be_erased_is_said_before_any_training(options, message, tmp_path):
  config = dataclasses.replace(IMPLOSION, options=options, workdir=str(tmp_path))
  with pytest.raises(ValueError, match=message):
    to_json(rounds.run(config, show=False))
  assert not (tmp_path / 'checkpoints').exists()


def test_weights_of_another_network_are_refused_with_the_difference(tmp_path):
  weights = tmp_path / 'resnet.npz'
  np.savez(weights, **{'conv1.weight': np.zeros((16, 3, 3, 3), np.float32)})
  config = dataclasses.replace(
    IMPLOSION, pretrained=str(weights), workdir=str(tmp_path / 'run')
  )
  with pytest.raises(ValueError, match=r'resnet\.npz: does not fit'):
    to_json(rounds.run(config, show=False))


def test_implosion_compares_with_the_network_before_the_first_erasure(
  imploded, tmp_path
):
  _, result = imploded
  assert result['original'] == {}
  assert result['epochs'] == {'before': 2, 'after': 4}
  config = dataclasses.replace(
    IMPLOSION, train_epochs=1, finetune_epochs=0, workdir=str(tmp_path)
  )
  result = to_json(rounds.run(config, show=False))
  assert result['epochs'] == {'before': 3, 'after': 3}
  assert result['held_out']['before'] == result['rounds'][0]['held_out']['before']
  assert result['original'].keys() == {'test', 'held_out'}
  assert result['original']['test'] != result['accuracy']['before']


def test_auxiliary_trains_the_network_alone_for_comparison(tmp_path):
  config = dataclasses.replace(
    default('auxiliary'),
    options=AuxiliaryOptions(width=4),
    model='mlp',
    gate_epochs=2,
    workdir=str(tmp_path),
    **SMALL,
  )
  result = rounds.run(config, show=False)
  assert result.control == {} and not (tmp_path / 'checkpoints/control').exists()
  # The same run goes on with what was left out.
  options = dataclasses.replace(config.options, control=True)
  again = rounds.run(dataclasses.replace(config, options=options), show=False)
  assert again.accuracy == result.accuracy
  stages = [line['stage'] for line in lines(tmp_path / 'history.jsonl')]
  assert stages.count('gates') == stages.count('control') > 0
  assert set(stages) == {'gates', 'control'}
  alone = dataclasses.replace(
    config, options=AuxiliaryOptions('none'), workdir=str(tmp_path / 'alone')
  )
  alone = rounds.run(alone, show=False)
  # The same epochs from the same arrays; only the order of the examples is another.
  assert again.control['test'] == pytest.approx(alone.accuracy.after, abs=0.05)
  assert again.control['test'] > 0.3  # a tenth by chance
