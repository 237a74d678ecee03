"""One-shot curves: accuracy against the number of erased units, nothing retrained.

  network  pretrained, its priorities and weights trained together for some steps: the
           same for all curves, because an imported network has all priorities 1
  order    in which units go, by one importance; found on deciding images
  curve    after each of them: batch statistics measured anew on augmented training
           images, accuracy on reporting images, which decide nothing

The pretrained networks saw all training images, so the first half of the test images
decides and the second half reports. Networks of a curve are masked, not cut: it is the
same function (`cut` shows it for one of them), and one compiled program serves all of
them, where each cut network would compile two of its own.
"""

import json
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import depthprune as dp
from depthprune.methods.implosion import erasure, implosion
from depthprune.options import Implosion
from depthprune.program.coupling import Coupling
from depthprune.program.gating import with_branches
from depthprune.program.units import Unit, closing, units
from depthprune.run import rounds as recipe
from depthprune.run.config import Config
from depthprune.run.job import Job, prepare, stage
from depthprune.storage import directory as record
from depthprune.train.evaluate import evaluate, recalibrate
from depthprune.train.judge import Judge, judge
from depthprune.train.task import Tree
from experiments.pieces import Arguments, Case, Rows, within

KEYS = ('importance', 'seed', 'erased', 'cut')


class Sizes(NamedTuple):
  """Images that decide and that report, and augmented batches for the statistics."""

  deciding: int
  reporting: int
  calibration: int


class Network(NamedTuple):
  """A network with trained priorities, and those who judge it.

  Attributes:
    variables: with the priorities in place. theta: the priorities.
  """

  job: Job
  model: Any
  coupling: Coupling
  variables: Tree
  theta: Tree
  deciding: Judge
  reporting: Judge


def run(
  config: Config[Implosion],
  sizes: Sizes,
  erased: int,
  series: Sequence[tuple[str, int]],
  to: Path,
  given: Arguments,
) -> list[Case]:
  """Fills the file `to`, config.path holds what is between; the rows that are left.

  series: (importance, seed) of every curve, which ends at `erased` units.
  """
  rows = Rows(to, {**config.to_json(), **sizes._asdict(), 'erased': erased}, KEYS)
  left = lambda: [case for case in _cases(erased, series) if rows.missing(**case)]
  if left() and not given.left:
    with within(given.minutes):
      network = trained(config, sizes)
      uncut(rows, network)
      for importance, seed in series:
        gone = order(network, erased, importance, seed)
        curve(rows, network, gone, importance, seed)
        if importance == 'greedy':
          cut(rows, network, gone, importance, seed)
  return left()


def _cases(erased: int, series: Sequence[tuple[str, int]]) -> Iterator[Case]:
  yield {'importance': 'none', 'seed': 0, 'erased': 0}
  for importance, seed in series:
    which = {'importance': importance, 'seed': seed}
    yield from ({**which, 'erased': n} for n in range(1, erased + 1))
    if importance == 'greedy':
      yield {**which, 'erased': erased, 'cut': True}


def trained(config: Config[Implosion], sizes: Sizes) -> Network:
  """The network of all curves; trained once, then read from its checkpoint."""
  job = prepare(config)
  record.write(job.folder / 'config.json', {'config': config.to_json()})
  model = recipe.network(config, job.images.classes)
  variables = recipe.start(job, model)
  coupling = dp.couple(model, variables, job.example)
  method = implosion(coupling)
  epochs, peak = config.epochs.gates, config.learning_rate
  state = stage(
    job, 'priorities', model, method, variables,
    epochs=epochs, peak=peak, coupling=coupling,
  )  # fmt: skip
  test, half = job.images.test, len(job.images.test['label']) // 2
  part = lambda a, b: list(job.batches({k: v[a:b] for k, v in test.items()}))
  batch_at = job.batch_at('judge').stepwise()
  calibration = [batch_at(job.train, i) for i in range(sizes.calibration)]
  judged = lambda images: judge(
    model, method, job.task, state, images, calibration, coupling
  )
  return Network(
    job,
    model,
    coupling,
    with_branches(state.variables, state.theta['branches']),
    state.theta,
    judged(part(0, min(sizes.deciding, half))),
    judged(part(half, half + sizes.reporting)),
  )


def order(network: Network, count: int, importance: str, seed: int = 0) -> list[Unit]:
  """The first `count` units that go; written down one by one, so it can be resumed."""
  path = network.job.folder / f'order-{importance}{seed}.json'
  known = {unit.name: unit for unit in units(network.coupling)}
  names = json.loads(path.read_text())['order'] if path.is_file() else []
  gone = [known[name] for name in names]
  among = [unit for unit in known.values() if not unit.why_not]
  while len(gone) < count:
    more = 1 if importance == 'greedy' else count - len(gone)
    given = network.coupling, among, more, importance, network.theta, network.deciding
    gone += erasure(*given, seed=seed, gone=gone)
    record.write(path, {'order': [unit.name for unit in gone]})
  return gone


def curve(
  rows: Rows, network: Network, gone: Sequence[Unit], importance: str, seed: int = 0
) -> None:
  """Adds a row for every number of erased units from 1 on."""
  for erased in range(1, len(gone) + 1):
    which = {'importance': importance, 'seed': seed, 'erased': erased}
    if rows.missing(**which):
      started = time.monotonic()
      keep = closing(gone[:erased], network.coupling)
      unit, found = gone[erased - 1].name, network.reporting(keep)
      rows.add({**which, 'unit': unit, **found, **_rest(network, keep, started)})


def uncut(rows: Rows, network: Network) -> None:
  """Adds the row of the whole network: with new batch statistics, and as trained."""
  which = {'importance': 'none', 'seed': 0, 'erased': 0}
  if rows.missing(**which):
    started = time.monotonic()
    found = _anew(network, network.model, network.variables)
    as_trained = network.reporting({})['accuracy']
    priorities = implosion(network.coupling).report(network.theta)['priority']
    rows.add(
      {
        **which,
        **found,
        'accuracy_as_trained': as_trained,
        'priority': {name: round(float(w), 5) for name, w in priorities.items()},
        **_rest(network, {}, started),
      }
    )


def cut(
  rows: Rows, network: Network, gone: Sequence[Unit], importance: str, seed: int = 0
) -> None:
  """Adds the row of the last network of a curve, physically cut."""
  which = {'importance': importance, 'seed': seed, 'erased': len(gone), 'cut': True}
  if rows.missing(**which):
    started, keep = time.monotonic(), closing(gone, network.coupling)
    pruned = dp.prune(
      network.model,
      network.variables,
      keep,
      network.job.example,
      coupling=network.coupling,
    )
    found = _anew(network, pruned.model, pruned.variables)
    verify = pruned.report['verify']['difference']
    rows.add({**which, **found, 'verify': verify, **_rest(network, keep, started)})


def _anew(network: Network, model: Any, variables: Tree) -> dict[str, float]:
  """Loss and accuracy on reporting images, after recalibration."""
  fresh = recalibrate(model, variables, network.reporting.calibration)
  return evaluate(model, fresh, network.reporting.held_out, network.job.task)


def _rest(network: Network, keep: Tree, started: float) -> dict[str, Any]:
  return {
    'flops': int(dp.cost.flops(network.coupling, keep)),
    'params': int(dp.cost.params(network.coupling, keep)),
    'wall_seconds': round(time.monotonic() - started, 1),
  }
