"""What a run reached, measured: accuracy, cost, latency."""

from typing import TYPE_CHECKING, Any

from depthprune.inference import latency
from depthprune.training import data, record
from depthprune.training.evaluate import evaluator
from depthprune.training.method import Tree
from depthprune.training.stage import Job
from depthprune.training.step import apply_of

if TYPE_CHECKING:
  from depthprune.training.rounds import Shrunk

LATENCY_BATCHES = (1, 128)
SPLITS = ('train', 'held_out', 'test')


def surroundings() -> dict[str, Any]:
  """The versions and the device that a result depends on."""
  return {'versions': record.versions(), 'device': latency.device()}


def measure(job: Job, model: Any, before: Tree, small: 'Shrunk') -> dict[str, Any]:
  """Everything that result.json says, but for the time it took.

  Args:
    model, before: the network before pruning and its variables.
  """
  config, reports = job.config, small.reports
  full, thin = evaluator(model, job.task), evaluator(small.model, job.task)
  accuracy = lambda split: {
    'before': full(before, job.batches(split))['accuracy'],
    'pruned': thin(small.pruned.variables, job.batches(split))['accuracy'],
    'recalibrated': thin(small.recalibrated, job.batches(split))['accuracy'],
    'after': thin(small.variables, job.batches(split))['accuracy'],
  }
  cost = lambda name: {
    'before': reports[0][name]['before'],
    'after': reports[-1][name]['after'],
  }
  result = {
    'config': config.to_json(),
    **surroundings(),
    'command': record.command(),
    'seed': config.seed,
    'model': config.model,
    'data': config.data,
    'images': {name: len(getattr(job.images, name)['label']) for name in SPLITS},
    'target': config.target,
    'of': config.of,
    'accuracy': accuracy(job.images.test),
    'held_out': accuracy(job.images.held_out),
    'flops': cost('flops'),
    'params': cost('params'),
    'latency_ms': _latency(job, model, before, small),
    'verify': reports[-1]['verify'],
    'widths': _widths(reports),
    'report': reports[-1],
  }
  result[config.of]['target'] = config.target * result[config.of]['before']
  return result


def _latency(job: Job, model: Any, before: Tree, small: 'Shrunk') -> dict[str, Any]:
  example = next(data.batches(job.images.held_out, 1, job.images.normalisation))
  networks = (
    latency.Network(_eval(model), before),
    latency.Network(_eval(small.model), small.variables),
  )
  measured = latency.compare(
    *networks, example['image'], batches=LATENCY_BATCHES, exits=('main',)
  )
  return latency.to_json(measured)


def _eval(model: Any):
  return lambda variables, image: apply_of(model)(variables, image, train=False)


def _widths(reports: tuple[dict, ...]) -> dict[str, list[int]]:
  """{group: [width before the first round, width after the last]}"""
  after = {g: width for report in reports for g, (_, width) in report['widths'].items()}
  return {g: [full, after[g]] for g, (full, _) in reports[0]['widths'].items()}
