"""A map of what is left of a network of repeated layers: layers × the parts of each."""

import re
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from depthprune.report.names import spoken
from depthprune.report.numbers import percent
from depthprune.report.style import (
  INK,
  THINNEST,
  WIDE,
  colour_bar,
  name_rows,
  new_figure,
  thin,
)
from depthprune.train.result import Change, LayerReport, Result

LEAST = 3  # layers of a map, so that there is something to compare
MOST = 8  # parts of a layer that fit on a telephone
WHOLE = 'FLOPs of the layer'
NUMBERED = r'([A-Za-z]+_?)?\d+'  # the last word of the path of a layer
MLP = r'(mlp/)?(gate|up|dense1|inner):\d+'


class LayerMap(NamedTuple):
  """What is left of every layer.

  Attributes:
    layers: paths of the layers, in the order of the network.
    parts: what a layer consists of, as a person would name it; the last is all of it.
    left: [layers, parts], the share that is left; NaN where a layer has no such part.
    texts: [layers][parts], how many slices are left, '' where there is no such part;
      of the FLOPs the share.
  """

  layers: Sequence[str]
  parts: Sequence[str]
  left: np.ndarray
  texts: Sequence[Sequence[str]]


def layer_map(result: Result) -> LayerMap | None:
  """Returns what is left of the layers of a run; None where there is nothing to map.

  Rows are the layers that are numbered, such as 'layer3' or 'stage1/block2'. Columns
  are the widths that at least two of them have. There is no map of a network with fewer
  than three such layers, or of one that is not narrower anywhere.
  """
  cells: dict[str, dict[str, Change]] = {}
  flops: dict[str, list[tuple[float, float]]] = {}
  for path, report in result.layers.items():  # in the order of the network
    if (place := _place(path)) is not None:
      flops.setdefault(place[0], []).append(report.flops)
      cells.setdefault(place[0], {})
  for group, (before, after) in result.widths.items():
    if (place := _place(group)) is not None:
      layer, part = place
      cells.setdefault(layer, {})[part] = Change(before, after)
  grouped = _grouped(result.layers)
  cells = {layer: dict(_named(parts, grouped)) for layer, parts in cells.items()}
  every = [part for parts in cells.values() for part in parts]
  shown = [part for part in dict.fromkeys(every) if every.count(part) > 1][:MOST]
  for layer, pairs in flops.items():
    before, after = (sum(numbers) for numbers in zip(*pairs, strict=True))
    if before:
      cells[layer][WHOLE] = Change(before, after)
  shown += [WHOLE] * any(WHOLE in parts for parts in cells.values())
  cells = {layer: parts for layer, parts in cells.items() if {*parts} & {*shown}}
  changes = [change for parts in cells.values() for change in parts.values()]
  if len(cells) < LEAST or all(each.before == each.after for each in changes):
    return None
  rows = [[parts.get(part) for part in shown] for parts in cells.values()]
  left = [[each.kept if each else np.nan for each in row] for row in rows]
  texts = [
    [_text(each, part) for each, part in zip(row, shown, strict=True)] for row in rows
  ]
  return LayerMap([*cells], shown, np.array(left), texts)


def chart(drawn: LayerMap, width: float = WIDE) -> Figure:
  """Draws a map of layers: a row for each, a column for each of their parts.

  Args:
    drawn: what is left.
    width: inches of the chart.
  """
  count = len(drawn.parts)
  height, every = thin(len(drawn.layers))
  letters = max(9, int(70 * width / WIDE / count))
  lines = [textwrap.fill(p, letters, break_long_words=False) for p in drawn.parts]
  head = 0.14 * (1 + max(line.count('\n') for line in lines))
  with new_figure(0.5 + head + height * len(drawn.layers), width) as figure:
    axes = figure.subplots()
    edges = [np.arange(n + 1) - 0.5 for n in (count, len(drawn.layers))]
    mesh = axes.pcolormesh(*edges, drawn.left, cmap='viridis', vmin=0, vmax=1)
    axis = colour_bar(mesh, axes, 'left')
    axis.set_major_formatter(PercentFormatter(1, decimals=0))
    size = 7 if width == WIDE else 6
    if height > 1.5 * THINNEST:
      at = {'ha': 'center', 'va': 'center', 'size': size}
      for row, (shares, texts) in enumerate(zip(drawn.left, drawn.texts, strict=True)):
        for column, (share, text) in enumerate(zip(shares, texts, strict=True)):
          axes.text(column, row, text, color='white' if share < 0.6 else 'black', **at)
    name_rows(axes, drawn.layers, every)
    axes.xaxis.tick_top()
    axes.set_xticks(range(count), lines, fontsize=size, color=INK, linespacing=1.0)
    axes.tick_params(length=0)
  return figure


def _place(name: str) -> tuple[str, str] | None:
  """Splits the name of a group, or the path of an array, into its layer and the rest.

  None where no word but the last is numbered.
  """
  name = re.sub(r'^(params/)?(trunk/)?|/(kernel|weight)(/value)?$', '', name)
  words = name.split('/')
  numbered = [i for i, w in enumerate(words[:-1]) if re.fullmatch(NUMBERED, w)]
  if not numbered:
    return None
  end = numbered[-1] + 1
  return '/'.join(words[:end]), '/'.join(words[end:])


def _grouped(layers: Mapping[str, LayerReport]) -> bool:
  """Whether the heads of an attention come in groups that share keys and values."""
  queries = (each for path, each in layers.items() if path.endswith('query/kernel'))
  return any(len(each.outputs) > 2 for each in queries)


def _named(parts: Mapping[str, Change], grouped: bool) -> Iterator[tuple[str, Change]]:
  """Yields the parts of a layer by the names that the literature uses."""
  query = 'attention/query:'
  for part, change in parts.items():
    if part == f'{query}1' and grouped:
      inner = parts.get(f'{query}2', Change(1, 1))
      both = Change(change.before * inner.before, change.after * inner.after)
      yield 'attention heads', both
      yield 'key/value groups', change
    elif part == f'{query}1':
      yield 'attention heads', change
    elif part == f'{query}2':
      if not grouped:
        yield 'size of a query', change
    elif part == 'attention/value:2':
      yield 'size of a value', change
    elif re.fullmatch(MLP, part):
      yield 'FFN width', change
    else:
      yield spoken(part), change


def _text(change: Change | None, part: str) -> str:
  if change is None:
    return ''
  return percent(change.kept, 0) if part == WHOLE else f'{change.after:,.0f}'
