"""Which thresholds are worth having: the best accuracy for every mean cost.

With a price on a loss (how much cost one loss is worth), thresholds have one value,
mean[cost + price · loss]. One threshold is solved exactly, given the others: order the
samples that reach the exit by score; a threshold leaves the first m of them, and the
cumulative sum of what leaving costs over going on says which m is best. Exits are
solved in turn, from the last to the first, until nothing improves; with one exit that
is the optimum. The prices are the slopes between neighbours on the front found so far,
which puts a point wherever there is one (the NISE method: Cohon, "Multiobjective
Programming and Planning", 1978).
"""

from collections.abc import Callable, Iterable
from typing import NamedTuple, TypeVar

import numpy as np

from depthprune.cascades import predictions as pr
from depthprune.cascades.predictions import Measured, Predictions

T = TypeVar('T')


class Point(NamedTuple):
  """Thresholds on the front."""

  thresholds: np.ndarray
  """float32 [K - 1]; infinity is an exit that is never used, -infinity one where all
  leave."""
  risk: float
  """Mean loss."""
  measured: Measured


class Search(NamedTuple):
  """The arrays a search works on."""

  cost: np.ndarray
  """[K]"""
  loss: np.ndarray
  """bool [K, n]"""
  scores: np.ndarray
  """[K - 1, n]"""
  order: np.ndarray
  """int [K - 1, n], most confident first, nan last."""
  least: int
  """Samples that must leave at an exit that is used."""


def search(p: Predictions, loss: str = 'error', least: int = 20) -> Search:
  """What `solve` needs of validated predictions. Raises as `predictions.losses`."""
  order = np.argsort(-p.scores, axis=1, kind='stable')
  return Search(p.cost, pr.losses(p, loss), p.scores, order, max(least, 1))


def front(
  p: Predictions,
  loss: str = 'error',
  least: int = 20,
  points: int = 40,
  within: Callable[[Point], bool] | None = None,
) -> list[Point]:
  """Thresholds that no others found beat in cost and mean loss, to the cheapest.

  The first is never exit, also where another point beats it.
  loss: 'error' | 'gap' | 'disagreement', see `predictions.losses`. least: samples that
  must leave at an exit for it to be used, against thresholds that fit a few samples.
  points: prices to try; as many again are spent where `within` changes from one point
  to the next, if it is given. Choose on held-out data: p must not be the test data.
  Raises ValueError as `predictions.validate` and `predictions.losses` do.
  """
  p = pr.validate(p)
  s = search(p, loss, least)
  never = _point(s, p, np.full(len(s.scores), np.inf, np.float32))
  # One loss for more than all costs together: the fewest losses there are.
  ends = [
    _best(s, p, price, never) for price in (2 * p.scores.shape[1] * p.cost[-1], 0)
  ]
  found, gaps = list(ends), [ends]
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
        found.append(c)
        gaps += [(a, c), (c, b)]
  best = efficient(found, lambda q: (q.measured.cost, q.risk))
  return [never, *(q for q in best if q is not never)]


def solve(s: Search, price: float, start: np.ndarray) -> np.ndarray:
  """Thresholds [K - 1] of the lowest `value` that turns of exact steps reach.

  start: float32 [K - 1]. With one exit the optimum; with more, one where no other
  value of a single threshold is better, as far as `least` allows. Returns start itself
  where nothing improves on it.
  """
  worth = s.cost[:, None] + price * s.loss  # [K, n]
  best, lowest = start, value(s, price, start)
  while True:
    thresholds = _sweep(s, worth, best)
    reached = value(s, price, thresholds)
    # Rounding of a sum must not be taken for progress: it could go round in circles.
    if reached >= lowest - 1e-9 * (s.cost[-1] + price):
      return best
    best, lowest = thresholds, reached


def value(s: Search, price: float, thresholds: np.ndarray) -> float:
  """sum[cost + price · loss] over the samples; price: cost that one loss is worth."""
  left = pr.leave(s.scores, thresholds)
  lost = np.count_nonzero(s.loss[left, np.arange(len(left))])
  return float(s.cost[left].sum() + price * lost)


def _sweep(s: Search, worth: np.ndarray, thresholds: np.ndarray) -> np.ndarray:
  """Every threshold solved once, the last first. worth: cost + price · loss [K, n]"""
  thresholds = thresholds.copy()
  # Only earlier exits decide who reaches an exit, and they have yet to change.
  left = pr.leave(s.scores, thresholds)
  ahead = worth[-1]  # of a sample that goes on from the exit at hand
  for k in reversed(range(len(thresholds))):
    order = s.order[k][left[s.order[k]] >= k]
    thresholds[k] = _threshold(s.scores[k][order], (worth[k] - ahead)[order], s.least)
    ahead = np.where(s.scores[k] > thresholds[k], worth[k], ahead)
  return _used(s, thresholds)


def _threshold(scores: np.ndarray, change: np.ndarray, least: int) -> float:
  """The best threshold of one exit.

  scores: [m] of the samples that reach it, falling, nan last; change: what each adds to
  the value if it leaves here. A threshold cannot stand between equal scores."""
  able = np.count_nonzero(scores > -np.inf)
  after = np.append(scores[1:able], -np.inf)[:able]  # the first score that stays
  sums = np.where(scores[:able] > after, np.cumsum(change[:able]), np.inf)
  sums[: least - 1] = np.inf
  if not able or sums.min() >= 0:
    return np.inf
  return after[sums.argmin()]


def _used(s: Search, thresholds: np.ndarray) -> np.ndarray:
  """Exits at which fewer than `least` leave are closed: the first first, as those who
  then go on may be what a later one lacks."""
  thresholds, stay = thresholds.copy(), np.full(s.scores.shape[1], True)
  for k, scores in enumerate(s.scores):
    goes = stay & (scores > thresholds[k])
    if np.count_nonzero(goes) < s.least:
      thresholds[k] = np.inf
    else:
      stay &= ~goes
  return thresholds


def _point(s: Search, p: Predictions, thresholds: np.ndarray) -> Point:
  left = pr.leave(s.scores, thresholds)
  risk = float(s.loss[left, np.arange(len(left))].mean())
  return Point(thresholds, risk, pr.measure(p, left))


def _best(s: Search, p: Predictions, price: float, *starts: Point) -> Point:
  """The best that is reached from the starts; the first of them if none improves."""
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
  """Those that no other point beats, by falling cost. at(point): (cost, loss)"""
  kept: list[T] = []
  for q in sorted(points, key=at):
    if not kept or at(q)[1] < at(kept[-1])[1]:
      kept.append(q)
  return kept[::-1]
