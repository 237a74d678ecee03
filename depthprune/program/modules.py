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

All of them understand `train=True` and `train=False`: it becomes the flag that the
network has (`FLAGS`), or the mode of an NNX module without a flag, and is left out
where there is nothing to set. An NNX module draws from `rngs={'dropout': key}` where it
is given, in place of its own keys.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np

from depthprune.program import arguments
from depthprune.program.trace import carried_names, is_array, paths_of

FLAGS = {
  'train': True, 'training': True, 'is_training': True, 'deterministic': False,
  'use_running_average': False, 'inference': False,
}  # fmt: skip
"""Arguments that tell training from evaluation, with their values in training."""

ANY = '**'  # among names of parameters: the call takes arguments of any name


def runnable(model: Any) -> Callable:
  """Returns a model as a function of (variables, *inputs, **kwargs).

  Args:
    model: a function, an object with `apply`, or a module of one of the kinds that the
      module docstring lists. Where the object has a tuple `exits`, the function returns
      these outputs only, so that taps no exit needs are dead code.

  Raises:
    TypeError: the model is none of these.
  """
  checked(model)
  names = parameters(model)
  if is_module(model):

    def call_module(variables, *inputs, **kwargs):
      module = rebuilt(model, variables)
      if 'train' in kwargs:
        set_mode(module, kwargs['train'])
      if is_nnx(model) and (rngs := kwargs.get('rngs')):
        reseed(module, rngs.get('dropout', next(iter(rngs.values()))))
      return module(*inputs, **accepted(kwargs, names))

    return call_module
  apply = getattr(model, 'apply', model)
  if is_transformers(model):

    def call_transformers(variables, *inputs, **kwargs):
      outputs = model(*inputs, params=variables, **accepted(kwargs, names))
      # A cache that is no field of the class of outputs is not among their leaves.
      if isinstance(outputs, Mapping) and carried_names(kwargs, outputs):
        return dict(outputs)
      return outputs

    return call_transformers
  if is_haiku(model):
    return _transformed(apply)
  exits = getattr(model, 'exits', None)
  if not isinstance(exits, tuple):
    if ANY in names:
      return apply

    def call(variables, *inputs, **kwargs):
      taken = parameters(model, kwargs['method']) if 'method' in kwargs else names
      return apply(variables, *inputs, **accepted(kwargs, taken))

    return call

  def fn(variables, *inputs, **kwargs):
    out = apply(variables, *inputs, **accepted(kwargs, names))
    if kwargs.get('mutable'):
      return chosen(out[0], kwargs), out[1]
    return chosen(out, kwargs)

  def chosen(out, kwargs):
    named = isinstance(out, Mapping) and all(name in out for name in exits)
    names = (*exits, *carried_names(kwargs, out))
    return {name: out[name] for name in names} if named else out

  return fn


def checked(model: Any) -> Any:
  """Returns an argument that has to be a network.

  Raises:
    TypeError: it is a name, a class, or anything else.
  """
  if isinstance(model, type) or not callable(getattr(model, 'apply', model)):
    of = 'models.build(name) makes the module of a name'
    if isinstance(model, type):
      of = f'write {model.__name__}(...), with the brackets'
    elif hasattr(model, 'cut_from') or hasattr(model, 'fn'):
      of = 'write its attribute `model`'
    raise arguments.refused('model', 'a module or a function', model, of)
  return model


def checked_call(model: Any, variables: Any, inputs: tuple) -> Any:
  """Returns a network whose variables may be its own, by their type.

  Args:
    model: the network.
    variables: its variables.
    inputs: of its call.

  Raises:
    TypeError: the model is none, or the variables are not of the form that it takes.
  """
  checked(model)
  named = isinstance(variables, Mapping)
  if is_linen(model) and (inputs or not is_array(variables)) and not named:
    raise arguments.refused(
      'variables',
      arguments.VARIABLES,
      variables,
      'write (model, variables, *inputs)',
    )
  text = [x for x in jax.tree.leaves(variables) if isinstance(x, str | bytes)]
  if text:
    raise arguments.refused('variables', 'arrays in it', text[0])
  return model


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
  if is_nnx(model):
    nnx: Any = sys.modules['flax.nnx']
    graph, state = nnx.split(model)
    if isinstance(variables, type(model)):
      if len(jax.tree.leaves(variables)) == len(jax.tree.leaves(state)):
        return nnx.merge(*nnx.split(variables))  # a call may change its mode
      lost = 'shares arrays between its parts, which is lost in the module as a pytree'
      write = 'write nnx.state(module)'
      raise arguments.wrong('variables', f'{kind} {lost}', write, TypeError)
    if jax.tree.structure(variables) == jax.tree.structure(state):
      return nnx.merge(graph, variables)
    expected = f'all of nnx.state(module) for the NNX module {kind}'
    write = 'write (module, nnx.state(module), *inputs)'
    raise arguments.refused('variables', expected, variables, write)
  if _structure(variables) != _structure(model) or not _only_arrays(variables):
    raise arguments.refused(
      'variables',
      f'the arrays of the module {kind}',
      variables,
      'write (module, arrays, *inputs) with arrays = equinox.filter(module, '
      'equinox.is_array), or another copy of the module that holds None where it has '
      'no array',
    )
  return jax.tree.map(
    lambda mine, given: mine if given is None else given,
    model,
    variables,
    is_leaf=lambda x: x is None,
  )


@contextlib.contextmanager
def explained(variables: Any, inputs: tuple) -> Iterator[None]:
  """Says what to write where the first call of a network fails for a usual reason.

  An error of the network itself stays as it is, unless its message is long.
  """
  try:
    yield
  except Exception as error:
    if said := _explanation(error, variables, inputs):
      raise said from error
    kind = TypeError if isinstance(error, TypeError) else ValueError
    short = arguments.brief(kind(str(error)))
    if str(short) != str(error):
      raise short from error
    raise


def _explanation(error: Exception, variables: Any, inputs: tuple) -> Exception | None:
  """What the first call of a network has done wrong, if that is known."""
  wrong, kind = arguments.wrong, type(error).__name__  # Flax is not imported here
  said = arguments.clipped(str(error).split(' (https://')[0].rstrip('.'), 300)
  if kind == 'ModifyScopeVariableError':
    return wrong(
      '',
      'the call updates variables',
      'turn that off, as with train=False, or write couple(..., '
      "mutable=['batch_stats'], fixed=lambda out: out[0])",
    )
  if kind == 'ApplyScopeInvalidVariablesTypeError':
    return arguments.refused('variables', arguments.VARIABLES, variables)
  if kind.startswith('Scope') and isinstance(variables, Mapping):
    expected = "expected what model.init returns, {'params': ..., ...}"
    if 'params' not in variables:
      return wrong(
        'variables',
        f'{expected}, got {arguments.described(variables)}',
        "write {'params': params} for parameters alone",
      )
    return wrong(
      'variables',
      f'they do not fit this network at these inputs: {said}',
      'pass what model.init(key, *inputs) of this very model returns',
    )
  if not isinstance(error, TypeError | AttributeError):
    return None
  if is_array(variables) and not inputs:
    return wrong(
      'variables',
      f'got {arguments.described(variables)} and no inputs',
      'write (model, variables, *inputs)',
      TypeError,
    )
  if not jax.tree.leaves(inputs):
    told = 'the network was called without any'
  elif len(inputs) == 1 and type(inputs[0]) in (tuple, list):
    told = f'the network was called with one {type(inputs[0]).__name__}'
  elif strange := [x for x in jax.tree.leaves(inputs) if not is_array(x)]:
    told = f'expected arrays, got {arguments.described(strange[0])}'
  else:
    return None
  return wrong(
    'inputs',
    f'{told}, and failed ({said})',
    'write the inputs one by one: (model, variables, *inputs)',
    TypeError,
  )


def is_module(model: Any) -> bool:
  """Whether a network carries its own arrays, so that `rebuilt` can replace them."""
  if is_nnx(model):
    return True
  if hasattr(model, 'apply') or isinstance(model, functools.partial):
    return False
  return callable(model) and any(map(is_array, jax.tree.leaves(model)))


def arrays_of(module: Any) -> Any:
  """Returns the arrays that a module carries, as `couple` takes them."""
  if is_nnx(module):
    return sys.modules['flax.nnx'].state(module)
  if is_transformers(module):
    return module.params
  return jax.tree.map(lambda x: x if is_array(x) else None, module)


def parameters_of(variables: Any) -> frozenset[str]:
  """Returns the paths of the arrays that training changes.

  They are the `nnx.Param` in the state of an NNX module, those under 'params' in other
  trees, or all but the gates of branches where there are none of these.
  """
  nnx = sys.modules.get('flax.nnx')
  paths = frozenset(paths_of(variables))
  if nnx is not None and isinstance(variables, nnx.State):
    own = frozenset(paths_of(nnx.filter_state(variables, nnx.Param)))
  else:
    own = frozenset(path for path in paths if path.startswith('params/'))
  return own or frozenset(path for path in paths if not path.startswith('branches/'))


def is_linen(model: Any) -> bool:
  """Whether a network is a linen module."""
  return hasattr(model, 'apply') and hasattr(model, 'clone')


def is_nnx(model: Any) -> bool:
  """Whether a network is an NNX module."""
  nnx = sys.modules.get('flax.nnx')  # who has such a module has imported it
  return nnx is not None and isinstance(model, nnx.Module)


def is_haiku(model: Any) -> bool:
  """Whether a network is a haiku transform."""
  return getattr(model, '_fields', None) == ('init', 'apply')


def is_transformers(model: Any) -> bool:
  """Whether a network is a Flax model of transformers."""
  return not hasattr(model, 'apply') and hasattr(
    getattr(model, 'module', None), 'apply'
  )


def parameters(model: Any, method: Any = None) -> frozenset[str]:
  """Returns the names of the arguments of a network's call.

  ANY is among them where it takes arguments of any name, or cannot be inspected.

  Args:
    model: the network.
    method: the method of a linen module that is called instead, or its name.
  """
  if getattr(model, '__name__', '') == 'apply' and hasattr(model, '__self__'):
    model = model.__self__  # module.apply, given as a function
  linen = hasattr(model, 'apply') and not is_haiku(model)
  called = model.apply if is_haiku(model) or not callable(model) else model
  if linen and method is not None:
    called = getattr(model, method) if isinstance(method, str) else method
  try:
    found = inspect.signature(called).parameters.values()
  except (TypeError, ValueError):
    return frozenset((ANY,))
  names = {ANY if p.kind is p.VAR_KEYWORD else p.name for p in found}
  if ANY in names and type(model).__name__ == 'Sequential' and model.layers:
    names = parameters(model.layers[0])  # the layer that is given them
  return frozenset(names | ({'rngs', 'mutable'} if linen else set()))


def accepted(kwargs: Mapping[str, Any], names: frozenset[str]) -> dict[str, Any]:
  """Returns the arguments of a call by keyword as a network takes them.

  `train` becomes the flag that the network has. Without one it is left out, as are
  `rngs` and `mutable` where the network does not know them.

  Args:
    kwargs: the arguments.
    names: the arguments that the network has, from `parameters`.
  """
  if ANY in names:
    return dict(kwargs)
  optional = {'train', 'rngs', 'mutable'} - names
  taken = {name: x for name, x in kwargs.items() if name not in optional}
  flag = next((name for name in FLAGS if name in names), 'train')
  if 'train' in kwargs and flag in names:
    taken.setdefault(flag, kwargs['train'] == FLAGS[flag])
  return taken


def streams(key: jax.Array) -> dict[str, jax.Array]:
  """Returns the random streams of a linen module in training.

  linen draws from 'params' where there is no stream of the name that it is asked for.
  """
  return {'dropout': key, 'params': jax.random.fold_in(key, 1)}


def set_mode(module: Any, train: bool) -> None:
  """Sets the mode of an NNX module whose call has no flag for it."""
  if is_nnx(module) and not parameters(module) & {*FLAGS}:
    (module.train if train else module.eval)()


def collected(model: Any, variables: Any) -> dict[str, Any]:
  """Returns the arrays of a network by path, each below what it is for.

  Args:
    model: a network of any kind.
    variables: its arrays, as `couple` takes them.

  Returns:
    {'params/...': trained by gradients, 'batch_stats/...': running statistics,
    'constants/...': neither}. Variables with an entry 'params' have this form already,
    in an NNX module the types of the variables say it, and elsewhere all floating point
    numbers are trained. Keys of `nnx.Rngs` are left out.
  """
  if is_nnx(model):
    nnx: Any = sys.modules['flax.nnx']
    state = nnx.state(variables) if is_nnx(variables) else variables
    return {name: x.get_value() for _, name, x in _nnx_named(state) if name}
  paths = paths_of(variables)
  if isinstance(variables, Mapping) and 'params' in variables:
    return paths
  kind = lambda x: (
    'params' if jax.numpy.issubdtype(x.dtype, np.inexact) else 'constants'
  )
  return {f'{kind(x)}/{path}': x for path, x in paths.items()}


def updating(model: Any, variables: Any) -> Callable:
  """Returns a network as a function of named arrays that also returns their updates.

  Args:
    model: a network of any kind.
    variables: its arrays or their shapes, as `couple` takes them.

  Returns:
    f(arrays, *inputs, key=None, **kwargs) -> (outputs, {path: new array}). The arrays
    are named as `collected` names them. With train=True among the arguments, running
    statistics are updated, and `key` is for dropout.
  """
  fn, taken = runnable(model), parameters(model)
  kinds = {name.split('/')[0] for name in collected(model, variables)}
  stateful = sorted(kinds - {'params', 'constants', 'branches'})
  updates = stateful and (is_haiku(model) or taken & {ANY, 'mutable'})

  def call(arrays, *inputs, key=None, **kwargs):
    if key is not None and (is_transformers(model) or is_haiku(model)):
      kwargs['dropout_rng' if is_transformers(model) else 'rng'] = key
    elif key is not None:
      kwargs['rngs'] = streams(key)
    tree = joined(model, variables, arrays)
    if not (kwargs.get('train') and updates):
      return fn(tree, *inputs, **kwargs), {}
    outputs, changed = fn(tree, *inputs, mutable=stateful, **kwargs)
    return outputs, {p: x for p, x in paths_of(changed).items() if p in arrays}

  def call_nnx(arrays, *inputs, key=None, **kwargs):
    module = rebuilt(model, joined(model, variables, arrays))
    if key is not None:
      reseed(module, key)
    if 'train' in kwargs:
      set_mode(module, kwargs['train'])
    outputs = module(*inputs, **accepted(kwargs, taken))
    new = collected(model, module) if kwargs.get('train') else {}
    return outputs, {p: x for p, x in new.items() if not p.startswith('params/')}

  return call_nnx if is_nnx(model) else call


def joined(model: Any, variables: Any, arrays: Mapping[str, Any]) -> Any:
  """Returns the variables of a network with arrays named as `collected` names them.

  Args:
    model: a network of any kind.
    variables: its variables or their shapes, for their structure.
    arrays: all arrays by path.
  """
  if not is_nnx(model):
    names = collected(model, variables)
    structure = jax.tree.structure(variables)
    return jax.tree.unflatten(structure, [arrays[name] for name in names])
  nnx: Any = sys.modules['flax.nnx']
  full = []
  for path, name, variable in _nnx_named(nnx.state(model)):
    value = arrays[name] if name else variable.get_value()
    full.append((path, variable.replace(value)))  # the call may change its copy
  return nnx.from_flat_state(full)


def reseed(module: Any, key: jax.Array):
  """Makes all random keys of an NNX module anew from one."""
  nnx: Any = sys.modules['flax.nnx']
  if not jax.numpy.issubdtype(key.dtype, jax.dtypes.prng_key):
    key = jax.random.wrap_key_data(key)
  drawn = [
    (path, variable.replace(jax.random.fold_in(key, i)))
    for i, (path, variable) in enumerate(nnx.to_flat_state(nnx.state(module)))
    if isinstance(variable, nnx.RngKey)
  ]
  nnx.update(module, nnx.from_flat_state(drawn))


def _nnx_named(state: Any) -> Iterator[tuple[tuple, str, Any]]:
  """Yields (path, name, variable) of an NNX state; random keys have the name ''."""
  nnx: Any = sys.modules['flax.nnx']
  kinds = ((nnx.Param, 'params'), (nnx.BatchStat, 'batch_stats'))
  for path, variable in nnx.to_flat_state(state):
    kind = next((n for cls, n in kinds if isinstance(variable, cls)), 'constants')
    name = '/'.join((kind, *map(str, path)))
    yield path, '' if isinstance(variable, nnx.RngState) else name, variable


def _transformed(apply: Callable) -> Callable:
  """The `apply` of a haiku transform, whose arguments say which kind it is."""
  names = list(inspect.signature(apply).parameters)

  def fn(variables, *inputs, rng=None, mutable=(), **kwargs):
    key = (rng,) if 'rng' in names[:3] else ()
    kwargs = accepted(kwargs, frozenset(names))
    if names[1:2] != ['state']:
      return apply(variables, *key, *inputs, **kwargs)
    params, state = variables['params'], variables['state']
    out, state = apply(params, state, *key, *inputs, **kwargs)
    return (out, {'state': state}) if mutable else out

  return fn


def _structure(tree: Any) -> Any:
  return jax.tree.structure(arrays_of(tree))


def _only_arrays(tree: Any) -> bool:
  return all(map(is_array, jax.tree.leaves(tree)))
