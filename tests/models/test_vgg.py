"""VGG: parameters in closed form, pools as many as the image allows."""

import jax
import jax.numpy as jnp
import pytest

from depthprune.models import build
from depthprune.models.vgg import VGG

LAYOUT = {
  'vgg16': (64, 64, 128, 128, 256, 256, 256, 512, 512, 512, 512, 512, 512),
  'vgg19': (64, 64, 128, 128) + (256,) * 4 + (512,) * 8,
}


@pytest.mark.parametrize('name', LAYOUT)
def test_parameters_equal_the_closed_form(name):
  widths = LAYOUT[name]
  kernels = sum(9 * a * b for a, b in zip((3, *widths[:-1]), widths))
  expected = kernels + 2 * sum(widths) + 512 * 10 + 10
  shapes = jax.eval_shape(build(name).init, jax.random.key(0), jnp.ones((1, 32, 32, 3)))
  assert sum(leaf.size for leaf in jax.tree.leaves(shapes['params'])) == expected


@pytest.mark.parametrize(
  ('size', 'resolutions'),
  [(8, [8, 4, 2, 1, 1]), (28, [28, 14, 7, 3, 1]), (32, [32, 16, 8, 4, 2])],
)
def test_pools_are_capped_by_the_image(size, resolutions):
  model = VGG(blocks=(1, 1, 2, 2, 2), width=4)
  x = jnp.ones((2, size, size, 1))
  outputs, _ = jax.eval_shape(model.init_with_output, jax.random.key(0), x)
  ends = [outputs[f'stage{i}/block0'].shape for i in range(1, 6)]
  assert ends == [
    (2, r, r, c) for r, c in zip(resolutions, (4, 8, 16, 32, 32), strict=True)
  ]
  assert outputs['main'].shape == (2, 10)
