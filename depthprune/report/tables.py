"""What a run reached, as rows of text: for the screen and for the page."""

import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from depthprune.report.numbers import (
  count,
  in_order,
  milliseconds,
  percent,
  points,
  seconds,
)
from depthprune.report.sentences import NONE, asked, reached, recipe_of, target_of
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
  """Names of the columns, and the cells of every row."""

  head: Sequence[str]
  rows: Sequence[Sequence[str]]


class Tile(NamedTuple):
  """One of the few numbers at the top of the page."""

  value: str
  name: str
  detail: str


def legend(result: Result) -> str:
  """What the columns of `costs` are."""
  return recipe_of(result).legend


def costs(result: Result) -> Table:
  """Accuracy, cost and measured latency, before and after."""
  if result.cascade is not None:
    head = ('', 'MainNet', 'cascade', '')
    return Table(head, [*_costs_of_cascade(result, result.cascade)])
  return Table(('', 'before', 'cut', 'after', ''), [*_costs(result)])


def _costs(result: Result) -> Iterator[Sequence[str]]:
  yield _accuracy('accuracy, test', result.accuracy)
  if result.held_out:
    yield _accuracy('accuracy, held-out', result.held_out)
  before, after = (result.scores.get(when, {}) for when in ('before', 'after'))
  for key, value in after.items():
    name, first = _score_name(key), before.get(key)
    if name and first is not None and value is not None:
      yield _accuracy(f'{name}, test', Accuracies(first, value))
  yield _cost(FLOPS, result.flops)
  yield _cost('parameters', result.params)
  peak = result.peak_bytes or result.report.peak_bytes
  if peak:
    yield _cost('peak activation bytes', peak)
  for batch, measured in result.latency_ms.items():
    before, after = milliseconds(measured.before), milliseconds(measured.after)
    speedup = f'speed-up {measured.speedup:.2f} x'
    yield f'median latency, batch {batch}', before, '', after, speedup
  compiled = result.compile_s
  if compiled:
    speedup = f'speed-up {compiled.before / compiled.after:.2f} x'
    yield (
      'compile time',
      seconds(compiled.before),
      '',
      seconds(compiled.after),
      speedup,
    )


def _score_name(key: str) -> str:
  """What a row of that score is called: of pixels, or of one of several tasks."""
  task = key.removeprefix('accuracy_')
  return 'mean IoU' if key == 'miou' else f'accuracy of {task}' if task != key else ''


def _accuracy(name: str, found: Accuracies) -> Sequence[str]:
  cut = '' if found.pruned is None else percent(found.pruned, 2)
  before, after = percent(found.before, 2), percent(found.after or 0, 2)
  return name, before, cut, after, points(found.before, found.after or 0)


def _cost(name: str, cost: Change) -> Sequence[str]:
  return name, count(cost.before), '', count(cost.after), f'{percent(cost.kept)} kept'


def _costs_of_cascade(
  result: Result, cascade: CascadeResult
) -> Iterator[Sequence[str]]:
  """The cost three times: ideal, padded, measured."""
  for name, found in (('test', result.accuracy), ('held-out', result.held_out)):
    if found:
      before, _, after, change = _accuracy('', found)[1:]
      yield f'accuracy, {name}', before, after, change
  executed, flops, params = cascade.executed, result.flops, result.params
  kept = lambda change: (
    count(change.before),
    count(change.after),
    f'{percent(change.kept)} kept',
  )
  yield 'FLOPs (1 MAC = 2), ideal', *kept(flops)
  if executed.padded is not None:
    padded = Change(flops.before, executed.padded)
    yield 'FLOPs, padded to batches', *kept(padded)
  yield 'parameters, with heads', *kept(params)
  if executed.ms is not None and executed.whole_ms is not None:
    before, after = milliseconds(executed.whole_ms), milliseconds(executed.ms)
    name = f'median latency, batch {executed.batch}'
    yield name, before, after, f'speed-up {executed.speedup:.2f} x'
  if executed.compile_s is not None:
    yield 'compile time', '', seconds(executed.compile_s), ''


def tiles(result: Result) -> Iterator[Tile]:
  """Accuracy, what is kept of each cost, and speed."""
  found, after = result.accuracy, result.accuracy.after or 0
  cascade = result.cascade
  digits = 1 if cascade is None else 2
  yield Tile(percent(after, digits), 'accuracy', points(found.before, after))
  if cascade is None:
    for name, cost in (('FLOPs', result.flops), ('parameters', result.params)):
      yield _kept(f'{name} kept', cost)
    for batch, measured in result.latency_ms.items():
      times = measured.before, measured.after
      yield _speed(batch, measured.speedup, *times)
    return
  executed, flops = cascade.executed, result.flops
  yield _kept('FLOPs kept, ideal', flops)
  if executed.padded is not None:
    yield _kept('FLOPs kept, padded', Change(flops.before, executed.padded))
  if executed.ms is not None and executed.whole_ms is not None:
    times = executed.whole_ms, executed.ms
    yield _speed(executed.batch, executed.speedup or 0, *times)


def _kept(name: str, cost: Change) -> Tile:
  return Tile(percent(cost.kept), name, f'{count(cost.before)} → {count(cost.after)}')


def _speed(batch: Any, speedup: float, before: float, after: float) -> Tile:
  took = f'{milliseconds(before).removesuffix(" ms")} → {milliseconds(after)}'
  return Tile(f'{speedup:.2f} ×', f'speed, batch {batch}', took)


def narrowed(result: Result) -> bool:
  """Whether there is a width to speak of: layers that went whole became no narrower."""
  return target_of(result) is not None or any(
    0 < after < before for before, after in result.widths.values()
  )


# ---- rounds of erasure ---------------------------------------------------------------


def rounds(result: Result) -> Table:
  """A row for every round and, where there are several, their total."""
  columns = 'round units before cut recalibrated after FLOPs erased'
  each = result.rounds
  full = each[0].flops.before
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
    lines.append(_round('all', total, f'{units[0] - units[1]} units', full))
  return Table(columns.split(), lines)


def _round(name: str, round_: RoundResult, names: str, full: float) -> Sequence[str]:
  before, after = round_.units
  found = round_.held_out
  at = lambda value: '' if value is None else percent(value, 2)
  return (
    name,
    f'{before} → {after}',
    at(found.before),
    at(found.pruned),
    at(found.recalibrated),
    at(found.after),
    percent(round_.flops.after / full),
    names,
  )


STACKED = r'(.*)\[(\d+)\]'  # a layer of a scanned stack


def erased(rounds: Sequence[RoundResult], key: str) -> list[list[str]]:
  """The units that every round erased, by the names they had before the first.

  Args:
    rounds: in order.
    key: what the method had learnt of each unit, such as 'priority'.
  """
  found = []
  for round_, first in zip(rounds, first_names(rounds, key)):
    found.append([first.get(name, name) for name in round_.erased])
  return found


def first_names(rounds: Sequence[RoundResult], key: str) -> list[dict[str, str]]:
  """For every round {name of a unit then: its name before the first round}.

  The layers of a scanned stack are numbered anew when one of them goes: after
  `blocks[1]` was erased, what is called `blocks[1]` was `blocks[2]`.
  """
  now = {name: name for name in in_order(rounds[0].learned.get(key, {}))}
  found = []
  for round_ in rounds:
    found.append(now)
    left: dict[str, int] = {}
    then = {}
    for name, first in now.items():
      stacked = re.fullmatch(STACKED, name)
      if name in round_.erased:
        continue
      if stacked:
        stack = stacked[1]
        name = f'{stack}[{left.setdefault(stack, 0)}]'
        left[stack] += 1
      then[name] = first
    now = then
  return found


# ---- cascades ------------------------------------------------------------------------


def requests(cascade: CascadeResult) -> Table:
  """What was asked for and what was reached, in the order in which the run has them."""
  lines = []
  for request in cascade.requests:
    name = asked(request) + (', chosen' if request.chosen else '')
    test = request.test
    if not test:
      lines.append((name, 'refused', NONE, NONE))
      continue
    interval = request.interval or {}
    lost = NONE if test.drop is None else f'{test.drop:z.2f}'
    lost += _interval(interval.get('drop'), 1, 2)
    saved = percent(test.saved) + _interval(interval.get('saved'), 100, 1)
    lines.append((name, reached(request), lost, saved))
  return Table(('asked for', 'reached', 'lost, points', 'saved'), lines)


def _interval(ends: Any, scale: float, digits: int) -> str:
  if not ends or None in ends:
    return ''
  low, high = (f'{scale * end:z.{digits}f}' for end in ends)
  return f' ({low} to {high})'


def exits(cascade: CascadeResult) -> Table:
  """The exits, the network's own last; each number is of test data."""
  head = ('exit', 'tap', 'cost', 'accuracy', 'threshold', 'leave', 'ECE', 'AUROC')
  lines = []
  for name in cascade.exits:
    calibrated = cascade.calibration.get(name) or ExitCalibration()
    cost = cascade.cost.get(name)
    auroc = calibrated.all.auroc if calibrated.all else None
    lines.append(
      (
        name,
        cascade.taps.get(name, ''),
        _or_dash(cost, lambda c: percent(c / cascade.whole)),
        _or_dash(cascade.exit_accuracy.get(name), lambda a: percent(a, 2)),
        _threshold(cascade, name),
        _or_dash(cascade.shares.get(name), percent),
        _ece(calibrated),
        _or_dash(auroc, '{:.3f}'.format),
      )
    )
  return Table(head, lines)


def accuracy_of_leavers(cascade: CascadeResult) -> dict[str, float]:
  """Accuracy of those that leave at each exit, where anybody does."""
  found = {}
  for name, calibrated in cascade.calibration.items():
    accuracy = calibrated.exited.accuracy if calibrated.exited else None
    if accuracy is not None:
      found[name] = accuracy
  return found


def _threshold(cascade: CascadeResult, name: str) -> str:
  """What confidence must exceed. Without a threshold either all leave or nobody."""
  if name == cascade.exits[-1]:
    return ''
  value = cascade.thresholds.get(name)
  if value is None:
    return 'none' if cascade.shares.get(name) else 'never'
  if value == round(value):
    return f'{value:g}'
  # 0.99996 is not 1: a probability has as many digits as tell it from 1.
  digits = next((d for d in range(3, 8) if round(value, d) != 1), 7)
  return f'{value:.{digits}f}'


def _ece(calibrated: ExitCalibration) -> str:
  every = calibrated.all
  before = every.before.ece if every and every.before else None
  after = every.after.ece if every and every.after else None
  if before is None or after is None:
    return NONE
  if calibrated.temperature in (None, 1):
    return percent(after)
  return f'{100 * before:.1f} → {percent(after)}'


def _or_dash(value: Any, shown: Callable[[Any], str]) -> str:
  return NONE if value is None else shown(value)
