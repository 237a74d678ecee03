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
  flat = {
    jax.tree_util.keystr(p): x
    for p, x in jax.tree_util.tree_leaves_with_path(small_state)
  }
  bias = [x for path, x in flat.items() if "['bias']" in path and x.size > 1]
  assert any(np.abs(x).max() > 0 for x in bias)  # what is not factored is carried over
  updates, _ = update(tx)(small, small_state, small)
  assert all(np.isfinite(u).all() for u in jax.tree.leaves(updates))


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
