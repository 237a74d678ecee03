"""The decision that trained gate weights call for, corrected to meet a cost target."""

from collections.abc import Mapping, Sequence

import numpy as np

from depthprune.program import arguments, rounding
from depthprune.program.coupling import WHY, Coupling
from depthprune.program.rounding import RoundTo, possible
from depthprune.program.widths import Range, allowed, nearest
from depthprune.surgery.oneshot import closing, complemented, highest
from depthprune.timing.layers import TIME, CostFunction, counted
from depthprune.train.recipe import TOLERANCE
from depthprune.train.task import Tree

Weights = Mapping[str, np.ndarray]
"""{group: [n]}, {branch: () or [layers]}; what has a weight above 0 is to be kept."""

Branches = Mapping[str, Sequence[str]]
"""{branch that has weights: all branches that are closed with it}."""


def on_target(
  coupling: Coupling,
  w: Weights,
  target: float,
  of: str | CostFunction = 'flops',
  round_to: RoundTo = 1,
  limits: Mapping[str, Range] | None = None,
  branches: Branches | None = None,
) -> Tree:
  """Returns keep = w > 0, corrected where that is off the target.

  Widths are first rounded down to one that `round_to` allows, and brought between their
  limits. Then, while the cost is more than TOLERANCE off, the gates nearest to zero
  whose flip brings it nearer are flipped: one gate, or as many as make a multiple.
  Where multiples are too coarse for that, two groups at a time move by one width, in
  opposite directions. Layers are flipped while that does not overshoot the target. If
  it is not met so, one that overshoots is flipped, and channels make up for it.

  Args:
    coupling: the network's coupling.
    w: the trained weight of every gate.
    target: part of the cost that is to remain, in (0, 1].
    of: 'flops', 'params' or a cost of `timing.layers`.
    round_to: widths become multiples of it, or 'auto'.
    limits: {group: Range} of the widths that each group may have; by default any.
    branches: {branch of which `w` has a weight: all branches that are closed with it}.

  Returns:
    {'channels': {group: bool [n]}}, in which groups without a weight are whole, and
    with `branches` also {'branches': {path: bool () or [layers]}}.
  """
  name, C = counted(coupling, of, round_to)
  w = {group: np.asarray(value) for group, value in w.items()}
  C_0 = C(coupling, None)
  branches = branches or {}
  choices = _choices(w, round_to, limits, branches)
  widths = {group: int((value > 0).sum()) for group, value in w.items()}
  for group in w.keys() - branches:
    width = int(rounding.built(max(1, widths[group]), w[group].size, round_to))
    widths[group] = min(max(width, choices[group][0]), choices[group][-1])
  kept = lambda widths: _widest(coupling, w, widths, branches)
  error = lambda widths: C(coupling, kept(widths)) / C_0 - target
  widths = _flipped(w, widths, choices, error, branches)
  widths = _exchanged(w, widths, choices, error, branches)
  if round_to != 1 and name != TIME:
    as_they_are = {branch: [widths[branch]] for branch in branches}
    widths = nearest(widths, choices | as_they_are, error, TOLERANCE)
  return complemented(coupling, kept(widths), {})


def reachable(
  coupling: Coupling,
  target: float,
  of: str | CostFunction = 'flops',
  round_to: RoundTo = 1,
  limits: Mapping[str, Range] | None = None,
  branches: Branches | None = None,
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
  branches, there = branches or {}, coupling.gates()
  gates = there['channels']
  if not gates and not branches:
    raise ValueError(f'target: no group of channels can be gated; {WHY}')
  if limits is not None:
    gates = {group: gates[group] for group in limits}
  gates = gates | {branch: there['branches'][branch] for branch in branches}
  if not gates:
    raise ValueError(
      'target: all groups are to be left whole, so there is nothing to cut'
    )
  choices = _choices(gates, round_to, limits, branches)
  kept = lambda widths: _widest(coupling, gates, widths, branches)
  share = lambda widths: C(coupling, kept(widths)) / C(coupling, None)
  floor = share({group: widths[0] for group, widths in choices.items()})
  ceiling = share({group: widths[-1] for group, widths in choices.items()})
  if target < floor:
    sizes = [gate.size for group, gate in gates.items() if group not in branches]
    fewest = possible(max(sizes, default=1), round_to)[0]
    stay = '' if limits is None else ', or as many as are to stay,'
    stay += ' and without the layers that may go' * bool(branches)
    raise ValueError(
      f'target: {target:g} of the {name} cannot be reached: with {fewest} channel(s) '
      f'left in every group{stay} {floor:.4f} remain; ask for that or more, or lower '
      'round_to'
    )
  if target > ceiling:
    raise ValueError(
      f'target: {target:g} of the {name} cannot be reached: with what at_most leaves '
      f'{ceiling:.4f} remain; ask for that or less'
    )


def _choices(
  w: Weights, round_to: RoundTo, limits: Mapping[str, Range] | None, branches: Branches
) -> dict[str, list[int]]:
  """Returns how many slices may be kept of everything that has weights."""
  sizes = {name: value.size for name, value in w.items()}
  groups = {name: size for name, size in sizes.items() if name not in branches}
  any_ = {name: [*range(sizes[name] + 1)] for name in branches}
  return allowed(groups, round_to, limits) | any_


def _flipped(w: Weights, widths, choices, error, branches: Branches) -> dict[str, int]:
  """Moves widths nearer to the target, those first for which gates move least."""
  off = error(widths)
  for name, width in _nearest_first(w, widths, choices):
    if abs(off) <= TOLERANCE:
      break
    if (width < widths[name]) == (off > 0):
      changed = {**widths, name: width}
      left = error(changed)
      beyond = name in branches and left * off < 0 and abs(left) > TOLERANCE
      if abs(left) < abs(off) and not beyond:
        widths, off = changed, left
  return widths


def _exchanged(
  w: Weights, widths, choices, error, branches: Branches
) -> dict[str, int]:
  """Moves a layer beyond the target and channels back, where that brings it nearer."""
  off = error(widths)
  best, left = widths, abs(off)
  layers = {branch: w[branch] for branch in branches}
  for branch, count in _nearest_first(layers, widths, choices):
    if left <= TOLERANCE:
      break
    if (count < widths[branch]) == (off > 0):
      start = {**widths, branch: count}
      fixed = {name: [start[name]] for name in layers}
      moved = _flipped(w, start, choices | fixed, error, branches)
      if (now := abs(error(moved))) < left:
        best, left = moved, now
  return best


def _nearest_first(
  w: Weights, widths: Mapping[str, int], choices: Mapping[str, list[int]]
) -> list[tuple[str, int]]:
  """Returns all other (group, width), those first for which gates move least."""
  moves = []
  for group, value in w.items():
    falling = -np.sort(-value, axis=None)
    for width in choices[group]:
      if width != widths[group]:
        farthest = falling[width if width < widths[group] else width - 1]
        moves.append((abs(float(farthest)), group, width))
  return [(group, width) for _, group, width in sorted(moves)]


def _widest(
  coupling: Coupling, w: Weights, widths: Mapping[str, int], branches: Branches
) -> Tree:
  """Returns the keep tree of the channels and layers with the largest weights."""
  kept = {
    name: highest(np.ravel(value), widths[name]).reshape(value.shape)
    for name, value in w.items()
  }
  closed = {path: kept[name] for name, paths in branches.items() for path in paths}
  channels = {group: kept[group] for group in w if group not in branches}
  keep = closing(coupling, closed)
  return {**keep, 'channels': keep['channels'] | channels}
