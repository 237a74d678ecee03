"""SideNets on a network that is small already: as it is, pruned, and int8.

Every (network, seed) is one row; the paper calls the network the MainNet.
"""

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

import depthprune as dp
from depthprune.data.features import FeatureSet
from depthprune.exports import networks as checkpoint
from depthprune.methods.sidenet import SideNetOptions
from depthprune.report.numbers import spread
from depthprune.run import early_exit as reached
from depthprune.run import heads as sides
from depthprune.run.config import Config
from depthprune.run.early_exit import Decided, assembled, choose_held_out, decide
from depthprune.run.job import Job, prepare, stage
from depthprune.run.network import initial_variables, network
from depthprune.train.method import plain
from depthprune.train.task import Tree
from experiments.result_files import (
  Row,
  Rows,
  files_with,
  link,
  path_of,
  percent,
  table,
)
from experiments.run import SEEDS, Arguments, Case, within

TARGET = 0.6  # of the FLOPs, for `pruned`
STATISTICS = 20  # batches that its statistics are measured on, before it is fine-tuned
HEAD = (
  *('MainNet', 'accuracy, %', 'MFLOPs', 'weights, KiB', 'cascade, %'),
  *('points lost', 'FLOPs saved, %', 'seeds'),
)


class MainNet(NamedTuple):
  """A network and its arrays, of whatever kind they are."""

  model: Any
  variables: Tree


def unchanged(job: Job) -> MainNet:
  """The network of a job's config, as it is stored."""
  model = network(job.config, job.images.classes)
  return MainNet(model, initial_variables(job, model))


def pruned(job: Job) -> MainNet:
  """Pruned, fine-tuned and saved, unless that was done; then read from its folder."""
  folder = job.folder / 'network'
  if not folder.is_dir():
    model, variables = unchanged(job)
    coupling = dp.couple(model, variables, *job.inputs)
    keep = dp.oneshot(coupling, variables, TARGET, scope='uniform')
    small = dp.prune(model, variables, keep, job.inputs, coupling=coupling)
    batch_at = job.batch_at('statistics').stepwise()
    batches = (batch_at(job.train, i) for i in range(STATISTICS))
    fresh = dp.recalibrate(small.model, small.variables, batches)
    peak, epochs = job.config.learning_rate, job.config.epochs.finetune
    state = stage(
      job, 'finetune', small.model, plain(), fresh, epochs=epochs, peak=peak
    )
    small = small._replace(variables=state.variables)
    checkpoint.save(folder, small, job.images.normalisation)
  config = dataclasses.replace(job.config, pretrained=str(folder))
  return unchanged(job._replace(config=config))


def int8(job: Job) -> MainNet:
  """Quantised after training.

  Raises:
    ModuleNotFoundError: Where qwix is not installed.
  """
  import qwix  # only here, so that the others run without it

  model, variables = unchanged(job)
  rule = qwix.QuantizationRule(weight_qtype=jnp.int8, act_qtype=jnp.int8)
  quantised = qwix.quantize_model(model, qwix.PtqProvider([rule]))
  shapes = jax.eval_shape(quantised.init, job.key('int8'), *job.inputs)
  params = qwix.quantize_params(variables['params'], shapes['params'])
  return MainNet(quantised, {**variables, 'params': params})


MAINNETS: dict[str, Callable[[Job], MainNet]] = {
  'plain': unchanged,
  'pruned': pruned,
  'int8': int8,
}


def run(name: str, config: Config[SideNetOptions], arguments: Arguments) -> list[Case]:
  """Fills the result file of an experiment and returns the cases that are left."""
  path = path_of('sidenet', name, full=False)
  rows = Rows(path, {**config.to_json(), 'target': TARGET}, ('mainnet', 'seed'))
  seeds = arguments.seeds or range(SEEDS)
  every = [{'mainnet': mainnet, 'seed': seed} for mainnet in MAINNETS for seed in seeds]
  left = lambda: [case for case in every if rows.missing(**case)]
  if not arguments.left:
    with within(arguments.minutes):
      for mainnet in MAINNETS:
        missing = [case['seed'] for case in left() if case['mainnet'] == mainnet]
        if missing:
          workdir = f'runs/sidenet/{name}/{mainnet}'
          own = dataclasses.replace(config, workdir=workdir)
          _add_rows(rows, mainnet, own, missing)
  return left()


def _add_rows(
  rows: Rows, name: str, config: Config[SideNetOptions], seeds: list[int]
) -> None:
  """Adds the rows of one network, or reports why it cannot be made."""
  job = choose_held_out(prepare(config))
  try:
    mainnet = MAINNETS[name](job)
  except ModuleNotFoundError as error:
    print(f"{name} is skipped: {error}; pip install 'qwix>=0.1.8'")
    return
  model = sides.with_sides(sides.cascade_plan(config), mainnet.model, job)
  variables = sides.with_trunk(job, model, mainnet.variables)
  features = sides.feature_set(job, model, variables)
  for seed in seeds:
    seeded = dataclasses.replace(job.config, seed=seed)
    own = job._replace(config=seeded, folder=job.folder / f'seed{seed}')
    row = _make_row(own, model, mainnet.variables, features)
    rows.add({'mainnet': name, 'seed': seed, **row})
  shutil.rmtree(job.folder / 'features')


def _make_row(job: Job, model: Any, variables: Tree, features: FeatureSet) -> Row:
  """What heads of one seed reach; `variables` belong to the network without heads."""
  with_heads = sides.with_trunk(job, model, variables)
  trained = sides.fit_heads(job, model, with_heads, features)
  decided = decide(job, trained)
  test = decided.test
  accuracy = (test.logits.argmax(-1) == test.labels).mean(-1)
  arrays = {k: v for k, v in variables.items() if k != 'branches'}
  return {
    'accuracy': float(accuracy[-1]),
    'flops': decided.stages.whole,
    'bytes': sum(x.nbytes for x in jax.tree.leaves(arrays)),
    'exit_accuracy': dict(zip(test.exits, accuracy.tolist(), strict=True)),
    'cost': dict(zip(test.exits, decided.stages.flops, strict=True)),
    'requested': {decided.kind: decided.requested},
    **reached.outcome(decided, decided.chosen),
    'executed': None if job.config.seed else _execute(job, trained, decided),
  }


def _execute(job: Job, trained: sides.Trained, decided: Decided) -> dict[str, Any]:
  """Runs and times the cascade on the reporting images, beside what was simulated."""
  _, cascade = assembled(job, trained, decided)
  return {'exits': cascade.exits, **reached.execute(job, decided, cascade)}


def small_network_tables() -> str:
  """On networks that are small already; a table for each result file, or a dash."""
  parts = (_table(*file) for file in files_with('sidenet', 'mainnet').items())
  return '\n\n'.join(parts) or 'SideNet on a pruned and on an int8 network: –'


def _table(path: Path, content: dict[str, Any]) -> str:
  lines = []
  for name in dict.fromkeys(row['mainnet'] for row in content['rows']):
    own = [row for row in content['rows'] if row['mainnet'] == name]
    tests = [row['test'] for row in own]
    line = (
      name,
      f'{100 * own[0]["accuracy"]:.2f}',
      f'{own[0]["flops"] / 1e6:.1f}',
      f'{own[0]["bytes"] / 1024:.0f}',
      percent(test['accuracy'] for test in tests),
      spread(test['drop'] for test in tests),
      percent(test['saved'] for test in tests),
      str(len(own)),
    )
    lines.append(line)
  config = content['config']
  return (
    f'SideNets on networks that are small already, {config["model"]} on '
    f'{config["data"]}, a drop of {config["options"]["drop"]:g} points asked for '
    f'({link(path)}):\n\n' + table(HEAD, lines)
  )
