"""The network that a run is about, and the variables that it starts with."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax.core import FrozenDict

from depthprune import models
from depthprune.config import Config
from depthprune.methods.auxiliary import ASIDE
from depthprune.models import pretrained
from depthprune.models.auxiliary import Auxiliary, beside
from depthprune.models.heads import Head, WithHeads, every_tap, multitask
from depthprune.options import NetCut
from depthprune.training import hosts, overlaid, tokens
from depthprune.training.checkpoint import CheckpointError
from depthprune.training.folder import as_thin, heads_of, pruned
from depthprune.training.method import Tree
from depthprune.training.prepared import DataError
from depthprune.training.stage import Job


def network(config: Config, classes: int) -> Any:
  """The model of a run, with the heads that its method needs.

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
  if tasks := overlaid.tasks(config.data):
    _check_several(config, model, tasks)
    model = multitask(model, dict.fromkeys(tasks, classes))
  if config.pretrained is not None and Path(config.pretrained).is_dir():
    model = as_thin(model, config.pretrained)
  _check_exits(config, model)
  return with_heads(model, config) if config.options.heads else model


def with_heads(model: Any, config: Config) -> Any:
  """The model with what the method wants on its taps, or those of its trunk."""
  o = config.options
  if isinstance(o, NetCut):
    return every_tap(model, pool=o.pool)
  if o.structure == 'none':
    return model
  own = getattr(model, 'heads', {})  # of several tasks, or of a network that was cut
  trunk = model.trunk if own else model
  classes = {name: head.classes for name, head in own.items()} or model.classes
  if not overlaid.tasks(config.data) and own:
    (classes,) = classes.values()
  fields = {'classes': classes, 'width': o.width, 'pool': trunk.pool}
  read = [trunk.taps.index(head.tap) for head in own.values()]
  taps = trunk.taps[: max(read) + 1] if read else trunk.taps
  path = beside(taps, o.structure == 'search', **fields)
  if o.structure != 'deep-supervision':
    heads = {ASIDE: path}
  else:
    ends = [taps[-1] for taps in path.stages]
    ends = ends[:-1] or ends  # the last of them is what the network's own head reads
    linear = lambda tap: Head(tap, classes, pool=trunk.pool)
    dense = lambda tap: Auxiliary(((tap,),), **fields)  # of pixels
    head = linear if trunk.pool else dense
    heads = {f'{ASIDE}{i}': head(tap) for i, tap in enumerate(ends, 1)}
  return WithHeads(trunk, {**own, **heads}, model.arch if own else FrozenDict())


def _check_several(config: Config, model: Any, tasks: Sequence[str]) -> None:
  if config.method in ('netcut', 'sidenet') or getattr(model, 'pool', None) is None:
    raise DataError(
      f'data {config.data!r} has several tasks ({", ".join(tasks)}): expected the '
      'method gates, implosion or auxiliary and a network with taps that classifies, '
      f'such as resnet20, got {config.method} and {config.model}'
    )


def _check_exits(config: Config, model: Any) -> None:
  exits = model.exits if hasattr(model, 'trunk') else ()
  helped = any(name.startswith(ASIDE) for name in exits)
  if exits and (config.method in ('netcut', 'sidenet') or helped):
    raise CheckpointError(
      f'{config.pretrained}: expected a network that {config.method} can put exits on, '
      f'got one that has {", ".join(exits)}'
    )


def start(job: Job, model: Any) -> Tree:
  """The first variables of a run: random, or the trunk read from a file or a folder.

  Of several processes all have those of the first.

  Raises: ValueError for a file, CheckpointError for a folder, that does not fit, and
    DataError for the tokenizer of another network.
  """
  found = hosts.together(lambda: _start(job, model))
  return jax.tree.map(jnp.asarray, hosts.agreed(found))


def _start(job: Job, model: Any) -> Tree:
  path = job.config.pretrained
  tokenizer = getattr(job.images, 'tokenizer', None)  # of texts
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
  if overlaid.tasks(job.config.data):
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
