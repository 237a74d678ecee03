"""Auxiliary training before trainable gates, and of a network that NetCut cut.

  gates    ResNet-8 trained beside an auxiliary path, or alone; then half of its FLOPs
           go by trainable gates, which start from that network
  netcut   ResNet-14 with a head on every block, cut by NetCut where the network wants;
           then trained for as many epochs again, beside a path that reads what is left
           of it, or alone

Every (seed, composition, structure) is one row; fashion_mnist, 10,000 images at 14×14;
each run starts from the folder RUN/pruned of the one before it, as `--pretrained` does.

  TFDS_DATA_DIR=../shared/data/tfds python -m experiments.auxiliary.composed

3 seeds, about 20 minutes on one core. `--minutes 10` stops and goes on with the next
call; `--full`, for an accelerator: all images at 28×28.
"""

import dataclasses
from pathlib import Path
from typing import Any, Literal

from depthprune.options import Auxiliary, Gates, NetCut
from depthprune.run import rounds as recipe
from depthprune.run.config import RECIPES, Config
from experiments.pieces import SEEDS, Arguments, Case, Rows, fill, main

RESULTS = Path(__file__).parent / 'results'
EPOCHS = 15
SMALL = {'subset': 10_000, 'resize': 14}
DATA = {'data': 'fashion_mnist', 'gate_epochs': EPOCHS}
MODELS = {'gates': 'resnet8', 'netcut': 'resnet14'}
Structure = Literal['none', 'all']
STRUCTURES: tuple[Structure, ...] = ('none', 'all')


def after(folder: Path, first: Config, then: Config) -> dict[str, Any]:
  """What the second run found, which starts from what the first left."""
  first = dataclasses.replace(first, workdir=str(folder / 'first'))
  given = recipe.run(first)
  start = str(first.path / 'pruned')
  then = dataclasses.replace(then, workdir=str(folder / 'then'), pretrained=start)
  found = recipe.run(then)
  return {
    'between': given['accuracy']['after'],
    'accuracy': found['accuracy']['after'],
    'held_out': found['held_out']['after'],
    **{k: found[k]['after'] for k in ('flops', 'params')},
    'exits': given['rounds'][-1]['exits'],
    'wall_seconds': round(given['wall_seconds'] + found['wall_seconds'], 1),
  }


def runs(what: str, structure: Structure, **fields: Any) -> tuple[Config, Config]:
  """The two runs of a composition, in their order."""
  fields = {**DATA, 'model': MODELS[what], **fields}
  made = lambda name, **more: dataclasses.replace(RECIPES[name], **{**fields, **more})
  beside = made('auxiliary', options=Auxiliary(structure))
  if what == 'netcut':
    return made('netcut', options=NetCut(beta=0.1, force=True)), beside
  gates = made(
    'trainable_gates',
    options=Gates(target=0.5),
    train_epochs=0,
    gate_epochs=8,
    finetune_epochs=6,
  )
  return beside, gates


def run(given: Arguments) -> list[Case]:
  name = 'composed_full' if given.full else 'composed'
  size = {} if given.full else SMALL
  described = {
    f'{what}{i}': run.to_json()
    for what in MODELS
    for i, run in enumerate(runs(what, 'all', **size))
  }
  rows = Rows(RESULTS / f'{name}.json', described, ('seed', 'what', 'structure'))
  cases = [
    {'seed': seed, 'what': what, 'structure': structure}
    for seed in given.seeds or range(SEEDS)
    for what in MODELS
    for structure in STRUCTURES
  ]
  folder = lambda case: Path('runs/auxiliary', name, '-'.join(map(str, case.values())))

  def make(case: Case) -> dict[str, Any]:
    chosen = runs(case['what'], case['structure'], seed=case['seed'], **size)
    return after(folder(case), *chosen)

  return fill(rows, lambda: cases, make, given, folder)


if __name__ == '__main__':
  main(__doc__, run)
