"""Charts of a run. Every function returns a matplotlib Figure and shows nothing."""

import io
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

# Light-mode colours. `svg` replaces them by the page's variables, so that the same
# drawing follows a dark page; no two roles may share a value.
INK, MUTED, LINE, FAINT = '#1f2430', '#5d6675', '#d5dae2', '#e6e9ef'
FIRST, SECOND = '#0b7285', '#d9480f'
PAPER = '#fdfdfc'
ROLES = {
  INK: 'ink',
  MUTED: 'muted',
  LINE: 'line',
  FAINT: 'faint',
  FIRST: 'first',
  SECOND: 'second',
  PAPER: 'paper',
}
COSTS = {'flops': 'FLOPs kept', 'params': 'params kept'}
PANELS = {'loss': 'loss', 'accuracy': 'accuracy', **COSTS}
ROW = 0.22  # inches for one layer
OFFSET: Any = {'textcoords': 'offset points'}


def width_chart(widths: Mapping[str, tuple[int, int]]) -> Figure:
  """Channels of every layer, before (pale) and after (solid): {name: (before, after)}.

  `tables.widths(result)` gives them in the network's order.
  """
  names = list(widths)
  before, after = (np.array([w[i] for w in widths.values()]) for i in (0, 1))
  with _style():
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
    _rows(axes, names)
    axes.set_xlabel('channels')
    axes.margins(x=0.12)
    axes.grid(axis='x', color=LINE, lw=0.5)
    axes.legend(loc='lower right', bbox_to_anchor=(1, 1), ncols=2, frameon=False)
  return figure


def training_curves(
  history: Sequence[Mapping[str, Any]], target: float | None = None, of: str = 'flops'
) -> Figure:
  """Loss, accuracy and cost over all stages, from the lines of history.jsonl.

  `target`: the requested fraction of the cost `of` ('flops' or 'params'), drawn as a
  dashed line.
  """
  panels = {
    key: label
    for key, label in PANELS.items()
    if any(_number(record, key) is not None for record in history)
  }
  stages = _stages(history)
  with _style():
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
    _name_stages(grid, stages)
    grid[-1].set_xlabel('step')
  return figure


def gate_map(
  gates: Sequence[Mapping[str, Any]], widths: Mapping[str, tuple[int, int]]
) -> Figure:
  """Open channels of every layer over the gate stage, as a heat map.

  `gates`: the lines of gates.jsonl; `widths`: {name: (before, after)}, for the sizes.
  """
  names = [name for name in widths if any(name in line['open'] for line in gates)]
  steps = np.array([line['step'] for line in gates], float)
  opened = np.array(
    [[line['open'].get(name, np.nan) / widths[name][0] for line in gates]
     for name in names]
  ).reshape(len(names), len(steps))  # fmt: skip
  with _style():
    figure = Figure(figsize=(7.2, 1.0 + ROW * len(names)), layout='constrained')
    axes = figure.subplots()
    mesh = axes.pcolormesh(
      _edges(steps),
      np.arange(len(names) + 1) - 0.5,
      opened,
      cmap='viridis',
      vmin=0,
      vmax=1,
      rasterized=True,
    )
    _rows(axes, names)
    axes.set_xlabel('step of the gate stage')
    bar = figure.colorbar(mesh, ax=axes, pad=0.02, aspect=30, label='open channels')
    bar.outline.set_visible(False)  # pyright: ignore[reportCallIssue]
    bar.ax.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
  return figure


def svg(figure: Figure) -> str:
  """The figure as an <svg> element whose colours are the page's variables."""
  text = io.StringIO()
  # A fixed salt and no date: the same run gives the same bytes.
  with mpl.rc_context({'svg.fonttype': 'none', 'svg.hashsalt': 'depthprune'}):
    figure.savefig(text, format='svg', transparent=True, metadata={'Date': None})
  element = text.getvalue()
  element = element[element.index('<svg') :]
  element = re.sub(r'<metadata>.*?</metadata>', '', element, flags=re.DOTALL)
  for colour, role in ROLES.items():
    element = element.replace(colour, f'var(--{role}, {colour})')
  return element


@contextmanager
def _style() -> Iterator[None]:
  settings: dict[Any, Any] = {
    'font.size': 9,
    'font.family': 'sans-serif',
    'text.color': INK,
    'axes.labelcolor': MUTED,
    'axes.edgecolor': LINE,
    'xtick.color': MUTED,
    'ytick.color': MUTED,
    'axes.spines.top': False,
    'axes.spines.right': False,
    'axes.axisbelow': True,
    'figure.facecolor': PAPER,
    'axes.facecolor': PAPER,
    'savefig.dpi': 150,
  }
  with mpl.rc_context(settings):
    yield


def _rows(axes: Axes, names: Sequence[str]) -> None:
  axes.set_yticks(np.arange(len(names)), names, fontsize=8, color=INK)
  axes.set_ylim(len(names) - 0.5, -0.5)
  axes.tick_params(length=0)
  for spine in axes.spines.values():
    spine.set_visible(False)


def _number(record: Mapping[str, Any], key: str) -> float | None:
  value = record.get(key)
  return float(value) if isinstance(value, int | float) else None


def _stages(history: Sequence[Mapping[str, Any]]) -> dict[str, tuple[list, list]]:
  """{stage: (steps, records)}; each stage's steps follow those of the one before."""
  stages: dict[str, tuple[list, list]] = {}
  end = 0
  for name in dict.fromkeys(record['stage'] for record in history):
    records = [record for record in history if record['stage'] == name]
    # Some runs count from the start of a stage, some from the start of all.
    offset = end if records[0]['step'] < end else 0
    stages[name] = ([offset + record['step'] for record in records], records)
    end = stages[name][0][-1]
  return stages


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


def _name_stages(grid: Sequence[Axes], stages: Mapping[str, tuple[list, list]]) -> None:
  for name, (steps, _) in stages.items():
    for axes in grid:
      axes.axvline(steps[0], color=LINE, lw=0.8)
    grid[0].annotate(
      f' {name}',
      (steps[0], 1),
      xycoords=('data', 'axes fraction'),
      va='bottom',
      color=MUTED,
    )


def _edges(steps: np.ndarray) -> np.ndarray:
  """Borders of the cells: half way between neighbours."""
  if len(steps) < 2:
    return np.array([steps[0] - 0.5, steps[0] + 0.5] if len(steps) else [0, 1])
  middles = (steps[1:] + steps[:-1]) / 2
  return np.concatenate([steps[:1], middles, steps[-1:]])
