"""What a cascade of early exits is and costs, in words and rows.

Takes `result.json` of a run in which examples leave early.
"""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from depthprune.report.asked import NONE
from depthprune.report.numbers import count, milliseconds, percent, points, seconds

HEAD = ('', 'MainNet', 'cascade', '')
LEGEND = (
  'MainNet: the network alone; cascade: with early exits and their heads. FLOPs: of an '
  'example in the mean; ideal if every stage runs on just those that reach it, padded '
  'as executed, in batches of a few compiled sizes.'
)
EXITS = (
  'Cost: FLOPs up to the exit, all heads on the way included, of those of the MainNet. '
  'Accuracy: if all left there. ECE: expected calibration error in 15 bins, before → '
  'after temperature; AUROC: how well confidence tells right from wrong. Test data.'
)
CURVE = (
  'Test data; the thresholds of every point were chosen on held-out data. At 100 % is '
  'the MainNet alone; a cascade in which nobody leaves costs its heads more.'
)
LEAVING = 'Of the chosen cascade, on test data, with the accuracy of those that leave.'
RELIABILITY = (
  'All test examples at every exit: on the diagonal, confidence is the chance to be '
  'right; below it the exit is too sure. T: the temperature, fitted on held-out data.'
)


class Exit(NamedTuple):
  """One line of the table of exits."""

  name: str
  tap: str
  cost: str
  accuracy: str
  threshold: str
  left: str
  ece: str
  auroc: str


EXIT_HEAD = Exit(
  *('exit', 'tap', 'cost', 'accuracy', 'threshold', 'leave', 'ECE', 'AUROC')
)


def accuracy(result: Mapping[str, Any]) -> str:
  """`Test accuracy: MainNet 93.87 %, cascade 93.56 %.`"""
  found, original = result['accuracy'], result['cascade'].get('original') or {}
  own, early = (percent(found[when], 2) for when in ('before', 'after'))
  if original.get('test', found['before']) != found['before']:
    own += f' ({percent(original["test"], 2)} before it was trained with its heads)'
  return f'Test accuracy: MainNet {own}, cascade {early}.'


def summary(result: Mapping[str, Any]) -> Iterator[tuple[str, str, str, str]]:
  """Accuracy, and the cost three times: ideal, padded, measured."""
  for name, key in (('test', 'accuracy'), ('held-out', 'held_out')):
    found = result.get(key)
    if found:
      before, after = (percent(found[when], 2) for when in ('before', 'after'))
      change = points(found['before'], found['after'])
      yield f'accuracy, {name}', before, after, change
  executed = result['cascade'].get('executed') or {}
  flops, params = result['flops'], result['params']
  yield _cost('FLOPs (1 MAC = 2), ideal', flops['before'], flops['after'])
  if executed.get('padded') is not None:
    yield _cost('FLOPs, padded to batches', flops['before'], executed['padded'])
  yield _cost('parameters, with heads', params['before'], params['after'])
  if executed.get('ms') is not None:
    before, after = (milliseconds(executed[key]) for key in ('whole_ms', 'ms'))
    name = f'median latency, batch {executed["batch"]}'
    yield name, before, after, f'speed-up {executed["speedup"]:.2f} x'
  if executed.get('compile_s') is not None:
    yield 'compile time', '', seconds(executed['compile_s']), ''


def tiles(result: Mapping[str, Any]) -> Iterator[tuple[str, str, str]]:
  """(value, name, detail) of the few numbers at the top of the page."""
  found = result['accuracy']
  change = points(found['before'], found['after'])
  yield percent(found['after'], 2), 'accuracy', change
  executed, flops = result['cascade'].get('executed') or {}, result['flops']
  whole = flops['before']
  for name, flop in (('ideal', flops['after']), ('padded', executed.get('padded'))):
    if flop is not None:
      detail = f'{count(whole)} → {count(flop)}'
      yield percent(flop / whole), f'FLOPs kept, {name}', detail
  if executed.get('ms') is not None:
    before, after = (milliseconds(executed[key]) for key in ('whole_ms', 'ms'))
    name = f'speed, batch {executed["batch"]}'
    took = f'{before.removesuffix(" ms")} → {after}'
    yield f'{executed["speedup"]:.2f} ×', name, took


def executed(result: Mapping[str, Any]) -> str:
  """Whether what ran left where it was simulated to; nothing where none ran."""
  found = result['cascade'].get('executed') or {}
  if found.get('differ') is None:
    return ''
  broken = ''
  if found.get('broken'):
    broken = f'; {found["broken"]:,} had an answer that is not finite, and went on'
  if not found['differ']:
    return f'executed: all {found["n"]:,} examples left where simulated{broken}'
  return (
    f'executed: {found["differ"]:,} of {found["n"]:,} examples left elsewhere than '
    f'simulated, {found["near"]:,} of them within 1e-5 of a threshold{broken}'
  )


def exits(result: Mapping[str, Any]) -> Iterator[Exit]:
  """The table of exits, the network's own last; each number is of test data."""
  found = result['cascade']
  for name in found['exits']:
    calibrated = found.get('calibration', {}).get(name) or {}
    share = found['shares'].get(name)
    yield Exit(
      name,
      found['taps'].get(name, ''),
      _or_none(found['cost'].get(name), lambda c: percent(c / found['whole'])),
      _or_none(found['exit_accuracy'].get(name), lambda a: percent(a, 2)),
      _threshold(found, name),
      _or_none(share, percent),
      _ece(calibrated),
      _or_none((calibrated.get('all') or {}).get('auroc'), '{:.3f}'.format),
    )


def right(result: Mapping[str, Any]) -> dict[str, float]:
  """Accuracy of those that leave at each exit, where anybody does."""
  found = {}
  for name, calibrated in (result['cascade'].get('calibration') or {}).items():
    accuracy = (calibrated.get('exited') or {}).get('accuracy')
    if accuracy is not None:
      found[name] = accuracy
  return found


def cut(result: Mapping[str, Any]) -> str:
  """Which heads the saved cascade no longer has, and that the tables have them."""
  stages = {stage['exit'] for stage in result['cascade'].get('stages', [])}
  gone = [name for name in result['cascade']['exits'] if name not in stages]
  if not stages or not gone:
    return ''
  verb = 'is' if len(gone) == 1 else 'are'
  return (
    f'Nobody leaves at {", ".join(gone)}, which {verb} cut away: the saved cascade '
    'costs a little less than the tables, where every head is paid for.'
  )


def _threshold(found: Mapping[str, Any], name: str) -> str:
  """What confidence must exceed. Without a threshold either all leave or nobody."""
  if name == found['exits'][-1]:
    return ''
  value = found['thresholds'].get(name)
  if value is None:
    return 'none' if found['shares'].get(name) else 'never'
  if value == round(value):
    return f'{value:g}'
  # 0.99996 is not 1: a probability has as many digits as tell it from 1.
  digits = next((d for d in range(3, 8) if round(value, d) != 1), 7)
  return f'{value:.{digits}f}'


def _ece(calibrated: Mapping[str, Any]) -> str:
  every = calibrated.get('all') or {}
  before, after = ((every.get(when) or {}).get('ece') for when in ('before', 'after'))
  if before is None or after is None:
    return NONE
  if calibrated.get('temperature') in (None, 1):
    return percent(after)
  return f'{100 * before:.1f} → {percent(after)}'


def _cost(name: str, before: float, after: float) -> tuple[str, str, str, str]:
  return name, count(before), count(after), f'{percent(after / before)} kept'


def _or_none(value: Any, shown: Any) -> str:
  return NONE if value is None else shown(value)
