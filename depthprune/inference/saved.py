"""A cascade on disk: the network in `network/`, what was decided in `cascade.json`.

And `find`, which reads what any run has left.
"""

import json
import math
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from depthprune.inference.cascade import Cascade, cascade
from depthprune.surgery.cut import Pruned
from depthprune.training import checkpoint, hosts, record

RECORD, TOKENIZER = 'cascade.json', 'tokenizer.json'


class Saved(NamedTuple):
  """What was saved: a network, and the cascade that was made of it, if there is one.

  `folder` holds it; `run` is the directory of the run that it is of, else None.
  """

  folder: Path
  run: Path | None
  network: Pruned
  cascade: Cascade | None


def save_cascade(
  path: str | Path,
  saved: Cascade,
  network: Pruned,
  normalisation: Any = None,
  tokenizer: str | Path | None = None,
  tensors: bool = False,
) -> None:
  """Writes a cascade as the folder `path`.

  saved: a cascade of `network`, what `prune` left. normalisation: what its images went
  through. tokenizer: tokenizer.json, copied beside a network that reads texts.
  tensors: arrays as `checkpoint.save` writes them with it.

  Raises: CheckpointError as `checkpoint.save` does, and ValueError for a cascade that
    is not of this network.
  """
  path = Path(path)
  exits = [name for name, kept in network.report['exits'].items() if kept]
  if exits and set(exits) != {*saved.exits}:
    raise ValueError(
      f'{path}: the cascade has the exits {", ".join(saved.exits)}, the network '
      f'{", ".join(exits)}: save it with the network that it was made of'
    )
  arrays = zip(*map(jax.tree.leaves, (saved.variables, network.variables)), strict=True)
  if not all(a is b or np.array_equal(a, b) for a, b in arrays):
    raise ValueError(f'{path}: the arrays of the cascade are not those of the network')
  text = None if tokenizer is None else Path(tokenizer).read_text()
  if hosts.writes():
    (path / RECORD).unlink(missing_ok=True)  # until all of it is there again
    (path / TOKENIZER).unlink(missing_ok=True)
  checkpoint.save(path / 'network', network, normalisation, tensors)
  if text is not None and hosts.writes():
    (path / TOKENIZER).write_text(text)
  early = saved.exits[:-1]
  plain = lambda values: {e: _finite(v) for e, v in zip(early, values.tolist())}
  weights = None if saved.weights is None else np.asarray(saved.weights).tolist()
  decided = {
    'exits': list(saved.exits),
    'thresholds': plain(saved.thresholds),
    'temperatures': plain(saved.temperatures),
    'confidence': saved.confidence,
    'weights': weights,
    'steps': saved.steps,
    'flops': list(saved.stages.flops),
    'whole': saved.stages.whole,
  }
  record.write(path / RECORD, decided)


def load_cascade(path: str | Path, model: Any = None) -> Cascade:
  """A cascade as `save_cascade` got it.

  model: for a network of depthprune, nothing; else the full model or function.
  What its images went through is in `path`/network/arch.json, report, normalisation.

  Raises: CheckpointError for a folder without a cascade, or damaged.
  """
  decided = _decided(Path(path))
  return _cascade(Path(path), decided, checkpoint.load(Path(path) / 'network', model))


def find(path: str | Path, model: Any = None) -> Saved:
  """The network in the directory of a run, or in a folder that a network was saved to.

  path: what `depthprune run` or `export` wrote, or `save` or `save_cascade`.
  model: as for `load` and `load_cascade`.

  Raises: CheckpointError where there is none, or as `load` and `load_cascade` do.
  """
  path = Path(path)
  for folder in (path, path / 'cascade', path / 'network', path / 'pruned'):
    if (folder / RECORD).is_file():
      decided = _decided(folder)
      network = checkpoint.load(folder / 'network', model)
      cascade = _cascade(folder, decided, network)
    elif (folder / checkpoint.RECORD).is_file():
      network, cascade = checkpoint.load(folder, model), None
    else:
      continue
    runs = (path / 'config.json', path.parent / 'config.json')
    run = next((config.parent for config in runs if config.is_file()), None)
    return Saved(folder, run, network, cascade)
  raise checkpoint.CheckpointError(
    f'{path}: expected the directory of a finished run, or a folder with a network '
    f'({checkpoint.RECORD}) or a cascade ({RECORD}), got none of them; a run that was '
    'stopped goes on when it is started again'
  )


def _decided(path: Path) -> dict[str, Any]:
  try:
    return json.loads((path / RECORD).read_text())
  except (OSError, ValueError) as error:
    raise checkpoint.CheckpointError(
      f'{path}: expected a cascade (with {RECORD} and network/): {error}'
    ) from error


def _cascade(path: Path, decided: dict[str, Any], network: Pruned) -> Cascade:
  try:
    weights = decided['weights']
    settings: dict[str, Any] = {
      'thresholds': {e: float(t) for e, t in decided['thresholds'].items()},
      'exits': tuple(decided['exits']),
      'temperatures': decided['temperatures'],
      'confidence': decided['confidence'],
      'weights': None if weights is None else np.asarray(weights, np.float32),
      'steps': decided['steps'],
    }
  except KeyError as error:
    raise checkpoint.CheckpointError(
      f'{path}: {RECORD} has no entry {error}: damaged, or of another version'
    ) from error
  inputs, kwargs = network.coupling.inputs, network.coupling.kwargs
  return cascade(network.apply, network.variables, *inputs, **settings, **kwargs)


def _finite(value: float) -> float | str:
  return value if math.isfinite(value) else str(value)
