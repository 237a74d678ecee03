"""SideNets of one network, by regime and seed; rows are written as they are done.

  frozen   the paper's: heads alone, on features computed once
  mixed    frozen first, then network and heads together

Every (regime, seed) is one row; a second call goes on where the first one ended.
Thresholds, temperatures and weights of a learned confidence see held-out data only; the
test data is read once per row.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from depthprune.options import SideNet
from depthprune.run import rounds as recipe
from depthprune.run.config import Config
from experiments.pieces import SEEDS, Arguments, Case, Rows, fill, sized


def main(
  name: str,
  full: Config[SideNet],
  small: Mapping[str, Mapping[str, Any]],
  given: Arguments,
  weights: Callable[[], str] | None = None,
) -> list[Case]:
  """Fills results/NAME.json, or NAME_full.json with --full; what is left.

  small: regimes, each with what differs from `full` in the size for a CPU. weights:
  finds those that lie elsewhere on every machine, so that no result depends on where.
  """
  first, *_ = small.values()
  to, config = sized('sidenet', name, full, first, given)
  described = dataclasses.replace(config, workdir=None).to_json()
  described |= {} if given.full else small_of(small)
  seeds = given.seeds or range(SEEDS)
  cases = [{'regime': regime, 'seed': seed} for regime in small for seed in seeds]
  folder = lambda case: config.path / f'{case["regime"]}-seed{case["seed"]}'

  def make(case: Case) -> dict[str, Any]:
    regime = case['regime']
    mine = dataclasses.replace(full, **({} if given.full else small[regime]))
    run = dataclasses.replace(
      mine,
      options=dataclasses.replace(mine.options, regime=regime),
      seed=case['seed'],
      workdir=str(folder(case)),
      pretrained=weights() if weights else mine.pretrained,
    )
    return row(run)

  rows = Rows(to, described, ('regime', 'seed'))
  return fill(rows, lambda: cases, make, given, lambda case: folder(case) / 'features')


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
