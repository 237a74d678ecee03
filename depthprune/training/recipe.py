"""One command's whole job: data, network, training, rounds of pruning, measurements."""

import time
from functools import partial
from typing import Any

from depthprune import methods
from depthprune.config import Config
from depthprune.program.couple import couple
from depthprune.training import (
  cascading,
  checkpoint,
  disk,
  hosts,
  lost,
  record,
  results,
)
from depthprune.training.method import plain
from depthprune.training.networks import check_answer
from depthprune.training.networks import network as network
from depthprune.training.networks import start as start
from depthprune.training.rounds import shrink
from depthprune.training.stage import prepare, stage


def run(config: Config, show: bool = True) -> dict[str, Any]:
  """The whole job: data, model, training, decisions, surgery, measurements.

  Writes everything into `config.path` (config.json, history.jsonl, gates.jsonl,
  checkpoints/, pruned/, result.json) and continues a run that was stopped there.
  The test images are looked at once, at the end.

  Returns: what result.json contains.

  Raises: ValueError for an unknown model or data set, for a target that cannot be
    reached and for weights that do not fit, CutRefused for a cut that costs too much,
    CheckpointError for a directory of another run, InUse for one in which a run is
    alive, NonFiniteLoss, WriteError where there is no room, HostLost where another
    process is gone.
  """
  network(config, classes=1)  # an unknown name is found before the data
  hosts.join()
  with lost.watched(), disk.held(config.path):
    return (cascading.run if config.options.cascades else _run)(config, show)


def _run(config: Config, show: bool) -> dict[str, Any]:
  started = time.monotonic()
  job = prepare(config, show)
  model = network(config, job.images.classes)
  check_answer(job, model)
  build = partial(methods.build, config)
  variables = start(job, model)
  # Before any training: a target below what can be reached is found now, not later.
  coupling = couple(model, variables, *job.inputs)
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
  result = hosts.gathered(result)[0]
  checkpoint.save(
    job.folder / 'pruned',
    small.pruned._replace(variables=small.variables),
    job.images.normalisation,
  )
  record.write(job.folder / 'result.json', result)
  return result
