"""How the weights of a run are trained: the optimizer and its learning rate."""

import jax
import jax.numpy as jnp
import optax

from depthprune.config import Config
from depthprune.training.method import Tree


def optimizer(config: Config, peak: float, steps: int) -> optax.GradientTransformation:
  """What the config asks for: `sgd` below, or Adam, at a constant rate or scheduled."""
  if config.optimizer == 'sgd':
    return sgd(peak, steps, config.weight_decay)
  rate = peak if config.optimizer == 'adam' else scheduled(peak, steps)
  return optax.adamw(rate, weight_decay=config.weight_decay, mask=_kernels)


def sgd(peak: float, steps: int, weight_decay: float) -> optax.GradientTransformation:
  """Nesterov momentum 0.9, cosine to zero after a warm-up, decay of kernels only.

  Args:
    peak: learning rate after the warm-up, which is a twentieth of all `steps`.
    weight_decay: its gradient, weight_decay * kernel, goes through the momentum.
  """
  return optax.chain(
    optax.add_decayed_weights(weight_decay, mask=_kernels),
    optax.sgd(scheduled(peak, steps), momentum=0.9, nesterov=True),
  )


def scheduled(peak: float, steps: int) -> optax.Schedule:
  """(step) -> learning rate of `cosine`."""
  return lambda step: cosine(jnp.asarray(step), peak, steps)


def cosine(step: jax.Array, peak: float, steps: int) -> jax.Array:
  """Learning rate of a step: linear warm-up to peak, then half a cosine to zero."""
  t, warm = step.astype(jnp.float32), max(1, steps // 20)
  up = (t + 1) / warm
  down = 0.5 * (1 + jnp.cos(jnp.pi * jnp.clip((t - warm) / max(1, steps - warm), 0, 1)))
  return peak * jnp.minimum(up, down)


def _kernels(params: Tree) -> Tree:
  is_kernel = lambda path, _: getattr(path[-1], 'key', None) == 'kernel'
  return jax.tree_util.tree_map_with_path(is_kernel, params)
