"""Padding that pretrained networks expect, batch normalisation's constants."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from depthprune.models.layers import ConvNorm, conv


@pytest.mark.parametrize(
  ('size', 'stride', 'expected'),
  [
    (3, 2, [[4, 6], [6, 9]]),  # 'SAME' would see 9 pixels first and 4 last
    (1, 2, [[1, 1], [1, 1]]),
    (7, 2, [[16, 16], [16, 16]]),
  ],
)
def test_padding_is_symmetric_at_stride_two(size, stride, expected):
  layer = conv(1, size, stride, dtype=jnp.float32, name='conv')
  kernel = jnp.ones((size, size, 1, 1))
  y = layer.apply({'params': {'kernel': kernel}}, jnp.ones((1, 4, 4, 1)))
  np.testing.assert_array_equal(jnp.squeeze(jnp.asarray(y)), expected)


def layer_and_variables(x) -> Any:
  layer = ConvNorm(5, size=1, relu=False)
  return layer, layer.init(jax.random.key(1), x, False)


def test_normalisation_has_momentum_point_nine_and_epsilon_1e_5():
  x = jax.random.normal(jax.random.key(0), (4, 3, 3, 2))
  layer, variables = layer_and_variables(x)
  kernel = np.asarray(variables['params']['conv']['kernel'])[0, 0]
  y = np.asarray(x).reshape(-1, 2) @ kernel
  z, new = layer.apply(variables, x, True, mutable=['batch_stats'])
  expected = (y - y.mean(0)) / np.sqrt(y.var(0) + 1e-5)
  np.testing.assert_allclose(z.reshape(-1, 5), expected, rtol=1e-3, atol=1e-4)
  stats = new['batch_stats']['norm']
  np.testing.assert_allclose(stats['mean'], 0.1 * y.mean(0), rtol=1e-4, atol=1e-6)
  np.testing.assert_allclose(stats['var'], 0.9 + 0.1 * y.var(0), rtol=1e-4)
  still = layer.apply(variables, x, False)
  np.testing.assert_allclose(
    still.reshape(-1, 5), y / np.sqrt(1 + 1e-5), rtol=1e-4, atol=1e-5
  )


def test_kernels_start_as_he_normal():
  layer = conv(64, 3, dtype=jnp.float32, name='conv')
  variables = layer.init(jax.random.key(0), jnp.ones((1, 4, 4, 64)))
  kernel = jax.tree.leaves(variables)[0]
  assert np.std(kernel) == pytest.approx(np.sqrt(2 / (9 * 64)), rel=0.02)
