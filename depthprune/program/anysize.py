"""Inputs of any size: what `jax.export` traces with a symbol in place of a number.

Axes are solved for numbers. A function that is the same program at every size is solved
at one number in place of the symbol, and its equations are rebound at the symbol.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from depthprune.program import axes as ax
from depthprune.program import jaxpr as jx
from depthprune.program.view import View

NUMBER = 3  # stands for a symbol; no equation takes it for a single slice


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
      axis = ax.norm(d)
      if isinstance(n, int):
        continue
      if not isinstance(axis, ax.Var) or found.setdefault(axis, n) != n:
        raise ValueError(f'size {n}: the function divides this axis; choose a number')
  return found


def check_same(call: Callable, args: Any, arrays: Sequence) -> None:
  """Raises ValueError where call(args, arrays) is another program at another size.

  That is seen from two numbers in place of symbols; and what decides by a symbol how to
  go on cannot be traced with it, which jax says."""
  traced = lambda arrays: jx.trace(call, (args, arrays)).program
  traced([jax.ShapeDtypeStruct(x.shape, x.dtype) for x in arrays])
  one, other = (traced([numbered(x, n) for x in arrays]) for n in (NUMBER, NUMBER + 2))
  if not _alike(one, other):
    raise ValueError('its equations depend on the size of an input; choose a number')


def _alike(one: jx.Program, other: jx.Program) -> bool:
  """Whether two programs do the same with the same numbers, at whatever sizes."""
  both = [[*jx.walk(program)] for program in (one, other)]
  names = [[e.name for e in equations] for equations in both]
  return names[0] == names[1] and all(
    np.array_equal(x, y)
    for x, y in zip(*(_numbers(*pair) for pair in zip((one, other), both)), strict=True)
  )


def _numbers(program: jx.Program, equations: list[jx.Equation]) -> list[Any]:
  """All numbers that are written into a program, sizes of arrays left out."""
  literals = (v.val for e in equations for v in e.inputs if isinstance(v, jx.Literal))
  written = (
    e.params.get(p) for e in equations for p in ('padding_config', 'start_indices')
  )
  return [
    *program.constants.values(),
    *literals,
    *(w for w in written if w is not None),
  ]


def _is_fixed(x: Any) -> bool:
  return all(isinstance(n, int) for n in getattr(x, 'shape', ()))
