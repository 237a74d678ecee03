"""Charts of a run. Every function returns a matplotlib Figure and shows nothing."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from depthprune.report.style import (
  FAINT,
  FIRST,
  INK,
  LINE,
  MUTED,
  OFFSET,
  ROW,
  SECOND,
  by_stage,
  colour_bar,
  heat_map,
  name_rows,
  name_stages,
  styled,
)

COSTS = {
  'flops': 'FLOPs kept',
  'params': 'params kept',
  'milliseconds': 'time kept',
}
PANELS = {'loss': 'loss', 'accuracy': 'accuracy', **COSTS}


def width_chart(widths: Mapping[str, tuple[int, int]]) -> Figure:
  """Channels of every layer, before (pale) and after (solid): {name: (before, after)}.

  `tables.widths(result)` gives them in the network's order.
  """
  names = list(widths)
  before, after = (np.array([w[i] for w in widths.values()]) for i in (0, 1))
  with styled():
    figure = Figure(figsize=(7.2, 0.8 + ROW * len(names)), layout='constrained')
    axes = figure.subplots()
    rows = np.arange(len(names))
    axes.barh(rows, before, color=FAINT, height=0.72, label='before')
    axes.barh(rows, after, color=FIRST, height=0.72, label='after')
    for row, (b, a) in enumerate(zip(before, after, strict=True)):
      axes.annotate(
        f'{b} → {a}' if a != b else f'{b}',
        (b, row),
        (4, 0),
        **OFFSET,
        va='center',
        color=INK if a != b else MUTED,
        size=8,
      )
    name_rows(axes, names)
    axes.set_xlabel('channels')
    axes.margins(x=0.12)
    axes.grid(axis='x', color=LINE, lw=0.5)
    axes.legend(loc='lower right', bbox_to_anchor=(1, 1), ncols=2, frameon=False)
  return figure


def training_curves(
  history: Sequence[Mapping[str, Any]], target: float | None = None, of: str = 'flops'
) -> Figure:
  """Loss, accuracy and cost over all stages, from the lines of history.jsonl.

  `target`: the requested fraction of the cost `of` (a key of COSTS), drawn as a
  dashed line.
  """
  panels = {
    key: label
    for key, label in PANELS.items()
    if any(_number(record, key) is not None for record in history)
  }
  stages = by_stage(history)
  with styled():
    rows = max(len(panels), 1)
    figure = Figure(figsize=(7.2, 0.6 + 1.5 * rows), layout='constrained')
    grid = list(figure.subplots(rows, 1, sharex=True, squeeze=False)[:, 0])
    for axes, (key, label) in zip(grid, panels.items()):
      for steps, records in stages.values():
        _curve(axes, steps, [_number(record, key) for record in records])
      axes.set_ylabel(label)
      axes.grid(axis='y', color=LINE, lw=0.5)
      if key != 'loss':
        axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
      if key in COSTS:
        axes.set_ylim(0, 1.04)
      if key == of and target is not None:
        axes.axhline(target, color=SECOND, lw=1, ls=(0, (4, 3)))
        axes.annotate('target', (0, target), (2, 3), **OFFSET, color=SECOND, size=8)
    name_stages(grid, stages)
    grid[-1].set_xlabel('step')
  return figure


def gate_map(
  gates: Sequence[Mapping[str, Any]], widths: Mapping[str, tuple[int, int]]
) -> Figure:
  """Open channels of every layer over the gate stage, as a heat map.

  `gates`: the lines of gates.jsonl; `widths`: {name: (before, after)}, for the sizes.
  """
  names = [name for name in widths if any(name in line['open'] for line in gates)]
  opened = np.array(
    [[line['open'].get(name, np.nan) / widths[name][0] for line in gates]
     for name in names]
  ).reshape(len(names), len(gates))  # fmt: skip
  with styled():
    figure = Figure(figsize=(7.2, 1.0 + ROW * len(names)), layout='constrained')
    axes = figure.subplots()
    mesh = heat_map(axes, gates, opened, vmin=0, vmax=1)
    axis = colour_bar(mesh, axes, 'open channels')
    axis.set_major_formatter(PercentFormatter(1, decimals=0))
    name_rows(axes, names)
    axes.set_xlabel('step of the gate stage')
  return figure


def _number(record: Mapping[str, Any], key: str) -> float | None:
  value = record.get(key)
  return float(value) if isinstance(value, int | float) else None


def _curve(axes: Axes, steps: Sequence[float], values: Sequence[float | None]) -> None:
  """The points, pale, and their running median, which is what the eye looks for."""
  points = [(s, v) for s, v in zip(steps, values) if v is not None]
  if not points:
    return
  x, y = np.array(points).T
  axes.plot(x, y, color=FIRST, lw=0.8, alpha=0.35)
  half = max(1, len(y) // 40)
  smooth = [np.median(y[max(0, i - half) : i + half + 1]) for i in range(len(y))]
  axes.plot(x, smooth, color=FIRST, lw=1.6)
