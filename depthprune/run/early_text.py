"""A complete run of a method with early exits on a language model.

Heads are trained on the frozen network, which runs for every batch: the features of all
tokens would fill the disk. Held-out texts decide at which exits tokens leave and above
which thresholds; test texts only measure what that reaches. A token counts as changed
if the exit at which it leaves predicts another next token than the whole network.
"""

import dataclasses
import itertools
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np

from depthprune import distributed, methods
from depthprune.cascades import pareto, thresholds
from depthprune.cascades.generation import early_answers, exit_predictions, exits_of
from depthprune.cascades.predictions import Measured, Predictions, drop, measure, saved
from depthprune.data.dataset import DataError, count
from depthprune.exports.exits import save_exits
from depthprune.program.coupling import couple
from depthprune.run import data
from depthprune.run.early_exit import (
  choose,
  choose_held_out,
  on_curve,
  plain,
  rows_of,
)
from depthprune.run.heads import (
  cascade_plan,
  in_order,
  trained_before,
  with_sides,
  with_trunk,
)
from depthprune.run.job import Job, record_config, stage
from depthprune.run.network import initial_variables, network
from depthprune.run.result import described, finite
from depthprune.run.samples import early_samples
from depthprune.surgery.prune import Pruned, prune
from depthprune.train.result import Result, from_json

# Further requests that the report shows beside the run's own: percent of the tokens
# that change, and parts of the network's FLOPs.
ALSO = {'drop': (0.5, 1.0, 2.0, 5.0), 'budget': (0.7, 0.8, 0.9)}
MANY = 5  # up to so many exits, all subsets are tried
EXECUTED = 16  # at most so many test texts are read with exits executed

Limits = Mapping[str, float]  # {exit: threshold} of the exits that are used


def run(job: Job) -> Result:
  """Trains heads, chooses thresholds, measures and saves the network in `exits/`.

  Raises:
    DataError: there are too few texts.
    ValueError: the request cannot be met.
  """
  config, plan = job.config, cascade_plan(job.config)
  job = choose_held_out(job)
  if not count(job.images.held_out):
    raise DataError(
      f'data {config.data!r}: expected two rows of test texts or more, half of which '
      f'decide, got {count(job.images.test)}: add texts, or shorten --length'
    )
  trunk = network(config, job.images.classes, *job.inputs)
  variables = initial_variables(job, trunk)
  model = with_sides(plan, trunk, job)
  record_config(job)
  variables = trained_before(job, trunk, variables)
  whole = job.scores(trunk)(variables, job.images.test)
  variables = with_trunk(job, model, variables)
  state = stage(
    job._replace(config=dataclasses.replace(config, optimizer='adamw')),
    'heads',
    model,
    methods.build(config.options, couple(model, variables, *job.inputs), stage='heads'),
    variables,
    epochs=config.epochs.gates,
    peak=plan.head_learning_rate,
  )
  names = in_order(model)[:-1]
  held_out, test = (
    exit_predictions(
      model, state.variables, split['image'], names, split['label'], plan.confidence
    )
    for split in (job.images.held_out, job.images.test)
  )
  kind, requested = plan.request
  used = decide(agreeing(held_out), kind, requested, plan.shared_threshold)
  keep = {'exits': {name: name in used for name in names}}
  pruned = prune(model, state.variables, keep, job.inputs)
  size = lambda tree: sum(x.size for x in jax.tree.leaves(tree))
  values = {
    **described(job),
    **measured(job, used, held_out, test),
    'params': {
      'before': size(state.params['trunk']),
      'after': size(pruned.variables['params']),
    },
    'scores': {'before': finite(whole)},
  }
  values['cascade']['taps'] = exits_of(model)
  values['cascade']['executed'] = executed(job, pruned, used)
  if distributed.writes():
    values['samples'] = early_samples(
      job, pruned.model, pruned.variables, used, plan.confidence
    )
  tokenizer = data.writing(config)
  save_exits(job.folder / 'exits', pruned, used, plan.confidence, tokenizer)
  return from_json(values)


def agreeing(p: Predictions) -> Predictions:
  """Returns predictions with the answers of the network itself as labels."""
  return p._replace(labels=p.logits[-1].argmax(-1))


# ---- decisions -----------------------------------------------------------------------


def among(p: Predictions, names: tuple[str, ...]) -> Predictions:
  """Returns the predictions of a network that has only these of its exits.

  A token pays for the heads that it passes; all of them cost the same.
  """
  rows = [i for i, name in enumerate(p.exits) if name in (*names, 'main')]
  head = (p.cost[-1] - p.whole) / (len(p.exits) - 1)
  absent = np.array([i - k for k, i in enumerate(rows)])  # heads before each exit
  return p._replace(
    exits=tuple(p.exits[i] for i in rows),
    logits=p.logits[rows],
    scores=p.scores[rows[:-1]],
    cost=p.cost[rows] - head * absent,
  )


def subsets(p: Predictions) -> Iterator[tuple[str, ...]]:
  """Yields the subsets of exits to try; of many exits, only singles, pairs and all."""
  names = p.exits[:-1]
  sizes = range(1, len(names) + 1) if len(names) <= MANY else (1, 2, len(names))
  for size in sizes:
    yield from itertools.combinations(names, size)


def reach(p: Predictions, limits: Limits) -> tuple[Predictions, Measured]:
  """Returns the predictions of the exits that are used, and what they reach."""
  if not limits:  # the network alone
    own = measure(p, np.full(p.scores.shape[1], len(p.exits) - 1))
    return p, own._replace(cost=p.whole)
  part = among(p, tuple(limits))
  return part, thresholds.measured(np.array([*limits.values()], np.float32), part)


def decide(p: Predictions, kind: str, requested: float, shared: bool) -> Limits:
  """Chooses exits and their thresholds for a request.

  Args:
    p: predictions on held-out texts, whose labels are the network's own answers.
    kind: 'drop' in percent of the tokens that change, 'budget' as a part of the FLOPs,
      or 'threshold'.
    requested: its value.
    shared: whether all exits have the same threshold.

  Returns:
    {exit: threshold}; {} if a drop is asked for and no exits save FLOPs.

  Raises:
    ValueError: no exits cost as little as the budget.
  """
  if kind == 'threshold':
    return dict.fromkeys(p.exits[:-1], requested)
  found: list[Limits] = [{}]
  refused = None
  for names in subsets(p):
    part = among(p, names)
    try:
      chosen = choose(part, kind, requested, shared=shared)
    except ValueError as error:
      refused = error
      continue
    pairs = zip(names, chosen.thresholds.tolist(), strict=True)
    found.append({name: limit for name, limit in pairs if limit < np.inf})

  reached = [(limits, reach(p, limits)[1]) for limits in found]
  if kind == 'drop':
    return min(reached, key=lambda one: one[1].cost)[0]
  allowed = [one for one in reached if one[1].cost <= requested * p.whole]
  if not allowed and refused is not None:
    raise refused
  return min(allowed, key=lambda one: (-one[1].accuracy, one[1].cost))[0]


# ---- on test texts -------------------------------------------------------------------


def measured(
  job: Job, used: Limits, held_out: Predictions, test: Predictions
) -> dict[str, Any]:
  """Returns what exits reach, as entries of result.json.

  Args:
    job: the run.
    used: the exits that are used, with their thresholds.
    held_out: predictions on held-out texts, whose labels are the next tokens.
    test: the same on test texts.
  """
  plan = cascade_plan(job.config)
  decides, reports = agreeing(held_out), agreeing(test)
  accuracies = {
    name: {'before': reach(p, {})[1].accuracy, 'after': reach(p, used)[1].accuracy}
    for name, p in (('accuracy', test), ('held_out', held_out))
  }
  part, reached = reach(reports, used)
  shares = {**dict.fromkeys(test.exits, 0.0), **dict(zip(part.exits, reached.exits))}
  right = (reports.logits.argmax(-1) == reports.labels).mean(-1)
  return {
    **accuracies,
    'flops': {'before': test.whole, 'after': reached.cost},
    'widths': {},
    'rounds': [],
    'report': {},
    'cascade': {
      'exits': list(test.exits),
      'cost': dict(zip(test.exits, test.cost.tolist())),
      'whole': test.whole,
      'exit_accuracy': dict(zip(test.exits, right.tolist())),
      'curve': curve(decides, reports),
      'thresholds': {name: plain(used.get(name, np.inf)) for name in test.exits[:-1]},
      'shares': shares,
      'requests': requests(
        decides, reports, used, *plan.request, plan.shared_threshold
      ),
      'confidence': plan.confidence,
      'agreement': reached.accuracy,
    },
  }


def executed(job: Job, pruned: Pruned, used: Limits) -> dict[str, Any]:
  """Measures which part of the tokens of test texts stays the same, exits executed.

  Tokens after one that left early attend to its copied keys and values.
  """
  texts = job.images.test['image'][:EXECUTED]
  own = pruned.model, pruned.variables
  confidence = cascade_plan(job.config).confidence
  answers, _ = early_answers(*own, texts, used, confidence)
  whole = jax.jit(pruned.model.apply)(pruned.variables, texts)['main'].argmax(-1)
  return {'n': texts.size, 'accuracy': float((answers == whole).mean())}


def curve(held_out: Predictions, test: Predictions) -> list[dict[str, float]]:
  """Returns what efficient exits and thresholds reach, those of highest cost first."""
  tried: list[Limits] = [{}]
  for names in subsets(held_out):
    for point in pareto.alike(among(held_out, names), points=40):
      pairs = zip(names, point.thresholds.tolist(), strict=True)
      tried.append({name: limit for name, limit in pairs if limit < np.inf})
  points = [(limits, reach(held_out, limits)[1]) for limits in tried]
  points = pareto.efficient(points, lambda point: (point[1].cost, -point[1].accuracy))
  points = sorted(points, key=lambda point: -point[1].cost)
  return [on_curve(held, reach(test, limits)[1]) for limits, held in points]


def requests(
  held_out: Predictions,
  test: Predictions,
  used: Limits,
  kind: str,
  requested: float,
  shared: bool,
) -> list[dict[str, Any]]:
  """Returns requested and reached values of the run's request and of those in ALSO."""
  mine = kind, requested

  def reached(kind: str, value: float) -> dict[str, Any]:
    is_mine = (kind, value) == mine
    limits = used if is_mine else decide(held_out, kind, value, shared)
    held, tested = (reach(p, limits)[1] for p in (held_out, test))
    return {
      'held_out': {'accuracy': held.accuracy, 'cost': held.cost},
      'test': {
        'accuracy': tested.accuracy,
        'cost': tested.cost,
        'drop': drop(tested, test),
        'saved': saved(tested, test),
      },
    }

  return rows_of(ALSO, mine, reached)
