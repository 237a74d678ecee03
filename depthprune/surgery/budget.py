"""Constraints on what a network costs, one or several, none of which is exceeded."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from depthprune.program import arguments
from depthprune.program.coupling import Coupling
from depthprune.program.rounding import RoundTo
from depthprune.timing.layers import TIME, CostFunction, Milliseconds, counted


class Constraint(NamedTuple):
  """A cost that a network may have at most.

  Attributes:
    name: of the cost, which is its unit too.
    cost: (coupling, gates) -> cost.
    asked: the target as it was asked for.
    goal: the target as an absolute cost.
    total: cost of the whole network.
  """

  name: str
  cost: CostFunction
  asked: str
  goal: float
  total: float


def constraints(
  coupling: Coupling,
  target: float | str | Mapping[Any, Any],
  of: str | CostFunction,
  round_to: RoundTo = 1,
  closed: Mapping | None = None,
) -> list[Constraint]:
  """Returns a target as a list of constraints.

  Args:
    coupling: of the network, made by `couple`.
    target: one target, or {cost: target}, as `oneshot` takes them.
    of: the cost of a single target.
    round_to: widths will be multiples of this, or 'auto'.
    closed: a decision on branches, which will be counted.

  Raises:
    ValueError: an unknown cost, a target that `absolute` refuses, or milliseconds where
      branches are closed: milliseconds do not count these.
  """
  several = [*target.items()] if isinstance(target, Mapping) else [(of, target)]
  found = []
  for key, part in several:
    timed = key == TIME or isinstance(key, Milliseconds)
    if timed and (closed or {}).get('branches'):
      what = 'milliseconds know the widths of layers alone, and branches are closed'
      raise arguments.wrong('target', what, 'cut these first, or count flops')
    name, cost = counted(coupling, key, round_to)
    total = cost(coupling, None)
    where = 'target' if len(several) == 1 else f'target[{name!r}]'
    goal = absolute(part, total, where)
    asked = str(part) if len(several) == 1 else f'{name}={part}'
    found.append(Constraint(name, cost, asked, goal, total))
  return found


def absolute(target: float | str, total: float, name: str = 'target') -> float:
  """Returns a target as an absolute cost.

  Args:
    target: a fraction in (0, 1], a percentage such as '50%', or an absolute number.
    total: cost of the whole network.
    name: of the argument, for errors.

  Raises:
    ValueError: the target is none of these, or above the total.
  """
  text = str(target).strip()
  try:
    number = float(text[:-1]) / 100 if text.endswith('%') else float(text)
  except ValueError:
    number = math.nan
  if 0 < number <= 1:
    return number * total
  if text.endswith('%') or not 1 < number <= total:
    expected = (
      f'a fraction in (0, 1], a percentage such as "50%", or a number up to {total:.4g}'
    )
    raise arguments.refused(name, expected, target, kind=ValueError)
  return number


def met(coupling: Coupling, asked: Iterable[Constraint], keep: Mapping) -> bool:
  """Returns whether a decision exceeds none of its constraints."""
  return all(one.cost(coupling, keep) <= one.goal for one in asked)


def reachable(
  coupling: Coupling, asked: Iterable[Constraint], smallest: Mapping, least: str
) -> None:
  """Checks that the smallest possible network meets all constraints.

  Args:
    coupling: of the network, made by `couple`.
    asked: the constraints.
    smallest: the decision that costs least.
    least: what it keeps, for errors.

  Raises:
    ValueError: it does not; the message names the first constraint that it exceeds.
  """
  for one in asked:
    floor = one.cost(coupling, smallest)
    if one.goal < floor:
      what = (
        f'{one.asked} is {one.goal:.4g} {one.name}; with {least} the floor is '
        f'{floor:.4g} ({floor / one.total:.3f} of {one.total:.4g})'
      )
      raise arguments.wrong('', f'target {what}: raise the target')


def fitting(
  coupling: Coupling,
  asked: Sequence[Constraint],
  keep_at: Callable[[int], Mapping],
  steps: int,
) -> int:
  """Finds by bisection the first of ever smaller decisions that meets all constraints.

  Args:
    coupling: of the network, made by `couple`.
    asked: the constraints.
    keep_at: (number of the decision, from 0 to `steps`) -> the decision.
    steps: number of the last decision, which is assumed to meet the constraints.

  Returns:
    Its number.
  """
  low, high = -1, steps
  while high - low > 1:
    middle = (low + high) // 2
    fits = met(coupling, asked, keep_at(middle))
    low, high = (low, middle) if fits else (middle, high)
  return high
