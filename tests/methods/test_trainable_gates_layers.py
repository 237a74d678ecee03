"""Trainable gates of whole layers, beside those of channels."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import depthprune as dp
from depthprune import methods
from depthprune.methods.trainable_gates import GateOptions, trainable_gates
from depthprune.models.decoder import Decoder
from depthprune.program import cost
from depthprune.program.coupling import couple
from depthprune.train.method import openness
from depthprune.train.options import ConfigError
from depthprune.train.starts import START

WIDTH, INNER = 8, 6
UNITS = 'one', 'two', 'three'
STEP = jnp.zeros((), jnp.int32)


def network(variables, x, train=False):
  del train
  p = variables['params']
  h = x @ p['first']
  for unit in UNITS:
    inner = jax.nn.relu(h @ p[unit]['into'])
    h = h + variables['branches'][unit]['branch'] * (inner @ p[unit]['out'])
  return h @ p['last']


def weights(seed=0):
  keys = iter(jax.random.split(jax.random.key(seed), 8))
  draw = lambda *shape: jax.random.normal(next(keys), shape) / np.sqrt(shape[0])
  unit = lambda: {'into': draw(WIDTH, INNER), 'out': draw(INNER, WIDTH)}
  return {
    'params': {
      'first': draw(5, WIDTH), **{u: unit() for u in UNITS}, 'last': draw(WIDTH, 3),
    },
    'branches': {u: {'branch': jnp.ones(())} for u in UNITS},
  }  # fmt: skip


COUPLING = couple(network, weights(), jnp.ones((1, 5)))
BRANCHES = tuple(f'{unit}/branch' for unit in UNITS)


def flops(stream, *inner):
  """Of the network with so many channels, by hand; 0 inner ones are no unit."""
  return 2 * stream * (5 + 2 * sum(inner) + 3)


FULL = flops(8, 6, 6, 6)


def theta_of(stream, *inner, branches=(1, 1, 1)):
  """Gate weights with so many channels open, and these of the branches."""
  w = lambda size, n: jnp.where(jnp.arange(size) < n, 0.1, -0.1)
  channels = {'first:1': w(WIDTH, stream)}
  channels |= {f'{u}/into:1': w(INNER, n) for u, n in zip(UNITS, inner, strict=True)}
  own = zip(BRANCHES, branches, strict=True)
  return {'channels': channels, 'branches': {b: jnp.asarray(w, float) for b, w in own}}


def decided(method, theta):
  keep = method.decide(theta, {}, None)
  return [bool(keep['branches'][b]) for b in BRANCHES], keep


def test_a_closed_layer_costs_nothing_by_hand():
  assert cost.flops(COUPLING) == FULL
  method = trainable_gates(COUPLING, 0.5, strength=7.0, layers=True)
  theta = theta_of(8, 6, 3, 6, branches=(1, 1, -1))
  share = flops(8, 6, 3) / FULL
  assert method.penalty is not None
  assert float(method.penalty(theta, STEP)) == pytest.approx(7 * (share - 0.5) ** 2)


def test_the_slope_of_a_layer_is_what_it_costs():
  """Divided by its price in the full network, which all gates move alike."""
  method = trainable_gates(COUPLING, 0.5, strength=3.0, gate_lr=0.1, layers=True)
  trained = {'params': weights()['params'], 'theta': theta_of(8, 6, 6, 6)}
  tx = dp.optimizer(method, optax.sgd(0.1))
  zeros = jax.tree.map(jnp.zeros_like, trained)
  moved, _ = tx.update(zeros, tx.init(trained), trained)
  for u in jax.tree.leaves(moved['theta']):
    np.testing.assert_allclose(u, -0.1 * 2 * 3.0 * (1 - 0.5), rtol=1e-5)


def test_the_decision_is_the_sign_of_the_weights_where_that_is_on_target():
  target = flops(8, 6, 3) / FULL
  method = trainable_gates(COUPLING, target, layers=True)
  kept, keep = decided(method, theta_of(8, 6, 3, 6, branches=(1, 0.1, -0.1)))
  assert kept == [True, True, False]
  assert cost.flops(COUPLING, keep) == flops(8, 6, 3)


@pytest.mark.parametrize(
  ('branches', 'inner', 'expected'),
  [
    ((1.0, 0.01, 1.0), (6, 6), [True, False, True]),  # too much: the nearest closes
    ((1.0, -0.01, -1.0), (6, 6), [True, True, False]),  # too little: it opens
  ],
)
def test_off_target_the_layer_nearest_to_zero_moves(branches, inner, expected):
  method = trainable_gates(COUPLING, flops(8, *inner) / FULL, layers=True)
  theta = theta_of(8, 6, 6, 6, branches=branches)
  theta['channels'] = jax.tree.map(lambda w: 10 * w, theta['channels'])
  kept, keep = decided(method, theta)
  assert kept == expected and cost.flops(COUPLING, keep) == flops(8, *inner)


def test_layers_reach_a_target_that_channels_do_not():
  whole = {'at_least': '100%'}
  target = flops(8) / FULL
  with pytest.raises(ValueError, match='nothing to cut'):
    trainable_gates(COUPLING, target, **whole)
  method = trainable_gates(COUPLING, target, **whole, layers=True)
  kept, keep = decided(method, method.init(COUPLING.gates(), {}))
  assert kept == [False] * 3 and cost.flops(COUPLING, keep) == flops(8)
  assert flops(1) / FULL == pytest.approx(0.0227, abs=1e-4)
  least = r'1 channel.* and without the layers that may go 0\.0227 remain'
  with pytest.raises(ValueError, match=least):
    trainable_gates(COUPLING, 0.02, layers=True)


@pytest.mark.parametrize('useful', range(3))
def test_the_layer_that_matters_stays(useful):
  """Two layers change the answer little, and start farther from closing."""
  variables = weights()
  variables['params']['last'] *= 5  # of a loss that counts beside the target
  for i, unit in enumerate(UNITS):
    if i != useful:
      out = variables['params'][unit]['out']
      variables['params'][unit]['out'] = 0.05 * out
  scores = {b: np.asarray(1.0 + (i != useful)) for i, b in enumerate(BRANCHES)}
  x = np.asarray(jax.random.normal(jax.random.key(1), (256, 5)))
  method = trainable_gates(
    COUPLING, flops(8, 6) / FULL, at_least='100%', layers=True, scores=scores,
    steps=80, gate_lr=2e-3,
  )  # fmt: skip
  tx, task = optax.set_to_zero(), dp.regression(3)
  step = dp.make_step(network, method, task, tx, COUPLING)
  state = dp.init_state(network, method, tx, variables, COUPLING)
  data = x, np.asarray(network(variables, x))
  state = dp.fit(step, state, jax.random.key(0), data, batch=32, steps=80)
  kept, keep = decided(method, jax.device_get(state.theta))
  assert kept == [i == useful for i in range(3)]
  small = dp.prune(network, variables, keep, x[:1], coupling=COUPLING)
  assert cost.flops(couple(small.apply, small.variables, x[:1])) == flops(8, 6)


# ---- where gates start ---------------------------------------------------------------


def starts(scores=None, **arguments):
  method = trainable_gates(COUPLING, 0.5, layers=True, scores=scores, **arguments)
  theta = method.init({}, {})
  return theta['channels'], [float(theta['branches'][b]) for b in BRANCHES]


def test_without_scores_the_later_layers_start_nearer_to_closing():
  channels, layers = starts()
  expected = START * (0.5 + 1.5 * np.array([2.5, 1.5, 0.5]) / 3)
  np.testing.assert_allclose(layers, expected, rtol=1e-6)
  alone = trainable_gates(COUPLING, 0.5).init({}, {})
  assert alone.keys() == {'channels'}  # as checkpoints have it
  jax.tree.map(np.testing.assert_array_equal, channels, alone['channels'])


def test_with_scores_they_start_in_their_order():
  _, layers = starts(dict(zip(BRANCHES, np.float32([2, 9, 1]), strict=True)))
  expected = START * (0.5 + 1.5 * np.array([1.5, 2.5, 0.5]) / 3)
  np.testing.assert_allclose(layers, expected, rtol=1e-6)


def test_of_layers_that_matter_alike_the_dearest_starts_nearest_to_closing():
  """A layer that is twice as wide, and so twice as dear."""
  variables = weights()
  into, out = (jnp.ones(shape) for shape in ((WIDTH, 2 * INNER), (2 * INNER, WIDTH)))
  variables['params']['two'] = {**variables['params']['two'], 'into': into, 'out': out}
  coupling = couple(network, variables, jnp.ones((1, 5)))
  scores = dict(zip(BRANCHES, np.float32([2, 3, 1]), strict=True))
  method = trainable_gates(coupling, 0.5, layers=True, scores=scores)
  first, two, three = (method.init({}, {})['branches'][b] for b in BRANCHES)
  assert first > two > three
  scores[BRANCHES[1]] = np.float32(1.9)  # by its price 0.95, where the third has 1
  method = trainable_gates(coupling, 0.5, layers=True, scores=scores)
  first, two, three = (method.init({}, {})['branches'][b] for b in BRANCHES)
  assert first > three > two
  scores = dict(zip(BRANCHES, np.float32([-1, -1, 1]), strict=True))
  method = trainable_gates(coupling, 0.5, layers=True, scores=scores)
  first, two, three = (method.init({}, {})['branches'][b] for b in BRANCHES)
  assert three > first > two  # also of layers that seem to do harm


def test_some_channels_start_nearer_to_closing_than_all_layers():
  channels, layers = starts()
  assert all(min(w) < START / 2 < min(layers) for w in channels.values())


def test_globally_they_start_in_the_order_of_score_by_price():
  """A layer costs 192 FLOPs, an inner channel 32, one of the stream 88."""
  scores = {g: np.ones(gate.size) for g, gate in COUPLING.gates()['channels'].items()}
  scores |= dict(zip(BRANCHES, [np.float32(x) for x in (5.9, 6.1, 2.1)], strict=True))
  channels, layers = starts(scores, scope='global')
  stream, inner = channels.pop('first:1'), np.concatenate([*channels.values()])
  assert layers[2] < stream.min() and stream.max() < layers[0] < inner.min()
  assert inner.max() < layers[1]
  with pytest.raises(ValueError, match='three/branch: needs its scores'):
    starts({k: v for k, v in scores.items() if k != 'three/branch'}, scope='global')


# ---- networks ------------------------------------------------------------------------


def test_layers_of_a_scan_have_one_gate_for_all_of_their_branches():
  model = Decoder(
    vocab=11,
    positions=8,
    width=8,
    depth=4,
    heads=2,
    groups=1,
    size=4,
    inner=12,
    scan=True,
  )
  tokens = jnp.ones((1, 8), jnp.int32)
  variables = model.init(jax.random.key(0), tokens)
  coupling = couple(model, variables, tokens)
  assert len(coupling.branches) == 2
  method = trainable_gates(coupling, 0.5, 'params', layers=True)
  theta = jax.device_get(method.init(coupling.gates(), {}))
  (name,) = theta['branches']
  assert theta['branches'][name].shape == (4,)
  theta['branches'][name] = np.float32([0.1, -0.1, 0.1, -0.1])
  theta['channels'] = {g: np.abs(w) + 1 for g, w in theta['channels'].items()}
  gates = method.forward(theta)['branches']
  for branch in coupling.branches:
    np.testing.assert_array_equal(gates[branch], [1, 0, 1, 0])
  keep = method.decide(theta, {}, None)
  share = cost.params(coupling, keep) / cost.params(coupling)
  assert abs(share - 0.5) < 0.1
  small = dp.prune(model, variables, keep, tokens, coupling=coupling)
  assert small.report['verify']['difference'] < 1e-4
  left = [bool(x) for x in keep['branches'][name]]
  stacked = jax.tree.leaves(small.variables['params']['layers0'])
  assert sum(left) < 4 and {len(x) for x in stacked} == {sum(left)}


def test_weight_decay_spares_the_arrays_of_a_closed_layer():
  gates = {'branches': {b: jnp.float32(b != 'two/branch') for b in BRANCHES}}
  found = openness(COUPLING, gates, weights()['params'])
  assert {k: float(np.min(jax.tree.leaves(v)[0])) for k, v in found.items()} == {
    'first': 1, 'one': 1, 'two': 0, 'three': 1, 'last': 1,
  }  # fmt: skip


# ---- what is refused -----------------------------------------------------------------


def test_what_is_to_be_left_whole_does_not_go_with_a_layer():
  may_go = lambda exclude: {
    *trainable_gates(COUPLING, 0.5, exclude=exclude, layers=True).init({}, {})[
      'branches'
    ]
  }
  assert may_go('two/out') == may_go('two') == may_go('two/into:1')
  assert may_go('two') == {'one/branch', 'three/branch'}
  assert may_go('first') == {*BRANCHES}  # the stream stays where a layer goes


@pytest.mark.parametrize(
  ('wrong', 'message'),
  [
    ({'exclude': ['one', 'two', 'three']}, 'layers: no layer .* exclude leaves none'),
    ({'target': {'one': 3}}, 'layers: a target in channels does not say'),
    ({'of': 'milliseconds'}, 'layers: .*milliseconds'),
    (
      {'scores': {'one/branch': np.ones(2)}},
      r'one/branch: has shape \(2,\), expected \(\)',
    ),
    ({'scores': {'one/brunch': np.ones(())}}, 'no such group'),
    ({'scores': {'one/branch': np.float32(np.nan)}}, 'its scores are not finite'),
  ],
)
def test_what_cannot_be_is_refused(wrong, message):
  with pytest.raises((ValueError, KeyError), match=message):
    trainable_gates(COUPLING, **{'target': 0.5, **wrong}, layers=True).init({}, {})


def test_layers_is_no_pattern():
  with pytest.raises(TypeError, match='layers: expected True or False'):
    trainable_gates(COUPLING, 0.5, layers='one/*')


def test_a_network_without_branches_says_how_to_get_them():
  net = lambda v, x: jnp.tanh(x @ v['a']) @ v['b']
  coupling = couple(net, {'a': jnp.ones((3, 4)), 'b': jnp.ones((4, 2))}, jnp.ones(3))
  with pytest.raises(ValueError, match=r'no layer .*dp\.trunk'):
    trainable_gates(coupling, 0.5, layers=True)


def test_a_run_gates_layers_where_its_options_say_so():
  with pytest.raises(ConfigError, match='milliseconds know the widths'):
    GateOptions(layers=True, of='milliseconds')
  method = methods.build(GateOptions(0.5, layers=True), COUPLING, 0)
  assert method.init({}, {}).keys() == {'channels', 'branches'}
  assert GateOptions(0.5, layers=True).label == 'flops50-layers'


# ---- what once went wrong ------------------------------------------------------------


def stacked(branches=1):
  """A function with three layers in a scan, each with so many branches, and its gates.

  No code for gates is in it; `dp.trunk` finds the units.
  """
  keys = iter(jax.random.split(jax.random.key(0), 9))
  draw = lambda *shape: jax.random.normal(next(keys), shape) / np.sqrt(shape[-2])
  layer = {str(i): (draw(3, 8, 6), draw(3, 6, 8)) for i in range(branches)}
  variables = {'first': draw(5, 8), 'layers': layer, 'last': draw(8, 3)}

  def run(p, x):
    def body(h, q):
      for into, out in q.values():
        h = h + jax.nn.relu(h @ into) @ out
      return h, None

    return jax.lax.scan(body, x @ p['first'], p['layers'])[0] @ p['last']

  x = jnp.ones((1, 5))
  net = dp.trunk(run, variables, x)
  variables = net.init(jax.random.key(0), x)
  return net, variables, couple(net, variables, x)


def test_an_array_of_a_stack_that_is_to_be_left_whole_keeps_all_layers():
  _, _, coupling = stacked()
  (array,) = (p for p in coupling.axes if p.endswith('layers/0/0'))
  with pytest.raises(ValueError, match='exclude leaves none'):
    trainable_gates(coupling, 0.7, layers=True, exclude=array, at_least='100%')


def test_weight_decay_spares_the_closed_layers_of_a_stack():
  _, variables, coupling = stacked()
  gates = {'branches': {b: jnp.float32([1, 0, 1]) for b in coupling.branches}}
  found = openness(coupling, gates, variables['params'])
  of_layers = [x for x in jax.tree.leaves(found) if jnp.ndim(x)]
  assert len(of_layers) == 2
  for each in of_layers:
    np.testing.assert_array_equal(np.ravel(each), [1, 0, 1])


def test_of_arrays_that_two_layers_share_one_layer_stays():
  def tied(v, x):
    p, b = v['params'], v['branches']
    h = x @ p['first']
    for unit in ('one', 'two'):
      h = h + b[unit]['branch'] * (jax.nn.relu(h @ p['into']) @ p['out'])
    return h @ p['last']

  own = weights()
  own['params'] |= own['params']['one']
  own['params'] = {k: own['params'][k] for k in ('first', 'into', 'out', 'last')}
  del own['branches']['three']
  coupling = couple(tied, own, jnp.ones((1, 5)))
  method = trainable_gates(coupling, 0.8, layers=True, exclude='into')
  assert [*method.init({}, {})['branches']] == ['one/branch']
  assert len(trainable_gates(coupling, 0.8, layers=True).init({}, {})['branches']) == 2


@pytest.mark.parametrize(
  ('target', 'branches', 'closed'),
  [(0.85, (1, 0.01, 1), 0), (0.6, (-1, 0.01, -0.02), 1)],
)
def test_a_layer_is_not_moved_beyond_a_target_that_channels_meet(
  target, branches, closed
):
  """From above, channels alone meet it; from below, a layer opens and channels go."""
  method = trainable_gates(COUPLING, target, layers=True)
  theta = theta_of(8, 6, 6, 6, branches=branches)
  theta['channels'] = jax.tree.map(
    lambda w: 10 * w - jnp.arange(w.size) / 100, theta['channels']
  )
  kept, keep = decided(method, theta)
  assert kept.count(False) == closed
  assert cost.flops(COUPLING, keep) / FULL == pytest.approx(target, abs=0.02)


def test_a_layer_that_costs_nothing_has_a_finite_price():
  def net(v, x):
    p, b = v['params'], v['branches']
    h = x @ p['first']
    h = h + b['free']['branch'] * jnp.tanh(h * p['scale'])
    return (h + b['one']['branch'] * (jax.nn.relu(h @ p['into']) @ p['out'])) @ p[
      'last'
    ]

  own = weights()['params']
  variables = {
    'params': {k: own[k] for k in ('first', 'last')} | own['one'],
    'branches': {k: {'branch': jnp.ones(())} for k in ('free', 'one')},
  }
  variables['params']['scale'] = jnp.ones(8)
  coupling = couple(net, variables, jnp.ones((1, 5)))
  method = trainable_gates(coupling, 0.6, layers=True, gate_lr=1e-3)
  trained = {'params': variables['params'], 'theta': method.init({}, {})}
  tx = dp.optimizer(method, optax.sgd(0.1))
  ones = jax.tree.map(jnp.ones_like, trained)
  moved, _ = tx.update(ones, tx.init(trained), trained)
  assert all(jnp.isfinite(u).all() for u in jax.tree.leaves(moved))


def test_gates_that_were_trained_before_are_refused():
  variables = weights()
  variables['branches']['two']['branch'] = jnp.float32(0.5)
  method = trainable_gates(COUPLING, 0.5, layers=True)
  with pytest.raises(ValueError, match=r'two/branch: its gate is 0\.5, expected 1'):
    dp.init_state(network, method, optax.sgd(0.1), variables, COUPLING)


def test_the_scores_of_branches_that_share_a_gate_are_added():
  _, _, coupling = stacked(branches=2)
  first, second = coupling.branches
  scores = {first: np.float32([4, 3, 2]), second: np.float32([0, 0, 1000])}
  of = lambda scores: trainable_gates(coupling, 0.5, layers=True, scores=scores)
  (w,) = of(scores).init({}, {})['branches'].values()
  np.testing.assert_array_equal(np.argsort(w), [1, 0, 2])
  for one in (first, second):
    with pytest.raises(ValueError, match='needs its scores'):
      of({one: scores[one]})
  with pytest.raises(ValueError, match=r'has shape \(\), expected \(3,\)'):
    of({first: scores[first], second: np.float32(1)})


def test_a_gate_of_several_axes_is_no_layer():
  def deep(v, x):
    p, gates = v['params'], v['branches']['s']['branch']
    inner = lambda h, q: (h + q[1] * (jax.nn.relu(h @ q[0][0]) @ q[0][1]), None)
    outer = lambda h, q: (jax.lax.scan(inner, h, q)[0], None)
    return jax.lax.scan(outer, x @ p['first'], (p['s'], gates))[0] @ p['last']

  p = {k: weights()['params'][k] for k in ('first', 'last')}
  p['s'] = jnp.ones((2, 3, 8, 6)), jnp.ones((2, 3, 6, 8))
  variables = {'params': p, 'branches': {'s': {'branch': jnp.ones((2, 3))}}}
  coupling = couple(deep, variables, jnp.ones((1, 5)))
  with pytest.raises(ValueError, match='no layer .* its gate has 2 axes'):
    trainable_gates(coupling, 0.5, layers=True)
