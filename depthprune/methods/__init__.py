"""Pruning methods, one paper per file; a new file is found by itself.

The name of a method is that of its file, or the last word of it: `trainable_gates`,
`gates`. A file offers `configured(config, coupling, steps, scores, whole) -> Method`
for runs that are described by a `Config`.
"""

import difflib
import importlib
import pkgutil
from collections.abc import Mapping

import numpy as np

from depthprune.program.coupling import Coupling
from depthprune.run.config import Config
from depthprune.train.method import Method


def names() -> list[str]:
  """The files of this package."""
  return sorted(module.name for module in pkgutil.iter_modules(__path__))


def check(name: str) -> str:
  """The file of a method. Raises ValueError with the nearest names if there is none."""
  for file in names():
    if name in (file, file.split('_')[-1]):
      return file
  near = difflib.get_close_matches(name, names(), n=1, cutoff=0) or names()
  raise ValueError(f'no method {name!r}; nearest: {near[0]}; all: {", ".join(names())}')


def build(
  config: Config,
  coupling: Coupling,
  steps: int,
  scores: Mapping[str, np.ndarray],
  whole: Coupling | None = None,
) -> Method:
  """The method of a run, for one network.

  `steps` is the length of the stage that trains gates and weights together; `scores`
  {group: [n]} are first guesses of what channels are worth. `whole` is the coupling of
  the network before any cut, where `coupling` is that of a later round.
  """
  module = importlib.import_module(f'{__name__}.{check(config.method)}')
  return module.configured(config, coupling, steps, scores, whole or coupling)
