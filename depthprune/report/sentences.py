"""Sentences about what a run decided and reached, for the page and the screen."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from depthprune import methods
from depthprune.report.numbers import NONE, counted, milliseconds, not_finite, percent
from depthprune.train.recipe import Recipe, Target
from depthprune.train.result import CascadeResult, Executed, RequestResult, Result

KINDS = {'drop': 'drop', 'budget': 'cost', 'risk': 'risk', 'milliseconds': 'time'}
UNITS = (
  "Drop: points of accuracy; cost: of the MainNet's FLOPs; risk: examples wrong where "
  'the MainNet is right; time: of an example, executed.'
)
UNITS_OF_TEXT = (
  "Drop: percent of the tokens that change; cost: of the MainNet's FLOPs per token."
)
EXITS = (
  'Cost: FLOPs up to the exit, all heads on the way included, of those of the MainNet. '
  'Accuracy: if all left there. ECE: expected calibration error in 15 bins, before → '
  'after temperature; AUROC: how well confidence tells right from wrong. Test data.'
)
EXITS_OF_TEXT = (
  'Cost: FLOPs of a token up to the exit, all heads on the way included, of those of '
  'the MainNet; an exit that is never used is cut away and costs nothing. Same tokens: '
  'the share that would not change if all left there. Test texts; keys and values are '
  'those of all layers here, not copied ones.'
)
CURVE = (
  'Test data; the thresholds of every point were chosen on held-out data. At 100 % is '
  'the MainNet alone; a cascade in which nobody leaves costs its heads more.'
)
CURVE_OF_TEXT = (
  'Test texts; the exits and thresholds of every point were chosen on held-out texts. '
  'At 100 % is the MainNet alone. Same tokens: the share of the predicted tokens that '
  'do not change.'
)
LEAVING = 'Of the chosen cascade, on test data, with the accuracy of those that leave.'
LEAVING_OF_TEXT = 'Of the chosen exits, on test texts.'
LEGEND_OF_TEXT = (
  'MainNet: the network alone; cascade: with early exits and their heads. Accuracy: of '
  'the next token. FLOPs: per token, in the mean.'
)
RELIABILITY = (
  'All test examples at every exit: on the diagonal, confidence is the chance to be '
  'right; below it the exit is too sure. T: the temperature, fitted on held-out data.'
)
LAYERS = (
  'Bars: channels before, pale, and after. Point at a layer, or move to it with the '
  'keyboard, for what was kept of it; FLOPs are those of one example, 1 MAC = 2. '
  'Indices of every tensor are in result.json, "report".'
)
LAYER_MAP = (
  'A row is a layer, a column a part of it. The colour is the share that is left, and '
  'the numbers are heads, groups or channels after the cut: 0 where a layer is removed.'
)
SAMPLES = (
  'The beginnings of texts that training has not seen, and the tokens with which the '
  'networks continue them, the most probable one at each step.'
)
ERASED = (
  'Held-out accuracy against the number of residual units that are erased: right after '
  'erasing, dashed, and retrained.'
)
TRAINING = (
  'Training batches, pale, and their running median; a vertical line is where a stage '
  'begins.'
)
LEARNED = {
  'channels': 'Share of the channels of every layer that are open, over training.',
  'exits': 'Weight of every exit over training; the exit that was kept is marked.',
  'units': 'Weight of every residual unit over training, until it is erased.',
  'connections': 'A disc is an open connection from a tap to a stage, a ring a closed.',
}
ROUNDS = 'Accuracy on held-out examples; FLOPs as part of the whole network.'


def recipe_of(result: Result) -> Recipe:
  """Returns the recipe of the run's method, which says how to report on it."""
  return methods.recipe(result.method)


def target_of(result: Result) -> Target | None:
  """Returns the run's target, the part of a cost that was to be kept, if it had one."""
  return recipe_of(result).target(result.options)


def legend(result: Result) -> str:
  """Explains the columns of the first table."""
  writes = result.cascade is not None and result.cascade.agreement is not None
  return LEGEND_OF_TEXT if writes else recipe_of(result).legend


def title(result: Result) -> str:
  """Returns `resnet20 on digits, seed 0`."""
  seed = '' if result.seed is None else f', seed {result.seed}'
  return f'{result.model} on {result.data}{seed}'


def decided(result: Result) -> str:
  """Says what was requested and decided; for a cascade, what it loses and saves."""
  if result.cascade is not None:
    return _cascade(result, result.cascade)
  sentence = recipe_of(result).sentence
  return sentence(result) if sentence else ''


def question(result: Result) -> str:
  """Returns the page's title: the method, and the question that the run answers."""
  network = f'{result.model} on {result.data}'
  asked_ = recipe_of(result).question(result, network)
  return f'{method_name(result.method)}: {asked_}'


def method_name(method: str) -> str:
  """Returns the name of a method in titles."""
  return methods.recipe(method).name or method.replace('_', ' ').capitalize()


def answer(result: Result) -> str:
  """Returns the page's first paragraph: the decision and the accuracy on test data.

  That is one sentence, and another where the networks were trained differently.
  """
  said = decided(result)
  said = f'{said}; ' if said else ''
  before, after = result.accuracy.before, result.accuracy.after
  if result.cascade is None:
    text = f'{said}{_reached(result)}'
  else:
    own = percent(before, 2)
    original = result.cascade.original.get('test', before)
    if original != before:
      own += f' ({percent(original, 2)} before it was trained with its heads)'
    text = f'{said}test accuracy: MainNet {own}, cascade {percent(after, 2)}.'
  return f'{text[:1].upper()}{text[1:]}'


def _reached(result: Result) -> str:
  """Returns `test accuracy 92.4 % before, 91.8 % after.`, and what it is worth."""
  before, after = result.accuracy.before, result.accuracy.after
  longer = f' {text[:1].upper()}{text[1:]}.' if (text := trained_longer(result)) else ''
  if 'test' in result.control:
    alone = percent(result.control['test'])
    return f'test accuracy {percent(after)}, trained alone for as long {alone}.{longer}'
  start = ''
  if 'test' in result.original:
    start = f' At the start of the run it was {percent(result.original["test"])}.'
  return (
    f'test accuracy {percent(before)} before, {percent(after)} after.{start}{longer}'
  )


def trained_longer(result: Result) -> str:
  """Says by how many epochs the network after was trained longer than that before."""
  if result.epochs is None or not result.epochs.after > result.epochs.before:
    return ''
  more = result.epochs.after - result.epochs.before
  if not math.isfinite(more):
    return ''
  return (
    f'the network after was trained for {more:g} epoch{"" if more == 1 else "s"} more '
    'than that before'
  )


def all_of(result: Result) -> list[str]:
  """Returns the sentences that go with the numbers of a result."""
  cascade = result.cascade
  lines = (
    decided(result),
    *recipe_of(result).remarks(result),
    uncut(result),
    trained_longer(result),
    recalibrated(result),
    *((leaving(cascade), executed(cascade)) if cascade else (proven(result),)),
    one_by_one(cascade) if cascade else '',
    pays_from(cascade) if cascade else '',
    measured_on(result),
  )
  return [line for line in lines if line]


def uncut(result: Result) -> str:
  """Says that nothing was cut, if it is so."""
  costs = result.flops, result.params
  widths = result.widths.values()
  if (
    result.cascade is not None
    or removed(result)
    or any(cost.before != cost.after for cost in costs)
    or any(before != after for before, after in widths)
  ):
    return ''
  return 'nothing was cut: the network has all its layers at their full widths'


def recalibrated(result: Result) -> str:
  """Says what accuracy fresh batch statistics gave; '' if they changed nothing.

  A network without batch statistics is the same before and after that.
  """
  measured = result.accuracy
  accuracy = measured.recalibrated
  if accuracy is None or accuracy == measured.pruned:
    return ''
  later = '' if accuracy == measured.after else ', before any fine-tuning'
  return f'test accuracy with fresh batch statistics{later}: {percent(accuracy)}'


def proven(result: Result) -> str:
  """Says how far the small network was from the masked one."""
  proofs = [each.verify for each in result.rounds if each.verify]
  last = result.verify or result.report.verify
  size = lambda proof: (math.isnan(proof.difference), proof.difference)
  proof = max(proofs, key=size, default=last)
  if not proof:
    return 'the small network was not compared with the masked one'
  text = 'the masked and the small network give the same output'
  if words := not_finite(proof.difference):
    text = f'the difference between the masked and the small network is {words}'
  elif proof.difference:
    text = (
      'largest difference between the masked and the small network: '
      f'{proof.difference:.1e} of the output'
    )
  if proof.settled:
    changed = not_finite(proof.settled) or f'{proof.settled:.1e}'
    text += f'; rounding and emptied branches changed {changed} before it'
  return text


def measured_on(result: Result) -> str:
  """Says on which device times were measured; '' if there are none."""
  race = result.cascade.executed if result.cascade else Executed()
  device = race.device or result.device
  measured = result.latency_ms or result.compile_s or race.ms is not None
  return f'measured on {device}' if measured and device else ''


def layers_timed(result: Result) -> str:
  """Returns what the times of the layers are, '' where they were not measured."""
  if result.layers_batch is None:
    return ''
  return (
    'Time: the convolution or product of a layer alone, a median, in a batch of '
    f'{result.layers_batch:,}. It leaves out what surrounds it, so the layers do not '
    'add up to the latency.'
  )


def removed(result: Result) -> list[str]:
  """Returns the names of the branches and exits that were removed."""
  parts = {**result.report.branches, **result.report.exits}
  return [name for name, kept in parts.items() if not kept]


def notes(result: Result) -> list[str]:
  """Returns all notes of a run, about surgery and timing, each of them once."""
  parts = (result.report, *result.rounds, *result.latency_ms.values())
  return list(dict.fromkeys(note for part in parts for note in part.notes))


# ---- cascades ------------------------------------------------------------------------


def reading(cascade: CascadeResult) -> str:
  """Explains the table of requests."""
  chosen = 'Thresholds come from held-out data'
  if any(request.kind == 'threshold' for request in cascade.requests):
    chosen += ', or are those that were asked for'
  if cascade.agreement is not None:
    return f'{chosen}; reached, changed and saved are of test texts. {UNITS_OF_TEXT}'
  brackets = ''
  if any(request.interval for request in cascade.requests):
    brackets = ', in brackets their 95 % interval (paired bootstrap)'
  return f'{chosen}; reached, lost and saved are of test data{brackets}. {UNITS}'


def leaving(cascade: CascadeResult) -> str:
  """Says that no example leaves early, or that all leave at one exit."""
  shares = cascade.shares
  if set(shares) != set(cascade.exits):
    return ''
  full = [name for name, part in shares.items() if round(part, 9) == 1]
  if not full:
    return ''
  what = 'example' if cascade.agreement is None else 'token'
  if full == cascade.exits[-1:]:
    return f'no test {what} leaves early'
  return f'all test {what}s leave at {full[0]}'


def executed(cascade: CascadeResult) -> str:
  """Says whether examples left at the simulated exits; '' if nothing was executed."""
  run = cascade.executed
  if cascade.agreement is not None and run.accuracy is not None:
    return (
      f'executed token by token on {counted(run.n, "token")} of test texts, with the '
      'keys and values that early exits copy: '
      f'{percent(run.accuracy, 2)} stay the same'
    )
  if run.differ is None or not run.n:
    return ''
  broken = ''
  if run.broken:
    broken = f'; {run.broken:,} had an answer that is not finite, and went on'
  if not run.differ:
    every = 'the one example' if run.n == 1 else f'all {run.n:,} examples'
    return f'executed: {every} left where simulated{broken}'
  return (
    f'executed: {run.differ:,} of {counted(run.n, "example")} left elsewhere than '
    f'simulated, {run.near:,} of them within 1e-5 of a threshold{broken}'
  )


def one_by_one(cascade: CascadeResult) -> str:
  """Says which exits do not pay for a single example; '' if all of them do."""
  one = cascade.executed.one
  if one is not None and one.alone:
    return (
      'one example at a time, the exits cost this device more than they save: such an '
      'example is answered by the network alone'
    )
  if one is None or not one.merged:
    return ''
  return (
    f'one example at a time, to skip what is behind {", ".join(one.merged)} takes this '
    'device as long as to compute it, so it is computed; examples leave there with the '
    'same answers'
  )


def pays_from(cascade: CascadeResult) -> str:
  """Says from which batch size the cascade is faster; '' if few were measured."""
  run = cascade.executed
  if not run.few or run.one is None or run.batch is None:
    return ''
  times = {1: run.one, **{few.batch: few for few in run.few}, run.batch: run}
  sizes = ', '.join(map(str, times))
  slow = [n for n, each in times.items() if each.difference.kind != 'speed-up']
  pays = [n for n in times if n > max(slow, default=0)]
  if not pays:
    return f'the cascade is not faster than the network in batches of {run.batch}'
  return f'the cascade is faster from batches of {pays[0]} on (measured: {sizes})'


def refused(cascade: CascadeResult) -> list[str]:
  """Says why requests cannot be met."""
  return [
    f'{asked(request)} was refused: {request.refused}'
    for request in cascade.requests
    if request.refused
  ]


def certified(cascade: CascadeResult) -> list[str]:
  """Says what is guaranteed for the requests of a risk."""
  certificates = [
    (request, request.test.certificate if request.test else None)
    for request in cascade.requests
  ]
  return [
    f'{asked(request)} holds with probability {percent(1 - c["delta"])} for examples '
    f'drawn as the held-out ones are: {c["losses"]:,} of {c["rows"]:,} that nothing '
    f'was searched on; at most {percent(c["bound"], 2)} for these thresholds alone'
    for request, c in certificates
    if c
  ]


def exits(cascade: CascadeResult) -> str:
  """Explains the table of exits."""
  return EXITS if cascade.agreement is None else EXITS_OF_TEXT


def cut_heads(cascade: CascadeResult) -> str:
  """Says which heads the saved cascade no longer has, although the tables do."""
  left = {stage['exit'] for stage in cascade.stages}
  gone = [name for name in cascade.exits if name not in left]
  if not left or not gone:
    return ''
  verb = 'is' if len(gone) == 1 else 'are'
  return (
    f'Nobody leaves at {", ".join(gone)}, which {verb} cut away: the saved cascade '
    'costs a little less than the tables, where every head is paid for.'
  )


def asked(request: RequestResult) -> str:
  """Returns a request as `drop ≤ 0.5`, `cost ≤ 67 %`, `time ≤ 0.8 ms` and so on."""
  kind, value = request.kind, request.requested
  if kind == 'threshold':
    return f'threshold {value:g}'
  shown = {'drop': f'{value:g}', 'milliseconds': f'{value:g} ms'}
  return f'{KINDS[kind]} ≤ {shown.get(kind, share(value))}'


def reached(request: RequestResult) -> str:
  """Returns what was reached in the unit of the request, and whether it was missed."""
  test = request.test
  values: Mapping[str, Any] = {}
  if test is not None:
    values = {
      'drop': test.drop,
      'budget': 1 - test.saved,
      'risk': test.risk,
      'milliseconds': test.milliseconds,
    }
  value = values.get(request.kind)
  if value is None:
    return NONE
  shown = {'drop': lost_points(value), 'milliseconds': milliseconds(value)}
  text = shown.get(request.kind, percent(value, 2))
  return f'{text}, missed' if misses(value, request) else text


def misses(value: float, request: RequestResult) -> bool:
  """Returns whether a value is above the requested one, or is not a number."""
  return not value <= request.requested + 1e-9


def lost_points(drop: float | None) -> str:
  """Returns points of accuracy that are lost, `-0.06` for a gain."""
  if drop is None:
    return NONE
  return f'{drop:z.2f}' if math.isfinite(drop) else percent(drop)


def share(part: float) -> str:
  """Returns `50 %` for 0.5."""
  return f'{100 * part:g} %'


def points(number: float) -> str:
  """Returns 'point' or 'points', as a number of percentage points needs it."""
  return 'point' if 0 < number <= 1 else 'points'


def _cascade(result: Result, cascade: CascadeResult) -> str:
  """Returns `asked to lose at most 0.5 point: loses 0.31 point and saves ...`."""
  writes = cascade.agreement is not None
  lost, kept = _changed(cascade) if writes else _lost(result), result.flops.kept
  reached_ = f'{lost} and {_saved(kept)}'
  chosen: Sequence[RequestResult] = [r for r in cascade.requests if r.chosen]
  if not chosen:
    return reached_
  request = chosen[0]
  kind, value = request.kind, request.requested
  if request.refused:
    return f'asked for {asked(request)}, which was refused: {reached_}'
  if kind == 'budget':
    missed = ', which misses it' * misses(kept, request)
    return (
      f'asked to spend at most {share(value)} of the FLOPs: spends '
      f'{percent(kept)}{missed}, and {lost}'
    )
  if kind == 'risk':
    return (
      f'asked to be wrong where the MainNet is right in at most {share(value)} of the '
      f'examples: is so in {reached(request)}, {reached_}'
    )
  if kind == 'threshold':
    return f'asked for a {asked(request)}: {reached_}'
  if kind == 'milliseconds':
    took = reached(request)
    return f'asked to take at most {value:g} ms an example: takes {took}, and {lost}'
  if writes:
    drop = 100 * (1 - _number(cascade.agreement))
    limit = f'change at most {value:g} % of the tokens'
  else:
    drop = 100 * (result.accuracy.before - _number(result.accuracy.after))
    limit = f'lose at most {value:g} {points(value)}'
  missed = ', which misses it,' * misses(drop, request)
  return f'asked to {limit}: {lost}{missed} and {_saved(kept)}'


def _number(value: float | None) -> float:
  return math.nan if value is None else value


def _lost(result: Result) -> str:
  """Returns `loses 0.31 point`, `gains 0.06 point`, or `loses no accuracy`."""
  lost = 100 * (result.accuracy.before - _number(result.accuracy.after))
  if not math.isfinite(lost):
    return 'loses an unknown part of its accuracy'
  size = abs(round(lost, 2))
  if not size:
    return 'loses no accuracy'
  return f'{"loses" if lost > 0 else "gains"} {size:.2f} {points(size)}'


def _changed(cascade: CascadeResult) -> str:
  """Returns `changes 0.43 % of the tokens`, for a language model."""
  changed = 1 - _number(cascade.agreement)
  if not math.isfinite(changed):
    return 'changes an unknown part of the tokens'
  return (
    f'changes {percent(changed, 2)} of the tokens' if changed else 'changes no token'
  )


def _saved(kept: float) -> str:
  """Returns `saves 35.2 % of the FLOPs`, or `spends 1.2 % more FLOPs`."""
  if not math.isfinite(kept):
    return 'saves an unknown part of the FLOPs'
  size = percent(abs(1 - kept))
  if size == percent(0):
    return 'saves no FLOPs'
  return f'spends {size} more FLOPs' if kept > 1 else f'saves {size} of the FLOPs'
