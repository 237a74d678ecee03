"""Inputs of any size: what `jax.export` traces with a symbol in place of a number.

Axes are solved for numbers. A function that is the same program at every size is solved
at one number in place of the symbol, and its equations are rebound at the symbol.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from depthprune.program import axes as ax
from depthprune.program import jaxpr as jx
from depthprune.program.view import View

Resized = Callable[[jx.Equation, int], Mapping[str, Any]]
NUMBER = 3  # stands for a symbol; no equation takes it for a single slice
OTHERS = NUMBER + 1, NUMBER + 2


def numbered(x: Any, number: int = NUMBER) -> Any:
  """An array, its shape with a number for every symbol; others as they are."""
  if _is_fixed(x):
    return x
  shape = tuple(n if isinstance(n, int) else number for n in x.shape)
  return jax.ShapeDtypeStruct(shape, x.dtype)


def symbols(view: View, arrays: Sequence) -> dict[ax.Var, Any]:
  """The symbol of every axis variable that has one; view: of the numbered arrays.

  Raises: ValueError where the function divides such an axis."""
  found: dict[ax.Var, Any] = {}
  data = view.program.inputs[len(view.leaves) :]
  for v, x in zip(data, arrays, strict=True):
    for d, n in zip(view.facts.dims[v], x.shape, strict=True):
      if isinstance(n, int):
        continue
      axis = ax.norm(d)
      if not isinstance(axis, ax.Var) or found.setdefault(axis, n) != n:
        raise ValueError(f'size {n}: the function divides this axis; choose a number')
  return found


def followers(view: View, others: Sequence[View], resized: Resized) -> set[jx.Literal]:
  """The literals in which a size that has a symbol is written.

  view: of the numbered arrays; others: with OTHERS in their place.
  resized: (equation, number) -> its parameters at that size.

  Raises: ValueError where the function is another program at another size, in more than
    its sizes.
  """
  found: set[jx.Literal] = set()
  equations = [[*jx.walk(each.program)] for each in (view, *others)]
  if len({tuple(e.name for e in each) for each in equations}) > 1:
    raise ValueError('its equations depend on the size of an input; choose a number')
  for e, *same in zip(*equations, strict=True):
    found |= _followers(e, same)
    for number, other in zip(OTHERS, same, strict=True):
      params = resized(e, number)
      plain = {p: x for p, x in other.params.items() if _is_plain(x)}
      if any(x != params.get(p) for p, x in plain.items()):
        raise _depends(e)
  constants = [[*each.program.constants.values()] for each in (view, *others)]
  if len({*map(len, constants)}) > 1 or not all(map(_alike, *constants)):
    raise ValueError('a constant depends on the size of an input; choose a number')
  return found


def _followers(e: jx.Equation, others: Sequence[jx.Equation]) -> set[jx.Literal]:
  """Those among the inputs of one equation."""
  found = set()
  for v, *same in zip(e.inputs, *(other.inputs for other in others), strict=True):
    if not isinstance(v, jx.Literal) or v.val is None:
      continue
    written = [v.val, *(getattr(other, 'val', None) for other in same)]
    if v.shape == () and written == [NUMBER, *OTHERS]:
      found.add(v)
    elif not _alike(*written):
      raise _depends(e)
  return found


def _depends(e: jx.Equation) -> ValueError:
  return ValueError(f'{e.where}: depends on the size of an input; choose a number')


def _alike(first: Any, *others: Any) -> bool:
  same = lambda x: x is first or np.array_equal(x, first)
  return all(map(same, others)) or all(map(np.all, map(np.isnan, (first, *others))))


def _is_plain(x: Any) -> bool:
  """Whether it is made of whole numbers and words, as all that may hold a size."""
  if isinstance(x, tuple):
    return all(map(_is_plain, x))
  return x is None or isinstance(x, int | str | np.integer)


def _is_fixed(x: Any) -> bool:
  return all(isinstance(n, int) for n in getattr(x, 'shape', ()))
