"""Which slices of an axis survive, given a decision on its variables."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from depthprune.program.axes import NOTHING, Axis, Cat, LayoutError, Var, norm, show

Keep = Mapping[Var, np.ndarray]  # bool [var.size]


def mask(a: Axis, keep: Keep) -> np.ndarray:
  """Which slices of `a` survive a decision on its variables. bool [a.size]"""
  a = norm(a)
  if isinstance(a, Var):
    return np.asarray(keep[a]) if a in keep else np.ones(a.size, bool)
  parts = [mask(p, keep) for p in a.parts]
  if isinstance(a, Cat):
    return np.concatenate([np.ones(0, bool), *parts])
  out = np.ones(1, bool)
  for p in parts:
    out = np.outer(out, p).ravel()
  return out


def count(a: Axis, keep: Keep, symbols: Mapping[Var, Any] = NOTHING) -> Any:
  """How many slices of `a` survive: a number, or an expression of symbols.

  symbols: the sizes of axes that are not numbers."""
  a = norm(a)
  if isinstance(a, Var):
    return symbols[a] if a in symbols else int(mask(a, keep).sum())
  parts = [count(p, keep, symbols) for p in a.parts]
  return sum(parts) if isinstance(a, Cat) else math.prod(parts)


def assign(a: Axis, kept: np.ndarray, keep: dict[Var, np.ndarray]):
  """Adds to `keep` the decision on the variables of `a` that gives mask(a) == kept.

  Raises: LayoutError when no decision does."""
  a = norm(a)
  if isinstance(a, Var):
    if a in keep and not np.array_equal(keep[a], kept):
      raise LayoutError('two different decisions for one coupled axis')
    keep[a] = kept
  elif isinstance(a, Cat):
    at = 0
    for p in a.parts:
      assign(p, kept[at : at + p.size], keep)
      at += p.size
  else:
    grid = kept.reshape([p.size for p in a.parts])
    for i, p in enumerate(a.parts):
      others = tuple(j for j in range(grid.ndim) if j != i)
      assign(p, np.asarray(grid.any(axis=others)), keep)
    if not np.array_equal(mask(a, keep), kept):
      raise LayoutError(f'the slices kept of {show(a)} are not a product')


def index_of(a: Axis, v: Var) -> np.ndarray:
  """For each slice of `a`, the slice of `v` that it belongs to, or -1. int [a.size]"""
  a = norm(a)
  if isinstance(a, Var):
    return np.arange(a.size) if a is v else np.full(a.size, -1)
  parts = [index_of(p, v) for p in a.parts]
  if isinstance(a, Cat):
    return np.concatenate([np.full(0, -1), *parts])
  out = np.full(1, -1)
  for p in parts:
    out = np.maximum(out[:, None], p[None, :]).ravel()
  return out
