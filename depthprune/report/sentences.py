"""What a run decided, in words and rows: a target met, an exit kept, units erased."""

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from depthprune.report import asked, structure
from depthprune.report.numbers import in_order, percent

UNITS = {'flops': 'FLOPs', 'params': 'parameters', 'milliseconds': 'milliseconds'}
STACKED = re.compile(r'(.*)\[(\d+)\]')  # a layer of a scanned stack


class Exit(NamedTuple):
  """The exit that a run kept.

  Attributes:
    name: of the exit. depth, exits: it is the depth-th of so many.
    max_importance: the largest w, in [1 / exits, 1].
    entropy: of w, divided by log(exits): 0 is decided, 1 is undecided.
  """

  name: str
  depth: int
  exits: int
  max_importance: float
  entropy: float


class Round(NamedTuple):
  """One line of the table of rounds; accuracies are of the held-out images."""

  name: str
  units: str
  before: str
  cut: str
  recalibrated: str
  after: str
  flops: str
  erased: str


HEAD = Round(
  'round', 'units', 'before', 'cut', 'recalibrated', 'after', 'FLOPs', 'erased'
)


def sentence(result: Mapping[str, Any]) -> str:
  """What the method was asked for and what it chose."""
  if 'cascade' in result:
    return asked.sentence(result)
  if 'structure' in result['options']:
    return structure.sentence(result)
  kept = exit_(result)
  if kept:
    return f'kept exit {kept.depth} of {kept.exits} ({kept.name}){_price(result)}'
  if 'target' in result['options']:
    return requested(result)
  return _erased(result)


def requested(result: Mapping[str, Any]) -> str:
  """`requested 50.0 % of the FLOPs, reached 49.8 %`."""
  target, of = result['options']['target'], result['options']['of']
  reached = percent(result[of]['after'] / result[of]['before'], 2)
  batch = f' at batch {result[of]["batch"]}' if of == 'milliseconds' else ''
  return f'requested {percent(target)} of the {UNITS[of]}{batch}, reached {reached}'


def exit_(result: Mapping[str, Any]) -> Exit | None:
  """The exit that was kept; None where the method does not weigh exits."""
  rounds = result.get('rounds', [])
  learned = rounds[-1].get('learned', {}) if rounds else {}
  if 'importance' not in learned:
    return None
  names, name = in_order(learned['importance']), rounds[-1]['exits'][-1]
  certainty = float(learned['max_importance']), float(learned['entropy'])
  return Exit(name, names.index(name) + 1, len(names), *certainty)


def certainty(result: Mapping[str, Any]) -> str:
  """How decided the choice of the exit was; nothing where there was none."""
  kept = exit_(result)
  if not kept:
    return ''
  return (
    f'largest importance w {kept.max_importance:.3f}, normalised entropy '
    f'{kept.entropy:.3f} (0: one exit has it all, 1: all exits have the same)'
  )


def erasing(result: Mapping[str, Any]) -> bool:
  """Whether the method erased units in rounds, so that there is a table of them."""
  return any('priority' in each.get('learned', {}) for each in result.get('rounds', []))


def rounds(result: Mapping[str, Any]) -> Iterator[Round]:
  """The rounds and, where there are several, their total."""
  each = result['rounds']
  full = each[0]['flops']['before']
  for number, (round_, names) in enumerate(zip(each, erased(each)), 1):
    yield _round(str(number), round_, ', '.join(names), full)
  if len(each) > 1:
    units = [each[0]['units'][0], each[-1]['units'][1]]
    held_out = {
      'before': each[0]['held_out']['before'],
      'after': each[-1]['held_out']['after'],
    }
    total = {'units': units, 'held_out': held_out, 'flops': each[-1]['flops']}
    yield _round('all', total, f'{units[0] - units[1]} units', full)


def curve(*runs: Sequence[Mapping[str, Any]]) -> dict[str, dict[int, list[float]]]:
  """Held-out accuracy by number of erased units, `before` and `after` retraining.

  runs: the rounds of one result.json each; what lies before retraining has fresh batch
    statistics. {'before' or 'after': {erased units: [accuracy of every run]}}
  """
  found: dict[str, dict[int, list[float]]] = {'before': {}, 'after': {}}
  for rounds in runs:
    units, full = rounds[0]['units'][0], rounds[0]['held_out']['before']
    points = [(units, full, full)]
    for each in rounds:
      accuracy = each['held_out']
      points.append((each['units'][1], accuracy['recalibrated'], accuracy['after']))
    for left, before, after in points:
      found['before'].setdefault(units - left, []).append(before)
      found['after'].setdefault(units - left, []).append(after)
  return found


def erased(rounds: Sequence[Mapping[str, Any]]) -> list[list[str]]:
  """The units that every round erased, by the names they had before the first."""
  found = []
  for round_, first in zip(rounds, first_names(rounds)):
    found.append([first.get(name, name) for name in round_['erased']])
  return found


def first_names(rounds: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
  """For every round {name of a unit then: its name before the first round}.

  The layers of a scanned stack are numbered anew when one of them goes: after
  `blocks[1]` was erased, what is called `blocks[1]` was `blocks[2]`.
  """
  now = {name: name for name in in_order(rounds[0]['learned'].get('priority', {}))}
  found = []
  for round_ in rounds:
    found.append(now)
    left: dict[str, int] = {}
    then = {}
    for name, first in now.items():
      stacked = STACKED.fullmatch(name)
      if name in round_['erased']:
        continue
      if stacked:
        stack = stacked[1]
        name = f'{stack}[{left.setdefault(stack, 0)}]'
        left[stack] += 1
      then[name] = first
    now = then
  return found


def _price(result: Mapping[str, Any]) -> str:
  """` at β = 0.01, aggregate log, cost index`, as far as the options say so."""
  options = result['options']
  if 'beta' not in options:
    return ''
  gamma = f', γ = {options["gamma"]:g}' if options['gamma'] else ''
  return (
    f' at β = {options["beta"]:g}, cost {options["cost"]}, '
    f'aggregate {options["aggregate"]}{gamma}'
  )


def _erased(result: Mapping[str, Any]) -> str:
  each = result['rounds']
  before, after = each[0]['units'][0], each[-1]['units'][1]
  importance = result['options'].get('importance')
  by = f', chosen by {importance}' if importance else ''
  rounds = f'{len(each)} round{"s" if len(each) > 1 else ""}'
  return f'erased {before - after} of {before} units in {rounds}{by}'


def _round(name: str, round_: Mapping[str, Any], erased: str, full: float) -> Round:
  before, after = round_['units']
  accuracy = round_['held_out']
  at = lambda when: percent(accuracy[when], 2) if when in accuracy else ''
  flops = percent(round_['flops']['after'] / full)
  return Round(
    name,
    f'{before} → {after}',
    at('before'),
    at('pruned'),
    at('recalibrated'),
    at('after'),
    flops,
    erased,
  )
