"""Auxiliary overparameterization: its loss, its search, and that it leaves no trace."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import depthprune as dp
from depthprune.methods.auxiliary import auxiliary, connections, opened, prices
from depthprune.models.auxiliary_path import beside
from depthprune.models.heads import Head, WithHeads, multitask
from depthprune.models.resnet import ResNet
from depthprune.train.step import init_state, make_step
from depthprune.train.task import classification, combine

TRUNK = ResNet(depth=8, width=4)
X = jax.random.normal(jax.random.key(0), (8, 8, 8, 3))
BATCH = {'image': X, 'label': jnp.arange(8) % 10}
TASK = classification(10)


def made(search=True):
  model = WithHeads(TRUNK, {'aux': beside(TRUNK.taps, search, width=4)})
  variables = jax.jit(model.init)(jax.random.key(1), X)
  return model, variables, dp.couple(model, variables, X[:1])


MODEL, VARIABLES, COUPLING = made()


@pytest.mark.parametrize(
  ('decay', 'left'),
  [('constant', (1, 1, 1)), ('linear', (1, 0.75, 0)), ('cosine', (1, 0.853553, 0))],
)
def test_the_loss_is_both_with_a_weight_that_decays(decay, left):
  method = auxiliary(COUPLING, weight=0.5, decay=decay, steps=8)
  draw = lambda i: jax.random.normal(jax.random.key(i), (8, 10))
  outputs = {'main': draw(1), 'aux': draw(2)}
  for step, share in zip((0, 2, 8), left, strict=True):
    loss, metrics = method.objective(TASK, outputs, BATCH, {}, jnp.int32(step))
    main, aux = (TASK.loss(outputs[name], BATCH) for name in ('main', 'aux'))
    np.testing.assert_allclose(loss, main + 0.5 * share * aux, rtol=1e-5)
    assert {'accuracy', 'accuracy_aux'} == {*metrics}


def test_gates_of_the_path_are_told_from_those_of_units():
  found = connections(COUPLING, ('aux',))
  assert len(found) == 6 and all(path.startswith('head_aux/') for path in found)
  assert any(path.startswith('trunk/') for path in COUPLING.branches)
  assert connections(made(search=False)[2], ('aux',)) == ()


def test_prices_are_flops_over_their_mean():
  c = prices(COUPLING, connections(COUPLING, ('aux',)))
  assert np.mean([*c.values()]) == pytest.approx(1)
  # 1x1 from c channels to 4, at the 16, 4 and 4 pixels of this stage or the next.
  sizes = {(0, 1): 16 * 4, (1, 1): 4 * 4, (1, 2): 4 * 8}
  sizes |= {(2, 1): 4 * 4, (2, 2): 4 * 8, (2, 3): 4 * 16}
  for (s, t), size in sizes.items():
    found = c[f'head_aux/stage{s}/stage{t}_block0/branch']
    assert found == pytest.approx(size / np.mean([*sizes.values()]), rel=1e-6)


def test_gates_are_straight_through_and_the_largest_stays_open():
  w = {'a': jnp.float32(-0.2), 'b': jnp.float32(-0.1), 'c': jnp.float32(-0.3)}
  assert {k: float(b) for k, b in opened(w).items()} == {'a': 0, 'b': 1, 'c': 0}
  slope = jax.grad(lambda w: sum(opened(w).values()))(w)
  assert {k: float(g) for k, g in slope.items()} == {'a': 1, 'b': 1, 'c': 1}


def test_early_blocks_feel_the_path():
  """The gradient of the stem is another with the path than without."""
  steps = {}
  for weight in (0.0, 1.0):
    method, tx = auxiliary(COUPLING, weight=weight, steps=1), optax.sgd(0.1)
    state = init_state(MODEL, method, tx, VARIABLES, COUPLING, BATCH)
    step = make_step(MODEL, method, TASK, tx, COUPLING)
    state, _ = step(state, BATCH, jax.random.key(0))
    kernel = lambda tree: np.asarray(tree['trunk']['stem']['conv']['kernel'])
    steps[weight] = kernel(state.params) - kernel(VARIABLES['params'])
  assert np.abs(steps[1.0] - steps[0.0]).max() > 1e-3 * np.abs(steps[0.0]).max() > 0


def test_a_connection_that_is_planted_as_useless_closes():
  """Tap `noise` says nothing of the label, tap `signal` all: only that one stays."""

  def net(v, x, **mode):
    del mode
    p, g = v['params'], v['branches']
    signal, noise = x @ p['signal'], jnp.sin(37 * x @ p['noise'])
    h = jax.nn.relu(g['signal'] * signal @ p['a'] + g['noise'] * noise @ p['b'])
    return {'main': signal @ p['main'], 'aux': h @ p['aux']}

  shapes = {'signal': (4, 4), 'noise': (4, 4), 'a': (4, 8), 'b': (4, 8)}
  shapes |= {'main': (4, 10), 'aux': (8, 10)}
  keys = jax.random.split(jax.random.key(3), len(shapes))
  params = {
    n: 0.5 * jax.random.normal(k, s)
    for k, (n, s) in zip(keys, shapes.items(), strict=True)
  }
  gates = {'signal': jnp.float32(1), 'noise': jnp.float32(1)}
  variables = {'params': params, 'branches': gates}
  x = jax.random.normal(jax.random.key(4), (256, 4))
  batch = {'image': x, 'label': (x[:, 0] > 0).astype(jnp.int32)}
  coupling = dp.couple(net, variables, x[:1])
  assert connections(coupling, ('aux',)) == ('noise', 'signal')
  method = auxiliary(coupling, price=0.02, gate_lr=0.05, steps=600)
  tx = optax.sgd(0.1)
  state = init_state(net, method, tx, variables, coupling, batch)
  step = make_step(net, method, TASK, tx, coupling)
  for _ in range(300):
    state, _ = step(state, batch, jax.random.key(0))
  open_ = method.report(state.theta)['open']
  assert {name: float(b) for name, b in open_.items()} == {'noise': 0, 'signal': 1}


def test_what_is_decided_leaves_the_compact_network():
  method = auxiliary(COUPLING, steps=1)
  keep = method.decide({}, {}, lambda keep: None)
  assert keep == {'exits': {'main': True, 'aux': False}}
  pruned = dp.prune(MODEL, VARIABLES, keep, X[:1], coupling=COUPLING)
  same = jax.tree.map(
    np.array_equal, pruned.variables['params'], {'trunk': VARIABLES['params']['trunk']}
  )
  assert jax.tree.all(same)


def test_heads_at_the_stages_are_deep_supervision():
  heads = {'aux1': Head('stage1/block0'), 'aux2': Head('stage2/block0')}
  model = WithHeads(TRUNK, heads)
  coupling = dp.couple(model, jax.jit(model.init)(jax.random.key(1), X), X[:1])
  method = auxiliary(coupling, weight=0.5)
  draw = lambda i: jax.random.normal(jax.random.key(i), (8, 10))
  outputs = {'main': draw(1), 'aux1': draw(2), 'aux2': draw(3)}
  loss, _ = method.objective(TASK, outputs, BATCH, {}, jnp.int32(0))
  main, *aside = (TASK.loss(outputs[name], BATCH) for name in outputs)
  np.testing.assert_allclose(loss, main + 0.5 * sum(aside), rtol=1e-5)
  assert method.penalty is None and method.report({}) == {}


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    ({'weight': -1.0}, 'weight: expected a finite number of 0 or more'),
    ({'price': float('nan')}, 'price: expected a finite'),
    ({'decay': 'step'}, "decay='step': expected one of constant, linear, cosine"),
    ({'decay': 'cosine'}, 'a cosine decay takes steps, got 0'),
  ],
)
def test_bad_input(changes, message):
  with pytest.raises(ValueError, match=message):
    auxiliary(COUPLING, **changes)
  coupling = dp.couple(TRUNK, jax.jit(TRUNK.init)(jax.random.key(1), X), X[:1])
  with pytest.raises(ValueError, match='auxiliary: expected a network with an exit'):
    auxiliary(coupling)
  with pytest.raises(ValueError, match=r"got main, aux and aside=\['axu'\]"):
    auxiliary(COUPLING, aside=['axu'])
  with pytest.raises(ValueError, match='a search takes steps, got 0'):
    auxiliary(COUPLING)


SEVERAL = combine({'left': TASK, 'right': classification(3)})


def of_two_tasks(search):
  sizes = {'left': 10, 'right': 3}
  base = multitask(TRUNK, sizes)
  path = beside(TRUNK.taps, search, classes=sizes, width=4)
  model = WithHeads(TRUNK, {**base.heads, 'aux': path}, base.arch)
  variables = jax.jit(model.init)(jax.random.key(1), X)
  return model, variables, dp.couple(model, variables, X[:1])


def test_a_path_answers_several_tasks():
  model, variables, coupling = of_two_tasks(search=True)
  assert {*coupling.exits} == {'left', 'right', 'aux'}
  outputs = model.apply(variables, X)
  assert outputs['aux']['right'].shape == (8, 3)
  batch = {'image': X, 'label': jnp.stack([BATCH['label'], BATCH['label'] % 3], 1)}
  method = auxiliary(coupling, weight=0.5, steps=1, aside=['aux'])
  exits = {name: outputs[name] for name in coupling.exits}
  loss, metrics = method.objective(SEVERAL, exits, batch, {}, jnp.int32(0))
  ce = lambda z, column: optax.softmax_cross_entropy_with_integer_labels(
    z, batch['label'][:, column]
  ).mean()
  both = lambda left, right: ce(left, 0) + ce(right, 1)
  own, aux = both(outputs['left'], outputs['right']), both(**outputs['aux'])
  np.testing.assert_allclose(loss, own + 0.5 * aux, rtol=1e-5)
  assert {'accuracy', 'accuracy_left', 'accuracy_aux'} <= {*metrics}
  keep = method.decide({}, {}, lambda keep: None)
  assert keep == {'exits': {'left': True, 'right': True, 'aux': False}}
  pruned = dp.prune(model, variables, keep, X[:1], coupling=coupling)
  bare = multitask(TRUNK, {'left': 10, 'right': 3})
  small = pruned.model.apply(pruned.variables, X)
  expected = bare.apply(
    {k: {n: v[n] for n in v if n != 'head_aux'} for k, v in variables.items()}, X
  )
  for name in ('left', 'right'):
    np.testing.assert_array_equal(small[name], expected[name])
  assert 'aux' not in str(jax.tree.structure(pruned.variables))


def test_several_tasks_need_the_names_of_what_helps():
  with pytest.raises(ValueError, match=r'got left, right, aux and aside=None'):
    auxiliary(of_two_tasks(search=False)[2])


def test_the_structure_is_settled_in_the_last_quarter():
  method = auxiliary(COUPLING, gate_lr=0.5, steps=8)
  tx = method.transform(optax.sgd(0.1))
  theta = method.init({}, {})
  trained = {'params': {}, 'theta': theta}
  state, ones = tx.init(trained), jax.tree.map(jnp.ones_like, trained)
  c = prices(COUPLING, connections(COUPLING, ('aux',)))
  path = next(iter(c))
  for step in range(9):
    updates, state = tx.update(ones, state, trained)
    eta = 0.5 * {0: 1, 1: 1, 2: 1, 3: 1, 4: 1, 5: 0.5}.get(step, 0)
    moved = updates['theta']['branches'][path]
    np.testing.assert_allclose(moved, -eta / c[path], rtol=1e-6)
