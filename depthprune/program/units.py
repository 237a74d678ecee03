"""Units: what can be erased of a network's depth, read off its program.

A unit is shortcut + gate · F(x). Close the gate and the sum is its shortcut, which is
one layer less if it is the x that F is computed from. A projection or a pad is not:
it has to stay, so such a unit is not erased.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from depthprune.program import jaxpr as jx
from depthprune.program.coupling import Coupling
from depthprune.program.deadcode import LAYOUT, fold

NOT_IDENTITY = 'its shortcut is not the identity: it'


class Unit(NamedTuple):
  """One residual unit.

  Attributes:
    name: path of its gate without '/branch' ('stage1/block1'); for a layer of a scanned
      stack what the paths of its gates have in common, and its index
      ('stage1/blocks[3]').
    branches: paths of its gates, several where a layer of a stack has several.
    layer: index into the first axis of these gates, or None if all of a gate is meant.
    why_not: why it cannot be erased, or ''."""

  name: str
  branches: tuple[str, ...]
  layer: int | None
  why_not: str


class Meeting(NamedTuple):
  """Where what is 0 with a gate ends.

  Attributes:
    at: index of the equation, behind those of the scans that it lies in.
    stacked: does a scan run over the gate's first axis.
    why_not: '' where it ends in a sum whose other side is the identity."""

  at: tuple[int, ...]
  stacked: bool
  why_not: str


def units(coupling: Coupling) -> tuple[Unit, ...]:
  """Every unit of a function, in order of execution: one per branch gate, and one per
  layer of a scanned stack, however many gates a layer has.

  Source of what can be erased: Ida and Fujiwara, arXiv 1906.03826."""
  program, leaves = coupling.view.program, coupling.view.leaves
  unread = Meeting((len(program.equations),), False, 'nothing reads its gate')
  stacks: dict[object, list[tuple[str, list[Meeting]]]] = {}
  met = [
    (branch, sorted(_meetings(program, {leaves[f'branches/{branch}']})) or [unread])
    for branch in coupling.branches
  ]
  for branch, meetings in sorted(met, key=lambda pair: pair[1][0].at):
    at, stacked, _ = meetings[0]
    size = coupling.branch_shape(branch)[:1]
    key = (at[0], size) if stacked else branch
    stacks.setdefault(key, []).append((branch, meetings))
  return tuple(u for key, met in stacks.items() for u in _units(key, met))


def _units(key: object, met: Sequence[tuple[str, list[Meeting]]]) -> Iterator[Unit]:
  """The unit of one gate, or the layers of one stack."""
  branches = tuple(branch for branch, _ in met)
  name = branches[0].removesuffix('/branch')
  if len(branches) > 1:
    name = os.path.commonpath(branches) or '+'.join(branches)
  reasons = (m.why_not for _, meetings in met for m in meetings if m.why_not)
  why_not = next((f'{reason} ({name})' for reason in reasons), '')
  if not isinstance(key, tuple):
    yield Unit(name, branches, None, why_not)
    return
  _, (layers,) = key
  for i in range(layers):
    yield Unit(f'{name}[{i}]', branches, i, why_not)


def closing(units_: Sequence[Unit], coupling: Coupling) -> dict:
  """The keep tree that closes these units and leaves all others open.

  Returns: {'branches': {path: bool, () or [layers]}}, with every branch."""
  branches = {b: np.ones(coupling.branch_shape(b), bool) for b in coupling.branches}
  for unit in units_:
    for branch in unit.branches:
      branches[branch][... if unit.layer is None else unit.layer] = False
  return {'branches': branches}


# ---- following a closed gate ---------------------------------------------------------


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
      yield Meeting((i,), False, _not_identity(answer, branch, made_by))
    elif e.name == 'scan' and 0 not in jx.scan_parts(e, known)[1]:
      stacked = 0 in jx.scan_parts(e, known)[2]
      inside = {v for v, k in zip(e.bodies[0].inputs, known, strict=True) if k == 0}
      for at, deeper, why_not in _meetings(e.bodies[0], inside):
        yield Meeting((i, *at), stacked or deeper, why_not)
    else:
      why_not = f'{e.where} reads its branch before a shortcut is added to it'
      yield Meeting((i,), False, why_not)
  if not zeros.isdisjoint(program.outputs):
    why_not = 'no shortcut is added to its branch: nothing would be left'
    yield Meeting((len(equations),), False, why_not)


def _not_identity(shortcut: jx.Value, branch: jx.Value, made_by: Mapping) -> str:
  """Why a shortcut is not what its branch is computed from, or ''."""
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
  return f'{NOT_IDENTITY} changes {_ends(old, differ)} to {_ends(new, differ)}'


def _summands(v: jx.Value, made_by: Mapping) -> Iterator[jx.Value]:
  """v, and what it is a sum of, through casts and layout: each may be the identity."""
  yield v
  e = made_by.get(v)
  if e is not None and (e.name in LAYOUT or e.name in ('add', 'add_any')):
    for u in e.inputs:
      yield from _summands(u, made_by)


def _ancestors(v: jx.Value, made_by: Mapping) -> Iterator[jx.Value]:
  """v and all that it is computed from, the nearest first."""
  seen, queue = {v: None}, [v]
  for v in queue:
    yield v
    for u in made_by[v].inputs if v in made_by else ():
      if u not in seen:
        seen[u] = None
        queue.append(u)


def _ends(shape: tuple[int, ...], axes: int) -> str:
  """The last axes of a shape, '[.., 16]'."""
  return f'[.., {", ".join(map(str, shape[axes:]))}]'
