"""What a run reached, measured: accuracy, cost, latency."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import jax

from depthprune import distributed as hosts
from depthprune.data.tfds import count
from depthprune.program.trace import runnable
from depthprune.run.job import Job
from depthprune.storage import directory as record
from depthprune.timing import latency
from depthprune.train.method import as_dict

if TYPE_CHECKING:
  from depthprune.run.rounds import Round, Shrunk

LATENCY_BATCHES = (1, 128)
SPLITS = ('train', 'held_out', 'test')


def surroundings() -> dict[str, Any]:
  """The versions and the device that a result depends on."""
  return {'versions': record.versions(), 'device': latency.device()}


def measure(job: Job, model: Any, small: 'Shrunk') -> dict[str, Any]:
  """Everything that result.json says, but for the time it took.

  Args:
    model: the network before pruning.
  """
  reports = [found.report for found in small.rounds]
  full, thin = job.scores(model, small.answer), job.scores(small.model)
  scores = lambda split: {
    'before': full(small.before, split),
    'pruned': thin(small.pruned.variables, split),
    'recalibrated': thin(small.recalibrated, split),
    'after': thin(small.variables, split),
  }
  test, held_out = scores(job.images.test), scores(job.images.held_out)
  accuracy = lambda found: {when: each['accuracy'] for when, each in found.items()}
  cost = lambda name: {
    'before': reports[0][name]['before'],
    'after': reports[-1][name]['after'],
  }
  result = {
    **described(job),
    'accuracy': accuracy(test),
    'held_out': accuracy(held_out),
    'scores': {when: finite(test[when]) for when in ('before', 'after')},
    'flops': cost('flops'),
    'params': cost('params'),
    'peak_bytes': cost('peak_bytes'),
    **(_times(job, model, small) if hosts.writes() else {}),
    'verify': reports[-1]['verify'],
    'widths': _widths(reports),
    'rounds': [_told(found) for found in small.rounds],
    'report': reports[-1],
  }
  return result


def finite(scores: dict[str, float]) -> dict[str, float | None]:
  """All scores; None for one of nothing, as the IoU of a class that is not there."""
  return {k: float(v) if math.isfinite(v) else None for k, v in scores.items()}


def described(job: Job) -> dict[str, Any]:
  """What was run, on what, with what."""
  config = job.config
  return {
    'config': config.to_json(),
    **surroundings(),
    'command': record.command(),
    'mesh': {**job.mesh.shape, 'processes': jax.process_count()},
    'seed': config.seed,
    'model': config.model,
    'data': config.data,
    'method': config.method,
    'options': dataclasses.asdict(config.options),
    'data_notes': list(job.images.notes),
    'images': {name: count(getattr(job.images, name)) for name in SPLITS},
  }


def _told(found: 'Round') -> dict[str, Any]:
  """One round, without the arrays of its report."""
  keys = ('flops', 'params')
  kept = [name for name, kept in found.report['exits'].items() if kept]
  return {
    'units': list(found.units),
    'erased': list(found.erased),
    'exits': kept,
    'learned': found.learned,
    **{key: found.report[key] for key in keys},
    'verify': found.report['verify'],
    'notes': found.report['notes'],
    'held_out': found.held_out,
  }


def _times(job: Job, model: Any, small: 'Shrunk') -> dict[str, Any]:
  """Milliseconds of an answer, and seconds to compile it, before and after."""
  networks = (
    latency.Network(_answering(model, small.answer), small.before),
    latency.Network(_answering(small.model, job.task.answer), small.variables),
  )
  seconds = [latency.compile_seconds(network, *job.inputs) for network in networks]
  options, asked = job.config.options, {}
  of_time = getattr(options, 'of', '') == 'milliseconds'
  batches = (*LATENCY_BATCHES, *((options.latency_batch,) if of_time else ()))
  measured = latency.compare(*networks, *job.inputs, batches=batches)
  told = latency.to_json(measured)
  if of_time:
    here = next(m for m in measured if m.batch == options.latency_batch)
    told[str(here.batch)]['notes'] += latency.missed(here, options.target)
    medians = {'before': here.before.median, 'after': here.after.median}
    asked = {'milliseconds': {'batch': here.batch, **medians}}
  return {
    'latency_ms': told,
    **asked,
    'compile_s': dict(zip(('before', 'after'), seconds)),
  }


def _answering(model: Any, answer: Callable):
  run = runnable(model)
  return lambda variables, *inputs: answer(
    as_dict(run(variables, *inputs, train=False))
  )


def _widths(reports: Sequence[dict]) -> dict[str, list[int]]:
  """{group: [width before the first round, width after the last]}"""
  after = {g: width for report in reports for g, (_, width) in report['widths'].items()}
  return {g: [full, after[g]] for g, (full, _) in reports[0]['widths'].items()}
