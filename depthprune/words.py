"""The words of a run: METHOD and its options, each with one value or with several."""

import itertools
from collections.abc import Iterator, Sequence
from typing import Annotated

import tyro

from depthprune.options import KINDS, Auxiliary, Gates, Implosion, NetCut, SideNet
from depthprune.run.config import RECIPES, Config

CONTINUES = 'Interrupted at any moment, the same command continues.'


def _method(word: str, file: str, description: str):
  return tyro.conf.subcommand(
    word,
    default=RECIPES[file],
    prefix_name=False,
    description=f'{description} {CONTINUES}',
  )


GATES = _method(
  'gates',
  'trainable_gates',
  'Train a network, learn with trainable gates which channels may go, cut them out, '
  'fine-tune the small network that remains, and report.',
)
NETCUT = _method(
  'netcut',
  'netcut',
  'Train a network with a head on every layer, let it find the layer to stop at, cut '
  'it there, and report.',
)
IMPLOSION = _method(
  'implosion',
  'implosion',
  'Train a residual network with a priority on every unit, erase the least important, '
  'retrain, and so on down to the depth that was asked for, and report.',
)
SIDENET = _method(
  'sidenet',
  'sidenet',
  'Put small heads on a pretrained network, find out how sure each must be, and save '
  'the cascade in which sure answers leave early, and report.',
)
AUXILIARY = _method(
  'auxiliary',
  'auxiliary',
  'Train a compact network beside a wider path that reads it everywhere, drop the '
  'path, and report.',
)
Method = (
  Annotated[Config[Gates], GATES]
  | Annotated[Config[NetCut], NETCUT]
  | Annotated[Config[Implosion], IMPLOSION]
  | Annotated[Config[SideNet], SIDENET]
  | Annotated[Config[Auxiliary], AUXILIARY]
)

# Options that one run has several values of, and the one that METHOD may follow.
AS_THEY_ARE = {
  '--at-once',
  *(
    f'--{name}'
    for kind in KINDS
    for name, default in vars(kind()).items()
    if isinstance(default, tuple)
  ),
}


def several(words: Sequence[str]) -> list[list[str]]:
  """The words of every run that they stand for, the last option changing fastest.

  `gates --target 0.3 0.5 --seed 0 1` is four runs: an option with several values stands
  for one run with each of them, several such options for all combinations.
  """
  options = list(_options(words))
  choices = [
    [[name, value] for value in values]
    if len(values) > 1 and name.startswith('--') and name not in AS_THEY_ARE
    else [[name, *values]]
    for name, *values in options
  ]
  return [list(itertools.chain(*each)) for each in itertools.product(*choices)]


def _options(words: Sequence[str]) -> Iterator[list[str]]:
  """[name, value, ...] of each option; words before the first one are by themselves."""
  option: list[str] = []
  for word in words:
    if option and (word.startswith('--') or not option[0].startswith('--')):
      yield option
      option = []
    option.append(word)
  if option:
    yield option
