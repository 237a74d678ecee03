"""SideNets of one network, by regime and seed; rows are written as they are done.

  frozen   the paper's: heads alone, on features computed once
  mixed    frozen first, then network and heads together

Every (regime, seed) is one row; a second call goes on where the first one ended.
Thresholds, temperatures and weights of a learned confidence see held-out data only; the
test data is read once per row.
"""

import dataclasses
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from depthprune.config import Config
from depthprune.options import SideNet
from depthprune.training import recipe
from experiments.pieces import Rows, arguments, within

RESULTS = Path(__file__).parent / 'results'
SEEDS = 3


def main(
  doc: str | None,
  name: str,
  full: Config[SideNet],
  small: Mapping[str, Mapping[str, Any]],
  pretrained: str | None = None,
) -> None:
  """The command of one network: results/NAME.json, or NAME_full.json with --full.

  small: regimes, each with what differs from `full` in the size for a CPU. pretrained:
  weights that lie elsewhere on every machine, so that a result cannot depend on where.
  """
  given = arguments(doc)
  name = f'{name}_full' if given.full else name
  described = full.to_json()
  if not given.full:
    first = next(iter(small.values()))
    described = dataclasses.replace(full, **first).to_json() | small_of(small)
  rows = Rows(RESULTS / f'{name}.json', described, ('regime', 'seed'))
  with within(given.minutes):
    for regime, less in small.items():
      for seed in given.seeds or range(SEEDS):
        if rows.missing(regime=regime, seed=seed):
          config = dataclasses.replace(full, **({} if given.full else less))
          options = dataclasses.replace(config.options, regime=regime)
          folder = Path('runs/sidenet') / name / f'{regime}-seed{seed}'
          config = dataclasses.replace(
            config,
            options=options,
            seed=seed,
            workdir=str(folder),
            pretrained=pretrained or config.pretrained,
          )
          rows.add({'regime': regime, 'seed': seed, **row(config)})
          shutil.rmtree(folder / 'features', ignore_errors=True)


def small_of(small: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
  """What the rows of a CPU's size depend on besides the config."""
  plain = lambda v: dataclasses.asdict(v) if isinstance(v, SideNet) else v
  return {
    'small': {
      regime: {key: plain(value) for key, value in less.items()}
      for regime, less in small.items()
    }
  }


def row(config: Config[SideNet]) -> dict[str, Any]:
  """What one run reached; reliability diagrams of the first seed alone."""
  result = recipe.run(config)
  found = result['cascade']
  if config.seed:
    for entry in found['calibration'].values():
      for part in (entry['all'], entry['exited']):
        for when in ('before', 'after') if part else ():
          part[when].pop('bins')
  keys = ('accuracy', 'held_out', 'flops', 'params', 'images', 'wall_seconds', 'device')
  config_ = {'train': config.epochs.train, 'heads': config.epochs.gates}
  if config.options.regime == 'mixed':
    config_['mixed'] = config.epochs.finetune
  return {'epochs': config_, **{k: result[k] for k in keys}, **found}
