"""Optimizer states cut by the same plan: training goes on as if nothing happened."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from depthprune.program.coupling import couple
from depthprune.surgery.plan import cut, cut_optimizer, index_plan, take
from tests import masking as m
from tests.zoo import NETWORKS, image, randomised
from tests.zoo.functions import TORCH_STYLE, convolve, torch_style

SHAPES = {
  'params': {
    'one': {'kernel': (3, 3, 3, 8), 'bias': (8,)},
    'two': {'kernel': (1, 1, 8, 6), 'scale': (6,)},
    'out': {'kernel': (6, 4)},
  },
  'batch_stats': {'one': {'mean': (8,)}},
}


@pytest.fixture(autouse=True)
def promotion():
  """optax multiplies floats by integers."""
  with jax.numpy_dtype_promotion('standard'):
    yield


def network(v, x):
  p = v['params']
  mean = v['batch_stats']['one']['mean']
  h = jax.nn.relu(convolve(x, p['one']['kernel']) - mean + p['one']['bias'])
  h = jax.nn.relu(convolve(h, p['two']['kernel']) * p['two']['scale'])
  return h.mean((1, 2)) @ p['out']['kernel']


def is_shape(x) -> bool:
  return isinstance(x, tuple) and all(isinstance(n, int) for n in x)


def arrays(shapes, seed=0) -> Any:
  struct = lambda s: jax.ShapeDtypeStruct(s, jnp.float32)
  return randomised(jax.tree.map(struct, shapes, is_leaf=is_shape), seed)


def labels(params):
  return jax.tree.map_with_path(
    lambda path, _: 'slow' if 'kernel' in str(path[-1]) else 'fast', params
  )


def only_kernels(params):
  return jax.tree.map(lambda x: x.ndim > 1, params)


SLICEWISE = {  # one slice's update depends on no other slice
  'adam': optax.adam(1e-2),
  'adamw': optax.adamw(1e-2),
  'momentum': optax.sgd(optax.linear_schedule(0.1, 0.01, 9), momentum=0.9),
  'masked': optax.chain(
    optax.clip(0.1), optax.masked(optax.add_decayed_weights(1e-2), only_kernels),
    optax.scale_by_adam(), optax.scale(-1e-2),
  ),
  'multi_transform': optax.multi_transform(
    {'slow': optax.adamw(1e-3), 'fast': optax.sgd(0.1, momentum=0.5)}, labels
  ),
  'accumulated': optax.MultiSteps(optax.adam(1e-2), every_k_schedule=2),
}  # fmt: skip


def steps(tx, state, params, seed):
  """Two updates by random gradients."""
  step = update(tx)
  for i in range(2):
    updates, state = step(randomised(params, seed + i), state, params)
    params = optax.apply_updates(params, updates)
  return params, state


def update(tx):
  return m.quick(lambda gradient, state, params: tx.update(gradient, state, params))


@pytest.mark.parametrize('name', SLICEWISE)
def test_the_small_network_trains_on_with_its_part_of_the_state(name):
  """Cut after two steps, then a third: the same as three steps, cut."""
  tx, variables = SLICEWISE[name], arrays(SHAPES)
  coupling = couple(network, variables, image(2, 4))
  plan = index_plan(coupling, m.random_keep(coupling))
  cut_params = lambda p: cut({**variables, 'params': p}, plan)['params']
  params = variables['params']
  params, state = steps(tx, tx.init(params), params, 5)
  small = cut_params(params)
  small_state, anew = cut_optimizer(tx, state, params, small, plan, 'params/')
  assert not anew
  assert jax.tree.map(jnp.shape, small_state) == jax.tree.map(jnp.shape, tx.init(small))
  gradient = arrays(SHAPES['params'], 8)
  updates, state = update(tx)(gradient, state, params)
  small_updates, small_state = update(tx)(cut_params(gradient), small_state, small)
  jax.tree.map(np.testing.assert_array_equal, cut_params(updates), small_updates)
  again, _ = cut_optimizer(tx, state, params, small, plan, 'params/')
  jax.tree.map(np.testing.assert_array_equal, again, small_state)


def test_factored_statistics_start_anew_and_are_named():
  tx = optax.adafactor(1e-2, min_dim_size_to_factor=4)
  variables = arrays(SHAPES)
  coupling = couple(network, variables, image(2, 4))
  plan = index_plan(coupling, m.random_keep(coupling))
  params, state = steps(tx, tx.init(variables['params']), variables['params'], 5)
  small = cut({**variables, 'params': params}, plan)['params']
  small_state, anew = cut_optimizer(tx, state, params, small, plan, 'params/')
  fresh = tx.init(small)
  assert jax.tree.map(jnp.shape, small_state) == jax.tree.map(jnp.shape, fresh)
  for part in ('v_row', 'v_col'):  # each is a mean over an axis that was cut, or cut
    assert any(f'{part}/out/kernel' in note and 'anew' in note for note in anew)
  assert any(
    note.startswith('optimizer state 0 starts anew as a whole') for note in anew
  )
  updates, _ = update(tx)(small, small_state, small)
  assert all(np.isfinite(u).all() for u in jax.tree.leaves(updates))


def per_variable(**stored):
  """An optimizer that stores a dict of statistics for every variable."""
  init = lambda params: jax.tree.map(
    lambda p: {k: f(p) for k, f in stored.items()}, params
  )
  return optax.GradientTransformation(init, lambda g, state, params=None: (g, state))


def by_position():
  """An optimizer with a count and a list of momenta, in the order of the variables."""
  init = lambda params: {
    'count': jnp.zeros((), jnp.int32),
    'm': [jnp.zeros_like(p) for p in jax.tree.leaves(params)],
  }
  return optax.GradientTransformation(init, lambda g, state, params=None: (g, state))


def ones(state):
  return jax.tree.map(jnp.ones_like, state)


BELOW = {
  'sm3': optax.sm3(1e-2),
  'moments per variable': per_variable(m=jnp.zeros_like, v=jnp.zeros_like),
  'factors per variable': per_variable(
    row=lambda p: p.sum(0), all=jnp.zeros_like, count=lambda p: jnp.zeros(())
  ),
  'flat': optax.flatten(optax.adam(1e-2)),
  'a list': by_position(),
  'memory': optax.scale_by_lbfgs(3),
  'parts': optax.masked(optax.sm3(1e-2), {'one': True, 'two': True, 'out': False}),
}


@pytest.mark.parametrize('name', BELOW)
def test_every_leaf_of_a_state_fits_the_small_variables(name):
  """Wherever it lies: it is cut, or it starts anew and is named."""
  tx, variables = BELOW[name], arrays(SHAPES)
  coupling = couple(network, variables, image(2, 4))
  plan = index_plan(coupling, m.random_keep(coupling))
  params, small = (v['params'] for v in (variables, cut(variables, plan)))
  state = ones(tx.init(params))
  small_state, anew = cut_optimizer(tx, state, params, small, plan, 'params/')
  shapes = lambda tree: jax.tree.map(jnp.shape, tree)
  assert shapes(small_state) == shapes(jax.eval_shape(tx.init, small))
  assert bool(anew) == (name != 'moments per variable')
  if not anew:
    assert all(np.all(x == 1) for x in jax.tree.leaves(small_state))


def test_both_parts_of_complex_variables_have_their_moments_cut():
  tx = optax.contrib.split_real_and_imaginary(optax.adam(1e-2))
  params = {'w': jnp.ones((3, 4), jnp.complex64)}
  left = np.arange(4) < 2
  plan = {'w': (np.ones(3, bool), left)}
  moment = jnp.arange(12.0).reshape(3, 4)
  state = jax.tree.map(lambda x: moment if jnp.ndim(x) else x, tx.init(params))
  small_state, anew = cut_optimizer(tx, state, params, cut(params, plan), plan, '')
  assert not anew
  found = [x for x in jax.tree.leaves(small_state) if x.ndim]
  assert len(found) == 4
  for x in found:
    np.testing.assert_array_equal(x, moment[:, left])


def test_a_step_count_starts_anew_with_the_statistics_that_it_corrects():
  """And only that one: the schedule goes on, and so do moments that could be cut."""
  factored = optax.scale_by_factored_rms(min_dim_size_to_factor=4)
  rate = optax.scale_by_schedule(lambda step: -0.1)
  tx = optax.chain(optax.scale_by_adam(), factored, rate)
  params = arrays({'a': (8, 16), 'b': (16, 4)})
  left = np.arange(16) < 8
  plan = {'a': (np.ones(8, bool), left), 'b': (left, np.ones(4, bool))}
  state = jax.tree.map(lambda x: jnp.full_like(x, 7), tx.init(params))
  small = cut(params, plan)
  state, anew = cut_optimizer(tx, state, params, small, plan, '')
  adam, rms, schedule = state
  assert adam.count == schedule.count == 7 and (adam.mu['a'] == 7).all()
  jax.tree.map(np.testing.assert_array_equal, rms, factored.init(small))
  assert 'optimizer state 1 starts anew as a whole' in anew[-1]


def test_a_count_by_hand_starts_anew_too():
  """Beside the statistics, one level above them, or one for each variable."""
  row = lambda params: jax.tree.map(lambda p: p.sum(0), params)
  each = lambda params: jax.tree.map(lambda p: {'t': p.sum(), 'row': p.sum(0)}, params)
  zero = jnp.zeros((), jnp.int32)
  states = (
    lambda params: {'t': zero, 'row': row(params)},
    lambda params: (zero, row(params)),
    lambda params: {'t': zero, 'factors': {'row': row(params)}},
    lambda params: {'t': zero, 'rows': jax.tree.leaves(row(params))},
    lambda params: each(params),
  )
  params = {'w': jnp.zeros((3, 4)), 'uncut': jnp.zeros((2, 5))}
  plan = {'w': (np.ones(3, bool), np.arange(4) < 2)}
  plan['uncut'] = (np.ones(2, bool), np.ones(5, bool))
  for init in states:
    tx = optax.GradientTransformation(init, lambda g, state, params=None: (g, state))
    small = cut(params, plan)
    state, anew = cut_optimizer(tx, ones(init(params)), params, small, plan, '')
    total = sum(x.sum() for x in jax.tree.leaves(state))
    assert anew and total == (6 if init is states[-1] else 0)


def test_leaves_in_a_list_that_became_shorter_are_not_taken_for_each_other():
  tx, params = by_position(), {'a': jnp.ones(3), 'b': jnp.ones(3), 'c': jnp.ones(3)}
  plan = {'a': (np.ones(3, bool),), 'c': (np.ones(3, bool),)}
  state = {'count': jnp.int32(5), 'm': [jnp.full(3, i) for i in range(3)]}
  state, anew = cut_optimizer(tx, state, params, cut(params, plan), plan, '')
  assert len(state['m']) == 2 and not any(x.any() for x in state['m'])
  assert state['count'] == 0 and len(anew) == 3


def by_hand():
  """Momentum with a plain dict for a state, as users write it."""
  init = lambda params: {'mu': jax.tree.map(jnp.zeros_like, params)}

  def update(gradient, state, params=None):
    mu = jax.tree.map(lambda m, g: 0.9 * m + g, state['mu'], gradient)
    return mu, {'mu': mu}

  return optax.GradientTransformation(init, update)


@pytest.mark.parametrize(
  'tx',
  [
    optax.adam(1e-2),
    optax.multi_transform(
      {'a': optax.adam(1e-2), 'b': optax.adam(1e-2)}, {'w': 'a', 'mu': {'w': 'b'}}
    ),
    by_hand(),
  ],
  ids=['adam', 'one adam each', 'by hand'],
)
def test_variables_that_share_the_end_of_a_path_keep_their_own_moments(tx):
  """mu/w in the state is of w or of mu/w: the next update says whose it was."""
  params = arrays({'w': (4,), 'mu': {'w': (4,)}})
  left = np.arange(4) < 2
  plan = {'w': (left,), 'mu/w': (~left,)}
  params, state = steps(tx, tx.init(params), params, 5)
  small = cut(params, plan)
  small_state, anew = cut_optimizer(tx, state, params, small, plan, '')
  assert not anew
  gradient = randomised(params, 8)
  expected, _ = update(tx)(gradient, state, params)
  updates, _ = update(tx)(cut(gradient, plan), small_state, small)
  jax.tree.map(np.testing.assert_array_equal, cut(expected, plan), updates)


def test_a_network_may_be_one_array():
  """Its path is empty, and its moments are cut all the same."""
  tx, params = optax.adam(1e-2), arrays((3, 4))
  kept = np.array([True, False, True])
  plan = {'': (kept, np.ones(4, bool))}
  params, state = steps(tx, tx.init(params), params, 5)
  small_state, _ = cut_optimizer(tx, state, params, cut(params, plan), plan, '')
  np.testing.assert_array_equal(small_state[0].mu, state[0].mu[kept])


def test_tuples_of_layers_have_states_too():
  """Paths made of numbers: those of the state and of the arrays do not mix."""
  tx, variables = optax.adam(1e-2), arrays(TORCH_STYLE)
  coupling = couple(torch_style, variables, image(2, 4))
  keep = m.random_keep(coupling)
  plan = index_plan(coupling, keep)
  params, state = steps(tx, tx.init(variables), variables, 5)
  small = cut(params, plan)
  small_state, anew = cut_optimizer(tx, state, params, small, plan, '')
  assert not anew and isinstance(small, tuple)
  for part in ('mu', 'nu'):
    expected = m.smaller(coupling, getattr(state[0], part), keep)
    jax.tree.map(np.testing.assert_array_equal, getattr(small_state[0], part), expected)
  assert int(small_state[0].count) == 2


def test_a_state_of_another_optimizer_is_refused():
  variables = arrays(SHAPES)
  coupling = couple(network, variables, image(2, 4))
  plan = index_plan(coupling, m.random_keep(coupling))
  params, small = (v['params'] for v in (variables, cut(variables, plan)))
  for tx, state, message in (
    (optax.adam(0.1), optax.sgd(0.1).init(params), 'expected .*, got absent'),
    (optax.sgd(0.1), optax.adam(0.1).init(params), 'expected absent, got'),
    (optax.adam(0.1), optax.adam(0.1).init(small), r'expected \(8,\), got \(4,\)'),
  ):
    with pytest.raises(ValueError, match=message):
      cut_optimizer(tx, state, params, small, plan, 'params/')


@pytest.mark.parametrize(
  'name', ['resnet basic', 'vit', 'u-net', 'branching', 'square']
)
def test_the_plan_is_that_of_the_groups(name):
  """Against masks composed by other code; every array has one mask per axis."""
  case = NETWORKS[name]
  variables = case.variables()
  coupling = couple(case.model, variables, case.inputs(2))
  keep = m.random_keep(coupling)
  plan = index_plan(coupling, keep)
  expected = m.kept_slices(coupling, keep)
  assert plan.keys() == expected.keys()
  for path, masks in expected.items():
    assert all((a == b).all() for a, b in zip(masks, plan[path], strict=True))
  jax.tree.map(
    np.testing.assert_array_equal,
    cut(variables, plan), m.smaller(coupling, variables, keep),
  )  # fmt: skip


def test_closed_branches_take_their_arrays_and_empty_folders_along():
  def f(v, x):
    p = v['params']
    return (x + v['branches']['gate'] * jnp.tanh(x @ p['inner']['w'])) @ p['out']

  v = arrays({
    'params': {'inner': {'w': (3, 3)}, 'out': (3, 2)}, 'branches': {'gate': ()}
  })  # fmt: skip
  x = image(2).mean((1, 2))
  coupling = couple(f, v, x)
  plan = index_plan(coupling, {'branches': {'gate': np.array(False)}})
  assert cut(v, plan).keys() == {'params'} and cut(v, plan)['params'].keys() == {'out'}
  kept = cut(v, index_plan(coupling, {}))
  assert kept['params'].keys() == {'inner', 'out'} and 'branches' not in kept


def test_an_array_without_a_slice_left_is_absent():
  coupling = couple(network, arrays(SHAPES), image(2, 4))
  plan = index_plan(coupling, {'channels': {'one:3': np.zeros(8, bool)}})
  assert plan.keys() == {'params/two/scale', 'params/out/kernel'}


def test_take_works_while_tracing():
  masks = (np.array([True, False, True]), np.ones(2, bool))
  x = jnp.arange(6.0).reshape(3, 2)
  np.testing.assert_array_equal(jax.jit(lambda x: take(x, masks))(x), x[::2])
  assert take(x, (np.ones(3, bool), np.ones(2, bool))) is x
