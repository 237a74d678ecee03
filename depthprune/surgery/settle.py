"""Makes a decision complete and possible: no empty groups, rounded widths."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from depthprune.program import rounding
from depthprune.program.coupling import Coupling
from depthprune.program.rounding import RoundTo
from depthprune.program.trace import Decision, paths_of
from depthprune.surgery.oneshot import norms
from depthprune.surgery.plan import complete, fewest, index_plan


class Settled(NamedTuple):
  """A decision that can be carried out.

  Attributes:
    keep: 'channels', 'branches' and 'exits' with every entry present, but without
      groups that the decision makes dead.
    notes: what differs from what was asked, and why, one sentence each.
  """

  keep: dict
  notes: tuple[str, ...]


def settle(
  coupling: Coupling, keep: Mapping, variables: Any, round_to: RoundTo = 1
) -> Settled:
  """Completes and corrects a decision.

  A group that is left empty closes the branch that it lies in. Where there is no such
  branch, the largest slice of the group stays.

  Args:
    coupling: of the network, made by `couple`.
    keep: {'channels': {group: bool [slices]}, 'branches': {path: bool}, 'exits': {name:
      bool}}; each part is optional.
    variables: the arrays of the network, whose L1 norms decide which slices are closed
      or reopened for rounding.
    round_to: widths become the next lower multiple of this, and at least one multiple;
      or 'auto', as in `prune`.

  Returns:
    The Settled decision.

  Raises:
    KeyError: an unknown group, branch or exit.
    ValueError: an entry has the wrong shape or is not bool, or no exit is left.
  """
  rounding.check(round_to)
  channels, branches, exits = complete(coupling, keep)
  leaves = paths_of(variables)
  notes: list[str] = []
  _close_empty(coupling, channels, branches, exits, leaves, notes)
  settled = {'channels': channels, 'branches': branches, 'exits': exits}
  left = index_plan(coupling, settled)
  for name, group in coupling.groups.items():
    if group.kind != 'layer' and not any(path in left for path, _ in group.members):
      del channels[name]
    elif group.kind == 'channel':
      channels[name] = _round(coupling, name, channels[name], leaves, round_to, notes)
  return Settled(settled, tuple(notes))


def _close_empty(coupling, channels, branches, exits, leaves, notes):
  """Closes the branch around each empty group, or keeps the group's largest slice."""
  for name, kept in channels.items():
    group = coupling.groups[name]
    if kept.any() or group.kind == 'layer':
      continue
    decision = coupling.decision({'branches': branches, 'exits': exits})
    if all(path in decision.dead for path, _ in group.members):
      continue
    for branch, gate in branches.items():
      dead = coupling.unneeded(Decision({branch: False}, {}))
      if gate.any() and all(path in dead for path, _ in group.members):
        branches[branch] = np.zeros_like(gate)
        notes.append(f'{name} is empty, so the branch {branch} is closed')
        break
    else:
      scores = norms(coupling, leaves, name)
      count = fewest(coupling, name)
      channels[name][np.argsort(-scores, stable=True)[:count]] = True
      stays = 'largest slice stays' if count == 1 else f'{count} largest slices stay'
      notes.append(
        f'{name} would be empty and lies in no branch that could be closed: its {stays}'
      )


def _round(coupling, name, kept, leaves, round_to, notes) -> np.ndarray:
  """Closes the smallest kept slices, or reopens the largest closed ones."""
  n, size = int(kept.sum()), kept.size
  width = int(rounding.built(n, size, round_to))
  if width == n:
    return kept
  by = min(rounding.step(round_to, size), width)
  notes.append(f'{name}: {n} became {width}, a multiple of {by} (of {size})')
  scores = norms(coupling, leaves, name)
  order = np.lexsort((-scores, ~kept))  # kept ones first, each by falling norm
  out = np.zeros(size, bool)
  out[order[:width]] = True
  return out
