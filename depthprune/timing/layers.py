"""Milliseconds on the device at hand as a cost: a table per layer over its widths.

A layer is an equation that contracts: a convolution, a product, or a loop around some.
Each layer is timed alone at some widths of each axis that can be cut. The network is
timed as it is, and with all its widths narrowed evenly. All of these take turns.

  C(n)     = f(sum_l t_l(n)); for the network as it is, its measured time
  t_l(n)   table of layer l, linear between the widths that were timed; for the layer
           as it is, its measured time
  n        number of slices that are kept of every group
  f        from the sum of the layers to the time of the network, which also has
           element-wise work and launches between layers, and in which XLA fuses some
           of them: linear between the evenly narrowed networks

Tables per layer are those of NetAdapt (Yang et al., arXiv 1804.03230); f is ours. No
layer counts as slower for being narrower: where noise says so, a table is replaced by
the mean of the closest rising tables above and below it. Kernels are fastest at some
widths, mostly those that networks are built with, so a layer that loses one channel can
become slower (or much faster, if its size suited the cache badly). Therefore odd widths
are timed where widths are not rounded. For gates, f has the value above but one mean
slope: where launches hide what narrower layers save, f is flat and gates would get no
gradient.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from depthprune.program import arguments, cost, rounding
from depthprune.program import axes as ax
from depthprune.program import jaxpr as jx
from depthprune.program.coupling import WHY, Coupling
from depthprune.program.resize import decided, rebound
from depthprune.program.rounding import RoundTo
from depthprune.program.trace import View, batched
from depthprune.timing import clock

BATCH = 128  # examples in a call
SECONDS = 4.0  # spent on all calls together, though each has at least nine turns
EVEN = (0, 0.25, 0.5, 0.75, 1)  # fractions of all widths; 0 is the least width
# Fractions of the widths of a layer, by the number of its axes that can be cut.
PARTS = {1: EVEN, 2: (0, 0.25, 0.5, 1), 3: (0, 0.5, 1), 4: (0, 1), 5: (0, 1)}
COSTS = {'flops': cost.flops, 'params': cost.params, 'bytes': cost.stored_bytes}
TIME = 'milliseconds'

CostFunction = Callable[[Coupling, Mapping | None], Any]
"""(coupling, gates) -> cost; gates are None, bool or float, as for `cost.flops`."""

Widths = dict[str, int]
"""{group: number of slices kept}; other groups are whole."""

Bundle = tuple[str, ...]
"""Groups that make up one axis together; they are narrowed alike, their sum counts."""


class LayerTable(NamedTuple):
  """Milliseconds of a layer over its widths.

  Attributes:
    widths: the widths [n] that were timed, rising, for each axis that can be cut.
    taken: milliseconds [n, ...], rising along every axis.
    full: the uncut width of each axis.
    whole: milliseconds of the uncut layer.
  """

  widths: tuple[np.ndarray, ...]
  taken: np.ndarray
  full: tuple[int, ...]
  whole: float


class Milliseconds(NamedTuple):
  """The time of one network as a cost function, made by `milliseconds`.

  Call it as (coupling, gates), like `cost.flops`. For None it returns the time of the
  whole network, for a keep tree of bool arrays a float, and for float gates a float32
  scalar with a derivative. Only channels count; branches and exits count as kept.

  Attributes:
    batch: examples in a call.
    layers: (axes, index of the table in `tables`) of every layer. An axis is the tuple
      of groups that make it up together.
    tables: the tables, each once for layers that do the same.
    network: (sums of the layers [k], milliseconds [k]) of the narrowed networks.
    whole: milliseconds of the whole network.
  """

  batch: int
  layers: tuple[tuple[tuple[Bundle, ...], int], ...]
  tables: tuple[LayerTable, ...]
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


class Session(NamedTuple):
  """Everything that has to be timed for one network.

  Attributes:
    batch: examples in a call.
    layers: as in `Milliseconds`.
    grids: (widths, full) of each LayerTable.
    rows: (layer, widths) of every call. The rows of a layer end with the whole layer.
      The rows of the network come last, without a name, and end with the whole network.
    call: (number of a row) -> its call, which is compiled when it is first made.
  """

  batch: int
  layers: tuple[tuple[tuple[Bundle, ...], int], ...]
  grids: tuple[tuple[tuple[np.ndarray, ...], tuple[int, ...]], ...]
  rows: tuple[tuple[str, Widths], ...]
  call: Callable[[int], Callable[[], Any]]

  def measure(self, seconds: float = SECONDS) -> np.ndarray:
    """Returns the median milliseconds of all rows, float64 [rows]."""
    calls = [self.call(i) for i in range(len(self.rows))]
    return np.median(clock.interleave(calls, seconds), axis=1)

  def cost(self, measured: np.ndarray) -> Milliseconds:
    """Returns the cost function from the median milliseconds of all rows [rows]."""
    tables, at = [], 0
    for widths, full in self.grids:
      shape = tuple(map(len, widths))
      end = at + int(np.prod(shape))
      taken = rising(measured[at:end].reshape(shape))
      tables.append(LayerTable(widths, taken, full, float(measured[end])))
      at = end + 1
    sums = [sum_of(self.layers, tables, n, np) for _, n in self.rows[at:-1]]
    sums = np.array(sums, np.float32)
    # Of narrowed networks with the same sum of layers, the widest stands for all.
    distinct = np.append(np.diff(sums) > 1e-6 * sums[-1], True)
    network = sums[distinct], rising(measured[at:-1])[distinct]
    whole = float(measured[-1])
    return Milliseconds(self.batch, self.layers, tuple(tables), network, whole)


def milliseconds(
  coupling: Coupling,
  batch: int = BATCH,
  seconds: float = SECONDS,
  round_to: RoundTo = 1,
) -> Milliseconds:
  """Times the layers of a network on this device, and returns its time as a cost.

  Pass the result as `of` to `oneshot` or `trainable_gates`, or call it as
  (coupling, gates). Inputs and weights are made up.

  Args:
    coupling: of the network, made by `couple`.
    batch: examples in a call.
    seconds: how long to measure, compilation not counted.
    round_to: widths will be multiples of this, or 'auto'.

  Returns:
    The cost function, in milliseconds per call.

  Raises:
    ValueError: a batch below 1, a network of which nothing can be cut, or a layer with
      more than five axes that can be cut.
  """
  arguments.number('seconds', seconds, above=0)
  timed = session(coupling, batch, round_to)
  return timed.cost(timed.measure(seconds))


def session(coupling: Coupling, batch: int = BATCH, round_to: RoundTo = 1) -> Session:
  """Returns what has to be timed for `milliseconds`; equal arguments give equal rows.

  Args:
    coupling: of the network, made by `couple`.
    batch: examples in a call.
    round_to: widths will be multiples of this, or 'auto'.

  Raises:
    ValueError: one of the reasons of `milliseconds`.
  """
  arguments.coupling(coupling)
  arguments.whole('batch', batch)
  rounding.check(round_to)
  inputs, kwargs = batched((coupling.inputs, coupling.kwargs), batch, coupling.counts)
  view = coupling.retrace(coupling.fn, inputs, kwargs, {})
  size = {g: gate.size for g, gate in coupling.gates()['channels'].items()}
  owner = {v: g for g in size for v in ax.leaves(view.groups[g])}
  heavy = {'conv_general_dilated', 'dot_general'}
  known: dict[Any, int] = {}
  layers, grids, rows, programs = [], [], [], []
  for e in view.program.equations:
    inside = (i.name for body in e.bodies for i in jx.walk(body))
    if heavy.isdisjoint((e.name, *inside)):
      continue
    bundles = _bundles(view, e, owner)
    if not bundles:
      continue
    kind = _kind(view, e, owner, bundles)
    if kind not in known:
      known[kind] = len(grids)
      points = _points(e, bundles, size, round_to)
      counts = np.array([[sum(n.values()) for n in point] for point in points])
      full = tuple(sum(size[g] for g in bundle) for bundle in bundles)
      grids.append((tuple(np.unique(axis) for axis in counts.T), full))
      points.append(tuple({g: size[g] for g in bundle} for bundle in bundles))
      rows += [(e.where, {g: n[g] for n in point for g in n}) for point in points]
      arrays = dict.fromkeys(v for v in e.inputs if not isinstance(v, jx.Literal))
      alone = jx.Program(tuple(arrays), {}, (e,), e.outputs)
      programs += [alone] * len(points)
    layers.append((bundles, known[kind]))
  if not layers:
    raise ValueError(f'milliseconds: no layer of this network can be cut; {WHY}')
  even = [*_narrowed(size, EVEN, round_to), size]
  rows += [('', widths) for widths in even]
  programs += [view.program] * len(even)
  made_up = functools.cache(clock.made_up)

  def call(row: int) -> Callable[[], Any]:
    program, widths = programs[row], rows[row][1]
    keep = {g: np.arange(n) < widths.get(g, n) for g, n in size.items()}
    kept = decided(view, {'channels': keep})
    shape = lambda v: tuple(ax.count(d, kept) for d in view.facts.dims[v])
    arrays = [made_up(shape(v), v.dtype) for v in program.inputs]
    run = jax.jit(lambda *arrays: rebound(view.facts, kept)(program, arrays))
    return lambda: run(*arrays)

  return Session(batch, tuple(layers), tuple(grids), tuple(rows), call)


def counted(
  coupling: Coupling, of: str | CostFunction, round_to: RoundTo = 1
) -> tuple[str, CostFunction]:
  """Returns the name of a cost and its function.

  Args:
    coupling: of the network, made by `couple`.
    of: 'flops', 'params', 'bytes', 'milliseconds' (which are measured now), or a cost
      function such as `milliseconds(coupling, batch=8)` returns. One of a user's own is
      called by its own name.
    round_to: widths will be multiples of this, or 'auto'.

  Raises:
    ValueError: an unknown name, or one of the reasons of `milliseconds`.
  """
  if callable(of):
    if isinstance(of, Milliseconds):
      return TIME, of
    named = getattr(of, '__name__', '').replace('<lambda>', '') or 'cost'
    return next((name for name, known in COSTS.items() if known is of), named), of
  if of == TIME:
    return of, milliseconds(coupling, round_to=round_to)
  if of not in COSTS:
    expected = f'one of {", ".join([*COSTS, TIME])}'
    raise arguments.refused('of', expected, of, kind=ValueError)
  return of, COSTS[of]


# ---- tables --------------------------------------------------------------------------


def between(x: Any, points: np.ndarray, table: np.ndarray, xp: Any = np) -> Any:
  """Returns table[n, ...] at x, linear between the points [n] and beyond them."""
  table = xp.asarray(table, np.float32)
  points = np.asarray(points, np.float32)
  low, high = np.tile(np.array([[0], [1]], np.float32), len(points) - 1)
  low[:1], high[-1:] = -np.inf, np.inf
  passed = xp.clip((x - points[:-1]) / np.diff(points), low, high)
  return table[0] + xp.tensordot(passed, xp.diff(table, axis=0), 1)


def rising(table: np.ndarray) -> np.ndarray:
  """Returns a table that rises along every axis, float32.

  It is the mean of the lowest rising table above and the highest one below, so a table
  that rises already stays as it is.
  """
  for axis in range(table.ndim):
    above = np.maximum.accumulate(table, axis)
    below = np.flip(np.minimum.accumulate(np.flip(table, axis), axis), axis)
    table = (above + below) / 2
  return table.astype(np.float32)


def sum_of(
  layers: Sequence, tables: Sequence[LayerTable], n: Mapping[str, Any], xp: Any
) -> Any:
  """Returns sum_l t_l at n[group] slices, with layers and tables of `Milliseconds`."""
  total = np.float32(0)
  for axes, index in layers:
    table = tables[index]
    counts = [sum(n[g] for g in groups) for groups in axes]
    value = table.taken
    for count, points in zip(counts, table.widths, strict=True):
      value = between(count, points, value, xp)
    is_whole = [count == full for count, full in zip(counts, table.full, strict=True)]
    if xp is np:
      value = table.whole if all(is_whole) else value
    else:  # the whole layer has the derivative of a narrowed one
      jump = jnp.where(jnp.stack(is_whole).all(), table.whole - value, 0)
      value = value + jax.lax.stop_gradient(jump)
    total = total + value
  return total


# ---- layers and the widths to time ---------------------------------------------------


def _bundles(view: View, e: jx.Equation, owner: Mapping) -> tuple[Bundle, ...]:
  """The groups of a layer, by the axis that they make up together."""
  bundles: list[Bundle] = []
  for v in (*e.inputs, *e.outputs):
    for part in (p for d in view.facts.dims.get(v, ()) for p in _factors(d)):
      mine = {owner[x] for x in ax.leaves(part) if x in owner}
      meets = [b for b in bundles if mine & {*b}]
      mine.update(*meets)
      if mine:
        merged = tuple(g for g in owner.values() if g in mine)
        at = bundles.index(meets[0]) if meets else len(bundles)
        bundles = [b for b in bundles if b not in meets]
        bundles.insert(at, tuple(dict.fromkeys(merged)))
  return tuple(bundles)


def _factors(axis: ax.Axis) -> Sequence[ax.Axis]:
  axis = ax.norm(axis)
  return axis.parts if isinstance(axis, ax.Prod) else (axis,)


def _kind(view: View, e: jx.Equation, owner: Mapping, bundles) -> Any:
  """Equal for layers that do the same, whatever their groups are called."""

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
  e: jx.Equation, bundles, size: Mapping[str, int], round_to: RoundTo
) -> list[tuple[Widths, ...]]:
  """The widths to time: all combinations of those of every bundle."""
  if len(bundles) not in PARTS:
    raise ValueError(
      f'milliseconds: {e.where} has {len(bundles)} axes that can be cut, at most '
      f'{max(PARTS)} can be timed together; do not scan the layers in it'
    )
  parts = PARTS[len(bundles)]
  each = [_narrowed({g: size[g] for g in b}, parts, round_to) for b in bundles]
  return list(itertools.product(*each))


def _narrowed(
  size: Mapping[str, int], parts: Sequence[float], round_to: RoundTo
) -> list[Widths]:
  """The widths of all groups at these fractions, without repetitions.

  They are multiples of `round_to`. Without rounding they are odd: kernels are fastest
  at round widths, so these would not stand for the widths around them.
  """

  def width(part: float, n: int) -> int:
    by = rounding.step(round_to, n)
    if by > 1:
      least = int(rounding.built(part * n, n, round_to))
      return min(n, round(part * n / by) * by or least)
    near = max(1, round(part * n))
    return near - 1 + near % 2 if near > 1 else 1

  points = [{g: width(part, n) for g, n in size.items()} for part in parts]
  return [n for i, n in enumerate(points) if n not in points[:i]]
