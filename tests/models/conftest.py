"""Random arrays for a model without running `init`, which takes long to compile."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest


@pytest.fixture(scope='session')
def randomised():
  """(model, x, seed=0) → variables in the shapes of `init`, all of them random."""

  def arrays(model, x, seed=0):
    draw = np.random.default_rng(seed)

    def leaf(path, shape):
      if path[-1].key == 'kernel':
        scale = np.sqrt(2 / np.prod(shape.shape[:-1]))
        return jnp.asarray(draw.normal(size=shape.shape) * scale, jnp.float32)
      return jnp.asarray(draw.uniform(0.5, 1.5, shape.shape), jnp.float32)

    shapes = jax.eval_shape(model.init, jax.random.key(0), x)
    return jax.tree_util.tree_map_with_path(leaf, shapes)

  return arrays
