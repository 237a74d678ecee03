"""Residual units, which can be erased from a network, found in its program.

A unit computes shortcut + gate · F(x). Closing the gate leaves the shortcut. If this is
the x that F is computed from, the network has one layer less. A projection or a pad has
to stay, so a unit with such a shortcut is not erased.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from depthprune.program import arguments
from depthprune.program import axes as ax
from depthprune.program import jaxpr as jx
from depthprune.program.coupling import Coupling
from depthprune.program.deadcode import LAYOUT, fold

TRUNK = 'dp.trunk(model, variables, *inputs) puts one on every residual unit'
NOT_IDENTITY = 'its shortcut is not the identity: it'


class ResidualUnit(NamedTuple):
  """One residual unit of a network.

  Attributes:
    name: path of its gate without '/branch' ('stage1/block1'); for a layer of a scanned
      stack the common part of the paths of its gates, and its index
      ('stage1/blocks[3]').
    branches: paths of its gates; a layer of a stack may have several.
    layer: index into the first axis of these gates, or None for a unit outside a stack.
    why_not: why it cannot be erased; '' where it can.
  """

  name: str
  branches: tuple[str, ...]
  layer: int | None
  why_not: str


class Meeting(NamedTuple):
  """Where the values that are 0 with a closed gate end.

  Attributes:
    at: index of the equation, preceded by those of the scans around it.
    stacked: whether a scan runs over the first axis of the gate.
    why_not: why the unit cannot be erased; '' where the values end in a sum with the
      identity.
    shortcut: what is added to the branch there, and is left without it.
    total: their sum.
  """

  at: tuple[int, ...]
  stacked: bool
  why_not: str
  shortcut: jx.Value | None = None
  total: jx.Value | None = None


def units(coupling: Coupling) -> tuple[ResidualUnit, ...]:
  """Returns the residual units of a network in order of execution.

  There is one per branch gate, and one per layer of a scanned stack, however many gates
  a layer has.

  Args:
    coupling: of the network, made by `couple`.

  Source of what can be erased: Ida and Fujiwara, arXiv 1906.03826.
  """
  arguments.coupling(coupling)
  program, leaves = coupling.view.program, coupling.view.leaves
  unread = Meeting((len(program.equations),), False, 'nothing reads its gate')
  followed = [
    (branch, meetings(program, leaves[f'branches/{branch}']) or [unread])
    for branch in coupling.branches
  ]
  stacks: dict[object, list[tuple[str, list[Meeting]]]] = {}
  for branch, met in sorted(followed, key=lambda pair: pair[1][0].at):
    at, stacked, *_ = met[0]
    size = coupling.branch_shape(branch)[:1]
    key = (at[0], size) if stacked else branch
    stacks.setdefault(key, []).append((branch, met))
  in_order = []
  for key, met in stacks.items():
    branches = tuple(branch for branch, _ in met)
    name = branches[0].removesuffix('/branch')
    if len(branches) > 1:
      names = [branch.removesuffix('/branch') for branch in branches]
      name = os.path.commonpath(names) or '+'.join(names)
    reasons = [m.why_not for _, ends in met for m in ends if m.why_not]
    reasons += [
      f'its gate has {axes} axes'
      for branch in branches
      if (axes := len(coupling.branch_shape(branch))) > 1
    ]
    why_not = f'{reasons[0]} ({name})' if reasons else ''
    if not isinstance(key, tuple):
      in_order.append(ResidualUnit(name, branches, None, why_not))
      continue
    _, (layers,) = key
    in_order += [
      ResidualUnit(f'{name}[{i}]', branches, i, why_not) for i in range(layers)
    ]
  return tuple(in_order)


def gone(coupling: Coupling, branches: Sequence[str]) -> set[str]:
  """Returns the paths of the arrays that go, or lose layers, with closed branches."""
  closed = {b: np.zeros(coupling.branch_shape(b), bool) for b in branches}
  dead = coupling.decision({'branches': closed}).dead
  parts = lambda path: {v for axis in coupling.axes[path] for v in ax.leaves(axis)}
  stacks = {v for branch in branches for v in parts(f'branches/{branch}')}
  shorter = {path for path in coupling.axes if parts(path) & stacks}
  return {*dead, *shorter, *(f'branches/{branch}' for branch in branches)}


def closing(closed: Sequence[ResidualUnit], coupling: Coupling) -> dict:
  """Returns the keep tree that closes these units and leaves all others open.

  Args:
    closed: units from `units`.
    coupling: of the network.

  Returns:
    {'branches': {path: bool () or [layers]}} with every branch.
  """
  branches = {b: np.ones(coupling.branch_shape(b), bool) for b in coupling.branches}
  for unit in closed:
    for branch in unit.branches:
      branches[branch][... if unit.layer is None else unit.layer] = False
  return {'branches': branches}


# ---- following a closed gate ---------------------------------------------------------


def meetings(program: jx.Program, gate: jx.Value) -> list[Meeting]:
  """Returns where a branch ends that is scaled by a gate, in order of execution."""
  return sorted(_meetings(program, {gate}), key=lambda met: met.at)


def _meetings(program: jx.Program, zeros: Collection[jx.Value]) -> Iterator[Meeting]:
  """Follows values that are 0 to the sums that end them, into scans too."""
  equations, _ = jx.live(program)
  made_by = {v: e for e in equations for v in e.outputs}
  zeros = set(zeros)
  for i, e in enumerate(equations):
    known = [0 if v in zeros else None for v in e.inputs]
    if 0 not in known:
      continue
    answer = fold(e, list(e.inputs), known)
    if answer == 0:
      zeros.update(e.outputs)
    elif isinstance(answer, jx.Value):
      branch = e.inputs[known.index(0)]
      why_not = _not_identity(answer, branch, made_by)
      yield Meeting((i,), False, why_not, answer, e.outputs[0])
    elif e.name == 'scan' and 0 not in jx.scan_parts(e, known)[1]:
      stacked = 0 in jx.scan_parts(e, known)[2]
      inside = {v for v, k in zip(e.bodies[0].inputs, known, strict=True) if k == 0}
      for met in _meetings(e.bodies[0], inside):
        yield met._replace(at=(i, *met.at), stacked=stacked or met.stacked)
    else:
      why_not = f'{e.where} reads its branch before a shortcut is added to it'
      yield Meeting((i,), False, why_not)
  if not zeros.isdisjoint(program.outputs):
    why_not = 'no shortcut is added to its branch: nothing would be left'
    yield Meeting((len(equations),), False, why_not)


def _not_identity(shortcut: jx.Value, branch: jx.Value, made_by: Mapping) -> str:
  """Says why a shortcut is not what its branch is computed from; '' where it is."""
  above = set(_ancestors(branch, made_by))
  parts = _summands(shortcut, made_by)
  if any(v in above and v.shape == shortcut.shape for v in parts):
    return ''
  nearest = (v for v in _ancestors(shortcut, made_by) if v in above and v.shape)
  source = next(nearest, None)
  if source is None:
    return f'{NOT_IDENTITY} is not computed from what the branch reads'
  old, new = source.shape, shortcut.shape
  if old == new:
    return f'{NOT_IDENTITY} passes through {made_by[shortcut].where}'
  differ = next((i for i in (-1, -2, -3) if old[i:] != new[i:]), -4)
  ends = (', '.join(map(str, shape[differ:])) for shape in (old, new))
  return f'{NOT_IDENTITY} changes {" to ".join(f"[.., {end}]" for end in ends)}'


def _summands(v: jx.Value, made_by: Mapping) -> Iterator[jx.Value]:
  """Yields v and what it is a sum of, through casts and layout."""
  yield v
  e = made_by.get(v)
  if e is not None and (e.name in LAYOUT or e.name in ('add', 'add_any')):
    for u in e.inputs:
      yield from _summands(u, made_by)


def _ancestors(v: jx.Value, made_by: Mapping) -> Iterator[jx.Value]:
  """Yields v and all that it is computed from, the nearest first."""
  seen, queue = {v: None}, [v]
  for v in queue:
    yield v
    for u in made_by[v].inputs if v in made_by else ():
      if u not in seen:
        seen[u] = None
        queue.append(u)
