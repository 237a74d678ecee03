"""The thresholds of a cascade: from one number a user has, on held-out data.

Fixed, within a budget of mean cost, within a drop of accuracy, or below a level of risk
with a guarantee. Test data never chooses: see `achieved`.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from depthprune.cascades import predictions as pr
from depthprune.cascades import risk as ltt
from depthprune.cascades.pareto import Point, front
from depthprune.cascades.predictions import Measured, Predictions, leave
from depthprune.cascades.risk import Certificate

# Of the rows of test data: that many may be held-out rows, by chance or duplication.
SHARED = 0.5


class Choice(NamedTuple):
  """Thresholds with where they come from."""

  exits: tuple[str, ...]
  """Names [K]; the last, the network's own, has no threshold."""
  thresholds: np.ndarray
  """float32 [K - 1]; infinity: the exit is never used, -infinity: all leave there."""
  kind: str
  """'fixed' | 'budget' | 'drop' | 'risk'"""
  requested: float
  """The threshold, mean cost, drop in points or risk level that was asked for."""
  held_out: Measured
  """On all of the data it was chosen on, so that accuracy is a little flattered."""
  risk: Certificate | None
  """Of a risk level."""
  rows: np.ndarray
  """uint32 [n]: `predictions.digest` of the data it was chosen on."""


class Intervals(NamedTuple):
  """95 % intervals (lower, upper)."""

  drop: tuple[float, float]
  """Accuracy lost against the network's own answer, in percentage points."""
  saved: tuple[float, float]
  """Share of the cost of the network without heads."""


def choice(
  p: Predictions,
  thresholds: Any,
  kind: str,
  requested: float,
  risk: Certificate | None = None,
) -> Choice:
  """Thresholds [K - 1] chosen on validated predictions."""
  thresholds = np.asarray(thresholds, np.float32)
  held_out = pr.measure(p, pr.leave(p.scores, thresholds))
  return Choice(
    p.exits, thresholds, kind, float(requested), held_out, risk, pr.digest(p)
  )


def measured(chosen: Choice | Any, p: Predictions) -> Measured:
  """What a choice, or thresholds [K - 1], give on any data.

  Raises ValueError for a choice of other exits, and as `predictions.validate` does."""
  p = pr.validate(p)
  if isinstance(chosen, Choice):
    _same_exits(chosen, p)
    chosen = chosen.thresholds
  return pr.measure(p, pr.leave(p.scores, chosen))


def achieved(chosen: Choice, test: Predictions) -> Measured:
  """What a choice gives on test data.

  Raises ValueError where more than half of the test data is data it was chosen on."""
  test = pr.validate(test)
  _same_exits(chosen, test)
  _refuse_held_out(chosen, test)
  return measured(chosen, test)


def bootstrap(
  chosen: Choice, test: Predictions, resamples: int = 1000, seed: int = 0
) -> Intervals:
  """95 % intervals on test data of what is lost and saved.

  Samples are drawn with replacement; the cascade and the network alone see the same
  draw (a paired bootstrap; percentiles). Raises ValueError as `achieved` does, without
  labels, or without resamples.
  """
  test = pr.validate(test)
  _same_exits(chosen, test)
  _refuse_held_out(chosen, test)
  if resamples < 1:
    raise ValueError(f'resamples={resamples}: expected at least 1')
  left = pr.leave(test.scores, chosen.thresholds)
  wrong, rows = pr.losses(test, 'error'), np.arange(len(left))
  lost = 100.0 * (wrong[left, rows].astype(int) - wrong[-1])
  gained = 1 - test.cost[left] / test.whole
  draw = np.random.default_rng(seed).integers
  means = [
    _means(draw(0, len(left), len(left)), lost, gained) for _ in range(resamples)
  ]
  low, high = np.percentile(means, (2.5, 97.5), axis=0).tolist()
  return Intervals((low[0], high[0]), (low[1], high[1]))


def to_json(chosen: Choice) -> dict[str, Any]:
  """Plain JSON: thresholds by name (infinite ones as text), rows as one hex string."""
  risk = chosen.risk and chosen.risk._asdict()
  held_out = {**chosen.held_out._asdict(), 'exits': list(chosen.held_out.exits)}
  if np.isnan(chosen.held_out.accuracy):
    held_out['accuracy'] = None
  finite = lambda t: t if np.isfinite(t) else str(t)
  return {
    'kind': chosen.kind,
    'requested': finite(chosen.requested),
    'exits': list(chosen.exits),
    'thresholds': [finite(t) for t in chosen.thresholds.tolist()],
    'held_out': held_out,
    'risk': risk,
    'rows': chosen.rows.astype('<u4').tobytes().hex(),
  }


def from_json(entry: Mapping[str, Any]) -> Choice:
  """The choice that `to_json` wrote, equal to the last bit."""
  held_out = dict(entry['held_out'])
  accuracy = held_out['accuracy']
  return Choice(
    tuple(entry['exits']),
    np.array([float(t) for t in entry['thresholds']], np.float32),
    entry['kind'],
    float(entry['requested']),
    Measured(
      float('nan') if accuracy is None else accuracy,
      held_out['cost'],
      tuple(held_out['exits']),
    ),
    entry['risk'] and Certificate(**entry['risk']),
    np.frombuffer(bytes.fromhex(entry['rows']), '<u4'),
  )


def _means(rows: np.ndarray, *values: np.ndarray) -> list[float]:
  return [float(value[rows].mean()) for value in values]


def _same_exits(chosen: Choice, p: Predictions) -> None:
  if chosen.exits != p.exits:
    raise ValueError(
      f'thresholds were chosen for the exits {", ".join(chosen.exits)}, got data of '
      f'{", ".join(p.exits)}'
    )


def _refuse_held_out(chosen: Choice, test: Predictions) -> None:
  shared = np.isin(pr.digest(test), chosen.rows).mean()
  if shared > SHARED:
    raise ValueError(
      f'{100 * shared:.0f} % of the test data is the held-out data that these '
      'thresholds were chosen on: test data never chooses; give a split that neither '
      'trained nor chose, or call `measured` for the flattered number'
    )


__all__ = [
  'Choice', 'Intervals', 'Measured', 'Point', 'Predictions', 'achieved', 'bootstrap',
  'fixed', 'for_budget', 'for_drop', 'for_risk', 'from_json', 'front', 'leave',
  'measured', 'to_json',
]  # fmt: skip


def fixed(p: Predictions, tau: float) -> Choice:
  """One threshold for every exit; above the highest score, nothing exits.

  Raises ValueError for a tau of nan, and as `predictions.validate` does."""
  p = pr.validate(p)
  if np.isnan(tau):
    raise ValueError('tau=nan: expected a number, or infinity to use no exit')
  return choice(p, np.full(len(p.exits) - 1, tau), 'fixed', tau)


def for_budget(
  p: Predictions, budget: float, least: int = 20, points: int = 40
) -> Choice:
  """The most accurate thresholds whose mean cost on p is within the budget.

  p: held-out data with labels. budget: mean cost of a sample, in the unit of p.cost.
  least, points: as in `front`. Raises ValueError for a budget below what is cheapest.
  """
  p = pr.validate(p)
  within = lambda q: q.measured.cost <= budget
  if not budget >= p.cost[0]:
    raise ValueError(
      f'budget {budget:g} is below the floor: exit {p.exits[0]}, the cheapest, costs '
      f'{p.cost[0]:g} a sample'
    )
  found = front(p, least=least, points=points, within=within)
  allowed = [q for q in found if within(q)]
  if not allowed:
    raise ValueError(
      f'budget {budget:g} is below the floor: on the held-out data no thresholds cost '
      f'less than {found[-1].measured.cost:g} a sample, where at least {least} must '
      f'leave at an exit and a score of nan never leaves'
    )
  best = min(allowed, key=lambda q: (q.risk, q.measured.cost))
  return choice(p, best.thresholds, 'budget', budget)


def for_drop(p: Predictions, drop: float, least: int = 20, points: int = 40) -> Choice:
  """The cheapest thresholds that lose at most `drop` points of accuracy on p.

  p: held-out data with labels. drop: percentage points below the network's own
  accuracy (0.5: from 93.0 % to 92.5 %). least, points: as in `front`.
  Raises ValueError for a drop below 0.
  """
  p = pr.validate(p)
  if not drop >= 0:
    raise ValueError(f'drop={drop}: expected percentage points, 0 or more')
  # Whole samples, so that a drop met exactly is not lost to the last bit of a mean.
  n, own = p.scores.shape[1], int(np.count_nonzero(pr.losses(p, 'error')[-1]))
  allowed = np.floor(own + n * drop / 100 + 1e-9)
  within = lambda q: round(q.risk * n) <= allowed
  found = front(p, least=least, points=points, within=within)
  cheapest = min(filter(within, found), key=lambda q: q.measured.cost)
  return choice(p, cheapest.thresholds, 'drop', drop)


def for_risk(
  p: Predictions,
  alpha: float,
  delta: float = 0.05,
  risk: str = 'gap',
  least: int = 20,
  points: int = 40,
  seed: int = 0,
) -> Choice:
  """The cheapest thresholds whose risk on unseen data is certified: at most alpha.

  It holds with probability 1 - delta over the held-out samples, if they are drawn as
  those in use will be. risk: the share of samples where the cascade is wrong
  ('error'), is wrong while the network alone is right ('gap'), or differs from it
  ('disagreement', which needs no labels). Half of p, drawn by seed, searches; the other
  half tests: see `risk.certify`.
  Raises ValueError for a level that no thresholds reach; says the lowest one.
  """
  p = pr.validate(p)
  thresholds, certificate = ltt.certify(p, alpha, delta, risk, least, points, seed)
  return choice(p, thresholds, 'risk', alpha, certificate)
