"""What is timed of a network for its cost in milliseconds, and the timing itself."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from depthprune.program import axes as ax
from depthprune.program import clock
from depthprune.program import jaxpr as jx
from depthprune.program import slices as sl
from depthprune.program.couple import Coupling
from depthprune.program.crossing import batched
from depthprune.program.milliseconds import Milliseconds, Table, rising, sum_of
from depthprune.program.rebind import decided, rebound
from depthprune.program.view import View

BATCH = 128  # examples in a call
SECONDS = 4.0  # for all calls together, though each has nine turns at least
EVEN = (0, 0.25, 0.5, 0.75, 1)  # parts of all widths; 0 is the least there is
# Parts of the widths of a layer, by the number of its axes that can be cut.
PARTS = {1: EVEN, 2: (0, 0.25, 0.5, 1), 3: (0, 0.5, 1), 4: (0, 1), 5: (0, 1)}

Widths = dict[str, int]
"""{group: slices kept}; other groups are whole."""

Bundle = tuple[str, ...]
"""Groups that are concatenated in one axis, narrowed alike, counted by their sum."""


class Session(NamedTuple):
  """What is to be timed for one network.

  Attributes:
    batch: examples in a call. layers: as in Milliseconds. grids: (widths, full) of
      each Table of it.
    rows: (layer, widths) of every call, of each layer as it is behind the narrowed
      ones; no layer for networks, of which the last is the one as it is.
    call: (row's number) -> the call, compiled when it is first made.
  """

  batch: int
  layers: tuple[tuple[tuple[Bundle, ...], int], ...]
  grids: tuple[tuple[tuple[np.ndarray, ...], tuple[int, ...]], ...]
  rows: tuple[tuple[str, Widths], ...]
  call: Callable[[int], Callable[[], Any]]

  def measure(self, seconds: float = SECONDS) -> np.ndarray:
    """Medians of all rows, float64 [rows]."""
    calls = [self.call(i) for i in range(len(self.rows))]
    return np.median(clock.interleave(calls, seconds), axis=1)

  def cost(self, measured: np.ndarray) -> Milliseconds:
    """C from the medians of the rows [rows]."""
    tables, at = [], 0
    for widths, full in self.grids:
      shape = tuple(map(len, widths))
      end = at + int(np.prod(shape))
      taken = rising(measured[at:end].reshape(shape))
      tables.append(Table(widths, taken, full, float(measured[end])))
      at = end + 1
    *narrowed, _ = self.rows[at:]
    sums = np.array(
      [sum_of(self.layers, tables, n, np) for _, n in narrowed], np.float32
    )
    # Of widths that no layer feels the largest stands for all.
    distinct = np.append(np.diff(sums) > 1e-6 * sums[-1], True)
    network = sums[distinct], rising(measured[at:-1])[distinct]
    whole = float(measured[-1])
    return Milliseconds(self.batch, self.layers, tuple(tables), network, whole)


def milliseconds(
  coupling: Coupling, batch: int = BATCH, seconds: float = SECONDS, round_to: int = 1
) -> Milliseconds:
  """Times the layers of a network on this device, with made-up arrays.

  batch: examples in a call. seconds: of timing, compilation not counted. round_to:
    what widths will be multiples of.

  Raises: as `session`.
  """
  timed = session(coupling, batch, round_to)
  return timed.cost(timed.measure(seconds))


def session(coupling: Coupling, batch: int = BATCH, round_to: int = 1) -> Session:
  """What has to be timed, the same for the same arguments; see `milliseconds`.

  Raises: ValueError for a batch below 1, for a network of which nothing can be cut, or
    a layer of which more axes can be cut than can be timed.
  """
  if batch < 1:
    raise ValueError(f'milliseconds: expected a batch of 1 or more, got {batch}')
  inputs = batched(coupling.inputs, batch)
  view = coupling.again(coupling.fn, inputs, coupling.kwargs, {})
  size = {g: gate.size for g, gate in coupling.gates()['channels'].items()}
  owner = {v: g for g in size for v in ax.leaves(view.groups[g])}
  known: dict[Any, int] = {}
  layers, grids, rows, programs = [], [], [], []
  for e in filter(_contracts, view.program.equations):
    bundles = _bundles(view, e, owner)
    if not bundles:
      continue
    kind = _kind(view, e, owner, bundles)
    if kind not in known:
      known[kind] = len(grids)
      points = list(itertools.product(*_points(e, bundles, size, round_to)))
      counts = np.array([[sum(n.values()) for n in point] for point in points])
      full = tuple(sum(size[g] for g in bundle) for bundle in bundles)
      grids.append((tuple(np.unique(axis) for axis in counts.T), full))
      points.append(tuple({g: size[g] for g in bundle} for bundle in bundles))
      rows += [(e.where, {g: n[g] for n in point for g in n}) for point in points]
      programs += [_alone(e)] * len(points)
    layers.append((bundles, known[kind]))
  if not layers:
    raise ValueError(
      'milliseconds: no layer of this network can be cut: see coupling.explain()'
    )
  even = [*_narrowed(size, EVEN, round_to), size]
  rows += [('', widths) for widths in even]
  programs += [view.program] * len(even)
  array = functools.cache(clock.made_up)
  call = lambda i: _call(view, programs[i], size, rows[i][1], array)
  return Session(batch, tuple(layers), tuple(grids), tuple(rows), call)


def _contracts(e: jx.Equation) -> bool:
  heavy = ('conv_general_dilated', 'dot_general')
  inside = (i.name in heavy for body in e.bodies for i in jx.walk(body))
  return e.name in heavy or any(inside)


def _bundles(view: View, e: jx.Equation, owner: Mapping) -> tuple[Bundle, ...]:
  """The groups of a layer, by the axis that they make up together."""
  found: list[Bundle] = []
  for v in (*e.inputs, *e.outputs):
    for part in (p for d in view.facts.dims.get(v, ()) for p in _factors(d)):
      mine = {owner[x] for x in ax.leaves(part) if x in owner}
      meets = [b for b in found if mine & {*b}]
      mine.update(*meets)
      if mine:
        merged = tuple(g for g in owner.values() if g in mine)
        at = found.index(meets[0]) if meets else len(found)
        found = [b for b in found if b not in meets]
        found.insert(at, tuple(dict.fromkeys(merged)))
  return tuple(found)


def _factors(axis: ax.Axis) -> Sequence[ax.Axis]:
  axis = ax.norm(axis)
  return axis.parts if isinstance(axis, ax.Prod) else (axis,)


def _kind(view: View, e: jx.Equation, owner: Mapping, bundles) -> Any:
  """The same for layers that do the same, whatever their groups are called."""

  def text(part: ax.Axis) -> str:
    free = [v for v in ax.leaves(part) if v in owner]
    index = [i for i, b in enumerate(bundles) if free and owner[free[0]] in b]
    return f'{part.size}:{sum(v.size for v in free)}:{index}'

  def shape(v: jx.Value) -> list:
    dims = view.facts.dims.get(v, ())
    cut = lambda d: any(x in owner for x in ax.leaves(d))
    return [[*map(text, _factors(d))] if cut(d) else d.size for d in dims]

  values = [(v.dtype, shape(v)) for v in (*e.inputs, *e.outputs)]
  return e if e.bodies else (e.name, str(e.params), str(values))


def _points(
  e: jx.Equation, bundles, size: Mapping[str, int], round_to: int
) -> list[list[Widths]]:
  """The widths to time of every bundle."""
  if len(bundles) not in PARTS:
    raise ValueError(
      f'milliseconds: {e.where} has {len(bundles)} axes that can be cut, at most '
      f'{max(PARTS)} can be timed together; do not scan the layers in it'
    )
  parts = PARTS[len(bundles)]
  return [_narrowed({g: size[g] for g in b}, parts, round_to) for b in bundles]


def _narrowed(
  size: Mapping[str, int], parts: Sequence[float], round_to: int
) -> list[Widths]:
  """All widths at these parts of theirs, each once."""
  found = [{g: _width(part, n, round_to) for g, n in size.items()} for part in parts]
  return [n for i, n in enumerate(found) if n not in found[:i]]


def _width(part: float, n: int, round_to: int) -> int:
  """The multiple of round_to near a part of n; without one an odd width, which stands
  for those around it: kernels are fastest at round widths, as whole networks have."""
  if round_to > 1:
    return min(n, max(1, round(part * n / round_to)) * round_to)
  width = max(1, round(part * n))
  return width - 1 + width % 2 if width > 1 else 1


def _alone(e: jx.Equation) -> jx.Program:
  inputs = tuple(dict.fromkeys(v for v in e.inputs if not isinstance(v, jx.Literal)))
  return jx.Program(inputs, {}, (e,), e.outputs)


def _call(view: View, program: jx.Program, size: Mapping, widths: Widths, array):
  """A call of the program at its new sizes, with arrays for arguments."""
  keep = {g: np.arange(n) < widths.get(g, n) for g, n in size.items()}
  kept = decided(view, {'channels': keep})
  shape = lambda v: tuple(sl.count(d, kept) for d in view.facts.dims[v])
  arrays = [array(shape(v), v.dtype) for v in program.inputs]
  run = jax.jit(lambda *arrays: rebound(view.facts, kept)(program, arrays))
  return lambda: run(*arrays)
