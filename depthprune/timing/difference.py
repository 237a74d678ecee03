"""Whether one time is longer than another by more than chance: the only such rule.

Notes about measurements, tables, tiles and charts all ask here, so that none of them
calls faster what another calls equal. Nothing here loads jax.
"""

import math
from typing import Literal, NamedTuple

Quartiles = tuple[float, float] | None


class Difference(NamedTuple):
  """How two times differ.

  Attributes:
    kind: 'speed-up', 'slowdown', 'no difference', or 'not measured' where a time is
      not a finite number above zero.
    factor: the longer time divided by the shorter, at least 1; 1 without a difference.
    between: the least and the largest factor that the quartiles of both times allow,
      if they are known.
  """

  kind: Literal['speed-up', 'slowdown', 'no difference', 'not measured']
  factor: float = 1.0
  between: Quartiles = None


def beyond_chance(faster: int, turns: int) -> bool:
  """Returns whether a sign test over the turns rules out chance at two sigma.

  Args:
    faster: number of turns in which the second of two networks was faster.
    turns: number of all turns.
  """
  return abs(faster - turns / 2) > turns**0.5


def compare(
  before: float,
  after: float,
  before_quartiles: Quartiles = None,
  after_quartiles: Quartiles = None,
  faster: int | None = None,
  turns: int | None = None,
) -> Difference:
  """Returns how a time differs from the one before.

  Networks that took turns are compared turn by turn, as a machine that is slow for a
  while is slow for both. Where the turns were not counted, there is no difference if
  the quartiles overlap. Nor is there one below half a percent.

  Args:
    before: median time before.
    after: median time after.
    before_quartiles: lower and upper quartile of the time before, if they are known.
    after_quartiles: lower and upper quartile of the time after, if they are known.
    faster: number of turns in which the time after was shorter, if it is known.
    turns: number of all turns, if it is known.
  """
  if not (0 < before < math.inf and 0 < after < math.inf):
    return Difference('not measured')
  is_faster = after < before
  if faster is not None and turns:
    clear = beyond_chance(faster, turns) and (faster > turns / 2) == is_faster
  elif before_quartiles and after_quartiles:
    (low, high), (lower, higher) = before_quartiles, after_quartiles
    clear = higher < low if is_faster else high < lower
  else:
    clear = True
  factor = max(before, after) / min(before, after)
  if not clear or round(factor, 2) == 1:
    return Difference('no difference')
  between = None
  if before_quartiles and after_quartiles:
    longer, shorter = before_quartiles, after_quartiles
    if not is_faster:
      longer, shorter = shorter, longer
    if min(shorter) > 0:
      between = longer[0] / shorter[1], longer[1] / shorter[0]
  return Difference('speed-up' if is_faster else 'slowdown', factor, between)
