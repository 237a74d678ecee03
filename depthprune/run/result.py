"""Measuring what a run reached: accuracy, cost and latency."""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import jax

from depthprune import distributed
from depthprune.data.dataset import count
from depthprune.program.coupling import couple
from depthprune.program.modules import runnable
from depthprune.program.rounding import Suited, step
from depthprune.program.trace import batched
from depthprune.run import own
from depthprune.run.job import Job, rounding, surroundings
from depthprune.run.samples import samples
from depthprune.timing import latency
from depthprune.timing.alone import milliseconds_alone
from depthprune.train.result import Result, from_json
from depthprune.train.task import as_dict

if TYPE_CHECKING:
  from depthprune.run.rounds import Shrunk

LATENCY_BATCHES = (1, 128)
LARGEST = 2**26  # numbers in an answer that is timed
SPLITS = ('train', 'held_out', 'test')


def measure(
  job: Job, model: Any, small: 'Shrunk', control: Mapping[str, float]
) -> Result:
  """Measures a network before and after its cuts, all but the time of the run.

  Args:
    job: the run.
    model: the network before pruning.
    small: what it became.
    control: accuracies of the network that was trained for comparison, if any.
  """
  full, thin = job.scores(model, small.answer), job.scores(small.model)
  test, held_out = (
    {
      'before': full(small.before, split),
      'pruned': thin(small.pruned.variables, split),
      'recalibrated': thin(small.recalibrated, split),
      'after': thin(small.variables, split),
    }
    for split in (job.images.test, job.images.held_out)
  )
  accuracies = lambda scores: {k: v['accuracy'] for k, v in scores.items()}
  first, last = small.reports[0], small.reports[-1]
  cost = lambda name: {'before': first[name]['before'], 'after': last[name]['after']}
  after = {
    group: width
    for report in small.reports
    for group, (_, width) in report['widths'].items()
  }
  left = {
    path: layer
    for report in small.reports
    for path, layer in report.get('layers', {}).items()
  }
  layers = {
    path: {
      **layer,
      **{key: [layer[key][0], left[path][key][1]] for key in ('width', 'flops')},
    }
    for path, layer in first.get('layers', {}).items()
  }
  told: dict[str, Any] = {}
  if distributed.writes():  # one process measures for all
    told = _times(job, model, small, layers)
    told['samples'] = samples(job, model, small)
  values = {
    **described(job),
    **{name: cost(name) for name in ('flops', 'params', 'peak_bytes')},
    'accuracy': accuracies(test),
    'held_out': accuracies(held_out),
    'scores': {when: finite(test[when]) for when in ('before', 'after')},
    'verify': last['verify'],
    'widths': {g: [full, after[g]] for g, (full, _) in first['widths'].items()},
    'layers': layers,
    'multiples': _multiples(job, first['widths']),
    'rounds': [dataclasses.asdict(each) for each in small.rounds],
    'report': last,
    'epochs': dataclasses.asdict(small.epochs),
    'original': job.accuracies(model, small.original) if small.original else {},
    'control': dict(control),
    **told,
  }
  return from_json(values)


def _multiples(job: Job, widths: Mapping[str, tuple[int, int]]) -> dict[str, int]:
  """Returns what widths are multiples of, by group, if that suits the device."""
  round_to = rounding(job)
  if not isinstance(round_to, Suited):
    return {}
  return {group: step(round_to, full) for group, (full, _) in widths.items()}


def described(job: Job) -> dict[str, Any]:
  """Returns the entries of a result that say what was run, and with what."""
  config = job.config
  return {
    'config': config.to_json(),
    **surroundings(),
    'mesh': {**job.mesh.shape, 'processes': jax.process_count()},
    'seed': config.seed,
    'model': own.word(config.model),
    'data': own.word(config.data),
    'method': config.method,
    'options': dataclasses.asdict(config.options),
    'data_notes': list(job.images.notes),
    'images': {name: count(getattr(job.images, name)) for name in SPLITS},
  }


def finite(scores: dict[str, float]) -> dict[str, float | None]:
  """Returns the scores with None for NaN, such as the IoU of an absent class."""
  return {k: float(v) if math.isfinite(v) else None for k, v in scores.items()}


def _times(
  job: Job, model: Any, small: 'Shrunk', layers: Mapping[str, dict[str, Any]]
) -> dict[str, Any]:
  """Measures milliseconds of an answer and seconds to compile, before and after.

  If widths were cut, it times every layer of both networks, too.
  """
  networks = (
    latency.Network(_answering(model, small.answer), small.before),
    latency.Network(_answering(small.model, job.task.answer), small.variables),
  )
  seconds = [latency.compile_seconds(network, *job.inputs) for network in networks]
  values: dict[str, Any] = {'compile_s': dict(zip(('before', 'after'), seconds))}
  target = job.config.recipe.target(dataclasses.asdict(job.config.options))
  asked = target.batch if target else None  # the batch of a target in milliseconds
  size = math.prod(job.labels[1:]) * job.images.classes  # of one answer
  room = 2 ** int(math.log2(max(1, LARGEST // size)))
  batches = [min(n, room) for n in LATENCY_BATCHES]
  batches = dict.fromkeys((*batches, *((asked,) if asked else ())))
  measured = latency.compare(*networks, *job.inputs, batches=batches)
  values['latency_ms'] = latency.to_json(measured)
  if target and asked:
    here = next(m for m in measured if m.batch == asked)
    missed = latency.missed(here, target.fraction)
    values['latency_ms'][str(asked)]['notes'] += missed
    medians = {'before': here.before.median, 'after': here.after.median}
    values['milliseconds'] = {'batch': asked, **medians}
  if any(before != after for before, after in (x['width'] for x in layers.values())):
    batch = max(batches)
    inputs = batched(tuple(job.inputs), batch)
    before, after = milliseconds_alone(
      [couple(network.apply, network.variables, *inputs) for network in networks]
    )
    values['layers_batch'] = batch
    values['layers'] = {
      path: {**layer, 'ms': [before[path], after.get(path, 0.0)]}
      if path in before
      else layer
      for path, layer in layers.items()
    }
  return values


def _answering(model: Any, answer: Callable):
  run = runnable(model)
  return lambda variables, *inputs: answer(
    as_dict(run(variables, *inputs, train=False))
  )
