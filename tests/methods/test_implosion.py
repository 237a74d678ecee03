"""Which units go, in which order, and what becomes of their priorities in training."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from depthprune import methods
from depthprune.methods.implosion import (
  ImplosionOptions,
  erasure,
  implosion,
)
from depthprune.models.mlp import MLP
from depthprune.models.resnet import ResNet
from depthprune.program.coupling import couple
from depthprune.program.units import units
from depthprune.train.judge import judge
from depthprune.train.method import optimizer
from depthprune.train.step import init_state
from depthprune.train.task import classification

IMAGE = jnp.ones((1, 4, 4, 3))
RESIZED = ('stage2/block0', 'stage3/block0')


def coupled(model):
  return couple(model, jax.eval_shape(model.init, jax.random.key(0), IMAGE), IMAGE)


COUPLING = coupled(ResNet(classes=3, depth=20, width=2))
STACKED = coupled(ResNet(classes=3, depth=20, width=2, scan=True))
UNITS = units(COUPLING)
quickly = settings(deadline=None, max_examples=20)
ERASABLE = [u.name for u in UNITS if u.name not in RESIZED]


def theta_of(priorities, coupling=COUPLING):
  """Priorities by path; those not given are 1."""
  gates = implosion(coupling).init(coupling.gates(), {})['branches']
  return {'branches': {b: np.asarray(priorities.get(b, g)) for b, g in gates.items()}}


def closed(keep):
  return {
    path.removesuffix('/branch')
    for path, kept in keep['branches'].items()
    if not np.all(kept)
  }


class Table:
  """A judge whose loss is `loss(names of the closed units)`."""

  def __init__(self, loss):
    self.loss, self.calls = loss, []

  def each(self, keeps):
    n = len(next(iter(keeps['branches'].values())))
    rows = [
      {'branches': {b: kept[i] for b, kept in keeps['branches'].items()}}
      for i in range(n)
    ]
    self.calls.append(n)
    return {'loss': np.asarray([self.loss(closed(row)) for row in rows])}


def names(found):
  return [unit.name for unit in found]


def erase(importance, count, evaluate=None, theta=None, seed=0, among=None):
  among = among or [u for u in UNITS if not u.why_not]
  return names(
    erasure(COUPLING, among, count, importance, theta or theta_of({}), evaluate, seed)
  )


# ---- which units go ------------------------------------------------------------------


def test_priorities_are_of_the_units_with_an_identity_shortcut():
  theta = implosion(COUPLING).init(COUPLING.gates(), {})
  assert [*theta] == ['branches']
  assert sorted(theta['branches']) == sorted(f'{name}/branch' for name in ERASABLE)
  assert {float(w) for w in theta['branches'].values()} == {1.0}


@quickly
@given(
  st.permutations(range(len(ERASABLE))), st.lists(st.booleans(), min_size=7, max_size=7)
)
def test_the_smallest_absolute_priorities_go_first(rank, signs):
  w = {
    f'{name}/branch': (r + 1) / 10 * (1 if sign else -1)
    for name, r, sign in zip(ERASABLE, rank, signs)
  }
  expected = [ERASABLE[i] for i in np.argsort(rank)]
  assert erase('priority', 3, theta=theta_of(w)) == expected[:3]
  keep = implosion(COUPLING, depth=6, per_round=3).decide(theta_of(w), {}, None)
  assert closed(keep) == set(expected[:3])
  assert keep['branches'].keys() == set(COUPLING.branches)


def test_of_equal_importance_the_deeper_unit_goes_first():
  assert erase('priority', 2) == ['stage3/block2', 'stage3/block1']
  assert erase('drop', 2, Table(lambda gone: 1.0)) == ['stage3/block2', 'stage3/block1']


def test_a_loss_that_is_not_a_number_is_the_largest():
  evaluate = Table(lambda gone: np.nan if 'stage3/block2' in gone else len(gone))
  assert erase('drop', 7, evaluate)[-1] == 'stage3/block2'


ADDITIVE = dict(zip(ERASABLE, (0.5, 0.1, 0.9, 0.2, 0.8, 0.3, 0.4)))


def pair(gone):
  """Each of the first two is harmless alone, both together are not."""
  both = {'stage1/block0', 'stage1/block1'} <= gone
  alone = {**ADDITIVE, 'stage1/block0': 0.0, 'stage1/block1': 0.01}
  return sum(alone[name] for name in gone) + 10 * both


def test_drop_is_the_order_of_the_losses_and_one_call():
  evaluate = Table(lambda gone: sum(ADDITIVE[name] for name in gone))
  assert erase('drop', 7, evaluate) == sorted(ERASABLE, key=lambda n: ADDITIVE[n])
  assert evaluate.calls == [7]


def test_greedy_scores_again_after_every_erasure():
  assert set(erase('drop', 2, Table(pair))) == {'stage1/block0', 'stage1/block1'}
  evaluate = Table(pair)
  assert erase('greedy', 2, evaluate) == ['stage1/block0', 'stage2/block1']
  assert evaluate.calls == [7, 6]


def test_an_erasure_that_was_stopped_goes_on():
  among = [u for u in UNITS if not u.why_not]
  for importance in ('greedy', 'random'):
    order = erase(importance, 4, Table(pair))
    gone = [u for name in order[:2] for u in UNITS if u.name == name]
    more = (COUPLING, among, 2, importance, theta_of({}), Table(pair))
    assert names(erasure(*more, gone=gone)) == order[2:]


@quickly
@given(st.lists(st.floats(0, 9), min_size=7, max_size=7))
def test_greedy_is_drop_where_one_goes_or_losses_add_up(values):
  loss = dict(zip(ERASABLE, values))
  add = lambda gone: sum(loss[name] for name in gone)
  assert erase('greedy', 1, Table(add)) == erase('drop', 1, Table(add))
  for importance in ('greedy', 'drop'):
    gone = erase(importance, 3, Table(add))
    assert add(gone) == pytest.approx(sum(sorted(values)[:3]))


def test_random_is_a_fixed_order_of_the_names():
  order = erase('random', 7, seed=1)
  assert sorted(order) == sorted(ERASABLE)
  assert erase('random', 7, seed=1) == order
  left = [u for u in UNITS if u.name in order[2:]]
  assert erase('random', 3, seed=1, among=left) == order[2:5]
  assert len({tuple(erase('random', 7, seed=s)) for s in range(20)}) == 20
  firsts = {erase('random', 1, seed=s)[0] for s in range(60)}
  assert firsts == set(ERASABLE)


def test_the_layers_of_a_stack_are_units():
  w = {
    'stage1/blocks/branch': jnp.asarray([0.5, -0.1]),
    'stage2/blocks/branch': jnp.asarray([0.2, 2.0]),
  }
  method = implosion(STACKED, depth=7, per_round=2)
  theta = theta_of(w, STACKED)
  keep = method.decide(theta, {}, None)['branches']
  np.testing.assert_array_equal(keep['stage1/blocks/branch'], [True, False])
  np.testing.assert_array_equal(keep['stage2/blocks/branch'], [False, True])
  found = method.report(theta)['priority']
  assert found['stage1/blocks[1]'] == pytest.approx(0.1)
  assert len(found) == 7


def test_a_layer_with_several_branches_has_their_mean_priority():
  def network(variables, x):
    b, p = variables['branches'], variables['params']

    def layer(x, leaves):
      w, gate, second = leaves
      x = x + gate * jnp.tanh(x @ w)
      return x + second * jnp.tanh(x @ w), None

    return jax.lax.scan(layer, x, (p['w'], b['one'], b['two']))[0]

  variables = {
    'params': {'w': jnp.ones((2, 3, 3))},
    'branches': {'one': jnp.ones(2), 'two': jnp.ones(2)},
  }
  coupling = couple(network, variables, jnp.ones((1, 3)))
  theta = {
    'branches': {'one': jnp.asarray([0.5, -1.0]), 'two': jnp.asarray([-0.7, 0.1])}
  }
  method = implosion(coupling, depth=1)
  np.testing.assert_allclose([*method.report(theta)['priority'].values()], [0.6, 0.55])
  keep = method.decide(theta, {}, None)['branches']
  assert [keep[name].tolist() for name in ('one', 'two')] == [[True, False]] * 2


def four_units(variables, x, train=False):
  p, gates = variables['params'], variables['branches']
  for i in range(4):
    x = x + gates[f'unit{i}'] * jax.nn.relu(x @ p[f'w{i}'])
  return {'main': x}


def four_judged(importance):
  """A method for a network of four units, its state and a judge."""
  rng = np.random.default_rng(0)
  noise = lambda *shape: rng.normal(size=shape).astype(np.float32)
  variables = {
    'params': {f'w{i}': noise(3, 3) for i in range(4)},
    'branches': {f'unit{i}': np.float32(1) for i in range(4)},
  }
  coupling = couple(four_units, variables, noise(1, 3))
  method = implosion(coupling, depth=2, per_round=2, importance=importance)
  state = init_state(four_units, method, optax.sgd(0.1), variables, coupling)
  batches = [{'image': noise(6, 3), 'label': np.arange(6) % 3}]
  task = classification(3)
  return method, state, judge(four_units, method, task, state, batches, (), coupling)


@pytest.mark.parametrize('importance', ['drop', 'greedy'])
def test_the_order_is_that_of_real_losses(importance):
  """Against one candidate after the other, through the judge itself."""
  method, state, evaluate = four_judged(importance)
  names_ = [f'unit{i}' for i in range(4)]
  loss = lambda *gone: evaluate({'branches': {n: n not in gone for n in names_}})[
    'loss'
  ]
  first = min(names_, key=loss)
  rest = [n for n in names_ if n != first]
  second = min(rest, key=loss if importance == 'drop' else lambda n: loss(first, n))
  assert closed(method.decide(state.theta, {}, evaluate)) == {first, second}


def test_the_order_by_influence_is_that_of_the_angles():
  """By hand, of what enters and leaves every unit at the gates that were trained."""
  method, state, evaluate = four_judged('influence')
  gates = {f'unit{i}': np.float32(w) for i, w in enumerate((0.6, -1.2, 0.2, 2.0))}
  state = dataclasses.replace(state, theta={'branches': gates})
  batch = evaluate.held_out[0]
  coupling = couple(four_units, state.variables, batch['image'])
  evaluate = judge(
    four_units, method, classification(3), state, [batch], coupling=coupling
  )
  x, angles = batch['image'].astype(float), {}
  for i, (name, w) in enumerate(gates.items()):
    y = x + w * np.maximum(x @ np.asarray(state.params[f'w{i}'], float), 0)
    cos = (x * y).sum(-1) / np.linalg.norm(x, axis=-1) / np.linalg.norm(y, axis=-1)
    x, angles[name] = y, 1 - cos.mean()
  expected = sorted(angles, key=angles.get)
  assert expected != sorted(gates, key=lambda name: abs(gates[name]))
  assert closed(method.decide(state.theta, {}, evaluate)) == {*expected[:2]}


def test_layers_of_a_scan_go_by_the_influence_that_they_have_without_it():
  _, state, evaluate = four_judged('influence')
  (batch,) = evaluate.held_out
  priorities = np.float32([0.6, -1.2, 0.2, 2.0])

  def scanned(variables, x, train=False):
    layer = lambda x, w: (x + w[1] * jax.nn.relu(x @ w[0]), None)
    stack = variables['params']['w'], variables['branches']['unit']
    return jax.lax.scan(layer, x, stack)[0]

  stack = {
    'params': {'w': np.stack([state.params[f'w{i}'] for i in range(4)])},
    'branches': {'unit': np.ones(4, np.float32)},
  }

  def erased(model, variables, gates):
    coupling = couple(model, variables, batch['image'])
    method = implosion(coupling, depth=2, per_round=2, importance='influence')
    state = init_state(model, method, optax.sgd(0.1), variables, coupling)
    state = dataclasses.replace(state, theta={'branches': gates})
    evaluate = judge(model, method, classification(3), state, [batch], (), coupling)
    return method.decide(state.theta, {}, evaluate)['branches']

  alone = erased(
    four_units, state.variables, {f'unit{i}': w for i, w in enumerate(priorities)}
  )
  together = erased(scanned, stack, {'unit': priorities})
  np.testing.assert_array_equal(together['unit'], [*alone.values()])
  assert together['unit'].sum() == 2


# ---- training ------------------------------------------------------------------------


@pytest.mark.parametrize(
  'tx',
  [
    optax.adamw(1e-2, weight_decay=0.1),
    optax.chain(optax.add_decayed_weights(0.1), optax.sgd(0.1, momentum=0.9)),
    optax.lion(1e-2, weight_decay=0.1),
  ],
)
@jax.numpy_dtype_promotion('standard')
def test_a_priority_has_no_weight_decay(tx):
  tx = optimizer(implosion(COUPLING), tx)
  trained = {'params': {'kernel': jnp.ones(3)}, 'theta': theta_of({})}
  state = tx.init(trained)
  nothing = jax.tree.map(jnp.zeros_like, trained)
  for _ in range(3):
    updates, state = tx.update(nothing, state, trained)
    trained = optax.apply_updates(trained, updates)
  assert all(float(w) == 1.0 for w in trained['theta']['branches'].values())
  assert float(trained['params']['kernel'].max()) < 1


def test_a_priority_is_trained_with_the_weights():
  tx = optimizer(implosion(COUPLING), optax.sgd(0.1))
  trained = {'params': {'kernel': jnp.ones(3)}, 'theta': theta_of({})}
  slopes = jax.tree.map(jnp.ones_like, trained)
  updates, _ = tx.update(slopes, tx.init(trained), trained)
  for leaf in jax.tree.leaves(updates):
    np.testing.assert_allclose(leaf, -0.1, rtol=1e-6)


def test_the_gates_are_the_priorities():
  method, theta = (
    implosion(COUPLING),
    theta_of({'stage1/block0/branch': jnp.asarray(0.3)}),
  )
  assert method.forward(theta, None, None) is theta
  assert method.penalty is None
  found = jax.jit(method.report)(theta)['priority']
  assert [*found] == sorted(ERASABLE)
  assert float(found['stage1/block0']) == pytest.approx(0.3)


# ---- rounds --------------------------------------------------------------------------


@pytest.mark.parametrize(
  ('depth', 'per_round', 'rounds', 'first'),
  [(8, 1, 1, 1), (5, 1, 4, 1), (5, 3, 2, 3), (6, 9, 1, 3), (2, 7, 1, 7), (9, 1, 0, 0)],
)
def test_rounds_that_are_left(depth, per_round, rounds, first):
  method = implosion(COUPLING, depth, per_round)
  assert method.rounds == rounds
  assert len(closed(method.decide(theta_of({}), {}, None))) == first


def test_by_default_a_quarter_goes_one_after_the_other():
  assert implosion(COUPLING).rounds == 2  # of nine
  assert implosion(coupled(ResNet(classes=3, depth=8, width=2))).rounds == 1  # of three


@quickly
@given(st.integers(2, 8), st.integers(1, 7))
def test_rounds_end_at_the_depth(depth, per_round):
  """The units that are there fall as they would in a run."""
  present, rounds = 9, 0
  among = [u for u in UNITS if not u.why_not]
  left = implosion(COUPLING, depth, per_round).rounds
  while present > depth:
    k = min(per_round, present - depth)
    gone = erase('random', k, among=among)
    among = [u for u in among if u.name not in gone]
    present, rounds = present - k, rounds + 1
  assert rounds == left


def test_only_named_units_go():
  method = implosion(COUPLING, 8, units=['stage2/block1', 'stage1/block0'])
  keep = method.decide(theta_of({}), {}, None)
  assert closed(keep) == {'stage2/block1'}
  assert len(method.report(theta_of({}))['priority']) == 7


def test_units_that_a_pattern_excludes_stay():
  among = [u.name for u in UNITS if not u.why_not]
  method = implosion(COUPLING, 7, 2, exclude=['stage1/*', 'stage2/block1'])
  gone = closed(method.decide(theta_of({}), {}, None))
  assert len(gone) == 2 and all(name not in gone for name in among if 'stage1' in name)
  # The default depth is one that can be reached.
  assert implosion(COUPLING, exclude=among[1:]).rounds == 1


def built(coupling, whole=COUPLING, **options):
  """The method of a run with these options, for a network that was `whole`."""
  return methods.build(ImplosionOptions(**options), coupling, whole=whole, seed=3)


def test_a_run_says_depth_and_units_of_the_whole_network():
  small = coupled(
    ResNet(classes=3, depth=20, width=2, arch={'stage2/block1/branch': 0})
  )
  assert built(COUPLING).rounds == 2
  assert built(small).rounds == 1
  two = {'depth': 7, 'units': ('stage2/block1', 'stage1/block0')}
  method = built(COUPLING, **two)
  assert closed(method.decide(theta_of({}), {}, None)) == {'stage2/block1'}
  method = built(small, **two)
  theta = theta_of({}, small)
  assert closed(method.decide(theta, {}, None)) == {'stage1/block0'}


def test_a_run_keeps_units_of_the_whole_network_in_every_round():
  small = coupled(
    ResNet(classes=3, depth=20, width=2, arch={'stage2/block1/branch': 0})
  )
  for network in (COUPLING, small):
    method = built(network, keep=('stage[13]/*',))
    gone = closed(method.decide(theta_of({}, network), {}, None))
    assert gone and all(name.startswith('stage2') for name in gone)
  with pytest.raises(ValueError, match=r"'stage4/\*' matches no unit; nearest"):
    built(COUPLING, keep=('stage4/*',))


def test_the_seed_of_a_run_is_that_of_the_control():
  method = built(COUPLING, depth=6, per_round=3, importance='random')
  assert closed(method.decide(theta_of({}), {}, None)) == set(
    erase('random', 3, seed=3)
  )


def test_layers_of_a_stack_are_named_for_one_round_alone():
  """Every cut numbers them anew, so the names would mean other layers."""
  stacked = coupled(ResNet(classes=3, depth=20, width=2, scan=True))
  named = {'depth': 7, 'units': ('stage1/blocks[0]', 'stage1/blocks[1]')}
  with pytest.raises(ValueError, match=r'blocks\[0\] is a layer .*--per-round 2'):
    built(stacked, stacked, **named)
  assert built(stacked, stacked, **named, per_round=2).rounds == 1


# ---- what cannot be ------------------------------------------------------------------


@pytest.mark.parametrize(
  ('arguments', 'message'),
  [
    ({'depth': 10}, r'depth=10: the network has 9 units, 7 .* expected 2 to 9'),
    ({'depth': 1}, r'2 to 9\n  stage2/block0: .* changes \[.., 2\] to \[.., 4\]'),
    ({'depth': 7, 'units': ['stage1/block1']}, '1 of which may .* expected 8 to 9'),
    ({'units': ['stage2/block0']}, 'stage2/block0 cannot be erased: its shortcut'),
    ({'units': ['stage1/blok1']}, "no unit 'stage1/blok1'; nearest: stage1/block1"),
    ({'importance': 'size'}, 'one of priority, drop, greedy, influence, random'),
    ({'per_round': 0}, 'per_round: expected a whole number of 1 or more'),
    ({'units': []}, 'no unit .* can be erased'),
    (
      {'exclude': 'stage1/blok1'},
      "'stage1/blok1' matches no unit; nearest: stage1",
    ),
    ({'exclude': '*'}, 'no unit .* can be erased'),
    ({'depth': 4, 'exclude': '*/block1'}, 'of which may .* expected 5 to 9'),
  ],
)
def test_a_wish_that_cannot_be_is_an_error(arguments, message):
  with pytest.raises(ValueError, match=message):
    implosion(COUPLING, **arguments)


def test_a_network_without_branches_is_an_error():
  with pytest.raises(ValueError, match='it has no branch gates'):
    implosion(coupled(MLP(hidden=(4, 4), classes=3)))


def test_a_network_of_which_every_unit_resizes_is_an_error():
  def network(variables, x):
    return x[:, :2] + variables['branches']['b'] * (x @ variables['params']['w'])

  variables = {'params': {'w': jnp.ones((3, 2))}, 'branches': {'b': jnp.ones(())}}
  with pytest.raises(ValueError, match='no unit .* can be erased; b: its shortcut'):
    implosion(couple(network, variables, jnp.ones((1, 3))))
