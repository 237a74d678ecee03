"""The network of a run, and the variables that it starts with.

A run may start from a file of pretrained weights or from the folder of a network that
was pruned before (`as_thin`, `pruned`). Its network may be a module in a file of the
user's own, which becomes a `models.foreign.Trunk`.
"""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from depthprune import distributed, methods, models
from depthprune.data import images, tokens
from depthprune.data.dataset import DataError
from depthprune.exports import records
from depthprune.models import heads, pretrained
from depthprune.models.arch import within
from depthprune.models.bert import BERT
from depthprune.models.decoder import Decoder
from depthprune.models.foreign import Trunk, trunk
from depthprune.models.heads import WithHeads, multitask
from depthprune.program import arguments, cost, modules
from depthprune.program.coupling import couple
from depthprune.program.modules import runnable
from depthprune.run import build, own
from depthprune.run.config import Config, ConfigFile, from_json
from depthprune.run.job import Job
from depthprune.storage import checkpoint, directory
from depthprune.storage.checkpoint import CheckpointError
from depthprune.train.options import ConfigError
from depthprune.train.recipe import Recipe
from depthprune.train.task import Tree, as_dict


def network(config: Config, classes: int, *inputs: Any) -> Any:
  """Builds the model of a run, with the exits that its method needs.

  For data with several tasks it has a head for each. If the run starts from the folder
  of a pruned network, the model has the `arch` of that network, and its exit if NetCut
  cut it.

  Args:
    config: the run's configuration.
    classes: number of classes of the data, for each task.
    *inputs: an example of what it reads. Without one, a network of the user's own is
      only looked for, and returned as it is.

  Raises:
    ValueError: there is no model of that name, or it does not take its arguments.
    DataError: the method cannot be used for several tasks.
    CheckpointError: the folder holds another model, or one that has exits already.
  """
  model: Any = build.alone(config, classes)
  if own.is_object(config.model) and not (hasattr(model, 'taps') and model.exits):
    if not inputs:
      return model
    with _explained(config):
      held = modules.arrays_of(model) if modules.is_module(model) else None
      model = trunk(model, held, *inputs)
      _ = model.taps, model.classes
  own_exits = config.recipe.own_exits
  if tasks := images.tasks(config.data):
    if own_exits or getattr(model, 'pool', None) is None:
      able = [
        methods.word(k) for k, each in methods.all().items() if not each.own_exits
      ]
      raise DataError(
        f'data {config.data!r} has several tasks ({", ".join(tasks)}): expected the '
        f'method {", ".join(able)} and a network with taps that classifies, such as '
        f'resnet20, got {config.method} and {config.model}'
      )
    model = multitask(model, dict.fromkeys(tasks, classes))
  if config.pretrained is not None and _is_cut(config.pretrained, model):
    model = as_thin(model, config.pretrained)
  if own_exits and isinstance(model, WithHeads) and model.exits:
    raise CheckpointError(
      f'{config.pretrained}: expected a network that {config.method} can put exits on, '
      f'got one that has {", ".join(model.exits)}'
    )
  if isinstance(model, Decoder):
    _check_writing(config, model)
  if config.recipe.heads is None:
    return model
  return config.recipe.heads(config.options, model, heads)


def initial_variables(job: Job, model: Any) -> Tree:
  """Returns the first variables of a run: random, or those of a file or a folder.

  Heads of the method are always random. All processes get the variables of the first.

  Raises:
    ValueError: a file of weights does not fit the model.
    CheckpointError: the network in a folder does not fit the model.
    DataError: the tokenizer belongs to another network.
  """
  variables = distributed.together(lambda: _read_or_init(job, model))
  return jax.tree.map(jnp.asarray, distributed.agreed(variables))


def _read_or_init(job: Job, model: Any) -> Tree:
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
  if Path(path).is_dir() and (names := heads_of(path)):
    own = {name: model.heads[name] for name in names}
    stored = _read(job, path, model.clone(heads=own))
  else:
    trunk = _read(job, path, model.trunk)
    stored = {collection: {'trunk': tree} for collection, tree in trunk.items()}
  merged = dict(init())  # for the heads that are not stored
  for collection, tree in stored.items():
    new = merged[collection]
    # The stored trunk may have a head of its own that this network does not use.
    trunk = {k: tree['trunk'][k] for k in new['trunk']}
    merged[collection] = {**new, **tree, 'trunk': trunk}
  return merged


def check_answer(job: Job, model: Any) -> None:
  """Checks that the model's answer has the form of the labels.

  Raises:
    DataError: it has another; the message names a model that suits the data.
  """
  if images.tasks(job.config.data):
    return  # the task itself names the outputs that are missing
  config, label = job.config, job.labels
  with _explained(config):
    shapes = jax.eval_shape(model.init, job.key('shapes'), *job.inputs)
    given = jax.eval_shape(runnable(model), shapes, *job.inputs)
  outputs = as_dict(given)
  if not outputs or not all(hasattr(x, 'shape') for x in outputs.values()):
    raise DataError(
      f'{own.word(config.model)}: expected logits [batch, classes], or a dict of them '
      f'by the names of the exits, got a {type(given).__name__}'
    )
  names = ('main',) if 'main' in outputs else tuple(outputs)
  answers = {n: tuple(outputs[n].shape) for n in getattr(model, 'exits', names)}
  if any(len(shape) != len(label) + 1 for shape in answers.values()):
    kinds = {1: 'a class of every image or text', 3: 'a class of every pixel'}
    raise DataError(
      f'data {config.data!r} has {kinds.get(len(label), "labels")} {label}, but '
      f'{config.model} answers {answers}: choose a model of that kind, such as '
      f'{"segnet8" if len(label) == 3 else "resnet20"}'
    )
  if wrong := {k: v for k, v in answers.items() if v[-1] != job.images.classes}:
    raise DataError(
      f'data {config.data!r} has {job.images.classes} classes, but '
      f'{own.word(config.model)} answers {wrong}: give their number with --model-args, '
      'or leave it out there'
    )


def _writes(recipe: Recipe) -> bool:
  """Whether a method can be used on a language model."""
  return recipe.tells_tokens or not (recipe.cascade or recipe.heads)


def _check_writing(config: Config, model: Decoder) -> None:
  """Raises ConfigError where the options of a run do not suit a language model."""
  recipe, options = config.recipe, config.options
  if not _writes(recipe):
    able = [methods.word(k) for k, each in methods.all().items() if _writes(each)]
    raise ConfigError(
      f'model: {config.model} writes texts, and the exits of {config.method} tell '
      f'classes: choose one of {", ".join(able)}'
    )
  recipe.check_texts(options)
  if recipe.cascade is None:
    return
  early = model.taps[:-1]
  if not early:
    raise ConfigError(
      f'model: {config.model} has no tap before its last, where an exit could be: '
      'layers that are scanned together have one at their end only (leave out --scan)'
    )
  taps = recipe.cascade(options).taps
  if not {*taps} <= {*early}:
    raise ConfigError(
      f'taps: expected some of {arguments.listed(early)}, the layers of '
      f'{config.model} before the last, got {", ".join(taps)}'
    )


def _is_cut(path: str, model: Any) -> bool:
  """Whether weights were saved by this library; decoders come in other folders too."""
  return Path(path).is_dir() and (
    records.is_network(path) or not isinstance(model, Decoder)
  )


def _read(job: Job, path: str, model: Any) -> Tree:
  if _is_cut(path, model):
    return pruned(path, model, *job.inputs)
  if isinstance(model, Trunk):
    like = dict(jax.eval_shape(model.init, jax.random.key(0), *job.inputs))
    leaves, gates = pretrained.read(path), {}
    if not any(name.startswith('branches/') for name in leaves):
      gates = {k: like.pop(k) for k in ('branches',) if k in like}
    opened = jax.tree.map(lambda s: jnp.ones(s.shape, s.dtype), gates)
    return {**checkpoint.matched(like, leaves, path), **opened}
  return pretrained.load(path, model, job.images.shape)


def sizes(
  names: Sequence[str], shape: Sequence[int], classes: int
) -> Iterator[tuple[str, tuple[int, int] | str]]:
  """Yields (name, (parameters, FLOPs of one input)) of models of this library.

  Args:
    names: the models; all if there is none.
    shape: height, width and channels of an image, or (tokens,) of a text. For a model
      that cannot read it, a sentence stands in the place of its numbers.
    classes: number of classes.

  Raises:
    ValueError: there is no model of a name.
    ConfigError: there is no such input, or no class.
  """
  if classes < 1:
    raise ConfigError(f'classes: expected a whole number >= 1, got {classes}')
  if len(shape) not in (1, 3) or min(shape) < 1:
    raise ConfigError(
      'input: expected height, width and channels of an image, or the tokens of a '
      f'text, got {" ".join(map(str, shape)) or "nothing"}'
    )
  text = len(shape) == 1
  inputs = [jnp.zeros((1, *shape), jnp.int32 if text else jnp.float32)]
  inputs += [jnp.ones((1, *shape), bool)] * text
  for name in names or models.names():
    writes = isinstance(models.build(name), Decoder)
    model = models.build(name, **({} if writes else {'classes': classes}))
    if isinstance(model, BERT | Decoder) != text:
      yield name, f'reads {"images" if text else "texts (--input TOKENS)"}'
      continue
    try:
      given = inputs[:1] if writes else inputs  # a decoder takes no mask
      variables = jax.eval_shape(model.init, jax.random.key(0), *given)
      coupling = couple(model, variables, *given)
    except Exception as error:  # each family has its own smallest image
      said = (str(error) or type(error).__name__).splitlines()[0]
      yield name, f'cannot read it: {said}'
      continue
    yield name, (cost.params(coupling), cost.flops(coupling))


# ---- networks of the user's own ------------------------------------------------------


def of_run(folder: str | Path) -> Any:
  """Returns the network of a run, if it is one from a file, for `load`; else None.

  It is the full one, without the heads of the method.

  Args:
    folder: the run's directory, or a folder in it.

  Raises:
    ConfigError: the file is gone, or has changed since.
  """
  for path in (Path(folder), Path(folder).parent):
    stored = directory.read(path / 'config.json', ConfigFile)
    if stored is None or not own.is_object(stored['config']['model']):
      continue
    config = from_json(stored['config'])
    digest = stored['config'].get('model_file_sha256')
    if own.digest(config.model) not in (None, digest):
      raise ConfigError(
        f'{config.model}: has changed since {path} was made: restore the file'
      )
    return build.alone(config, stored.get('classes'))
  return None


@contextlib.contextmanager
def _explained(config: Config) -> Iterator[None]:
  """Says where a network of the user's own fails when it is first called."""
  try:
    yield
  except Exception as error:
    if not own.is_object(config.model):
      raise
    raise DataError(
      f'{config.model}: its call failed on an example of {own.word(config.data)}: '
      f'{own.told(error)}'
    ) from error


# ---- networks that were pruned before ------------------------------------------------


def as_thin(model: Any, path: str | Path) -> Any:
  """Returns the model with the `arch` of the pruned network in a folder.

  Raises:
    CheckpointError: the folder holds no network, or one of another model. Only the
      number of classes and the type of its numbers may differ.
  """
  if isinstance(model, Trunk):
    raise CheckpointError(
      f'{path}: expected a .npz or .safetensors file with the arrays of '
      f'{model.network.foreign} (params/Dense_0/kernel, ...), got a folder: only '
      'networks of this library start from one'
    )
  record = records.read_record(Path(path))
  stored, arch, _ = _compact(record)
  if _heads(stored) and not hasattr(model, 'trunk'):  # cut by NetCut, with its exit
    original = models.build(stored['name'], **stored['fields'])
    model = WithHeads(model, original.heads, {'exit/main': 0})
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
  """Reads the variables of the pruned network in a folder.

  Branch gates are open, as those of the stored network are folded into its arrays.

  Args:
    path: the folder.
    model: the model that `as_thin` returned.
    *inputs: an example of what the network reads.

  Raises:
    CheckpointError: the number of classes differs, or arrays do not fit.
  """
  leaves, record = records.read(Path(path))
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
  """Returns the names of the heads on the trunk of the network in a folder."""
  stored, _, _ = _compact(records.read_record(Path(path)))
  return _heads(stored)


def _heads(stored: Mapping[str, Any]) -> tuple[str, ...]:
  heads = stored.get('fields', {}).get('heads', ())
  return () if isinstance(heads, int) else tuple(heads)  # those of an attention


def _compact(record: Mapping[str, Any]) -> tuple[Mapping, Mapping[str, int], str]:
  """Returns (model, arch, path of its arrays) of a record, without dropped heads.

  If only the trunk is left, they are those of the trunk and the path is '/trunk/';
  otherwise it is '/'.
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
  """Flattens the value of `models.describe` into {'name': ..., field: value}.

  A network with heads gets the fields of its trunk, and the taps of its heads.
  """
  if 'foreign' in described:
    return {'name': described['foreign']}
  name, fields = described['name'], described['fields']
  if 'trunk' not in fields:
    return {'name': name, **fields}
  tap = lambda head: head['fields'].get('tap', head['name'])
  taps = {of: tap(head) for of, head in fields['heads'].items()}
  return {'name': name, **fields['trunk']['fields'], 'heads': taps}
