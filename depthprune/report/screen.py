"""What a run reached, on the screen."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Group
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from depthprune.report import asked, cascade, decision, tables

BAR = 24


def screen(result: Mapping[str, Any]) -> Group:
  """The whole result for `rich.print`: costs, rounds, widths, what there is to note."""
  parts: list[Any] = [_costs(result), Text()]
  parts += [Padding(Text(line), (0, 2)) for line in tables.said(result)]
  parts.append(Text())
  if decision.erasing(result):
    title = 'rounds: held-out accuracy, FLOPs of the whole'
    parts += [_listed(title, decision.HEAD, decision.rounds(result)), Text()]
  if 'cascade' in result:
    parts += _cascade(result)
  if tables.narrowed(result):
    parts += [_widths(result), Text()]
  if tables.narrowed(result) and tables.removed(result):
    parts.append(Padding(Text(f'removed: {", ".join(tables.removed(result))}'), (0, 2)))
  for note in tables.notes(result):
    parts.append(Padding(Text(f'· {note}', style='yellow'), (0, 2)))
  return Group(*parts)


def _costs(result: Mapping[str, Any]) -> Table:
  table = Table(
    title=tables.title(result),
    title_justify='left',
    title_style='bold',
    caption=tables.legend(result),
    caption_justify='left',
    box=box.SIMPLE_HEAD,
  )
  head, rows = tables.costs(result)
  table.add_column('')
  for name in head[1:-1]:
    table.add_column(name, justify='right', no_wrap=True)
  table.add_column('', justify='left', no_wrap=True)
  for row in rows:
    table.add_row(*row)
  return table


def _cascade(result: Mapping[str, Any]) -> Iterable[Any]:
  """Requests with what was refused, and the exits; each table with how to read it."""
  found = asked.requests(result)
  yield _listed('requested and reached', asked.HEAD, found, names=0)
  said = [*asked.certified(result), *asked.refused(result), asked.READING]
  yield from (Padding(Text(line), (0, 2)) for line in said)
  yield Text()
  yield _listed('exits', cascade.EXIT_HEAD, cascade.exits(result), names=1)
  said = [cascade.EXITS, cascade.cut(result)]
  yield from (Padding(Text(line), (0, 2)) for line in said if line)
  yield Text()


def _listed(
  title: str, head: Sequence[str], rows: Iterable[Sequence[str]], names: int = -1
) -> Table:
  """A table of numbers, and one column `names` that may be folded."""
  table = Table(
    title=title,
    title_justify='left',
    title_style='bold',
    box=None,
    pad_edge=False,
    padding=(0, 1),
  )
  for index, name in enumerate(head):
    folded = index == names % len(head)
    side = 'left' if folded or index < names else 'right'
    table.add_column(name, justify=side, no_wrap=not folded, overflow='fold')
  for row in rows:
    table.add_row(*row)
  return table


def _widths(result: Mapping[str, Any]) -> Table:
  table = Table(box=None, pad_edge=False, padding=(0, 1))
  table.add_column('  layer', no_wrap=True)
  table.add_column('before', justify='right')
  table.add_column('after', justify='right')
  table.add_column('')
  for name, (before, after) in tables.widths(result).items():
    full = round(BAR * after / before)
    bar = Text('█' * full, style='cyan') + Text('░' * (BAR - full), style='dim')
    table.add_row(f'  {name}', str(before), str(after), bar)
  return table
