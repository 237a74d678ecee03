"""The network that a run is about, and the variables that it starts with."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from depthprune import models
from depthprune.config import Config
from depthprune.models import pretrained
from depthprune.models.arch import within
from depthprune.models.auxiliary import Auxiliary, beside
from depthprune.models.heads import Head, WithHeads, every_tap
from depthprune.options import NetCut
from depthprune.training import checkpoint, store, tokens
from depthprune.training.checkpoint import CheckpointError
from depthprune.training.method import Tree
from depthprune.training.prepared import DataError
from depthprune.training.stage import Job


def network(config: Config, classes: int) -> Any:
  """The model of a run, with the heads that its method needs.

  Where it starts from a pruned network, a folder, the model has that one's `arch`.

  Raises: ValueError for a name that there is not; CheckpointError for a folder that
    holds another model.
  """
  chosen = {'scan': config.scan, 'dtype': 'bfloat16' if config.bfloat16 else ''}
  model = models.build(
    config.model, classes=classes, **{k: v for k, v in chosen.items() if v}
  )
  if config.pretrained is not None and Path(config.pretrained).is_dir():
    model = as_thin(model, config.pretrained)
  return with_heads(model, config, classes) if config.options.heads else model


def with_heads(trunk: Any, config: Config, classes: int) -> Any:
  """The trunk with what the method wants on its taps."""
  o = config.options
  if isinstance(o, NetCut):
    return every_tap(trunk, pool=o.pool)
  if o.structure == 'none':
    return trunk
  fields = {'classes': classes, 'width': o.width, 'pool': trunk.pool}
  path = beside(trunk.taps, o.structure == 'search', **fields)
  if o.structure != 'deep-supervision':
    return WithHeads(trunk, {'aux': path})
  ends = [taps[-1] for taps in path.stages]
  ends = ends[:-1] or ends  # the last of them is what the network's own head reads
  linear = lambda tap: Head(tap, classes, pool=trunk.pool)
  dense = lambda tap: Auxiliary(((tap,),), **fields)  # of pixels
  head = linear if trunk.pool else dense
  return WithHeads(trunk, {f'aux{i}': head(tap) for i, tap in enumerate(ends, 1)})


def start(job: Job, model: Any) -> Tree:
  """The first variables of a run: random, or the trunk read from a file or a folder.

  Raises: ValueError for a file, CheckpointError for a folder, that does not fit, and
    DataError for the tokenizer of another network.
  """
  path, heads = job.config.pretrained, hasattr(model, 'trunk')
  tokenizer = getattr(job.images, 'tokenizer', None)  # of texts
  if tokenizer is not None:
    vocab = getattr(getattr(model, 'trunk', model), 'vocab', None)
    tokens.check_tokenizer(tokenizer, vocab)
  if path is not None and not heads:
    return _read(job, path, model)
  variables = jax.jit(model.init)(job.key('init'), *job.inputs)
  if path is None:
    return variables
  # What the network has of the trunk; its own head may not be in use. Heads are new.
  merged = dict(variables)
  for collection, tree in _read(job, path, model.trunk).items():
    trunk = {k: tree[k] for k in variables[collection]['trunk']}
    merged[collection] = {**variables[collection], 'trunk': trunk}
  return merged


def check_answer(job: Job, model: Any) -> None:
  """Raises DataError unless the model has an answer of the kind that the labels are."""
  if getattr(job.images, 'tasks', ()):
    return  # `tasks.several` names those that are missing
  given = jax.eval_shape(model.init_with_output, job.key('shapes'), *job.inputs)[0]
  said = {name: tuple(given[name].shape) for name in model.exits}
  label = np.shape(job.images.train['label'])
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


# ---- networks that were pruned before ------------------------------------------------


def as_thin(model: Any, path: str | Path) -> Any:
  """The model with the `arch` of the pruned network in a folder.

  Raises: CheckpointError where the folder holds none, or not of this model; how many
    classes it has, and the type it computes in, may differ.
  """
  record = store.read_record(Path(path), checkpoint.RECORD)
  stored, arch, _ = _compact(record)
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
  leaves, record = store.read(Path(path), checkpoint.RECORD)
  stored, _, inside = _compact(record)
  leaves = {name.replace(inside, '/', 1): leaf for name, leaf in leaves.items()}
  classes = _described(stored).get('classes')
  if classes != model.classes:
    raise CheckpointError(
      f'{path}: expected a network of {model.classes} classes, as the data has, got '
      f'one of {classes}'
    )
  shapes = dict(jax.eval_shape(model.init, jax.random.key(0), *inputs))
  gates = {k: shapes.pop(k) for k in ('branches',) if k in shapes}
  opened = jax.tree.map(lambda gate: jnp.ones(gate.shape, gate.dtype), gates)
  return {**store.matched(shapes, leaves, str(path)), **opened}


def _compact(record: Mapping[str, Any]) -> tuple[Mapping, Mapping[str, int], str]:
  """(model, arch, what its arrays lie in) of a record, '/' if in nothing.

  Of a trunk whose heads were all dropped, such as a network that was trained beside an
  auxiliary path, they are those of the trunk.
  """
  model, arch = record['model'], record['arch']
  heads = model.get('fields', {}).get('heads', {})
  bare = heads and all(arch.get(f'exit/{name}') == 0 for name in heads)
  if model.get('name') == 'heads.WithHeads' and bare and arch.get('exit/main', 1):
    return model['fields']['trunk'], within(arch, 'trunk'), '/trunk/'
  return model, arch, '/'


def _described(described: Mapping[str, Any]) -> dict[str, Any]:
  """{'name': ..., field: value}, of what `models.describe` gave."""
  if 'foreign' in described:
    return {'name': described['foreign']}
  return {'name': described['name'], **described['fields']}
