import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from depthprune.train.method import add_penalty, spare_closed

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
