"""Charts of single exits: who leaves there, and whether their confidence is right.

Every function returns a matplotlib Figure and shows nothing.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator, PercentFormatter

from depthprune.report.style import (
  FAINT,
  FIRST,
  INK,
  LINE,
  MUTED,
  OFFSET,
  ROW,
  SECOND,
  name_rows,
  styled,
)

ACROSS = 3  # reliability diagrams in a row


def reliability(calibration: Mapping[str, Mapping[str, Any]]) -> Figure:
  """Accuracy against confidence before and after temperature, a panel for each exit.

  calibration: {exit: of `calibration.report`}. On the diagonal confidence is right;
    faint bars, and the size of the marks, are the share of examples in each bin.
  """
  rows = -(-len(calibration) // ACROSS)
  columns = min(ACROSS, len(calibration))
  with styled():
    figure = Figure(figsize=(7.2, 0.5 + 2.4 * rows), layout='constrained')
    # Room between panels, so that 100 % of one does not run into 0 % of the next.
    figure.get_layout_engine().set(wspace=0.08)  # pyright: ignore
    grid = figure.subplots(rows, ACROSS, squeeze=False, sharex=True, sharey=True)
    for axes in grid.flat[len(calibration) :]:
      axes.set_visible(False)
    for axes, (name, found) in zip(grid.flat, calibration.items()):
      _diagram(axes, name, found)
    for axes in grid[:, 0]:
      axes.set_ylabel('accuracy')
    # The last panel of every column, which may be in the last row but one.
    for column in range(columns):
      last = grid[(len(calibration) - 1 - column) // ACROSS, column]
      last.set_xlabel('confidence')
      last.tick_params(labelbottom=True)
    figure.legend(
      handles=[
        Line2D([], [], color=SECOND, marker='s', ms=3.5, label='before temperature'),
        Line2D([], [], color=FIRST, marker='o', ms=3.5, label='after'),
        Line2D([], [], color=FAINT, lw=6, label='share of examples'),
      ],
      loc='outside upper right',
      ncols=3,
      frameon=False,
    )
  return figure


def leaving(
  shares: Mapping[str, float], right: Mapping[str, float | None] = {}
) -> Figure:
  """Where examples leave, a bar for every exit.

  shares: {exit: part of all examples}. right: {exit: accuracy of those that leave
    there}, where it is known.
  """
  names = list(shares)
  with styled():
    figure = Figure(figsize=(7.2, 0.7 + 1.2 * ROW * len(names)), layout='constrained')
    axes = figure.subplots()
    axes.barh(range(len(names)), list(shares.values()), color=FIRST, height=0.68)
    for row, name in enumerate(names):
      known = right.get(name)
      text = f'{100 * shares[name]:.1f} %'
      text += '' if known is None else f', {100 * known:.1f} % of them right'
      at = (shares[name], row)
      axes.annotate(text, at, (4, 0), **OFFSET, va='center', color=INK, size=8)
    name_rows(axes, names)
    axes.set_xlabel('share of the test examples')
    longest = max(shares.values())
    axes.set_xlim(0, (1.45 if right else 1.15) * longest)
    ticks = MaxNLocator(5).tick_values(0, longest)
    axes.set_xticks([tick for tick in ticks if tick <= 1])
    axes.xaxis.set_major_formatter(PercentFormatter(1))
    axes.grid(axis='x', color=LINE, lw=0.5)
  return figure


def _diagram(axes: Axes, name: str, found: Mapping[str, Any]) -> None:
  every = found.get('all') or {}
  before, after = every.get('before') or {}, every.get('after') or {}
  axes.plot([0, 1], [0, 1], color=LINE, lw=1)
  if after:
    bins, n = after['bins'], max(1, sum(after['bins']['count']))
    edges = np.array(bins['edges'], float)
    share = np.array(bins['count']) / n
    axes.bar(edges[:-1], share, np.diff(edges), align='edge', color=FAINT)
  temperature = found.get('temperature')
  scaled = temperature not in (None, 1)
  if scaled:
    _bins(axes, before, SECOND, 's')
  _bins(axes, after, FIRST, 'o')
  errors = [part['ece'] for part in (before, after)[not scaled :] if part]
  said = ' → '.join('–' if e is None else f'{100 * e:.1f}' for e in errors)
  axes.set_title(f'{name}, T {temperature:.2f}' if scaled else name, size=9, color=INK)
  if said:
    at: Any = {'xycoords': 'axes fraction', 'va': 'top', 'color': MUTED, 'size': 8}
    axes.annotate(f'ECE {said} %', (0.04, 0.95), **at)
  axes.set(xlim=(0, 1), ylim=(0, 1), aspect='equal')
  for axis in (axes.xaxis, axes.yaxis):
    axis.set_major_formatter(PercentFormatter(1, decimals=0))
    axis.set_ticks([0, 0.5, 1])


def _bins(axes: Axes, part: Mapping[str, Any], colour: str, marker: str) -> None:
  """Accuracy over mean confidence of the bins that have examples.

  A mark is as large as its bin is full: few examples say little, and often zigzag.
  """
  bins = part.get('bins')
  if not bins:
    return
  rows = zip(bins['confidence'], bins['accuracy'], bins['count'])
  x, y, n = np.array([row for row in rows if None not in row]).reshape(-1, 3).T
  axes.plot(x, y, color=colour, lw=0.8, alpha=0.6)
  size = 3 + 60 * n / max(1, n.sum())
  axes.scatter(x, y, size, color=colour, marker=marker, lw=0, clip_on=False, zorder=3)
