"""Pruned networks and cascades as folders: saved and loaded.

A pruned network is a folder with its arrays and `arch.json`, which says how to build
the network around them: the model by name and fields, the decision as kept indices, the
shapes of the full network, the normalisation of its inputs and the report of the cut. A
cascade is a folder with `cascade.json` and its network.
"""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import numpy as np

from depthprune import distributed, models
from depthprune.cascades.cascade import Cascade, cascade
from depthprune.exports import records
from depthprune.exports.records import CASCADE_RECORD, RECORD, refused, threshold
from depthprune.models.foreign import trunk as make_trunk
from depthprune.program import arguments, modules
from depthprune.program.coupling import Coupling, couple
from depthprune.program.resize import origins, slim
from depthprune.program.trace import several, split_arrays
from depthprune.storage import checkpoint, directory
from depthprune.storage.checkpoint import CheckpointError, kind
from depthprune.surgery.plan import cut, index_plan
from depthprune.surgery.prune import Pruned, has_shapes, in_kind

TOKENIZER = 'tokenizer.json'
CALLS = 16  # of modules, at most, for each array of a network


class Saved(NamedTuple):
  """A network that was read from disk, and its cascade.

  Attributes:
    folder: the folder that holds it.
    run: the directory of the run that made it, or None.
    network: the pruned network.
    cascade: the cascade that was made of it, or None.
  """

  folder: Path
  run: Path | None
  network: Pruned
  cascade: Cascade | None


def save(
  path: Path | str,
  pruned: Pruned,
  normalisation: Any = None,
  tensors: bool = False,
) -> None:
  """Writes a pruned network as a folder, from which `load` reads it again.

      small = dp.prune(model, variables, keep, images[:1])
      dp.save('small', small)
      small = dp.load('small')
      outputs = small.apply(small.variables, images)

  The folder appears at once, and replaces a network that was there. The state of the
  optimizer is not saved. Arrays with NaN or infinities are listed in the record, and
  `load` accepts such numbers only there.

  Args:
    path: the folder.
    pruned: the network that `prune` returned, possibly with variables trained since.
    normalisation: the normalisation of its inputs, a `data.augment.Normalisation`, kept
      in the report.
    tensors: whether to write the arrays as a file of safetensors, which other programs
      can read, instead of an orbax checkpoint.

  Raises:
    CheckpointError: a leaf of `pruned.variables` is missing or has another shape or
      dtype than the cut left, or the folder holds something else.
    WriteError: the disk is full.
  """
  write = 'write save(path, prune(model, variables, keep, example))'
  arguments.kind_of('pruned', pruned, Pruned, 'what prune returned', write)
  arguments.alive('pruned', pruned.variables, 'save variables that are still there')
  if normalisation is not None and not hasattr(normalisation, '_asdict'):
    expected = 'a Normalisation(mean, std) of data.augment'
    raise arguments.refused('normalisation', expected, normalisation)
  path, coupling = Path(arguments.path('path', path)), pruned.coupling
  expected = _small(coupling, pruned.keep)
  leaves = checkpoint.paths(pruned.variables)
  checkpoint.matched(expected, leaves, f'{path}: not saved')
  report = dict(pruned.report)
  if normalisation is not None:
    report['normalisation'] = normalisation._asdict()
  record = {
    'model': _described(pruned),
    'arch': pruned.arch,
    **_cut(path, coupling, pruned.keep),
    'before': [_cut(path, o.coupling, o.keep) for o in origins(coupling.fn)],
    'report': report,
    'not_finite': checkpoint.infinite(leaves),
  }
  checkpoint.write(path, RECORD, pruned.variables, record, tensors)


def load(
  path: Path | str,
  model: Any = None,
  example: Any = None,
  variables: Any = None,
  fixed: Callable | None = None,
  **kwargs,
) -> Pruned:
  """Reads a pruned network that `save` wrote.

      small = dp.load('small')  # a model of depthprune
      small = dp.load('mine', model=my_full_function)  # any other
      outputs = small.apply(small.variables, images)

  Args:
    path: the folder.
    model: None for a model of depthprune; otherwise the full model or function that was
      pruned, possibly without the heads of depthprune that were on it. Of a network
      that was pruned twice, it is the one before the first cut, or the `apply` of the
      one before the last.
    example: the input, or a plain tuple or list of several. It is only needed if an
      input is not an array, or a dict, list or tuple of arrays: a NamedTuple.
    variables: the variables of the full network, possibly abstract, needed in the same
      case. A module that holds its arrays (NNX, Equinox) has them already.
    fixed: the argument `fixed` of `couple` with which the network was pruned.
    **kwargs: further arguments of the model's call, only needed in the same case.

  Returns:
    The network as it was saved; `opt_state` is None.

  Raises:
    CheckpointError: the folder is absent, foreign, damaged or of a newer format; the
      model is another one; an entry of `arch.json` is not as expected; or a leaf is
      missing, not expected, of another shape or dtype, or not finite unless it was so
      when it was saved.
  """
  path = Path(arguments.path('path', path))
  leaves, record = records.read(path)
  full_model, model = model, _model(record, path, model, variables)
  if model is not full_model:  # a trunk, whose variables can be read from the record
    variables = None
  # Version 0.1 did not write the cuts before the last one, nor arrays by keyword.
  before = record.get('before', [])
  wanted = f'{path}: pass variables=: those of the full network are'
  leaves_of = lambda cut: records.structs(cut['variables'], wanted)
  first, *others = [*before[len(origins(model)) :], record]
  if variables is None and modules.is_module(model):
    variables = modules.arrays_of(model)
  full = leaves_of(first) if variables is None else variables
  coupling, keep = _coupled(path, first, model, full, example, fixed, kwargs)
  for later in others:
    model = slim(model, coupling, keep)
    full = leaves_of(later) if variables is None else _small(coupling, keep)
    coupling, keep = _coupled(path, later, model, full, example, fixed, kwargs)
  arrays = checkpoint.matched(_small(coupling, keep), leaves, str(path))
  apply = slim(model, coupling, keep)
  if record['arch']:
    model = _with_arch(path, model, coupling, arrays, record['arch'])
  else:
    model = in_kind(model, coupling, apply, arrays)
  return Pruned(
    apply, arrays, None, record['arch'], record['report'], model, keep, coupling
  )


def _with_arch(
  path: Path, model: Any, coupling: Coupling, arrays: Any, arch: Mapping[str, int]
) -> Any:
  """Returns our model with the `arch` of a record, if the arrays are of these sizes."""
  with refused(f'{path / RECORD}: arch'):
    small = model.clone(arch=type(model.arch)(arch))
    if not has_shapes(small, coupling, arrays):
      raise ValueError('expected the sizes of the arrays, got others')
  return small


def save_cascade(
  path: str | Path,
  saved: Cascade,
  network: Pruned,
  normalisation: Any = None,
  tokenizer: str | Path | None = None,
  tensors: bool = False,
) -> None:
  """Writes a cascade as a folder, from which `load_cascade` reads it again.

      early = dp.cascade(small.apply, small.variables, images[:1], thresholds=chosen)
      dp.save_cascade('early', early, small)

  A network that nothing was cut from is stored as `small = dp.prune(model, variables,
  {}, images[:1])`.

  Args:
    path: the folder.
    saved: the cascade, made of `network`.
    network: the network that `prune` returned.
    normalisation: the normalisation of its images, kept in the network's report.
    tokenizer: a tokenizer.json, copied beside a network that reads texts.
    tensors: whether to write the arrays as a file of safetensors instead of an orbax
      checkpoint.

  Raises:
    ValueError: the cascade has other exits or arrays than the network.
    CheckpointError: as for `save`.
  """
  write = (
    'write whole = prune(model, variables, {}, x) and save_cascade(path, '
    'cascade(whole.apply, whole.variables, x), whole)'
  )
  arguments.kind_of('saved', saved, Cascade, 'what cascade returned', write)
  arguments.kind_of('network', network, Pruned, 'what prune returned', write)
  path = Path(arguments.path('path', path))
  exits = [name for name, kept in network.report['exits'].items() if kept]
  if exits and set(exits) != {*saved.exits}:
    raise ValueError(
      f'{path}: the cascade has the exits {", ".join(saved.exits)}, the network '
      f'{", ".join(exits)}: save it with the network that it was made of'
    )
  own, others = map(jax.tree.leaves, (saved.variables, network.variables))
  same = (a is b or np.array_equal(a, b) for a, b in zip(own, others))
  if len(own) != len(others) or not all(same):
    raise ValueError(
      f'{path}: the arrays of the cascade are not those of the network: make it of '
      'these, as in cascade(network.apply, network.variables, *inputs)'
    )
  if named := [*network.coupling.named]:
    raise CheckpointError(
      f'{path}: {named[0]} is an array by keyword, which a cascade does not take: make '
      f'it an input, as in lambda v, x, {named[0]}: model.apply(v, x, '
      f'{named[0]}={named[0]}), and prune that function'
    )
  text = None if tokenizer is None else Path(tokenizer).read_text()
  early = saved.exits[:-1]
  by_exit = lambda values: dict(zip(early, map(threshold, values.tolist())))
  weights = None if saved.weights is None else np.asarray(saved.weights).tolist()
  record = {
    'exits': list(saved.exits),
    'thresholds': by_exit(saved.thresholds),
    'temperatures': by_exit(saved.temperatures),
    'confidence': saved.confidence,
    'weights': weights,
    'steps': saved.steps,
    'flops': list(saved.stages.flops),
    'whole': saved.stages.whole,
  }
  save_with(path / CASCADE_RECORD, record, network, text, normalisation, tensors)


def save_with(
  file: Path,
  record: Mapping[str, Any],
  network: Pruned,
  tokenizer: str | None,
  normalisation: Any = None,
  tensors: bool = False,
) -> None:
  """Writes a network and its tokenizer, then a record of how the network is used.

  Args:
    file: where the record is written, when all that belongs to it is beside it.
    record: its entries.
    network: the network that `prune` returned, saved in the folder `network/`.
    tokenizer: the content of a tokenizer.json, or None.
    normalisation: as for `save`.
    tensors: as for `save`.

  Raises:
    CheckpointError: as for `save`.
  """
  folder = file.parent
  if distributed.writes():
    file.unlink(missing_ok=True)
    (folder / TOKENIZER).unlink(missing_ok=True)
  save(folder / 'network', network, normalisation, tensors)
  if tokenizer is not None and distributed.writes():
    directory.write_text(folder / TOKENIZER, tokenizer)
  directory.write(file, record)


def load_cascade(path: str | Path, model: Any = None) -> Cascade:
  """Reads a cascade that `save_cascade` wrote.

      early = dp.load_cascade('early')
      answer = early(images)  # logits, the exit of every example, its score

  The normalisation of its images is in the report of `load(path / 'network')`.

  Args:
    path: the folder.
    model: None for a network of depthprune; otherwise the full model or function.

  Raises:
    CheckpointError: the folder has no cascade, or is damaged.
  """
  return _read_cascade(Path(arguments.path('path', path)), model)[0]


def find(path: str | Path, model: Any = None) -> Saved:
  """Reads the network, and the cascade if there is one, of a run or a saved folder.

  Args:
    path: a folder that `depthprune run`, `export`, `save` or `save_cascade` wrote.
    model: None for a network of depthprune; otherwise the full model or function.

  Raises:
    CheckpointError: the folder has no network, or is damaged.
  """
  path = Path(path)
  inside = 'cascade', 'network', 'pruned', 'exits/network'
  for folder in (path, *(path / name for name in inside)):
    if (folder / CASCADE_RECORD).is_file():
      early, network = _read_cascade(folder, model)
    elif (folder / RECORD).is_file():
      early, network = None, load(folder, model)
    else:
      continue
    runs = (path / 'config.json', path.parent / 'config.json')
    run = next((config.parent for config in runs if config.is_file()), None)
    return Saved(folder, run, network, early)
  raise CheckpointError(
    f'{path}: expected the directory of a finished run, or a folder with a network '
    f'({RECORD}) or a cascade ({CASCADE_RECORD}), got none of them; a run that was '
    'stopped goes on when it is started again'
  )


def _read_cascade(path: Path, model: Any) -> tuple[Cascade, Pruned]:
  record = records.read_cascade(path)
  network = load(path / 'network', model)
  settings: dict[str, Any] = {
    'thresholds': {e: float(t) for e, t in record['thresholds'].items()},
    'exits': tuple(record['exits']),
    'temperatures': record['temperatures'],
    'confidence': record['confidence'],
    'weights': record['weights'] and np.asarray(record['weights'], np.float32),
    'steps': record['steps'],
  }
  inputs, kwargs = network.coupling.inputs, network.coupling.kwargs
  with refused(path / CASCADE_RECORD):
    made = cascade(network.apply, network.variables, *inputs, **settings, **kwargs)
  return made, network


def _cut(path: Path, coupling: Coupling, keep: Mapping) -> dict[str, Any]:
  """Describes one cut: the call, the variables before it, and what it kept."""
  named = coupling.named
  plain = {name: x for name, x in coupling.kwargs.items() if name not in named}
  try:
    kwargs = json.loads(json.dumps(plain))
  except TypeError as error:
    raise CheckpointError(
      f'{path}: expected arrays, numbers, strings and flags as keyword arguments of '
      f'the model, got {plain}: {error}. Couple it without them'
    ) from error
  channels, branches, exits = (
    keep.get(part, {}) for part in ('channels', 'branches', 'exits')
  )
  return {
    'inputs': records.described(coupling.inputs),
    'kwargs': kwargs,
    'arrays_by_keyword': records.described(named),
    'keep': {
      'channels': {g: np.flatnonzero(k).tolist() for g, k in channels.items()},
      'branches': {b: np.asarray(k).tolist() for b, k in branches.items()},
      'exits': {e: bool(k) for e, k in exits.items()},
    },
    'variables': records.described(coupling.variables),
  }


def _coupled(
  path: Path, cut: Mapping, model: Any, variables: Any, example: Any, fixed, given: dict
) -> tuple[Coupling, dict[str, Any]]:
  """Couples a network as it was before a cut, and returns what the cut kept of it."""
  if example is not None:
    inputs = several(example)
  else:
    inputs = records.structs(cut['inputs'], f'{path}: pass example=: the inputs are')
  named = {
    name: records.structs(x, f'{path}: pass {name}=: it is')
    for name, x in cut.get('arrays_by_keyword', {}).items()
    if name not in given
  }
  kwargs = {**cut['kwargs'], **named, **given}
  try:
    coupling = couple(model, variables, *inputs, fixed=fixed, **kwargs)
    keep = _keep(cut['keep'], coupling)
    index_plan(coupling, keep)
  except Exception as error:  # another model fails in a way of its own
    first = (str(error) or type(error).__name__).splitlines()[0]
    raise CheckpointError(
      f'{path}: the model that was given is not the one that was pruned: '
      f'{_apart(model, variables, inputs, kwargs) or first:.300}'
    ) from error
  return coupling, keep


def _apart(model: Any, variables: Any, inputs: tuple, kwargs: dict) -> str:
  """Names the first leaf that a linen module would not create as it was saved."""
  if not isinstance(model, nn.Module):
    return ''
  key = jax.eval_shape(lambda: jax.random.key(0))
  arrays, merge = split_arrays((inputs, kwargs))
  saved = checkpoint.paths(variables)
  calls = iter(range(CALLS * (1 + len(saved))))

  def counted(call, args, kwargs, context):
    next(calls)  # a network of many more layers would be traced for minutes
    return call(*args, **kwargs)

  def init(key, arrays):
    args, named = merge(arrays)
    return model.init(key, *args, **named)

  try:
    with nn.intercept_methods(counted):
      created = checkpoint.paths(jax.eval_shape(init, key, arrays))
  except Exception:  # its first error is told instead
    return ''
  for path in [*saved, *created]:
    there, here = (
      kind(leaves[path]) if path in leaves else 'no such leaf'
      for leaves in (saved, created)
    )
    if there != here:
      return f'{path}: expected {there}, got {here}'
  return ''


def _small(coupling: Coupling, keep: Mapping) -> Any:
  """Returns the variables that are left, abstract."""
  plan = index_plan(coupling, keep)
  return jax.eval_shape(lambda full: cut(full, plan), coupling.variables)


def _described(pruned: Pruned) -> dict[str, Any]:
  """Describes the model before the cut, or only names one that is not ours."""
  model = pruned.coupling.model if pruned.model is None else pruned.model
  before = origins(model)
  model = before[0].model if before else model
  model = getattr(model, 'module', model)  # what adapts it is not named
  if not type(model).__module__.startswith(f'{models.__name__}.'):
    name = getattr(model, '__qualname__', type(model).__qualname__)
    return {'foreign': f'{getattr(model, "__module__", "")}.{name}'}
  full = {k: v for k, v in model.arch.items() if k not in pruned.arch}
  full |= {k: _uncut(k, v, pruned.coupling) for k, v in pruned.arch.items()}
  return models.describe(model.clone(arch=type(model.arch)(full)))


def _uncut(key: str, value: int, coupling: Coupling) -> int:
  """Returns an entry of `arch` before the cut, read off the arrays of the full network.

  An entry without an array had been cut before.
  """
  if key.startswith('exit/'):
    return int(value or key.removeprefix('exit/') in coupling.exits)
  if key in coupling.groups:  # a size that is not the last axis of a kernel
    return coupling.axis(key).size
  leaves = checkpoint.paths(coupling.variables)
  if key in coupling.branches:
    return int(np.prod(leaves[f'branches/{key}'].shape))
  kernel = leaves.get(f'params/{key}/kernel')
  return value if kernel is None else kernel.shape[-1]


def _foreign(described: Any) -> Mapping[str, Any]:
  """The part of a description that names a network that is not ours, or {}."""
  if not isinstance(described, Mapping):
    return {}
  if 'foreign' in described:
    return described
  return next(filter(None, map(_foreign, described.values())), {})


def _filled(described: Mapping, networks: Mapping[str, Any]) -> dict[str, Any]:
  """Returns a description with networks, by key, in the place of their names."""
  return {
    key: value
    if not isinstance(value, Mapping)
    else networks[key]
    if 'foreign' in value
    else _filled(value, networks)
    for key, value in described.items()
  }


def _model(record: Mapping, path: Path, model: Any, variables: Any) -> Any:
  described = record['model']
  foreign = _foreign(described)
  if foreign and model is None:
    raise CheckpointError(
      f'{path}: {foreign["foreign"]} is not a model of depthprune: pass model=..., the '
      'full model or function that was pruned'
    )
  if 'foreign' in described:
    return model
  if foreign:  # it is a trunk of ours, or under our heads
    trunk = getattr(model, 'trunk', model)
    network = getattr(trunk, 'network', None)
    if network is None and 'network' in json.dumps(described):
      first = [*record.get('before', []), record][0]
      wanted = f'{path}: pass model=trunk(model, variables, *inputs): the'
      inputs = records.structs(first['inputs'], f'{wanted} inputs are')
      named = foreign.get('keywords', [])  # of the last inputs
      inputs, last = (
        inputs[: len(inputs) - len(named)],
        inputs[len(inputs) - len(named) :],
      )
      if variables is None and not hasattr(model, 'init'):
        variables = modules.arrays_of(model)
        if not jax.tree.leaves(variables):
          raise CheckpointError(f'{wanted} model holds no variables')
      network = make_trunk(model, variables, *inputs, **dict(zip(named, last))).network
    filled = _filled(described, {'trunk': trunk, 'network': network})
    return _built(path, filled)
  if model is not None:
    # `arch` is left out, because it may repeat what the fields say.
    there, here = (
      {'name': d['name'], **d['fields'], 'arch': None}
      for d in (described, models.describe(model))
    )
    apart = [f for f in sorted({*there, *here}) if there.get(f) != here.get(f)]
    if apart:
      what = '; '.join(
        f'{f}: expected {there.get(f)}, got {here.get(f)}' for f in apart
      )
      raise CheckpointError(f'{path}: another model: {what}: leave it out of the call')
  return _built(path, described)


def _built(path: Path, described: Mapping[str, Any]) -> Any:
  with refused(f'{path / RECORD}: model'):
    return models.build(described['name'], **described['fields'])


def _keep(keep: Mapping, coupling: Coupling) -> dict[str, Any]:
  for group, kept in keep['channels'].items():
    size = coupling.axis(group).size
    if len({*kept}) < len(kept) or max(kept, default=0) >= size:
      raise ValueError(f'{group}: expected different indices below {size}, got others')
  masks = {
    group: np.isin(np.arange(coupling.axis(group).size), kept)
    for group, kept in keep['channels'].items()
  }
  branches = {b: np.asarray(k, bool) for b, k in keep['branches'].items()}
  return {'channels': masks, 'branches': branches, 'exits': keep['exits']}
