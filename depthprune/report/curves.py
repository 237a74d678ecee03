"""A chart of cascades: accuracy against FLOPs."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator, PercentFormatter

from depthprune.report.depth import SERIES
from depthprune.report.style import (
  INK,
  LINE,
  MUTED,
  OFFSET,
  PAPER,
  styled,
)

NEAR = 0.03  # of accuracy below the MainNet: what the closer look shows

Curve = Sequence[tuple[float, float]]
"""[(share of the MainNet's FLOPs, accuracy), ...]"""


class Series(NamedTuple):
  """Cascades of one network, of one seed or several.

  Attributes:
    seeds: for every seed, the cascades that there are to choose from.
    own: accuracy of the MainNet alone, by seed.
    chosen: the cascade that was chosen, by seed.
    exits: {exit: by seed, what it costs and reaches if all leave there}.
  """

  seeds: Sequence[Curve]
  own: Sequence[float]
  chosen: Curve = ()
  exits: Mapping[str, Curve] = {}


def series(*results: Mapping[str, Any]) -> Series:
  """Of one result.json for every seed, on test data."""
  seeds, own, chosen = [], [], []
  exits: dict[str, list[tuple[float, float]]] = {}
  for result in results:
    found, accuracy, flops = result['cascade'], result['accuracy'], result['flops']
    whole = found['whole']
    points = [p for p in found['curve'] if None not in (p['cost'], p['accuracy'])]
    seeds.append([(p['cost'] / whole, p['accuracy']) for p in points])
    own.append(accuracy['before'])
    chosen.append((flops['after'] / flops['before'], accuracy['after']))
    for name in found['exits'][:-1]:
      reached = found['exit_accuracy'].get(name)
      if reached is not None:
        exits.setdefault(name, []).append((found['cost'][name] / whole, reached))
  return Series(seeds, own, chosen, exits)


def compute_curve(curves: Mapping[str, Series]) -> Figure:
  """Accuracy against FLOPs: {name: series}, a colour for each.

  Of several seeds the mean and a band from the worst to the best. The MainNet is a
  dashed line, a star is a chosen cascade, a ring an exit at which all leave. A second
  panel looks closer at what is near the MainNet, where the first shows much else.

  Raises: ValueError for more series than there are colours.
  """
  if len(curves) > len(SERIES):
    raise ValueError(f'expected at most {len(SERIES)} series, got {", ".join(curves)}')
  floor = min(a for c in curves.values() for a in c.own) - NEAR
  lowest = min(a for c in curves.values() for _, a in _everything(c))
  shared = len({tuple(c.own) for c in curves.values()}) == 1
  panels = 2 if lowest < floor - NEAR else 1
  with styled():
    figure = Figure(figsize=(7.2, 3.4), layout='constrained')
    grid = list(figure.subplots(1, panels, squeeze=False)[0])
    for axes in grid:
      for look, curve in zip(SERIES, curves.values()):
        _draw(axes, curve, look, shared)
      _percents(axes)
    if len(grid) > 1:
      _look_closer(grid[1], list(curves.values()), floor)
    grid[0].set_ylabel('test accuracy')
    figure.legend(
      handles=list(_keys(curves)), loc='outside upper right', ncols=6, frameon=False
    )
    if len(curves) == 1:
      (curve,) = curves.values()
      figure.draw_without_rendering()  # lays out: names need to know where points are
      name_points(grid[0], {name: _mean(at) for name, at in curve.exits.items()})
  return figure


def _draw(axes: Axes, curve: Series, look: tuple[str, str], shared: bool) -> None:
  colour, marker = look
  own = MUTED if shared else colour
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
  """Shares [n] that all seeds reach, accuracy [seeds, n] there.

  Between two cascades lie those that toss a coin for each example.
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
  """Names to the lower right of points, those left out that would cover another."""
  to_inches = axes.get_figure().dpi_scale_trans.inverted()  # pyright: ignore[reportOptionalMemberAccess]
  free: list[np.ndarray] = []
  for name, at in points.items():
    here = to_inches.transform(axes.transData.transform(at))
    width = 0.07 * len(name)
    if any(
      abs(here - other)[0] < width and abs(here - other)[1] < 0.13 for other in free
    ):
      continue
    free.append(here)
    axes.annotate(name, at, (5, -9), **OFFSET, color=MUTED, size=8)


def _keys(curves: Mapping[str, Series]) -> Iterator[Line2D]:
  """What the legend explains: the colours, if several, and the marks."""
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
