"""NetCut over beta and aggregates, and its control: networks with a single head.

  netcut   one run per (options, seed): a head on every tap, cut where importance says
  single   the network that ends at tap `depth`, with a head there alone, trained as
           long, with the same optimizer and the same images

Decisions see held-out images only; the test images are read once per row, at the end.
"""

import dataclasses
import functools
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax

import depthprune as dp
from depthprune.models.arch import Arch
from depthprune.options import NetCut
from depthprune.run import rounds as recipe
from depthprune.run.config import Config
from depthprune.run.job import prepare, stage
from depthprune.train.evaluate import evaluator
from depthprune.train.method import plain
from experiments.pieces import SEEDS, Arguments, Case, Rows, fill, folder_of, sized

PAPER = tuple({'beta': beta} for beta in (0.0, 0.001, 0.01, 0.1))  # plain networks
KEYS = ('method', 'seed', 'depth', 'beta', 'aggregate', 'gamma')


def main(
  name: str,
  full: Config[NetCut],
  small: Mapping[str, Any],
  given: Arguments,
  options: Sequence[Mapping[str, Any]] = PAPER,
  depths: Sequence[int] = (),
  seeds: int = SEEDS,
) -> list[Case]:
  """Fills results/NAME.json, or NAME_full.json with --full; what is left.

  small: what differs from `full` in the size for a CPU. options: what differs from the
  options of the config, run by run. depths: of the single-head networks; by default
  those that `log` chose, seed by seed. seeds: how many, at a CPU's size.
  """
  to, config = sized('netcut', name, full, small, given)
  rows = Rows(to, config.to_json(), KEYS)
  chosen = [dataclasses.replace(config.options, **changes) for changes in options]

  def cases() -> Iterator[Case]:
    for seed in given.seeds or range(5 if given.full else seeds):
      for o in chosen:
        which = {k: getattr(o, k) for k in ('beta', 'aggregate', 'gamma')}
        yield {'method': 'netcut', 'seed': seed, **which}
      mine = [r for r in rows.rows if r['seed'] == seed and r.get('aggregate') == 'log']
      for depth in depths or sorted({r['kept'] for r in mine}):
        yield {'method': 'single', 'seed': seed, 'depth': depth}

  folder = functools.partial(folder_of, config)

  def make(case: Case) -> dict[str, Any]:
    which = {k: case[k] for k in ('beta', 'aggregate', 'gamma') if k in case}
    run = dataclasses.replace(
      config,
      options=dataclasses.replace(config.options, **which),
      seed=case['seed'],
      workdir=str(folder(case)),
    )
    return _single(run, case['depth']) if 'depth' in case else _cut(run)

  return fill(rows, cases, make, given, folder)


def _cut(config: Config[NetCut]) -> dict[str, Any]:
  # What a cut costs is what is being measured, so none is refused.
  options = dataclasses.replace(config.options, force=True)
  result = recipe.run(dataclasses.replace(config, options=options))
  (found,) = result['rounds']
  (kept,), importance = found['exits'], found['learned']['importance']
  lines = (config.path / 'gates.jsonl').read_text().splitlines()
  history = [json.loads(line) for line in lines]
  row = {
    'exits': len(importance),
    'kept': 1 + sorted(importance).index(kept),
    'max_importance': found['learned']['max_importance'],
    'entropy': found['learned']['entropy'],
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
      [h['step'], [round(h['importance'][e], 4) for e in sorted(importance)]]
      for h in history
    ],
  }
  return row


def _single(config: Config[NetCut], depth: int) -> dict[str, Any]:
  started = time.monotonic()
  job = prepare(config)
  model = single(recipe.network(config, job.images.classes), depth)
  variables = jax.jit(model.init)(job.key('init'), job.example)
  epochs, peak = config.epochs.gates, config.learning_rate
  state = stage(job, 'train', model, plain(), variables, epochs=epochs, peak=peak)
  measure = evaluator(model, job.task)
  accuracy = lambda split: measure(state.variables, job.batches(split))['accuracy']
  coupling = dp.couple(model, variables, job.example)
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
