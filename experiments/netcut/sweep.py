"""NetCut over beta and aggregates, beside networks with a single head.

  netcut   one run for each (options, seed): a head on every tap, cut where the
           importance says
  single   the network that ends at tap `depth`, with a head there alone, trained as
           long, with the same optimizer and the same images

Decisions see held-out images only; the test images are read once per row, at the end.
"""

import dataclasses
import functools
import json
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

import depthprune as dp
from depthprune.methods.netcut import NetCutOptions
from depthprune.models.arch import Arch
from depthprune.report.numbers import spread
from depthprune.run import rounds
from depthprune.run import rounds as recipe
from depthprune.run.config import Config
from depthprune.run.job import prepare, stage
from depthprune.train.evaluate import evaluator
from depthprune.train.method import plain
from depthprune.train.result import to_json
from experiments.result_files import Row, Rows, files_with, link, percent, table
from experiments.run import SEEDS, Arguments, Case, fill, run_folder, sized

PAPER = tuple({'beta': beta} for beta in (0.0, 0.001, 0.01, 0.1))  # plain networks
KEYS = ('method', 'seed', 'depth', 'beta', 'aggregate', 'gamma')
OPTIONS = ('beta', 'aggregate', 'gamma')
HEAD = (
  *('β', 'aggregate', 'exit kept', 'max w', 'accuracy, whole', 'cut', 'points'),
  *('a single head there', 'FLOPs, %', 'speed-up', 'seeds'),
)


def run(
  name: str,
  full: Config[NetCutOptions],
  small: Mapping[str, Any],
  arguments: Arguments,
  options: Sequence[Mapping[str, Any]] = PAPER,
  depths: Sequence[int] = (),
  seeds: int = SEEDS,
) -> list[Case]:
  """Fills the result file of an experiment and returns the cases that are left.

  Args:
    name: The function in configs.py.
    full: The config for an accelerator.
    small: What differs from `full` at the size for a CPU.
    arguments: What the experiment is asked.
    options: What differs from the options of the config, run by run.
    depths: Of the networks with a single head; by default those that `log` chose, seed
      by seed.
    seeds: How many there are at the size for a CPU; an accelerator has 5.
  """
  path, config = sized('netcut', name, full, small, arguments)
  rows = Rows(path, config.to_json(), KEYS)
  chosen = [dataclasses.replace(config.options, **changes) for changes in options]
  folder = functools.partial(run_folder, config)

  def cases() -> Iterator[Case]:
    for seed in arguments.seeds or range(5 if arguments.full else seeds):
      for each in chosen:
        which = {k: getattr(each, k) for k in OPTIONS}
        yield {'method': 'netcut', 'seed': seed, **which}
      same_seed = [row for row in rows.rows if row['seed'] == seed]
      kept = {row['kept'] for row in same_seed if row.get('aggregate') == 'log'}
      for depth in depths or sorted(kept):
        yield {'method': 'single', 'seed': seed, 'depth': depth}

  def make(case: Case) -> Row:
    which = {k: case[k] for k in OPTIONS if k in case}
    own = dataclasses.replace(
      config,
      options=dataclasses.replace(config.options, **which),
      seed=case['seed'],
      workdir=str(folder(case)),
    )
    return _single_row(own, case['depth']) if 'depth' in case else _netcut_row(own)

  return fill(rows, cases, make, arguments, folder)


def _netcut_row(config: Config[NetCutOptions]) -> Row:
  # What a cut costs is what is being measured, so none is refused.
  options = dataclasses.replace(config.options, force=True)
  result = to_json(rounds.run(dataclasses.replace(config, options=options)))
  (only,) = result['rounds']
  (kept,), importance = only['exits'], only['learned']['importance']
  lines = (config.path / 'gates.jsonl').read_text().splitlines()
  return {
    'exits': len(importance),
    'kept': 1 + sorted(importance).index(kept),
    'max_importance': only['learned']['max_importance'],
    'entropy': only['learned']['entropy'],
    'accuracy_before': result['accuracy']['before'],
    'accuracy_cut': result['accuracy']['pruned'],
    'held_out_before': result['held_out']['before'],
    'held_out_cut': result['held_out']['pruned'],
    **{k: result[k]['after'] for k in ('flops', 'params')},
    **{f'{k}_full': result[k]['before'] for k in ('flops', 'params')},
    'compile_s': result['compile_s'],
    'latency_ms': result['latency_ms'],
    'wall_seconds': round(result['wall_seconds'], 1),
    'importance_history': [
      [line['step'], [round(line['importance'][e], 4) for e in sorted(importance)]]
      for line in map(json.loads, lines)
    ],
  }


def _single_row(config: Config[NetCutOptions], depth: int) -> Row:
  started = time.monotonic()
  job = prepare(config)
  model = single(recipe.network(config, job.images.classes), depth)
  variables = jax.jit(model.init)(job.key('init'), *job.inputs)
  epochs, peak = config.epochs.gates, config.learning_rate
  state = stage(job, 'train', model, plain(), variables, epochs=epochs, peak=peak)
  measure = evaluator(model, job.task)
  accuracy = lambda split: measure(state.variables, job.batches(split))['accuracy']
  coupling = dp.couple(model, variables, *job.inputs)
  return {
    'accuracy': accuracy(job.images.test),
    'held_out': accuracy(job.images.held_out),
    'flops': dp.cost.flops(coupling),
    'params': dp.cost.params(coupling),
    'wall_seconds': round(time.monotonic() - started, 1),
  }


def single(model: Any, depth: int) -> Any:
  """A network with a head on every tap, without all heads but that of `depth` (1, ...).

  What lies behind that tap is gone too.
  """
  arch: Arch = {f'exit/{e}': 0 for i, e in enumerate(model.exits, 1) if i != depth}
  return model.clone(arch=type(model.arch)({**model.arch, **arch}))


def netcut_tables() -> str:
  """Chosen depths and what the cut costs; a table for each result file, or a dash."""
  contents = files_with('netcut', 'beta')
  return '\n\n'.join(_table(*file) for file in contents.items()) or 'NetCut: –'


def _table(path: Path, content: dict[str, Any]) -> str:
  rows = [row for row in content['rows'] if 'beta' in row]
  single = [row for row in content['rows'] if row.get('method') == 'single']
  kinds = dict.fromkeys((r['beta'], r['aggregate'], r['gamma']) for r in rows)
  lines = [
    _line([r for r in rows if (r['beta'], r['aggregate'], r['gamma']) == kind], single)
    for kind in sorted(kinds, key=lambda kind: (kind[1] != 'log', kind[2], kind))
  ]
  config = content['config']
  return (
    f'NetCut, {config["model"]} on {config["data"]}, {config["gate_epochs"]} epochs, '
    f'{rows[0]["exits"]} exits, mean ± standard deviation; test accuracy in %; '
    'speed-up at batch 128, '
    f'{content["device"]} ({link(path)}):\n\n' + table(HEAD, lines)
  )


def _line(rows: list[Row], single: list[Row]) -> tuple[str, ...]:
  first = rows[0]
  gamma = f', γ = {first["gamma"]:g}' if first['gamma'] else ''
  speedups = [r['latency_ms']['128']['speedup'] for r in rows if 'latency_ms' in r]
  return (
    f'{first["beta"]:g}',
    f'{first["aggregate"]}{gamma}',
    spread((row['kept'] for row in rows), 1),
    spread(row['max_importance'] for row in rows),
    percent(row['accuracy_before'] for row in rows),
    percent(row['accuracy_cut'] for row in rows),
    spread(100 * (row['accuracy_cut'] - row['accuracy_before']) for row in rows),
    _control(rows, single),
    percent(row['flops'] / row['flops_full'] for row in rows),
    spread(speedups) if speedups else '–',
    str(len(rows)),
  )


def _control(rows: list[Row], single: list[Row]) -> str:
  """Mean accuracy of networks trained with one head, at the depths that were chosen."""
  at = lambda depth: [s['accuracy'] for s in single if s['depth'] == depth]
  depths = [row['kept'] for row in rows]
  if not all(map(at, depths)):
    return '–'
  return f'{100 * statistics.mean(statistics.mean(at(d)) for d in depths):.2f}'
