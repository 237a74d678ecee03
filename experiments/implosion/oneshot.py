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

import functools
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import depthprune as dp
from depthprune.methods.implosion import ImplosionOptions, erasure, implosion
from depthprune.program.coupling import Coupling
from depthprune.program.gating import with_branches
from depthprune.program.units import ResidualUnit, closing, units
from depthprune.run import rounds as recipe
from depthprune.run.config import Config
from depthprune.run.job import Job, prepare, stage
from depthprune.run.network import initial_variables
from depthprune.storage import directory as record
from depthprune.train.evaluate import evaluate, recalibrate
from depthprune.train.judge import Judge, judge
from depthprune.train.task import Tree
from experiments.implosion.retraining import subject
from experiments.result_files import Row, Rows, files_with, link, percent, table
from experiments.run import Arguments, Case, fill, sized

KEYS = ('importance', 'seed', 'erased', 'cut')
COLUMNS = 8  # numbers of erased units that a table shows


class Sizes(NamedTuple):
  """Images that decide and that report, and augmented batches for the statistics."""

  deciding: int
  reporting: int
  calibration: int


class Network(NamedTuple):
  """A network with trained priorities, and those who judge it.

  Attributes:
    job: The run that trained it.
    model: The module.
    coupling: Its groups and units.
    variables: Its arrays, with the priorities in place.
    theta: The priorities.
    deciding: Judges on the images that decide.
    reporting: Judges on the images that report.
  """

  job: Job
  model: Any
  coupling: Coupling
  variables: Tree
  theta: Tree
  deciding: Judge
  reporting: Judge


def run(
  name: str,
  full: Config[ImplosionOptions],
  small: Mapping[str, Any],
  sizes: Sizes,
  erased: int,
  series: Sequence[tuple[str, int]],
  arguments: Arguments,
) -> list[Case]:
  """Fills the result file of an experiment and returns the cases that are left.

  Args:
    name: The function in configs.py.
    full: The config for an accelerator.
    small: What differs from `full` at the size for a CPU.
    sizes: How many images decide, report and calibrate.
    erased: How many units are gone at the end of every curve.
    series: (importance, seed) of every curve.
    arguments: What the experiment is asked.
  """
  path, config = sized('implosion', name, full, small, arguments)
  rows = Rows(path, {**config.to_json(), **sizes._asdict(), 'erased': erased}, KEYS)
  network = functools.cache(lambda: trained(config, sizes))
  make = lambda case: curve_row(network(), case, erased)
  return fill(rows, lambda: cases(erased, series), make, arguments)


def cases(erased: int, series: Sequence[tuple[str, int]]) -> Iterator[Case]:
  """The uncut network, then every curve; that of `greedy` ends with a physical cut."""
  yield {'importance': 'none', 'seed': 0, 'erased': 0}
  for importance, seed in series:
    which = {'importance': importance, 'seed': seed}
    yield from ({**which, 'erased': n} for n in range(1, erased + 1))
    if importance == 'greedy':
      yield {**which, 'erased': erased, 'cut': True}


def trained(config: Config[ImplosionOptions], sizes: Sizes) -> Network:
  """The network of all curves; trained once, then read from its checkpoint."""
  job = prepare(config)
  record.write(job.folder / 'config.json', {'config': config.to_json()})
  model = recipe.network(config, job.images.classes)
  variables = initial_variables(job, model)
  coupling = dp.couple(model, variables, *job.inputs)
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


def order(
  network: Network, count: int, importance: str, seed: int = 0
) -> list[ResidualUnit]:
  """The first `count` units that go; written down one by one, so it can be resumed."""
  path = network.job.folder / f'order-{importance}{seed}.json'
  known = {unit.name: unit for unit in units(network.coupling)}
  names = json.loads(path.read_text())['order'] if path.is_file() else []
  gone = [known[name] for name in names]
  among = [unit for unit in known.values() if not unit.why_not]
  while len(gone) < count:
    more = 1 if importance == 'greedy' else count - len(gone)
    judged = network.theta, network.deciding
    gone += erasure(
      network.coupling, among, more, importance, *judged, seed=seed, gone=gone
    )
    record.write(path, {'order': [unit.name for unit in gone]})
  return gone


def curve_row(network: Network, case: Case, count: int) -> Row:
  """The rest of the row of a case; `count` units are gone at the end of its curve."""
  gone = []
  if case['erased']:
    gone = order(network, count, case['importance'], case['seed'])[: case['erased']]
  started = time.monotonic()
  keep = closing(gone, network.coupling) if gone else {}
  if not gone:
    row = uncut(network)
  elif case.get('cut'):
    row = cut(network, keep)
  else:
    row = {'unit': gone[-1].name, **network.reporting(keep)}
  return {
    **row,
    'flops': int(dp.cost.flops(network.coupling, keep)),
    'params': int(dp.cost.params(network.coupling, keep)),
    'wall_seconds': round(time.monotonic() - started, 1),
  }


def uncut(network: Network) -> Row:
  """The network before anything is erased, with new batch statistics and as trained."""
  priorities = implosion(network.coupling).report(network.theta)['priority']
  return {
    **_recalibrated(network, network.model, network.variables),
    'accuracy_as_trained': network.reporting({})['accuracy'],
    'priority': {name: round(float(w), 5) for name, w in priorities.items()},
  }


def cut(network: Network, keep: Tree) -> Row:
  """A network whose erased units are cut out, not only masked."""
  pruned = dp.prune(
    network.model,
    network.variables,
    keep,
    network.job.inputs,
    coupling=network.coupling,
  )
  scores = _recalibrated(network, pruned.model, pruned.variables)
  return {**scores, 'verify': pruned.report['verify']['difference']}


def _recalibrated(network: Network, model: Any, variables: Tree) -> dict[str, float]:
  """Loss and accuracy on reporting images, after recalibration."""
  fresh = recalibrate(model, variables, network.reporting.calibration)
  return evaluate(model, fresh, network.reporting.held_out, network.job.task)


def oneshot_tables() -> str:
  """Erased without retraining; a table for each result file, or a dash."""
  contents = files_with('implosion', 'importance', 'erased')
  parts = (_table(*file) for file in contents.items())
  return '\n\n'.join(parts) or 'Network Implosion, erased without retraining: –'


def by_importance(rows: list[Row]) -> dict[str, dict[int, list[float]]]:
  """{importance: {erased: accuracies}}; all curves begin with the uncut network.

  A network that was cut as well as masked counts once, masked.
  """
  curves: dict[str, dict[int, list[float]]] = {}
  for row in rows:
    if not row.get('cut'):
      curve = curves.setdefault(row['importance'], {})
      curve.setdefault(row['erased'], []).append(row['accuracy'])
  uncut = curves.pop('none', {})
  return {importance: {**uncut, **curve} for importance, curve in curves.items()}


def _table(path: Path, content: dict[str, Any]) -> str:
  curves = by_importance(content['rows'])
  counts = sorted({erased for curve in curves.values() for erased in curve})
  shown = counts[:: -(-len(counts) // COLUMNS)]
  at = lambda curve, n: percent(curve[n]) if n in curve else '–'
  lines = [[name, *(at(curve, n) for n in shown)] for name, curve in curves.items()]
  cut = ''.join(
    f'; {row["importance"]} with {row["erased"]} units cut out, '
    f'not only masked: {100 * row["accuracy"]:.2f}'
    for row in content['rows']
    if row.get('cut')
  )
  return (
    f'Network Implosion, {subject(content)}: accuracy in %, on test images that decide '
    'nothing, after erasing so many residual units, batch statistics measured anew, '
    f'not retrained{cut} ({link(path)}):\n\n'
    + table(['erased', *map(str, shown)], lines)
  )
