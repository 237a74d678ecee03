"""What a run reached, measured: accuracy, cost, latency."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import jax

from depthprune import distributed
from depthprune.data.dataset import count
from depthprune.program.trace import runnable
from depthprune.run.job import Job, surroundings
from depthprune.timing import latency
from depthprune.train.result import Accuracies, Change, Proof, Result, RoundResult
from depthprune.train.result import from_json as from_json
from depthprune.train.task import as_dict

if TYPE_CHECKING:
  from depthprune.run.rounds import Shrunk

LATENCY_BATCHES = (1, 128)
SPLITS = ('train', 'held_out', 'test')


def measure(job: Job, model: Any, small: 'Shrunk') -> Result:
  """Everything that result.json says of a network and its cuts, but for the time.

  Args:
    job: the run. model: the network before pruning. small: what became of it.
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
  accuracies = lambda found: Accuracies(**{k: v['accuracy'] for k, v in found.items()})
  reports = small.reports
  cost = lambda name: {
    'before': reports[0][name]['before'],
    'after': reports[-1][name]['after'],
  }
  values = {
    **described(job),
    **{name: cost(name) for name in ('flops', 'params', 'peak_bytes')},
    **(_times(job, model, small) if distributed.writes() else {}),
    'accuracy': dataclasses.asdict(accuracies(test)),
    'held_out': dataclasses.asdict(accuracies(held_out)),
    'scores': {when: finite(test[when]) for when in ('before', 'after')},
    'verify': reports[-1]['verify'],
    'widths': _widths(reports),
    'rounds': [dataclasses.asdict(each) for each in small.rounds],
    'report': reports[-1],
  }
  return from_json(values)


def described(job: Job) -> dict[str, Any]:
  """What was run, on what, with what: entries of a result."""
  config = job.config
  return {
    'config': config.to_json(),
    **surroundings(),
    'mesh': {**job.mesh.shape, 'processes': jax.process_count()},
    'seed': config.seed,
    'model': config.model,
    'data': config.data,
    'method': config.method,
    'options': dataclasses.asdict(config.options),
    'data_notes': list(job.images.notes),
    'images': {name: count(getattr(job.images, name)) for name in SPLITS},
  }


def round_from(report: dict[str, Any], **known: Any) -> RoundResult:
  """One cut, of which surgery says `report`; known: the fields that it does not say."""
  return RoundResult(
    exits=[name for name, kept in report['exits'].items() if kept],
    flops=Change(**report['flops']),
    params=Change(**report['params']),
    verify=Proof(**report['verify']),
    notes=report['notes'],
    **known,
  )


def finite(scores: dict[str, float]) -> dict[str, float | None]:
  """All scores; None for one of nothing, as the IoU of a class that is not there."""
  return {k: float(v) if math.isfinite(v) else None for k, v in scores.items()}


def _times(job: Job, model: Any, small: 'Shrunk') -> dict[str, Any]:
  """Milliseconds of an answer, and seconds to compile it, before and after."""
  networks = (
    latency.Network(_answering(model, small.answer), small.before),
    latency.Network(_answering(small.model, job.task.answer), small.variables),
  )
  seconds = [latency.compile_seconds(network, *job.inputs) for network in networks]
  values: dict[str, Any] = {'compile_s': dict(zip(('before', 'after'), seconds))}
  target = job.config.recipe.target(dataclasses.asdict(job.config.options))
  asked = target.batch if target else None  # where the target counts milliseconds
  batches = (*LATENCY_BATCHES, *((asked,) if asked else ()))
  measured = latency.compare(*networks, *job.inputs, batches=batches)
  values['latency_ms'] = latency.to_json(measured)
  if target and asked:
    here = next(m for m in measured if m.batch == asked)
    missed = latency.missed(here, target.fraction)
    values['latency_ms'][str(asked)]['notes'] += missed
    medians = {'before': here.before.median, 'after': here.after.median}
    values['milliseconds'] = {'batch': asked, **medians}
  return values


def _answering(model: Any, answer: Callable):
  run = runnable(model)
  return lambda variables, *inputs: answer(
    as_dict(run(variables, *inputs, train=False))
  )


def _widths(reports: Sequence[dict]) -> dict[str, list[int]]:
  """{group: [width before the first round, width after the last]}"""
  after = {g: width for report in reports for g, (_, width) in report['widths'].items()}
  return {g: [full, after[g]] for g, (full, _) in reports[0]['widths'].items()}
