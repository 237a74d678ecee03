"""The Pareto front of thresholds: the lowest loss for every mean cost.

Given a price of a loss in units of cost, thresholds have the value
mean[cost + price · loss]. A single threshold is solved exactly, given the others: with
the samples that reach the exit ordered by score, a threshold lets the first m leave,
and the cumulative sum of what leaving costs more than going on shows the best m. Exits
are solved in turn, from the last to the first, until nothing improves; with one exit
that is the optimum. The prices are the slopes between neighbours on the front so far
(the NISE method: Cohon, "Multiobjective Programming and Planning", 1978).
"""

from collections.abc import Callable, Iterable
from typing import NamedTuple, TypeVar

import numpy as np

from depthprune.cascades.predictions import (
  Measured,
  Predictions,
  leave,
  losses,
  measure,
  validate,
)

T = TypeVar('T')


class Point(NamedTuple):
  """Thresholds on the front.

  Attributes:
    thresholds: float32 [K - 1]; an exit with infinity is never used, and one with
      -infinity lets all samples leave.
    risk: mean loss.
    measured: accuracy, cost and shares of the exits.
  """

  thresholds: np.ndarray
  risk: float
  measured: Measured


class Search(NamedTuple):
  """The arrays of a search."""

  cost: np.ndarray  # [K]
  loss: np.ndarray  # bool [K, n], or numbers that weigh samples
  scores: np.ndarray  # [K - 1, n]
  order: np.ndarray  # int [K - 1, n], the samples by falling score, nan last
  least: int  # samples that must leave at an exit that is used


def search(p: Predictions, loss: str = 'error', least: int = 20) -> Search:
  """Prepares validated predictions for `solve`; raises as `predictions.losses` does."""
  order = np.argsort(-p.scores, axis=1, kind='stable')
  return Search(p.cost, losses(p, loss), p.scores, order, max(least, 1))


def front(
  p: Predictions,
  loss: str = 'error',
  least: int = 20,
  points: int = 40,
  within: Callable[[Point], bool] | None = None,
) -> list[Point]:
  """Searches thresholds that no others beat in both mean cost and mean loss.

  Args:
    p: predictions on held-out data, never on test data.
    loss: 'error', 'gap', 'disagreement' or 'balanced'; see `predictions.losses`.
    least: number of samples that must leave at an exit that is used, so that thresholds
      do not fit a few samples.
    points: number of prices to try.
    within: a condition that a point meets or not. As many prices again are tried
      between neighbours that differ in it.

  Returns:
    Points from the most expensive to the cheapest. The first never exits early, even if
    another one beats it.

  Raises:
    ValueError: as `predictions.validate` and `predictions.losses` do.
  """
  p = validate(p)
  s = search(p, loss, least)
  never = _point(s, p, np.full(len(s.scores), np.inf, np.float32))
  # One loss is worth more than all costs together: the fewest losses that there are.
  smallest = min(1, s.loss[s.loss > 0].min(initial=1))
  most = 2 * p.scores.shape[1] * p.cost[-1] / smallest
  ends = [_best(s, p, price, never) for price in (most, 0)]
  points_found, gaps = list(ends), [ends]
  for turn in range(2 * points):
    if turn >= points:
      gaps = [(a, b) for a, b in gaps if within and within(a) != within(b)]
    if not gaps:
      break
    a, b = gaps.pop(max(range(len(gaps)), key=lambda i: _saving(*gaps[i])))
    if _saving(a, b) > 0 and b.risk > a.risk:
      price = _saving(a, b) / (b.risk - a.risk)
      c = _best(s, p, price, a, b)
      if c is not a and c is not b:
        points_found.append(c)
        gaps += [(a, c), (c, b)]
  best = efficient(points_found, lambda q: (q.measured.cost, q.risk))
  return [never, *(q for q in best if q is not never)]


def alike(p: Predictions, least: int = 20, points: int = 400) -> list[Point]:
  """Tries one threshold at all exits, from the highest to the lowest.

  With one number to choose instead of one for every exit, thresholds hardly fit the
  data that they are chosen on, and keep on other data to what they promise. Scores of
  the exits must mean the same, as probabilities do after a temperature for each.

  Args:
    p: predictions on held-out data, never on test data.
    least: an exit at which fewer samples leave is not used.
    points: number of thresholds to try.

  Returns:
    The points, the first of which never exits early.

  Raises:
    ValueError: as `predictions.validate` does, or there are no labels.
  """
  p = validate(p)
  s = search(p, 'error', least)
  levels = np.unique(s.scores[np.isfinite(s.scores)])
  if len(levels) > points:
    levels = levels[np.linspace(0, len(levels) - 1, points).round().astype(int)]
  count = len(s.scores)
  tried = (np.full(count, tau, np.float32) for tau in (np.inf, *levels[::-1], -np.inf))
  return [_point(s, p, _used(s, each)) for each in tried]


def solve(s: Search, price: float, start: np.ndarray) -> np.ndarray:
  """Improves thresholds, one exit at a time, until no single one can be improved.

  With one exit the result is the optimum, as far as `least` allows. Returns `start`
  itself if nothing improves on it; `price` is the cost that one loss is worth.
  """
  worth = s.cost[:, None] + price * s.loss  # [K, n]
  best, lowest = start, value(s, price, start)
  while True:
    thresholds = _sweep(s, worth, best)
    reached = value(s, price, thresholds)
    # Without a margin, the rounding of sums could be taken for progress forever.
    if reached >= lowest - 1e-9 * (s.cost[-1] + price):
      return best
    best, lowest = thresholds, reached


def value(s: Search, price: float, thresholds: np.ndarray) -> float:
  """Returns the sum of cost + price · loss over the samples."""
  left = leave(s.scores, thresholds)
  lost = s.loss[left, np.arange(len(left))].sum()
  return float(s.cost[left].sum() + price * lost)


def _sweep(s: Search, worth: np.ndarray, thresholds: np.ndarray) -> np.ndarray:
  """Solves every threshold once, the last first, for worth = cost + price · loss."""
  thresholds = thresholds.copy()
  # Which samples reach an exit depends on earlier exits, which have yet to change.
  left = leave(s.scores, thresholds)
  ahead = worth[-1]  # worth of the samples that go on from exit k
  for k in reversed(range(len(thresholds))):
    order = s.order[k][left[s.order[k]] >= k]
    thresholds[k] = _threshold(s.scores[k][order], (worth[k] - ahead)[order], s.least)
    ahead = np.where(s.scores[k] > thresholds[k], worth[k], ahead)
  return _used(s, thresholds)


def _threshold(scores: np.ndarray, change: np.ndarray, least: int) -> float:
  """Returns the best threshold of one exit; it cannot separate equal scores.

  `scores` [m] are those of the samples that reach the exit, falling, nan last; `change`
  is what each adds to the value if it leaves here.
  """
  able = np.count_nonzero(scores > -np.inf)
  after = np.append(scores[1:able], -np.inf)[:able]  # the first score that stays
  sums = np.where(scores[:able] > after, np.cumsum(change[:able]), np.inf)
  sums[: least - 1] = np.inf
  if not able or sums.min() >= 0:
    return np.inf
  return after[sums.argmin()]


def _used(s: Search, thresholds: np.ndarray) -> np.ndarray:
  """Closes exits at which fewer than `least` samples leave.

  Earlier exits are closed first, because their samples may then be enough for a later
  one.
  """
  thresholds, stay = thresholds.copy(), np.full(s.scores.shape[1], True)
  for k, scores in enumerate(s.scores):
    goes = stay & (scores > thresholds[k])
    if np.count_nonzero(goes) < s.least:
      thresholds[k] = np.inf
    else:
      stay &= ~goes
  return thresholds


def _point(s: Search, p: Predictions, thresholds: np.ndarray) -> Point:
  left = leave(s.scores, thresholds)
  risk = float(s.loss[left, np.arange(len(left))].mean())
  return Point(thresholds, risk, measure(p, left))


def _best(s: Search, p: Predictions, price: float, *starts: Point) -> Point:
  """Returns the best point reached from the starts, or the first start."""
  best, lowest = starts[0], value(s, price, starts[0].thresholds)
  for start in starts:
    thresholds = solve(s, price, start.thresholds)
    reached = value(s, price, thresholds)
    if reached < lowest - 1e-9 * (s.cost[-1] + price):
      best, lowest = _point(s, p, thresholds), reached
  return best


def _saving(a: Point, b: Point) -> float:
  return a.measured.cost - b.measured.cost


def efficient(points: Iterable[T], at: Callable[[T], tuple[float, float]]) -> list[T]:
  """Selects the points that none beats in at(point) = (cost, loss), by falling cost."""
  kept: list[T] = []
  for q in sorted(points, key=at):
    if not kept or at(q)[1] < at(kept[-1])[1]:
      kept.append(q)
  return kept[::-1]
