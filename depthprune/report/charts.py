"""Charts of a run. Every function returns a matplotlib Figure and shows nothing."""

from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator, PercentFormatter

from depthprune.report.numbers import in_order
from depthprune.report.sentences import erased, first_names
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
  THIRD,
  Lines,
  by_stage,
  colour_bar,
  edges,
  heat_map,
  name_rows,
  name_stages,
  steps_of,
  styled,
  thin,
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


SERIES = ((FIRST, 'o'), (SECOND, 's'), (THIRD, '^'), (MUTED, 'D'))
WHEN = {'before': ('right after erasing', '--'), 'after': ('retrained', '-')}

Curves = Mapping[str, Mapping[str, Mapping[int, Sequence[float]]]]
"""{series: {'before' or 'after' retraining: {erased units: accuracies by seed}}}"""


def importance_map(runs: Mapping[str, tuple[Lines, str]]) -> Figure:
  """Importance w of every exit over training, a heat map for each run.

  runs: {title: (lines, kept)}; lines: of gates.jsonl, with 'importance': {exit: w};
    kept: the exit that was kept, whose label is marked. All runs have the same exits.
  """
  names = in_order(next(iter(runs.values()))[0][0]['importance'])
  height, every = thin(len(names))
  with styled():
    figure = Figure(figsize=(7.2, 1.0 + height * len(names)), layout='constrained')
    grid = list(figure.subplots(1, len(runs), squeeze=False)[0])
    for axes, (title, (lines, kept)) in zip(grid, runs.items()):
      w = np.array([[line['importance'][name] for line in lines] for name in names])
      # The root, because all exits begin at 1 / exits, which is next to nothing.
      mesh = heat_map(axes, lines, w, norm=PowerNorm(0.5, 0, 1))
      name_rows(axes, names, every if axes is grid[0] else len(names), kept)
      axes.xaxis.set_major_locator(MaxNLocator(max(2, 9 // len(runs))))
      axes.set_title(title, size=9, color=INK)
      axes.set_xlabel('step')
    axis = colour_bar(mesh, grid, 'importance w')
    axis.set_ticks([0, 0.01, 0.05, 0.2, 0.5, 1], labels='0 .01 .05 .2 .5 1'.split())
  return figure


def priority_map(gates: Lines, rounds: Sequence[Mapping[str, Any]]) -> Figure:
  """Priority |w| of every unit over all rounds; its row ends where it was erased.

  gates: lines of gates.jsonl, with 'priority': {unit: |w|}, a stage for each round.
  rounds: those of result.json, whose 'erased' names what went.
  """
  stages, gone = by_stage(gates), erased(rounds)
  names = in_order(gates[0]['priority'])
  priority = _priorities(stages, rounds, names)
  borders = edges(steps_of(gates)).tolist()
  ends = list(accumulate(len(records) for _, records in stages.values()))
  height, every = thin(len(names))
  with styled():
    figure = Figure(figsize=(7.2, 1.2 + height * len(names)), layout='constrained')
    axes = figure.subplots()
    mesh = heat_map(axes, gates, priority, vmin=0)
    colour_bar(mesh, axes, 'priority |w|')
    name_rows(axes, names, every)
    for end, units in zip(ends, gone):
      axes.axvline(borders[end], color=PAPER if end < ends[-1] else LINE, lw=1)
      at = [names.index(unit) for unit in units]
      axes.plot([borders[end]] * len(at), at, 'x', color=SECOND, ms=5, clip_on=False)
    _number_rounds(axes, [borders[i] for i in (0, *ends[:-1])])
    axes.set_xlabel('step of the rounds; × erased')
  return figure


def erased_curve(curves: Curves, ylabel: str = 'accuracy') -> Figure:
  """Accuracy against the number of erased units: mean, and ± one standard deviation.

  curves: a colour for each series; where a series has both, what was measured right
    after erasing is dashed and what was measured after retraining is solid.

  Raises: ValueError for more series than there are colours.
  """
  if len(curves) > len(SERIES):
    raise ValueError(f'expected at most {len(SERIES)} series, got {", ".join(curves)}')
  with styled():
    figure = Figure(figsize=(7.2, 3.4), layout='constrained')
    axes = figure.subplots()
    kinds = {when: None for curve in curves.values() for when in curve}
    for look, curve in zip(SERIES, curves.values()):
      for when, values in curve.items():
        _spread(axes, values, look, WHEN[when][1] if len(kinds) > 1 else '-')
    axes.set_xlabel('erased units')
    axes.set_ylabel(ylabel)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.yaxis.set_major_formatter(PercentFormatter(1))
    axes.grid(axis='y', color=LINE, lw=0.5)
    handles = [_line(look, name) for look, name in zip(SERIES, curves) if name]
    if len(kinds) > 1:
      handles += [_line((MUTED, ''), *WHEN[when]) for when in WHEN]
    figure.legend(handles=handles, loc='outside upper right', ncols=6, frameon=False)
  return figure


def against_beta(rows: Sequence[Mapping[str, Any]]) -> Figure:
  """Accuracy, cost and depth against beta: mean over seeds, ± one standard deviation.

  rows: of one network and one way to train it, each with 'beta', 'kept' of 'exits',
    'accuracy_before' and 'accuracy_cut', 'flops' and 'params', each also with '_full'.
  """
  share = lambda cost: lambda row: row[cost] / row[f'{cost}_full']
  panels: dict[str, dict[str, Callable]] = {
    'test accuracy': {
      'before the cut': lambda row: row['accuracy_before'],
      'after the cut': lambda row: row['accuracy_cut'],
    },
    'cost kept': {'FLOPs': share('flops'), 'parameters': share('params')},
    f'exit kept, of {rows[0]["exits"]}': {'': lambda row: row['kept']},
  }
  betas = sorted({row['beta'] for row in rows})
  at = lambda beta, of: [of(row) for row in rows if row['beta'] == beta]
  with styled():
    figure = Figure(figsize=(7.2, 2.8), layout='constrained')
    for axes, (label, lines) in zip(figure.subplots(1, 3), panels.items()):
      for i, (look, of) in enumerate(zip(SERIES, lines.values())):
        # Side by side, so that equal values are both seen.
        shift = 0.1 * (i - (len(lines) - 1) / 2)
        _spread(axes, {j + shift: at(beta, of) for j, beta in enumerate(betas)}, look)
      axes.set_xticks(range(len(betas)), [f'{beta:g}' for beta in betas])
      axes.set_xlabel('β, nats per unit of cost')
      axes.set_title(label, size=9, color=INK, loc='left', pad=20)
      axes.grid(axis='y', color=LINE, lw=0.5)
      if len(lines) > 1:
        axes.yaxis.set_major_formatter(PercentFormatter(1))
        _name_lines(axes, list(lines))
      if label != 'test accuracy':
        axes.set_ylim(bottom=0)
  return figure


def _name_lines(axes: Axes, names: Sequence[str]) -> None:
  """A legend in one line between the title and the panel."""
  axes.legend(
    handles=[_line(look, name) for look, name in zip(SERIES, names)],
    loc='lower left',
    bbox_to_anchor=(-0.04, 0.98),
    borderaxespad=0,
    columnspacing=1,
    ncols=2,
    frameon=False,
    fontsize=7,
  )


def _priorities(
  stages: Mapping[str, tuple[list, list]],
  rounds: Sequence[Mapping[str, Any]],
  names: Sequence[str],
) -> np.ndarray:
  """|w| [units, lines], NaN where a unit is gone; by the names of the first round."""
  index = {name: i for i, name in enumerate(names)}
  columns = []
  for (_, lines), first in zip(stages.values(), first_names(rounds)):
    for line in lines:
      column = np.full(len(names), np.nan)
      for name, w in line['priority'].items():
        column[index[first[name]]] = w
      columns.append(column)
  return np.array(columns).T


def _number_rounds(axes: Axes, starts: Sequence[float]) -> None:
  above: Any = {'xycoords': ('data', 'axes fraction'), 'color': MUTED, 'size': 8}
  axes.annotate('round', (starts[0], 1), (-4, 3), **OFFSET, **above, ha='right')
  for number, start in enumerate(starts, 1):
    axes.annotate(str(number), (start, 1), (0, 3), **OFFSET, **above)


def _spread(
  axes: Axes, values: Mapping[Any, Sequence[float]], look: tuple, dashes: str = '-'
) -> None:
  """Mean with a bar of one standard deviation (of the sample) up and down."""
  x = sorted(values)
  mean = [np.mean(values[at]) for at in x]
  several = lambda at: len(values[at]) > 1
  spread = np.array([np.std(values[at], ddof=1) if several(at) else 0 for at in x])
  colour, marker = look
  axes.errorbar(
    x, mean, spread, color=colour, marker=marker, ls=dashes, lw=1.5, ms=4, capsize=2
  )


def _line(look: tuple[str, str], name: str, dashes: str = '-') -> Line2D:
  """What a legend shows for a series."""
  colour, marker = look
  return Line2D([], [], color=colour, marker=marker, ls=dashes, ms=4, label=name)
