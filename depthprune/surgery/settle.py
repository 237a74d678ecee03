"""A decision made coherent: complete, no empty trunk, hardware widths, explained."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from depthprune.program import axes as ax
from depthprune.program import cost
from depthprune.program.coupling import Coupling
from depthprune.program.trace import Decision, paths_of
from depthprune.surgery.oneshot import norms
from depthprune.surgery.plan import index_plan


class Settled(NamedTuple):
  """A decision that can be carried out.

  Attributes:
    keep: 'channels', 'branches' and 'exits', every entry present; groups that the
      decision makes dead are left out.
    notes: what differs from what was asked, and why, one sentence each."""

  keep: dict
  notes: tuple[str, ...]


def settle(
  coupling: Coupling, keep: Mapping, variables: Any, round_to: int = 1
) -> Settled:
  """Completes and corrects a decision.

  keep: as for `slim`, each part optional. round_to: widths become the multiple below
    (never less than one multiple); slices closed or reopened for that are those of the
    smallest or largest L1 norm.
  A group left empty closes the branch that it lies in; where there is none, its largest
  slice stays.

  Raises: KeyError for an unknown group, branch or exit, ValueError for an entry of the
    wrong shape or no exit left."""
  channels, branches, exits = complete(coupling, keep)
  leaves = paths_of(variables)
  notes: list[str] = []
  _close_empty(coupling, channels, branches, exits, leaves, notes)
  settled = {'channels': channels, 'branches': branches, 'exits': exits}
  left = index_plan(coupling, settled)
  for name, group in coupling.groups.items():
    if group.kind == 'channel' and not any(path in left for path, _ in group.members):
      del channels[name]
    elif group.kind == 'channel':
      channels[name] = _round(coupling, name, channels[name], leaves, round_to, notes)
  return Settled(settled, tuple(notes))


def complete(coupling: Coupling, keep: Mapping) -> tuple[dict, dict, dict]:
  """Channels, branches and exits with every entry present, as bool arrays.

  A layer of a scan is kept where any of its branch gates is.
  Raises: as `settle`."""
  unknown = set(keep) - {'channels', 'branches', 'exits'}
  if unknown:
    raise KeyError(
      f'keep has the entry {sorted(unknown)[0]!r}: expected channels, branches, exits'
    )
  channels = {g.name: np.ones(g.size, bool) for g in coupling.groups.values()}
  for name, kept in keep.get('channels', {}).items():
    coupling.axis(name)
    channels[name] = _entry(name, kept, channels[name].shape, coupling.groups[name])
  shapes = {b: coupling.branch_shape(b) for b in coupling.branches}
  branches = {b: np.ones(shape, bool) for b, shape in shapes.items()}
  for name, kept in keep.get('branches', {}).items():
    if name not in branches:
      raise KeyError(f'keep: no branch {name!r}; there are: {", ".join(branches)}')
    branches[name] = _entry(name, kept, shapes[name])
  exits = dict.fromkeys(coupling.exits, True)
  for name, kept in keep.get('exits', {}).items():
    if name not in exits:
      raise KeyError(f'keep: no exit {name!r}; there are: {", ".join(exits)}')
    exits[name] = bool(kept)
  if exits and not any(exits.values()):
    raise ValueError(f'keep: all exits are dropped ({", ".join(exits)}); keep one')
  _layers_of_branches(coupling, channels, branches)
  return channels, branches, exits


def _entry(name, kept, shape, group=None) -> np.ndarray:
  kept = np.asarray(kept)
  if kept.dtype != bool:
    raise ValueError(f'{name}: keep has dtype {kept.dtype}, expected bool')
  if kept.shape != shape:
    where = f' ({group.members[0][0]}, axis {group.members[0][1]})' if group else ''
    raise ValueError(f'{name}: keep has shape {kept.shape}, its axis {shape}{where}')
  return kept.copy()


def _layers_of_branches(coupling: Coupling, channels, branches):
  """Layers of a scan whose branches are all closed go."""
  for name, group in coupling.groups.items():
    if group.kind != 'layer':
      continue
    axis = coupling.axis(name)
    gates = [
      kept
      for b, kept in branches.items()
      if kept.ndim and ax.norm(coupling.axes[f'branches/{b}'][0]) is axis
    ]
    if gates:
      channels[name] = channels[name] & np.any(gates, axis=0)


def _close_empty(coupling, channels, branches, exits, leaves, notes):
  """An empty group closes its branch, or keeps its largest slice."""
  for name, kept in channels.items():
    group = coupling.groups[name]
    decision = coupling.decision({'branches': branches, 'exits': exits})
    closed = group.kind == 'layer' or all(p in decision.dead for p, _ in group.members)
    if kept.any() or closed:
      continue
    branch = _branch_around(coupling, group, branches)
    if branch is not None:
      branches[branch] = np.zeros_like(branches[branch])
      notes.append(f'{name} is empty, so the branch {branch} is closed')
    else:
      scores = norms(coupling, leaves, name)
      channels[name] = np.arange(group.size) == int(np.argmax(scores))
      notes.append(
        f'{name} would be empty and lies in no branch that could be closed: its '
        'largest slice stays'
      )


def _branch_around(coupling, group, branches) -> str | None:
  """The open branch whose closing makes every member of a group dead."""
  for name, kept in branches.items():
    dead = coupling.view.unneeded(Decision({name: False}, {}))
    if kept.any() and all(path in dead for path, _ in group.members):
      return name
  return None


def _round(coupling, name, kept, leaves, round_to, notes) -> np.ndarray:
  """Closes the smallest kept slices, or reopens the largest closed, to a multiple."""
  n, size = int(kept.sum()), kept.size
  width = int(cost.multiple(n, size, round_to))
  if width == n:
    return kept
  notes.append(f'{name}: {n} became {width}, a multiple of {round_to} (of {size})')
  scores = norms(coupling, leaves, name)
  order = np.lexsort((-scores, ~kept))  # kept ones first, each by falling norm
  out = np.zeros(size, bool)
  out[order[:width]] = True
  return out
