"""Pruning methods, one paper per file; a new file is found by itself.

The name of a method is that of its file, or the last word of it: `trainable_gates`,
`gates`. A file offers RECIPE, a `train.recipe.Recipe`: how runs and reports use it.
"""

from __future__ import annotations

import difflib
import importlib
import pkgutil
from collections.abc import Callable, Mapping
from typing import Any

from etils import epy

from depthprune.train.recipe import Recipe, Setting

with epy.lazy_imports():
  import numpy as np

  from depthprune.program.coupling import Coupling
  from depthprune.program.rounding import RoundTo
  from depthprune.train.method import Method


def names() -> list[str]:
  """The files of this package."""
  return sorted(module.name for module in pkgutil.iter_modules(__path__))


def all() -> dict[str, Recipe]:
  """The recipe of every method, by the name of its file."""
  return {name: recipe(name) for name in names()}


def word(name: str) -> str:
  """What the command line calls a method: the last word of its file's name."""
  return name.split('_')[-1]


def check(name: str) -> str:
  """The file of a method. Raises ValueError with the nearest names if there is none."""
  for file in names():
    if name in (file, word(file)):
      return file
  near = difflib.get_close_matches(name, names(), n=1, cutoff=0) or names()
  raise ValueError(f'no method {name!r}; nearest: {near[0]}; all: {", ".join(names())}')


def recipe(name: str) -> Recipe:
  """How runs and reports use a method. Raises ValueError as `check` does."""
  return importlib.import_module(f'{__name__}.{check(name)}').RECIPE


def name_of(options: Any) -> str:
  """The file of the method that these options belong to."""
  return type(options).__module__.rpartition('.')[-1]


def measured_anew(measure: Callable, to_json: Callable, from_json: Callable) -> Any:
  """The `remember` of a setting without a directory: nothing is kept."""
  del to_json, from_json
  return measure()


def build(
  options: Any,
  coupling: Coupling,
  steps: int = 1,
  scores: Mapping[str, np.ndarray] | None = None,
  whole: Coupling | None = None,
  seed: int = 0,
  stage: str = 'gates',
  round_to: RoundTo | None = None,
  remember: Callable[..., Any] = measured_anew,
) -> Method:
  """The method that some options choose, for one network.

  Args:
    options: an instance of some recipe's `options`.
    coupling, steps, scores, whole, seed, stage, remember: as in `Setting`; without
      `whole` no cut was made yet.
    round_to: as in `Setting`; None takes that of the options.
  """
  chosen = recipe(name_of(options))
  made = Setting(
    options=options,
    coupling=coupling,
    whole=whole or coupling,
    steps=steps,
    scores=scores or {},
    seed=seed,
    stage=stage,
    round_to=chosen.round_to(options) if round_to is None else round_to,
    remember=remember,
  )
  return chosen.build(made)
