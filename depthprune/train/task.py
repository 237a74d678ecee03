"""Tasks: the loss, metrics and scores of a network's logits.

There is one class per image or text (`classification`), one per pixel (`segmentation`),
or several tasks at once (`combine`); `task_of` chooses by the data set.
"""

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
  """Returns a network's answer: its output 'main', or its only output.

  Raises:
    ValueError: there are several outputs, and none is called 'main'.
  """
  if 'main' in outputs:
    return outputs['main']
  if len(outputs) == 1:
    return next(iter(outputs.values()))
  raise ValueError(
    f"expected an output 'main', or a single one, got {', '.join(outputs)}: it is not "
    'clear which of them answers. Drop all exits but one, or use a method that weighs '
    'them'
  )


def as_dict(outputs: Any) -> dict[str, Any]:
  """Returns a network's outputs by name; a single array is called 'main'."""
  return dict(outputs) if hasattr(outputs, 'keys') else {'main': outputs}


class Task(NamedTuple):
  """What a network is trained for, as functions of its logits.

  Logits are an array, or a dict of arrays for several tasks. Where a batch has an entry
  'weight' (float [batch], 0 for padding), means and sums are weighted by it.

  Attributes:
    loss: (logits, batch) -> scalar, the mean over the batch.
    metrics: (logits, batch) -> {name: scalar}, means over the batch.
    log_probs: (logits) -> log-probabilities of the same shape.
    sums: (logits, batch) -> tree of sums over the batch, to be added over batches.
    scores: (sums of all batches) -> {'loss', 'accuracy', ...} of a data set, in numpy.
      They include scores that are no mean over batches, such as a mean IoU. Leaves may
      have more axes in front, which all scores then have.
    answer: (outputs of a network by name) -> the logits that the others take.
  """

  loss: Callable[[Tree, Any], jax.Array]
  metrics: Callable[[Tree, Any], dict[str, jax.Array]]
  log_probs: Callable[[Tree], Tree]
  sums: Callable[[Tree, Any], Tree]
  scores: Callable[[Tree], dict[str, np.ndarray]]
  answer: Callable[[Tree], Tree] = main


def mean(values: jax.Array, batch: Any) -> jax.Array:
  """Averages values [batch], weighted by the batch's 'weight' if it has one."""
  weight = batch.get('weight')
  if weight is None:
    return values.mean()
  weight = weight.astype(values.dtype)
  # A batch of padding alone has mean 0, not NaN.
  return (values * weight).sum() / jnp.maximum(weight.sum(), 1e-9)


def segmentation(
  classes: int, ignore: int | None = None, names: Sequence[str] = ()
) -> Task:
  """Returns the task of telling the class of every pixel.

  Logits are [batch, height, width, classes], labels int [batch, height, width]. The
  loss is cross-entropy in nats and 'accuracy' the share of correct pixels, both over
  all labelled pixels. A label outside the classes makes the loss NaN.

  The scores of a data set also have 'iou_<name>' for every class and their mean 'miou',
  from the confusion matrix of all pixels. A class in no label and no answer has IoU NaN
  and is left out of the mean; 'classes' is the number of classes in it.

  Args:
    classes: number of classes.
    ignore: label of unlabelled pixels; negative labels are unlabelled as well.
    names: names of the classes for 'iou_<name>'; () uses their numbers.

  Raises:
    ValueError: the number of names is not the number of classes.
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
    counts = np.asarray(sums['confusion'])
    pixels = np.maximum(counts.sum((-2, -1)), 1e-9)
    each = iou(counts)
    present = ~np.isnan(each)
    labels = names or range(classes)
    return {
      'loss': sums['loss'] / pixels,
      'accuracy': np.trace(counts, axis1=-2, axis2=-1) / pixels,
      'miou': np.where(present, each, 0).sum(-1) / np.maximum(present.sum(-1), 1),
      'classes': present.sum(-1),
      **{f'iou_{label}': each[..., i] for i, label in enumerate(labels)},
    }

  return Task(loss, metrics, jax.nn.log_softmax, sums, scores)


def _pixels(logits, batch, classes: int, ignore: int | None):
  """Returns (label int32, weight float32), both [batch, height, width]."""
  label = jnp.asarray(batch['label']).astype(jnp.int32)
  chex.assert_shape(logits, (*label.shape, classes))
  chex.assert_rank(label, 3)
  counts = label >= 0 if ignore is None else (label >= 0) & (label != ignore)
  weight = counts.astype(jnp.float32)
  if 'weight' in batch:
    weight *= batch['weight'][:, None, None].astype(jnp.float32)
  return jnp.where(counts, label, 0), weight


def confusion(logits, batch, classes: int, ignore: int | None = None) -> jax.Array:
  """Counts the labelled pixels by their label and answer, float32 [label, answer]."""
  label, weight = _pixels(logits, batch, classes, ignore)
  label = jax.nn.one_hot(label, classes) * weight[..., None]
  answer = jax.nn.one_hot(jnp.argmax(logits, axis=-1), classes)
  return jnp.einsum('bhwl,bhwa->la', label, answer)


def iou(confusion: np.ndarray) -> np.ndarray:
  """Computes intersection over union [..., classes] from counts [..., label, answer].

  It is NaN for a class that is in no label and no answer.
  """
  hits = np.diagonal(confusion, axis1=-2, axis2=-1)
  union = confusion.sum(-1) + confusion.sum(-2) - hits
  return np.where(union > 0, hits / np.where(union > 0, union, 1), np.nan)


def classification(classes: int, label_smoothing: float = 0.0) -> Task:
  """Returns the task of telling the class of an image or a text.

  The loss is cross-entropy in nats and 'accuracy' the share of correct answers. After
  mixup, the loss is that of both labels, each by its share, and the accuracy is that of
  the first label.

      task = classification(10)
      step = make_step(model, method, task, optax.adam(1e-3))

  Args:
    classes: number of classes. Logits are [batch, classes], and a batch has 'label',
      int [batch], besides the inputs.
    label_smoothing: share of every label that is spread evenly over all classes.
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


def combine(
  tasks: Mapping[str, Task], weights: Mapping[str, float] | None = None
) -> Task:
  """Combines tasks into one, for a network with an output named after each of them.

  Logits are {name: logits}. Labels are such a dict too, or int [batch, tasks] with a
  column for each task in order. A negative label (for pixels: an image of nothing else)
  is missing, and the example does not count in that task.

  The loss is the weighted sum of the tasks' losses, each a mean over the examples that
  have its label. Metrics are '<metric>_<name>', and 'accuracy' is the mean over the
  tasks with a label in the batch; a task without has metrics 0 there. The scores of a
  data set are the same over all of it, with 'loss_<name>' and 'labelled_<name>', the
  number of labelled examples.

  Args:
    tasks: the tasks by name.
    weights: factors of the tasks' losses, 1 for those that are not named.

  Raises:
    ValueError: there are no tasks, or a weight is negative or of no task; or, when the
      task is used, a network or its logits lack an entry for a task.
  """
  weight = {**dict.fromkeys(tasks, 1.0), **(weights or {})}
  if not tasks or weight.keys() != tasks.keys() or min(weight.values()) < 0:
    raise ValueError(
      'combine: expected one task or more, and weights of them that are not negative, '
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
    values = {name: task.metrics(x, part) for name, task, x, part in parts}
    counts = {name: part['weight'].sum() for name, _, _, part in parts}
    return _named(values, counts, jnp)

  def sums(logits, batch):
    parts = each(logits, batch)
    return {
      'labelled': {k: part['weight'].sum() for k, _, _, part in parts},
      'tasks': {k: task.sums(x, part) for k, task, x, part in parts},
    }

  def scores(sums):
    values = {k: task.scores(sums['tasks'][k]) for k, task in tasks.items()}
    labelled = {f'labelled_{k}': np.asarray(n) for k, n in sums['labelled'].items()}
    total = sum(weight[k] * values[k]['loss'] for k in tasks)
    return {'loss': total, **_named(values, sums['labelled'], np), **labelled}

  log_probs = lambda logits: {k: task.log_probs(logits[k]) for k, task in tasks.items()}
  return Task(loss, metrics, log_probs, sums, scores, answer)


def task_of(data: Dataset) -> Task:
  """Returns the task of telling the labels of a data set."""
  if data.tasks:
    return combine({name: classification(data.classes) for name in data.tasks})
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
  """Yields (name, the batch with that task's labels and weight 0 where they miss)."""
  labels = batch['label']
  if not isinstance(labels, Mapping):
    chex.assert_shape(labels, (None, len(names)))
    labels = {name: labels[:, i] for i, name in enumerate(names)}
  for name in names:
    label = labels[name]
    there = (label >= 0).reshape(len(label), -1).any(1).astype(jnp.float32)
    weight = there * batch['weight'] if 'weight' in batch else there
    yield name, {**batch, 'label': label, 'weight': weight}


def _named(values: Mapping[str, Mapping], labelled: Mapping, xp: Any) -> dict[str, Any]:
  """Returns every task's values by name, and the mean accuracy of those with labels."""
  named = {f'{k}_{name}': v for name, of in values.items() for k, v in of.items()}
  there = [
    (labelled[name] > 0).astype(values[name]['accuracy'].dtype) for name in values
  ]
  right = sum(t * values[name]['accuracy'] for t, name in zip(there, values))
  return {**named, 'accuracy': right / xp.maximum(sum(there), 1)}
