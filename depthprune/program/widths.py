"""The widths that groups of channels may have, as names and patterns ask for them.

A pattern is a name, or has the wildcards of a shell (`*`, which also matches '/', `?`,
`[...]`). It is compared with the names of groups ('stage2/block0/conv1:3'), with the
paths of arrays ('params/stage2/block0/conv1/kernel'), and with the paths of the modules
that hold them ('stage2/block0'); 'params/' can be left out. `Coupling.explain` lists
groups and arrays.
"""

from __future__ import annotations

import difflib
import fnmatch
from collections.abc import (
  Callable,
  Collection,
  Iterable,
  Iterator,
  Mapping,
  Sequence,
)
from typing import NamedTuple

import numpy as np

from depthprune.program import arguments, rounding
from depthprune.program.coupling import Coupling, Group
from depthprune.program.rounding import RoundTo

Count = int | float | str
"""Channels: a number of them (an int), or a part in (0, 1], as 0.25 or '25%'."""

Counts = Count | Mapping[str, Count]
"""A count for every group, or {pattern: count}."""


class Range(NamedTuple):
  """The narrowest and the widest width that a group may have."""

  least: int
  most: int


def ranges(
  coupling: Coupling,
  round_to: RoundTo = 1,
  exclude: str | Sequence[str] = (),
  at_least: Counts | None = None,
  at_most: Counts | None = None,
  ratios: Mapping[str, Count] | None = None,
) -> dict[str, Range]:
  """Returns the widths between which every group has to stay.

  Where several patterns of one argument match a group, its own name counts, else that
  which matches the fewest groups. A pattern goes before a count for every group. A
  width that is built is one of `rounding.possible`.

  Args:
    coupling: of the network, made by `couple`.
    round_to: widths are multiples of this, or 'auto'.
    exclude: patterns of groups, arrays and modules that are left whole. An array that
      matches keeps its shape, so the channels that it reads stay too.
    at_least: floor of the channels that the matching arrays produce.
    at_most: their ceiling.
    ratios: {pattern: count}, the channels that the matching arrays are to produce, as
      near as the floors and ceilings allow. Groups that no pattern matches keep what
      they may.

  Returns:
    {group: Range}, both ends of which can be built, for the groups that may be cut. All
    other groups are left whole.

  Raises:
    ValueError: a pattern that matches nothing, with the nearest names; a count that is
      none; two equally specific patterns with different counts; or a floor above the
      ceiling.
  """
  arguments.coupling(coupling)
  rounding.check(round_to)
  groups = {g.name: g for g in coupling.groups.values() if not g.ungated}
  exclude = [exclude] if isinstance(exclude, str) else exclude
  if not isinstance(exclude, Iterable) or not all(isinstance(p, str) for p in exclude):
    raise arguments.refused('exclude', "a pattern such as 'head', or several", exclude)
  excluded = _excluded(coupling, [*exclude])
  floors = _by_group(coupling, groups, at_least, 'at_least')
  ceilings = _by_group(coupling, groups, at_most, 'at_most')
  wanted = _by_group(coupling, groups, ratios, 'target')
  found = {}
  for name, group in groups.items():
    floor, ceiling = floors.get(name), ceilings.get(name)
    if name in excluded:
      floor = _Bound('exclude', excluded[name], group.size)
    widths = _between(group, floor, ceiling, round_to)
    if ratios is not None:
      asked = wanted[name].channels if name in wanted else group.size
      widths = [min(widths, key=lambda width: (abs(width - asked), -width))]
    whole = floor is not None and floor.channels >= group.size == widths[0]
    if not whole and (ratios is None or widths != [group.size]):
      found[name] = Range(widths[0], widths[-1])
  return found


def produced(
  coupling: Coupling, patterns: str | Sequence[str], argument: str
) -> set[str]:
  """Returns the groups of the channels that the matching arrays produce.

  Args:
    coupling: of the network, made by `couple`.
    patterns: of groups, arrays and modules.
    argument: name of the argument that holds them, for errors.

  Raises:
    ValueError: a pattern that matches nothing, with the nearest names.
  """
  patterns = [patterns] if isinstance(patterns, str) else patterns
  groups = {g.name: g for g in coupling.groups.values() if not g.ungated}
  return {*_by_group(coupling, groups, dict.fromkeys(patterns, 1), argument)}


def excludes(coupling: Coupling, patterns: str | Sequence[str], gone: set[str]) -> bool:
  """Returns whether patterns name an array that goes, or a group whose arrays all go.

  Args:
    coupling: of the network, made by `couple`.
    patterns: of groups, arrays and modules.
    gone: paths of the arrays.
  """
  for pattern in [patterns] if isinstance(patterns, str) else patterns:
    arrays, groups = _matching(coupling, pattern)
    lost = lambda group: gone.issuperset(path for path, _ in group.members)
    if arrays & gone or any(map(lost, groups)):
      return True
  return False


def allowed(
  sizes: Mapping[str, int], round_to: RoundTo, limits: Mapping[str, Range] | None
) -> dict[str, list[int]]:
  """Returns the widths that groups of some sizes can have within limits, by group."""
  choices = {g: rounding.possible(size, round_to) for g, size in sizes.items()}
  if limits is None:
    return choices
  inside = lambda width, limit: limit.least <= width <= limit.most
  return {g: [n for n in all_ if inside(n, limits[g])] for g, all_ in choices.items()}


def in_multiples(
  coupling: Coupling,
  round_to: RoundTo,
  limits: Mapping[str, Range],
  fits: Callable[[Mapping], bool],
) -> Mapping[str, Range]:
  """Returns limits that leave one multiple in every group, if a target allows that.

  'auto' also allows widths below that, which save cost on paper and hardly any time.

  Args:
    coupling: of the network, made by `couple`.
    round_to: widths are multiples of this, or 'auto'.
    limits: {group: Range}, as `ranges` returns them; what is returned otherwise.
    fits: (keep) -> whether the target allows as much as {'channels': {group: bool
      [slices]}}.
  """
  sizes = {g: coupling.groups[g].size for g in limits}
  wide = {
    g: limit._replace(
      least=max(limit.least, min(rounding.step(round_to, sizes[g]), limit.most))
    )
    for g, limit in limits.items()
  }
  least = {g: np.arange(sizes[g]) < limit.least for g, limit in wide.items()}
  return wide if wide != limits and fits({'channels': least}) else limits


def nearest(
  widths: Mapping[str, int],
  choices: Mapping[str, list[int]],
  error: Callable[[Mapping[str, int]], float],
  tolerance: float,
) -> Mapping[str, int]:
  """Returns widths of which the error is smaller, while it is above a tolerance.

  One group at a time moves by one width, the one that helps most. Where none helps, two
  move in opposite directions, or one moves beyond the target and others make up for it.

  Args:
    widths: one of its `choices` for every group.
    choices: the widths that each group can have, narrowest first.
    error: (widths) -> how far the cost is off its target, of either sign.
    tolerance: absolute error that is near enough.
  """
  widths, off = _one_by_one(widths, choices, error, tolerance)
  for moves in _exchanged, _made_up_for:
    while abs(off) > tolerance:
      options = [
        (abs(error(n)), i, n) for i, n in enumerate(moves(widths, choices, error))
      ]
      least, _, best = min(options, default=(abs(off), 0, widths))
      if least >= abs(off):
        break
      widths, off = _one_by_one(best, choices, error, tolerance)
  return widths


def _one_by_one(widths, choices, error, tolerance) -> tuple[Mapping[str, int], float]:
  """Moves the group that helps most as long as one helps; returns the error, too."""
  off = error(widths)
  while abs(off) > tolerance:
    options = [
      (abs(error({**widths, g: n})), i, g, n)
      for i, (g, n) in enumerate(_beside(widths, choices))
    ]
    least, _, group, width = min(options, default=(abs(off), 0, '', 0))
    if least >= abs(off):
      break
    widths = {**widths, group: width}
    off = error(widths)
  return widths, off


def _exchanged(widths, choices, error) -> Iterator[Mapping[str, int]]:
  """Yields the widths with one group a width narrower and another a width wider."""
  for one, less in _beside(widths, choices):
    for other, more in _beside(widths, choices):
      if one != other and less < widths[one] and more > widths[other]:
        yield {**widths, one: less, other: more}


def _made_up_for(widths, choices, error) -> Iterator[Mapping[str, int]]:
  """Yields the widths with one group moved beyond the target and others back to it."""
  off = error(widths)
  for group, width in _beside(widths, choices):
    moved = {**widths, group: width}
    if error(moved) * off < 0:
      yield _one_by_one(moved, {**choices, group: [width]}, error, 0)[0]


def _beside(widths, choices) -> Iterator[tuple[str, int]]:
  """Yields every group with the next narrower and the next wider width it can have."""
  for group, width in widths.items():
    at = choices[group].index(width)
    for i in at - 1, at + 1:
      if 0 <= i < len(choices[group]):
        yield group, choices[group][i]


def matches(name: str, pattern: str) -> bool:
  """Returns whether a name is the pattern, or matches its wildcards."""
  return name == pattern or fnmatch.fnmatchcase(name, pattern)


class _Bound(NamedTuple):
  """Channels that an argument asks for, and its pattern; '' is for every group."""

  argument: str
  pattern: str
  channels: float

  def __str__(self) -> str:
    pattern = f' {self.pattern!r}' if self.pattern else ''
    return f'{self.argument}{pattern} asks for {self.channels:g}'


def _between(
  group: Group, floor: _Bound | None, ceiling: _Bound | None, round_to: RoundTo
) -> list[int]:
  """The widths of a group that can be built between two bounds, narrowest first."""
  widths = rounding.possible(group.size, round_to)

  def allowed(floor: _Bound | None, ceiling: _Bound | None) -> list[int]:
    low = min(floor.channels, group.size) if floor else 0
    high = max(ceiling.channels, widths[0]) if ceiling else group.size
    return [width for width in widths if low - 1e-6 <= width <= high + 1e-6]

  if between := allowed(floor, ceiling):
    return between
  assert floor and ceiling, 'one bound alone leaves the narrowest or the whole group'
  if bool(floor.pattern) != bool(ceiling.pattern):
    return allowed(floor, None) if floor.pattern else allowed(None, ceiling)
  by = rounding.step(round_to, group.size)
  multiple = f', in multiples of {by}' if by > 1 else ''
  raise ValueError(
    f'{group.name}: no width is possible: of its {group.size} channels {floor} or '
    f'more, {ceiling} or fewer{multiple}; change one of them'
  )


def _excluded(coupling: Coupling, patterns: Sequence[str]) -> dict[str, str]:
  """{group: the pattern by which it is left whole}."""
  excluded = {}
  for pattern in patterns:
    arrays, groups = _matching(coupling, pattern)
    if not arrays and not groups:
      raise _unmatched(coupling, 'to leave whole', pattern, coupling.axes)
    excluded |= dict.fromkeys((group.name for group in groups), pattern)
  return excluded


def _matching(coupling: Coupling, pattern: str) -> tuple[set[str], list[Group]]:
  """The arrays that a pattern matches, and the groups that these or it belong to."""
  arrays = {p for p in coupling.axes if _any(_names(coupling, p), pattern)}
  groups = [
    g
    for g in coupling.groups.values()
    if _any(_names_of_group(g), pattern) or any(p in arrays for p, _ in g.members)
  ]
  return arrays, groups


def _by_group(
  coupling: Coupling, groups: Mapping[str, Group], counts: Counts | None, argument: str
) -> dict[str, _Bound]:
  """What an argument asks of every group of which it says something."""
  if counts is None:
    return {}
  if not isinstance(counts, Mapping):
    return {
      name: _Bound(argument, '', _channels(counts, group.size, argument))
      for name, group in groups.items()
    }
  names = {name: _names_of_written(coupling, group) for name, group in groups.items()}
  matched = {
    pattern: [name for name in groups if _any(names[name], pattern)]
    for pattern in counts
  }
  for pattern, those in matched.items():
    if not those:
      written = [p for g in groups.values() for p, _ in _written(coupling, g)]
      raise _unmatched(coupling, argument, pattern, written)
  asked = {}
  for name, group in groups.items():
    reach = {
      pattern: len(those) if pattern != name else 0  # which is meant for no other group
      for pattern, those in matched.items()
      if name in those
    }
    bounds = [
      _Bound(argument, pattern, _channels(counts[pattern], group.size, argument))
      for pattern, number in reach.items()
      if number == min(reach.values())
    ]
    if len({bound.channels for bound in bounds}) > 1:
      raise ValueError(
        f'{name}: {" and ".join(map(str, bounds[:2]))} of its {group.size} channels, '
        f'and both match as many groups; decide by its own name, {name!r}: ...'
      )
    if bounds:
      asked[name] = bounds[0]
  return asked


def _channels(count: Count, size: int, argument: str) -> float:
  """The channels that a count asks for of a group; a part may lie between two."""
  text = str(count).strip()
  try:
    if text.isdigit():
      number = int(text)
      if number:
        return number
    else:
      part = float(text[:-1]) / 100 if text.endswith('%') else float(text)
      if 0 < part <= 1:
        return part * size
  except ValueError:
    pass
  raise ValueError(
    f'{argument}: expected a number of channels (1, 2, ...), or a part of them such as '
    f"0.25 or '25%', got {count!r}"
  )


# ---- names ---------------------------------------------------------------------------


def _any(names: Collection[str], pattern: str) -> bool:
  return any(matches(name, pattern) for name in names)


def _names(coupling: Coupling, path: str) -> set[str]:
  """The names of an array: its path, and the modules in which it lies."""
  parts = path.split('/')
  collections = any(p.startswith('params/') for p in coupling.axes)
  return {
    '/'.join(parts[start:end])
    for start in range(1 + collections)
    for end in range(start + 1, len(parts) + 1)
  }


def _names_of_group(group: Group) -> tuple[str, str]:
  return group.name, group.name.rsplit(':', 1)[0]


def _written(coupling: Coupling, group: Group) -> Sequence[tuple[str, int]]:
  """The members that produce the channels of a group, rather than read them."""
  return [m for m in group.members if m not in coupling.reads] or group.members


def _names_of_written(coupling: Coupling, group: Group) -> set[str]:
  paths = {path for path, _ in _written(coupling, group)}
  return {*_names_of_group(group)}.union(*(_names(coupling, path) for path in paths))


def _unmatched(
  coupling: Coupling, argument: str, pattern: str, paths: Collection[str]
) -> ValueError:
  """The error about a pattern that matches nothing; `paths` could have matched."""
  arrays = {path for path in coupling.axes if _any(_names(coupling, path), pattern)}
  read = [
    g.name
    for g in coupling.groups.values()
    if not g.ungated and any(path in arrays for path, _ in g.members)
  ]
  if read:
    return ValueError(
      f'{argument}: {pattern!r} matches arrays that only read channels; write the name '
      f'of the group that they read: {", ".join(read[:3])}'
    )
  if arrays or any(_any(_names_of_group(g), pattern) for g in coupling.groups.values()):
    return ValueError(
      f'{argument}: {pattern!r} matches no channels that can be cut; '
      'print(coupling.explain()) says why'
    )
  names = {*coupling.groups}.union(*(_names(coupling, path) for path in paths))
  near = difflib.get_close_matches(pattern, sorted(names), n=3, cutoff=0.3)
  return ValueError(
    f'{argument}: {pattern!r} matches no group, array or module; nearest: '
    f'{", ".join(near) or "none"}; print(coupling.explain()) shows all'
  )
