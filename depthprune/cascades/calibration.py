"""Calibration of exits: whether confidences are the probabilities of being right.

Expected calibration error, reliability and temperature scaling: Guo et al., "On
Calibration of Modern Neural Networks", arXiv 1706.04599. A calibrated exit may still
rank right answers no higher than wrong ones, and ranking is all that a threshold uses;
hence the AUROC of correctness beside it (arXiv 2508.21495).
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from scipy.optimize import brentq
from scipy.special import log_softmax

# Limits of a temperature: for a head that is always right, or never, the fit diverges.
COLDEST, HOTTEST = 0.05, 20.0


class Reliability(NamedTuple):
  """A reliability diagram: confidence and accuracy in bins of equal width.

  Attributes:
    edges: limits of the bins [bins + 1]; the upper limit belongs to its bin.
    confidence: mean confidence [bins]; nan in an empty bin.
    accuracy: share of right answers [bins]; nan in an empty bin.
    count: number of samples [bins].
  """

  edges: np.ndarray
  confidence: np.ndarray
  accuracy: np.ndarray
  count: np.ndarray


def reliability(confidence: Any, correct: Any, bins: int = 15) -> Reliability:
  """Computes the reliability diagram of an exit.

  Args:
    confidence: [n], in [0, 1].
    correct: bool [n], whether the answer is right.
    bins: number of bins.

  Raises:
    ValueError: there are no bins or no samples, shapes differ, or a confidence is not a
      probability.
  """
  confidence, correct = _check_pairs(confidence, correct)
  if bins < 1:
    raise ValueError(f'bins={bins}: expected at least 1')
  if not np.all((confidence >= 0) & (confidence <= 1)):
    raise ValueError(
      f'confidence: expected probabilities in [0, 1], got {confidence.min():g} to '
      f'{confidence.max():g}; use the largest softmax probability'
    )
  edges = np.linspace(0, 1, bins + 1)
  at = np.maximum(np.searchsorted(edges, confidence, side='left') - 1, 0)
  count = np.bincount(at, minlength=bins)
  sums = [np.bincount(at, values, minlength=bins) for values in (confidence, correct)]
  mean, accuracy = (np.where(count, s / np.maximum(count, 1), np.nan) for s in sums)
  return Reliability(edges, mean, accuracy, count)


def ece(confidence: Any, correct: Any, bins: int = 15) -> float:
  """Computes the expected calibration error, in [0, 1].

  It is the mean over the bins of a `reliability` diagram of |accuracy - confidence|,
  weighted by their samples. Arguments and errors are those of `reliability`.
  """
  _, mean, accuracy, count = reliability(confidence, correct, bins)
  return float(np.nansum(count * np.abs(accuracy - mean)) / count.sum())


def temperature(logits: Any, labels: Any) -> float:
  """Fits the temperature T that makes labels most likely under softmax(logits / T).

  The negative log-likelihood is convex in 1/T, so the root of its slope is found. T is
  limited to [0.05, 20], which answers that are all right or all wrong reach, and is 1
  if it changes nothing. Fit it on held-out data.

  Args:
    logits: [n, classes].
    labels: int [n].

  Raises:
    ValueError: wrong shapes or labels, or logits that are not finite.
  """
  logits, labels = _check_logits(logits, labels)
  of_label = logits[np.arange(len(labels)), labels].mean()

  def slope(x):
    expected = np.sum(np.exp(log_softmax(logits * x, axis=1)) * logits, axis=1)
    return expected.mean() - of_label

  cold, hot = 1 / COLDEST, 1 / HOTTEST
  falls_when_hot, rises_when_cold = slope(hot) < 0, slope(cold) > 0
  if falls_when_hot and rises_when_cold:
    return float(1 / brentq(slope, hot, cold))  # pyright: ignore[reportOperatorIssue]
  if falls_when_hot:
    return COLDEST
  return HOTTEST if rises_when_cold else 1.0


def auroc(score: Any, correct: Any) -> float:
  """Computes the chance that a right answer scores above a wrong one, ties as one half.

  Args:
    score: [n]; nan counts as the lowest score.
    correct: bool [n], whether the answer is right.

  Returns:
    The area under the ROC curve; nan if all answers are right or all are wrong.

  Raises:
    ValueError: shapes differ, or there are no samples.
  """
  from sklearn.metrics import roc_auc_score

  score, correct = _check_pairs(score, correct)
  if correct.all() or not correct.any():
    return float('nan')
  _, rank = np.unique(np.where(np.isnan(score), -np.inf, score), return_inverse=True)
  return float(roc_auc_score(correct, rank))  # ranks, because scores may be infinite


def report(
  logits: Any, labels: Any, left: Any, temperatures: Any, exits: Sequence[str]
) -> dict[str, dict]:
  """Reports the calibration of every exit before and after its temperature.

  Args:
    logits: [K, n, classes]. Samples whose logits at an exit are not finite are left out
      there.
    labels: int [n].
    left: int [n], the index of the exit at which a sample leaves.
    temperatures: [K].
    exits: names [K].

  Returns:
    {exit: {'temperature', 'all', 'exited'}} as plain JSON data: 'all' is about all
    samples, 'exited' about those that leave there, None if there are none. Each has
    their number 'n', 'accuracy', 'auroc' (of the scaled confidence; None if all answers
    are right or all are wrong), and 'before' and 'after' with 'ece', 'nll' (in nats)
    and 'bins' (a `reliability` diagram).

  Raises:
    ValueError: wrong shapes, labels, exits or temperatures.
  """
  logits, left = np.asarray(logits, np.float64), np.asarray(left)
  temperatures = np.asarray(temperatures, np.float64)
  _check_report(logits, left, temperatures, exits)
  entries = {}
  for k, name in enumerate(exits):
    entry: dict[str, Any] = {'temperature': float(temperatures[k])}
    for part, rows in (('all', np.full(left.shape, True)), ('exited', left == k)):
      chosen = finite(logits[k][rows], np.asarray(labels)[rows])
      some = len(chosen[1]) > 0
      entry[part] = (
        _measures(*_check_logits(*chosen), temperatures[k]) if some else None
      )
    entries[name] = entry
  return entries


def finite(logits: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Selects the samples whose logits [n, classes] are finite, with their labels [n]."""
  rows = np.isfinite(logits).all(axis=-1)
  return logits[rows], labels[rows]


def _measures(logits: np.ndarray, labels: np.ndarray, t: float) -> dict[str, Any]:
  correct = logits.argmax(axis=1) == labels
  entry: dict[str, Any] = {'n': len(labels), 'accuracy': float(correct.mean())}
  for when, scaled in (('before', logits), ('after', logits / t)):
    log_p = log_softmax(scaled, axis=1)
    confidence = np.exp(log_p).max(axis=1)
    entry[when] = {
      'ece': ece(confidence, correct),
      'nll': float(-log_p[np.arange(len(labels)), labels].mean()),
      'bins': {
        field: [None if np.isnan(v) else v for v in values.tolist()]
        for field, values in reliability(confidence, correct)._asdict().items()
      },
    }
    ranked = auroc(confidence, correct)
    entry['auroc'] = None if np.isnan(ranked) else ranked
  return entry


def _check_pairs(values: Any, correct: Any) -> tuple[np.ndarray, np.ndarray]:
  values, correct = np.asarray(values, np.float64), np.asarray(correct)
  if values.ndim != 1 or values.shape != correct.shape or not values.size:
    raise ValueError(
      f'expected one value per answer, at least one: got shapes {values.shape} and '
      f'{correct.shape}'
    )
  return values, correct.astype(bool)


def _check_logits(logits: Any, labels: Any) -> tuple[np.ndarray, np.ndarray]:
  logits, labels = np.asarray(logits, np.float64), np.asarray(labels)
  if logits.ndim != 2 or labels.shape != logits.shape[:1] or not labels.size:
    raise ValueError(
      'expected logits [n, classes] and labels [n], at least one: got shapes '
      f'{logits.shape} and {labels.shape}'
    )
  if not np.isfinite(logits).all():
    raise ValueError('logits: expected finite numbers, got nan or infinity')
  if labels.dtype.kind not in 'iu' or not np.all(
    (labels >= 0) & (labels < logits.shape[1])
  ):
    raise ValueError(
      f'labels: expected integers in 0..{logits.shape[1] - 1}, got {labels.dtype} '
      f'from {labels.min()} to {labels.max()}'
    )
  return logits, labels


def _check_report(
  logits: np.ndarray, left: np.ndarray, temperatures: np.ndarray, exits: Sequence[str]
) -> None:
  if logits.ndim != 3 or len(logits) != len(exits):
    raise ValueError(
      f'expected logits [{len(exits)}, n, classes] for the exits '
      f'{", ".join(exits)}: got shape {logits.shape}'
    )
  count, n = logits.shape[:2]
  if left.shape != (n,) or not np.isin(left, np.arange(count)).all():
    raise ValueError(
      f'left: expected the exit 0..{count - 1} of each of {n} samples, got shape '
      f'{left.shape}' + (f' from {left.min()} to {left.max()}' if left.size else '')
    )
  if temperatures.shape != (count,) or not np.all(temperatures > 0):
    raise ValueError(
      f'temperatures: expected {count} positive numbers, one per exit, got '
      f'{temperatures.tolist()}'
    )
