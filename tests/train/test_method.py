from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from depthprune.methods.trainable_gates import trainable_gates
from depthprune.program.coupling import couple
from depthprune.train.method import add_penalty, apart, optimizer, spare_closed

# optax's bias correction raises a float to the power of an int32 step.
optax_promotion = jax.numpy_dtype_promotion('standard')


def test_penalty_in_a_loop_written_by_hand():
  """min 1/2 (w - 3)^2 + 1/2 g^2 with the second term as a penalty on g alone."""
  params = {'weights': jnp.asarray(0.0), 'gates': jnp.asarray([1.0, -1.0])}
  tx = optax.sgd(0.1)
  tx = add_penalty(tx, lambda g, step: 0.5 * (g**2).sum(), lambda p: p['gates'])
  state = tx.init(params)

  @jax.jit
  def step(params, state):
    grads = jax.grad(lambda p: 0.5 * (p['weights'] - 3.0) ** 2)(params)
    updates, state = tx.update(grads, state, params)
    return optax.apply_updates(params, updates), state

  for _ in range(20):
    params, state = step(params, state)
  shrunk = 0.9**20
  np.testing.assert_allclose(params['weights'], 3 * (1 - shrunk), rtol=1e-5)
  np.testing.assert_allclose(params['gates'], [shrunk, -shrunk], rtol=1e-5)


def test_penalty_sees_the_step():
  penalty = lambda w, step: w * step.astype(jnp.float32)
  tx = add_penalty(optax.sgd(1.0), penalty)
  state, w, seen = tx.init(jnp.asarray(0.0)), jnp.asarray(0.0), []
  for _ in range(3):
    updates, state = tx.update(jnp.asarray(0.0), state, w)
    seen.append(float(updates))
  assert seen == [0.0, -1.0, -2.0]


@optax_promotion
def test_penalty_equals_adding_it_to_the_loss_under_any_optimizer():
  params = {'a': jnp.asarray([0.5, -1.0]), 'b': jnp.asarray(2.0)}
  loss = lambda p: (p['a'] ** 2).sum() * p['b']
  penalty = lambda a, step: jnp.abs(a).sum()
  one, two = optax.adam(0.1), add_penalty(optax.adam(0.1), penalty, lambda p: p['a'])
  grads = jax.grad(lambda p: loss(p) + penalty(p['a'], 0))(params)
  expected, _ = one.update(grads, one.init(params), params)
  found, _ = two.update(jax.grad(loss)(params), two.init(params), params)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), found, expected
  )


@optax_promotion
def test_a_closed_slice_keeps_its_weights_under_adamw():
  w = jnp.asarray([[1.0, 2.0], [3.0, 4.0]])
  params = {'w': w, 'gate': jnp.asarray([1.0, 0.0])}
  openness = lambda p: {'w': p['gate'][:, None], 'gate': 1.0}
  tx = spare_closed(optax.adamw(1e-2, weight_decay=0.1), openness)
  tx = add_penalty(tx, lambda g, step: 0.0 * g.sum(), lambda p: p['gate'])
  state = tx.init(params)
  for _ in range(100):
    grads = {'w': jnp.zeros((2, 2)), 'gate': jnp.zeros(2)}
    updates, state = tx.update(grads, state, params)
    params = {**params, 'w': params['w'] + updates['w']}
  np.testing.assert_array_equal(params['w'][1], w[1])
  np.testing.assert_allclose(params['w'][0], w[0] * (1 - 1e-3) ** 100, rtol=1e-4)


@pytest.mark.parametrize(
  'wrapped',
  [
    add_penalty(optax.sgd(1.0), lambda w, step: w),
    spare_closed(optax.sgd(1.0), lambda w: w),
  ],
)
def test_missing_params_are_an_error_that_says_so(wrapped):
  with pytest.raises(ValueError, match='expected the parameters'):
    wrapped.update(jnp.asarray(0.0), wrapped.init(jnp.asarray(0.0)))


QUADRATIC = {'params': jnp.asarray([3.0, -1.0]), 'theta': jnp.asarray([0.5, 2.0])}


def far(tree, scale=1.0):
  return scale * ((tree['params'] - 1) ** 2).sum() + ((tree['theta'] + 1) ** 2).sum()


@optax_promotion
@pytest.mark.parametrize('search', ['backtracking', 'zoom', 'polyak'])
def test_a_line_search_minimises_the_sum_of_loss_and_penalty(search):
  """As if the penalty were part of the loss, and with arguments of the loss's own."""
  penalty = lambda theta, step: 5.0 * (theta**2).sum()
  both = lambda tree, scale: far(tree, scale) + penalty(tree['theta'], 0)
  tx = {
    'backtracking': lambda: optax.chain(
      optax.sgd(1.0), optax.scale_by_backtracking_linesearch(15)
    ),
    'zoom': optax.lbfgs,
    'polyak': lambda: optax.polyak_sgd(f_min=-1.0),
  }[search]()
  found = []
  for loss, each in (
    (both, tx),
    (far, add_penalty(tx, penalty, lambda tree: tree['theta'])),
  ):
    value, grad = jax.value_and_grad(loss)(QUADRATIC, 2.0)
    extra = {'value': value, 'grad': grad, 'value_fn': loss, 'scale': 2.0}
    updates, _ = each.update(grad, each.init(QUADRATIC), QUADRATIC, **extra)
    found.append(updates)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), *found)


@optax_promotion
@pytest.mark.parametrize('spared', [False, True])
@pytest.mark.parametrize('search', [optax.scale_by_zoom_linesearch(20), optax.lbfgs()])
def test_a_line_search_over_a_part_sees_the_loss_of_everything(search, spared):
  """Its step is the one it makes where the other part is a constant."""
  tx = optax.chain(optax.sgd(0.1), search)
  both = apart(tx, optax.sgd(0.1))
  if spared:
    both = spare_closed(both, lambda tree: {'params': 0.5, 'theta': 1.0})
  weights, theta = QUADRATIC['params'], QUADRATIC['theta']
  alone = lambda params: far({'params': params, 'theta': theta})
  found = []
  for loss, each, at in ((alone, tx, weights), (far, both, QUADRATIC)):
    value, grad = jax.value_and_grad(loss)(at)
    extra = {'value': value, 'grad': grad, 'value_fn': loss}
    found.append(each.update(grad, each.init(at), at, **extra)[0])
  np.testing.assert_allclose(found[1]['params'], found[0], rtol=1e-5)
  np.testing.assert_allclose(found[1]['theta'], -0.2 * (theta + 1), rtol=1e-6)


@optax_promotion
@pytest.mark.parametrize('named', [False, True])
def test_parameters_have_any_names(named):
  """Decay spares a closed slice of a plain function's arrays, as of a module's."""
  f = lambda v, x: jax.nn.relu(x @ v['a']['w']) @ v['b']['w']
  model = (lambda v, x: f(v['params'], x)) if named else f
  params = {'a': {'w': jnp.ones((2, 3))}, 'b': {'w': jnp.ones((3, 1))}}
  coupling = couple(model, {'params': params} if named else params, jnp.ones((1, 2)))
  method = trainable_gates(coupling, target=0.5)
  theta = method.init(coupling.gates(), {})
  theta = jax.tree.map(lambda g: g.at[0].set(-1.0), theta)
  tx = optimizer(method, optax.adamw(1.0, weight_decay=0.5))
  trained = {'params': params, 'theta': theta}
  none = jax.tree.map(jnp.zeros_like, trained)
  updates, _ = tx.update(none, tx.init(trained), trained)
  np.testing.assert_allclose(updates['params']['a']['w'], [[0, -0.5, -0.5]] * 2)
  with pytest.raises(ValueError, match='c/w is none of the arrays'):
    wrong = {**trained, 'params': {'c': params['a']}}
    tx.update(wrong, tx.init(wrong), wrong)


@pytest.mark.parametrize('transformation', [False, True])
def test_steps_that_are_gathered_see_the_loss(transformation):
  inner = optax.chain(optax.sgd(0.1), optax.contrib.reduce_on_plateau())
  gathered = optax.MultiSteps(inner, 2)
  made: Any = gathered.gradient_transformation() if transformation else gathered
  tx = add_penalty(made, lambda p, step: jnp.sum(p**2))
  params, more = jnp.ones(3), {'value': jnp.float32(1.0)}
  state, updates = tx.init(params), params
  with jax.numpy_dtype_promotion('standard'):  # which MultiSteps needs
    for _ in range(2):
      updates, state = tx.update(jnp.ones(3), state, params, **more)
  np.testing.assert_allclose(updates, np.full(3, -0.1 * 3), rtol=1e-5)
