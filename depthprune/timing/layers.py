"""Milliseconds on the device at hand as a cost: a table per layer, over its widths.

Every equation that contracts (a convolution, a product, a loop around some) is a layer.
It is timed alone at some widths of each axis that can be cut, and so is the network,
narrowed evenly, and as it is; all of them take turns.

  C(n)     = f(sum_l t_l(n)), of the network as it is what was measured
  t_l(n)   table of layer l, linear between the widths that were timed, and what was
           measured of the whole layer
  n        slices that are kept of every group
  f        from the layers' sum to the network's time, which has what lies between
           layers (element-wise work, launches) and what XLA fuses: through the evenly
           narrowed networks, linear in between

Tables per layer are those of NetAdapt (Yang et al., arXiv 1804.03230); f is ours. No
layer is counted slower for being narrower: where noise says so, a table is taken half
way between the rising ones around it. But kernels like some widths more, mostly those
that networks are built with, so what loses a channel can be slower than it was (or
much faster, where a cache did not like it); where widths are not rounded, odd ones are
timed. For gates, f has the value above and one slope, the mean one: where launches hide
what narrower layers save, gates would otherwise have nothing to follow.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from depthprune.program import axes as ax
from depthprune.program import cost
from depthprune.program import jaxpr as jx
from depthprune.program.coupling import Coupling
from depthprune.program.resize import decided, rebound
from depthprune.program.stages import batched
from depthprune.program.trace import View
from depthprune.timing import clock


class Table(NamedTuple):
  """Milliseconds of a layer.

  Attributes:
    widths: those that were timed [n], rising, of each axis that can be cut.
    taken: milliseconds [n, ...], rising along every axis.
    full: its widths as it is, of each axis; whole: milliseconds of it so.
  """

  widths: tuple[np.ndarray, ...]
  taken: np.ndarray
  full: tuple[int, ...]
  whole: float


class Milliseconds(NamedTuple):
  """The cost C of one network: C(coupling, gates), as `cost.flops` is.

  gates: None for the whole network, bool for a float, float for a float32 scalar with
  a derivative. Of a keep tree the channels count; branches and exits count as kept.

  Attributes:
    batch: examples in a call.
    layers: (axes, table) of every layer, table among `tables`; an axis is the groups
      that are concatenated in it, counted by their sum.
    network: (sums of the layers [k], milliseconds [k]) of the narrowed networks.
    whole: milliseconds of the network as it is.
  """

  batch: int
  layers: tuple[tuple[tuple[tuple[str, ...], ...], int], ...]
  tables: tuple[Table, ...]
  network: tuple[np.ndarray, np.ndarray]
  whole: float

  def __call__(self, coupling: Coupling, gates: Mapping | None = None) -> Any:
    channels = (gates or {}).get('channels', {})
    hard = all(isinstance(g, np.ndarray) and g.dtype == bool for g in channels.values())
    if hard and all(map(np.all, channels.values())):
      return self.whole
    xp = np if hard else jnp
    n = {group: group_.size for group, group_ in coupling.groups.items()}
    n |= {group: xp.sum(gate) for group, gate in channels.items()}
    total = sum_of(self.layers, self.tables, n, xp)
    sums, taken = self.network
    value = between(total, sums, taken, xp)
    if hard:
      return float(value)
    slope = np.float32((taken[-1] - taken[0]) / max(sums[-1] - sums[0], 1e-30))
    return slope * total + jax.lax.stop_gradient(value - slope * total)


def between(x: Any, points: np.ndarray, table: np.ndarray, xp: Any = np) -> Any:
  """table[..., rest] at x, linear between points [n] and beyond them."""
  table = xp.asarray(table, np.float32)
  points = np.asarray(points, np.float32)
  low, high = np.tile(np.array([[0], [1]], np.float32), len(points) - 1)
  low[:1], high[-1:] = -np.inf, np.inf
  passed = xp.clip((x - points[:-1]) / np.diff(points), low, high)
  return table[0] + xp.tensordot(passed, xp.diff(table, axis=0), 1)


def rising(table: np.ndarray) -> np.ndarray:
  """Half way between the lowest table above and the highest below that rise along every
  axis; a table that does so is left as it is. float32."""
  for axis in range(table.ndim):
    above = np.maximum.accumulate(table, axis)
    below = np.flip(np.minimum.accumulate(np.flip(table, axis), axis), axis)
    table = (above + below) / 2
  return table.astype(np.float32)


def sum_of(layers, tables, n: Mapping[str, Any], xp: Any) -> Any:
  """sum_l t_l at n slices of every group; layers, tables: as in Milliseconds."""
  total = np.float32(0)
  for axes, index in layers:
    table = tables[index]
    counts = [sum(n[g] for g in groups) for groups in axes]
    value = table.taken
    for count, points in zip(counts, table.widths, strict=True):
      value = between(count, points, value, xp)
    total = total + _jumped(value, counts, table, xp)
  return total


def _jumped(value: Any, counts: Sequence, table: Table, xp: Any) -> Any:
  """The value of a layer, that of the whole one where nothing of it was cut; the
  derivative is that of narrower ones there, too."""
  is_whole = [count == full for count, full in zip(counts, table.full, strict=True)]
  if xp is np:
    return table.whole if all(is_whole) else value
  jump = jnp.where(jnp.stack(is_whole).all(), table.whole - value, 0)
  return value + jax.lax.stop_gradient(jump)


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
  shape = lambda v: tuple(ax.count(d, kept) for d in view.facts.dims[v])
  arrays = [array(shape(v), v.dtype) for v in program.inputs]
  run = jax.jit(lambda *arrays: rebound(view.facts, kept)(program, arrays))
  return lambda: run(*arrays)


Cost = Callable[[Coupling, Mapping | None], Any]
"""C(coupling, gates): gates None, bool or float, as for `cost.flops`."""

COSTS = {'flops': cost.flops, 'params': cost.params}
TIME = 'milliseconds'


def counted(coupling: Coupling, of: str | Cost, round_to: int = 1) -> tuple[str, Cost]:
  """(name, C) of a cost: 'flops', 'params', or 'milliseconds', which are measured now.

  of: a name, or a cost such as `milliseconds(coupling, batch=8)` gives. round_to: what
    widths will be multiples of.

  Raises: ValueError for an unknown name, and as `milliseconds` does.
  """
  if callable(of):
    return next((name for name, C in COSTS.items() if C is of), TIME), of
  if of == TIME:
    return of, milliseconds(coupling, round_to=round_to)
  if of not in COSTS:
    raise ValueError(f'of={of!r}: expected one of {", ".join([*COSTS, TIME])}')
  return of, COSTS[of]
