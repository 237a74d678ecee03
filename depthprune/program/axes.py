"""Axis expressions: which slices of which arrays live and die together.

Every axis of every array of a program gets an *axis expression*, every primitive
states equations between them (rules.py), and unification solves the equations. This
is Hindley-Milner type inference with axes for types:

  Axis := Var(n)       an independent axis of n slices
        | Prod(Axis…)  a row-major product, as `reshape` builds it
        | Cat(Axis…)   a concatenation, as `concatenate` builds it

What is still a Var when all equations are solved is one coupled group: its i-th slice
is present in every array that mentions the Var, or in none.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from depthprune.program import jaxpr as jx
from depthprune.program.jaxpr import NOTHING

UNIT = 'one slice only'


class Var:
  """An axis variable; solving changes `bound`, the reasons only grow.

  Attributes:
    size: number of slices.
    bound: the expression that this variable was found to equal, or None.
    pins: reasons why every slice must stay.
    notes: reasons why dropping slices is not the same as silencing them.
    why: the equation (of the program) that bound the variable, for `explain`.
  """

  def __init__(self, size: int, pin: str | None = None):
    self.size = int(size)
    self.bound: Axis | None = None
    self.pins = {pin} if pin else set()
    self.notes: set[str] = set()
    self.why: Any = None
    if self.size == 1:
      self.pins.add(UNIT)


class Prod:
  """Row-major product of axes: the first part varies slowest."""

  def __init__(self, *parts: Axis):
    self.parts = parts
    self.size = math.prod(p.size for p in parts)


class Cat:
  """Concatenation of axes."""

  def __init__(self, *parts: Axis):
    self.parts = parts
    self.size = sum(p.size for p in parts)


Axis = Var | Prod | Cat
Dims = Sequence[Axis]  # the axes of one array


class LayoutError(Exception):
  """Two axes are laid out in ways that no expression describes."""


def show(a: Axis) -> str:
  """A short text of an expression: sizes joined by * and +."""
  a = norm(a)
  if isinstance(a, Var):
    return str(a.size)
  sign = '*' if isinstance(a, Prod) else '+'
  return '(' + sign.join(show(p) for p in a.parts) + ')'


def norm(a: Axis) -> Axis:
  """Solved form: bound variables substituted, nests flattened, units dropped."""
  if isinstance(a, Var):
    if a.bound is None:
      return a
    a.bound = norm(a.bound)
    return a.bound
  parts = [norm(p) for p in a.parts]
  if isinstance(a, Cat):
    nested = [p.parts if isinstance(p, Cat) else (p,) for p in parts]
    flat = [q for group in nested for q in group if q.size]
    return flat[0] if len(flat) == 1 else Cat(*flat)
  nested = [p.parts if isinstance(p, Prod) else (p,) for p in parts]
  flat = [q for group in nested for q in group if q.size != 1]
  if len(flat) < 2:
    return flat[0] if flat else parts[0] if parts else Var(1)
  if isinstance(flat[0], Cat):  # (a+b)*c = a*c + b*c row-major; c*(a+b) is not.
    return norm(Cat(*(Prod(p, *flat[1:]) for p in flat[0].parts)))
  return Prod(*flat)


def leaves(a: Axis) -> Iterator[Var]:
  """The free variables of an expression, in order, with repetition."""
  a = norm(a)
  if isinstance(a, Var):
    yield a
  else:
    for p in a.parts:
      yield from leaves(p)


def pin(a: Axis, why: str):
  """Forbids dropping any slice of `a`."""
  for v in leaves(a):
    v.pins.add(why)


def note(a: Axis, why: str):
  """Records that silencing slices of `a` is not the same as dropping them."""
  for v in leaves(a):
    v.notes.add(why)


def bind(v: Var, a: Axis, why: Any):
  if any(w is v for w in leaves(a)):
    return pin(a, 'the axis is coupled to a part of itself')
  v.bound, v.why = a, why
  for w in leaves(a):
    w.pins |= v.pins - {UNIT}
    w.notes |= v.notes


def split(a: Axis, k: int, why: Any = None) -> tuple[Axis, Axis]:
  """Solves a = left + right with k slices on the left.

  A cut inside the inner part of a product takes that round of it apart from the
  others: h*i = q*i + i + (h-q-1)*i."""
  a = norm(a)
  if k in (0, a.size):
    return (Cat(), a) if k == 0 else (a, Cat())
  if isinstance(a, Var):
    left, right = Var(k), Var(a.size - k)
    bind(a, Cat(left, right), why)
    return left, right
  if isinstance(a, Cat):
    before, after = [], list(a.parts)
    while after and after[0].size <= k:
      k -= after[0].size
      before.append(after.pop(0))
    if k:
      left, right = split(after.pop(0), k, why)
      before, after = [*before, left], [right, *after]
    return Cat(*before), Cat(*after)
  head, *rest = a.parts
  q, k = divmod(k, a.size // head.size)
  left, right = split(head, q, why)
  if not k:
    return Prod(left, *rest), Prod(right, *rest)
  _, right = split(right, 1, why)
  before, after = split(Prod(*rest), k, why)
  return Cat(Prod(left, *rest), before), Cat(after, Prod(right, *rest))


def factor(a: Axis, n: int, why: Any = None) -> tuple[Axis, Axis]:
  """Solves a = outer * inner with outer.size == n.

  Raises: LayoutError when `a` is not a variable or n does not divide it."""
  a = norm(a)
  if not isinstance(a, Var) or a.size % n:
    raise LayoutError(f'{show(a)} as a product with {n} outside')
  outer, inner = Var(n), Var(a.size // n)
  bind(a, Prod(outer, inner), why)
  return outer, inner


def unify(a: Axis, b: Axis, why: Any = None):
  """States a = b. What cannot be solved is pinned on both sides, never guessed."""
  a, b = norm(a), norm(b)
  if a.size != b.size:
    raise ValueError(f'axes of different size cannot be equal: {show(a)}, {show(b)}')
  if a is b or a.size == 1:
    return
  if isinstance(a, Var):
    return bind(a, b, why)
  if isinstance(b, Var):
    return bind(b, a, why)
  try:
    joint = isinstance(a, Cat) or isinstance(b, Cat)
    (_unify_cat if joint else _unify_prod)(a, b, why)
  except LayoutError as error:
    pin(a, f'incompatible layouts: {error}')
    pin(b, f'incompatible layouts: {error}')


def _unify_cat(a: Axis, b: Axis, why: Any):
  """Cuts both sides at the other's boundaries, then unifies piece by piece."""
  while a.size:
    a, b = norm(a), norm(b)
    n = min((c.parts[0] if isinstance(c, Cat) else c).size for c in (a, b))
    (x, a), (y, b) = split(a, n, why), split(b, n, why)
    unify(x, y, why)


def _unify_prod(a: Axis, b: Axis, why: Any):
  """Refines both sides to their common factors, then unifies factor by factor."""
  while True:
    a, b = norm(a), norm(b)
    if not (isinstance(a, Prod) and isinstance(b, Prod)):
      return unify(a, b, why)
    (x, *xs), (y, *ys) = a.parts, b.parts
    n = math.gcd(x.size, y.size)
    if n == 1:
      raise LayoutError(f'{show(a)} with {show(b)}')
    if x.size == n == y.size:
      unify(x, y, why)
      a, b = Prod(*xs), Prod(*ys)
    elif x.size > n:
      a = Prod(*factor(x, n, why), *xs)
    else:
      b = Prod(*factor(y, n, why), *ys)


def copy(a: Axis, memo: dict[Var, Var]) -> Axis:
  """The solved form of `a` over fresh variables; memo maps old to new."""
  a = norm(a)
  if isinstance(a, Var):
    if a not in memo:
      memo[a] = Var(a.size)
      memo[a].pins |= a.pins
      memo[a].notes |= a.notes
    return memo[a]
  return type(a)(*(copy(p, memo) for p in a.parts))


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


@dataclasses.dataclass
class Facts:
  """What has been inferred: the axes of every value, filled in by `infer`.

  Attributes:
    dims: the axes of every value, those inside bodies included.
    hidden: axes that lie on no array: a convolution's feature groups, a scan's loop.
    unknown: names of primitives without a rule that were met."""

  dims: dict[jx.Value, Dims] = dataclasses.field(default_factory=dict)
  hidden: dict[jx.Equation, Axis] = dataclasses.field(default_factory=dict)
  unknown: set[str] = dataclasses.field(default_factory=set)


def fresh(shape: Sequence[int], why: str | None = None) -> list[Axis]:
  return [Var(n, why) for n in shape]


def equal(a: Dims, b: Dims, e: jx.Equation):
  for x, y in zip(a, b, strict=True):
    unify(x, y, e)


def opaque(facts, e, *ins):
  """The sound default: an unknown primitive forbids slicing everything it touches."""
  why = f'no rule for the primitive {e.name}'
  if any(d.size > 1 for x in ins for d in x):
    facts.unknown.add(e.name)
  for x in ins:
    for d in x:
      pin(d, why)
  return [fresh(v.shape, why) for v in e.outputs]


def any_shape(facts, e, *_):
  return [fresh(v.shape) for v in e.outputs]
