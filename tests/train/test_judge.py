"""Judged masked, all at once: the same as one by one, and as the network once cut."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.traverse_util import unflatten_dict
from hypothesis import given, settings
from hypothesis import strategies as st

from depthprune.gates import branch
from depthprune.models import stages
from depthprune.models.heads import Head, WithHeads
from depthprune.models.mlp import MLP
from depthprune.models.resnet import ResNet
from depthprune.program.coupling import couple
from depthprune.surgery.influence import block_influence
from depthprune.surgery.prune import prune
from depthprune.train import judge as judging
from depthprune.train.evaluate import evaluate, recalibrate
from depthprune.train.judge import judge
from depthprune.train.method import Method
from depthprune.train.step import branches_of, init_state
from depthprune.train.task import classification

TASK = classification(3)
GATES = (0.9, -1.3, 0.4)
BRANCHES = Method(
  init=lambda gates, outputs: {'branches': gates['branches']},
  forward=lambda theta, key, step: theta,
)


class Unit(nn.Module):
  norm: bool

  @nn.compact
  def __call__(self, x, train):
    y = nn.BatchNorm(not train)(x) if self.norm else x
    return x + branch(self, nn.Dense(6)(nn.relu(nn.Dense(8)(y))))


class Net(nn.Module):
  """Three units, of which `stack` makes one scanned stack."""

  norm: bool = True
  stack: bool = False

  @nn.compact
  def __call__(self, x, train=False):
    x = nn.Dense(6, name='stem')(x)
    if self.stack:
      x = stages.repeat(Unit(self.norm, name='units'), x, 3, train)
    else:
      for i in range(3):
        x = Unit(self.norm, name=f'unit{i}')(x, train)
    return {'main': nn.Dense(3, name='head')(x)}


def batches(count, seed, shape=(5,), size=6):
  """Of which the last two images are padding."""
  rng = np.random.default_rng(seed)
  return [
    {
      'image': rng.normal(1, 2, size=(size, *shape)).astype(np.float32),
      'label': rng.integers(0, 3, size).astype(np.int32),
      'weight': (np.arange(size) < size - 2).astype(np.float32),
    }
    for _ in range(count)
  ]


def trained(model, image, method=BRANCHES):
  """(coupling, state), with branch gates and batch statistics that are not 1."""
  variables = model.init(jax.random.key(0), image)
  if 'batch_stats' in variables:
    rng = np.random.default_rng(2)
    noisy = lambda s: jnp.asarray(np.exp(rng.normal(0, 0.3, s.shape)), s.dtype)
    variables = {
      **variables,
      'batch_stats': jax.tree.map(noisy, variables['batch_stats']),
    }
  coupling = couple(model, variables, image)
  state = init_state(model, method, optax.sgd(0.1), variables, coupling)
  if 'branches' not in state.theta:
    return coupling, state
  gates = state.theta['branches']
  theta = {b: jnp.full(g.shape, v) for (b, g), v in zip(gates.items(), GATES)}
  return coupling, state.replace(theta={'branches': {**gates, **theta}})


def with_trained_gates(state):
  branches = {**branches_of(state.variables), **state.theta['branches']}
  return {**state.variables, 'branches': unflatten_dict(branches, sep='/')}


HELD_OUT, CALIBRATION = batches(2, 0), batches(3, 1)
COUPLING, STATE = trained(Net(), jnp.ones((1, 5)))


def judged(model=Net(), state=STATE, coupling=COUPLING, vectorise='vmap', **batches):
  batches = {'held_out': HELD_OUT, 'calibration': CALIBRATION, **batches}
  return judge(
    model, BRANCHES, TASK, state, **batches, coupling=coupling, vectorise=vectorise
  )


JUDGES = {how: judged(vectorise=how) for how in ('vmap', 'map')}


def keep_of(*open_):
  """Of the three units; those not given are not named."""
  return {'branches': {f'unit{i}/branch': np.asarray(o) for i, o in enumerate(open_)}}


def stacked(keeps):
  return jax.tree.map(lambda *kept: np.stack(kept), *keeps)


ONE_EACH = [keep_of(*(i != k for i in range(3))) for k in range(3)]


def test_without_a_decision_it_is_the_network_as_trained():
  found = JUDGES['vmap']({})
  expected = evaluate(Net(), with_trained_gates(STATE), HELD_OUT, TASK)
  assert found == pytest.approx(expected, rel=1e-6)
  untrained = evaluate(Net(), STATE.variables, HELD_OUT, TASK)
  assert abs(untrained['loss'] - found['loss']) > 1e-2


@settings(deadline=None, max_examples=20)
@given(
  how=st.sampled_from(['vmap', 'map']),
  opens=st.lists(st.tuples(*[st.booleans()] * 3), min_size=3, max_size=3),
)
def test_all_at_once_is_one_by_one(how, opens):
  keeps = [keep_of(*open_) for open_ in opens]
  ones = [JUDGES['vmap'](keep) for keep in keeps]
  for name, values in JUDGES[how].each(stacked(keeps)).items():
    assert values.shape == (len(opens),)
    np.testing.assert_allclose(values, [one[name] for one in ones], rtol=1e-5)


def test_masked_is_the_network_once_cut_and_recalibrated():
  keep = keep_of(False, True, False)
  pruned = prune(
    Net(), with_trained_gates(STATE), keep, jnp.ones((1, 5)), coupling=COUPLING
  )
  small = recalibrate(pruned.apply, pruned.variables, CALIBRATION)
  expected = evaluate(pruned.apply, small, HELD_OUT, TASK)
  assert JUDGES['vmap'](keep) == pytest.approx(expected, rel=1e-5)


def cut_and_judged(model, shape, keep):
  """(expected, found) on images of that shape."""
  coupling, state = trained(model, jnp.ones((1, *shape)))
  held_out, calibration = batches(1, 3, shape), batches(2, 4, shape)
  pruned = prune(
    model, with_trained_gates(state), keep, jnp.ones((1, *shape)), coupling=coupling
  )
  small = recalibrate(pruned.apply, pruned.variables, calibration)
  found = judged(model, state, coupling, held_out=held_out, calibration=calibration)
  return evaluate(pruned.apply, small, held_out, TASK), found(keep)


def test_masked_is_cut_in_a_scanned_stack():
  keep = {'branches': {'units/branch': np.asarray([True, False, True])}}
  expected, found = cut_and_judged(Net(stack=True), (5,), keep)
  assert found == pytest.approx(expected, rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize('scan', [False, True])
def test_masked_is_cut_in_a_resnet(scan):
  model = ResNet(classes=3, depth=20, width=2, scan=scan)
  path = 'stage2/blocks/branch' if scan else 'stage2/block1/branch'
  keep = {'branches': {path: np.asarray([False, True]) if scan else np.asarray(False)}}
  expected, found = cut_and_judged(model, (4, 4, 3), keep)
  assert found == pytest.approx(expected, rel=1e-5)


def test_a_network_without_batch_statistics_needs_no_calibration():
  net = Net(norm=False)
  coupling, state = trained(net, jnp.ones((1, 5)))
  found = judged(net, state, coupling, calibration=()).each(stacked(ONE_EACH))
  for i, loss in enumerate(found['loss']):
    theta = {**state.theta['branches'], f'unit{i}/branch': jnp.zeros(())}
    closed = with_trained_gates(state.replace(theta={'branches': theta}))
    assert loss == pytest.approx(
      evaluate(net, closed, HELD_OUT, TASK)['loss'], rel=1e-5
    )


def test_many_go_through_in_pieces_of_one_size(monkeypatch):
  two = 2 * 6 + 1
  monkeypatch.setattr(judging, 'IMAGES', {'cpu': two, 'other': two})
  sizes, whole = [], JUDGES['vmap']

  def measure(how, exits, decisions, batch):
    sizes.append(len(decisions.closes))
    return whole.network.measure(how, exits, decisions, batch)

  network = whole.network._replace(measure=measure)
  in_pieces = dataclasses.replace(whole, network=network, sizes=set())
  keeps = stacked(ONE_EACH)
  found = in_pieces.each(keeps)
  assert sizes == [2] * 2 * len(HELD_OUT)
  monkeypatch.undo()
  expected = whole.each(keeps)
  for name in expected:
    np.testing.assert_allclose(found[name], expected[name], rtol=1e-5)


def test_one_program_serves_every_decision():
  traced = []

  def apply(variables, image, train=False, **kwargs):
    traced.append(train)
    return Net().apply(variables, image, train, **kwargs)

  evaluator = judged(apply, coupling=None)
  evaluator.each(stacked(ONE_EACH))
  before = len(traced)
  for keeps in (ONE_EACH[1:], [keep_of(False, True, False)] * 3, ONE_EACH[:1]):
    evaluator.each(stacked(keeps))
  assert len(traced) == before


def test_on_a_cpu_the_faster_of_two_ways_is_found_by_measurement():
  evaluator = judged(vectorise='auto')
  assert evaluator.vectorised == {'by': 'auto'}
  evaluator.each(stacked(ONE_EACH))
  ms = {how: evaluator.vectorised[f'{how}_ms'] for how in ('vmap', 'map')}
  assert min(ms.values()) > 0
  assert evaluator.vectorised['by'] == min(ms, key=lambda how: ms[how])


@pytest.fixture(scope='module')
def with_exits():
  trunk = MLP(hidden=(4, 4), classes=3)
  model = WithHeads(
    trunk, {f'exit{i}': Head(tap, classes=3) for i, tap in enumerate(trunk.taps, 1)}
  )
  method = Method(answer=lambda task, outputs, theta: outputs['exit1'])
  coupling, state = trained(model, jnp.ones((1, 5)), method)
  evaluator = judge(model, method, TASK, state, HELD_OUT, coupling=coupling)
  outputs = lambda name: (
    lambda variables, image, train: {'main': model.apply(variables, image)[name]}
  )
  one = lambda name: evaluate(outputs(name), state.variables, HELD_OUT, TASK)
  return evaluator, {name: one(name) for name in ('exit1', 'exit2', 'main')}


def test_the_kept_exit_answers_and_without_one_the_method(with_exits):
  evaluator, expected = with_exits
  assert evaluator({}) == pytest.approx(expected['exit1'], rel=1e-6)
  for name, found in expected.items():
    keep = {'exits': {e: e == name for e in expected}}
    assert evaluator(keep) == pytest.approx(found, rel=1e-6)
  two = {'exits': {'exit1': True, 'exit2': True, 'main': False}}
  assert evaluator(two) == pytest.approx(expected['exit2'], rel=1e-6)
  keeps = stacked([{'exits': {e: e == name for e in expected}} for name in expected])
  np.testing.assert_allclose(
    evaluator.each(keeps)['loss'], [e['loss'] for e in expected.values()], rtol=1e-6
  )


def test_channels_are_closed_too():
  model = MLP(hidden=(4, 4), classes=3)
  coupling, state = trained(model, jnp.ones((1, 5)), Method())
  group = next(g for g in coupling.groups.values() if not g.ungated)
  kept = np.arange(group.size) % 2 == 0
  evaluator = judge(model, Method(), TASK, state, HELD_OUT, coupling=coupling)
  keep = {'channels': {group.name: kept}}
  expected = evaluate(model, state.variables, HELD_OUT, TASK, coupling, keep)
  assert evaluator(keep) == pytest.approx(expected, rel=1e-6)
  keeps = {'channels': {group.name: np.stack([kept, ~kept])}}
  assert evaluator.each(keeps)['loss'][0] == pytest.approx(expected['loss'], rel=1e-5)


def test_what_does_not_exist_is_an_error(with_exits):
  exits, _ = with_exits
  with pytest.raises(KeyError, match='unit9/branch: .* no such branch'):
    JUDGES['vmap']({'branches': {'unit9/branch': np.asarray(False)}})
  with pytest.raises(KeyError, match="'branch': expected channels, branches, exits"):
    JUDGES['vmap']({'branch': {}})
  with pytest.raises(KeyError, match="no exit 'exit7'; there are: exit1, exit2, main"):
    exits({'exits': {'exit7': True}})
  with pytest.raises(ValueError, match='drops every exit'):
    exits({'exits': dict.fromkeys(('exit1', 'exit2', 'main'), False)})
  with pytest.raises(ValueError, match='expected one of vmap, map, auto'):
    judged(vectorise='pmap')
  with pytest.raises(ValueError, match='at least one held-out batch'):
    judged(held_out=())


def test_stale_statistics_are_an_error():
  with pytest.raises(ValueError, match='pass calibration='):
    judged(calibration=())(ONE_EACH[0])
  judged(calibration=())({})


@pytest.mark.parametrize('keeps', [{}, keep_of(True), keep_of([True], [True, False])])
def test_decisions_of_different_number_are_an_error(keeps):
  with pytest.raises(ValueError, match='one length in all leaves'):
    JUDGES['vmap'].each(keeps)


# ---- soft channel gates --------------------------------------------------------------


def test_soft_channel_gates_are_judged_without_noise_and_as_they_are_cut():
  """What the judge says of a decision is what `prune` leaves, with the gates folded."""
  model, held_out = MLP(classes=3, hidden=(7, 5)), batches(2, seed=4)
  image = held_out[0]['image']
  variables = model.init(jax.random.key(0), image)
  coupling = couple(model, variables, image)
  rng = np.random.default_rng(5)
  soft = {
    g: jnp.asarray(rng.uniform(0.2, 1.8, v.size), jnp.float32)
    for g, v in coupling.gates()['channels'].items()
  }

  def forward(theta, key=None, step=None):
    assert key is None, 'evaluation asks for no noise'
    return {'channels': theta}

  method = Method(init=lambda gates, outputs: soft, forward=forward)
  state = init_state(model, method, optax.sgd(0.1), variables, coupling, held_out[0])
  evaluate_keep = judge(model, method, TASK, state, held_out, (), coupling)
  keep = {'channels': {g: np.arange(v.size) % 2 == 0 for g, v in soft.items()}}
  pruned = prune(model, variables, keep, image, gates={'channels': soft})
  small = evaluate(pruned.apply, pruned.variables, held_out, TASK)
  assert evaluate_keep(keep)['loss'] == pytest.approx(small['loss'], rel=1e-5)
  # Dropping the gates would have been another network.
  dropped = prune(model, variables, keep, image)
  other = evaluate(dropped.apply, dropped.variables, held_out, TASK)['loss']
  assert abs(other - small['loss']) > 1e-3


def test_arrays_and_batches_of_unlike_sizes_are_scored_alike():
  """All examples count once, however they are batched."""
  (whole,) = batches(1, 3, size=10)
  whole.pop('weight')
  rows = lambda part: {k: v[part] for k, v in whole.items()}
  expected = judged(held_out=[whole])({})
  for held_out, more in (
    (whole, {'batch': 4}),
    ((whole['image'], whole['label']), {'batch': 7}),
    ([rows(slice(4)), rows(slice(4, 7)), rows(slice(7, 10))], {}),
    ((rows(part) for part in (slice(9), slice(9, 10))), {}),
  ):
    found = judged(held_out=held_out, **more)({})
    assert found == pytest.approx(expected, rel=1e-5)


# ---- influence -----------------------------------------------------------------------


def test_influence_is_that_of_held_out_examples_without_padding():
  """At the gates as trained."""
  blocks = {'first': ['unit0/branch'], 'rest': ['unit1/branch', 'unit2/branch']}
  found = judged().influence(blocks)
  measured = lambda rows, variables: block_influence(
    COUPLING, variables, [batch['image'][:rows] for batch in HELD_OUT], blocks
  )
  assert found == pytest.approx(measured(4, with_trained_gates(STATE)))
  assert found != pytest.approx(measured(6, with_trained_gates(STATE)))
  assert found != pytest.approx(measured(4, STATE.variables))


def test_influence_needs_a_coupling():
  with pytest.raises(ValueError, match='coupling: expected one to measure influences'):
    judged(coupling=None).influence({'first': ['unit0/branch']})
