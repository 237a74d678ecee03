"""Network Implosion beside its controls: the same network, depth, epochs and seeds.

  priority   the paper's: trained, the units of smallest |w| erased, retrained, again
  drop, greedy   the same with another importance
  random     the same with units drawn by chance
  scratch    the shape that the row of `priority` ended with, trained from scratch for
             as many epochs as all its stages together

Every (seed, method) is one row; rows are written as they are done and a second call
goes on where the first one ended. Decisions see held-out images only; the test images
are read once per row.
"""

import dataclasses
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from depthprune.options import Implosion
from depthprune.run import rounds as recipe
from depthprune.run.config import Config
from depthprune.run.job import prepare, stage
from depthprune.run.network import network
from depthprune.train.evaluate import evaluator
from depthprune.train.method import plain
from experiments.pieces import Arguments, Case, compare, sized

METHODS = ('priority', 'random', 'scratch')


def main(
  name: str,
  full: Config[Implosion],
  small: Mapping[str, Any],
  methods: Sequence[str],
  given: Arguments,
) -> list[Case]:
  """Fills results/NAME.json, or NAME_full.json with --full; what is left.

  small: what differs from `full` in the size for a CPU.
  """
  cases = [{'method': method} for method in methods]
  return compare(*sized('implosion', name, full, small, given), cases, _row, given)


def _row(config: Config[Implosion], case: Case, found: list[Case]) -> dict[str, Any]:
  if case['method'] == 'scratch':
    (shape,) = (row for row in found if row['method'] == 'priority')
    return _scratch(config, shape)
  options: Any = dataclasses.replace(config.options, importance=case['method'])
  return _erased(dataclasses.replace(config, options=options))


def _erased(config: Config[Implosion]) -> dict[str, Any]:
  result = recipe.run(config)
  return {
    'accuracy': result['accuracy']['after'],
    'accuracy_before': result['accuracy']['before'],
    'held_out': result['held_out']['after'],
    'units': [result['rounds'][0]['units'][0], result['rounds'][-1]['units'][1]],
    'rounds': result['rounds'],
    'epochs': _epochs(config, len(result['rounds'])),
    **{k: result[k]['after'] for k in ('flops', 'params')},
    **{f'{k}_full': result[k]['before'] for k in ('flops', 'params')},
    'latency_ms': result['latency_ms'],
    'wall_seconds': round(result['wall_seconds'], 1),
  }


def _scratch(config: Config[Implosion], shape: Mapping[str, Any]) -> dict[str, Any]:
  started = time.monotonic()
  job = prepare(dataclasses.replace(config, pretrained=None))
  erased = [unit for each in shape['rounds'] for unit in each['erased']]
  full = network(job.config, job.images.classes)
  model = full.clone(arch={f'{unit}/branch': 0 for unit in erased})
  variables = jax.jit(model.init)(job.key('init'), job.example)
  # No gates are trained, so none stay: the units are as the erased network has them.
  variables = {k: v for k, v in variables.items() if k != 'branches'}
  epochs, peak = shape['epochs'], config.learning_rate
  state = stage(job, 'train', model, plain(), variables, epochs=epochs, peak=peak)
  measure = evaluator(model, job.task)
  accuracy = lambda split: measure(state.variables, job.batches(split))['accuracy']
  return {
    'accuracy': accuracy(job.images.test),
    'held_out': accuracy(job.images.held_out),
    'epochs': epochs,
    **{k: shape[k] for k in ('flops', 'params')},
    'wall_seconds': round(time.monotonic() - started, 1),
  }


def _epochs(config: Config[Implosion], rounds: int) -> int:
  """Of all stages together."""
  train, gates, finetune = config.epochs
  return train + gates + rounds * finetune
