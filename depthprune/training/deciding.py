"""What held-out data decides of a cascade: temperatures and thresholds."""

import itertools
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np

from depthprune.inference import calibration, thresholds
from depthprune.inference import confidence as sure
from depthprune.inference.cascade import cascade
from depthprune.inference.choice import Choice
from depthprune.inference.predictions import Predictions
from depthprune.inference.race import exit_milliseconds
from depthprune.inference.risk import halves
from depthprune.program.stages import Stages, split
from depthprune.training import hosts
from depthprune.training.method import Tree, inputs_of, real_rows
from depthprune.training.prepared import count
from depthprune.training.sides import Answers, Trained
from depthprune.training.stage import Job
from depthprune.training.streamed import Streamed

# What else is asked of the held-out data, to be shown beside what was asked for: points
# of accuracy, parts of the network's FLOPs, parts of all examples.
ALSO = {
  'drop': (0.0, 0.25, 0.5, 1.0, 2.0),
  'budget': (0.5, 0.65, 0.8),
  'risk': (0.01, 0.02, 0.05),
}


class Decided(NamedTuple):
  """What held-out data decided.

  Attributes:
    stages: of the network with all heads.
    temperatures: float32 [exits - 1]; weights: of a learned confidence, [exits - 1, 4].
    kind, requested: what was asked for. chosen: the thresholds for it.
    held_out, test: what every exit says there, and how sure it is; costs in FLOPs.
  """

  stages: Stages
  temperatures: np.ndarray
  weights: np.ndarray | None
  kind: str
  requested: float
  chosen: Choice
  held_out: Predictions
  test: Predictions


def splits(job: Job) -> Job:
  """The job, its held-out data replaced where the options say `decide_on` test data."""
  config, test = job.config, job.images.test
  asked = config.options.decide_on
  seen = config.pretrained is not None and not config.epochs.train
  if asked == 'train' or (asked == 'auto' and not seen):
    return job
  half = count(test) // 2
  part = lambda rows: {name: values[rows] for name, values in test.items()}
  first, second = part(slice(half)), part(slice(half, None))
  return job._replace(images=job.images._replace(held_out=first, test=second))


def decide(job: Job, trained: Trained) -> Decided:
  """Temperatures and thresholds for what the options ask.

  Temperatures see only the half of the held-out data on which a certified risk is
  searched for, so that the half that certifies has decided nothing. An example for
  which an exit's answer is not finite never leaves there, and decides nothing of it.

  Raises: ValueError for a budget or risk that cannot be met.
  """
  o, held_out = job.config.options, trained.held_out
  stages = split(trained.model, trained.variables, *job.inputs, exits=trained.exits)
  some, _ = halves(len(held_out.labels))
  part = Answers(held_out.logits[:, some], held_out.labels[some])
  scale = [_temperature(logits, part.labels) for logits in part.logits[:-1]]
  scale = np.asarray(scale, np.float32)
  tempered = lambda logits: logits / np.append(scale, np.float32(1))[:, None, None]
  weights = None
  if o.confidence == 'learned':
    weights = sure.learn(tempered(part.logits), part.labels)

  def seen(answers: Answers, examples: Tree) -> Predictions:
    scores = sure.scores(o.confidence, tempered(answers.logits), weights)
    return Predictions(trained.exits, *answers, scores, *costs(job, stages, examples))

  decides = seen(held_out, job.images.held_out)
  reports = seen(trained.test, job.images.test)
  kind, requested = o.asked
  priced = decides
  if kind == 'milliseconds':
    early = cascade(
      trained.model, trained.variables, *job.inputs,
      exits=trained.exits, confidence=o.confidence, weights=weights,
    )  # fmt: skip
    cost, whole = hosts.agreed(exit_milliseconds(early, *usual(job)))
    priced = decides._replace(cost=cost, whole=float(whole))
  chosen = choose(priced, kind, requested, o.delta)
  return Decided(stages, scale, weights, kind, requested, chosen, decides, reports)


def _temperature(logits: np.ndarray, labels: np.ndarray) -> float:
  """Of the finite answers, 1 where there are none."""
  logits, labels = calibration.finite(logits, labels)
  return calibration.temperature(logits, labels) if len(labels) else 1.0


def usual(job: Job) -> tuple:
  """The inputs of a test batch of the shape that most of them have."""
  found: dict[tuple, list[tuple]] = {}
  for batch in _shapes(job, job.images.test):
    inputs = inputs_of(batch)
    same = found.setdefault(tuple(x.shape for x in inputs), [])
    same.append(() if same else inputs)  # one of a kind is held, of any number
  return max(found.values(), key=len)[0]


def _shapes(job: Job, split: Tree) -> Iterator[Tree]:
  """Batches for the sake of their shapes: of images from disk one stands for all."""
  batches = job.own_batches(split)
  return itertools.islice(batches, 1) if isinstance(job.images, Streamed) else batches


def costs(job: Job, stages: Stages, examples: Tree) -> tuple[np.ndarray, float]:
  """FLOPs of leaving at each exit [exits], and of the network alone, in the mean.

  Texts are as long as their batch, so that each length has its own costs.
  """
  total, count = np.zeros(len(stages) + 1), 0
  for batch in _shapes(job, examples):
    real = int(real_rows(batch).sum())
    here = stages.again(*inputs_of(batch))
    total += real * np.array([*here.flops, here.whole], np.float64)
    count += real
  return total[:-1] / count, float(total[-1] / count)


def choose(p: Predictions, kind: str, requested: float, delta: float = 0.05) -> Choice:
  """Thresholds for a request; raises ValueError where it cannot be met.

  p: of held-out data, its costs in milliseconds if that is what is asked for.
  """
  ways: dict[str, Callable[[], Choice]] = {
    'drop': lambda: thresholds.for_drop(p, requested),
    'budget': lambda: thresholds.for_budget(p, requested * p.whole),
    'milliseconds': lambda: thresholds.for_budget(p, requested),
    'threshold': lambda: thresholds.fixed(p, requested),
    'risk': lambda: thresholds.for_risk(p, requested, delta),
  }
  return ways[kind]()
