"""The result of a run on the screen, and the form of all tables there."""

from collections.abc import Iterable, Iterator
from typing import Any

from rich import box
from rich.console import Group
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from depthprune.report import sentences, tables
from depthprune.train.result import CascadeResult, Result

BAR = 24  # characters of a layer's full width
PLAIN: Any = {'box': None, 'pad_edge': False, 'padding': (0, 1)}


def screen(result: Result) -> Group:
  """Returns the result for `rich.print`: costs, rounds, widths and notes."""
  parts: list[Any] = [_costs(result), Text()]
  parts += indented(sentences.all_of(result))
  parts.append(Text())
  if sentences.recipe_of(result).erases_units and result.rounds:
    title = 'rounds: held-out accuracy, FLOPs of the whole'
    parts += [_numbers(title, tables.rounds(result)), Text()]
  if result.cascade is not None:
    parts += _cascade(result.cascade)
  if tables.narrowed(result):
    parts += [_widths(result), Text()]
    if removed := sentences.removed(result):
      parts += indented([f'removed: {", ".join(removed)}'])
  notes = [f'· {note}' for note in sentences.notes(result)]
  return Group(*parts, *indented(notes, style='yellow'))


def titled_table(title: str, **style: Any) -> Table:
  """Returns an empty table under a bold title."""
  left: Any = {'title_justify': 'left', 'caption_justify': 'left'}
  return Table(title=title, title_style='bold', **left, **style)


def indented(lines: Iterable[str], style: str = '') -> Iterator[Padding]:
  """Yields the lines, two characters to the right, without those that are empty."""
  return (Padding(Text(line, style=style), (0, 2)) for line in lines if line)


def _costs(result: Result) -> Table:
  costs, legend = tables.costs(result), sentences.legend(result)
  table = titled_table(sentences.title(result), caption=legend, box=box.SIMPLE_HEAD)
  table.add_column('')
  for name in costs.head[1:-1]:
    table.add_column(name, justify='right', no_wrap=True)
  table.add_column('', justify='left', no_wrap=True)
  for row in costs.rows:
    table.add_row(*row)
  return table


def _cascade(cascade: CascadeResult) -> Iterator[Any]:
  """Yields the tables of requests and exits, each with how to read it."""
  yield _numbers('requested and reached', tables.requests(cascade), names=0)
  said = [*sentences.certified(cascade), *sentences.refused(cascade)]
  yield from indented([*said, sentences.reading(cascade)])
  yield Text()
  yield _numbers('exits', tables.exits(cascade), names=1)
  yield from indented([sentences.exits(cascade), sentences.cut_heads(cascade)])
  yield Text()


def _numbers(title: str, cells: tables.Table, names: int = -1) -> Table:
  """Returns a table of numbers, in which one column of names may be folded."""
  table = titled_table(title, **PLAIN)
  for index, name in enumerate(cells.head):
    folded = index == names % len(cells.head)
    side = 'left' if folded or index < names else 'right'
    table.add_column(name, justify=side, no_wrap=not folded, overflow='fold')
  for row in cells.rows:
    table.add_row(*row)
  return table


def _widths(result: Result) -> Table:
  table = Table(**PLAIN)
  table.add_column('  layer', no_wrap=True)
  table.add_column('before', justify='right')
  table.add_column('after', justify='right')
  table.add_column('')
  for name, (before, after) in result.widths.items():
    full = round(BAR * after / before) if before else 0
    if 0 < after < before:  # neither empty nor whole
      full = min(max(full, 1), BAR - 1)
    bar = Text('█' * full, style='cyan') + Text('░' * (BAR - full), style='dim')
    table.add_row(f'  {name}', str(before), str(after), bar)
  return table
