"""Latency and throughput of saved networks and cascades, beside the device's peak.

A network takes turns with the one that its run began with, if the run's directory is
there. A cascade takes turns with its network alone, on the run's own test data, which
decides where examples leave.
"""

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from depthprune.cascades import race
from depthprune.data.dataset import DataError, inputs_of
from depthprune.exports.networks import Saved, find
from depthprune.exports.stablehlo import function, probe
from depthprune.program import cost
from depthprune.program.coupling import couple
from depthprune.program.modules import runnable
from depthprune.program.trace import batched
from depthprune.run import data
from depthprune.run.config import Config, ConfigFile, from_json
from depthprune.run.network import network as build_network
from depthprune.run.network import of_run
from depthprune.storage import directory, files
from depthprune.surgery.prune import Pruned
from depthprune.timing import latency, roofline
from depthprune.timing.clock import made_up
from depthprune.timing.latency import Network, Timing
from depthprune.train.options import ConfigError
from depthprune.train.task import as_dict

BATCHES = (1, 8, 32, 128)


class Original(NamedTuple):
  """The network that a run began with, with made-up arrays; FLOPs of one example."""

  network: Network
  flops: int
  params: int


def bench(
  paths: Sequence[str | Path],
  batches: Sequence[int] = BATCHES,
  seconds: float = 2.0,
) -> dict[str, Any]:
  """Measures saved networks and cascades at every batch size.

  Args:
    paths: directories of runs, or folders of saved networks.
    batches: batch sizes.
    seconds: time to spend on each batch size of each network.

  Returns:
    Plain values for JSON: the device, its peak for every type of number, and for each
    network and batch size the milliseconds, examples per second, and the milliseconds
    at the device's peak.

  Raises:
    ValueError: there is no path, a batch is below 1, or `seconds` is not positive.
    CheckpointError: a path holds no network, or a damaged one.
  """
  if not paths:
    raise ValueError('bench: expected a run or a saved network, got none')
  if not batches or min(batches) < 1:
    raise ValueError(f'batches: expected whole numbers >= 1, got {[*batches]}')
  if not 0 < seconds < math.inf:
    raise ValueError(f'seconds: expected a finite number > 0, got {seconds}')
  networks = [find(path, of_run(path)) for path in paths]
  peaks = {dtype: roofline.measure(dtype) for dtype in sorted({*map(_dtype, networks)})}
  measured = []
  for path, saved in zip(paths, networks, strict=True):
    measure = _network if saved.cascade is None else _cascade
    values = measure(saved, peaks[_dtype(saved)], sorted({*batches}), seconds)
    measured.append({'path': str(path), 'dtype': _dtype(saved), **values})
  return {
    'device': latency.device(),
    'versions': directory.versions(),
    'command': directory.command(),
    'peaks': {dtype: peak.to_json() for dtype, peak in peaks.items()},
    'networks': measured,
  }


def original(run: Path, after: Pruned) -> Original:
  """Builds the network that a run began with, up to the exits that answer.

  Args:
    run: directory of the run, for its config.
    after: the network that was saved at its end.

  Raises:
    ValueError: this version cannot build it.
  """
  config = _config(run)
  if config.pretrained is not None and not Path(config.pretrained).is_dir():
    config = dataclasses.replace(config, pretrained=None)  # arrays are made up anyway
  inputs = after.coupling.inputs
  left = as_dict(jax.eval_shape(function(after), after.variables, *inputs))
  model = build_network(config, next(iter(left.values())).shape[-1], *inputs)
  shapes = jax.eval_shape(model.init, jax.random.key(0), *inputs)
  variables = jax.tree.map(lambda s: made_up(s.shape, s.dtype), shapes)
  run_all = runnable(model)
  exits = [*as_dict(jax.eval_shape(run_all, variables, *inputs))]
  exits = getattr(model, 'exits', exits)
  kept = () if config.recipe.deepest_answers else left
  answers = [name for name in kept if name in exits] or exits[-1:]

  def answer(variables, *inputs):
    outputs = as_dict(run_all(variables, *inputs))
    return {name: outputs[name] for name in answers}

  coupling = couple(answer, variables, *inputs)
  flops = cost.flops(coupling) // inputs[0].shape[0]
  return Original(Network(answer, variables), flops, cost.params(coupling))


def _config(run: Path) -> Config:
  stored = files.read_json(run / 'config.json', ConfigFile, ConfigError)
  return from_json(stored['config'])


def _network(
  saved: Saved, peak: roofline.Peak, batches: Sequence[int], seconds: float
) -> dict[str, Any]:
  small, inputs = saved.network, saved.network.coupling.inputs
  after = Network(function(small), small.variables)
  before, notes = None, []
  if saved.run is not None:
    try:
      before = original(saved.run, small)
    except (ValueError, AttributeError) as error:  # a model or a file is gone
      notes.append(f'without what the run began with, which cannot be built: {error}')
  flops = cost.flops(small.coupling, small.keep) // inputs[0].shape[0]
  networks = [before.network, after] if before else [after]
  lines = {}
  for batch, taken in latency.sweep(
    networks, *probe(batched(inputs, 1)), batches=batches, seconds=seconds
  ):
    roof = peak.milliseconds(batch * flops, _moved(after, inputs, batch))
    lines[str(batch)] = _line(batch, latency.timing(taken[-1]), roof)
    if before:
      compared = latency.compared(batch, *taken)
      lines[str(batch)] |= _against(compared.before, compared.speedup, compared.faster)
      notes += latency.notes([compared])
  params = cost.params(small.coupling, small.keep)
  return {
    'kind': 'network',
    'flops': {'before': before and before.flops, 'after': flops},
    'params': {'before': before and before.params, 'after': params},
    'batches': lines,
    'notes': notes,
  }


def _line(batch: int, taken: Timing, roof: float) -> dict[str, Any]:
  return {
    'ms': taken.median,
    'ms_quartiles': [taken.lower, taken.upper],
    'runs': taken.runs,
    'per_second': 1e3 * batch / taken.median,
    'roof_ms': roof,
  }


def _against(before: Timing, speedup: float, faster: int) -> dict[str, Any]:
  quartiles = [before.lower, before.upper]
  return {
    'before_ms': before.median,
    'before_ms_quartiles': quartiles,
    'speedup': speedup,
    'faster': faster,
  }


def _moved(network: Network, inputs: Sequence[Any], batch: int) -> int:
  """Returns the bytes of arrays, inputs and outputs, which all have to be moved."""
  shapes = batched(tuple(inputs), batch)
  outputs = jax.eval_shape(network.apply, network.variables, *shapes)
  leaves = jax.tree.leaves((network.variables, shapes, outputs))
  return sum(int(np.prod(x.shape)) * x.dtype.itemsize for x in leaves)


def _dtype(saved: Saved) -> str:
  """Returns the type of number in which the network computes."""
  model = getattr(saved.network.model, 'trunk', saved.network.model)
  return jnp.dtype(getattr(model, 'dtype', jnp.float32)).name


def _cascade(
  saved: Saved, peak: roofline.Peak, batches: Sequence[int], seconds: float
) -> dict[str, Any]:
  early, small = saved.cascade, saved.network
  assert early is not None
  alone = lambda v, *inputs: early.stages.fn(v, *inputs)[early.exits[-1]]
  whole = Network(alone, small.variables)
  values = {
    'kind': 'cascade',
    'flops': {'before': early.stages.whole},
    'params': {'before': None, 'after': cost.params(small.coupling, small.keep)},
    'exits': dict(zip(early.exits, early.stages.flops)),
  }
  try:
    examples = _examples(saved, max(batches))
  except DataError as error:
    inputs = probe(batched(small.coupling.inputs, max(batches)))
    each, main = race.exit_milliseconds(early, *inputs, seconds=seconds)
    ms = {'alone': main, **dict(zip(early.exits, map(float, each)))}
    note = f'without its data ({error}): an example if all leave at one exit'
    return {**values, 'batches': {}, 'exits_ms': ms, 'notes': [note]}
  lines = {}
  for batch in batches:
    inputs = [jnp.take(x, np.arange(batch) % x.shape[0], axis=0) for x in examples]
    run = race.race(early, *inputs, seconds=seconds)
    moved = _moved(whole, inputs, batch)
    line = _line(batch, run.cascade, peak.milliseconds(batch * run.cost.ideal, moved))
    lines[str(batch)] = {
      **line,
      **_against(run.whole, 1 / run.share, run.faster),
      'ideal': run.cost.ideal,
      'padded': run.cost.padded,
    }
  return {**values, 'batches': lines, 'notes': []}


def _examples(saved: Saved, count: int) -> list[jax.Array]:
  """Reads the first test examples of the cascade's run."""
  if saved.run is None:
    raise DataError(f'{saved.folder} is not in the directory of a run')
  images = data.read(_config(saved.run))
  return [*inputs_of(next(iter(images.batches(images.test, count))))]
