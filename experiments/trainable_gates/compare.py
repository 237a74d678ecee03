"""Trainable gates beside their controls: the same network, cost, epochs and seeds.

  gates     trained jointly with the weights, then fine-tuned
  l1        uniform L1 norm of the trained network, fine-tuned as long in total
  random    uniform random channels, fine-tuned as long in total
  scratch   the shape that the gates found, trained from scratch for all epochs together

Every (seed, target, method) is one row; rows are written as they are done and a second
call goes on where the first one ended. Decisions see held-out images only, the test
images are read once per row.
"""

import dataclasses
import functools
import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

import depthprune as dp
from depthprune import methods, models
from depthprune.config import Config
from depthprune.options import Gates
from depthprune.training import record, results, rounds
from depthprune.training.evaluate import evaluator
from depthprune.training.method import Method, plain
from depthprune.training.stage import Job, prepare, stage

METHODS = ('gates', 'l1', 'random', 'scratch')


def compare(config: Config, targets: Sequence[float], seeds: Sequence[int], to: Path):
  """Runs what is missing in the file `to`, seed by seed; config.path holds the runs."""
  found = json.loads(to.read_text()) if to.is_file() else {'rows': []}
  rows = found['rows']
  done = {(r['seed'], r['target'], r['method']) for r in rows}
  for seed in seeds:
    if all((seed, t, m) in done for t in targets for m in METHODS):
      continue
    base = dataclasses.replace(
      config, options=Gates(1.0), seed=seed, workdir=str(config.path / f'seed{seed}')
    )
    job = prepare(base)
    model = models.build(config.model, classes=job.images.classes)
    variables = _trained(job, model, 'train', base.epochs.train)
    for target in targets:
      arch: Mapping[str, int] = {}
      for method in METHODS:
        name = f'{method}{100 * target:g}'
        inner = job._replace(
          folder=job.folder / name,
          config=dataclasses.replace(_epochs(base, method), options=Gates(target)),
        )
        if (seed, target, method) in done and method != 'gates':
          continue
        started = time.monotonic()
        row, arch = _row(inner, model, variables, method, arch)
        if (seed, target, method) in done:
          continue
        row |= {'seed': seed, 'target': target, 'method': method}
        rows.append(row | {'wall_seconds': round(time.monotonic() - started, 1)})
        header = {
          'config': config.to_json(),
          'command': record.command(),
          **results.surroundings(),
        }
        record.write(to, {**header, 'rows': rows})
        print(row)


def _epochs(config: Config, method: str) -> Config:
  """All methods see the images equally often after the base training."""
  train, gates, finetune = config.epochs
  if method == 'gates':
    return config
  total = gates + finetune + (train if method == 'scratch' else 0)
  return dataclasses.replace(config, gate_epochs=0, finetune_epochs=total)


def _trained(job: Job, model: Any, name: str, epochs: int) -> dict[str, Any]:
  example = jnp.zeros((1, *job.images.shape), jnp.float32)
  variables = jax.jit(model.init)(job.key('init'), example)
  state = stage(
    job, name, model, plain(), variables, epochs=epochs, peak=job.config.learning_rate
  )
  return state.variables


def _row(job: Job, model, variables, method: str, arch: Mapping[str, int]):
  """(what one variant reached, the architecture that the gates found)."""
  test = lambda model, variables: evaluator(model, job.task)(
    variables, job.batches(job.images.test)
  )['accuracy']
  if method == 'scratch':
    small = model.clone(arch=type(model.arch)(arch))
    reached = _trained(job, small, 'scratch', job.config.epochs.finetune)
    coupling = dp.couple(small, reached, jnp.zeros((1, *job.images.shape)))
    cost = {'flops': dp.cost.flops(coupling), 'params': dp.cost.params(coupling)}
    return {'accuracy': test(small, reached), **cost}, arch
  if method == 'gates':
    build = functools.partial(methods.build, job.config)
  else:
    build = _oneshot(job, variables, method)
  shrunk = rounds.shrink(job, model, variables, build)
  report = shrunk.pruned.report
  return {
    'accuracy': test(shrunk.model, shrunk.variables),
    'accuracy_unpruned': test(model, variables),
    'flops': report['flops']['after'],
    'flops_unpruned': report['flops']['before'],
    'params': report['params']['after'],
    'difference': report['verify']['difference'],
  }, shrunk.pruned.arch


def _oneshot(job: Job, variables, score: str) -> Callable[..., Method]:
  """A method that decides without training: uniform over layers, by a score."""

  def build(coupling, steps, scores, whole) -> Method:
    del steps, scores, whole
    keep = dp.oneshot(
      coupling,
      variables,
      job.config.options.target,
      score=score,
      scope='uniform',
      of=job.config.options.of,
      key=job.key('random'),
    )
    return Method(decide=lambda theta, stats, evaluate: keep)

  return build
