"""Networks of every kind as functions of (variables, *inputs, **kwargs).

  linen module         module.apply.
  haiku transform      its `apply`, with `rng=` as an argument of the call. Of one with
                       state the variables are {'params': params, 'state': state}.
  transformers, Flax   the model at params=variables.
  NNX module           the variables are nnx.state(module), or the module itself.
  Equinox module, or   the variables are its arrays, None standing for the rest:
  another pytree       equinox.filter(module, equinox.is_array).
  function             the function itself.

None of these libraries is imported: their networks are known by their shape.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax

from depthprune.program.trace import is_array


def runnable(model: Any) -> Callable:
  """Returns a model as a function of (variables, *inputs, **kwargs).

  Args:
    model: a function, an object with `apply`, or a module of one of the kinds that the
      module docstring lists. Where the object has a tuple `exits`, the function returns
      these outputs only, so that taps no exit needs are dead code.
  """
  if is_module(model):
    return lambda variables, *inputs, **kwargs: rebuilt(model, variables)(
      *inputs, **kwargs
    )
  apply = getattr(model, 'apply', model)
  if apply is model and hasattr(getattr(model, 'module', None), 'apply'):
    return lambda variables, *inputs, **kwargs: model(
      *inputs, params=variables, **kwargs
    )
  if getattr(model, '_fields', None) == ('init', 'apply'):
    return _transformed(apply)
  exits = getattr(model, 'exits', None)
  if not isinstance(exits, tuple):
    return apply

  def fn(variables, *inputs, **kwargs):
    out = apply(variables, *inputs, **kwargs)
    if kwargs.get('mutable'):
      return chosen(out[0]), out[1]
    return chosen(out)

  def chosen(out):
    named = isinstance(out, Mapping) and all(name in out for name in exits)
    return {name: out[name] for name in exits} if named else out

  return fn


def rebuilt(model: Any, variables: Any) -> Any:
  """Returns the module `model` with other arrays.

  Args:
    model: an NNX module, or another module that is a pytree.
    variables: its arrays; of an NNX module also the module itself.

  Raises:
    TypeError: `variables` are not the arrays of this module; the message says what to
      write.
  """
  kind = type(model).__name__
  if _is_nnx(model):
    nnx: Any = sys.modules['flax.nnx']
    graph, state = nnx.split(model)
    if isinstance(variables, type(model)):
      if len(jax.tree.leaves(variables)) == len(jax.tree.leaves(state)):
        return variables
      raise TypeError(
        f'variables: {kind} shares arrays between its parts, which is lost in the '
        'module as a pytree; expected nnx.state(module)'
      )
    if jax.tree.structure(variables) == jax.tree.structure(state):
      return nnx.merge(graph, variables)
    raise TypeError(
      f'variables: expected all of nnx.state(module) for the NNX module {kind}, got '
      f'{_described(variables)}; write (module, nnx.state(module), *inputs)'
    )
  if _structure(variables) != _structure(model) or not _only_arrays(variables):
    raise TypeError(
      f'variables: expected the arrays of the module {kind}, got '
      f'{_described(variables)}; write (module, arrays, *inputs) with arrays = '
      'equinox.filter(module, equinox.is_array), or another copy of the module that '
      'holds None where it has no array'
    )
  return jax.tree.map(
    lambda mine, given: mine if given is None else given,
    model,
    variables,
    is_leaf=lambda x: x is None,
  )


@contextlib.contextmanager
def explained(variables: Any, inputs: tuple) -> Iterator[None]:
  """Says what to write where the first call of a network fails for a usual reason."""
  try:
    yield
  except TypeError as error:
    if len(inputs) == 1 and type(inputs[0]) in (tuple, list):
      raise TypeError(
        f'inputs: the network was called with one {type(inputs[0]).__name__}, and '
        f'failed ({error}); write the inputs one by one: couple(model, variables, '
        '*inputs)'
      ) from error
    raise
  except Exception as error:
    kind = type(error).__name__  # Flax's own errors, which are not imported here
    if kind == 'ModifyScopeVariableError':
      raise ValueError(
        'the call updates variables: turn that off, as with train=False, or write '
        "couple(..., mutable=['batch_stats'], fixed=lambda out: out[0])"
      ) from error
    missing = kind in ('ScopeParamNotFoundError', 'ScopeCollectionNotFound')
    if missing and isinstance(variables, Mapping) and 'params' not in variables:
      raise ValueError(
        "variables: expected what model.init returns, {'params': ..., ...}, got "
        f"{_described(variables)}; write {{'params': params}} for parameters alone"
      ) from error
    raise


def is_module(model: Any) -> bool:
  """Whether a network carries its own arrays, so that `rebuilt` can replace them."""
  if _is_nnx(model):
    return True
  if hasattr(model, 'apply') or isinstance(model, functools.partial):
    return False
  return callable(model) and any(map(is_array, jax.tree.leaves(model)))


def arrays_of(module: Any) -> Any:
  """Returns the arrays that a module carries, as `couple` takes them."""
  if _is_nnx(module):
    return sys.modules['flax.nnx'].state(module)
  return jax.tree.map(lambda x: x if is_array(x) else None, module)


def _is_nnx(model: Any) -> bool:
  nnx = sys.modules.get('flax.nnx')  # who has such a module has imported it
  return nnx is not None and isinstance(model, nnx.Module)


def _transformed(apply: Callable) -> Callable:
  """The `apply` of a haiku transform, whose arguments say which kind it is."""
  names = list(inspect.signature(apply).parameters)

  def fn(variables, *inputs, rng=None, **kwargs):
    key = (rng,) if 'rng' in names[:3] else ()
    if names[1:2] != ['state']:
      return apply(variables, *key, *inputs, **kwargs)
    params, state = variables['params'], variables['state']
    return apply(params, state, *key, *inputs, **kwargs)[0]

  return fn


def _structure(tree: Any) -> Any:
  return jax.tree.structure(arrays_of(tree))


def _only_arrays(tree: Any) -> bool:
  return all(map(is_array, jax.tree.leaves(tree)))


def _described(variables: Any) -> str:
  if is_array(variables):
    return f'an array {list(variables.shape)}'
  if isinstance(variables, Mapping):
    return (
      f'a {type(variables).__name__} of {", ".join(map(str, variables)) or "nothing"}'
    )
  return f'a {type(variables).__name__}'
