"""The plain conv network: what a layer is, what the head reads."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from depthprune.models.convnet import ConvNet


def test_a_layer_is_convolution_with_bias_normalisation_relu(randomised):
  x = jax.random.normal(jax.random.key(0), (2, 6, 6, 3))
  model = ConvNet(layers=1, width=4, size=5, classes=3)
  variables = jax.tree.map(np.asarray, randomised(model, x))
  outputs = model.apply(variables, x)
  layer, norm = variables['params']['layer0'], variables['batch_stats']['layer0']
  padded = np.pad(x, ((0, 0), (2, 2), (2, 2), (0, 0)))
  rows = [padded[:, i : i + 6, j : j + 6] for i in range(5) for j in range(5)]
  kernel = layer['conv']['kernel'].reshape(25, 3, 4)
  y = sum(row @ k for row, k in zip(rows, kernel)) + layer['conv']['bias']
  y = (y - norm['norm']['mean']) / np.sqrt(norm['norm']['var'] + 1e-5)
  y = np.maximum(y * layer['norm']['scale'] + layer['norm']['bias'], 0)
  np.testing.assert_allclose(outputs['layer0'], y, rtol=1e-4, atol=1e-4)
  head = variables['params']['head']
  logits = y.max((1, 2)) @ head['kernel'] + head['bias']
  np.testing.assert_allclose(outputs['main'], logits, rtol=1e-4, atol=1e-4)


def test_every_layer_keeps_the_resolution():
  x = jnp.ones((2, 7, 5, 1))
  model = ConvNet(layers=3, width=4, size=3)
  outputs, _ = jax.eval_shape(model.init_with_output, jax.random.key(0), x)
  assert model.taps == ('layer0', 'layer1', 'layer2')
  assert {outputs[tap].shape for tap in model.taps} == {(2, 7, 5, 4)}


def test_even_kernels_are_refused():
  with pytest.raises(ValueError, match='must be odd to keep images whole: 4'):
    ConvNet(size=4)
