"""A risk level with a guarantee: Learn-then-Test by fixed-sequence testing.

Angelopoulos, Bates, Candès, Jordan, Lei, "Learn then Test", arXiv 2110.01052. The
held-out samples are split in two. Thresholds are searched on one half and put in order,
safest first. On the other half each has the p-value of "its risk exceeds alpha",

    P(Binomial(m, alpha) <= losses among m),

and they are tested in order until one is not rejected at delta. With probability
1 - delta over the held-out samples none of the rejected has a risk above alpha, however
many were tried, as long as samples are drawn independently as they will be in use.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy.special import bdtr, betaincinv

from depthprune.cascades import predictions as pr
from depthprune.cascades.pareto import Point, front
from depthprune.cascades.predictions import Predictions


class Certificate(NamedTuple):
  """What was shown of the risk of thresholds."""

  loss: str
  """'error' | 'gap' | 'disagreement', see `predictions.losses`."""
  alpha: float
  """With probability 1 - delta the risk is at most this."""
  delta: float
  rows: int
  """Samples it was tested on, none of which was searched on."""
  losses: int
  """Losses among them."""
  bound: float
  """Upper confidence bound of the risk of these thresholds alone, at most alpha."""


def p_value(losses: int, rows: int, alpha: float) -> float:
  """P(Binomial(rows, alpha) <= losses): of "the risk exceeds alpha"."""
  return float(bdtr(losses, rows, alpha))


def upper(losses: int, rows: int, delta: float) -> float:
  """The risk at which `p_value` is delta: Clopper and Pearson's upper bound.

  1 - delta^(1 / rows) without a loss: no fewer can be certified by so many rows."""
  if losses >= rows:
    return 1.0
  return float(betaincinv(losses + 1, rows - losses, 1 - delta))


def walk(losses: Sequence[int], rows: int, alpha: float, delta: float) -> int:
  """How many of the candidates, in the order given, are certified one after the other.

  The first that is not ends it: a later one that passes would cost the guarantee."""
  values = (p_value(count, rows, alpha) for count in losses)
  return next((i for i, p in enumerate(values) if p > delta), len(losses))


def halves(n: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
  """Rows to search on and rows to test on: the same for the same n and seed."""
  rows = np.random.default_rng(seed).permutation(n)
  return np.sort(rows[: n // 2]), np.sort(rows[n // 2 :])


def certify(
  p: Predictions,
  alpha: float,
  delta: float = 0.05,
  loss: str = 'gap',
  least: int = 20,
  points: int = 40,
  seed: int = 0,
) -> tuple[np.ndarray, Certificate]:
  """The cheapest thresholds float32 [K - 1] whose risk is certified.

  p: held-out data. alpha: the risk, a share of all samples; delta: the chance that the
  certificate is wrong. loss, least, points: as in `front`. seed: of the split.
  Raises ValueError where nothing is certified, with the lowest level that would be.
  """
  p = pr.validate(p)
  _check(p, alpha, delta)
  searched, tested = halves(p.scores.shape[1], seed)
  candidates = front(pr.take(p, searched), loss, least, points)
  candidates.sort(key=lambda q: (q.risk, -q.measured.cost))
  counts = _counts(pr.take(p, tested), loss, candidates)
  m = len(tested)
  certified = walk(counts, m, alpha, delta)
  if not certified:
    raise ValueError(_refusal(alpha, delta, loss, counts[0], m))
  chosen = min(range(certified), key=lambda i: candidates[i].measured.cost)
  bound = upper(counts[chosen], m, delta)
  certificate = Certificate(loss, alpha, delta, m, counts[chosen], bound)
  return candidates[chosen].thresholds, certificate


def _counts(p: Predictions, loss: str, candidates: Sequence[Point]) -> list[int]:
  lost, rows = pr.losses(p, loss), np.arange(p.scores.shape[1])
  left = (pr.leave(p.scores, q.thresholds) for q in candidates)
  return [int(np.count_nonzero(lost[exits, rows])) for exits in left]


def _check(p: Predictions, alpha: float, delta: float) -> None:
  for name, number in (('alpha', alpha), ('delta', delta)):
    if not 0 < number < 1:
      raise ValueError(f'{name}={number}: expected a share in (0, 1)')
  if p.scores.shape[1] < 2:
    raise ValueError(
      'a risk level takes held-out samples to search on and others to test on: '
      'expected at least 2, got 1'
    )


def _refusal(alpha: float, delta: float, loss: str, losses: int, rows: int) -> str:
  lowest = math.ceil(1e5 * upper(losses, rows, delta)) / 1e5
  text = (
    f"risk {alpha:g} of '{loss}' at delta {delta:g} is reached by no thresholds: the "
    f'safest lose {losses} of the {rows} held-out samples tested on; the lowest level '
    f'that can be certified is {lowest:g}'
  )
  least = math.ceil(math.log(delta) / math.log1p(-alpha))
  if rows < least:
    text += (
      f'; {rows} samples certify nothing below 1 - delta^(1/{rows}), even without a '
      f'loss: this level takes {least}, and as many to search on'
    )
  return text
