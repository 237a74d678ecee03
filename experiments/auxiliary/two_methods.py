"""Auxiliary training composed with trainable gates, and with NetCut.

Every (seed, composition, structure) is one row of two runs, of which the second starts
from what the first left.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from depthprune.methods.auxiliary import AuxiliaryOptions
from depthprune.methods.netcut import NetCutOptions
from depthprune.methods.trainable_gates import GateOptions
from depthprune.report.numbers import spread
from depthprune.run import rounds
from depthprune.run.config import Config, default
from depthprune.train.result import to_json
from experiments.result_files import (
  Row,
  Rows,
  files_with,
  link,
  path_of,
  percent,
  table,
)
from experiments.run import SEEDS, Arguments, Case, fill

EPOCHS = 15
MODELS = {'gates': 'resnet8', 'netcut': 'resnet14'}
Structure = Literal['none', 'all']
STRUCTURES: tuple[Structure, ...] = ('none', 'all')
HEAD = ('', 'between', 'test', 'MFLOPs', 'seeds')
NAMES = {
  ('gates', 'none'): 'alone, then trainable gates to half of the FLOPs',
  ('gates', 'all'): 'beside a path, then trainable gates to half of the FLOPs',
  ('netcut', 'none'): 'NetCut, then trained again alone',
  ('netcut', 'all'): 'NetCut, then trained again beside a path',
}


def run(name: str, data: Mapping[str, Any], arguments: Arguments) -> list[Case]:
  """Fills the result file of an experiment and returns the cases that are left.

  Args:
    name: The function in configs.py.
    data: The fields of the configs that say what the data are.
    arguments: What the experiment is asked.
  """
  path = path_of('auxiliary', name, arguments.full)
  described = {
    f'{what}{i}': config.to_json()
    for what in MODELS
    for i, config in enumerate(configs(what, 'all', **data))
  }
  rows = Rows(path, described, ('seed', 'what', 'structure'))
  cases = [
    {'seed': seed, 'what': what, 'structure': structure}
    for seed in arguments.seeds or range(SEEDS)
    for what in MODELS
    for structure in STRUCTURES
  ]
  folder = lambda case: Path(
    'runs/auxiliary', path.stem, '-'.join(map(str, case.values()))
  )

  def make(case: Case) -> Row:
    chosen = configs(case['what'], case['structure'], seed=case['seed'], **data)
    return _make_row(folder(case), *chosen)

  return fill(rows, lambda: cases, make, arguments, folder)


def configs(what: str, structure: Structure, **fields: Any) -> tuple[Config, Config]:
  """The two runs of a composition, in their order."""
  fields = {'gate_epochs': EPOCHS, 'model': MODELS[what], **fields}
  make = lambda name, **more: dataclasses.replace(default(name), **{**fields, **more})
  beside = make('auxiliary', options=AuxiliaryOptions(structure))
  if what == 'netcut':
    return make('netcut', options=NetCutOptions(beta=0.1, force=True)), beside
  gates = make(
    'trainable_gates',
    options=GateOptions(target=0.5, round_to=1),
    train_epochs=0,
    gate_epochs=8,
    finetune_epochs=6,
  )
  return beside, gates


def _make_row(folder: Path, first: Config, second: Config) -> Row:
  first = dataclasses.replace(first, workdir=str(folder / 'first'))
  before = to_json(rounds.run(first))
  start = str(first.path / 'pruned')
  second = dataclasses.replace(second, workdir=str(folder / 'then'), pretrained=start)
  after = to_json(rounds.run(second))
  return {
    'between': before['accuracy']['after'],
    'accuracy': after['accuracy']['after'],
    'held_out': after['held_out']['after'],
    **{k: after[k]['after'] for k in ('flops', 'params')},
    'exits': before['rounds'][-1]['exits'],
    'wall_seconds': round(before['wall_seconds'] + after['wall_seconds'], 1),
  }


def two_methods_tables() -> str:
  """Auxiliary training before and after other methods; a dash without a result file."""
  parts = (_table(*file) for file in files_with('auxiliary', 'what').items())
  return '\n\n'.join(parts) or 'Auxiliary training composed with other methods: –'


def _table(path: Path, content: dict[str, Any]) -> str:
  lines = []
  for key, name in NAMES.items():
    rows = [r for r in content['rows'] if (r['what'], r['structure']) == key]
    if rows:
      scores = ([row[score] for row in rows] for score in ('between', 'accuracy'))
      cost = spread(row['flops'] / 1e6 for row in rows)
      lines.append((name, *map(percent, scores), cost, str(len(rows))))
  config = content['config']['gates0']
  images = f', {config["subset"]:,} images' if config['subset'] else ''
  return (
    f'Auxiliary training composed with other methods, {config["data"]}{images}; '
    f'accuracy after the first and after the second, in % ({link(path)}):\n\n'
    + table(HEAD, lines)
  )
