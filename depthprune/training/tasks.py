"""What a network is trained for: loss and metrics of its logits on a batch."""

from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax


class Task(NamedTuple):
  """Attributes:
  loss: (logits, batch) -> scalar, the mean over the batch.
  metrics: (logits, batch) -> {name: scalar}, means over the batch.
  log_probs: (logits) -> log-probabilities of the same shape.

  Where a batch has a 'weight' entry (float, [batch], 0 for padding), means are
  weighted by it.
  """

  loss: Callable[[jax.Array, Any], jax.Array]
  metrics: Callable[[jax.Array, Any], dict[str, jax.Array]]
  log_probs: Callable[[jax.Array], jax.Array]


def classification(classes: int, label_smoothing: float = 0.0) -> Task:
  """One class of `classes` per image.

  Logits are [batch, classes]; a batch is {'image': [batch, height, width, channels],
  'label': int [batch]}. The loss is cross-entropy in nats, with the given share of
  every label spread evenly over all classes.
  """

  def loss(logits, batch):
    chex.assert_shape(logits, (None, classes))
    targets = jax.nn.one_hot(batch['label'], classes, dtype=logits.dtype)
    targets = optax.smooth_labels(targets, label_smoothing)
    return mean(optax.softmax_cross_entropy(logits, targets), batch)

  def metrics(logits, batch):
    right = jnp.argmax(logits, axis=-1).astype(jnp.int32) == batch['label']
    return {'accuracy': mean(right.astype(logits.dtype), batch)}

  return Task(loss, metrics, jax.nn.log_softmax)


def mean(values: jax.Array, batch: Any) -> jax.Array:
  """Mean over the batch axis, weighted by the batch's 'weight' if it has one."""
  weight = batch.get('weight')
  if weight is None:
    return values.mean()
  weight = weight.astype(values.dtype)
  # A batch of padding alone has mean 0, not NaN.
  return (values * weight).sum() / jnp.maximum(weight.sum(), 1e-9)
