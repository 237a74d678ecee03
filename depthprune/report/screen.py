"""What a run reached, on the screen."""

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


def screen(result: Result) -> Group:
  """The whole result for `rich.print`: costs, rounds, widths, what there is to note."""
  parts: list[Any] = [_costs(result), Text()]
  parts += _indented(sentences.all_of(result))
  parts.append(Text())
  if sentences.recipe_of(result).erases_units:
    title = 'rounds: held-out accuracy, FLOPs of the whole'
    parts += [_listed(title, tables.rounds(result)), Text()]
  if result.cascade is not None:
    parts += _cascade(result.cascade)
  if tables.narrowed(result):
    parts += [_widths(result), Text()]
    if removed := sentences.removed(result):
      parts += _indented([f'removed: {", ".join(removed)}'])
  notes = [f'· {note}' for note in sentences.notes(result)]
  return Group(*parts, *_indented(notes, style='yellow'))


def _indented(lines: Iterable[str], style: str = '') -> Iterator[Padding]:
  return (Padding(Text(line, style=style), (0, 2)) for line in lines if line)


def _costs(result: Result) -> Table:
  found = tables.costs(result)
  table = Table(
    title=sentences.title(result),
    title_justify='left',
    title_style='bold',
    caption=tables.legend(result),
    caption_justify='left',
    box=box.SIMPLE_HEAD,
  )
  table.add_column('')
  for name in found.head[1:-1]:
    table.add_column(name, justify='right', no_wrap=True)
  table.add_column('', justify='left', no_wrap=True)
  for row in found.rows:
    table.add_row(*row)
  return table


def _cascade(cascade: CascadeResult) -> Iterator[Any]:
  """Requests with what was refused, and the exits; each table with how to read it."""
  yield _listed('requested and reached', tables.requests(cascade), names=0)
  said = [*sentences.certified(cascade), *sentences.refused(cascade)]
  yield from _indented([*said, sentences.READING])
  yield Text()
  yield _listed('exits', tables.exits(cascade), names=1)
  yield from _indented([sentences.EXITS, sentences.cut_heads(cascade)])
  yield Text()


def _listed(title: str, found: tables.Table, names: int = -1) -> Table:
  """A table of numbers, and one column `names` that may be folded."""
  table = Table(
    title=title,
    title_justify='left',
    title_style='bold',
    box=None,
    pad_edge=False,
    padding=(0, 1),
  )
  for index, name in enumerate(found.head):
    folded = index == names % len(found.head)
    side = 'left' if folded or index < names else 'right'
    table.add_column(name, justify=side, no_wrap=not folded, overflow='fold')
  for row in found.rows:
    table.add_row(*row)
  return table


def _widths(result: Result) -> Table:
  table = Table(box=None, pad_edge=False, padding=(0, 1))
  table.add_column('  layer', no_wrap=True)
  table.add_column('before', justify='right')
  table.add_column('after', justify='right')
  table.add_column('')
  for name, (before, after) in result.widths.items():
    full = round(BAR * after / before)
    bar = Text('█' * full, style='cyan') + Text('░' * (BAR - full), style='dim')
    table.add_row(f'  {name}', str(before), str(after), bar)
  return table
