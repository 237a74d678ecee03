"""The thresholds of a cascade: from one number a user has, on held-out data.

Fixed, within a budget of mean cost, within a drop of accuracy, or below a level of risk
with a guarantee. Test data never chooses: see `achieved`.
"""

import numpy as np

from depthprune.inference import choice as made
from depthprune.inference import predictions as pr
from depthprune.inference import risk as ltt
from depthprune.inference.choice import (
  Choice,
  Intervals,
  achieved,
  bootstrap,
  from_json,
  measured,
  to_json,
)
from depthprune.inference.front import Point, front
from depthprune.inference.predictions import Measured, Predictions, leave

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
  return made.choice(p, np.full(len(p.exits) - 1, tau), 'fixed', tau)


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
  return made.choice(p, best.thresholds, 'budget', budget)


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
  return made.choice(p, cheapest.thresholds, 'drop', drop)


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
  return made.choice(p, thresholds, 'risk', alpha, certificate)
