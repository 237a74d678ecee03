"""What is written to disk: training state (`Keeper`) and pruned networks.

A pruned network is a folder: its arrays, and `arch.json`, which says how to build the
network around them: the model by name and fields, the decision as kept indices, the
shapes of the full network, the normalisation of its inputs and the report of the cut.
"""

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from depthprune import distributed, models
from depthprune.cascades.cascade import Cascade, cascade
from depthprune.program.coupling import Coupling, couple
from depthprune.program.resize import slim
from depthprune.storage import checkpoint, directory
from depthprune.storage.checkpoint import CheckpointError, kind
from depthprune.storage.keeper import Keeper as Keeper
from depthprune.storage.keeper import Restored as Restored
from depthprune.storage.keeper import same_config as same_config
from depthprune.surgery.plan import cut, index_plan
from depthprune.surgery.prune import Pruned

RECORD = 'arch.json'
_OTHER = '?'  # a node or leaf of a tree that JSON has no words for


def save(
  path: Path | str,
  pruned: Pruned,
  normalisation: Any = None,
  tensors: bool = False,
) -> None:
  """Writes a pruned network as the folder `path`, at once; replaces one that was there.

  `normalisation` is what its inputs went through; `load` returns it in the report. The
  optimizer state is not written: `Keeper` is for training that is to be continued.
  `tensors`: the arrays as a file of safetensors, to be read by other programs too.

  Raises CheckpointError naming the leaf where `pruned.variables` are not what the cut
  left (a missing leaf, another shape or dtype), and where `path` holds something else.
  """
  path, coupling = Path(path), pruned.coupling
  expected = _small(coupling, pruned.keep)
  checkpoint.matched(expected, checkpoint.paths(pruned.variables), f'{path}: not saved')
  report = dict(pruned.report)
  if normalisation is not None:
    report['normalisation'] = normalisation._asdict()
  record = {
    'model': _described(pruned),
    'arch': pruned.arch,
    'inputs': _abstract(coupling.inputs),
    'kwargs': _plain(coupling.kwargs, path),
    'keep': {
      'channels': {g: np.flatnonzero(k) for g, k in pruned.keep['channels'].items()},
      'branches': {b: np.asarray(k) for b, k in pruned.keep['branches'].items()},
      'exits': {e: bool(k) for e, k in pruned.keep['exits'].items()},
    },
    'variables': _abstract(coupling.variables),
    'report': report,
  }
  checkpoint.write(path, RECORD, pruned.variables, record, tensors)


def load(
  path: Path | str,
  model: Any = None,
  example: Any = None,
  variables: Any = None,
  fixed: Callable | None = None,
) -> Pruned:
  """A pruned network as `save` got it, but for the optimizer state.

  model: for a model of depthprune, nothing; else the full model or function that was
    pruned. example: one input array, or a tuple of all inputs; variables: the full
    network's, abstract ones will do. Both are only asked for where they are more than
    dicts, lists, tuples and arrays. fixed: as it was given to `couple`.

  Raises CheckpointError where the folder is absent, foreign, of a newer format, or
  damaged; where the model is another one; and where a leaf is missing, not expected, or
  has another shape or dtype (naming it).
  """
  path = Path(path)
  leaves, record = checkpoint.read(path, RECORD)
  model = _model(record, path, model)
  if example is not None:
    inputs = example if isinstance(example, tuple) else (example,)
  else:
    inputs = _concrete(record['inputs'], f'{path}: pass example=: the inputs are')
  if variables is None:
    variables = _concrete(
      record['variables'], f'{path}: pass variables=: those of the full network are'
    )
  try:
    coupling = couple(model, variables, *inputs, fixed=fixed, **record['kwargs'])
    keep = _keep(record, coupling)
    small = _small(coupling, keep)
  except (KeyError, ValueError, TypeError) as error:
    raise CheckpointError(
      f'{path}: the model that was given is not the one that was pruned: {error}'
    ) from error
  arrays = checkpoint.matched(small, leaves, str(path))
  apply = slim(model, coupling, keep)
  if record['arch']:
    model = model.clone(arch=type(model.arch)(record['arch']))
  return Pruned(
    apply, arrays, None, record['arch'], record['report'], model, keep, coupling
  )


def _small(coupling: Coupling, keep: Mapping) -> Any:
  """The abstract variables that are left."""
  plan = index_plan(coupling, keep)
  return jax.eval_shape(lambda full: cut(full, plan), coupling.variables)


def _described(pruned: Pruned) -> dict[str, Any]:
  """The model before the cut: by name and fields, or just what it was called."""
  model = pruned.model
  if not type(model).__module__.startswith(f'{models.__name__}.'):
    name = getattr(model, '__qualname__', type(model).__qualname__)
    return {'foreign': f'{getattr(model, "__module__", "")}.{name}'}
  full = {k: v for k, v in model.arch.items() if k not in pruned.arch}
  full |= {k: _uncut(k, v, pruned.coupling) for k, v in pruned.arch.items()}
  return models.describe(model.clone(arch=type(model.arch)(full)))


def _uncut(key: str, value: int, coupling: Coupling) -> int:
  """What an entry of `arch` was before the cut, read off the full network's arrays.

  What is not among the arrays had been cut before.
  """
  if key.startswith('exit/'):
    return int(value or key.removeprefix('exit/') in coupling.exits)
  if key in coupling.groups:  # what is no last axis of a kernel, as heads are
    return coupling.axis(key).size
  leaves = checkpoint.paths(coupling.variables)
  if key in coupling.branches:
    return int(np.prod(leaves[f'branches/{key}'].shape))
  kernel = leaves.get(f'params/{key}/kernel')
  return value if kernel is None else kernel.shape[-1]


def _model(record: Mapping, path: Path, given: Any) -> Any:
  described = record['model']
  if 'foreign' in described:
    if given is None:
      raise CheckpointError(
        f'{path}: {described["foreign"]} is not a model of depthprune: expected '
        'load(path, model=...) with the full model or function that was pruned'
      )
    return given
  if given is not None:
    # `arch` is left out: it may also say what is as the fields say anyway.
    there, here = (
      {'name': d['name'], **d['fields'], 'arch': None}
      for d in (described, models.describe(given))
    )
    apart = [f for f in sorted({*there, *here}) if there.get(f) != here.get(f)]
    if apart:
      what = '; '.join(
        f'{f}: expected {there.get(f)}, got {here.get(f)}' for f in apart
      )
      raise CheckpointError(f'{path}: another model: {what}: leave it out of the call')
  return models.build(described['name'], **described['fields'])


def _keep(record: Mapping, coupling: Coupling) -> dict[str, Any]:
  keep = record['keep']
  masks = {}
  for group, kept in keep['channels'].items():
    masks[group] = np.isin(np.arange(coupling.axis(group).size), kept)
  branches = {b: np.asarray(k, bool) for b, k in keep['branches'].items()}
  return {'channels': masks, 'branches': branches, 'exits': keep['exits']}


def _plain(kwargs: Mapping, path: Path) -> dict[str, Any]:
  try:
    return json.loads(json.dumps(kwargs))
  except TypeError as error:
    raise CheckpointError(
      f'{path}: expected numbers, strings and flags as keyword arguments of the model, '
      f'got {kwargs}: {error}. Couple it without them'
    ) from error


def _abstract(tree: Any) -> Any:
  """Shapes and dtypes of a tree in JSON; tuples and lists are told apart."""
  if isinstance(tree, dict) and all(isinstance(key, str) for key in tree):
    return {key: _abstract(value) for key, value in tree.items()}
  if type(tree) in (list, tuple):
    return [type(tree).__name__, *map(_abstract, tree)]
  if tree is None:
    return None
  plain = isinstance(getattr(tree, 'dtype', None), np.dtype)
  return kind(tree) if plain else _OTHER


def _concrete(abstract: Any, where: str) -> Any:
  """The ShapeDtypeStructs that `_abstract` described."""
  if isinstance(abstract, dict):
    return {key: _concrete(value, where) for key, value in abstract.items()}
  if isinstance(abstract, list):
    parts = [_concrete(value, where) for value in abstract[1:]]
    return tuple(parts) if abstract[0] == 'tuple' else parts
  if abstract is None:
    return None
  if abstract == _OTHER:
    raise CheckpointError(f'{where} of a kind that JSON has no words for')
  dtype, shape = abstract.removesuffix(']').split('[')
  sizes = tuple(int(size) for size in shape.split(',') if size)
  return jax.ShapeDtypeStruct(sizes, jnp.dtype(dtype))


CASCADE_RECORD, TOKENIZER = 'cascade.json', 'tokenizer.json'


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
  if distributed.writes():
    (path / CASCADE_RECORD).unlink(missing_ok=True)  # until all of it is there again
    (path / TOKENIZER).unlink(missing_ok=True)
  save(path / 'network', network, normalisation, tensors)
  if text is not None and distributed.writes():
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
  directory.write(path / CASCADE_RECORD, decided)


def load_cascade(path: str | Path, model: Any = None) -> Cascade:
  """A cascade as `save_cascade` got it.

  model: for a network of depthprune, nothing; else the full model or function.
  What its images went through is in `path`/network/arch.json, report, normalisation.

  Raises: CheckpointError for a folder without a cascade, or damaged.
  """
  decided = _decided(Path(path))
  return _cascade(Path(path), decided, load(Path(path) / 'network', model))


def find(path: str | Path, model: Any = None) -> Saved:
  """The network in the directory of a run, or in a folder that a network was saved to.

  path: what `depthprune run` or `export` wrote, or `save` or `save_cascade`.
  model: as for `load` and `load_cascade`.

  Raises: CheckpointError where there is none, or as `load` and `load_cascade` do.
  """
  path = Path(path)
  for folder in (path, path / 'cascade', path / 'network', path / 'pruned'):
    if (folder / CASCADE_RECORD).is_file():
      decided = _decided(folder)
      network = load(folder / 'network', model)
      cascade = _cascade(folder, decided, network)
    elif (folder / RECORD).is_file():
      network, cascade = load(folder, model), None
    else:
      continue
    runs = (path / 'config.json', path.parent / 'config.json')
    run = next((config.parent for config in runs if config.is_file()), None)
    return Saved(folder, run, network, cascade)
  raise CheckpointError(
    f'{path}: expected the directory of a finished run, or a folder with a network '
    f'({RECORD}) or a cascade ({CASCADE_RECORD}), got none of them; a run that was '
    'stopped goes on when it is started again'
  )


def _decided(path: Path) -> dict[str, Any]:
  try:
    return json.loads((path / CASCADE_RECORD).read_text())
  except (OSError, ValueError) as error:
    raise CheckpointError(
      f'{path}: expected a cascade (with {CASCADE_RECORD} and network/): {error}'
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
    raise CheckpointError(
      f'{path}: {CASCADE_RECORD} has no entry {error}: damaged, or of another version'
    ) from error
  inputs, kwargs = network.coupling.inputs, network.coupling.kwargs
  return cascade(network.apply, network.variables, *inputs, **settings, **kwargs)


def _finite(value: float) -> float | str:
  return value if math.isfinite(value) else str(value)
