"""Tasks: the loss, metrics and scores of a network's logits.

There is one class per image, text or token (`classification`), one per pixel
(`segmentation`), any number of labels (`multilabel`), numbers (`regression`), or
several tasks at once (`combine`); `task_of` chooses by the data set.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from depthprune.data import metrics as metrics_of
from depthprune.data.dataset import DataError, Dataset
from depthprune.data.metrics import Metric
from depthprune.program import arguments
from depthprune.train import labels as labels_of

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
    decides_by: name of the score that decides whether a cut is good, higher is better.
    softmax: whether `log_probs` are those of classes that exclude one another. If not,
      exits are mixed by their logits, and cannot be distilled.
    check: (batch) -> None; raises ValueError for labels in numpy that are no classes.
  """

  loss: Callable[[Tree, Any], jax.Array]
  metrics: Callable[[Tree, Any], dict[str, jax.Array]]
  log_probs: Callable[[Tree], Tree]
  sums: Callable[[Tree, Any], Tree]
  scores: Callable[[Tree], dict[str, np.ndarray]]
  answer: Callable[[Tree], Tree] = main
  decides_by: str = 'accuracy'
  softmax: bool = True
  check: Callable[[Any], None] = lambda batch: None


def is_task(value: Any) -> Task:
  """Returns an argument that has to be a Task; raises TypeError if it is none."""
  write = 'write classification(10), with the brackets and the number of classes'
  return arguments.kind_of('task', value, Task, 'a Task', write)


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
  labels_of.check_count(classes)
  if len(names) not in (0, classes):
    raise ValueError(
      f'segmentation: expected a name for each of {classes} classes, got {len(names)}'
    )

  def entropy(logits, batch):  # [batch, height, width], and which pixels count
    label, weight = labels_of.per_pixel(logits, batch, classes, ignore)
    logits = logits.astype(jnp.float32)
    each = optax.softmax_cross_entropy(logits, jax.nn.one_hot(label, classes))
    wrong = (label >= classes) & (weight > 0)
    return jnp.where(wrong, jnp.nan, each * weight), weight

  def loss(logits, batch):
    values, weight = entropy(logits, batch)
    return values.sum() / jnp.maximum(weight.sum(), 1e-9)

  def metrics(logits, batch):
    label, weight = labels_of.per_pixel(logits, batch, classes, ignore)
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


def confusion(logits, batch, classes: int, ignore: int | None = None) -> jax.Array:
  """Counts the labelled pixels by their label and answer, float32 [label, answer]."""
  label, weight = labels_of.per_pixel(logits, batch, classes, ignore)
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


def classification(
  classes: int,
  label_smoothing: float = 0.0,
  class_weights: Any = None,
  metric: Metric = 'accuracy',
) -> Task:
  """Returns the task of telling the class of an image, a text or each of its tokens.

  The loss is cross-entropy in nats and 'accuracy' the share of correct answers. After
  mixup, the loss is that of both labels, each by its share, and the accuracy is that of
  the first label.

      task = classification(10)
      step = make_step(model, method, task, optax.adam(1e-3))

  Args:
    classes: number of classes. Logits are [batch, ..., classes], and a batch has
      'label', int [batch, ...], besides the inputs: an answer for each example, or for
      each of its tokens, where negative labels are left out.
    label_smoothing: share of every label that is spread evenly over all classes.
    class_weights: factors of the classes in the loss, [classes], such as
      `data.metrics.balanced_weights(labels, classes)`; None for ones.
    metric: the score that decides, besides which 'accuracy' is still there: 'accuracy',
      'balanced_accuracy', 'f1', or a function (labels [n], answers [n]) -> score.

  Raises:
    ValueError: the weights are negative or of another number, or there is no such
      metric.
  """
  labels_of.check_count(classes)
  arguments.number('label_smoothing', label_smoothing, least=0, most=1)
  decides_by = metrics_of.name_of(metric)
  if class_weights is not None:
    given = np.asarray(class_weights)
    text = given.dtype.kind not in 'iuf'
    if text or given.shape != (classes,) or not (given >= 0).all():
      expected = f'{classes} numbers that are not negative'
      write = 'write data.metrics.balanced_weights(labels, classes)'
      kind = TypeError if text else ValueError
      raise arguments.refused('class_weights', expected, class_weights, write, kind)
    class_weights = np.asarray(given, np.float32)

  def loss(logits, batch):
    logits, batch = labels_of.per_token(logits, batch, classes)
    one_hot = lambda label: jax.nn.one_hot(label, classes, dtype=logits.dtype)
    targets = one_hot(batch['label'])
    if 'partner' in batch:
      share = batch['share'].astype(logits.dtype)[:, None]
      targets = share * targets + (1 - share) * one_hot(batch['partner'])
    targets = optax.smooth_labels(targets, label_smoothing)
    if class_weights is not None:
      targets *= jnp.asarray(class_weights, targets.dtype)
    return mean(optax.softmax_cross_entropy(logits, targets), batch)

  def metrics(logits, batch):
    logits, batch = labels_of.per_token(logits, batch, classes)
    right = jnp.argmax(logits, axis=-1).astype(jnp.int32) == batch['label']
    return {'accuracy': mean(right.astype(logits.dtype), batch)}

  def sums(logits, batch):
    logits, batch = labels_of.per_token(logits, batch, classes)
    size = jnp.asarray(batch['label'].shape[0], jnp.float32)
    examples = batch['weight'].sum() if 'weight' in batch else size
    means = {'loss': loss(logits, batch), **metrics(logits, batch)}
    counts = {}
    if metric != 'accuracy':
      weight = batch['weight'] if 'weight' in batch else jnp.ones_like(logits[:, 0])
      one_hot = lambda label: jax.nn.one_hot(label, classes, dtype=jnp.float32)
      label = one_hot(batch['label']) * weight.astype(jnp.float32)[:, None]
      counts = {'confusion': label.T @ one_hot(jnp.argmax(logits, axis=-1))}
    totals = {k: v * examples for k, v in means.items()}
    return {'examples': examples, **counts, **totals}

  def scores(sums):
    examples = np.maximum(sums['examples'], 1e-9)
    means = {k: sums[k] / examples for k in ('loss', 'accuracy')}
    if metric == 'accuracy':
      return means
    return {**means, decides_by: metrics_of.score(metric, sums['confusion'])}

  check = lambda batch: labels_of.in_range(batch, classes)
  made = Task(loss, metrics, jax.nn.log_softmax, sums, scores, decides_by=decides_by)
  return made._replace(check=check)


def multilabel(classes: int, metric: str = 'f1', weights: Any = None) -> Task:
  """Returns the task of telling which of several labels an example has.

  The loss is the binary cross-entropy of sigmoids in nats, a mean over labels; a label
  is answered where its logit is above 0. The scores of a data set are

    accuracy   share of right answers, of all examples and labels
    exact      share of examples of which all labels are right
    f1         mean of the labels' F1, 2 TP / (2 TP + FP + FN)
    micro_f1   F1 of all labels taken together
    map        mean of the labels' average precision, examples in order of their
               sigmoids, those within 1/1000 together

  A label that no example has does not count in f1 (unless it is answered) and map.

  Args:
    classes: number of labels. Logits are [batch, classes], and so is 'label' in a
      batch, 0 or 1.
    metric: the score that decides.
    weights: factors of the examples that have a label, in its loss, [classes], such as
      negatives / positives for rare labels; None for ones.

  Raises:
    ValueError: there is no such metric.
  """
  known = 'accuracy', 'exact', 'f1', 'micro_f1', 'map'
  arguments.whole('classes', classes)
  if metric not in known:
    raise ValueError(f'metric={metric!r}: expected one of {", ".join(known)}')
  positive = np.ones(classes) if weights is None else np.asarray(weights)
  if positive.shape != (classes,) or positive.dtype.kind not in 'iuf':
    raise arguments.refused('weights', f'{classes} numbers', weights, kind=ValueError)

  def target(logits, batch):
    return labels_of.numbers(logits, batch, classes)[1].astype(logits.dtype)

  def loss(logits, batch):
    y = target(logits, batch)
    each = optax.sigmoid_binary_cross_entropy(logits, y)
    factor = 1 + y * jnp.asarray(positive - 1, logits.dtype)
    return mean((factor * each).mean(-1), batch)

  def metrics(logits, batch):
    right = ((logits > 0) == (target(logits, batch) > 0)).astype(logits.dtype)
    return {
      'accuracy': mean(right.mean(-1), batch),
      'exact': mean(right.min(-1), batch),
    }

  def sums(logits, batch):
    one = lambda which: which.astype(jnp.float32)
    y, logits = target(logits, batch) > 0, one(logits)
    weight = jnp.asarray(batch.get('weight', np.ones(len(y))), jnp.float32)
    means = {'loss': loss(logits, batch), **metrics(logits, batch)}
    examples = weight.sum()
    bins = jax.nn.one_hot(
      (jax.nn.sigmoid(logits) * RANKS).astype(jnp.int32).clip(0, RANKS - 1), RANKS
    )
    count = lambda which: (one(which) * weight[:, None]).sum(0)
    ranked = lambda which: jnp.einsum('bcr,bc->cr', bins, one(which) * weight[:, None])
    return {
      'examples': examples,
      **{k: v * examples for k, v in means.items()},
      'hits': count(y & (logits > 0)),
      'answers': count(logits > 0),
      'positives': ranked(y),
      'negatives': ranked(~y),
    }

  def scores(sums):
    examples = np.maximum(sums['examples'], 1e-9)
    hits, answers = np.asarray(sums['hits']), np.asarray(sums['answers'])
    positives = np.asarray(sums['positives'])[..., ::-1]  # the most confident first
    labels, of = positives.sum(-1), lambda x, n: x / np.maximum(n, 1e-9)
    seen = np.cumsum(positives + np.asarray(sums['negatives'])[..., ::-1], -1)
    precision = of(np.cumsum(positives, -1), seen)
    average = of((precision * positives).sum(-1), labels)
    over = lambda x, counted: of(np.where(counted, x, 0).sum(-1), counted.sum(-1))
    f1 = of(2 * hits, labels + answers)
    return {
      **{k: sums[k] / examples for k in ('loss', 'accuracy', 'exact')},
      'f1': over(f1, labels + answers > 0),
      'micro_f1': of(2 * hits.sum(-1), (labels + answers).sum(-1)),
      'map': over(average, labels > 0),
    }

  return Task(
    loss, metrics, lambda x: x, sums, scores, decides_by=metric, softmax=False
  )


RANKS = 1000  # bins of the sigmoids of a label, for average precision


def regression(
  outputs: int = 1,
  huber: float | None = None,
  offset: Any = 0.0,
  scale: Any = 1.0,
) -> Task:
  """Returns the task of telling one number or several.

  The network's answer is (y - offset) / scale, so that it learns numbers near 1; with
  the mean and standard deviation of the training labels it need not know their unit.
  The loss is the mean squared error of that. Scores of a data set are 'mse', 'mae' in
  the unit of the labels, and 'r2', the share of the variance that is explained (1 is
  exact, 0 as good as the mean), a mean over the outputs. 'r2' decides.

  Args:
    outputs: numbers per example. The network answers [batch, outputs], and a batch has
      'label', [batch, outputs]; both may be [batch] where there is one.
    huber: errors beyond this many `scale` count linearly in the loss; None squares all.
    offset: taken from the labels, a number or [outputs].
    scale: what they are then divided by, a number or [outputs], above 0.

  Raises:
    ValueError: a scale or `huber` is not above 0.
  """
  arguments.whole('outputs', outputs)
  if huber is not None:
    arguments.number('huber', huber)
  offset, scale = (
    np.broadcast_to(np.asarray(x, np.float32), outputs) for x in (offset, scale)
  )
  if not (scale > 0).all() or (huber is not None and not huber > 0):
    raise ValueError(
      f'regression: expected scale and huber above 0, got {scale.tolist()} and {huber}'
    )

  def errors(logits, batch):  # (target, error), float32 [batch, outputs], in scales
    x, y = (v.astype(jnp.float32) for v in labels_of.numbers(logits, batch, outputs))
    target = (y - offset) / scale
    return target, x - target

  def loss(logits, batch):
    _, error = errors(logits, batch)
    if huber is None:
      return mean((error**2).mean(-1), batch)
    return mean(2 * optax.huber_loss(error, delta=huber).mean(-1), batch)

  def metrics(logits, batch):
    _, error = errors(logits, batch)
    return {'mae': mean((jnp.abs(error) * scale).mean(-1), batch)}

  def sums(logits, batch):
    target, error = errors(logits, batch)
    weight = jnp.asarray(batch.get('weight', np.ones(len(error))), jnp.float32)
    total = lambda values: (values * weight[:, None]).sum(0)
    return {
      'examples': weight.sum(),
      'loss': loss(logits, batch) * weight.sum(),
      'absolute': total(jnp.abs(error)),
      'squared': total(error**2),
      'target': total(target),
      'target_squared': total(target**2),
    }

  def scores(sums):
    examples = np.maximum(np.asarray(sums['examples']), 1e-9)
    of = lambda name: np.asarray(sums[name]) / examples[..., None]
    variance = of('target_squared') - of('target') ** 2
    return {
      'loss': sums['loss'] / examples,
      'mse': (of('squared') * scale**2).mean(-1),
      'mae': (of('absolute') * scale).mean(-1),
      'r2': (1 - of('squared') / np.maximum(variance, 1e-9)).mean(-1),
    }

  return Task(loss, metrics, lambda x: x, sums, scores, decides_by='r2', softmax=False)


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
  number of labelled examples. If a task decides by something else than its accuracy,
  the mean of what decides is 'score', and decides.

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
    named = _named(values, sums['labelled'], np, decide)
    return {'loss': total, **named, **labelled}

  log_probs = lambda logits: {k: task.log_probs(logits[k]) for k, task in tasks.items()}
  decide = {k: task.decides_by for k, task in tasks.items()}
  decides_by = 'accuracy' if {*decide.values()} == {'accuracy'} else 'score'
  softmax = all(task.softmax for task in tasks.values())
  return Task(loss, metrics, log_probs, sums, scores, answer, decides_by, softmax)


def task_of(
  data: Dataset,
  metric: str | None = None,
  class_weights: str | None = None,
  label_smoothing: float = 0.0,
) -> Task:
  """Returns the task of telling the labels of a data set.

  Args:
    data: the data set.
    metric: the score that decides, see `classification`; None is the accuracy.
    class_weights: 'balanced' weighs the classes by `data.metrics.balanced_weights` of
      the training labels; None does not.
    label_smoothing: see `classification`.

  Raises:
    DataError: a metric or weights are for data with a single class per example.
  """
  if (metric or class_weights) and (data.tasks or data.ignore is not None):
    raise DataError(
      f'data {data.name!r}: metric, class_weights: for data with one class per '
      'example: leave them out'
    )
  if data.tasks:
    return combine({name: classification(data.classes) for name in data.tasks})
  if data.ignore is not None:
    return segmentation(data.classes, data.ignore, data.names)
  weights = None
  if class_weights:
    if 'label' not in data.train:
      raise DataError(
        f'data {data.name!r}: class_weights: the labels of streamed images are not '
        'known at once: leave it out'
      )
    label = np.asarray(data.train['label'])
    weights = metrics_of.balanced_weights(label, data.classes)
  return classification(data.classes, label_smoothing, weights, metric or 'accuracy')


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
  labels = labels_of.of(batch)
  if not isinstance(labels, Mapping):
    if labels.shape[1:] != (len(names),):
      expected = f'shape [batch, {len(names)}], one for each of {", ".join(names)}'
      raise arguments.refused("batch['label']", expected, labels, kind=ValueError)
    labels = {name: labels[:, i] for i, name in enumerate(names)}
  for name in names:
    label = labels[name]
    there = (label >= 0).reshape(len(label), -1).any(1).astype(jnp.float32)
    weight = there * batch['weight'] if 'weight' in batch else there
    yield name, {**batch, 'label': label, 'weight': weight}


def _named(
  values: Mapping[str, Mapping],
  labelled: Mapping,
  xp: Any,
  decide: Mapping[str, str] | None = None,
) -> dict[str, Any]:
  """Returns every task's values by name, and means over those with labels.

  They are the mean accuracy, where all have one, and 'score', the mean of what decides
  in each task, where that is something else.
  """
  named = {f'{k}_{name}': v for name, of in values.items() for k, v in of.items()}

  def average(of: Mapping[str, str]) -> Any:
    found = {name: values[name][of[name]] for name in values}
    there = [(labelled[name] > 0).astype(x.dtype) for name, x in found.items()]
    return sum(t * x for t, x in zip(there, found.values())) / xp.maximum(sum(there), 1)

  if all('accuracy' in of for of in values.values()):
    named['accuracy'] = average(dict.fromkeys(values, 'accuracy'))
  if decide and {*decide.values()} != {'accuracy'}:
    named['score'] = average(decide)
  return named
