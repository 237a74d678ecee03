"""Answers, scores and costs of every exit for every sample, and what thresholds do.

There are K exits in order; the last is the network's own answer. A sample leaves at the
first exit whose score is strictly above its threshold, else at the last.
"""

import hashlib
from typing import Any, NamedTuple

import numpy as np

from depthprune.data import metrics
from depthprune.data.metrics import Metric

LOSSES = ('error', 'gap', 'disagreement')
# Measured times are not exact; a larger excess than this means another unit.
OFF = 1.1


class Predictions(NamedTuple):
  """The answers of every exit of a cascade to a data set of n samples.

  Attributes:
    exits: names [K] in order; the last is the network's own.
    logits: [K, n, classes].
    labels: int [n]; None if only agreement with the network's own answer matters.
    scores: [K - 1, n], higher is more confident; a sample with nan never leaves.
    cost: [K], cost of a sample that leaves there, including all heads before, in any
      unit.
    whole: cost of the network without heads, in the same unit; savings refer to it.
  """

  exits: tuple[str, ...]
  logits: np.ndarray
  labels: np.ndarray | None
  scores: np.ndarray
  cost: np.ndarray
  whole: float


class Measured(NamedTuple):
  """What thresholds reach on a data set.

  Attributes:
    accuracy: share of right answers; nan without labels.
    cost: mean cost of a sample, in the unit of `Predictions.cost`.
    exits: share of the samples that leave at each exit [K].
  """

  accuracy: float
  cost: float
  exits: tuple[float, ...]


def validate(p: Predictions) -> Predictions:
  """Checks predictions; returns float32 logits and scores, and float64 costs.

  Raises:
    ValueError: shapes do not fit together, there are fewer than two exits or no
      samples, costs are not finite or do not increase, `whole` is in another unit, a
      label is not a class, or logits are not finite. The last is allowed where the
      score is nan, because no sample leaves with that answer. The message names the
      field.
  """
  count = len(p.exits)
  if count < 2 or len(set(p.exits)) < count:
    raise ValueError(
      f"exits: expected at least two different names, the network's own last, got "
      f'{list(p.exits)}'
    )
  logits, scores = (np.asarray(x, np.float32) for x in (p.logits, p.scores))
  if logits.ndim != 3 or len(logits) != count or not logits.size or logits.shape[2] < 2:
    raise ValueError(
      f'logits: expected [{count}, n, classes] with n >= 1 and classes >= 2, got shape '
      f'{logits.shape}; exits are {", ".join(p.exits)}'
    )
  n = logits.shape[1]
  if scores.shape != (count - 1, n):
    raise ValueError(
      f'scores: expected [{count - 1}, {n}], one row per exit but the last, got shape '
      f'{scores.shape}'
    )
  leaves = np.concatenate([~np.isnan(scores), np.full((1, n), True)])
  broken = leaves & ~np.isfinite(logits).all(axis=2)  # samples that stay need no answer
  if broken.any():
    bad = [p.exits[k] for k in np.flatnonzero(broken.any(axis=1))]
    raise ValueError(f'logits of {", ".join(bad)}: expected finite numbers')
  cost, whole = _costs(p)
  labels = p.labels if p.labels is None else _labels(p.labels, n, logits.shape[2])
  return Predictions(tuple(p.exits), logits, labels, scores, cost, whole)


def leave(scores: Any, thresholds: Any) -> np.ndarray:
  """Returns the index of the exit at which each sample leaves, int [n].

  Args:
    scores: [K - 1, n], compared in float32 as the cascade does. A sample whose score
      equals the threshold, or is nan, goes on.
    thresholds: [K - 1].

  Raises:
    ValueError: the shapes are others.
  """
  scores, thresholds = (np.asarray(x, np.float32) for x in (scores, thresholds))
  if scores.ndim != 2 or thresholds.shape != scores.shape[:1]:
    raise ValueError(
      'expected scores [exits - 1, n] and one threshold per row, got shapes '
      f'{scores.shape} and {thresholds.shape}'
    )
  gone = scores > thresholds[:, None]
  return np.where(gone.any(axis=0), gone.argmax(axis=0), len(gone))


def losses(p: Predictions, loss: str) -> np.ndarray:
  """Returns for every exit and sample whether the answer is a loss, bool [K, n].

  Args:
    p: validated predictions.
    loss: 'error': the answer is wrong; 'gap': it is wrong and the network's own answer
      is right; 'disagreement': it differs from the network's own, whatever the labels;
      'balanced': it is wrong, as a number [K, n] by which all classes weigh the same,
      so that its mean is 1 minus the balanced accuracy.

  Raises:
    ValueError: there is no such loss, or it needs labels and there are none.
  """
  if loss not in (*LOSSES, 'balanced'):
    raise ValueError(f'loss={loss!r}: expected one of {", ".join(LOSSES)}')
  answers = p.logits.argmax(axis=2)
  if loss == 'disagreement':
    return answers != answers[-1]
  if p.labels is None:
    raise ValueError(f"loss={loss!r} needs labels, got None; 'disagreement' needs none")
  wrong = answers != p.labels
  if loss == 'balanced':
    present, counts = np.unique(p.labels, return_counts=True)
    weight = np.zeros(p.logits.shape[2])
    weight[present] = wrong.shape[1] / (len(present) * counts)
    return wrong * weight[p.labels]
  return wrong if loss == 'error' else wrong & ~wrong[-1]


def scored(p: Predictions, left: np.ndarray, metric: Metric) -> float:
  """Returns a metric of the answers of samples that leave at the exits int [n].

  Args:
    p: validated predictions, with labels.
    left: the exit of each sample.
    metric: see `data.metrics`.

  Raises:
    ValueError: there are no labels, or there is no such metric.
  """
  if p.labels is None:
    raise ValueError(f'metric {metrics.name_of(metric)!r} needs labels, got None')
  answers = p.logits[left, np.arange(len(left))].argmax(axis=1)
  counts = metrics.confusion(p.labels, answers, p.logits.shape[2])
  return float(metrics.score(metric, counts))


def measure(p: Predictions, left: np.ndarray) -> Measured:
  """Measures validated predictions of samples that leave at the exits int [n]."""
  n, accuracy = len(left), float('nan')
  if p.labels is not None:
    answers = p.logits[left, np.arange(n)].argmax(axis=1)
    accuracy = float((answers == p.labels).mean())
  count = np.bincount(left, minlength=len(p.exits))
  return Measured(accuracy, float(count @ p.cost / n), tuple((count / n).tolist()))


def drop(measured: Measured, p: Predictions) -> float:
  """Returns the percentage points of accuracy lost against the network's own answer."""
  own = measure(p, np.full(p.logits.shape[1], len(p.exits) - 1))
  return 100 * (own.accuracy - measured.accuracy)


def saved(measured: Measured, p: Predictions) -> float:
  """Returns the share of the cost of the network without heads that is saved.

  It is negative if heads cost more than early exits save.
  """
  return 1 - measured.cost / p.whole


def take(p: Predictions, rows: np.ndarray) -> Predictions:
  """Selects samples by their indices, or by a mask bool [n]."""
  labels = None if p.labels is None else p.labels[rows]
  return p._replace(logits=p.logits[:, rows], labels=labels, scores=p.scores[:, rows])


def digest(p: Predictions) -> np.ndarray:
  """Returns a hash of every sample, uint32 [n], by which it is recognised.

  It is computed of the bits of the network's own logits, so it does not depend on the
  exits, but it may differ when the network runs in batches of another size.
  """
  rows = np.ascontiguousarray(p.logits[-1])
  hashes = b''.join(hashlib.blake2b(r.tobytes(), digest_size=4).digest() for r in rows)
  return np.frombuffer(hashes, '<u4')


def _costs(p: Predictions) -> tuple[np.ndarray, float]:
  cost, whole, count = np.asarray(p.cost, np.float64), float(p.whole), len(p.exits)
  if cost.shape != (count,):
    raise ValueError(f'cost: expected [{count}], one per exit, got shape {cost.shape}')
  if not (np.isfinite(cost).all() and cost[0] > 0 and np.all(np.diff(cost) > 0)):
    raise ValueError(
      'cost: expected positive numbers that increase from exit to exit, each with all '
      f'that is computed on the way, got {cost.tolist()}'
    )
  if not 0 < whole <= OFF * cost[-1]:
    raise ValueError(
      f'whole: expected the cost of the network without heads, at most that of the '
      f'last exit ({cost[-1]:g}) and in its unit, got {whole:g}'
    )
  return cost, whole


def _labels(labels: Any, n: int, classes: int) -> np.ndarray:
  labels = np.asarray(labels)
  if labels.shape != (n,) or labels.dtype.kind not in 'iu':
    raise ValueError(
      f'labels: expected integers [{n}], got {labels.dtype} of shape {labels.shape}; a '
      'cascade is for one class per sample: numbers, or several labels, have no '
      'confidence by which a sample could leave'
    )
  if labels.min() < 0 or labels.max() >= classes:
    raise ValueError(
      f'labels: expected 0..{classes - 1}, the classes of the logits, got '
      f'{labels.min()} to {labels.max()}'
    )
  return labels
