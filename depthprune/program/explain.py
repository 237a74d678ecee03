"""What a coupling has to say to a person."""

from __future__ import annotations

import difflib
from typing import TYPE_CHECKING

from depthprune.program import axes as ax

if TYPE_CHECKING:
  from depthprune.program.couple import Coupling


def explain(coupling: Coupling, group: str | None = None) -> str:
  """One block per group, with the equation that put each slice there, then the pins."""
  if group is not None:
    coupling.axis(group)
    return _group(coupling, group)
  lines = [_group(coupling, g) for g in coupling.groups]
  for pinned in coupling.pinned:
    parts = ax.leaves(coupling.axes[pinned.path][pinned.axis])
    extent = 'partly pinned' if any(not v.pins for v in parts) else 'pinned'
    lines.append(
      f'{extent}: {pinned.path} axis {pinned.axis} ({pinned.size}): '
      + '; '.join(pinned.reasons)
    )
  for name in coupling.unknown:
    lines.append(f'no rule for the primitive {name}: all that it touches is pinned')
  return '\n'.join(lines)


def _group(coupling: Coupling, name: str) -> str:
  group = coupling.groups[name]
  gate = f'cannot be gated: {group.ungated}' if group.ungated else 'can be gated'
  lines = [f'{name}: {group.size} slices, {gate}']
  for path, axis in group.members:
    lines.append(f'  {path} axis {axis}{_because(coupling.axes[path][axis])}')
  return '\n'.join(lines)


def _because(axis: ax.Axis) -> str:
  """The equation that first tied an axis of a variable to another one."""
  if isinstance(axis, ax.Var) and axis.why is not None:
    return f'  <- {axis.why.where}'
  return ''


def unknown_group(coupling: Coupling, name: str) -> str:
  """What to say when a group is asked for that there is not, or that is pinned."""
  path = name.rsplit(':', 1)[0]
  for pinned in coupling.pinned:
    if path in pinned.path and name.endswith(f':{pinned.axis}'):
      why = '; '.join(pinned.reasons)
      return f'{name}: this axis is pinned ({why}), so it has no gate and no group'
  near = difflib.get_close_matches(name, coupling.groups, n=3, cutoff=0.3)
  return f'{name}: no such group; nearest: {", ".join(near) or "none"}'
