"""One command's whole job for early exits: a network goes in, a cascade comes out.

Heads are trained (`sides`); held-out data gives temperatures and thresholds
(`deciding`); the exits that are used become the cascade that is saved; test data says
what it reaches (`reached`), and decides nothing.
"""

import time
from typing import Any

import numpy as np

from depthprune.config import Config
from depthprune.inference.cascade import Cascade, cascade
from depthprune.inference.saved import save_cascade
from depthprune.surgery.cut import Pruned, prune
from depthprune.training import hosts, reached, record, results
from depthprune.training.deciding import Decided, decide, splits
from depthprune.training.prepared import DataError
from depthprune.training.sides import Trained, train
from depthprune.training.stage import Job, prepare


def run(config: Config, show: bool = True) -> dict[str, Any]:
  """The whole job, with arguments and files as those of `recipe.run`, which calls it.

  `cascade/` holds the cascade; `inference.saved.load_cascade` reads it.
  """
  started = time.monotonic()
  job = splits(_one_class(prepare(config, show)))
  record.write(
    job.folder / 'config.json',
    {'config': config.to_json(), **results.surroundings(), 'command': record.command()},
  )
  trained = train(job)
  decided = decide(job, trained)
  pruned, early = assembled(job, trained, decided)
  result = reached.measure(job, trained, decided, pruned, early)
  result['wall_seconds'] = time.monotonic() - started
  result = hosts.gathered(result)[0]
  images = job.images
  tokenizer = getattr(images, 'tokenizer', None)  # of texts
  folder = job.folder / 'cascade'
  save_cascade(folder, early, pruned, images.normalisation, tokenizer)
  record.write(job.folder / 'result.json', result)
  return result


def _one_class(job: Job) -> Job:
  shape = job.labels
  if len(shape) != 1:
    raise DataError(
      f'data {job.images.name!r}: a cascade tells one class per example, got labels '
      f'{list(shape)}: use another method, or a data set with one class each'
    )
  return job


def assembled(job: Job, trained: Trained, decided: Decided) -> tuple[Pruned, Cascade]:
  """The network without the exits that nobody takes, cut, and its cascade.

  Where no exit is used, the deepest stays, with a threshold that nobody passes; where
  confidence is patience all stay, as each of them is asked.
  """
  early, taken = trained.exits[:-1], np.isfinite(decided.chosen.thresholds)
  taken |= decided.chosen.thresholds < 0
  if job.config.options.confidence == 'patience':
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
    confidence=job.config.options.confidence,
    weights=None if weights is None else weights[taken],
  )
