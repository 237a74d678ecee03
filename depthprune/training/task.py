"""What a task is: functions of the logits of a network and of a batch."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

Tree = Any
"""A nested dict (or any other pytree) of arrays."""


def main(outputs: Tree) -> jax.Array:
  """A network's answer: 'main', or its only output. Raises ValueError for neither."""
  if 'main' in outputs:
    return outputs['main']
  if len(outputs) == 1:
    return next(iter(outputs.values()))
  raise ValueError(
    f"expected an output 'main', or a single one, got {', '.join(outputs)}: which of "
    'them answers? Drop all exits but one, or use a method that weighs them'
  )


class Task(NamedTuple):
  """Logits are an array, or of several tasks a dict of them.

  Attributes:
    loss: (logits, batch) -> scalar, the mean over the batch.
    metrics: (logits, batch) -> {name: scalar}, means over the batch.
    log_probs: (logits) -> log-probabilities of the same shape.
    sums: (logits, batch) -> tree of sums over the batch, to be added over batches.
    scores: (sums of all batches) -> {'loss', 'accuracy', ...} of the whole data set, in
      numpy; leaves may have more axes in front, which all scores then have.
    answer: (outputs of a network by name) -> logits, those that the others take.

  What a data set has and a mean over its batches is not, such as a mean IoU, is among
  the scores but not the metrics. Where a batch has a 'weight' entry (float, [batch], 0
  for padding), means and sums are weighted by it.
  """

  loss: Callable[[Tree, Any], jax.Array]
  metrics: Callable[[Tree, Any], dict[str, jax.Array]]
  log_probs: Callable[[Tree], Tree]
  sums: Callable[[Tree, Any], Tree]
  scores: Callable[[Tree], dict[str, np.ndarray]]
  answer: Callable[[Tree], Tree] = main


def mean(values: jax.Array, batch: Any) -> jax.Array:
  """Mean over the batch axis, weighted by the batch's 'weight' if it has one."""
  weight = batch.get('weight')
  if weight is None:
    return values.mean()
  weight = weight.astype(values.dtype)
  # A batch of padding alone has mean 0, not NaN.
  return (values * weight).sum() / jnp.maximum(weight.sum(), 1e-9)
