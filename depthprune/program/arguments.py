"""Arguments that cannot be used, refused in a sentence.

A message says which function of ours was called, which argument is wrong, what was
expected, what was got, and what to write::

  prune: keep: expected {'channels': {group: bool array}}, got the number 0.5; write
  oneshot(coupling, variables, target), or decide(...) of a method

The checks look at types, names and shapes, never at the values of an array that lies on
a device. Messages are short, however large the network; `brief` keeps the rest.
"""

from __future__ import annotations

import inspect
import math
import operator
import os
import traceback
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

LINES, CHARACTERS = 10, 1000  # of a message, at most
REST = '(error.details has the whole message)'
NAMES = 6  # in a list within a sentence, at most
BETWEEN = ('jax', 'flax', 'optax', 'contextlib', 'functools')  # call us back
PROGRAMS = ('depthprune.cli', 'depthprune.run')  # call us as a user does

KEEP = "{'channels': {group: bool array}, 'branches': {path: bool}, ...}"
VARIABLES = "a dict with 'params', as model.init returns it"
DECIDES = "write oneshot(coupling, variables, target), or a method's decide(...)"

Error = TypeVar('Error', bound=Exception)


def refused(
  name: str, expected: str, got: Any, write: str = '', kind: type[Error] = TypeError
) -> Error:
  """Returns the error about an argument; `raise` it.

  Args:
    name: of the argument.
    expected: what it should have been.
    got: what it was.
    write: what to do instead, as a clause.
    kind: type of the error.
  """
  return wrong(name, f'expected {expected}, got {described(got)}', write, kind)


def wrong(
  name: str, what: str, write: str = '', kind: type[Error] = ValueError
) -> Error:
  """Returns the error about an argument of which `what` is the matter."""
  place = ': '.join(filter(None, (_called(), name)))
  return brief(kind(f'{place}: {what}{write and "; "}{write}'))


def brief(error: Error) -> Error:
  """Shortens the message of an error to LINES and about CHARACTERS.

  The whole message becomes the attribute `details` of the error.
  """
  text = str(error.args[0]) if error.args else ''
  vars(error)['details'] = text
  lines = text.splitlines()
  if len(lines) <= LINES and len(text) <= CHARACTERS:
    return error
  if len(lines) > LINES - 1:  # the last one says what to do
    first = lines[: LINES - 3]
    lines = [*first, f'  … {len(lines) - len(first) - 1} more lines …', lines[-1]]
  left = CHARACTERS - len(lines) - len(REST)
  fits = lambda n: sum(min(len(line), n) for line in lines) <= left
  most = next(n for n in range(left, 0, -1) if fits(n))
  error.args = ('\n'.join((*(clipped(line, most) for line in lines), REST)),)
  return error


def clipped(text: str, most: int) -> str:
  """Returns a text of at most `most` characters, the end left out."""
  return text if len(text) <= most else f'{text[: most - 1]}…'


def listed(names: Iterable[Any], most: int = NAMES) -> str:
  """Returns names in a row, the first ones if there are many; 'none' without any."""
  names = [*map(str, names)]
  more = f', … ({len(names)} in all)' if len(names) > most else ''
  return ', '.join(names[:most]) + more or 'none'


def described(x: Any) -> str:
  """Returns what an argument is, in a few words."""
  if x is None or isinstance(x, bool):
    return repr(x)
  if isinstance(x, int | float | complex):
    return f'the number {x!r}'
  if isinstance(x, str | bytes):
    return clipped(repr(x), 80)
  if isinstance(x, jax.Array | np.ndarray | np.generic | jax.ShapeDtypeStruct):
    return f'an array {x.dtype}{[*x.shape]}'
  if isinstance(x, type):
    return f'the class {x.__name__} itself'
  if isinstance(x, Mapping):
    return f'a {type(x).__name__} of {listed(x)}' if x else 'an empty dict'
  if type(x) in (list, tuple):
    kinds = dict.fromkeys(type(each).__name__ for each in x)
    return f'a {type(x).__name__} of {listed(kinds)}' if x else f'an empty {_kind(x)}'
  if callable(x) and hasattr(x, '__qualname__'):
    return f'the function {x.__qualname__}'
  return f'{"an" if _kind(x)[0] in "AEIOUaeio" else "a"} {_kind(x)}'


def kind_of(name: str, value: Any, kinds: Any, expected: str, write: str = '') -> Any:
  """Returns an argument that has to be of some type.

  Raises:
    TypeError: it is of another.
  """
  if not isinstance(value, kinds):
    raise refused(name, expected, value, write)
  return value


def function(name: str, value: Any, expected: str, write: str = '') -> Any:
  """Returns an argument that has to be a function.

  Raises:
    TypeError: it is none.
  """
  if not callable(value):
    raise refused(name, expected, value, write)
  return value


def whole(name: str, value: Any, least: int = 1, write: str = '') -> int:
  """Returns an argument that has to be a whole number of at least `least`.

  Raises:
    TypeError: it is no whole number.
    ValueError: it is below `least`.
  """
  expected = f'a whole number of {least} or more'
  try:
    number = operator.index(value)
  except TypeError:
    number = None
  if number is None or isinstance(value, bool):
    raise refused(name, expected, value, write)
  if number < least:
    raise refused(name, expected, value, write, ValueError)
  return number


def number(
  name: str,
  value: Any,
  least: float = -math.inf,
  above: float = -math.inf,
  most: float = math.inf,
) -> Any:
  """Returns an argument that has to be a finite number, or a traced one.

  Args:
    name: of the argument.
    value: the argument.
    least: it has to be this or more.
    above: it has to be more than this.
    most: it has to be this or less.

  Raises:
    TypeError: it is no number.
    ValueError: it is not finite, or out of range.
  """
  if isinstance(value, Tracer):
    return value
  bound = f' of {least:g} or more' if least > -math.inf else ''
  bound = f' above {above:g}' if above > -math.inf else bound
  bound += f', at most {most:g}' if most < math.inf else ''
  if isinstance(value, bool | str | bytes) or np.ndim(value):
    raise refused(name, f'a number{bound}', value)
  try:
    read = float(value)
  except (TypeError, ValueError):
    raise refused(name, f'a number{bound}', value) from None
  if not (math.isfinite(read) and least <= read <= most and read > above):
    raise refused(name, f'a finite number{bound}', value, kind=ValueError)
  return value


def path(name: str, value: Any) -> Any:
  """Returns an argument that has to be the path of a file or a folder.

  Raises:
    TypeError: it is no path.
  """
  return kind_of(name, value, str | os.PathLike, 'a path, a text or a pathlib.Path')


def coupling(value: Any) -> Any:
  """Returns an argument that has to be a Coupling.

  Raises:
    TypeError: it is something else, such as the model itself.
  """
  if not all(hasattr(value, name) for name in ('groups', 'axes', 'view')):
    raise refused(
      'coupling',
      'what couple returned',
      value,
      'write coupling = couple(model, variables, example)',
    )
  return value


def key(value: Any) -> Any:
  """Returns an argument that has to be a random key, or a traced one.

  Raises:
    TypeError: it is none, such as the number of a seed.
  """
  old = np.shape(value) == (2,) and getattr(value, 'dtype', None) == np.uint32
  new = hasattr(value, 'dtype') and jnp.issubdtype(value.dtype, jax.dtypes.prng_key)
  if not (old or new):
    raise refused('key', 'a random key', value, 'write jax.random.key(0)')
  return value


def optimizer(value: Any) -> Any:
  """Returns an argument that has to be an optax optimizer.

  Raises:
    TypeError: it is none, such as its name or the function that makes one.
  """
  if not (hasattr(value, 'init') and hasattr(value, 'update')):
    raise refused('tx', 'an optimizer such as optax.sgd(0.1)', value)
  return value


def parts(
  name: str,
  value: Any,
  expected: str = KEEP,
  write: str = DECIDES,
  known: Iterable = (),
) -> Mapping[str, Mapping]:
  """Returns an argument that has to be a decision, or gates, by part and name.

  Args:
    name: of the argument.
    value: the argument.
    expected: what it looks like.
    write: what makes one.
    known: names of the parts besides 'channels' and 'branches'.

  Raises:
    TypeError: it, or a part of it, is no mapping.
    KeyError: it has a part of another name.
  """
  kind_of(name, value, Mapping, expected, write)
  known = 'channels', 'branches', *known
  for part, entries in value.items():
    if part not in known:
      what = f'{name} has the entry {part!r}: expected {", ".join(known)}'
      raise wrong('', what, f'it looks like {expected}: {write}', KeyError)
    kind_of(f'{name}[{part!r}]', entries, Mapping, expected, write)
  return value


def alive(name: str, tree: Any, why: str) -> Any:
  """Returns a tree of arrays of which none is deleted.

  Args:
    name: of the argument.
    tree: the argument.
    why: what usually deletes it, and what to write, as a sentence.

  Raises:
    ValueError: an array is deleted, as by a training step that was given it.
  """
  for keys, leaf in jax.tree_util.tree_leaves_with_path(tree):
    is_array = isinstance(leaf, jax.Array) and not isinstance(leaf, Tracer)
    if is_array and leaf.is_deleted():
      where = jax.tree_util.keystr(keys, simple=True, separator='/') or name
      raise wrong(name, f'the array {where} was deleted: {why}')
  return tree


def _kind(x: Any) -> str:
  return type(x).__name__


def _called() -> str:
  """Returns the name of the function of ours that a user called, '' if there is none.

  It is found on the stack, since the same checks serve all of them.
  """
  name = ''
  for frame, _ in traceback.walk_stack(inspect.currentframe()):
    module = frame.f_globals.get('__name__', '')
    library = module.split('.')[0]
    if library == 'depthprune' and not module.startswith(PROGRAMS):
      scope = frame.f_code.co_qualname.split('.<locals>')[0]
      scope = scope.removesuffix('.__call__')
      if not any(word.startswith(('_', '<')) for word in scope.split('.')):
        name = scope
    elif library not in BETWEEN:
      break
  return name
