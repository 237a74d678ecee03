"""What a cascade was asked for, and what it reached: one request or several."""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from depthprune.report.numbers import percent

NONE = '–'
KINDS = {'drop': 'drop', 'budget': 'cost', 'risk': 'risk', 'milliseconds': 'time'}
READING = (
  'Thresholds come from held-out data; reached, lost and saved are of test data, in '
  'brackets their 95 % interval (paired bootstrap). Drop: points of accuracy; cost: of '
  "the MainNet's FLOPs; risk: examples wrong where the MainNet is right; time: of an "
  'example, executed.'
)


class Request(NamedTuple):
  """One line of the table of requests; `reached` is in the unit of `asked`."""

  asked: str
  reached: str
  lost: str
  saved: str


HEAD = Request('asked for', 'reached', 'lost, points', 'saved')


def sentence(result: Mapping[str, Any]) -> str:
  """`asked to lose at most 0.5 point: loses 0.31 point and saves 35.2 % of ...`."""
  lost, saved = _lost(result), _saved(result)
  chosen = _chosen(result)
  if not chosen:
    return f'{lost} and {saved}'
  kind, much = chosen['kind'], chosen['requested']
  if kind == 'budget':
    flops = result['flops']
    spent = percent(flops['after'] / flops['before'])
    return f'asked to spend at most {_share(much)} of the FLOPs: spends {spent}, {lost}'
  if kind == 'risk':
    risk = (chosen.get('test') or {}).get('risk')
    risk = NONE if risk is None else percent(risk, 2)
    return (
      f'asked to be wrong where the MainNet is right in at most {_share(much)} of the '
      f'examples: is so in {risk}, {lost} and {saved}'
    )
  if kind == 'threshold':
    return f'asked for a {_asked(chosen)}: {lost} and {saved}'
  if kind == 'milliseconds':
    took = _reached(chosen)
    return f'asked to take at most {much:g} ms an example: takes {took}, {lost}'
  return f'asked to lose at most {much:g} {_points(much)}: {lost} and {saved}'


def requests(result: Mapping[str, Any]) -> Iterator[Request]:
  """The table of requests, in the order in which the run has them."""
  for request in result['cascade']['requests']:
    asked = _asked(request) + (', chosen' if request.get('chosen') else '')
    test = request.get('test')
    if not test:
      yield Request(asked, 'refused', NONE, NONE)
      continue
    interval = request.get('interval') or {}
    lost = NONE if test['drop'] is None else f'{test["drop"]:z.2f}'
    lost += _interval(interval.get('drop'), 1, 2)
    saved = percent(test['saved']) + _interval(interval.get('saved'), 100, 1)
    yield Request(asked, _reached(request), lost, saved)


def refused(result: Mapping[str, Any]) -> list[str]:
  """Why requests cannot be met."""
  return [
    f'{_asked(request)} was refused: {request["refused"]}'
    for request in result['cascade']['requests']
    if request.get('refused')
  ]


def certified(result: Mapping[str, Any]) -> list[str]:
  """What is guaranteed of the requests for a risk."""
  found = [
    (request, (request.get('test') or {}).get('certificate'))
    for request in result['cascade']['requests']
  ]
  return [
    f'{_asked(request)} holds with probability {percent(1 - c["delta"])} for examples '
    f'drawn as the held-out ones are: {c["losses"]:,} of {c["rows"]:,} that nothing '
    f'was searched on; at most {percent(c["bound"], 2)} for these thresholds alone'
    for request, c in found
    if c
  ]


def _chosen(result: Mapping[str, Any]) -> Mapping[str, Any] | None:
  chosen = (r for r in result['cascade']['requests'] if r.get('chosen'))
  return next(chosen, None)


def _lost(result: Mapping[str, Any]) -> str:
  found = result['accuracy']
  lost = round(100 * (found['before'] - found['after']), 2)
  verb = 'loses' if lost >= 0 else 'gains'
  return f'{verb} {abs(lost):.2f} {_points(abs(lost))}'


def _saved(result: Mapping[str, Any]) -> str:
  saved = 1 - result['flops']['after'] / result['flops']['before']
  if saved < 0:
    return f'spends {percent(-saved)} more FLOPs'
  return f'saves {percent(saved)} of the FLOPs'


def _asked(request: Mapping[str, Any]) -> str:
  """`drop ≤ 0.5`, `cost ≤ 67 %`, `risk ≤ 2 %`, `time ≤ 0.8 ms`, `threshold 0.9`."""
  kind, much = request['kind'], request['requested']
  if kind == 'threshold':
    return f'threshold {much:g}'
  shown = {'drop': f'{much:g}', 'milliseconds': f'{much:g} ms'}
  return f'{KINDS[kind]} ≤ {shown.get(kind, _share(much))}'


def _reached(request: Mapping[str, Any]) -> str:
  """In the unit that was asked for, and whether it is more than that."""
  kind, test = request['kind'], request['test']
  reached = {
    'drop': test['drop'],
    'budget': 1 - test['saved'],
    'risk': test.get('risk'),
    'milliseconds': test.get('milliseconds'),
  }
  value = reached.get(kind)
  if value is None:
    return NONE
  shown = {'drop': f'{value:z.2f}', 'milliseconds': f'{value:.3g} ms'}
  text = shown.get(kind, percent(value, 2))
  return f'{text}, missed' if value > request['requested'] + 1e-9 else text


def _interval(ends: Any, scale: float, digits: int) -> str:
  if not ends or None in ends:
    return ''
  low, high = (f'{scale * end:z.{digits}f}' for end in ends)
  return f' ({low} to {high})'


def _points(number: float) -> str:
  return 'point' if 0 < number <= 1 else 'points'


def _share(part: float) -> str:
  return f'{100 * part:g} %'
