"""What a run reached, as rows of text."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from rich import box
from rich.console import Group
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from depthprune.report import asked, cascade
from depthprune.report import sentences as decision
from depthprune.report.numbers import count, milliseconds, percent, points, seconds

FLOPS = 'FLOPs (1 MAC = 2)'
LEGENDS = {
  'trainable_gates': 'cut: right after surgery; after: fine-tuned',
  'netcut': 'cut: right after surgery; after: at the end of the run',
  'implosion': 'cut: right after the last erasure; after: retrained',
  'sidenet': cascade.LEGEND,
  'auxiliary': 'before: with what helped to train it; after: the compact network alone',
}
HEAD = ('', 'before', 'cut', 'after', '')


class Row(NamedTuple):
  """One quantity before and after, and what became of it, in words."""

  name: str
  before: str
  cut: str
  after: str
  change: str


def legend(result: Mapping[str, Any]) -> str:
  """What the columns of `summary` are."""
  return LEGENDS[result['method']]


def costs(result: Mapping[str, Any]) -> tuple[Sequence[str], list[Sequence[str]]]:
  """Head and rows of the first table: `summary`, or that of a cascade."""
  if 'cascade' in result:
    return cascade.HEAD, list(cascade.summary(result))
  return HEAD, list(summary(result))


def summary(result: Mapping[str, Any]) -> list[Row]:
  """Accuracy, cost and measured latency of a finished run's `result.json`."""
  rows = []
  for name, key in (('test', 'accuracy'), ('held-out', 'held_out')):
    if accuracy := result.get(key):
      rows.append(_accuracy(f'accuracy, {name}', accuracy))
  scores = result.get('scores', {})
  for key in scores.get('after', {}):
    name = _scored(key)
    if name and key in scores.get('before', {}):
      rows.append(_accuracy(f'{name}, test', {k: v[key] for k, v in scores.items()}))
  for name, key in ((FLOPS, 'flops'), ('parameters', 'params')):
    rows.append(_cost(name, result[key]))
  peak = result.get('peak_bytes') or result.get('report', {}).get('peak_bytes')
  if peak:
    rows.append(_cost('peak activation bytes', peak))
  for batch, measured in result.get('latency_ms', {}).items():
    before, after = (milliseconds(measured[when]) for when in ('before', 'after'))
    speedup = f'speed-up {measured["speedup"]:.2f} x'
    rows.append(Row(f'median latency, batch {batch}', before, '', after, speedup))
  compiled = result.get('compile_s')
  if compiled:
    before, after = (seconds(compiled[when]) for when in ('before', 'after'))
    speedup = f'speed-up {compiled["before"] / compiled["after"]:.2f} x'
    rows.append(Row('compile time', before, '', after, speedup))
  return rows


def _scored(key: str) -> str:
  """What a row of that score is called: of pixels, or of one of several tasks."""
  task = key.removeprefix('accuracy_')
  return 'mean IoU' if key == 'miou' else f'accuracy of {task}' if task != key else ''


def recalibrated(result: Mapping[str, Any]) -> str:
  """What fresh batch statistics alone did after the cut; nothing if not measured.

  Nothing either for a network that has none and is not trained again.
  """
  found = result['accuracy']
  accuracy = found.get('recalibrated')
  if accuracy is None or accuracy == found['pruned'] == found['after']:
    return ''
  return (
    f'test accuracy with fresh batch statistics, not yet tuned: {percent(accuracy)}'
  )


def said(result: Mapping[str, Any]) -> list[str]:
  """The sentences that go with the numbers."""
  lines = (
    decision.sentence(result),
    decision.certainty(result),
    recalibrated(result),
    cascade.executed(result) if 'cascade' in result else verified(result),
    measured_on(result),
  )
  return [line for line in lines if line]


def verified(result: Mapping[str, Any]) -> str:
  """How far the small network was from the masked one, in words."""
  verify = result.get('verify') or result.get('report', {}).get('verify')
  rounds = [each['verify'] for each in result.get('rounds', []) if 'verify' in each]
  verify = max(rounds, key=lambda found: found['difference'], default=verify)
  if not verify:
    return 'the small network was not compared with the masked one'
  text = (
    'largest difference between the masked and the small network: '
    f'{verify["difference"]:.1e} of the output'
  )
  if verify.get('settled'):
    text += f'; rounding and emptied branches changed {verify["settled"]:.1e} before it'
  return text


def widths(result: Mapping[str, Any]) -> dict[str, tuple[int, int]]:
  """`{layer: (before, after)}` in the network's order."""
  return {name: (int(b), int(a)) for name, (b, a) in result['widths'].items()}


def narrowed(result: Mapping[str, Any]) -> bool:
  """Whether there is a width to speak of: layers that went whole became no narrower."""
  return 'target' in result['options'] or any(
    0 < a < b for b, a in widths(result).values()
  )


def removed(result: Mapping[str, Any]) -> list[str]:
  """The branches and exits that are no longer there."""
  report = result.get('report', {})
  parts = {**report.get('branches', {}), **report.get('exits', {})}
  return [name for name, kept in parts.items() if not kept]


def notes(result: Mapping[str, Any]) -> list[str]:
  """Everything the run has to say about itself: surgery and timing."""
  found = list(result.get('report', {}).get('notes', []))
  for each in result.get('rounds', []):
    found += each.get('notes', [])
  for measured in result.get('latency_ms', {}).values():
    found += measured.get('notes', [])
  return list(dict.fromkeys(found))


def title(result: Mapping[str, Any]) -> str:
  seed = f', seed {result["seed"]}' if 'seed' in result else ''
  return f'{result["model"]} on {result["data"]}{seed}'


def measured_on(result: Mapping[str, Any]) -> str:
  measured = result.get('latency_ms') or 'cascade' in result
  return f'measured on {result["device"]}' if measured and 'device' in result else ''


def _accuracy(name: str, accuracy: Mapping[str, float]) -> Row:
  change = points(accuracy['before'], accuracy['after'])
  cut = percent(accuracy['pruned'], 2) if 'pruned' in accuracy else ''
  before, after = (percent(accuracy[when], 2) for when in ('before', 'after'))
  return Row(name, before, cut, after, change)


def _cost(name: str, cost: Mapping[str, float]) -> Row:
  kept = percent(cost['after'] / cost['before'])
  return Row(name, count(cost['before']), '', count(cost['after']), f'{kept} kept')


BAR = 24


def screen(result: Mapping[str, Any]) -> Group:
  """The whole result for `rich.print`: costs, rounds, widths, what there is to note."""
  parts: list[Any] = [_costs(result), Text()]
  parts += [Padding(Text(line), (0, 2)) for line in said(result)]
  parts.append(Text())
  if decision.erasing(result):
    title = 'rounds: held-out accuracy, FLOPs of the whole'
    parts += [_listed(title, decision.HEAD, decision.rounds(result)), Text()]
  if 'cascade' in result:
    parts += _cascade(result)
  if narrowed(result):
    parts += [_widths(result), Text()]
  if narrowed(result) and removed(result):
    parts.append(Padding(Text(f'removed: {", ".join(removed(result))}'), (0, 2)))
  for note in notes(result):
    parts.append(Padding(Text(f'· {note}', style='yellow'), (0, 2)))
  return Group(*parts)


def _costs(result: Mapping[str, Any]) -> Table:
  table = Table(
    title=title(result),
    title_justify='left',
    title_style='bold',
    caption=legend(result),
    caption_justify='left',
    box=box.SIMPLE_HEAD,
  )
  head, rows = costs(result)
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
  for name, (before, after) in widths(result).items():
    full = round(BAR * after / before)
    bar = Text('█' * full, style='cyan') + Text('░' * (BAR - full), style='dim')
    table.add_row(f'  {name}', str(before), str(after), bar)
  return table
