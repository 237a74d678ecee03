"""Models by name, such as `build('resnet20')`: one network family per file.

A file `family.py` offers every public name that begins with its own: `resnet20` is in
`resnet.py`, and a new file is picked up without being registered. Its function `small`
returns a small network of the family and an example of its input, which the
conformance tests use.
"""

import dataclasses
import importlib
import pkgutil
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from depthprune.models.arch import nearest
from depthprune.program import arguments

__all__ = ['build', 'describe', 'families', 'names', 'small']

# Stored networks name the files of their classes; these files have been renamed since.
RENAMED = {'auxiliary': 'auxiliary_path', 'perceptron': 'heads'}


def names() -> list[str]:
  """Returns the names of all models that `build` knows, such as 'resnet20'."""
  return sorted(_constructors())


def families() -> list[str]:
  """Returns the names of the files that offer models, such as 'resnet'."""
  offers = lambda file: any(name.startswith(file) for name in vars(_family(file)))
  return [file for file in _files() if offers(file)]


def small(family: str) -> tuple[nn.Module, jax.ShapeDtypeStruct]:
  """Returns a small network of a family and an abstract example of its input [1, ...].

  Args:
    family: one of `families()`.
  """
  return _family(family).small()


def build(name: str, **fields) -> nn.Module:
  """Builds a model by its name, or from a description that `describe` made.

      build('resnet20', classes=100)
      build(described['name'], **described['fields'])

  Args:
    name: one of `names()`, or 'file.Class' as in a description.
    **fields: values for fields of the model's class, such as classes=10 or
      dtype='bfloat16'. A value may be a description itself.

  Returns:
    The model, a linen module. Its arrays come from `model.init` or from a file.

  Raises:
    ValueError: there is no such model; the message lists the nearest names.
  """
  arguments.kind_of('name', name, str, "a name such as 'resnet20'")
  classes = fields.get('classes', 1)
  if not isinstance(classes, Mapping):  # of several tasks
    arguments.whole('classes', classes)
  values = {key: _restored(key, value) for key, value in fields.items()}
  file, _, cls = name.partition('.')
  file = RENAMED.get(file, file)
  if cls:
    constructor = _classes(file).get(cls) if file in _files() else None
  else:
    constructor = _constructors().get(name)
  if constructor is None:
    raise ValueError(f'no model {name!r}. {nearest(name, names())}')
  return constructor(**values)


def describe(model: Any) -> dict[str, Any]:
  """Describes a model of this package as plain JSON data.

  `build(described['name'], **described['fields'])` makes an equal model; without
  'arch' among the fields it makes the unpruned one.

  Args:
    model: a model of this package, or a `Head` or `Auxiliary` of `models.heads`.

  Returns:
    {'name': 'resnet.ResNet', 'fields': {...}}.

  A network within it that is not from this package, the trunk of heads, is only named:
  {'foreign': 'net.Net'}, with the 'keywords' of its last inputs if they have some. Put
  the network itself there before the model is built.

  Raises:
    ValueError: the model is not from this package.
  """
  package, _, file = type(model).__module__.rpartition('.')
  if package != __name__:
    raise ValueError(
      f'describe: {type(model).__module__}.{type(model).__name__} is not a model of '
      f'{__name__}; keep its code and pass the model itself where it is loaded'
    )
  fields = {
    field.name: _plain(field.name, getattr(model, field.name))
    for field in dataclasses.fields(model)
    if field.name not in ('parent', 'name')
  }
  return {'name': f'{file}.{type(model).__name__}', 'fields': fields}


def _files() -> list[str]:
  return [module.name for module in pkgutil.iter_modules(__path__)]


def _family(file: str) -> Any:
  return importlib.import_module(f'{__name__}.{file}')


def _classes(file: str) -> dict[str, type]:
  """The modules and heads of a file: a description must not name anything else."""
  family = _family(file)
  return {
    name: value
    for name, value in vars(family).items()
    if isinstance(value, type) and value.__module__ == family.__name__
    if issubclass(value, nn.Module) or dataclasses.is_dataclass(value)
  }


def _constructors() -> dict[str, Callable[..., Any]]:
  return {
    name: value
    for file in _files()
    for name, value in vars(_family(file)).items()
    if name.startswith(file) and callable(value)
  }


def _plain(key: str, value: Any) -> Any:
  if key == 'dtype':
    return jnp.dtype(value).name
  if dataclasses.is_dataclass(value):
    kind = type(value)
    ours = kind.__module__.startswith(f'{__name__}.')
    named = getattr(value, 'foreign', f'{kind.__module__}.{kind.__qualname__}')
    if ours and not hasattr(value, 'foreign'):
      return describe(value)
    keywords = getattr(value, 'names', ())
    return {'foreign': named, **({'keywords': [*keywords]} if keywords else {})}
  if isinstance(value, Mapping):
    return {name: _plain(name, item) for name, item in value.items()}
  if isinstance(value, tuple):
    return [_plain(key, item) for item in value]
  return value


def _restored(key: str, value: Any) -> Any:
  if key == 'dtype':
    return jnp.dtype(value)
  if isinstance(value, list):
    return tuple(_restored(key, item) for item in value)
  if not isinstance(value, Mapping):
    return value
  if set(value) == {'name', 'fields'}:
    return build(value['name'], **value['fields'])
  return {name: _restored(name, item) for name, item in value.items()}
