"""The network that a run is about, and the variables that it starts with."""

from typing import Any

import jax

from depthprune import models
from depthprune.config import Config
from depthprune.models import pretrained
from depthprune.models.heads import every_tap
from depthprune.training.method import Tree
from depthprune.training.stage import Job


def network(config: Config, classes: int) -> Any:
  """The model of a run; for a method that weighs exits, with a head on every tap."""
  chosen = {'scan': config.scan, 'dtype': 'bfloat16' if config.bfloat16 else ''}
  model = models.build(
    config.model, classes=classes, **{k: v for k, v in chosen.items() if v}
  )
  return every_tap(model, pool=config.options.pool) if config.options.heads else model


def start(job: Job, model: Any) -> Tree:
  """The first variables of a run: random, or the trunk read from a file."""
  variables = jax.jit(model.init)(job.key('init'), *job.inputs)
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
