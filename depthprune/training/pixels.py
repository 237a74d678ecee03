"""Segmentation: one class per pixel, measured over all pixels of a data set."""

from collections.abc import Sequence

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax

from depthprune.training.task import Task, Tree


def segmentation(
  classes: int, ignore: int | None = None, names: Sequence[str] = ()
) -> Task:
  """One class of `classes` per pixel.

  Logits are [batch, height, width, classes], labels int [batch, height, width]. A pixel
  labelled `ignore`, or less than 0, counts for nothing; another label outside the
  classes makes the loss NaN. The loss is cross-entropy in nats, 'accuracy' the share of
  pixels that are right, both over all pixels that count.

  Scores of a data set are also 'iou_<name>' of every class (by number, unless `names`
  are given) and 'miou', from the confusion matrix of all its pixels: a class that is in
  no label and no answer has IoU NaN and is left out of the mean, and 'classes' says how
  many are in it.

  Raises: ValueError for another number of names than of classes.
  """
  if len(names) not in (0, classes):
    raise ValueError(
      f'segmentation: expected a name for each of {classes} classes, got {len(names)}'
    )

  def entropy(logits, batch):  # [batch, height, width], and which pixels count
    label, weight = _pixels(logits, batch, classes, ignore)
    logits = logits.astype(jnp.float32)
    each = optax.softmax_cross_entropy(logits, jax.nn.one_hot(label, classes))
    wrong = (label >= classes) & (weight > 0)
    return jnp.where(wrong, jnp.nan, each * weight), weight

  def loss(logits, batch):
    values, weight = entropy(logits, batch)
    return values.sum() / jnp.maximum(weight.sum(), 1e-9)

  def metrics(logits, batch):
    label, weight = _pixels(logits, batch, classes, ignore)
    right = jnp.argmax(logits, axis=-1).astype(jnp.int32) == label
    right = jnp.where(right, weight, 0.0)
    return {'accuracy': right.sum() / jnp.maximum(weight.sum(), 1e-9)}

  def sums(logits, batch):
    values, _ = entropy(logits, batch)
    counts = confusion(logits, batch, classes, ignore)
    return {'loss': values.sum(), 'confusion': counts}

  def scores(sums):
    return _scores_of_pixels(sums, names or tuple(map(str, range(classes))))

  return Task(loss, metrics, jax.nn.log_softmax, sums, scores)


def _pixels(logits, batch, classes: int, ignore: int | None):
  """(label int32, weight float32), both [batch, height, width]."""
  label = jnp.asarray(batch['label']).astype(jnp.int32)
  chex.assert_shape(logits, (*label.shape, classes))
  chex.assert_rank(label, 3)
  counts = label >= 0 if ignore is None else (label >= 0) & (label != ignore)
  weight = counts.astype(jnp.float32)
  if 'weight' in batch:
    weight *= batch['weight'][:, None, None].astype(jnp.float32)
  return jnp.where(counts, label, 0), weight


def confusion(logits, batch, classes: int, ignore: int | None = None) -> jax.Array:
  """How many pixels of each class are taken for each: float32 [classes, classes].

  Rows are labels, columns answers; pixels that do not count are in none of them.
  """
  label, weight = _pixels(logits, batch, classes, ignore)
  label = jax.nn.one_hot(label, classes) * weight[..., None]
  answer = jax.nn.one_hot(jnp.argmax(logits, axis=-1), classes)
  return jnp.einsum('bhwl,bhwa->la', label, answer)


def iou(confusion: np.ndarray) -> np.ndarray:
  """Intersection over union [..., classes] of counts [..., classes, classes].

  NaN for a class that is neither in the labels nor in the answers.
  """
  hits = np.diagonal(confusion, axis1=-2, axis2=-1)
  union = confusion.sum(-1) + confusion.sum(-2) - hits
  return np.where(union > 0, hits / np.where(union > 0, union, 1), np.nan)


def _scores_of_pixels(sums: Tree, names: Sequence[str]) -> dict[str, np.ndarray]:
  counts = np.asarray(sums['confusion'])
  pixels = np.maximum(counts.sum((-2, -1)), 1e-9)
  each = iou(counts)
  present = ~np.isnan(each)
  return {
    'loss': sums['loss'] / pixels,
    'accuracy': np.trace(counts, axis1=-2, axis2=-1) / pixels,
    'miou': np.where(present, each, 0).sum(-1) / np.maximum(present.sum(-1), 1),
    'classes': present.sum(-1),
    **{f'iou_{name}': each[..., i] for i, name in enumerate(names)},
  }
