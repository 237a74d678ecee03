"""What heads of SideNets are made of and learn from, one thing changed at a time.

The network is frozen, and its features are computed once, for all variants and seeds.
Every (variant, seed) is one row. Variants are compared by what thresholds save on the
images that choose these, so the reporting images choose nothing.
"""

import dataclasses
import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from depthprune.cascades.thresholds import for_drop
from depthprune.data.features import FeatureSet
from depthprune.methods.sidenet import SideNetOptions
from depthprune.report.numbers import spread
from depthprune.run import early_exit as reached
from depthprune.run import heads as sides
from depthprune.run.config import Config
from depthprune.run.job import Job, prepare
from depthprune.run.network import initial_variables, network
from experiments.result_files import (
  Row,
  Rows,
  files_with,
  link,
  notes,
  percent,
  table,
)
from experiments.run import SEEDS, Arguments, Case, fill

CONFIDENCES = 'probability', 'learned'
DROPS = (0.25, 0.5, 1.0)  # points that are asked for
SHOWN = '0.5'  # of them, in the table
HEAD = (
  *('variant', 'heads, % of the FLOPs', 'where chosen, %', 'points lost'),
  *('FLOPs saved, %', 'at best, %', 'points lost, each', 'FLOPs saved, each, %'),
  *('points lost, learned', 'FLOPs saved, learned, %'),
  *('points lost, cross-validated', 'FLOPs saved, cross-validated, %', 'seeds'),
)


def run(
  path: Path,
  config: Config[SideNetOptions],
  variants: Mapping[str, Mapping[str, Any]],
  arguments: Arguments,
) -> list[Case]:
  """Fills the result file of an experiment and returns the cases that are left.

  Args:
    path: The result file.
    config: What all variants share; its taps are those that any of them reads.
    variants: What differs from the config's options.
    arguments: What the experiment is asked.
  """
  rows = Rows(path, config.to_json(), ('variant', 'seed'))
  seeds = arguments.seeds or range(SEEDS)
  cases = [{'variant': v, 'seed': seed} for seed in seeds for v in variants]

  @functools.cache
  def frozen() -> tuple[Job, Any, Any, FeatureSet]:
    job = reached.choose_held_out(prepare(config))
    trunk = network(config, job.images.classes)
    variables = initial_variables(job, trunk)
    model = sides.with_sides(sides.cascade_plan(config), trunk, job)
    read = sides.with_trunk(job, model, variables)
    return job, model, variables, sides.feature_set(job, model, read)

  def make(case: Case) -> Row:
    job, every, variables, features = frozen()
    options = dataclasses.replace(config.options, **variants[case['variant']])
    own = dataclasses.replace(config, options=options, seed=case['seed'])
    folder = config.path / f'{case["variant"].replace(" ", "-")}-{case["seed"]}'
    return _make_row(
      job._replace(config=own, folder=folder), every, variables, features
    )

  return fill(rows, lambda: cases, make, arguments)


def _make_row(job: Job, every: Any, variables: Any, features: FeatureSet) -> Row:
  """What the heads of one variant reach; `every` has a head on each tap there is."""
  model = sides.with_sides(sides.cascade_plan(job.config), every.trunk, job)
  own = of_taps(features, every, model)
  trained = sides.fit_heads(job, model, sides.with_trunk(job, model, variables), own)
  decided = {k: reached.decide(_with_confidence(job, k), trained) for k in CONFIDENCES}
  test = decided['probability'].test
  accuracy = (test.logits.argmax(-1) == test.labels).mean(-1)
  heads = test.cost[-1] / test.whole - 1
  return {
    'options': dataclasses.asdict(job.config.options),
    'exit_accuracy': dict(zip(test.exits, accuracy.tolist(), strict=True)),
    'cost': dict(zip(test.exits, test.cost.tolist(), strict=True)),
    'whole': test.whole,
    'heads': float(heads),
    'drops': {f'{drop:g}': _asked(decided, drop) for drop in DROPS},
  }


def _with_confidence(job: Job, confidence: Any) -> Job:
  options = dataclasses.replace(job.config.options, confidence=confidence)
  return job._replace(config=dataclasses.replace(job.config, options=options))


def of_taps(features: FeatureSet, every: Any, model: Any) -> FeatureSet:
  """The features of the taps that a network with heads reads, by its own exits."""
  by_tap = {head.tap: name for name, head in every.heads.items()}
  names = {name: by_tap[head.tap] for name, head in model.heads.items()}

  def chosen(split):
    of = split['features']
    own = {'main': of['main'], **{name: of[at] for name, at in names.items()}}
    return {**split, 'features': own}

  splits = (
    chosen(split) for split in (features.train, features.held_out, features.test)
  )
  return FeatureSet(features.name, *splits, classes=features.classes)


def _asked(decided: Mapping[str, reached.Decided], drop: float) -> dict[str, Any]:
  """What thresholds for a drop reach: one for all exits, and one for each of them.

  'learned' is one for all exits too, on a confidence that was fitted to the half that
  chooses; 'cross' is chosen by cross-validation. 'at_best' is chosen on the reporting
  images, where it is measured too: what the heads would allow, if the threshold were
  known.
  """

  def reach(confidence: str, shared: bool, folds: int = 1) -> dict[str, Any]:
    own = decided[confidence]
    choice = for_drop(own.held_out, drop, shared=shared, folds=folds)
    best = for_drop(own.test, drop, shared=shared, folds=1)
    saved = lambda cost: 1 - cost / own.test.whole
    return {
      **reached.outcome(own, choice),
      'saved_where_chosen': saved(choice.held_out.cost),
      'saved_at_best': saved(best.held_out.cost),
    }

  return {
    'shared': reach('probability', True),
    'each': reach('probability', False),
    'learned': reach('learned', True),
    'cross': reach('probability', False, folds=5),
  }


def head_tables() -> str:
  """What heads are made of and learn from; a table for each result file, or a dash."""
  contents = files_with('sidenet', 'variant', 'drops')
  parts = (_table(*file) for file in contents.items())
  return '\n\n'.join(parts) or 'Heads of SideNets: –'


def _table(path: Path, content: dict[str, Any]) -> str:
  config, rows = content['config'], content['rows']
  variants = dict.fromkeys(row['variant'] for row in rows)
  lines = [_line(v, [row for row in rows if row['variant'] == v]) for v in variants]
  return (
    f'Heads of SideNets, {config["model"]} on {config["data"]} '
    f'({trained_on(config)}, {config["gate_epochs"]} epochs), a drop '
    f'of {SHOWN} points asked for: what thresholds save on the half of the test images '
    'that chose them, and what they lose and save on the other half, heads paid for, '
    'with one threshold for all exits; at best: the most that a threshold chosen on '
    'that other half would save; each: with a threshold for each exit instead; '
    'learned: one threshold for a confidence that was learnt where it was chosen; '
    'cross-validated: one for each or for all, by cross-validation there '
    f'({link(path)}). Plain: five heads on features as they are; normalised: with '
    'batch normalisation of them, the default; all: besides, nine heads that see the '
    'answer before theirs and learn half from that of the network.'
    f'{notes(content)}\n\n' + table(HEAD, lines)
  )


def _lost_and_saved(rows: list[dict[str, Any] | None]) -> tuple[str, str]:
  """What thresholds lose and save on the half that reports, or dashes."""
  tests = [row['test'] for row in rows if row]
  if len(tests) < len(rows):
    return '–', '–'
  return spread(t['drop'] for t in tests), percent(t['saved'] for t in tests)


def trained_on(config: Mapping[str, Any]) -> str:
  """How many images heads learn from, and how often each was augmented."""
  count = f'{config["subset"]:,}' if config['subset'] else 'all'
  copies = config['options']['views'] - 1
  return f'{count} training examples, each augmented {copies}×'


def _line(variant: str, rows: list[Row]) -> tuple[str, ...]:
  of = lambda way: [row['drops'][SHOWN].get(way) for row in rows]
  shared, each = of('shared'), of('each')
  later = [of('learned'), of('cross')]  # ways that the first rows do not have
  return (
    variant,
    percent(row['heads'] for row in rows),
    percent(one['saved_where_chosen'] for one in shared),
    spread(one['test']['drop'] for one in shared),
    percent(one['test']['saved'] for one in shared),
    percent(one['saved_at_best'] for one in shared),
    spread(one['test']['drop'] for one in each),
    percent(one['test']['saved'] for one in each),
    *(text for way in later for text in _lost_and_saved(way)),
    str(len(rows)),
  )
