"""What a cascade reached, measured on test data: the `cascade` part of result.json."""

import math
from typing import Any

import jax
import numpy as np

from depthprune.inference import calibration, latency, thresholds
from depthprune.inference.cascade import Cascade
from depthprune.inference.choice import Choice
from depthprune.inference.predictions import drop, leave, losses, saved
from depthprune.inference.race import race
from depthprune.surgery.cut import Pruned
from depthprune.training.deciding import ALSO, Decided, choose, usual
from depthprune.training.method import inputs_of, real_rows
from depthprune.training.results import described
from depthprune.training.sides import Trained
from depthprune.training.stage import Job

NEAR = 1e-5  # a decision closer to its threshold than this may go either way


def measure(
  job: Job, trained: Trained, decided: Decided, pruned: Pruned, early: Cascade
) -> dict[str, Any]:
  """Everything that result.json says, but for the time it took."""
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


def structure(decided: Decided, trained: Trained, early: Cascade) -> dict[str, Any]:
  """What the network with all its heads is, and the stages of the cascade left."""
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
    'thresholds': dict(zip(names, map(_plain, decided.chosen.thresholds.tolist()))),
    'temperatures': dict(zip(names, decided.temperatures.tolist())),
  }


def behaviour(decided: Decided, milliseconds: float) -> dict[str, Any]:
  """What the thresholds, and others, do on test data; how calibrated the exits are.

  milliseconds: of an example of the chosen cascade, executed.
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
  """The efficient thresholds of the held-out data, on both splits, dearest first."""
  points = thresholds.front(decided.held_out)
  lines = []
  for point in sorted(points, key=lambda p: -p.measured.cost):
    test = thresholds.measured(point.thresholds, decided.test)
    lines.append(
      {
        'cost_held_out': point.measured.cost,
        'accuracy_held_out': point.measured.accuracy,
        'cost': test.cost,
        'accuracy': test.accuracy,
      }
    )
  return lines


def requests(decided: Decided, milliseconds: float) -> list[dict[str, Any]]:
  """Requested against reached, for what was asked and for what else may be."""
  asked = [(kind, value) for kind, values in ALSO.items() for value in values]
  mine = decided.kind, decided.requested
  rows = []
  for kind, value in asked if mine in asked else [mine, *asked]:
    row: dict[str, Any] = {'kind': kind, 'requested': value}
    is_mine = (kind, value) == mine
    row |= {'chosen': is_mine, 'refused': None}
    try:
      found = decided.chosen if is_mine else choose(decided.held_out, kind, value)
      row |= outcome(decided, found)
      if kind == 'milliseconds':
        row['test'] |= {'milliseconds': milliseconds}
    except ValueError as error:
      row |= {'refused': str(error), 'held_out': None, 'test': None, 'interval': None}
    rows.append(row)
  return rows


def outcome(decided: Decided, found: Choice) -> dict[str, Any]:
  """What a choice gave where it was made, and gives on test data."""
  p = decided.test
  test = thresholds.achieved(found, p)
  reached = {
    'accuracy': test.accuracy,
    'cost': test.cost,
    'drop': drop(test, p),
    'saved': saved(test, p),
  }
  if found.risk is not None:
    left = leave(p.scores, found.thresholds)
    gap = losses(p, found.risk.loss)[left, np.arange(len(left))]
    reached |= {'risk': float(gap.mean()), 'certificate': found.risk._asdict()}
  here = thresholds.measured(found, decided.held_out)
  held_out = {'accuracy': here.accuracy, 'cost': here.cost}
  interval = thresholds.bootstrap(found, p)._asdict()
  interval = {name: list(ends) for name, ends in interval.items()}
  return {'held_out': held_out, 'test': reached, 'interval': interval}


def execute(job: Job, decided: Decided, early: Cascade) -> dict[str, Any]:
  """The cascade run on the test data, beside what was simulated, and timed."""
  p, names = decided.test, early.exits[:-1]
  rows = [decided.test.exits.index(name) for name in names]
  expected = leave(p.scores[rows], early.thresholds)
  gap = np.abs(p.scores[rows] - early.thresholds[:, None]).min(0)
  # Raced before anything else compiles it, so that the seconds of that are seen.
  timed = race(early, *usual(job))
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
  before = np.arange(len(rows))[:, None] < expected  # exits that were passed
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
    'device': latency.device(),
  }


def _plain(value: float) -> float | None:
  return value if math.isfinite(value) else None
