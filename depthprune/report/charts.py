"""Charts of runs: widths, training curves, and what methods learn.

Every function returns a matplotlib Figure and shows nothing.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator, PercentFormatter

from depthprune.report.numbers import in_order, not_finite
from depthprune.report.run_files import FinishedRun
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
  WIDE,
  Lines,
  by_stage,
  colour_bar,
  edges,
  heat_map,
  legend,
  name_rows,
  name_stages,
  new_figure,
  steps_of,
  thin,
)
from depthprune.report.tables import erased, first_names
from depthprune.train.recipe import Chart
from depthprune.train.result import Accuracies, RoundResult

COSTS = {
  'flops': 'FLOPs kept',
  'params': 'params kept',
  'milliseconds': 'time kept',
}
PANELS = {'loss': 'loss', 'accuracy': 'accuracy', **COSTS}
SERIES = ((FIRST, 'o'), (SECOND, 's'), (THIRD, '^'), (MUTED, 'D'))  # colour, marker
WHEN = {'before': ('right after erasing', '--'), 'after': ('retrained', '-')}

Curves = Mapping[str, Mapping[str, Mapping[int, Sequence[float]]]]
"""{series: {'before' or 'after' retraining: {erased units: accuracies by seed}}}"""


# ---- one run -------------------------------------------------------------------------


def width_chart(widths: Mapping[str, tuple[int, int]], width: float = WIDE) -> Figure:
  """Draws the channels of every layer, before (pale) and after (solid).

  Args:
    widths: {layer: (before, after)}, as in `Result.widths`.
    width: inches of the chart.
  """
  names = list(widths)
  before, after = (np.array([w[i] for w in widths.values()]) for i in (0, 1))
  with new_figure(0.8 + ROW * len(names), width) as figure:
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
  history: Sequence[Mapping[str, Any]],
  target: float | None = None,
  of: str = 'flops',
  width: float = WIDE,
) -> Figure:
  """Draws loss, accuracy and cost over all stages.

  Args:
    history: lines of history.jsonl.
    target: requested fraction of a cost, drawn as a dashed line.
    of: the cost, a key of COSTS.
    width: inches of the chart.
  """
  panels = {
    key: label
    for key, label in PANELS.items()
    if any(_number(record, key) is not None for record in history)
  }
  stages = by_stage(history)
  rows = max(len(panels), 1)
  with new_figure(0.6 + 1.5 * rows, width) as figure:
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


def drawing(chart: Chart, run: FinishedRun) -> Callable[[float], Figure] | None:
  """Returns (width in inches) -> a chart of a recipe; None where it has no data."""
  key, label = chart.key, chart.label
  if chart.kind == 'connections':
    learned = run.result.rounds[-1].learned if run.result.rounds else {}
    weights, open_ = learned.get(key), learned.get('open')
    if not (weights and open_):
      return None
    return lambda width: connections(weights, open_, width)
  lines = [line for line in run.gates if key in line]
  if not lines:
    return None
  if chart.kind == 'channels':
    return lambda width: channel_map(lines, run.result.widths, key, label, width)
  if chart.kind == 'exits':
    kept = run.result.rounds[-1].exits[-1]
    return lambda width: exit_map({'': (lines, kept)}, key, label, width)
  return lambda width: unit_map(lines, run.result.rounds, key, label, width)


def channel_map(
  gates: Lines,
  widths: Mapping[str, tuple[int, int]],
  key: str = 'open',
  label: str = 'open channels',
  width: float = WIDE,
) -> Figure:
  """Draws the share of open channels of every layer over training, as a heat map.

  Args:
    gates: lines of gates.jsonl, with `key`: {layer: open channels}.
    widths: {layer: (before, after)}, for the sizes.
    key: name of the entry of the lines.
    label: label of the scale.
    width: inches of the chart.
  """
  names = [name for name in widths if any(name in line[key] for line in gates)]
  opened = np.array(
    [[line[key].get(name, np.nan) / widths[name][0] for line in gates]
     for name in names]
  ).reshape(len(names), len(gates))  # fmt: skip
  with new_figure(1.0 + ROW * len(names), width) as figure:
    axes = figure.subplots()
    mesh = heat_map(axes, gates, opened, vmin=0, vmax=1)
    axis = colour_bar(mesh, axes, label)
    axis.set_major_formatter(PercentFormatter(1, decimals=0))
    name_rows(axes, names)
    axes.set_xlabel('step of the gate stage')
  return figure


def _number(record: Mapping[str, Any], key: str) -> float | None:
  value = record.get(key)
  return float(value) if isinstance(value, int | float) else None


def _curve(axes: Axes, steps: Sequence[float], values: Sequence[float | None]) -> None:
  """Draws the points, pale, and their running median."""
  points = [(s, v) for s, v in zip(steps, values) if v is not None]
  if not points:
    return
  x, y = np.array(points).T
  axes.plot(x, y, color=FIRST, lw=0.8, alpha=0.35)
  half = max(1, len(y) // 40)
  smooth = [np.median(y[max(0, i - half) : i + half + 1]) for i in range(len(y))]
  axes.plot(x, smooth, color=FIRST, lw=1.6)


def exit_map(
  runs: Mapping[str, tuple[Lines, str]],
  key: str = 'importance',
  label: str = 'importance w',
  width: float = WIDE,
) -> Figure:
  """Draws the weight in [0, 1] of every exit over training, a heat map for each run.

  Args:
    runs: {title: (lines, kept)}: lines of gates.jsonl with `key`: {exit: weight}, and
      the exit that was kept, whose label is marked. All runs have the same exits.
    key: name of the entry of the lines.
    label: label of the scale.
    width: inches of the chart.
  """
  names = in_order(next(iter(runs.values()))[0][0][key])
  height, every = thin(len(names))
  with new_figure(1.0 + height * len(names), width) as figure:
    grid = list(figure.subplots(1, len(runs), squeeze=False)[0])
    for axes, (title, (lines, kept)) in zip(grid, runs.items()):
      w = np.array([[line[key][name] for line in lines] for name in names])
      # A square root scale shows the start too, where all weights are 1 / exits.
      mesh = heat_map(axes, lines, w, norm=PowerNorm(0.5, 0, 1))
      name_rows(axes, names, every if axes is grid[0] else len(names), kept)
      axes.xaxis.set_major_locator(
        MaxNLocator(max(2, int(9 * width / WIDE) // len(runs)))
      )
      axes.set_title(title, size=9, color=INK)
      axes.set_xlabel('step')
    axis = colour_bar(mesh, grid, label)
    axis.set_ticks([0, 0.01, 0.05, 0.2, 0.5, 1], labels='0 .01 .05 .2 .5 1'.split())
  return figure


def unit_map(
  gates: Lines,
  rounds: Sequence[RoundResult],
  key: str = 'priority',
  label: str = 'priority |w|',
  width: float = WIDE,
) -> Figure:
  """Draws the weight of every residual unit over all rounds, until it is erased.

  Args:
    gates: lines of gates.jsonl, with `key`: {unit: weight}, a stage for each round.
    rounds: the rounds of a result.
    key: name of the entry of the lines.
    label: label of the scale.
    width: inches of the chart.
  """
  stages, gone = by_stage(gates), erased(rounds, key)
  names = in_order(gates[0][key])
  weights = _weights_by_first_names(stages, rounds, names, key)
  borders = edges(steps_of(gates)).tolist()
  ends = list(accumulate(len(records) for _, records in stages.values()))
  height, every = thin(len(names))
  with new_figure(1.2 + height * len(names), width) as figure:
    axes = figure.subplots()
    mesh = heat_map(axes, gates, weights, vmin=0)
    colour_bar(mesh, axes, label)
    name_rows(axes, names, every)
    for end, units in zip(ends, gone):
      axes.axvline(borders[end], color=PAPER if end < ends[-1] else LINE, lw=1)
      at = [names.index(unit) for unit in units]
      axes.plot([borders[end]] * len(at), at, 'x', color=SECOND, ms=5, clip_on=False)
    _number_rounds(axes, [borders[i] for i in (0, *ends[:-1])])
    axes.set_xlabel('step of the rounds; × erased')
  return figure


def connections(
  weights: Mapping[str, float], open_: Mapping[str, float], width: float = WIDE
) -> Figure:
  """Draws the connections of taps to stages: a disc for an open gate, else a ring.

  Args:
    weights: {path of a connection, '.../STAGE/TAP/gate': weight of its gate}.
    open_: {path of a connection: a number above 0 where its gate is open}.
    width: inches of the chart.
  """
  ends = {path: path.split('/')[-3:-1] for path in in_order(weights)}
  stages = in_order({stage for stage, _ in ends.values()})
  taps = in_order({tap for _, tap in ends.values()})
  with new_figure(1.2 + ROW * len(taps), width) as figure:
    axes = figure.subplots()
    for path, (stage, tap) in ends.items():
      at, is_open = (stages.index(stage), taps.index(tap)), open_[path] > 0
      face, edge = (FIRST, FIRST) if is_open else (PAPER, MUTED)
      axes.plot(*at, 'o', ms=7, mfc=face, mec=edge)
      text = not_finite(weights[path]) or f'{weights[path]:.3f}'
      axes.annotate(text, at, (9, -3), fontsize=7, color=MUTED, **OFFSET)
    axes.set_xticks(range(len(stages)), stages)
    axes.set_yticks(range(len(taps)), taps)
    axes.set_xlim(-0.5, len(stages) - 0.3)
    axes.set_ylim(len(taps) - 0.5, -0.5)
    axes.set_xlabel('stage of the path that the tap feeds')
  return figure


# ---- several runs --------------------------------------------------------------------


def collect_curve(
  *runs: Sequence[tuple[Sequence[int], Accuracies]],
) -> dict[str, dict[int, list[float]]]:
  """Collects held-out accuracies by the number of erased units, for `erased_curve`.

  Args:
    *runs: for every round of a run, its residual units before and after, and its
      held-out accuracies.

  Returns:
    {'before' or 'after': {erased units: [accuracy of every run]}}, where 'before' is
    before retraining, with fresh batch statistics. NaN, which leaves a gap, stands for
    what was not measured.
  """
  curves: dict[str, dict[int, list[float]]] = {'before': {}, 'after': {}}
  for rounds in runs:
    (units, _), first = rounds[0]
    points = [(units, first.before, first.before)]
    known = lambda value: math.nan if value is None else value
    for (_, left), accuracy in rounds:
      points.append((left, known(accuracy.recalibrated), known(accuracy.after)))
    for left, before, after in points:
      curves['before'].setdefault(units - left, []).append(before)
      curves['after'].setdefault(units - left, []).append(after)
  return curves


def erased_curve(
  curves: Curves, ylabel: str = 'accuracy', width: float = WIDE
) -> Figure:
  """Draws mean accuracy ± one standard deviation against the number of erased units.

  Args:
    curves: {series: what `collect_curve` returns}, a colour for each. Accuracy right
      after erasing is dashed where there is also accuracy after retraining.
    ylabel: label of the accuracy.
    width: inches of the chart.

  Raises:
    ValueError: there are more series than colours.
  """
  if len(curves) > len(SERIES):
    raise ValueError(f'expected at most {len(SERIES)} series, got {", ".join(curves)}')
  with new_figure(3.4, width) as figure:
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
    legend(figure, handles)
  return figure


def against_beta(rows: Sequence[Mapping[str, Any]]) -> Figure:
  """Draws accuracy, cost and depth against beta: mean ± one standard deviation.

  Args:
    rows: runs of one network and one way to train it, each with 'beta', 'kept' of
      'exits', 'accuracy_before', 'accuracy_cut', 'flops', 'flops_full', 'params' and
      'params_full'.
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
  with new_figure(2.8) as figure:
    for axes, (label, lines) in zip(figure.subplots(1, 3), panels.items()):
      for i, (look, of) in enumerate(zip(SERIES, lines.values())):
        # Lines lie side by side, so that equal values can both be seen.
        shift = 0.1 * (i - (len(lines) - 1) / 2)
        _spread(axes, {j + shift: at(beta, of) for j, beta in enumerate(betas)}, look)
      axes.set_xticks(range(len(betas)), [f'{beta:g}' for beta in betas])
      axes.set_xlabel('β, nats per unit of cost')
      axes.set_title(label, size=9, color=INK, loc='left', pad=20)
      axes.grid(axis='y', color=LINE, lw=0.5)
      if len(lines) > 1:
        axes.yaxis.set_major_formatter(PercentFormatter(1))
        axes.legend(  # in one line between the title and the panel
          handles=[_line(look, name) for look, name in zip(SERIES, lines)],
          loc='lower left',
          bbox_to_anchor=(-0.04, 0.98),
          borderaxespad=0,
          columnspacing=1,
          ncols=2,
          frameon=False,
          fontsize=7,
        )
      if label != 'test accuracy':
        axes.set_ylim(bottom=0)
  return figure


def _weights_by_first_names(
  stages: Mapping[str, tuple[list, list]],
  rounds: Sequence[RoundResult],
  names: Sequence[str],
  key: str,
) -> np.ndarray:
  """Returns weights [units, lines] by the first names, NaN where a unit is erased."""
  index = {name: i for i, name in enumerate(names)}
  columns = []
  for (_, lines), first in zip(stages.values(), first_names(rounds, key)):
    for line in lines:
      column = np.full(len(names), np.nan)
      for name, w in line[key].items():
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
  """Draws the mean with bars of one standard deviation of the sample."""
  x = sorted(values)
  mean = [np.mean(values[at]) for at in x]
  several = lambda at: len(values[at]) > 1
  spread = np.array([np.std(values[at], ddof=1) if several(at) else 0 for at in x])
  colour, marker = look
  axes.errorbar(
    x, mean, spread, color=colour, marker=marker, ls=dashes, lw=1.5, ms=4, capsize=2
  )


def _line(look: tuple[str, str], name: str, dashes: str = '-') -> Line2D:
  """Returns the entry of a series in a legend."""
  colour, marker = look
  return Line2D([], [], color=colour, marker=marker, ls=dashes, ms=4, label=name)
