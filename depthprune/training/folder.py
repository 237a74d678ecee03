"""Networks that were pruned before: the folder of one, for a run to start from."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from depthprune import models
from depthprune.models.arch import within
from depthprune.models.heads import WithHeads
from depthprune.training import checkpoint, store
from depthprune.training.checkpoint import CheckpointError
from depthprune.training.method import Tree


def as_thin(model: Any, path: str | Path) -> Any:
  """The model with the `arch` of the pruned network in a folder.

  Raises: CheckpointError where the folder holds none, or not of this model; how many
    classes it has, and the type it computes in, may differ.
  """
  record = store.read_record(Path(path), checkpoint.RECORD)
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
  leaves, record = store.read(Path(path), checkpoint.RECORD)
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
  return {**store.matched(shapes, leaves, str(path)), **opened}


def heads_of(path: str | Path) -> tuple[str, ...]:
  """Names of the heads that the network in a folder has besides its trunk's own."""
  stored, _, _ = _compact(store.read_record(Path(path), checkpoint.RECORD))
  return _heads(stored)


def _heads(stored: Mapping[str, Any]) -> tuple[str, ...]:
  return tuple(stored.get('fields', {}).get('heads', ()))


def _compact(record: Mapping[str, Any]) -> tuple[Mapping, Mapping[str, int], str]:
  """(model, arch, what its arrays lie in) of a record, '/' if in nothing.

  Heads that were dropped, such as an auxiliary path, are not among them; of a trunk
  whose heads were all dropped they are those of the trunk.
  """
  model, arch = record['model'], record['arch']
  if model.get('name') != 'heads.WithHeads':
    return model, arch, '/'
  fields, gone = model['fields'], lambda name: arch.get(f'exit/{name}', 1) == 0
  heads = {name: head for name, head in fields['heads'].items() if not gone(name)}
  if not heads and not gone('main'):
    return fields['trunk'], within(arch, 'trunk'), '/trunk/'
  dropped = {*fields['heads']} - {*heads}
  mine = lambda key: key.split('/')[0].removeprefix('head_') not in dropped
  arch = {k: v for k, v in arch.items() if mine(k.removeprefix('exit/'))}
  return {**model, 'fields': {**fields, 'heads': heads}}, arch, '/'


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
