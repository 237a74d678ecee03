"""Whether the confidence of an exit means what it says.

Expected calibration error, reliability and temperature scaling: Guo et al., "On
Calibration of Modern Neural Networks", arXiv 1706.04599. A well calibrated exit can
still rank its right answers no better than its wrong ones, and a threshold only ranks;
hence the AUROC of correctness beside it (arXiv 2508.21495).
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from scipy.optimize import brentq

# Beyond these a head is constant or always right: the fit would run to 0 or infinity.
COLDEST, HOTTEST = 0.05, 20.0


class Reliability(NamedTuple):
  """A reliability diagram: per bin of equal width, right end included.

  edges [bins + 1]; mean confidence, accuracy (both nan in an empty bin), count [bins].
  """

  edges: np.ndarray
  confidence: np.ndarray
  accuracy: np.ndarray
  count: np.ndarray


def reliability(confidence: Any, correct: Any, bins: int = 15) -> Reliability:
  """The reliability diagram of confidence [n] in [0, 1] and correct bool [n].

  Raises ValueError for no bins, shapes that differ, no samples, or a confidence that
  is no probability.
  """
  confidence, correct = _pairs(confidence, correct)
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
  """Expected calibration error in [0, 1]: the mean of |accuracy - confidence| of the
  bins of a `reliability` diagram, weighted by their samples. Raises as it does."""
  _, mean, accuracy, count = reliability(confidence, correct, bins)
  return float(np.nansum(count * np.abs(accuracy - mean)) / count.sum())


def temperature(logits: Any, labels: Any) -> float:
  """The T that minimises the negative log-likelihood of softmax(logits / T).

  logits [n, classes], labels int [n]. The likelihood is convex in 1/T, so the root of
  its slope is found; T is clipped to [0.05, 20], where answers that are all right (all
  wrong) end, and is 1 where it changes nothing. Fit it on held-out data.
  Raises ValueError for wrong shapes, labels, or logits that are not finite.
  """
  logits, labels = _classified(logits, labels)
  of_label = logits[np.arange(len(labels)), labels].mean()

  def slope(x):
    expected = np.sum(np.exp(_log_softmax(logits * x)) * logits, axis=1)
    return expected.mean() - of_label

  cold, hot = 1 / COLDEST, 1 / HOTTEST
  falls_when_hot, rises_when_cold = slope(hot) < 0, slope(cold) > 0
  if falls_when_hot and rises_when_cold:
    return float(1 / brentq(slope, hot, cold))  # pyright: ignore[reportOperatorIssue]
  if falls_when_hot:
    return COLDEST
  return HOTTEST if rises_when_cold else 1.0


def auroc(score: Any, correct: Any) -> float:
  """The chance that a right answer scores above a wrong one; a tie counts one half.

  score [n], where nan is the lowest; correct bool [n]. nan where all are right or all
  are wrong. Mann-Whitney's U. Raises ValueError for shapes that differ or no samples.
  """
  score, correct = _pairs(score, correct)
  score = np.where(np.isnan(score), -np.inf, score)
  _, level = np.unique(score, return_inverse=True)
  right, wrong = (np.bincount(level, w) for w in (correct, ~correct))
  pairs = right.sum() * wrong.sum()
  above = right * (np.cumsum(wrong) - wrong / 2)
  return float(above.sum() / pairs) if pairs else float('nan')


def report(
  logits: Any, labels: Any, left: Any, temperatures: Any, exits: Sequence[str]
) -> dict[str, dict]:
  """Calibration of every exit before and after its temperature, as plain JSON.

  logits [K, n, classes], labels int [n], left int [n] the exit each sample leaves at,
  temperatures [K], names [K]. {exit: {'temperature', 'all', 'exited'}}; 'all' over all
  samples, 'exited' over those that leave there, None if there are none. Each has 'n',
  'accuracy', 'auroc' (of the scaled confidence; None where all are right or all wrong)
  and 'before', 'after': 'ece', 'nll' (nats), 'bins' (a `reliability` diagram). Samples
  whose logits at an exit are not finite are left out there; 'n' says how many are in.
  Raises ValueError for wrong shapes, labels, exits or temperatures.
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
      entry[part] = _measures(*_classified(*chosen), temperatures[k]) if some else None
    entries[name] = entry
  return entries


def finite(logits: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """The samples whose logits [n, classes] are all finite, with their labels [n]."""
  rows = np.isfinite(logits).all(axis=-1)
  return logits[rows], labels[rows]


def _measures(logits: np.ndarray, labels: np.ndarray, t: float) -> dict[str, Any]:
  correct = logits.argmax(axis=1) == labels
  entry: dict[str, Any] = {'n': len(labels), 'accuracy': float(correct.mean())}
  for when, scaled in (('before', logits), ('after', logits / t)):
    log_p = _log_softmax(scaled)
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


def _log_softmax(logits: np.ndarray) -> np.ndarray:
  shifted = logits - logits.max(axis=-1, keepdims=True)
  return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


def _pairs(values: Any, correct: Any) -> tuple[np.ndarray, np.ndarray]:
  values, correct = np.asarray(values, np.float64), np.asarray(correct)
  if values.ndim != 1 or values.shape != correct.shape or not values.size:
    raise ValueError(
      f'expected one value per answer, at least one: got shapes {values.shape} and '
      f'{correct.shape}'
    )
  return values, correct.astype(bool)


def _classified(logits: Any, labels: Any) -> tuple[np.ndarray, np.ndarray]:
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
