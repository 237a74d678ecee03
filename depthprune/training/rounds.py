"""From a trained network to a small one: fit, decide, prune, recalibrate, fit.

The sequence is the same for every method, as often as the method asks. Surgery verifies
each cut itself. A run that was stopped restarts every stage from its checkpoints;
decisions and cuts are pure functions of what is in them and are made again.
"""

import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from depthprune import methods, models
from depthprune.config import Config
from depthprune.program.couple import Coupling, couple
from depthprune.surgery.cut import Pruned, prune
from depthprune.surgery.oneshot import rank
from depthprune.training import checkpoint, data, record, results
from depthprune.training.distill import distill
from depthprune.training.evaluate import evaluator
from depthprune.training.method import Method, Tree, plain
from depthprune.training.recalibrate import COLLECTION, recalibrate
from depthprune.training.stage import Job, Teacher, prepare, stage
from depthprune.training.step import apply_of

# Highest learning rate of a stage, as part of the run's.
GATES, FINETUNE = 0.5, 0.5
RECALIBRATION = 50  # batches, at most

Build = Callable[[Coupling, int, Mapping[str, np.ndarray]], Method]
"""(coupling, steps, scores) -> method; scores are the channels' L1 norms."""


class Shrunk(NamedTuple):
  """A network before and after.

  Attributes:
    pruned: of the last round. model: what runs the small variables: a module of ours,
      else pruned.apply.
    recalibrated: variables after surgery, with fresh batch statistics.
    variables: after fine-tuning. reports: those of surgery, one per round.
  """

  pruned: Pruned
  model: Any
  recalibrated: Tree
  variables: Tree
  reports: tuple[dict, ...]


def run(config: Config, show: bool = True) -> dict[str, Any]:
  """The whole job: data, model, training, gates, surgery, fine-tuning, measurements.

  Writes everything into `config.path` (config.json, history.jsonl, gates.jsonl,
  checkpoints/, pruned/, result.json) and continues a run that was stopped there.
  The test images are looked at once, at the end.

  Returns: what result.json contains.

  Raises: ValueError for an unknown model, method or data set and for a target that
    cannot be reached, CheckpointError for a directory of another run, NonFiniteLoss.
  """
  started = time.monotonic()
  methods.check(config.method)
  models.build(config.model, classes=1)  # an unknown name is found before the data
  job = prepare(config, show)
  model = models.build(config.model, **_fields(job))
  record.write(
    job.folder / 'config.json',
    {'config': config.to_json(), **results.surroundings(), 'command': record.command()},
  )
  build = partial(methods.build, config)
  example = jnp.zeros((1, *job.images.shape), jnp.float32)
  variables = jax.jit(model.init)(job.key('init'), example)
  # Before any training: a target below what can be reached is found now, not later.
  build(couple(model, variables, example), 1, {})
  state = stage(
    job,
    'train',
    model,
    plain(),
    variables,
    epochs=config.epochs.train,
    peak=config.learning_rate,
  )
  small = shrink(job, model, state.variables, build)
  result = results.measure(job, model, state.variables, small)
  result['wall_seconds'] = time.monotonic() - started
  checkpoint.save(
    job.folder / 'pruned',
    small.pruned._replace(variables=small.variables),
    job.images.normalisation,
  )
  record.write(job.folder / 'result.json', result)
  return result


def shrink(job: Job, model: Any, variables: Tree, build: Build) -> Shrunk:
  """Fits, decides, prunes, recalibrates and fine-tunes, once or more.

  Args:
    job: the run, with the epochs of each stage. model: to be cut, with `variables`.
    build: the method for a coupling; it is asked again in every round.
  """
  example = jnp.zeros((1, *job.images.shape), jnp.float32)
  teacher = Teacher(apply_of(model), variables) if job.config.distill else None
  reports: list[dict] = []
  while True:
    coupling = couple(model, variables, example)
    scores = rank(coupling, variables, 'l1')
    method = build(coupling, job.steps(job.config.epochs.gates), scores)
    tag = f'-{len(reports) + 1}' if method.rounds > 1 else ''
    pruned = _cut(job, f'gates{tag}', model, method, variables, coupling, teacher)
    reports.append(pruned.report)
    small = pruned.model if pruned.arch else pruned.apply
    fresh = _recalibrated(job, small, pruned.variables)
    last = len(reports) == method.rounds
    model, variables = small, _finetuned(job, f'finetune{tag}', small, fresh, teacher)
    if last:
      return Shrunk(pruned, small, fresh, variables, tuple(reports))
    variables = _with_open_branches(model, variables, example)


def _fields(job: Job) -> dict[str, Any]:
  """The model's fields that the run decides about; of these, those that are set."""
  config = job.config
  chosen = {'scan': config.scan, 'dtype': 'bfloat16' if config.bfloat16 else ''}
  set_ = {k: v for k, v in chosen.items() if v}
  return {'classes': job.images.classes, **set_}


def _cut(
  job: Job,
  name: str,
  model: Any,
  method: Method,
  variables: Tree,
  coupling: Coupling,
  teacher: Teacher | None,
) -> Pruned:
  """Trains the gates, decides on held-out data, and cuts."""
  config = job.config
  state = stage(
    job,
    name,
    model,
    distill(method) if teacher else method,
    variables,
    epochs=config.epochs.gates,
    peak=GATES * config.learning_rate,
    coupling=coupling,
    teacher=teacher,
  )
  measure = evaluator(model, job.task, coupling)
  held_out = lambda keep: measure(state.variables, job.held_out(), keep)['loss']
  keep = method.decide(jax.device_get(state.theta), state.stats, held_out)
  pruned = prune(
    model,
    state.variables,
    keep,
    jnp.zeros((1, *job.images.shape), jnp.float32),
    round_to=config.round_to,
    coupling=coupling,
  )
  gates = method.forward(state.theta, job.key(name), state.step)
  moved = _moved(gates.get('channels', {}), keep.get('channels', {}))
  if moved:
    pruned.report['notes'].append(
      f'{moved} channels were decided against their gate, to meet the target'
    )
  return pruned


def _moved(gates: Mapping, keep: Mapping) -> int:
  """How many channels a decision treats otherwise than their gates were."""
  return sum(
    int((np.asarray(gates[g] > 0) != keep[g]).sum()) for g in keep if g in gates
  )


def _recalibrated(job: Job, model: Any, variables: Tree) -> Tree:
  """Fresh statistics from one epoch of augmented images, where there are any."""
  if not jax.tree.leaves(variables.get(COLLECTION, {})):
    return variables
  batch_at = jax.jit(job.batch_at('recalibrate'))
  count = min(RECALIBRATION, data.epoch_steps(job.train, job.config.batch))
  return recalibrate(model, variables, (batch_at(job.train, i) for i in range(count)))


def _finetuned(job: Job, name: str, model, variables, teacher: Teacher | None) -> Tree:
  state = stage(
    job,
    name,
    model,
    distill(plain()) if teacher else plain(),
    variables,
    epochs=job.config.epochs.finetune,
    peak=FINETUNE * job.config.learning_rate,
    teacher=teacher,
  )
  return state.variables


def _with_open_branches(model: Any, variables: Tree, example: jax.Array) -> Tree:
  """Surgery folds branch gates into the weights; the next round needs new ones."""
  if not hasattr(model, 'init'):
    return variables
  wanted = jax.eval_shape(model.init, jax.random.key(0), example)
  ones = jax.tree.map(lambda s: jnp.ones(s.shape, s.dtype), wanted.get('branches', {}))
  return {**variables, 'branches': ones} if ones else variables
