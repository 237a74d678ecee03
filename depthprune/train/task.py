"""What a network is trained for: loss and metrics of its logits on a batch."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax

from depthprune.data.dataset import Dataset

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


def as_dict(outputs: Any) -> dict[str, Any]:
  """A network's outputs by name; a single array is 'main'."""
  return dict(outputs) if hasattr(outputs, 'keys') else {'main': outputs}


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


def classification(classes: int, label_smoothing: float = 0.0) -> Task:
  """One class of `classes` per image.

  Logits are [batch, classes]; a batch is {'image': [batch, height, width, channels],
  'label': int [batch]}. The loss is cross-entropy in nats, with the given share of
  every label spread evenly over all classes. Of a batch that was `augment.mixed` it is
  that of both labels, each by its share; the accuracy is that of the first.
  """

  def loss(logits, batch):
    chex.assert_shape(logits, (None, classes))
    chex.assert_rank(batch['label'], 1)
    one_hot = lambda label: jax.nn.one_hot(label, classes, dtype=logits.dtype)
    targets = one_hot(batch['label'])
    if 'partner' in batch:
      share = batch['share'].astype(logits.dtype)[:, None]
      targets = share * targets + (1 - share) * one_hot(batch['partner'])
    targets = optax.smooth_labels(targets, label_smoothing)
    return mean(optax.softmax_cross_entropy(logits, targets), batch)

  def metrics(logits, batch):
    right = jnp.argmax(logits, axis=-1).astype(jnp.int32) == batch['label']
    return {'accuracy': mean(right.astype(logits.dtype), batch)}

  def sums(logits, batch):
    size = jnp.asarray(batch['label'].shape[0], jnp.float32)
    examples = batch['weight'].sum() if 'weight' in batch else size
    means = {'loss': loss(logits, batch), **metrics(logits, batch)}
    return {'examples': examples, **{k: v * examples for k, v in means.items()}}

  def scores(sums):
    examples = np.maximum(sums['examples'], 1e-9)
    return {k: v / examples for k, v in sums.items() if k != 'examples'}

  return Task(loss, metrics, jax.nn.log_softmax, sums, scores)


def several(
  tasks: Mapping[str, Task], weights: Mapping[str, float] | None = None
) -> Task:
  """Several tasks at once, of a network with an output for each, by its name.

  Logits are {name: logits}. Labels are such a dict too, or int [batch, tasks] with a
  column for each task in their order. A label less than 0 (of pixels: nothing else in
  an image) is missing: the example counts for nothing in that task.

  The loss is the sum of the tasks' own, times `weights` (1 where not given), and each
  is a mean over the examples that have its label. Metrics are '<metric>_<name>', and
  'accuracy' is the mean over the tasks that have any label in the batch; one that has
  none has metrics 0 there. Scores of a data set are the same over all of it, with
  'loss_<name>' and the number of examples, 'labelled_<name>'.

  Raises: ValueError for no tasks, and for a weight that is of none of them or less
    than 0; and for a network, or logits, without an entry for each task.
  """
  weight = {**dict.fromkeys(tasks, 1.0), **(weights or {})}
  if not tasks or weight.keys() != tasks.keys() or min(weight.values()) < 0:
    raise ValueError(
      'several: expected one task or more, and weights of them that are not negative, '
      f'got tasks {", ".join(tasks) or "none"} and weights {weights}'
    )

  def answer(outputs):
    _check_names(tasks, outputs)
    return {name: outputs[name] for name in tasks}

  def each(logits, batch):
    _check_names(tasks, logits)
    parts = _parts(tuple(tasks), batch)
    return [(name, tasks[name], logits[name], part) for name, part in parts]

  def loss(logits, batch):
    parts = each(logits, batch)
    losses = [weight[name] * task.loss(x, part) for name, task, x, part in parts]
    return jnp.stack(losses).sum()

  def metrics(logits, batch):
    parts = each(logits, batch)
    found = {name: task.metrics(x, part) for name, task, x, part in parts}
    counts = {name: part['weight'].sum() for name, _, _, part in parts}
    return _named(found, counts, jnp)

  def sums(logits, batch):
    parts = each(logits, batch)
    return {
      'labelled': {k: part['weight'].sum() for k, _, _, part in parts},
      'tasks': {k: task.sums(x, part) for k, task, x, part in parts},
    }

  def scores(sums):
    found = {k: task.scores(sums['tasks'][k]) for k, task in tasks.items()}
    labelled = {f'labelled_{k}': np.asarray(n) for k, n in sums['labelled'].items()}
    total = sum(weight[k] * found[k]['loss'] for k in tasks)
    return {'loss': total, **_named(found, sums['labelled'], np), **labelled}

  log_probs = lambda logits: {k: task.log_probs(logits[k]) for k, task in tasks.items()}
  return Task(loss, metrics, log_probs, sums, scores, answer)


def of(data: Dataset) -> Task:
  """The task of a data set: to tell its labels."""
  if data.tasks:
    return several({name: classification(data.classes) for name in data.tasks})
  if data.ignore is not None:
    return segmentation(data.classes, data.ignore, data.names)
  return classification(data.classes)


def _check_names(tasks: Mapping[str, Task], given: Tree) -> None:
  names = list(given) if isinstance(given, Mapping) else []
  missing = [name for name in tasks if name not in names]
  if missing:
    raise ValueError(
      f'several tasks: expected an output for each of {", ".join(tasks)}, got '
      f'{", ".join(names) or "one array"}: there is none for {", ".join(missing)}. '
      'Name the heads of the network after its tasks, and keep them all'
    )


def _parts(names: tuple[str, ...], batch: Any) -> Iterator[tuple[str, Any]]:
  """(name, the batch with that task's labels, and weight 0 where one is missing)."""
  labels = batch['label']
  if not isinstance(labels, Mapping):
    chex.assert_shape(labels, (None, len(names)))
    labels = {name: labels[:, i] for i, name in enumerate(names)}
  for name in names:
    label = labels[name]
    there = (label >= 0).reshape(len(label), -1).any(1).astype(jnp.float32)
    weight = there * batch['weight'] if 'weight' in batch else there
    yield name, {**batch, 'label': label, 'weight': weight}


def _named(found: Mapping[str, Mapping], labelled: Mapping, xp: Any) -> dict[str, Any]:
  """Every task's values under its name, and the mean accuracy of those with labels."""
  named = {f'{k}_{name}': v for name, of in found.items() for k, v in of.items()}
  there = [(labelled[name] > 0).astype(found[name]['accuracy'].dtype) for name in found]
  right = sum(t * found[name]['accuracy'] for t, name in zip(there, found))
  return {**named, 'accuracy': right / xp.maximum(sum(there), 1)}
