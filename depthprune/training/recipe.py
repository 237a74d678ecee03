"""One command's whole job: data, network, training, rounds of pruning, measurements."""

import time
from functools import partial
from typing import Any

import jax

from depthprune import methods, models
from depthprune.config import Config
from depthprune.models import pretrained
from depthprune.models.heads import every_tap
from depthprune.program.couple import couple
from depthprune.training import checkpoint, record, results
from depthprune.training.method import Tree, plain
from depthprune.training.rounds import shrink
from depthprune.training.stage import Job, prepare, stage


def run(config: Config, show: bool = True) -> dict[str, Any]:
  """The whole job: data, model, training, decisions, surgery, measurements.

  Writes everything into `config.path` (config.json, history.jsonl, gates.jsonl,
  checkpoints/, pruned/, result.json) and continues a run that was stopped there.
  The test images are looked at once, at the end.

  Returns: what result.json contains.

  Raises: ValueError for an unknown model or data set, for a target that cannot be
    reached and for weights that do not fit, CutRefused for a cut that costs too much,
    CheckpointError for a directory of another run, NonFiniteLoss.
  """
  started = time.monotonic()
  network(config, classes=1)  # an unknown name is found before the data
  job = prepare(config, show)
  model = network(config, job.images.classes)
  build = partial(methods.build, config)
  variables = start(job, model)
  # Before any training: a target below what can be reached is found now, not later.
  coupling = couple(model, variables, job.example)
  build(coupling, 1, {}, coupling)
  record.write(
    job.folder / 'config.json',
    {'config': config.to_json(), **results.surroundings(), 'command': record.command()},
  )
  if config.epochs.train:
    peak, epochs = config.learning_rate, config.epochs.train
    state = stage(job, 'train', model, plain(), variables, epochs=epochs, peak=peak)
    variables = state.variables
  small = shrink(job, model, variables, build)
  result = results.measure(job, model, small)
  result['wall_seconds'] = time.monotonic() - started
  checkpoint.save(
    job.folder / 'pruned',
    small.pruned._replace(variables=small.variables),
    job.images.normalisation,
  )
  record.write(job.folder / 'result.json', result)
  return result


def network(config: Config, classes: int) -> Any:
  """The model of a run; for a method that weighs exits, with a head on every tap."""
  chosen = {'scan': config.scan, 'dtype': 'bfloat16' if config.bfloat16 else ''}
  model = models.build(
    config.model, classes=classes, **{k: v for k, v in chosen.items() if v}
  )
  return every_tap(model, pool=config.options.pool) if config.options.heads else model


def start(job: Job, model: Any) -> Tree:
  """The first variables of a run: random, or the trunk read from a file."""
  variables = jax.jit(model.init)(job.key('init'), job.example)
  path = job.config.pretrained
  if path is None:
    return variables
  read = lambda model: pretrained.load(path, model, job.images.shape)
  if not job.config.options.heads:
    return read(model)
  # The trunk's own head is not in use; those of the exits are new.
  merged = dict(variables)
  for collection, tree in read(model.trunk).items():
    trunk = {k: tree[k] for k in variables[collection]['trunk']}
    merged[collection] = {**variables[collection], 'trunk': trunk}
  return merged
