"""The network that a run is about, and the variables that it starts with."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from depthprune import distributed, methods, models
from depthprune.data import images, tokens
from depthprune.data.dataset import DataError
from depthprune.exports import networks
from depthprune.models import heads, pretrained
from depthprune.models.arch import within
from depthprune.models.heads import WithHeads, multitask
from depthprune.run.config import Config
from depthprune.run.job import Job
from depthprune.storage import checkpoint
from depthprune.storage.checkpoint import CheckpointError
from depthprune.train.task import Tree


def as_thin(model: Any, path: str | Path) -> Any:
  """The model with the `arch` of the pruned network in a folder.

  Raises: CheckpointError where the folder holds none, or not of this model; how many
    classes it has, and the type it computes in, may differ.
  """
  record = checkpoint.read_record(Path(path), networks.RECORD)
  stored, arch, _ = _compact(record)
  if _heads(stored) and not hasattr(model, 'trunk'):  # cut by NetCut: with its exit
    there = models.build(stored['name'], **stored['fields'])
    model = WithHeads(model, there.heads, {'exit/main': 0})
  theirs, ours = _described(stored), _described(models.describe(model))
  fixed = sorted({*theirs, *ours} - {'arch', 'classes', 'dtype'})
  if apart := [k for k in fixed if theirs.get(k) != ours.get(k)]:
    says = lambda d: ', '.join(f'{k} {d.get(k)}' for k in apart)
    raise CheckpointError(
      f'{path}: expected a pruned network with {says(ours)}, got one with '
      f'{says(theirs)}: pass the --model that was pruned'
    )
  return model.clone(arch=type(model.arch)(arch))


def pruned(path: str | Path, model: Any, *inputs: Any) -> Tree:
  """The variables of the pruned network in a folder, for a model `as_thin` as it.

  Branch gates are open, as those of the folder are folded into its arrays.

  Raises: CheckpointError for another number of classes, and for arrays that do not fit.
  """
  leaves, record = checkpoint.read(Path(path), networks.RECORD)
  stored, _, inside = _compact(record)
  leaves = {name.replace(inside, '/', 1): leaf for name, leaf in leaves.items()}
  ours = _described(models.describe(model)).get('classes')
  classes = _described(stored).get('classes')
  if classes != ours:
    raise CheckpointError(
      f'{path}: expected a network of {ours} classes, as the data has, got '
      f'one of {classes}'
    )
  shapes = dict(jax.eval_shape(model.init, jax.random.key(0), *inputs))
  gates = {k: shapes.pop(k) for k in ('branches',) if k in shapes}
  opened = jax.tree.map(lambda gate: jnp.ones(gate.shape, gate.dtype), gates)
  return {**checkpoint.matched(shapes, leaves, str(path)), **opened}


def heads_of(path: str | Path) -> tuple[str, ...]:
  """Names of the heads that the network in a folder has besides its trunk's own."""
  stored, _, _ = _compact(checkpoint.read_record(Path(path), networks.RECORD))
  return _heads(stored)


def _heads(stored: Mapping[str, Any]) -> tuple[str, ...]:
  return tuple(stored.get('fields', {}).get('heads', ()))


def _compact(record: Mapping[str, Any]) -> tuple[Mapping, Mapping[str, int], str]:
  """(model, arch, what its arrays lie in) of a record, '/' if in nothing.

  Heads that were dropped, such as an auxiliary path, are not among them; of a trunk
  whose left were all dropped they are those of the trunk.
  """
  model, arch = record['model'], record['arch']
  if model.get('name') != 'heads.WithHeads':
    return model, arch, '/'
  fields, gone = model['fields'], lambda name: arch.get(f'exit/{name}', 1) == 0
  left = {name: head for name, head in fields['heads'].items() if not gone(name)}
  if not left and not gone('main'):
    return fields['trunk'], within(arch, 'trunk'), '/trunk/'
  dropped = {*fields['heads']} - {*left}
  mine = lambda key: key.split('/')[0].removeprefix('head_') not in dropped
  arch = {k: v for k, v in arch.items() if mine(k.removeprefix('exit/'))}
  return {**model, 'fields': {**fields, 'heads': left}}, arch, '/'


def _described(described: Mapping[str, Any]) -> dict[str, Any]:
  """{'name': ..., field: value}, of what `models.describe` gave.

  The fields of a trunk are among those of the network that has it, and say how many
  classes there are; its heads have taps.
  """
  if 'foreign' in described:
    return {'name': described['foreign']}
  name, fields = described['name'], described['fields']
  if 'trunk' not in fields:
    return {'name': name, **fields}
  tap = lambda head: head['fields'].get('tap', head['name'])
  taps = {of: tap(head) for of, head in fields['heads'].items()}
  return {'name': name, **fields['trunk']['fields'], 'heads': taps}


def network(config: Config, classes: int) -> Any:
  """The model of a run, with the exits that its method needs.

  Where the data have several tasks, of `classes` each, it has a head for each. Where it
  starts from a pruned network, a folder, the model has that one's `arch`, and if NetCut
  cut it that one's exit.

  Raises: ValueError for a name that there is not, DataError for a method that is not
    for several tasks; CheckpointError for a folder that holds another model.
  """
  chosen = {'scan': config.scan, 'dtype': 'bfloat16' if config.bfloat16 else ''}
  model = models.build(
    config.model, classes=classes, **{k: v for k, v in chosen.items() if v}
  )
  if tasks := images.tasks(config.data):
    _check_several(config, model, tasks)
    model = multitask(model, dict.fromkeys(tasks, classes))
  if config.pretrained is not None and Path(config.pretrained).is_dir():
    model = as_thin(model, config.pretrained)
  _check_exits(config, model)
  if config.recipe.heads is None:
    return model
  return config.recipe.heads(config.options, model, heads)


def _check_several(config: Config, model: Any, tasks: Sequence[str]) -> None:
  if config.recipe.own_exits or getattr(model, 'pool', None) is None:
    able = [
      methods.word(name) for name, each in methods.all().items() if not each.own_exits
    ]
    raise DataError(
      f'data {config.data!r} has several tasks ({", ".join(tasks)}): expected the '
      f'method {", ".join(able)} and a network with taps that classifies, such as '
      f'resnet20, got {config.method} and {config.model}'
    )


def _check_exits(config: Config, model: Any) -> None:
  exits = model.exits if hasattr(model, 'trunk') else ()
  if exits and config.recipe.own_exits:
    raise CheckpointError(
      f'{config.pretrained}: expected a network that {config.method} can put exits on, '
      f'got one that has {", ".join(exits)}'
    )


def initial_variables(job: Job, model: Any) -> Tree:
  """The first variables of a run: random, or the trunk read from a file or a folder.

  Of several processes all have those of the first.

  Raises: ValueError for a file, CheckpointError for a folder, that does not fit, and
    DataError for the tokenizer of another network.
  """
  found = distributed.together(lambda: _read_or_made(job, model))
  return jax.tree.map(jnp.asarray, distributed.agreed(found))


def _read_or_made(job: Job, model: Any) -> Tree:
  path = job.config.pretrained
  tokenizer = job.images.tokenizer
  if tokenizer is not None:
    vocab = getattr(getattr(model, 'trunk', model), 'vocab', None)
    tokens.check_tokenizer(tokenizer, vocab)
  init = lambda: jax.jit(model.init)(job.key('init'), *job.inputs)
  if path is None:
    return init()
  if not hasattr(model, 'trunk'):
    return _read(job, path, model)
  merged = dict(init())  # heads of the method are new
  for collection, tree in _known(job, path, model).items():
    new = merged[collection]
    # What the network has of the trunk; its own head may not be in use.
    trunk = {k: tree['trunk'][k] for k in new['trunk']}
    merged[collection] = {**new, **tree, 'trunk': trunk}
  return merged


def _known(job: Job, path: str, model: Any) -> Tree:
  """The arrays of a network with heads that a file or folder has: of its trunk, and
  where the folder holds a network with heads of these too."""
  held = heads_of(path) if Path(path).is_dir() else ()
  if not held:
    found = _read(job, path, model.trunk)
    return {collection: {'trunk': tree} for collection, tree in found.items()}
  own = {name: model.heads[name] for name in held}
  return _read(job, path, model.clone(heads=own))


def check_answer(job: Job, model: Any) -> None:
  """Raises DataError unless the model has an answer of the kind that the labels are."""
  if images.tasks(job.config.data):
    return  # `tasks.several` names those that are missing
  given = jax.eval_shape(model.init_with_output, job.key('shapes'), *job.inputs)[0]
  said = {name: tuple(given[name].shape) for name in model.exits}
  label = job.labels
  if any(len(shape) != len(label) + 1 for shape in said.values()):
    kinds = {1: 'a class of every image or text', 3: 'a class of every pixel'}
    raise DataError(
      f'data {job.config.data!r} has {kinds.get(len(label), "labels")} {label}, but '
      f'{job.config.model} answers {said}: choose a model of that kind, such as '
      f'{"segnet8" if len(label) == 3 else "resnet20"}'
    )


def _read(job: Job, path: str, model: Any) -> Tree:
  if Path(path).is_dir():
    return pruned(path, model, *job.inputs)
  return pretrained.load(path, model, job.images.shape)
