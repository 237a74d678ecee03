"""Trainable gates beside their controls: the same network, cost, epochs and seeds.

  gates     trained jointly with the weights, then fine-tuned
  l1        uniform L1 norm of the trained network, fine-tuned as long in total, at the
            same rates
  random    uniform random channels, fine-tuned as long in total
  scratch   the shape that the gates found, trained from scratch for all epochs together

Every (seed, target, method) is one row; a second call goes on where the first one
ended. The network that is cut is trained once for each seed, or pretrained. Decisions
see held-out images only, the test images are read once per row.
"""

import dataclasses
import functools
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax

import depthprune as dp
from depthprune import methods
from depthprune.options import Gates
from depthprune.run import rounds
from depthprune.run.config import Config
from depthprune.run.job import Job, prepare, stage
from depthprune.run.network import network, start
from depthprune.run.relevant import TRAIN
from depthprune.train.method import Method, plain
from depthprune.train.task import Tree
from experiments.pieces import Arguments, Case, compare, sized

METHODS = ('gates', 'l1', 'random', 'scratch')


class Base(NamedTuple):
  """The network that is cut, trained, and the test accuracy that it has."""

  job: Job
  model: Any
  variables: Tree
  accuracy: float


def main(
  name: str,
  full: Config[Gates],
  small: Mapping[str, Any],
  targets: Sequence[float],
  methods: Sequence[str],
  given: Arguments,
) -> list[Case]:
  """Fills results/NAME.json, or NAME_full.json with --full; what is left.

  small: what differs from `full` in the size for a CPU. targets: parts of the FLOPs.
  """
  to, config = sized('trainable_gates', name, full, small, given)
  cases = [{'target': t, 'method': method} for t in targets for method in methods]
  row = functools.partial(_row, config)
  return compare(to, config, cases, row, given)


def _row(whole: Config[Gates], config: Config[Gates], case: Case, found: list[Case]):
  started = time.monotonic()
  folder = whole.path / f'base-seed{config.seed}'
  base = _base(dataclasses.replace(whole, seed=config.seed, workdir=str(folder)))
  config = _epochs(config, case['method'])
  config = dataclasses.replace(config, options=Gates(case['target']))
  job = base.job._replace(config=config, folder=config.path)
  if case['method'] == 'scratch':
    mine = {'target': case['target'], 'method': 'gates'}.items()
    (shape,) = (row for row in found if mine <= row.items())
    row = _scratch(job, base, shape)
  else:
    row = _cut(job, base, case['method'])
  return {**row, 'wall_seconds': round(time.monotonic() - started, 1)}


@functools.lru_cache(1)
def _base(config: Config[Gates]) -> Base:
  job = prepare(config)
  model = network(config, job.images.classes)
  variables = start(job, model)
  if epochs := config.epochs.train:
    variables = _trained(job, TRAIN, model, variables, epochs)
  return Base(job, model, variables, _test(job, model, variables))


def _epochs(config: Config[Gates], method: str) -> Config[Gates]:
  """All methods see the images equally often after the base training."""
  train, gates, finetune = config.epochs
  if method == 'gates':
    return config
  total = gates + finetune + (train if method == 'scratch' else 0)
  return dataclasses.replace(config, gate_epochs=0, finetune_epochs=total)


def _trained(job: Job, name: str, model: Any, variables: Tree, epochs: int) -> Tree:
  peak = job.config.learning_rate
  return stage(job, name, model, plain(), variables, epochs=epochs, peak=peak).variables


def _test(job: Job, model: Any, variables: Tree) -> float:
  return job.scores(model)(variables, job.images.test)['accuracy']


def _scratch(job: Job, base: Base, shape: Mapping[str, Any]) -> dict[str, Any]:
  model = base.model.clone(arch=type(base.model.arch)(shape['arch']))
  fresh = jax.jit(model.init)(job.key('init'), *job.inputs)
  reached = _trained(job, 'scratch', model, fresh, job.config.epochs.finetune)
  cost = {k: shape[k] for k in ('flops', 'params')}
  return {'accuracy': _test(job, model, reached), **cost}


def _cut(job: Job, base: Base, method: str) -> dict[str, Any]:
  if method == 'gates':
    build = functools.partial(methods.build, job.config)
  else:
    build = _oneshot(job, base.variables, method)
  shrunk = rounds.shrink(job, base.model, base.variables, build)
  report = shrunk.pruned.report
  return {
    'accuracy': _test(job, shrunk.model, shrunk.variables),
    'accuracy_unpruned': base.accuracy,
    'flops': report['flops']['after'],
    'flops_unpruned': report['flops']['before'],
    'params': report['params']['after'],
    'difference': report['verify']['difference'],
    'arch': dict(shrunk.pruned.arch),
  }


def _oneshot(job: Job, variables: Tree, score: str) -> Callable[..., Method]:
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
