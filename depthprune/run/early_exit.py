"""A complete run of a method with early exits, which makes a cascade of a network.

Heads are trained (`run.heads`), held-out data decides temperatures and thresholds, and
the exits that are used become the cascade that is saved. Test data shows what it
reaches, and decides nothing.
"""

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from depthprune import distributed
from depthprune.cascades import calibration, pareto, thresholds
from depthprune.cascades import confidence as sure
from depthprune.cascades.cascade import Cascade, cascade
from depthprune.cascades.predictions import (
  Measured,
  Predictions,
  drop,
  leave,
  losses,
  saved,
  scored,
)
from depthprune.cascades.race import exit_milliseconds, merge, race
from depthprune.cascades.risk import halves
from depthprune.cascades.thresholds import Choice
from depthprune.data.corpus import Corpus
from depthprune.data.dataset import DataError, count, inputs_of, real_rows
from depthprune.exports.networks import save_cascade
from depthprune.program.stages import Stages, split
from depthprune.run.heads import Answers, Trained, cascade_plan, train
from depthprune.run.job import Job, record_config
from depthprune.run.result import described
from depthprune.surgery.prune import Pruned, prune
from depthprune.timing import latency
from depthprune.train.result import Result, SmallBatch, from_json
from depthprune.train.task import Tree

# Further requests that the report shows beside the run's own: points of accuracy, parts
# of the network's FLOPs, and parts of all examples.
ALSO = {
  'drop': (0.0, 0.25, 0.5, 1.0, 2.0),
  'budget': (0.5, 0.65, 0.8),
  'risk': (0.01, 0.02, 0.05),
}


class Decided(NamedTuple):
  """The decisions of the held-out data.

  Attributes:
    stages: stages of the network with all heads.
    temperatures: float32 [exits - 1].
    weights: weights of a learned confidence, [exits - 1, 4], else None.
    kind: kind of the run's request.
    requested: value of the run's request.
    chosen: the thresholds for it.
    held_out: answers and confidence of every exit on held-out data; costs in FLOPs.
    test: the same on test data.
    metric: what may drop.
    shared: whether all exits have the same threshold.
  """

  stages: Stages
  temperatures: np.ndarray
  weights: np.ndarray | None
  kind: str
  requested: float
  chosen: Choice
  held_out: Predictions
  test: Predictions
  metric: str = 'accuracy'
  shared: bool = False


def run(job: Job) -> Result:
  """Trains heads, decides thresholds, measures the cascade and saves it in `cascade/`.

  Raises:
    DataError: the data has no single class per example.
    ValueError: the request cannot be met.
  """
  if len(job.labels) != 1:
    raise DataError(
      f'data {job.images.name!r}: a cascade tells one class per example, got labels '
      f'{list(job.labels)}: use another method, or a data set with one class each'
    )
  job = choose_held_out(job)
  record_config(job)
  trained = train(job)
  decided = decide(job, trained)
  pruned, early = assembled(job, trained, decided)
  reached = measure(job, trained, decided, pruned, early)
  tokenizer = job.images.tokenizer
  save_cascade(
    job.folder / 'cascade', early, pruned, job.images.normalisation, tokenizer
  )
  return from_json(reached)


def choose_held_out(job: Job) -> Job:
  """Returns the job with half of the test data held out, if the options ask for it.

  For a language model 'auto' keeps the held-out texts, which its heads have not seen.
  """
  config, test = job.config, job.images.test
  asked = cascade_plan(config).decide_on
  pretrained = config.pretrained is not None and not config.epochs.train
  seen = pretrained and not isinstance(job.images, Corpus)
  if asked == 'train' or (asked == 'auto' and not seen):
    return job
  half = count(test) // 2
  part = lambda rows: {name: values[rows] for name, values in test.items()}
  first, second = part(slice(half)), part(slice(half, None))
  return job._replace(images=job.images._replace(held_out=first, test=second))


def decide(job: Job, trained: Trained) -> Decided:
  """Decides temperatures and thresholds for the run's request on held-out data.

  Temperatures are fitted only on the half on which thresholds for a certified risk are
  searched, so that the half that certifies has decided nothing. An example for which an
  exit's answer is not finite never leaves there, and does not count for that exit.

  Raises:
    ValueError: the budget or the risk cannot be met.
  """
  plan, held_out = cascade_plan(job.config), trained.held_out
  stages = split(trained.model, trained.variables, *job.inputs, exits=trained.exits)
  some, _ = halves(len(held_out.labels))
  part = Answers(held_out.logits[:, some], held_out.labels[some])
  scale = np.ones(len(part.logits) - 1, np.float32)
  for i, logits in enumerate(part.logits[:-1]):
    finite, labels = calibration.finite(logits, part.labels)
    if len(labels):
      scale[i] = calibration.temperature(finite, labels)
  tempered = lambda logits: logits / np.append(scale, np.float32(1))[:, None, None]
  weights = None
  if plan.confidence == 'learned':
    weights = sure.learn(tempered(part.logits), part.labels)

  def predict(answers: Answers, examples: Tree) -> Predictions:
    scores = sure.scores(plan.confidence, tempered(answers.logits), weights)
    cost, whole = costs(job, stages, examples)
    logits, labels = answers
    return Predictions(trained.exits, logits, labels, scores, cost, whole)

  decides = predict(held_out, job.images.held_out)
  reports = predict(trained.test, job.images.test)
  kind, requested = plan.request
  priced = decides
  if kind == 'milliseconds':
    early = cascade(
      trained.model, trained.variables, *job.inputs,
      exits=trained.exits, confidence=plan.confidence, weights=weights,
    )  # fmt: skip
    cost, whole = distributed.agreed(exit_milliseconds(early, *typical_inputs(job)))
    priced = decides._replace(cost=cost, whole=float(whole))
  metric = job.config.metric or 'accuracy'
  shared = plan.shared_threshold
  chosen = choose(priced, kind, requested, plan.delta, metric, shared)
  request = kind, requested, chosen
  return Decided(stages, scale, weights, *request, decides, reports, metric, shared)


def typical_inputs(job: Job) -> tuple:
  """Returns the inputs of a test batch of the most frequent shape."""
  by_shape: dict[tuple, list[tuple]] = {}
  for batch in _shapes(job, job.images.test):
    inputs = inputs_of(batch)
    same = by_shape.setdefault(tuple(x.shape for x in inputs), [])
    same.append(() if same else inputs)  # only the first of a shape stays in memory
  return max(by_shape.values(), key=len)[0]


def _shapes(job: Job, split: Tree) -> Iterator[Tree]:
  """Yields a split's batches for their shapes; one is enough of streamed images."""
  batches = job.own_batches(split)
  return itertools.islice(batches, 1) if job.images.streamed else batches


def costs(job: Job, stages: Stages, examples: Tree) -> tuple[np.ndarray, float]:
  """Returns mean FLOPs of leaving at each exit [exits], and of the network alone.

  Texts are as long as their batch, so each length has its own costs.
  """
  total, count = np.zeros(len(stages) + 1), 0
  for batch in _shapes(job, examples):
    real = int(real_rows(batch).sum())
    here = stages.again(*inputs_of(batch))
    total += real * np.array([*here.flops, here.whole], np.float64)
    count += real
  return total[:-1] / count, float(total[-1] / count)


def choose(
  p: Predictions,
  kind: str,
  requested: float,
  delta: float = 0.05,
  metric: str = 'accuracy',
  shared: bool = False,
) -> Choice:
  """Chooses thresholds for a request.

  Args:
    p: predictions on held-out data; costs in milliseconds for such a request.
    kind: kind of the request, as in `CascadePlan.request`.
    requested: its value.
    delta: probability with which the guarantee of a risk may fail.
    metric: what may drop, or is best within a budget; see `thresholds.for_drop`.
    shared: whether all exits have the same threshold, for a drop or a budget.

  Raises:
    ValueError: the request cannot be met.
  """
  alike: Any = {'metric': metric, 'shared': shared}
  ways: dict[str, Callable[[], Choice]] = {
    'drop': lambda: thresholds.for_drop(p, requested, **alike),
    'budget': lambda: thresholds.for_budget(p, requested * p.whole, **alike),
    'milliseconds': lambda: thresholds.for_budget(p, requested, **alike),
    'threshold': lambda: thresholds.fixed(p, requested),
    'risk': lambda: thresholds.for_risk(p, requested, delta),
  }
  return ways[kind]()


ONE = {f.name for f in dataclasses.fields(SmallBatch)}
FEW = 8, 32  # batches in between
SECONDS = 2.0  # for each of the measurements of small batches
NEAR = 1e-5  # a decision closer to its threshold than this may go either way


def assembled(job: Job, trained: Trained, decided: Decided) -> tuple[Pruned, Cascade]:
  """Cuts the exits at which no examples leave, and makes the cascade of the others.

  If no exit is used, the deepest stays, with a threshold that no example passes. If the
  confidence is patience all exits stay, as it counts exits that agree.

  Returns:
    (the cut network, its cascade).
  """
  early, taken = trained.exits[:-1], np.isfinite(decided.chosen.thresholds)
  taken |= decided.chosen.thresholds < 0
  if cascade_plan(job.config).confidence == 'patience':
    taken[:] = True
  if not taken.any():
    taken[-1] = True
  model, variables = trained.model, trained.variables
  keep = {'exits': {name: bool(kept) for name, kept in zip(early, taken)}}
  pruned = prune(model, variables, keep, job.inputs)
  of = lambda values: {e: float(v) for e, v, k in zip(early, values, taken) if k}
  weights = decided.weights
  return pruned, cascade(
    pruned.apply,
    pruned.variables,
    *job.inputs,
    thresholds=of(decided.chosen.thresholds),
    exits=(*of(taken), 'main'),
    temperatures=of(decided.temperatures),
    confidence=cascade_plan(job.config).confidence,
    weights=None if weights is None else weights[taken],
  )


# ---- on test data --------------------------------------------------------------------


def measure(
  job: Job, trained: Trained, decided: Decided, pruned: Pruned, early: Cascade
) -> dict[str, Any]:
  """Returns the content of result.json, except for the time of the run."""
  executed = execute(job, decided, early)
  chosen = thresholds.measured(decided.chosen, decided.held_out)
  size = lambda tree: sum(x.size for x in jax.tree.leaves(tree))
  return {
    **described(job),
    'accuracy': {'before': trained.test.accuracy, 'after': executed['accuracy']},
    'held_out': {'before': trained.held_out.accuracy, 'after': chosen.accuracy},
    'flops': {'before': executed['whole'], 'after': executed['ideal']},
    'params': {
      'before': size(trained.variables['params']['trunk']),
      'after': size(pruned.variables['params']),
    },
    'scores': scores_of(decided),
    'widths': {},
    'rounds': [],
    'report': {},
    'cascade': {
      **structure(decided, trained, early),
      'original': trained.original,
      **behaviour(decided, executed['ms'] / executed['batch']),
      'executed': executed,
    },
  }


def scores_of(decided: Decided) -> dict[str, dict[str, float]]:
  """Returns the metric that decided on test data, of the network and the cascade."""
  p, metric = decided.test, decided.metric
  if metric == 'accuracy':
    return {}
  alone = np.full(p.scores.shape[1], len(p.exits) - 1)
  left = leave(p.scores, decided.chosen.thresholds)
  return {
    when: {metric: scored(p, of, metric)}
    for when, of in (('before', alone), ('after', left))
  }


def structure(decided: Decided, trained: Trained, early: Cascade) -> dict[str, Any]:
  """Describes the network with all its heads, and the stages of the cascade."""
  heads = trained.model.heads
  text = lambda c: f'{np.dtype(c.dtype).name}[{",".join(map(str, c.shape))}]'
  stages = [
    {**s._asdict(), 'crossing': [text(c) for c in s.crossing]} for s in early.stages
  ]
  names = trained.exits
  return {
    'exits': list(names),
    'taps': {name: heads[name].reads[-1] for name in names[:-1]},
    'stages': stages,
    'cost': dict(zip(names, decided.test.cost.tolist())),
    'whole': decided.test.whole,
    'confidence': early.confidence,
    'thresholds': dict(zip(names, map(plain, decided.chosen.thresholds.tolist()))),
    'temperatures': dict(zip(names, decided.temperatures.tolist())),
  }


def behaviour(decided: Decided, milliseconds: float) -> dict[str, Any]:
  """Describes what thresholds reach on test data, and how calibrated the exits are.

  Args:
    decided: the decisions of the held-out data.
    milliseconds: measured time of an example in the chosen cascade.
  """
  p, chosen = decided.test, decided.chosen
  achieved = thresholds.achieved(chosen, p)
  right = (p.logits.argmax(-1) == p.labels).mean(-1)
  scale = np.append(decided.temperatures, np.float32(1))
  left = leave(p.scores, chosen.thresholds)
  return {
    'exit_accuracy': dict(zip(p.exits, right.tolist())),
    'shares': dict(zip(p.exits, achieved.exits)),
    'curve': curve(decided),
    'requests': requests(decided, milliseconds),
    'calibration': calibration.report(p.logits, p.labels, left, scale, p.exits),
  }


def curve(decided: Decided) -> list[dict[str, float]]:
  """Returns what the efficient thresholds reach on both splits, most costly first."""
  if decided.shared:
    points = pareto.efficient(
      pareto.alike(decided.held_out, points=40),
      lambda q: (q.measured.cost, q.risk),
    )
  else:
    points = thresholds.front(decided.held_out)
  lines = []
  for point in sorted(points, key=lambda p: -p.measured.cost):
    test = thresholds.measured(point.thresholds, decided.test)
    lines.append(on_curve(point.measured, test))
  return lines


def on_curve(held_out: Measured, test: Measured) -> dict[str, float]:
  """Returns a point of a curve: what thresholds reach on both splits."""
  return {
    'cost_held_out': held_out.cost,
    'accuracy_held_out': held_out.accuracy,
    'cost': test.cost,
    'accuracy': test.accuracy,
  }


def requests(decided: Decided, milliseconds: float) -> list[dict[str, Any]]:
  """Returns requested and reached values of the run's request and of those in ALSO."""
  mine = decided.kind, decided.requested

  def reach(kind: str, value: float) -> dict[str, Any]:
    choice = decided.chosen
    if (kind, value) != mine:
      how = {'metric': decided.metric, 'shared': decided.shared}
      choice = choose(decided.held_out, kind, value, **how)
    row = outcome(decided, choice)
    if kind == 'milliseconds':
      row['test'] |= {'milliseconds': milliseconds}
    return row

  return rows_of(ALSO, mine, reach)


def rows_of(
  also: Mapping[str, Sequence[float]],
  mine: tuple[str, float],
  reach: Callable[[str, float], dict[str, Any]],
) -> list[dict[str, Any]]:
  """Returns a row for the run's request, and for others that the report shows.

  Args:
    also: {kind: values} of the others.
    mine: kind and value of the run's own request.
    reach: (kind, value) -> 'held_out', 'test' and perhaps 'interval', or ValueError
      where such a request cannot be met.
  """
  asked = [(kind, value) for kind, values in also.items() for value in values]
  rows = []
  for kind, value in asked if mine in asked else [mine, *asked]:
    row: dict[str, Any] = {'kind': kind, 'requested': value, 'refused': None}
    row['chosen'] = (kind, value) == mine
    try:
      row |= reach(kind, value)
    except ValueError as error:
      row |= {'refused': str(error), 'held_out': None, 'test': None, 'interval': None}
    rows.append(row)
  return rows


def outcome(decided: Decided, choice: Choice) -> dict[str, Any]:
  """Returns what thresholds reach on held-out data and on test data."""
  p = decided.test
  test = thresholds.achieved(choice, p)
  reached = {
    'accuracy': test.accuracy,
    'cost': test.cost,
    'drop': drop(test, p),
    'saved': saved(test, p),
  }
  if choice.risk is not None:
    left = leave(p.scores, choice.thresholds)
    gap = losses(p, choice.risk.loss)[left, np.arange(len(left))]
    reached |= {'risk': float(gap.mean()), 'certificate': choice.risk._asdict()}
  here = thresholds.measured(choice, decided.held_out)
  held_out = {'accuracy': here.accuracy, 'cost': here.cost}
  interval = thresholds.bootstrap(choice, p)._asdict()
  interval = {name: list(ends) for name, ends in interval.items()}
  return {'held_out': held_out, 'test': reached, 'interval': interval}


def execute(job: Job, decided: Decided, early: Cascade) -> dict[str, Any]:
  """Runs the cascade on test data, compares it with the simulation, and times it."""
  p, names = decided.test, early.exits[:-1]
  rows = [decided.test.exits.index(name) for name in names]
  expected = leave(p.scores[rows], early.thresholds)
  gap = np.abs(p.scores[rows] - early.thresholds[:, None]).min(0)
  # The race comes first, because it also measures the time to compile the cascade.
  typical = typical_inputs(job)
  timed = race(early, *typical)
  merged = merge(early, *typical, batch=1, seconds=SECONDS)

  def small(cascade: Cascade, size: int) -> dict[str, Any]:
    times = race(cascade, *typical, batch=size, seconds=SECONDS).to_json()
    return {name: value for name, value in times.items() if name in ONE}

  left, right, costs = [], [], []
  for batch in job.own_batches(job.images.test):
    inputs, label = inputs_of(batch), np.asarray(batch['label'])
    real = real_rows(batch)
    answer = early(*inputs)
    left.append(np.asarray(answer.exit)[real])
    right.append((np.asarray(answer.logits.argmax(-1)) == label)[real])
    cost = early.cost(answer._replace(exit=left[-1]), *inputs)
    costs.append((len(left[-1]), *cost))
  n, ideal, padded, whole = np.array(costs).T
  differ = np.concatenate(left) != expected
  before = np.arange(len(rows))[:, None] < expected  # exits that an example passed
  stayed = before & np.isnan(p.scores[rows])
  return {
    **timed.to_json(),
    'ideal': float(n @ ideal / n.sum()),
    'padded': float(n @ padded / n.sum()),
    'whole': float(n @ whole / n.sum()),
    'accuracy': float(np.concatenate(right).mean()),
    'differ': int(differ.sum()),
    'near': int((differ & (gap < NEAR)).sum()),
    'n': len(differ),
    'broken': int(stayed.any(0).sum()),
    'one': {
      **small(merged, 1),
      'merged': list(merged.merged[1] or ()),
      'alone': merged.merged[1] is None,
    },
    'few': [small(early, size) for size in FEW if size < timed.batch],
    'device': latency.device(),
  }


def plain(value: float) -> float | None:
  """Returns a threshold as result.json has it: None where no example leaves."""
  return value if math.isfinite(value) else None
