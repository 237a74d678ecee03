"""Groups: what is still a variable when all axes are solved, and what is pinned."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import NamedTuple

from depthprune.program import axes as ax
from depthprune.program import jaxpr as jx
from depthprune.program import rules
from depthprune.program.view import View

HARMLESS = {ax.UNIT, 'kernel window', 'input', 'output'}  # pins that surprise nobody


class Group(NamedTuple):
  """Slices that live and die together.

  Attributes:
    name: path of the first kernel that produces the axis, and which axis of it.
    size: number of slices.
    members: (path, axis) of every variable that has these slices.
    kind: 'channel', or 'layer' for the layer axis of scanned parameters.
    ungated: why no gate can stand for the slices, or ''."""

  name: str
  size: int
  members: tuple[tuple[str, int], ...]
  kind: str
  ungated: str


class Pinned(NamedTuple):
  """An axis of a variable that must keep all its slices, and why."""

  path: str
  axis: int
  size: int
  reasons: tuple[str, ...]


def find_groups(
  view: View, dims: Mapping[str, ax.Dims]
) -> tuple[dict[str, Group], dict[str, ax.Axis]]:
  """Groups by name in order of execution, and the axis variable of each."""
  members: dict[ax.Var, list] = {}
  for path, axes in dims.items():
    for i, d in enumerate(axes):
      for v in dict.fromkeys(ax.leaves(d)):
        if not v.pins and not path.startswith('branches/'):
          members.setdefault(v, []).append((path, i))
  first, read = _first_use(view), _contracted(view)
  found, names = [], set()
  for v, where in members.items():
    if all(first[path] == math.inf for path, _ in where):
      continue  # variables that nothing reads
    ungated = '; '.join(sorted(v.notes)) or ('' if v in read else 'no weight reads it')
    kind = 'layer' if rules.LAYER in v.notes else 'channel'
    name = _name(v, where, dims, first, names)
    names.add(name)
    found.append((Group(name, v.size, tuple(where), kind, ungated), v))
  found.sort(key=lambda pair: min(first[p] for p, _ in pair[0].members))
  return {g.name: g for g, _ in found}, {g.name: v for g, v in found}


def _name(v, where, dims, first, taken) -> str:
  """Path of the first kernel that produces the axis, its axis, and its factor.

  Without 'params/' and '/kernel', unless another group has that name."""

  def order(member):
    layers = (rules.LAYER in w.notes for d in dims[member[0]] for w in ax.leaves(d))
    rank = len(dims[member[0]]) - sum(layers)
    return rank < 2, first[member[0]], -rank, member

  path, axis = min(where, key=order)
  parts = list(dict.fromkeys(ax.leaves(dims[path][axis])))
  factor = f'.{parts.index(v)}' if len(parts) > 1 else ''
  short = path.removeprefix('params/').removesuffix('/value').removesuffix('/kernel')
  name = f'{short}:{axis}{factor}'
  return f'{path}:{axis}{factor}' if name in taken else name


def _first_use(view: View) -> dict[str, float]:
  """When each variable is first read; infinity for one that nothing reads."""
  used: dict[jx.Value, int] = {}
  for i, v in enumerate(_reads(view.program)):
    used.setdefault(v, i)
  return {path: used.get(v, math.inf) for path, v in view.leaves.items()}


def _reads(program: jx.Program) -> Iterator[jx.Value]:
  """The inputs of every equation; those of a body as what stands outside for them."""
  for e in program.equations:
    for body, outer in jx.bodies_with_inputs(e):
      outside = dict(zip(body.inputs, outer, strict=True))
      yield from (outside[v] for v in _reads(body) if v in outside)
    yield from e.inputs


def _contracted(view: View) -> set[ax.Var]:
  """The variables that some equation sums over."""
  return {
    v
    for e in jx.walk(view.program)
    for side in rules.contracted(e)
    for k, axis in side
    for v in ax.leaves(view.facts.dims[e.inputs[k]][axis])
  }


def find_reads(view: View) -> frozenset[tuple[str, int]]:
  """Contracted axes of variables, seen through casts, transposes and control flow."""
  origin = {v: (p, tuple(range(len(v.shape)))) for p, v in view.leaves.items()}
  found = set()

  def walk(program: jx.Program):
    for e in program.equations:
      known = [origin.get(v) for v in e.inputs]
      for k, axis in (pair for side in rules.contracted(e) for pair in side):
        if (source := known[k]) is not None:
          found.add((source[0], source[1][axis]))
      if e.name in ('convert_element_type', 'copy') and known[0] is not None:
        origin[e.outputs[0]] = known[0]
      elif e.name == 'transpose' and known[0] is not None:
        path, at = known[0]
        origin[e.outputs[0]] = path, tuple(at[i] for i in e.params['permutation'])
      for body, outer in jx.bodies_with_inputs(e):
        scanned = len(jx.scan_parts(e, e.inputs)[2]) if e.name == 'scan' else 0
        for i, (v, o) in enumerate(zip(body.inputs, outer, strict=True)):
          if o in origin:
            path, at = origin[o]
            is_layer = i >= len(outer) - scanned
            origin[v] = (path, at[1:]) if is_layer else (path, at)
        walk(body)

  walk(view.program)
  return frozenset(found)


def find_pinned(dims: Mapping[str, ax.Dims]) -> tuple[Pinned, ...]:
  """The axes that must stay whole for a reason worth telling."""
  found = []
  for path, axes in dims.items():
    for i, d in enumerate(axes):
      reasons = {why for v in ax.leaves(d) for why in v.pins} - HARMLESS
      if reasons:
        found.append(Pinned(path, i, d.size, tuple(sorted(reasons))))
  return tuple(found)
