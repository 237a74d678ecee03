"""What a network is trained for: loss and metrics of its logits on a batch."""

from collections.abc import Iterator, Mapping
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax

from depthprune.training.pixels import segmentation as segmentation
from depthprune.training.task import Task as Task
from depthprune.training.task import Tree
from depthprune.training.task import main as main
from depthprune.training.task import mean as mean


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


def of(images: Any) -> Task:
  """The task of a data set of images, texts or features: to tell its labels."""
  if names := getattr(images, 'tasks', ()):
    return several({name: classification(images.classes) for name in names})
  if (ignore := getattr(images, 'ignore', None)) is not None:
    return segmentation(images.classes, ignore, images.names)
  return classification(images.classes)


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
