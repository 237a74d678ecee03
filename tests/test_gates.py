"""The straight-through gate against the paper's literal formula; the branch gate."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from depthprune.gates import branch, straight_through, surrogate_gradient

# g and sup|g|, sup|g'| of each surrogate, written out again in numpy.
SURROGATES = {
  'constant': (lambda w: np.ones_like(w), 1.0, 0.0),
  'sigmoid': (lambda w: np.exp(-w) / (1 + np.exp(-w)) ** 2, 0.25, 0.1),
  'tanh': (lambda w: 1 / np.cosh(w) ** 2, 1.0, 0.8),
}


def literal(w, g, M):
  """TG(w; g) = b(w) + s(w) g(w) as the paper has it, in float64."""
  return (w > 0) + (M * w - np.floor(M * w)) / M * g(w)


@pytest.mark.parametrize('M', [1e3, 1e5])
@pytest.mark.parametrize('surrogate', SURROGATES)
def test_value_is_the_limit_of_the_literal_formula(surrogate, M):
  g, largest, _ = SURROGATES[surrogate]
  w = np.random.default_rng(0).normal(size=1000).astype(np.float32)
  gap = np.abs(literal(w.astype(np.float64), g, M) - straight_through(w, surrogate))
  assert gap.max() <= largest / M
  assert gap.max() > 0.9 * largest / M * g(w[np.abs(w).argmin()]) / largest


@pytest.mark.parametrize('surrogate', SURROGATES)
def test_gradient_is_that_of_the_literal_formula(surrogate):
  g, _, steepest = SURROGATES[surrogate]
  M, h = 1e3, 1e-7
  w = np.random.default_rng(1).normal(size=1000)
  inside = np.abs(M * w - np.round(M * w)) > 1e-3  # away from the jumps of the sawtooth
  slope = (literal(w + h, g, M) - literal(w - h, g, M)) / (2 * h)
  ours = jax.grad(lambda w: straight_through(w, surrogate).sum())(jnp.float32(w))
  np.testing.assert_allclose(ours, g(w), rtol=1e-5, atol=1e-7)
  assert np.abs(slope - ours)[inside].max() <= steepest / M + 1e-4


@pytest.mark.parametrize('surrogate', SURROGATES)
def test_gradient_reaches_closed_gates_and_scales_with_what_comes_back(surrogate):
  g = SURROGATES[surrogate][0]
  w, back = jnp.array([-1.5, 0.0, 0.5]), jnp.array([2.0, -3.0, 4.0])
  value, pull = jax.vjp(lambda w: straight_through(w, surrogate), w)
  np.testing.assert_array_equal(value, [0, 0, 1])
  np.testing.assert_allclose(pull(back)[0], back * g(np.asarray(w)), rtol=1e-6)
  _, forward = jax.jvp(lambda w: straight_through(w, surrogate), (w,), (back,))
  np.testing.assert_allclose(forward, pull(back)[0], rtol=1e-6)


@pytest.mark.parametrize('dtype', [jnp.float16, jnp.bfloat16])
@pytest.mark.parametrize('surrogate', SURROGATES)
def test_half_precision_never_overflows(surrogate, dtype):
  w = jnp.array([-6e4, -20, -1e-7, 0, 1e-7, 20, 6e4], dtype)
  gate = lambda w: straight_through(w, surrogate)
  value, slope = jax.jit(gate)(w), jax.vmap(jax.grad(gate))(w)
  assert value.dtype == slope.dtype == dtype
  np.testing.assert_array_equal(value.astype(float), np.asarray(w, np.float64) > 0)
  assert jnp.isfinite(slope).all() and (slope >= 0).all() and (slope <= 1).all()


def test_unknown_surrogate_is_refused_and_names_the_known():
  with pytest.raises(ValueError, match=r"'relu'.*constant, sigmoid, tanh"):
    straight_through(jnp.ones(2), 'relu')  # pyright: ignore[reportArgumentType]
  with pytest.raises(ValueError, match='unknown surrogate'):
    surrogate_gradient(jnp.ones(2), '')  # pyright: ignore[reportArgumentType]


class Gated(nn.Module):
  @nn.compact
  def __call__(self, x):
    return branch(self, nn.Dense(3, dtype=x.dtype, name='dense')(x))


def init_gated(x) -> Any:
  return Gated().init(jax.random.key(0), x)


def apply_gated(variables, x) -> Any:
  return Gated().apply(variables, x)


def test_branch_gate_is_one_at_init_multiplies_and_has_a_gradient():
  x = jnp.arange(8.0).reshape(2, 4)
  variables = init_gated(x)
  assert variables['branches'] == {'branch': 1}
  assert variables['branches']['branch'].dtype == jnp.float32
  params = {'params': variables['params']}
  output = lambda gate: apply_gated({**params, 'branches': {'branch': gate}}, x)
  plain = apply_gated(params, x)  # without the collection: identity
  np.testing.assert_array_equal(output(jnp.float32(1)), plain)
  np.testing.assert_array_equal(output(jnp.float32(0.5)), plain / 2)
  slope = jax.grad(lambda gate: output(gate).sum())(jnp.float32(0.3))
  np.testing.assert_allclose(slope, plain.sum(), rtol=1e-6)


def test_branch_gate_keeps_the_compute_type():
  x = jnp.ones((2, 4), jnp.bfloat16)
  variables = init_gated(x)
  y = apply_gated(variables, x)
  assert y.dtype == jnp.bfloat16
  assert variables['branches']['branch'].dtype == jnp.float32
