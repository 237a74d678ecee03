"""Auxiliary training of a compact network beside its controls, on the same images.

  alone      the compact network, as many epochs
  longer     the compact network, as many epochs as cost what `all` costs (FLOPs)
  deep       plain deep supervision: linear heads after its stages
  all        beside a path that every tap feeds
  search     beside a path whose connections are searched
  distilled  the compact network, learning from the answers of the path of `all`

Every (seed, method) is one row; a second call goes on where the first one ended. What
helped to train is cut away before anything is measured; the test images are read once
per row, and nothing is decided on them.
"""

import dataclasses
import time
from collections.abc import Mapping
from typing import Any

import jax

import depthprune as dp
from depthprune import methods
from depthprune.options import Auxiliary
from depthprune.run import result as results
from depthprune.run import rounds as recipe
from depthprune.run.config import Config
from depthprune.run.job import Job, prepare, stage
from depthprune.run.network import network
from depthprune.train.distill import Teacher, distill
from depthprune.train.evaluate import evaluator
from depthprune.train.method import plain
from depthprune.train.step import State
from experiments.pieces import Arguments, Case, compare, sized

METHODS = ('all', 'search', 'deep', 'alone', 'longer', 'distilled')
STRUCTURES = {'alone': 'none', 'longer': 'none', 'deep': 'deep-supervision'}


def main(
  name: str, full: Config[Auxiliary], small: Mapping[str, Any], given: Arguments
) -> list[Case]:
  """Fills results/NAME.json, or NAME_full.json with --full; what is left.

  small: what differs from `full` in the size for a CPU.
  """
  cases = [{'method': method} for method in METHODS]
  return compare(*sized('auxiliary', name, full, small, given), cases, _row, given)


def _row(config: Config[Auxiliary], case: Case, found: list[Case]) -> dict[str, Any]:
  method = case['method']
  if method == 'distilled':
    return _distilled(config)
  structure = STRUCTURES.get(method, method)
  options = dataclasses.replace(config.options, structure=structure)
  config = dataclasses.replace(config, options=options)
  if method == 'longer':
    (wide,) = (row for row in found if row['method'] == 'all')
    part = wide['flops_training'] / wide['flops']
    config = dataclasses.replace(config, gate_epochs=round(config.epochs.gates * part))
  result = recipe.run(config)
  learned = result['rounds'][0]['learned']
  return {
    'accuracy': result['accuracy']['after'],
    'held_out': result['held_out']['after'],
    'scores': result['scores']['after'],
    'epochs': config.epochs.gates,
    'flops': result['flops']['after'],
    'flops_training': result['flops']['before'],
    'params': result['params']['after'],
    'latency_ms': result['latency_ms'],
    'structure': {k: learned[k] for k in ('weight', 'open') if k in learned},
    'wall_seconds': round(result['wall_seconds'], 1),
  }


def _distilled(config: Config[Auxiliary]) -> dict[str, Any]:
  """The wide network first, trunk and path; then a new trunk towards its answers."""
  started = time.monotonic()
  job = prepare(config)
  wide = network(config, job.images.classes)
  options = dataclasses.replace(config.options, structure='none')
  compact = network(dataclasses.replace(config, options=options), job.images.classes)
  taught = _trained(job, 'wide', wide)
  says = lambda v, *inputs, **mode: wide.apply(v, *inputs, **mode)['aux']
  state = _trained(job, 'distilled', compact, Teacher(says, taught.variables))
  measure = evaluator(compact, job.task)
  scores = lambda split: measure(state.variables, job.batches(split))
  test = results.finite(scores(job.images.test))
  return {
    'accuracy': test['accuracy'],
    'held_out': scores(job.images.held_out)['accuracy'],
    'scores': test,
    'epochs': config.epochs.gates,
    'wall_seconds': round(time.monotonic() - started, 1),
  }


def _trained(job: Job, name: str, model: Any, teacher: Teacher | None = None) -> State:
  """Beside what helps to train it, or towards the answers of a teacher."""
  variables = jax.jit(model.init)(job.key('init'), *job.inputs)
  coupling = dp.couple(model, variables, *job.inputs)
  epochs, peak = job.config.epochs.gates, job.config.learning_rate
  build = lambda: methods.build(job.config, coupling, job.steps(epochs), {})
  method = distill(plain()) if teacher else build()
  return stage(
    job, name, model, method, variables,
    epochs=epochs, peak=peak, coupling=coupling, teacher=teacher,
  )  # fmt: skip
