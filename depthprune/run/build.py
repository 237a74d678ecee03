"""The model that a config names: one of this library, or of the user's own."""

import difflib
import inspect
from collections.abc import Mapping
from typing import Any, get_type_hints

import flax.linen as nn
from flax import nnx

from depthprune import models
from depthprune.exports import records
from depthprune.models import pretrained
from depthprune.models.decoder import Decoder
from depthprune.run import own
from depthprune.run.config import Config
from depthprune.storage import files
from depthprune.train.options import ConfigError

CLASSES = 'classes', 'num_classes', 'n_classes'  # what the number of classes is called


def alone(config: Config, classes: int) -> Any:
  """Builds the model of a config without the exits of its method.

  A network that writes has the sizes that its pretrained weights have.

  Raises:
    ConfigError: there is no model of that name, or it does not take its arguments.
    CheckpointError: the weights are those of another kind of network.
  """
  chosen = {'scan': config.scan, 'dtype': 'bfloat16' if config.bfloat16 else ''}
  fields = {k: v for k, v in chosen.items() if v} | own.arguments(config.model_args)
  if own.is_object(config.model):
    return own_network(config.model, classes, fields, config.seed)
  try:
    kind = type(models.build(config.model))
  except ValueError as error:
    raise ConfigError(f'model: {error}') from error
  hints = get_type_hints(kind)
  for name, value in own.arguments(config.model_args).items():
    if name not in hints:
      near = difflib.get_close_matches(name, hints, n=3, cutoff=0)
      raise ConfigError(
        f'model_args: {config.model} takes no {name}; nearest: {", ".join(near)}'
      )
    if name != 'dtype':  # which has many forms
      plain = [*value] if isinstance(value, tuple) else value
      files.checked(plain, hints[name], f'model_args: {name}', ConfigError)
  if kind is not Decoder:
    return models.build(config.model, **{'classes': classes, **fields})
  if config.pretrained is None or records.is_network(config.pretrained):
    return models.build(config.model, **fields)
  return pretrained.decoder(config.pretrained, **fields)


def own_network(
  name: str, classes: int, chosen: Mapping[str, Any], seed: int = 0
) -> Any:
  """Makes the network that FILE.py:CLASS means.

  Args:
    name: FILE.py:CLASS, or a function that returns a linen or an NNX module.
    classes: number of classes, which it is given where it takes that number.
    chosen: its other arguments.
    seed: seed of the `rngs` of an NNX module.

  Raises:
    ConfigError: there is no such class, it does not take these arguments, or it makes
      something else than a module.
  """
  made = own.load(name)
  if not callable(made):
    raise ConfigError(f'{name}: expected a class, got a {type(made).__name__}')
  is_nnx = isinstance(made, type) and issubclass(made, nnx.Module)
  takes = inspect.signature(made.__init__ if is_nnx else made).parameters
  fill = {word: classes for word in CLASSES if word in takes and word not in chosen}
  rngs = {'rngs': nnx.Rngs(seed)} if 'rngs' in takes else {}
  wrong = [word for word in chosen if word not in takes]
  if wrong and not any(p.kind is p.VAR_KEYWORD for p in takes.values()):
    known = [word for word in takes if word not in ('self', 'parent', 'name')]
    raise ConfigError(
      f'{name}: takes no {wrong[0]}; its arguments are {", ".join(known) or "none"}'
    )
  try:
    module = made(**{**dict([*fill.items()][:1]), **rngs, **chosen})
  except Exception as error:
    raise ConfigError(f'{name}: making it failed: {own.told(error)}') from error
  if not isinstance(module, nn.Module | nnx.Module):
    raise ConfigError(
      f'{name}: expected a module of flax.linen or flax.nnx, got a '
      f'{type(module).__module__}.{type(module).__name__}'
    )
  return module
