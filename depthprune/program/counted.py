"""The costs that a target may count, by name."""

from collections.abc import Callable, Mapping
from typing import Any

from depthprune.program import cost
from depthprune.program.couple import Coupling
from depthprune.program.timing import milliseconds

Cost = Callable[[Coupling, Mapping | None], Any]
"""C(coupling, gates): gates None, bool or float, as for `cost.flops`."""

COSTS = {'flops': cost.flops, 'params': cost.params}
TIME = 'milliseconds'


def counted(coupling: Coupling, of: str | Cost, round_to: int = 1) -> tuple[str, Cost]:
  """(name, C) of a cost: 'flops', 'params', or 'milliseconds', which are measured now.

  of: a name, or a cost such as `milliseconds(coupling, batch=8)` gives. round_to: what
    widths will be multiples of.

  Raises: ValueError for an unknown name, and as `milliseconds` does.
  """
  if callable(of):
    return next((name for name, C in COSTS.items() if C is of), TIME), of
  if of == TIME:
    return of, milliseconds(coupling, round_to=round_to)
  if of not in COSTS:
    raise ValueError(f'of={of!r}: expected one of {", ".join([*COSTS, TIME])}')
  return of, COSTS[of]
