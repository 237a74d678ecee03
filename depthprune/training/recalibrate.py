"""Fresh batch statistics for a network whose weights have changed."""

from collections.abc import Iterable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from depthprune.training.method import Tree, inputs_of
from depthprune.training.step import apply_of

COLLECTION = 'batch_stats'


def recalibrate(model: Any, variables: Tree, batches: Iterable[Tree]) -> Tree:
  """The variables with batch statistics averaged over `batches`.

  Every statistic becomes the plain mean of its values on the single batches (mean of
  the means, mean of the variances), whatever the momentum of the layers. Give it
  batches augmented as in training: statistics of clean images cost a ResNet-56 on
  CIFAR-10 1.7 points of accuracy, those of augmented ones 0.3.

  Works for any model whose training mode replaces a statistic s by m s + (1 - m) b
  with b taken from the batch; a statistic that does not move (m = 1) stays.

  Args:
    model: a module with `apply(variables, *inputs, train=..., mutable=...)`, or such a
      function. variables: with a 'batch_stats' collection.
    batches: {'image': [batch, ...]}, or texts, of equal size.

  Raises: ValueError when there are no batch statistics, or no batch.
  """
  if not jax.tree.leaves(variables.get(COLLECTION, {})):
    raise ValueError(
      f'recalibrate: the variables have no {COLLECTION!r} collection, got '
      f'{sorted(variables)}; a network without batch normalisation needs none'
    )
  measure = jax.jit(partial(_measure, apply_of(model)))
  total, count = None, 0
  for batch in batches:
    found = measure(variables, *inputs_of(batch))
    total = found if total is None else jax.tree.map(jnp.add, total, found)
    count += 1
  if total is None:
    raise ValueError('recalibrate: expected at least one batch, got none')
  fresh = jax.tree.map(lambda t: t / jnp.asarray(count, t.dtype), total)
  return {**variables, COLLECTION: fresh}


def _measure(apply, variables, *inputs):
  """The statistics of one batch, with the momentum undone."""
  old = variables[COLLECTION]

  def updated(stats):
    collections = {**variables, COLLECTION: stats}
    rngs = {'dropout': jax.random.key(0)}
    return apply(collections, *inputs, train=True, mutable=[COLLECTION], rngs=rngs)[1][
      COLLECTION
    ]

  # In s -> m s + (1 - m) b the slope is m, and (1 - m) b is what becomes of zero.
  zero, one = jax.tree.map(jnp.zeros_like, old), jax.tree.map(jnp.ones_like, old)
  moved, momentum = jax.jvp(updated, (zero,), (one,))

  def undo(s, moved, m):
    return jnp.where(m == 1, s, moved / jnp.where(m == 1, jnp.ones_like(m), 1 - m))

  return jax.tree.map(undo, old, moved, momentum)
