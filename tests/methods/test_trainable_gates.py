import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from depthprune import methods
from depthprune.methods.trainable_gates import GateOptions, gate, trainable_gates
from depthprune.program.coupling import couple
from depthprune.program.gating import plug
from depthprune.run.job import remembering
from depthprune.timing import layers
from depthprune.timing.layers import counted
from depthprune.train.method import optimizer
from depthprune.train.starts import START
from depthprune.train.task import classification

SIZES = (5, 16, 12, 3)
STEP = jnp.zeros((), jnp.int32)


def network(variables, x):
  p = variables['params']
  h = jax.nn.relu(x @ p['first'])
  return jax.nn.relu(h @ p['second']) @ p['last']


def weights(seed=0):
  keys = jax.random.split(jax.random.key(seed), 3)
  shapes = zip(('first', 'second', 'last'), SIZES, SIZES[1:], strict=False)
  return {
    'params': {
      name: jax.random.normal(key, (n, m)) / np.sqrt(n)
      for key, (name, n, m) in zip(keys, shapes, strict=True)
    }
  }


COUPLING = couple(network, weights(), jnp.ones((1, 5)))


def flops(n, m):
  """Of the network with n and m hidden channels, by hand."""
  return 2 * (5 * n + n * m + m * 3)


def share(n, m):
  return flops(n, m) / flops(16, 12)


def timed(first, both, last):
  """A cost in milliseconds, of layers that are made to take so long."""
  session = layers.session(COUPLING, batch=2)

  def took(layer, widths):
    n, m = widths.get('first:1'), widths.get('second:1')
    if not layer:
      return 1 + first(n) + both(n, m) + last(m)
    return both(n, m) if n and m else first(n) if n else last(m)

  return session.cost(np.array([took(*row) for row in session.rows], float))


MILLISECONDS = timed(lambda n: 5.0 * n, lambda n, m: 1.0 * n * m, lambda m: 3.0 * m)


def theta_of(n, m):
  """Gate weights with n and m channels open."""
  w = lambda size, open_: jnp.where(jnp.arange(size) < open_, 0.1, -0.1)
  return {'channels': {'first:1': w(16, n), 'second:1': w(12, m)}}


SLOPES = {
  'constant': lambda w: np.ones_like(w),
  'sigmoid': lambda w: np.exp(-w) / (1 + np.exp(-w)) ** 2,
  'tanh': lambda w: 1 - np.tanh(w) ** 2,
}


@pytest.mark.parametrize('surrogate', SLOPES)
def test_the_gate_is_a_step_with_the_derivative_of_its_surrogate(surrogate):
  w = np.asarray([0.2, -0.2, -3.0], np.float32)
  np.testing.assert_array_equal(gate(jnp.asarray(w), surrogate), [1, 0, 0])
  slopes = jax.grad(lambda w: gate(w, surrogate).sum())(jnp.asarray(w))
  np.testing.assert_allclose(slopes, SLOPES[surrogate](w), rtol=1e-4)


def test_the_largest_gate_of_a_group_stays_open():
  w = jnp.asarray([-0.3, -0.1, -0.2])
  np.testing.assert_array_equal(gate(w), [0, 1, 0])
  np.testing.assert_array_equal(jax.grad(lambda w: gate(w).sum())(w), [1, 1, 1])


@pytest.mark.parametrize(
  ('positive', 'width'), [(8, 8), (7, 4), (4, 4), (1, 4), (0, 4)]
)
def test_rounded_gates_open_what_will_be_built(positive, width):
  w = jnp.where(jnp.arange(10) < positive, 1.0, -1.0) * jnp.arange(1.0, 11.0)
  built = gate(w, round_to=4)
  assert int(built.sum()) == width
  assert float(w[built == 1].min()) >= float(w[built == 0].max())
  np.testing.assert_array_equal(jax.grad(lambda w: gate(w, round_to=4).sum())(w), 1)


def test_the_penalty_is_the_squared_distance_to_the_target():
  method = trainable_gates(COUPLING, 0.5, strength=7.0)
  assert method.penalty is not None
  found = method.penalty(theta_of(9, 4), STEP)
  assert float(found) == pytest.approx(7 * (share(9, 4) - 0.5) ** 2, rel=1e-5)


def test_the_target_goes_down_in_the_first_half_and_shows_in_the_metrics():
  method = trainable_gates(COUPLING, 0.5, steps=100)
  batch = {'label': jnp.asarray([0])}

  def target(step):
    outputs = {'main': jnp.ones((1, 3))}
    task, theta = classification(3), theta_of(9, 4)
    metrics = method.objective(task, outputs, batch, theta, jnp.asarray(step))[1]
    assert float(metrics['flops']) == pytest.approx(share(9, 4), rel=1e-6)
    return float(metrics['target'])

  np.testing.assert_allclose([target(s) for s in (0, 25, 50, 99)], [1, 0.75, 0.5, 0.5])


def test_all_gates_start_open_and_in_the_order_of_the_scores():
  scores = {'first:1': np.arange(16.0)[::-1]}
  theta = trainable_gates(COUPLING, 0.5, scores=scores).init({}, {})['channels']
  first = np.asarray(theta['first:1'])
  assert first.min() > 0 and first.max() < 2 * START
  np.testing.assert_array_equal(np.argsort(-first), np.arange(16))
  assert len(np.unique(np.concatenate([first, theta['second:1']]))) == 28


def test_gates_start_evenly_spaced_and_the_groups_out_of_step():
  theta = trainable_gates(COUPLING, 0.5).init({}, {})['channels']
  for group, part in (('first:1', 0.25), ('second:1', 0.75)):
    w = np.sort(theta[group])
    np.testing.assert_allclose(w, 0.2 * (np.arange(w.size) + part) / w.size, rtol=1e-5)


def test_globally_gates_start_in_the_order_of_score_by_price():
  """A channel costs 2 (5 + 12) FLOPs in the first layer, 2 (16 + 3) in the second."""
  scores = {'first:1': np.arange(16.0) ** 2, 'second:1': np.arange(12.0)}
  method = trainable_gates(COUPLING, 0.5, scores=scores, scope='global')
  theta = method.init({}, {})['channels']
  w = np.concatenate([theta['first:1'], theta['second:1']])
  worth = np.concatenate([scores['first:1'] / 17, scores['second:1'] / 19])
  np.testing.assert_array_equal(np.argsort(w), np.argsort(worth, kind='stable'))
  np.testing.assert_allclose(np.sort(w), 0.2 * (np.arange(28) + 0.5) / 28, rtol=1e-5)


@pytest.mark.parametrize(
  ('wrong', 'message'),
  [
    ({'scope': 'local'}, 'scope: expected uniform or global'),
    ({'scope': 'global'}, 'first:1: needs its scores'),
    ({'scores': {'first:1': np.ones(3)}}, r'first:1: has shape \(3,\)'),
  ],
)
def test_scores_that_order_nothing_are_refused(wrong, message):
  with pytest.raises(ValueError, match=message):
    trainable_gates(COUPLING, 0.5, **wrong).init({}, {})


def update(method, theta, step=0):
  """theta after one update in which the task has no gradient."""
  tx = optimizer(method, optax.sgd(0.1))
  trained = {'params': weights()['params'], 'theta': theta}
  state = tx.init(trained)
  for _ in range(step):
    _, state = tx.update(jax.tree.map(jnp.zeros_like, trained), state, trained)
  updates, _ = tx.update(jax.tree.map(jnp.zeros_like, trained), state, trained)
  return jax.tree.map(lambda w, u: np.asarray(u), theta, updates['theta'])['channels']


def test_the_penalty_moves_the_gates_of_the_full_network_alike():
  moved = update(
    trainable_gates(COUPLING, 0.5, strength=3.0, gate_lr=0.1), theta_of(16, 12)
  )
  for u in moved.values():
    np.testing.assert_allclose(u, -0.1 * 2 * 3.0 * (1 - 0.5), rtol=1e-5)


def test_gates_reopen_below_the_target_and_rest_in_the_last_quarter():
  method = trainable_gates(COUPLING, 0.9, steps=8)
  theta = theta_of(4, 3)
  assert all((u > 0).all() for u in update(method, theta, step=4).values())
  assert all((u == 0).all() for u in update(method, theta, step=6).values())


# optax's bias correction raises a float to the power of an int32 step.
@jax.numpy_dtype_promotion('standard')
def test_a_slice_closed_for_100_steps_of_adamw_keeps_its_weights():
  method = trainable_gates(COUPLING, 0.4, gate_lr=0.0)
  tx = optimizer(method, optax.adamw(1e-2, weight_decay=0.1))
  trained = {'params': weights()['params'], 'theta': theta_of(9, 4)}
  gated, x = plug(network, COUPLING), jax.random.normal(jax.random.key(1), (8, 5))

  def loss(trained):
    gates = method.forward(trained['theta'], jax.random.key(0), STEP)
    return (gated({'params': trained['params']}, gates, x) ** 2).mean()

  @jax.jit
  def step(trained, state):
    updates, state = tx.update(jax.grad(loss)(trained), state, trained)
    return optax.apply_updates(trained, updates), state

  state = tx.init(trained)
  for _ in range(100):
    trained, state = step(trained, state)
  before, after = weights()['params'], trained['params']
  np.testing.assert_array_equal(after['first'][:, 9:], before['first'][:, 9:])
  np.testing.assert_array_equal(after['second'][9:], before['second'][9:])
  np.testing.assert_array_equal(after['second'][:, 4:], before['second'][:, 4:])
  np.testing.assert_array_equal(after['last'][4:], before['last'][4:])
  assert float(jnp.abs(after['first'][:, :9] - before['first'][:, :9]).min()) > 0


@pytest.mark.parametrize(
  'of', ['flops', 'params', MILLISECONDS], ids=['flops', 'params', 'milliseconds']
)
@pytest.mark.parametrize('target', [0.3, 0.5, 0.75])
def test_training_reaches_the_target(of, target):
  """In a loop written by hand, and the gates end where the decision wants them."""
  method = trainable_gates(COUPLING, target, of, steps=120)
  tx = optimizer(method, optax.sgd(0.05))
  trained = {'params': weights()['params'], 'theta': method.init({}, {})}
  gated = plug(network, COUPLING)
  x = jax.random.normal(jax.random.key(1), (64, 5))
  y = network(weights(1), x)

  def loss(trained):
    gates = method.forward(trained['theta'], jax.random.key(0), STEP)
    return ((gated({'params': trained['params']}, gates, x) - y) ** 2).mean()

  @jax.jit
  def step(trained, state):
    updates, state = tx.update(jax.grad(loss)(trained), state, trained)
    return optax.apply_updates(trained, updates), state

  state = tx.init(trained)
  for _ in range(120):
    trained, state = step(trained, state)
  keep = method.decide(trained['theta'], {}, None)
  _, C = counted(COUPLING, of)
  assert abs(C(COUPLING, keep) / C(COUPLING, None) - target) <= 0.02
  gates = method.forward(trained['theta'], jax.random.key(0), STEP)['channels']
  moved = sum(
    int((np.asarray(gates[g] > 0) != k).sum()) for g, k in keep['channels'].items()
  )
  assert moved <= 2


def test_a_channel_that_seems_free_does_not_run_away():
  """Where the time of a group does not depend on its width, by measurement."""
  flat = timed(lambda n: 5.0 * n, lambda n, m: 1.0 * n, lambda m: 1.0)
  method = trainable_gates(COUPLING, 0.5, flat, strength=3.0, gate_lr=0.1)
  moved = update(method, theta_of(16, 12))
  assert (moved['first:1'] < 0).all() and (moved['second:1'] == 0).all()
  assert np.isfinite(moved['first:1']).all()


def test_no_price_is_below_a_tenth_of_the_mean():
  """The prices are 6 and 0.05: the second counts as 0.3025 and moves the less."""
  cheap = timed(lambda n: 5.0 * n, lambda n, m: 1.0 * n, lambda m: 1 + 0.05 * m)
  method = trainable_gates(COUPLING, 0.5, cheap, strength=3.0, gate_lr=0.1)
  moved = update(method, theta_of(16, 12))
  ratio = moved['second:1'].mean() / moved['first:1'].mean()
  assert ratio == pytest.approx(0.05 / 0.3025, rel=1e-3)


def test_a_target_that_time_does_not_allow_is_refused_with_what_remains():
  launches = timed(lambda n: 90.0, lambda n, m: 1.0 * n, lambda m: 1.0)
  with pytest.raises(ValueError, match=r'0.5 of the milliseconds cannot .* 0\.86'):
    trainable_gates(COUPLING, 0.5, launches)


def test_of_several_processes_the_times_of_the_first_hold(tmp_path, monkeypatch):
  mine = lambda session: np.array([1.0 + sum(n.values()) for _, n in session.rows])
  monkeypatch.setattr(layers.Session, 'measure', mine)
  monkeypatch.setattr('depthprune.distributed.agreed', lambda measured: 2 * measured)
  options = GateOptions(0.5, 'milliseconds', latency_batch=4)
  methods.build(options, COUPLING, 0, remember=remembering(tmp_path / 'costs.json'))
  session = layers.session(COUPLING, batch=4, round_to='auto')
  told = json.loads((tmp_path / 'costs.json').read_text())
  found = [row['milliseconds'] for row in told['table']]
  np.testing.assert_array_equal(found, 2 * mine(session))
  # Of another batch it is another table.
  options = GateOptions(0.5, 'milliseconds', latency_batch=8)
  methods.build(options, COUPLING, 0, remember=remembering(tmp_path / 'costs.json'))
  assert json.loads((tmp_path / 'costs.json').read_text())['batch'] == 8


def test_a_table_that_is_damaged_is_measured_anew(tmp_path, monkeypatch):
  measured = lambda session: np.array([1.0 + sum(n.values()) for _, n in session.rows])
  monkeypatch.setattr(layers.Session, 'measure', measured)
  (tmp_path / 'costs.json').write_text('{"batch": 4, "ta')
  options = GateOptions(0.5, 'milliseconds', latency_batch=4)
  with pytest.warns(UserWarning, match=r'costs\.json: damaged, and not looked at'):
    methods.build(options, COUPLING, 0, remember=remembering(tmp_path / 'costs.json'))
  assert json.loads((tmp_path / 'costs.json').read_text())['batch'] == 4


def test_nothing_to_gate_is_an_error():
  pinned = couple(
    lambda v, x: x @ v['params'], {'params': jnp.ones((5, 3))}, jnp.ones((1, 5))
  )
  with pytest.raises(ValueError, match='no group of channels can be gated'):
    trainable_gates(pinned)


# ---- what may be cut -----------------------------------------------------------------


def test_excluded_groups_have_no_gates_and_are_whole():
  """The first layer is left whole, so the target is met by the second alone."""
  method = trainable_gates(COUPLING, 0.5, exclude=['first*', 'params/first'])
  theta = method.init(COUPLING.gates(), {})
  assert [*theta['channels']] == ['second:1']
  assert [*method.forward(theta)['channels']] == ['second:1']
  keep = method.decide(theta, {}, None)['channels']
  assert keep['first:1'].all() and keep['first:1'].shape == (16,)
  reached = share(16, int(keep['second:1'].sum()))
  assert abs(reached - 0.5) <= min(abs(share(16, n) - 0.5) for n in range(13)) + 0.005
  assert method.penalty is not None
  penalty = method.penalty(theta_like(second=4), STEP)
  assert float(penalty) == pytest.approx(200 * (share(16, 4) - 0.5) ** 2, rel=1e-5)


def theta_like(**open_):
  """Gate weights of some groups, with so many channels open."""
  of = lambda group, n: theta_of(n, n)['channels'][group]
  return {'channels': {f'{g}:1': of(f'{g}:1', n) for g, n in open_.items()}}


def test_floors_hold_in_training_and_in_the_decision():
  method = trainable_gates(COUPLING, 0.5, at_least={'first': 14, 'second': '25%'})
  gates = method.forward(theta_of(2, 1))['channels']
  assert int(gates['first:1'].sum()) == 14 and int(gates['second:1'].sum()) == 3
  keep = method.decide(theta_of(2, 12), {}, None)['channels']
  assert keep['first:1'].sum() == 14
  assert abs(share(14, keep['second:1'].sum()) - 0.5) < 0.04


def test_ceilings_come_down_in_the_first_half_of_the_training():
  method = trainable_gates(COUPLING, 0.3, steps=100, at_most={'first': 8})
  width = lambda step: int(
    method.forward(theta_of(16, 12), None, step)['channels']['first:1'].sum()
  )
  steps = jnp.asarray([0, 25, 50, 99], jnp.int32)
  assert [width(step) for step in steps] == [16, 12, 8, 8]
  assert width(None) == 8  # evaluation, as the cut will leave it
  assert method.decide(theta_of(16, 12), {}, None)['channels']['first:1'].sum() <= 8


def test_a_ratio_for_each_group_says_how_many_and_gates_say_which():
  method = trainable_gates(COUPLING, {'first': 0.25, 'second': 6}, scores={})
  theta = method.init(COUPLING.gates(), {})
  keep = method.decide(theta, {}, None)['channels']
  for group, n in (('first:1', 4), ('second:1', 6)):
    w = np.asarray(theta['channels'][group])
    assert keep[group].sum() == n and w[keep[group]].min() > w[~keep[group]].max()
  one = trainable_gates(COUPLING, {'second': 6})
  assert [*one.init(COUPLING.gates(), {})['channels']] == ['second:1']


@pytest.mark.parametrize(
  ('arguments', 'message'),
  [
    ({'exclude': 'fist'}, "leave whole: 'fist' matches no group.* nearest: first"),
    ({'exclude': '*'}, 'all groups are to be left whole'),
    (
      {'target': 0.15, 'at_least': {'first': '50%'}},
      r'0\.15 of the flops cannot be reached.* are to stay, 0\.1656 remain',
    ),
    (
      {'target': 0.9, 'at_most': 0.5},
      r'0\.9 of the flops cannot be reached: with what at_most leaves 0\.3442 remain',
    ),
  ],
)
def test_what_cannot_be_is_refused(arguments, message):
  """8 and 1 channels of 16 and 12 are 0.1656 of the FLOPs; 8 and 6 are 0.3442."""
  with pytest.raises(ValueError, match=message):
    trainable_gates(COUPLING, **arguments)


def test_a_run_leaves_whole_what_its_options_keep():
  method = methods.build(GateOptions(0.5, keep=('first',)), COUPLING, 0)
  assert [*method.init({}, {})['channels']] == ['second:1']
  with pytest.raises(ValueError, match="'thrid' matches no group"):
    methods.build(GateOptions(0.5, keep=('thrid',)), COUPLING, 0)
