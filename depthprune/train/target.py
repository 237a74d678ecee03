"""The decision that trained gate weights call for, corrected to meet a cost target."""

from collections.abc import Mapping

import numpy as np

from depthprune.program import arguments, rounding
from depthprune.program.coupling import WHY, Coupling
from depthprune.program.rounding import RoundTo, possible
from depthprune.program.widths import Range, allowed, nearest
from depthprune.timing.layers import TIME, CostFunction, counted
from depthprune.train.recipe import TOLERANCE
from depthprune.train.task import Tree

Weights = Mapping[str, np.ndarray]
"""{group: [n]}; channels with a weight above 0 are to be kept."""


def on_target(
  coupling: Coupling,
  w: Weights,
  target: float,
  of: str | CostFunction = 'flops',
  round_to: RoundTo = 1,
  limits: Mapping[str, Range] | None = None,
) -> Tree:
  """Returns keep = w > 0, corrected where that is off the target.

  Widths are first rounded down to one that `round_to` allows, and brought between their
  limits. Then, while the cost is more than TOLERANCE off, the gates nearest to zero
  whose flip brings it nearer are flipped: one gate, or as many as make a multiple.
  Where multiples are too coarse for that, two groups at a time move by one width, in
  opposite directions.

  Args:
    coupling: the network's coupling.
    w: the trained weight of every gate.
    target: part of the cost that is to remain, in (0, 1].
    of: 'flops', 'params' or a cost of `timing.layers`.
    round_to: widths become multiples of it, or 'auto'.
    limits: {group: Range} of the widths that each group may have; by default any.

  Returns:
    {'channels': {group: bool [n]}}, in which groups without a weight are whole.
  """
  name, C = counted(coupling, of, round_to)
  w = {group: np.asarray(value) for group, value in w.items()}
  C_0 = C(coupling, None)
  choices = allowed({g: value.size for g, value in w.items()}, round_to, limits)
  widths = {
    group: int(rounding.built(max(1, (value > 0).sum()), value.size, round_to))
    for group, value in w.items()
  }
  widths = {g: min(max(n, choices[g][0]), choices[g][-1]) for g, n in widths.items()}
  error = lambda widths: C(coupling, _widest(w, widths)) / C_0 - target
  off = error(widths)
  for group, width in _nearest_first(w, widths, choices):
    if abs(off) <= TOLERANCE:
      break
    if (width < widths[group]) == (off > 0):
      changed = {**widths, group: width}
      if abs(error(changed)) < abs(off):
        widths, off = changed, error(changed)
  if round_to != 1 and name != TIME:
    widths = nearest(widths, choices, error, TOLERANCE)
  whole = {group: gate > 0 for group, gate in coupling.gates()['channels'].items()}
  return {'channels': {**whole, **_widest(w, widths)['channels']}}


def reachable(
  coupling: Coupling,
  target: float,
  of: str | CostFunction = 'flops',
  round_to: RoundTo = 1,
  limits: Mapping[str, Range] | None = None,
) -> None:
  """Checks that a network can be cut to a target; arguments as for `on_target`.

  Raises:
    ValueError: the target is not in (0, 1], the narrowest network costs more or the
      widest less, or no channels can be gated.
  """
  name, C = counted(coupling, of, round_to)
  is_text = isinstance(target, str | bytes | bool | None) or np.ndim(target)
  if is_text or not 0 < target <= 1:
    raise arguments.refused(
      'target',
      "a fraction in (0, 1] such as 0.5 or '50%'",
      target,
      f'it is the part of the {name} that is to remain',
      TypeError if is_text else ValueError,
    )
  gates = coupling.gates()['channels']
  if not gates:
    raise ValueError(f'target: no group of channels can be gated; {WHY}')
  if limits is not None:
    gates = {group: gates[group] for group in limits}
  if not gates:
    raise ValueError(
      'target: all groups are to be left whole, so there is nothing to cut'
    )
  choices = allowed({g: gate.size for g, gate in gates.items()}, round_to, limits)
  share = lambda widths: C(coupling, _widest(gates, widths)) / C(coupling, None)
  floor = share({group: widths[0] for group, widths in choices.items()})
  ceiling = share({group: widths[-1] for group, widths in choices.items()})
  if target < floor:
    fewest = possible(max(gate.size for gate in gates.values()), round_to)[0]
    kept = '' if limits is None else ', or as many as are to stay,'
    raise ValueError(
      f'target: {target:g} of the {name} cannot be reached: with {fewest} channel(s) '
      f'left in every group{kept} {floor:.4f} remain; ask for that or more, or lower '
      'round_to'
    )
  if target > ceiling:
    raise ValueError(
      f'target: {target:g} of the {name} cannot be reached: with what at_most leaves '
      f'{ceiling:.4f} remain; ask for that or less'
    )


def _nearest_first(
  w: Weights, widths: Mapping[str, int], choices: Mapping[str, list[int]]
) -> list[tuple[str, int]]:
  """Returns all other (group, width), those first for which gates move least."""
  moves = []
  for group, value in w.items():
    falling = -np.sort(-value)
    for width in choices[group]:
      if width != widths[group]:
        farthest = falling[width if width < widths[group] else width - 1]
        moves.append((abs(float(farthest)), group, width))
  return [(group, width) for _, group, width in sorted(moves)]


def _widest(w: Weights, widths: Mapping[str, int]) -> Tree:
  """Returns the keep tree of the channels with the largest weights of every group."""
  rank = lambda value: np.argsort(np.argsort(-value, kind='stable'), kind='stable')
  return {'channels': {g: rank(value) < widths[g] for g, value in w.items()}}
