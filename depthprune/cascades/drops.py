"""The cheapest thresholds that lose at most so many points, for `thresholds`."""

from collections.abc import Callable, Sequence

import numpy as np

from depthprune.cascades.pareto import Point, alike, front
from depthprune.cascades.predictions import Predictions, digest, leave, scored, take
from depthprune.data.metrics import Metric

LEVELS = 20  # smaller drops that cross-validation tries
REPEATS = 3  # of it, with other folds: one alone varies as much as what it estimates


def cross_validated(
  p: Predictions, drop: float, least: int, points: int, metric: Metric, folds: int
) -> np.ndarray:
  """Returns the thresholds [K - 1] that `thresholds.for_drop` describes.

  Args:
    p: validated predictions on held-out data, with labels.
    drop: percentage points that may be lost.
    least: number of samples that must leave at an exit that is used.
    points: number of prices to try.
    metric: what may drop.
    folds: number of folds; 1 validates nothing.
  """
  drops = [drop, *(drop * i / LEVELS for i in range(LEVELS - 1, 0, -1)), 0.0]
  own = lambda p, least: cheapest(p, drops, least, points, metric, shared=False)
  samples, which = np.unique(digest(p), return_inverse=True)
  folds = min(folds, len(samples))
  if folds == 1:
    return own(p, least)[0]
  values = []
  for seed in range(REPEATS):
    fold = (np.random.default_rng(seed).permutation(len(samples)) % folds)[which]
    left = np.empty((len(drops), len(fold)), int)
    for k in range(folds):
      found = own(take(p, fold != k), least * (folds - 1) // folds)
      left[:, fold == k] = [leave(p.scores[:, fold == k], each) for each in found]
    values.append([scored(p, at, metric) for at in left])
  kept = np.mean(values, 0) >= lowest(p, drop, metric)
  # One number hardly fits the samples that it is chosen on, so it is not validated.
  found = cheapest(p, [drop], least, points, metric, shared=True)
  found += [each for each, keeps in zip(own(p, least), kept) if keeps]
  return min(found, key=lambda each: p.cost[leave(p.scores, each)].mean())


def cheapest(
  p: Predictions,
  drops: Sequence[float],
  least: int,
  points: int,
  metric: Metric,
  shared: bool,
) -> list[np.ndarray]:
  """Returns the cheapest thresholds for each of some drops, the largest first.

  Where the metric is nan, as it may be of a few samples, no exit is used.
  """
  value, own = worth(p, metric), lowest(p, 0.0, metric)
  limits = [own - drop / 100 for drop in drops]
  within = lambda q: value(q) >= limits[0]
  found = candidates(p, metric, least, points, within, shared)
  found = sorted(found, key=lambda q: q.measured.cost)
  never = np.full(len(p.scores), np.inf)
  fit = lambda limit: (q.thresholds for q in found if value(q) >= limit)
  return [next(fit(limit), never) for limit in limits]


def lowest(p: Predictions, drop: float, metric: Metric) -> float:
  """The lowest score that is at most `drop` points below that of the network alone."""
  own = scored(p, np.full(p.scores.shape[1], len(p.exits) - 1), metric)
  return own - drop / 100 - 1e-9  # rounding does not refuse what is met exactly


def worth(p: Predictions, metric: Metric) -> Callable[[Point], float]:
  """Returns a function that scores thresholds; higher is better.

  A metric may be slow, and is asked once for the same thresholds.
  """
  if metric == 'accuracy':
    return lambda q: q.measured.accuracy
  known: dict[bytes, float] = {}

  def value(q: Point) -> float:
    key = q.thresholds.tobytes()
    if key not in known:
      known[key] = scored(p, leave(p.scores, q.thresholds), metric)
    return known[key]

  return value


def candidates(
  p: Predictions,
  metric: Metric,
  least: int,
  points: int,
  within: Callable[[Point], bool],
  shared: bool,
) -> list[Point]:
  """Returns thresholds on the front; for another metric, on two that are near its own.

  A metric that is no mean over samples has no front that prices could search.
  """
  if shared:
    return alike(p, least)
  found = front(p, least=least, points=points, within=within)
  if metric == 'accuracy':
    return found
  return [*found, *front(p, 'balanced', least, points, within)]
