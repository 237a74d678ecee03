"""Axis expressions, which say which slices of which arrays must be removed together.

Every axis of every array of a program gets an *axis expression*, every primitive
states equations between them (rules.py), and unification solves the equations. This
is Hindley-Milner type inference with axes in the place of types:

  Axis := Var(n)       an independent axis of n slices
        | Prod(Axis…)  a row-major product, as `reshape` builds it
        | Cat(Axis…)   a concatenation, as `concatenate` builds it

Every Var that is still free when all equations are solved is one coupled group: its
i-th slice is present in every array that mentions the Var, or in none.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from depthprune.program import jaxpr as jx

UNIT = 'one slice only'


class Var:
  """An axis variable.

  Attributes:
    size: number of slices.
    bound: the expression that this variable equals, or None while it is free.
    pins: reasons why every slice must stay.
    notes: reasons why removing slices is not the same as setting them to zero.
    why: the equation of the program that bound the variable, for `Coupling.explain`.
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
  """A row-major product of axes; the first part varies slowest."""

  def __init__(self, *parts: Axis):
    self.parts = parts
    self.size = math.prod(p.size for p in parts)


class Cat:
  """A concatenation of axes."""

  def __init__(self, *parts: Axis):
    self.parts = parts
    self.size = sum(p.size for p in parts)


Axis = Var | Prod | Cat
Dims = Sequence[Axis]  # the axes of one array


class LayoutError(Exception):
  """Two axes are laid out in ways that no common expression describes."""


def show(a: Axis) -> str:
  """Returns an expression as text: sizes joined by * for products and + for sums."""
  a = norm(a)
  if isinstance(a, Var):
    return str(a.size)
  sign = '*' if isinstance(a, Prod) else '+'
  return '(' + sign.join(show(p) for p in a.parts) + ')'


def norm(a: Axis) -> Axis:
  """Returns the solved form of an expression.

  Bound variables are substituted, nested expressions are flattened and axes of size 1
  are left out of products.
  """
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
  if not flat:
    return parts[0] if parts else Var(1)
  if len(flat) == 1:
    return flat[0]
  if isinstance(flat[0], Cat):  # (a+b)*c = a*c + b*c row-major; c*(a+b) is not.
    return norm(Cat(*(Prod(p, *flat[1:]) for p in flat[0].parts)))
  return Prod(*flat)


def leaves(a: Axis) -> Iterator[Var]:
  """Yields the free variables of an expression in order, each as often as it occurs."""
  a = norm(a)
  if isinstance(a, Var):
    yield a
  else:
    for p in a.parts:
      yield from leaves(p)


def pin(a: Axis, why: str):
  """Forbids removing any slice of `a`, for the reason `why`."""
  for v in leaves(a):
    v.pins.add(why)


def note(a: Axis, why: str):
  """Records why removing slices of `a` is not the same as setting them to zero."""
  for v in leaves(a):
    v.notes.add(why)


def bind(v: Var, a: Axis, why: Any):
  """Makes the free variable `v` equal `a`, which inherits its pins and notes."""
  if any(w is v for w in leaves(a)):
    return pin(a, 'the axis is coupled to a part of itself')
  v.bound, v.why = a, why
  for w in leaves(a):
    w.pins |= v.pins - {UNIT}
    w.notes |= v.notes


def split(a: Axis, k: int, why: Any = None) -> tuple[Axis, Axis]:
  """Solves a = left + right with k slices on the left, and returns (left, right).

  A cut that falls inside the inner part of a product separates the turn of the outer
  part in which it falls from the turns before and after it: h*i = q*i + i + (h-q-1)*i.
  """
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
  """Solves a = outer * inner with outer.size == n, and returns (outer, inner).

  Raises:
    LayoutError: `a` is not a free variable, or n does not divide its size.
  """
  a = norm(a)
  if not isinstance(a, Var) or a.size % n:
    raise LayoutError(f'{show(a)} as a product with {n} outside')
  outer, inner = Var(n), Var(a.size // n)
  bind(a, Prod(outer, inner), why)
  return outer, inner


def unify(a: Axis, b: Axis, why: Any = None):
  """States that a = b; axes for which this cannot be solved are pinned on both sides.

  Args:
    a: an axis.
    b: an axis of the same size.
    why: the equation of the program that states it, for `Coupling.explain`.

  Raises:
    ValueError: the sizes differ.
  """
  a, b = norm(a), norm(b)
  if a.size != b.size:
    raise ValueError(f'axes of different size cannot be equal: {show(a)}, {show(b)}')
  if a is b or a.size == 1:
    return
  if isinstance(a, Var):
    return bind(a, b, why)
  if isinstance(b, Var):
    return bind(b, a, why)
  joint = isinstance(a, Cat) or isinstance(b, Cat)
  (_unify_cat if joint else _unify_prod)(a, b, why)


def _unify_cat(a: Axis, b: Axis, why: Any):
  """Cuts both sides at each other's boundaries, then unifies piece by piece."""
  while a.size:
    a, b = norm(a), norm(b)
    n = min((c.parts[0] if isinstance(c, Cat) else c).size for c in (a, b))
    (x, a), (y, b) = split(a, n, why), split(b, n, why)
    unify(x, y, why)


def _unify_prod(a: Axis, b: Axis, why: Any):
  """Refines both sides to their common factors, then unifies factor by factor.

  Inner factors without a common refinement are pinned; those outside of them are not.
  """
  while True:
    a, b = norm(a), norm(b)
    if not (isinstance(a, Prod) and isinstance(b, Prod)):
      return unify(a, b, why)
    (x, *xs), (y, *ys) = a.parts, b.parts
    n = math.gcd(x.size, y.size)
    try:
      if n == 1:
        raise LayoutError(f'{show(a)} with {show(b)}')
      if x.size == n == y.size:
        unify(x, y, why)
        a, b = Prod(*xs), Prod(*ys)
      elif x.size > n:
        a = Prod(*factor(x, n, why), *xs)
      else:
        b = Prod(*factor(y, n, why), *ys)
    except LayoutError as error:
      where = f' in {why.where}' if isinstance(why, jx.Equation) else ''
      _pin_once((a, b), f'incompatible layouts: {error}', where)
      return None


def _pin_once(axes: Sequence[Axis], why: str, where: str):
  """Pins axes for a reason, unless they are for the same one found elsewhere."""
  for v in {v for a in axes for v in leaves(a)}:
    if not any(pinned.startswith(why) for pinned in v.pins):
      v.pins.add(why + where)


def copy(a: Axis, memo: dict[Var, Var]) -> Axis:
  """Returns the solved form of `a` over new variables; `memo` maps old to new ones."""
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
  """Returns which slices of `a` are kept, from a mask per variable. bool [a.size]"""
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


def count(a: Axis, keep: Keep, symbols: Mapping[Var, Any] = jx.NOTHING) -> Any:
  """Returns how many slices of `a` are kept: a number, or an expression of symbols.

  Args:
    a: an axis.
    keep: bool [size] for each variable that is cut.
    symbols: symbolic sizes of the variables that have one.
  """
  a = norm(a)
  if isinstance(a, Var):
    return symbols[a] if a in symbols else int(mask(a, keep).sum())
  parts = [count(p, keep, symbols) for p in a.parts]
  return sum(parts) if isinstance(a, Cat) else math.prod(parts)


def assign(a: Axis, kept: np.ndarray, keep: dict[Var, np.ndarray]):
  """Adds to `keep` the masks of the variables of `a` for which mask(a) equals `kept`.

  Raises:
    LayoutError: no masks of the variables do.
  """
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
  """Returns for each slice of `a` its slice of `v`, or -1 outside `v`. int [a.size]"""
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
  """The axes that `rules.infer` has found for the values of a program.

  Attributes:
    dims: the axes of every value, including those inside loops and branches.
    hidden: axes that lie on no array: the feature groups of a convolution and the
      length of a scan.
    unknown: names of the primitives for which there is no rule.
    counted: integers that number the slices of an axis, with this axis.
    made: by value, the equation that makes it.
    routers: contractions that make the logits of experts (routing.py), with the
      position of the axis of the experts in their output.
    chosen: integers that are indices of chosen slices of an axis, with this axis.
    picks: axes of which slices are chosen, and how many at a time.
    activations: values that depend on data, not on variables and constants alone.
    magnitudes: values that say how large an activation is, with their degree
      (magnitudes.py).
    varying: values that depend on variables or inputs.
    repeated: positions of the axes along which a varying value repeats itself.
    normalised: axes over which magnitudes are reduced.
    written: axes to which something that repeats along them is added, and where.
  """

  dims: dict[jx.Value, Dims] = dataclasses.field(default_factory=dict)
  hidden: dict[jx.Equation, Axis] = dataclasses.field(default_factory=dict)
  unknown: set[str] = dataclasses.field(default_factory=set)
  counted: dict[jx.Value, Axis] = dataclasses.field(default_factory=dict)
  made: dict[jx.Value, jx.Equation] = dataclasses.field(default_factory=dict)
  routers: dict[jx.Equation, int] = dataclasses.field(default_factory=dict)
  chosen: dict[jx.Value, Axis] = dataclasses.field(default_factory=dict)
  picks: list[tuple[Axis, int]] = dataclasses.field(default_factory=list)
  activations: Collection[jx.Value] = frozenset()
  magnitudes: dict[jx.Value, int] = dataclasses.field(default_factory=dict)
  varying: Collection[jx.Value] = frozenset()
  repeated: dict[jx.Value, set[int]] = dataclasses.field(default_factory=dict)
  normalised: list[Axis] = dataclasses.field(default_factory=list)
  written: list[tuple[Axis, str]] = dataclasses.field(default_factory=list)


def fresh(shape: Sequence[int], why: str | None = None) -> list[Axis]:
  """Returns a new variable for each axis of a shape, pinned where a reason is given."""
  return [Var(n, why) for n in shape]


def equal(a: Dims, b: Dims, e: jx.Equation):
  """States that two arrays have the same axes."""
  for x, y in zip(a, b, strict=True):
    unify(x, y, e)


def opaque(facts, e, *ins):
  """Pins every axis that a primitive without a rule touches."""
  why = f'no rule for the primitive {e.name}'
  if any(d.size > 1 for x in ins for d in x):
    facts.unknown.add(e.name)
  for x in ins:
    for d in x:
      pin(d, why)
  return [fresh(v.shape, why) for v in e.outputs]
