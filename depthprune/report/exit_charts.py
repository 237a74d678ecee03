"""Charts of cascades: accuracy against FLOPs, where examples leave, and calibration.

Every function but `collect_series` and `name_points` returns a matplotlib Figure and
shows nothing.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator, PercentFormatter

from depthprune.report.charts import SERIES
from depthprune.report.numbers import percent
from depthprune.report.style import (
  FAINT,
  FIRST,
  INK,
  LINE,
  MUTED,
  OFFSET,
  PAPER,
  ROW,
  SECOND,
  WIDE,
  legend,
  name_rows,
  new_figure,
)
from depthprune.train.result import (
  Accuracies,
  Calibration,
  CascadeResult,
  Change,
  ExitCalibration,
)

ACROSS = 2.4  # inches of a reliability diagram


def reliability(
  calibration: Mapping[str, ExitCalibration], width: float = WIDE
) -> Figure:
  """Draws accuracy against confidence for each exit, before and after temperature.

  On the diagonal confidence is right. Faint bars, and the size of the marks, show the
  share of examples in each bin.

  Args:
    calibration: {exit: its calibration}.
    width: inches of the chart.
  """
  across = round(width / ACROSS)
  rows = -(-len(calibration) // across)
  columns = min(across, len(calibration))
  with new_figure(0.5 + width / across * rows, width) as figure:
    # Room between the panels' labels, 100 % of one and 0 % of the next.
    figure.get_layout_engine().set(wspace=0.08)  # pyright: ignore
    grid = figure.subplots(rows, across, squeeze=False, sharex=True, sharey=True)
    for axes in grid.flat[len(calibration) :]:
      axes.set_visible(False)
    for axes, (name, of_exit) in zip(grid.flat, calibration.items()):
      _diagram(axes, name, of_exit)
    for axes in grid[:, 0]:
      axes.set_ylabel('accuracy')
    # The last panel of every column, which may be in the last row but one.
    for column in range(columns):
      last = grid[(len(calibration) - 1 - column) // across, column]
      last.set_xlabel('confidence')
      last.tick_params(labelbottom=True)
    marks = [
      Line2D([], [], color=SECOND, marker='s', ms=3.5, label='before temperature'),
      Line2D([], [], color=FIRST, marker='o', ms=3.5, label='after'),
      Line2D([], [], color=FAINT, lw=6, label='share of examples'),
    ]
    legend(figure, marks)
  return figure


def leaving(
  shares: Mapping[str, float],
  right: Mapping[str, float | None] = {},
  width: float = WIDE,
  of: str = 'examples',
) -> Figure:
  """Draws where examples leave, a bar for every exit.

  Args:
    shares: {exit: part of all examples}.
    right: {exit: accuracy of the examples that leave there}, where it is known.
    width: inches of the chart.
    of: what leaves.
  """
  names = list(shares)
  lengths = [part if 0 <= part <= 1 else 0.0 for part in shares.values()]
  with new_figure(0.7 + 1.2 * ROW * len(names), width) as figure:
    axes = figure.subplots()
    axes.barh(range(len(names)), lengths, color=FIRST, height=0.68)
    for row, name in enumerate(names):
      known = right.get(name)
      text = percent(shares[name])
      text += '' if known is None else f', {percent(known)} of them right'
      at = (lengths[row], row)
      axes.annotate(text, at, (4, 0), **OFFSET, va='center', color=INK, size=8)
    name_rows(axes, names)
    axes.set_xlabel(f'share of the test {of}')
    longest = max(lengths) or 1
    room = (0.45 if right else 0.15) * (WIDE / width) ** 1.5  # for the text
    axes.set_xlim(0, (1 + room) * longest)
    ticks = MaxNLocator(5 if width >= WIDE else 2).tick_values(0, longest)
    axes.set_xticks([tick for tick in ticks if tick <= 1])
    axes.xaxis.set_major_formatter(PercentFormatter(1))
    axes.grid(axis='x', color=LINE, lw=0.5)
  return figure


def _diagram(axes: Axes, name: str, exit_: ExitCalibration) -> None:
  before = exit_.all.before if exit_.all else None
  after = exit_.all.after if exit_.all else None
  axes.plot([0, 1], [0, 1], color=LINE, lw=1)
  if after and after.bins:
    bins, n = after.bins, max(1, sum(after.bins.count))
    edges = np.array(bins.edges, float)
    share = np.array(bins.count) / n
    axes.bar(edges[:-1], share, np.diff(edges), align='edge', color=FAINT)
  temperature = exit_.temperature
  scaled = temperature is not None and math.isfinite(temperature) and temperature != 1
  if scaled:
    _bins(axes, before, SECOND, 's')
  _bins(axes, after, FIRST, 'o')
  errors = [part.ece for part in (before, after)[not scaled :] if part]
  said = ' → '.join(percent(e).removesuffix(' %') for e in errors)
  axes.set_title(f'{name}, T {temperature:.2f}' if scaled else name, size=9, color=INK)
  if said:
    at: Any = {'xycoords': 'axes fraction', 'va': 'top', 'color': MUTED, 'size': 8}
    axes.annotate(f'ECE {said} %', (0.04, 0.95), **at)
  axes.set(xlim=(0, 1), ylim=(0, 1), aspect='equal')
  for axis in (axes.xaxis, axes.yaxis):
    axis.set_major_formatter(PercentFormatter(1, decimals=0))
    axis.set_ticks([0, 0.5, 1])


def _bins(axes: Axes, part: Calibration | None, colour: str, marker: str) -> None:
  """Draws accuracy over mean confidence of the bins that have examples.

  The size of a mark is the share of examples in its bin, as few examples say little.
  """
  bins = part.bins if part else None
  if bins is None:
    return
  rows = zip(bins.confidence, bins.accuracy, bins.count)
  x, y, n = np.array([row for row in rows if None not in row]).reshape(-1, 3).T
  axes.plot(x, y, color=colour, lw=0.8, alpha=0.6)
  size = 3 + 60 * n / max(1, n.sum())
  axes.scatter(x, y, size, color=colour, marker=marker, lw=0, clip_on=False, zorder=3)


# ---- accuracy against FLOPs ----------------------------------------------------------

NEAR = 0.03  # of accuracy below the MainNet, which the closer look shows

Curve = Sequence[tuple[float, float]]
"""[(share of the MainNet's FLOPs, accuracy), ...]"""


class Series(NamedTuple):
  """Cascades of one network, of one seed or several.

  Attributes:
    seeds: for every seed, the efficient cascades.
    own: accuracy of the MainNet alone, by seed.
    chosen: the cascade that was chosen, by seed.
    exits: {exit: cost and accuracy if all examples leave there, by seed}.
  """

  seeds: Sequence[Curve]
  own: Sequence[float]
  chosen: Curve = ()
  exits: Mapping[str, Curve] = {}


def collect_series(*runs: tuple[CascadeResult, Accuracies, Change]) -> Series:
  """Collects the cascades of one network from its runs, one for every seed.

  Args:
    *runs: the cascade of a run, its accuracies on test data and its change in FLOPs.
  """
  seeds, own, chosen = [], [], []
  exits: dict[str, list[tuple[float, float]]] = {}
  for cascade, accuracy, flops in runs:
    whole = cascade.whole
    points = ((p.cost, p.accuracy) for p in cascade.curve)
    shares = ((None if c is None else Change(whole, c).kept, a) for c, a in points)
    seeds.append(_finite(shares))
    own += [accuracy.before] * math.isfinite(accuracy.before)
    chosen += _finite([(flops.kept, accuracy.after)])
    for name in cascade.exits[:-1]:
      at = Change(whole, cascade.cost[name]).kept, cascade.exit_accuracy.get(name)
      for known in _finite([at]):
        exits.setdefault(name, []).append(known)
  return Series(seeds, own, chosen, exits)


def _finite(
  points: Iterable[tuple[float | None, float | None]],
) -> list[tuple[float, float]]:
  """Returns the points of which both values were measured, and can be drawn."""
  known = ((x, y) for x, y in points if x is not None and y is not None)
  return [(x, y) for x, y in known if math.isfinite(x) and math.isfinite(y)]


def compute_curve(
  curves: Mapping[str, Series], width: float = WIDE, label: str = 'test accuracy'
) -> Figure:
  """Draws accuracy against FLOPs.

  Several seeds are drawn as their mean and a band from the worst to the best. The
  MainNet is a dashed line, a star is a chosen cascade, and a ring is an exit at which
  all examples leave. If the accuracies differ much, a second panel shows those near the
  MainNet.

  Args:
    curves: {name: series}, a colour for each.
    width: inches of the chart.
    label: what is drawn against FLOPs.

  Raises:
    ValueError: there are more series than colours.
  """
  if len(curves) > len(SERIES):
    raise ValueError(f'expected at most {len(SERIES)} series, got {", ".join(curves)}')
  floor = min((a for c in curves.values() for a in c.own), default=0.0) - NEAR
  lowest = min((a for c in curves.values() for _, a in _everything(c)), default=floor)
  shared = len({tuple(c.own) for c in curves.values()}) == 1
  panels = 2 if lowest < floor - NEAR else 1
  beside = (1, panels) if width >= WIDE else (panels, 1)
  with new_figure(3.4 if width >= WIDE else 0.6 + 2.6 * panels, width) as figure:
    grid = list(figure.subplots(*beside, squeeze=False).flat)
    for axes in grid:
      for look, curve in zip(SERIES, curves.values()):
        _draw(axes, curve, look, shared)
      _percents(axes)
    if len(grid) > 1:
      _look_closer(grid[1], list(curves.values()), floor)
    grid[0].set_ylabel(label)
    legend(figure, list(_keys(curves)))
    if len(curves) == 1:
      (curve,) = curves.values()
      figure.draw_without_rendering()  # lays out: names need to know where points are
      name_points(grid[0], {name: _mean(at) for name, at in curve.exits.items()})
  return figure


def _draw(axes: Axes, curve: Series, look: tuple[str, str], shared: bool) -> None:
  colour, marker = look
  own = MUTED if shared else colour
  if curve.own:
    axes.axhline(float(np.mean(curve.own)), color=own, lw=1, ls=(0, (4, 3)))
  if len(curve.seeds) == 1:
    share, accuracy = _sorted(curve.seeds[0])
    axes.plot(share, accuracy, color=colour, marker=marker, ms=3, lw=1.5)
  else:
    share, of_seeds = _aligned(curve.seeds)
    low, high = of_seeds.min(0), of_seeds.max(0)
    axes.fill_between(share, low, high, color=colour, alpha=0.18, lw=0)
    axes.plot(share, of_seeds.mean(0), color=colour, lw=1.5)
  for at in map(_mean, curve.exits.values()):
    axes.plot(*at, 'o', mfc='none', mec=own, ms=5)
  for at in curve.chosen:
    axes.plot(*at, '*', color=colour, mec=INK, mew=0.7, ms=11, zorder=4)


def _aligned(seeds: Sequence[Curve]) -> tuple[np.ndarray, np.ndarray]:
  """Returns shares [n] that all seeds reach, and accuracy [seeds, n] there.

  It is interpolated: choosing one of two cascades at random for each example reaches
  any point between them.
  """
  curves = [_sorted(curve) for curve in seeds]
  low, high = max(x[0] for x, _ in curves), min(x[-1] for x, _ in curves)
  share = np.linspace(low, high, 200)
  return share, np.array([np.interp(share, x, y) for x, y in curves])


def _sorted(curve: Curve) -> tuple[np.ndarray, np.ndarray]:
  share, accuracy = np.array(sorted(curve), float).reshape(-1, 2).T
  return share, accuracy


def _mean(points: Curve) -> tuple[float, float]:
  share, accuracy = np.mean(points, axis=0)
  return float(share), float(accuracy)


def _everything(curve: Series) -> Iterator[tuple[float, float]]:
  for points in (*curve.seeds, curve.chosen, *curve.exits.values()):
    yield from points


def _percents(axes: Axes) -> None:
  axes.set_xlabel("FLOPs, share of the MainNet's")
  axes.xaxis.set_major_locator(MaxNLocator(5))
  for axis in (axes.xaxis, axes.yaxis):
    axis.set_major_formatter(PercentFormatter(1))
  axes.grid(color=LINE, lw=0.5)


def _look_closer(axes: Axes, curves: Sequence[Series], floor: float) -> None:
  points = [at for c in curves for at in _everything(c) if at[1] >= floor]
  points += [(1.0, own) for c in curves for own in c.own]
  (left, _), (right, top) = np.min(points, axis=0), np.max(points, axis=0)
  edge = 0.05 * max(right - left, 0.1)
  axes.set_xlim(left - edge, right + edge)
  axes.set_ylim(floor, top + 0.1 * (top - floor))
  axes.set_title('near the MainNet', size=9, color=INK)


def name_points(axes: Axes, points: Mapping[str, tuple[float, float]]) -> None:
  """Writes names below points, towards the middle, except where they would overlap."""
  to_inches = axes.get_figure().dpi_scale_trans.inverted()  # pyright: ignore[reportOptionalMemberAccess]
  free: list[tuple[float, float, float]] = []
  for name, at in points.items():
    x, y = to_inches.transform(axes.transData.transform(at))
    width = 0.07 * len(name)
    is_right = (
      axes.transAxes.inverted().transform(axes.transData.transform(at))[0] > 0.6
    )
    left = x - width if is_right else x
    if any(a < left + width and left < b and abs(y - c) < 0.13 for a, b, c in free):
      continue
    free.append((left, left + width, y))
    aside, side = (-5, 'right') if is_right else (5, 'left')
    text = axes.annotate(name, at, (aside, -9), **OFFSET, color=MUTED, size=8, ha=side)
    text.set_in_layout(False)


def _keys(curves: Mapping[str, Series]) -> Iterator[Line2D]:
  """Yields the entries of the legend: the colours, if there are several, and marks."""
  alone = len(curves) == 1
  for (colour, marker), (name, curve) in zip(SERIES, curves.items()):
    marker = marker if len(curve.seeds) == 1 else ''
    if name or alone:
      yield Line2D([], [], color=colour, marker=marker, ms=3, label=name or 'cascades')
  if any(curve.chosen for curve in curves.values()):
    colour = SERIES[0][0] if alone else PAPER
    yield Line2D([], [], color=colour, ls='', marker='*', mec=INK, ms=9, label='chosen')
  if any(curve.exits for curve in curves.values()):
    ring = {'marker': 'o', 'mfc': 'none', 'mec': MUTED, 'ms': 5, 'ls': ''}
    yield Line2D([], [], label='all leave at one exit', **ring)
  yield Line2D([], [], color=MUTED, lw=1, ls=(0, (4, 3)), label='MainNet')
