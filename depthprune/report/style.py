"""What all charts share: figures, colours, rows, steps, and how SVG is written."""

import html
import io
import math
import re
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.collections import QuadMesh
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from depthprune.report.names import spoken_apart

# Light-mode colours. `svg` replaces them by the page's variables, so that drawings also
# suit a dark page; no two roles may share a value.
INK, MUTED, LINE, FAINT = '#1f2430', '#5d6675', '#d5dae2', '#e6e9ef'
FIRST, SECOND, THIRD = '#0b7285', '#d9480f', '#7048a8'
PAPER = '#fdfdfc'
ROLES = {
  INK: 'ink',
  MUTED: 'muted',
  LINE: 'line',
  FAINT: 'faint',
  FIRST: 'first',
  SECOND: 'second',
  THIRD: 'third',
  PAPER: 'paper',
}
OFFSET: Any = {'textcoords': 'offset points'}
# Inches: width of a chart on a screen, and on a telephone, where letters are as large.
WIDE, NARROW = 7.2, 3.6
# Inches: height of a row, its least height, height of all rows, height of a label.
ROW, THINNEST, TALLEST, LABEL = 0.22, 0.09, 5.5, 0.15
CHARACTER = 0.08  # inches of a character
ONE_LINE = 22  # characters of a long name in one line, on a telephone
TOOLTIP = 'tooltip '  # begins the id of a group of SVG that gets a title

Lines = Sequence[Mapping[str, Any]]
"""Lines of history.jsonl or gates.jsonl."""


def svg(figure: Figure, title: str, description: str) -> str:
  """Returns a figure as an <svg> element whose colours are the page's variables.

  Args:
    figure: the figure.
    title: what those hear who cannot see it.
    description: what it shows, in a sentence.
  """
  text = io.StringIO()
  _write(figure, text, fonttype='none', transparent=True)
  element = text.getvalue()
  element = element[element.index('<svg') :]
  element = re.sub(r'<metadata>.*?</metadata>', '', element, flags=re.DOTALL)
  tooltips = rf'<g id="{TOOLTIP}([^"]*)">'
  element = re.sub(tooltips, r'<g><title>\1</title>', element)
  element = re.sub(r'<g id="[^"]*"', '<g', element)  # the same in every chart of a page
  for colour, role in ROLES.items():
    element = element.replace(colour, f'var(--{role}, {colour})')
  said = f'<title>{html.escape(title)}</title><desc>{html.escape(description)}</desc>'
  return re.sub(
    r'<svg([^>]*)>', lambda tag: f'<svg role="img"{tag[1]}>{said}', element, count=1
  )


def save(figure: Figure, path: Path) -> None:
  """Writes a light SVG file whose letters are outlines, so that it needs no font."""
  _write(figure, path, fonttype='path', transparent=False)


def _write(figure: Figure, to: Any, fonttype: str, transparent: bool) -> None:
  # A fixed salt and no date: the same figure gives the same bytes.
  with mpl.rc_context({'svg.fonttype': fonttype, 'svg.hashsalt': 'depthprune'}):
    figure.savefig(to, format='svg', transparent=transparent, metadata={'Date': None})


@contextmanager
def new_figure(height: float, width: float = WIDE) -> Iterator[Figure]:
  """Makes a figure of so many inches; what is drawn within the context is styled."""
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
    yield Figure(figsize=(width, height), layout='constrained')


def name_rows(
  axes: Axes, names: Sequence[str], every: int = 1, marked: str = ''
) -> None:
  """Labels every `every`-th row of a chart, from the top, as a person names it.

  The name itself is the label's tooltip. The name `marked` is always labelled, in a
  colour of its own.
  """
  at = names.index(marked) if marked in names else 0
  labelled = range(at % every, len(names), every)
  said = spoken_apart(names[i] for i in labelled)
  texts, size = [*said.values()], 8.0
  if inches(axes) < WIDE and max(map(len, texts), default=0) > ONE_LINE:
    texts, size = [textwrap.fill(text, ONE_LINE) for text in texts], 6.5
  axes.set_yticks(labelled, texts, fontsize=size, color=INK, linespacing=1.0)
  for label, (name, text) in zip(axes.get_yticklabels(), said.items()):
    if text != name:
      label.set_gid(f'{TOOLTIP}{name}')
    if name == marked:
      label.set(color=SECOND, fontweight='bold')
  axes.set_ylim(len(names) - 0.5, -0.5)
  axes.tick_params(length=0)
  for spine in axes.spines.values():
    spine.set_visible(False)


def legend(figure: Figure, handles: Sequence[Line2D]) -> None:
  """Draws a legend above all panels, in lines that are as long as the chart is wide."""
  columns = 6 if figure.get_figwidth() >= WIDE else 2
  at = 'outside upper right'
  figure.legend(handles=handles, loc=at, ncols=columns, frameon=False)


def inches(axes: Axes) -> float:
  """Returns the width of the figure."""
  figure = axes.get_figure()
  assert isinstance(figure, Figure)
  return figure.get_figwidth()


def thin(rows: int) -> tuple[float, int]:
  """Returns (height of each row in inches, n), where every n-th row has a label."""
  height = min(ROW, max(THINNEST, TALLEST / max(rows, 1)))
  return height, math.ceil(LABEL / height)


def heat_map(axes: Axes, lines: Lines, values: np.ndarray, **scale) -> QuadMesh:
  """Draws values [rows, lines] over the steps of the lines; NaN stays empty."""
  return axes.pcolormesh(
    edges(steps_of(lines)),
    np.arange(len(values) + 1) - 0.5,
    values,
    cmap='viridis',
    rasterized=True,
    **scale,
  )


def colour_bar(mesh: QuadMesh, beside: Axes | Sequence[Axes], label: str) -> Axis:
  """Draws the scale of a heat map; returns its axis, for ticks."""
  figure = mesh.get_figure()
  assert isinstance(figure, Figure)
  bar = figure.colorbar(mesh, ax=beside, pad=0.02, aspect=30, label=label)
  bar.outline.set_visible(False)  # pyright: ignore[reportCallIssue]
  return bar.ax.yaxis


def steps_of(lines: Lines) -> np.ndarray:
  """Returns the steps of all stages, one after the other."""
  return np.concatenate([steps for steps, _ in by_stage(lines).values()])


def by_stage(history: Lines) -> dict[str, tuple[list, list]]:
  """Returns {stage: (steps, records)}, each stage's steps after those of the last."""
  stages: dict[str, tuple[list, list]] = {}
  end = 0
  for name in dict.fromkeys(record.get('stage', '') for record in history):
    records = [record for record in history if record.get('stage', '') == name]
    # Some runs count from the start of a stage, some from the start of all.
    offset = end if records[0]['step'] < end else 0
    stages[name] = ([offset + record['step'] for record in records], records)
    end = stages[name][0][-1]
  return stages


def name_stages(grid: Sequence[Axes], stages: Mapping[str, tuple[list, list]]) -> None:
  """Draws a line where a stage begins, and its name above it if there is room."""
  steps = [step for steps, _ in stages.values() for step in steps]
  free, character = -math.inf, CHARACTER / inches(grid[0])
  for name, (steps_of, _) in stages.items():
    start = steps_of[0]
    for axes in grid:
      axes.axvline(start, color=LINE, lw=0.8)
    if start < free:
      continue
    free = start + (len(name) + 1) * character * (max(steps) - min(steps))
    grid[0].annotate(
      f' {name}',
      (start, 1),
      xycoords=('data', 'axes fraction'),
      va='bottom',
      color=MUTED,
    )


def edges(steps: np.ndarray) -> np.ndarray:
  """Returns the borders of a heat map's cells, half way between steps."""
  if len(steps) < 2:
    return np.array([steps[0] - 0.5, steps[0] + 0.5] if len(steps) else [0, 1])
  middles = (steps[1:] + steps[:-1]) / 2
  return np.concatenate([steps[:1], middles, steps[-1:]])
