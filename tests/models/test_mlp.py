"""The perceptron: sizes, taps, scan."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from depthprune.models.mlp import MLP


@pytest.mark.parametrize(('layers', 'expected'), [(1, 159_010), (5, 319_810)])
def test_parameters_equal_the_closed_form(layers, expected):
  model = MLP(hidden=(200,) * layers)
  shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.ones((1, 28, 28, 1)))
  assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == expected


def test_taps_are_the_layers_and_main_reads_the_last():
  x = jnp.linspace(-1, 1, 12).reshape(3, 2, 2)
  model = MLP(classes=2, hidden=(5, 4))
  outputs, variables = model.init_with_output(jax.random.key(0), x)
  params = jax.tree.map(np.asarray, variables['params'])
  first = params['layer0']['dense']
  expected = np.maximum(x.reshape(3, 4) @ first['kernel'] + first['bias'], 0)
  np.testing.assert_allclose(outputs['layer0'], expected, rtol=1e-5, atol=1e-6)
  head = params['head']
  expected = outputs['layer1'] @ head['kernel'] + head['bias']
  np.testing.assert_allclose(outputs['main'], expected, rtol=1e-5, atol=1e-6)


def test_scan_needs_layers_of_one_width():
  with pytest.raises(ValueError, match=r'one width, got \(8, 4\)'):
    MLP(hidden=(8, 4), scan=True)
