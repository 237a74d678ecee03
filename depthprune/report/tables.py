"""Tables of what a run reached, as rows of text for the screen and the page."""

import math
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from depthprune.report.numbers import (
  NONE,
  count,
  counted,
  exceeds,
  in_order,
  kept,
  milliseconds,
  percent,
  points,
  seconds,
  speed,
  wilson,
)
from depthprune.report.sentences import asked, lost_points, reached, target_of
from depthprune.timing.difference import Difference, compare
from depthprune.train.result import (
  Accuracies,
  CascadeResult,
  Change,
  ExitCalibration,
  Result,
  RoundResult,
)

FLOPS = 'FLOPs (1 MAC = 2)'


class Table(NamedTuple):
  """A table of text.

  Attributes:
    head: names of the columns.
    rows: cells of every row.
  """

  head: Sequence[str]
  rows: Sequence[Sequence[str]]


class Tile(NamedTuple):
  """One of the few numbers at the top of the page.

  Attributes:
    value: the number.
    name: what it is.
    detail: from what it became that.
    interval: what chance allows it to be, where that is known.
  """

  value: str
  name: str
  detail: str
  interval: str = ''


def costs(result: Result) -> Table:
  """Returns accuracy, cost and measured latency, before and after."""
  if result.cascade is not None:
    head = ('', 'MainNet', 'cascade', '')
    return Table(head, [*_costs_of_cascade(result, result.cascade)])
  return Table(('', 'before', 'cut', 'after', ''), [*_costs(result)])


def _costs(result: Result) -> Iterator[Sequence[str]]:
  before, after = (
    result.scores.get(when, {}).get('perplexity') for when in ('before', 'after')
  )
  if before and after:
    change = f'{100 * (after / before - 1):+.1f} %'
    yield 'perplexity, test', f'{before:.2f}', '', f'{after:.2f}', change
  yield _accuracy('accuracy, test', result.accuracy)
  if result.held_out:
    yield _accuracy('accuracy, held-out', result.held_out)
  for name, of in (
    ('accuracy, at the start', result.original),
    ('accuracy, trained alone', result.control),
  ):
    if 'test' in of:
      yield _accuracy(name, Accuracies(of['test'], result.accuracy.after))
  yield from (_accuracy(*each) for each in _scores(result))
  yield _cost(FLOPS, result.flops)
  yield _cost('parameters', result.params)
  peak = result.peak_bytes or result.report.peak_bytes
  if peak:
    yield _cost('peak activation bytes', peak)
  for batch, measured in result.latency_ms.items():
    before, after = milliseconds(measured.before), milliseconds(measured.after)
    name = f'median latency, batch {batch}'
    yield name, before, '', after, speed(measured.difference)
  compiled = result.compile_s
  if compiled:
    before, after = seconds(compiled.before), seconds(compiled.after)
    change = speed(compare(compiled.before, compiled.after))
    yield 'compile time', before, '', after, change


def _scores(result: Result) -> Iterator[tuple[str, Accuracies]]:
  """Yields the scores on test data that have a row, besides the accuracy."""
  before, after = (result.scores.get(when, {}) for when in ('before', 'after'))
  for key, value in after.items():
    name, first = _score_name(key), before.get(key)
    if name and first is not None and value is not None:
      yield f'{name}, test', Accuracies(first, value)


def _score_name(key: str) -> str:
  """Returns the name of a score that has a row, '' if it has none."""
  names = {
    'miou': 'mean IoU',
    'balanced_accuracy': 'balanced accuracy',
    'f1': 'mean F1',
  }
  task = key.removeprefix('accuracy_')
  return names.get(key, f'accuracy of {task}' if task != key else '')


def _accuracy(name: str, accuracy: Accuracies) -> Sequence[str]:
  cut = '' if accuracy.pruned is None else percent(accuracy.pruned, 2)
  before, after = percent(accuracy.before, 2), percent(accuracy.after, 2)
  return name, before, cut, after, points(accuracy.before, accuracy.after)


def _cost(name: str, cost: Change) -> Sequence[str]:
  return name, count(cost.before), '', count(cost.after), kept(cost.kept)


def _costs_of_cascade(
  result: Result, cascade: CascadeResult
) -> Iterator[Sequence[str]]:
  """Yields the cost three times: ideal, padded and measured."""
  perplexity = result.scores.get('before', {}).get('perplexity')
  if perplexity:
    yield 'perplexity, test', f'{perplexity:.2f}', '', ''
  shown = {
    'accuracy, test': result.accuracy,
    'accuracy, held-out': result.held_out,
  }
  if cascade.agreement is not None:
    shown = {'same tokens, test': Accuracies(1.0, cascade.agreement), **shown}
  for name, accuracy in shown.items():
    if accuracy:
      before, _, after, change = _accuracy('', accuracy)[1:]
      yield name, before, after, change
  for name, score in _scores(result):
    name, before, _, after, change = _accuracy(name, score)
    yield name, before, after, change
  executed, flops, params = cascade.executed, result.flops, result.params
  left = lambda change: (
    count(change.before),
    count(change.after),
    kept(change.kept),
  )
  ideal = ', ideal' if cascade.agreement is None else ' of a token'
  yield f'FLOPs (1 MAC = 2){ideal}', *left(flops)
  if executed.padded is not None:
    padded = Change(flops.before, executed.padded)
    yield 'FLOPs, padded to batches', *left(padded)
  yield 'parameters, with heads', *left(params)
  if executed.ms is not None and executed.whole_ms is not None:
    before, after = milliseconds(executed.whole_ms), milliseconds(executed.ms)
    name = f'median latency, batch {executed.batch}'
    yield name, before, after, speed(executed.difference)
  if (one := executed.one) is not None:
    before, after = milliseconds(one.whole_ms), milliseconds(one.ms)
    yield 'median latency, one by one', before, after, speed(one.difference)
  if executed.compile_s is not None:
    yield 'compile time', '', seconds(executed.compile_s), ''


def tiles(result: Result) -> Iterator[Tile]:
  """Yields the page's tiles: accuracy, the kept part of each cost, and speed."""
  before, after = result.accuracy.before, result.accuracy.after
  cascade = result.cascade
  digits = 1 if cascade is None else 2
  beside = result.control.get('test', before)
  name = 'accuracy, against it alone' if result.control else 'accuracy'
  change = points(beside, after)
  yield Tile(percent(after, digits), name, change, _chance(result, digits))
  if cascade is None:
    for name, cost in (('FLOPs', result.flops), ('parameters', result.params)):
      yield _kept(name, cost)
    for batch, ms in result.latency_ms.items():
      yield _speed(batch, ms.difference, ms.before, ms.after)
    return
  executed, flops = cascade.executed, result.flops
  if cascade.agreement is not None:
    yield Tile(percent(cascade.agreement, 2), 'of the tokens stay the same', '')
  yield _kept('FLOPs', flops, ', ideal' if cascade.agreement is None else ' of a token')
  if executed.padded is not None:
    yield _kept('FLOPs', Change(flops.before, executed.padded), ', padded')
  if executed.ms is not None and executed.whole_ms is not None:
    times = executed.whole_ms, executed.ms
    yield _speed(executed.batch, executed.difference, *times)
  if (one := executed.one) is not None:
    yield _speed(1, one.difference, one.whole_ms, one.ms)


def _chance(result: Result, digits: int) -> str:
  """Returns the 95 % interval of an accuracy that is a share of the test examples."""
  after, n = result.accuracy.after, result.images.get('test', 0)
  several = any(_score_name(key) for key in result.scores.get('after', {}))
  writes = 'perplexity' in result.scores.get('before', {})  # n counts rows of tokens
  if after is None or several or writes or not n or not 0 <= after <= 1:
    return ''  # of pixels, tokens or several tasks, or unknown
  low, high = (100 * end for end in wilson(after, n))
  return f'95 %: {low:.{digits}f}–{high:.{digits}f} %'


def _kept(name: str, cost: Change, which: str = '') -> Tile:
  change = f'{count(cost.before)} → {count(cost.after)}'
  if exceeds(cost.kept):
    return Tile(percent(cost.kept - 1), f'more {name}{which}', change)
  return Tile(percent(cost.kept), f'{name} kept{which}', change)


def _speed(batch: Any, found: Difference, before: float, after: float) -> Tile:
  took = f'{milliseconds(before).removesuffix(" ms")} → {milliseconds(after)}'
  if found.kind in ('speed-up', 'slowdown'):
    interval = ''
    if found.between:
      interval = 'quartiles: {:.2f}–{:.2f}'.format(*found.between)
    return Tile(f'{found.factor:.2f} ×', f'{found.kind}, batch {batch}', took, interval)
  value = '≈ 1 ×' if found.kind == 'no difference' else NONE
  return Tile(value, f'speed, batch {batch}: {found.kind}', took)


def narrowed(result: Result) -> bool:
  """Whether the run had a target, or any layer that is left became narrower."""
  return target_of(result) is not None or any(
    0 < after < before for before, after in result.widths.values()
  )


# ---- rounds of erasure ---------------------------------------------------------------


def rounds(result: Result) -> Table:
  """Returns a row for every round and, if there are several, for their total."""
  columns = 'round units before cut recalibrated after FLOPs erased'
  each = result.rounds
  full = each[0].flops.before if each else 0
  names = [', '.join(units) for units in erased(each, 'priority')]
  lines = [
    _round(str(number), round_, units, full)
    for number, (round_, units) in enumerate(zip(each, names), 1)
  ]
  if len(each) > 1:
    first, last = each[0], each[-1]
    units = first.units[0], last.units[1]
    total = RoundResult(
      units=units,
      erased=[],
      exits=[],
      flops=last.flops,
      params=last.params,
      held_out=Accuracies(first.held_out.before, last.held_out.after),
    )
    lines.append(_round('all', total, counted(units[0] - units[1], 'unit'), full))
  return Table(columns.split(), lines)


def _round(name: str, round_: RoundResult, names: str, full: float) -> Sequence[str]:
  before, after = round_.units
  accuracy = round_.held_out
  at = lambda value: '' if value is None else percent(value, 2)
  return (
    name,
    f'{before} → {after}',
    at(accuracy.before),
    at(accuracy.pruned),
    at(accuracy.recalibrated),
    at(accuracy.after),
    percent(Change(full, round_.flops.after).kept),
    names or 'none',
  )


STACKED = r'(.*)\[(\d+)\]'  # a layer of a scanned stack


def erased(rounds: Sequence[RoundResult], key: str) -> list[list[str]]:
  """Returns the units that every round erased, by their names in the first round.

  Args:
    rounds: the rounds of a result.
    key: entry of `learned` with a value for each unit, such as 'priority'.
  """
  return [
    [first.get(name, name) for name in round_.erased]
    for round_, first in zip(rounds, first_names(rounds, key))
  ]


def first_names(rounds: Sequence[RoundResult], key: str) -> list[dict[str, str]]:
  """Returns {name of a unit in a round: its name in the first} for every round.

  The layers of a scanned stack are renumbered when one of them is erased: without
  `blocks[1]`, the former `blocks[2]` is called `blocks[1]`.
  """
  names = {name: name for name in in_order(rounds[0].learned.get(key, {}))}
  by_round = []
  for round_ in rounds:
    by_round.append(names)
    left: dict[str, int] = {}
    renamed = {}
    for name, first in names.items():
      if name in round_.erased:
        continue
      if stacked := re.fullmatch(STACKED, name):
        stack = stacked[1]
        name = f'{stack}[{left.setdefault(stack, 0)}]'
        left[stack] += 1
      renamed[name] = first
    names = renamed
  return by_round


# ---- cascades ------------------------------------------------------------------------


def requests(cascade: CascadeResult) -> Table:
  """Returns what was requested and what was reached, in the order of the result."""
  lines = []
  for request in cascade.requests:
    name = asked(request) + (', chosen' if request.chosen else '')
    test = request.test
    if not test:
      lines.append((name, 'refused' if request.refused else NONE, NONE, NONE))
      continue
    interval = request.interval or {}
    lost = lost_points(test.drop)
    lost += _interval(interval.get('drop'), 1, 2)
    saved = percent(test.saved) + _interval(interval.get('saved'), 100, 1)
    lines.append((name, reached(request), lost, saved))
  lost = 'lost, points' if cascade.agreement is None else 'changed, %'
  return Table(('asked for', 'reached', lost, 'saved'), lines)


def _interval(ends: Any, scale: float, digits: int) -> str:
  if not ends or not all(end is not None and math.isfinite(end) for end in ends):
    return ''
  low, high = (f'{scale * end:z.{digits}f}' for end in ends)
  return f' ({low} to {high})'


def exits(cascade: CascadeResult) -> Table:
  """Returns a row for every exit, the network's own last, with numbers of test data."""
  if cascade.agreement is not None:
    columns = 'exit', 'tap', 'cost', 'same tokens', 'threshold', 'leave'
    return Table(columns, [row[: len(columns)] for row in _exits(cascade)])
  head = ('exit', 'tap', 'cost', 'accuracy', 'threshold', 'leave', 'ECE', 'AUROC')
  return Table(head, [*_exits(cascade)])


def _exits(cascade: CascadeResult) -> Iterator[Sequence[str]]:
  for name in cascade.exits:
    calibrated = cascade.calibration.get(name) or ExitCalibration()
    cost = cascade.cost.get(name)
    auroc = calibrated.all.auroc if calibrated.all else None
    yield (
      name,
      cascade.taps.get(name, ''),
      _or_dash(cost, lambda c: percent(Change(cascade.whole, c).kept)),
      _or_dash(cascade.exit_accuracy.get(name), lambda a: percent(a, 2)),
      _threshold(cascade, name),
      _or_dash(cascade.shares.get(name), percent),
      _ece(calibrated),
      _or_dash(auroc, lambda a: f'{a:.3f}' if math.isfinite(a) else NONE),
    )


def accuracy_of_leavers(cascade: CascadeResult) -> dict[str, float]:
  """Returns the accuracy of the examples that leave at each exit, where any do."""
  return {
    name: exit_.exited.accuracy
    for name, exit_ in cascade.calibration.items()
    if exit_.exited and exit_.exited.accuracy is not None
  }


def _threshold(cascade: CascadeResult, name: str) -> str:
  """Returns an exit's threshold; 'none' if all examples leave, 'never' if none do."""
  if name == cascade.exits[-1]:
    return ''
  value = cascade.thresholds.get(name)
  if value is None:
    return 'none' if cascade.shares.get(name) else 'never'
  if not math.isfinite(value):
    return NONE
  if value == round(value):
    return f'{value:g}'
  # 0.99996 must not read as 1, so it has the digits that tell the two apart.
  digits = next((d for d in range(3, 8) if round(value, d) not in (0, 1)), 7)
  return f'{value:.{digits}f}'


def _ece(calibrated: ExitCalibration) -> str:
  every = calibrated.all
  before = every.before.ece if every and every.before else None
  after = every.after.ece if every and every.after else None
  if before is None or after is None:
    return NONE
  if calibrated.temperature in (None, 1):
    return percent(after)
  return f'{percent(before).removesuffix(" %")} → {percent(after)}'


def _or_dash(value: Any, shown: Callable[[Any], str]) -> str:
  return NONE if value is None else shown(value)
