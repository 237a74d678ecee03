"""Thresholds with a guaranteed level of risk: Learn-then-Test, fixed-sequence testing.

Angelopoulos, Bates, Candès, Jordan, Lei, "Learn then Test", arXiv 2110.01052. The
held-out samples are split into halves. Thresholds are searched on one half and ordered,
safest first. On the other half, of m samples, the hypothesis "the risk of these
thresholds exceeds alpha" has the p-value

    P(Binomial(m, alpha) <= losses among m),

and hypotheses are tested in order until one is not rejected at delta. With probability
1 - delta over the held-out samples, no rejected thresholds have a risk above alpha,
however many were tried, if samples are drawn independently and as they are in use.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy.special import bdtr, betaincinv

from depthprune.cascades.pareto import front
from depthprune.cascades.predictions import (
  LOSSES,
  Predictions,
  leave,
  losses,
  take,
  validate,
)


class Certificate(NamedTuple):
  """A guarantee about the risk of thresholds.

  Attributes:
    loss: 'error', 'gap' or 'disagreement'; see `predictions.losses`.
    alpha: limit of the risk, which holds with probability 1 - delta.
    delta: chance that the risk is larger.
    rows: number of samples of the test, which the search did not see.
    losses: number of losses among them.
    bound: upper confidence bound for the risk of these thresholds alone, at most alpha.
  """

  loss: str
  alpha: float
  delta: float
  rows: int
  losses: int
  bound: float


def p_value(losses: int, rows: int, alpha: float) -> float:
  """Returns the p-value of the hypothesis that the risk exceeds alpha."""
  return float(bdtr(losses, rows, alpha))


def upper(losses: int, rows: int, delta: float) -> float:
  """Returns the risk at which `p_value` is delta: Clopper and Pearson's upper bound.

  Without a loss it is 1 - delta^(1 / rows), the lowest risk that so many rows certify.
  """
  if losses >= rows:
    return 1.0
  return float(betaincinv(losses + 1, rows - losses, 1 - delta))


def walk(losses: Sequence[int], rows: int, alpha: float, delta: float) -> int:
  """Returns how many candidates, safest first, are certified before one is not.

  Accepting a later candidate that passes would void the guarantee. `losses` are those
  of the candidates among `rows` samples.
  """
  values = (p_value(count, rows, alpha) for count in losses)
  return next((i for i, p in enumerate(values) if p > delta), len(losses))


def halves(n: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
  """Splits n rows into those to search on and those to test on, fixed by the seed."""
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
  """Finds the cheapest thresholds whose risk is certified.

  Args:
    p: predictions on held-out data.
    alpha: limit of the risk, a share of all samples.
    delta: chance that the certificate is wrong.
    loss: 'error', 'gap' or 'disagreement'; see `predictions.losses`.
    least: number of samples that must leave at an exit that is used.
    points: number of prices to try; see `pareto.front`.
    seed: seed of the split into halves.

  Returns:
    The thresholds float32 [K - 1] and their certificate.

  Raises:
    ValueError: nothing can be certified; the message gives the lowest possible alpha.
  """
  p = validate(p)
  _check(p, alpha, delta)
  if loss not in LOSSES:  # the test counts losses, which must be whole
    raise ValueError(f'loss={loss!r}: expected one of {", ".join(LOSSES)}')
  searched, tested = halves(p.scores.shape[1], seed)
  candidates = front(take(p, searched), loss, least, points)
  candidates.sort(key=lambda q: (q.risk, -q.measured.cost))
  test, m = take(p, tested), len(tested)
  lost = losses(test, loss)
  exits = (leave(test.scores, q.thresholds) for q in candidates)
  counts = [int(np.count_nonzero(lost[left, np.arange(m)])) for left in exits]
  certified = walk(counts, m, alpha, delta)
  if not certified:
    raise ValueError(_refusal(alpha, delta, loss, counts[0], m))
  chosen = min(range(certified), key=lambda i: candidates[i].measured.cost)
  bound = upper(counts[chosen], m, delta)
  certificate = Certificate(loss, alpha, delta, m, counts[chosen], bound)
  return candidates[chosen].thresholds, certificate


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
