"""The algebra of axes: every operation is checked against what expressions mean.

An expression means a list: for each slice, the variable slices that it belongs to.
"""

import math
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from depthprune.program.axes import (
  UNIT,
  Cat,
  LayoutError,
  Prod,
  Var,
  copy,
  factor,
  leaves,
  norm,
  note,
  pin,
  show,
  split,
  unify,
)


def meaning(a) -> list[frozenset]:
  """The variable slices of every slice of `a`, without help from the library."""
  if isinstance(a, Var):
    if a.bound is not None:
      return meaning(a.bound)
    return [frozenset([(id(a), i)] if a.size > 1 else []) for i in range(a.size)]
  parts = [meaning(p) for p in a.parts]
  if isinstance(a, Cat):
    return [slice_ for part in parts for slice_ in part]
  out = [frozenset()]
  for part in parts:
    out = [x | y for x in out for y in part]
  return out


variables = st.integers(1, 4).map(Var)


def grown(parts):
  lists = st.lists(parts, min_size=1, max_size=3)
  return lists.map(lambda ps: Cat(*ps)) | lists.map(lambda ps: Prod(*ps))


expressions = st.recursive(variables, grown, max_leaves=5)


@given(expressions)
def test_norm_keeps_the_meaning_and_is_idempotent(a):
  solved = norm(a)
  assert solved.size == a.size == len(meaning(a))
  assert meaning(solved) == meaning(a)
  assert show(norm(solved)) == show(solved)
  assert flat(solved)


def flat(a) -> bool:
  """No part is bound, of one slice, or of its parent's kind."""
  if isinstance(a, Var):
    return a.bound is None
  unit = any(p.size == 1 for p in a.parts) if isinstance(a, Prod) else False
  nested = any(type(p) is type(a) for p in a.parts)
  return not unit and not nested and len(a.parts) != 1 and all(map(flat, a.parts))


@given(st.data(), expressions)
def test_split_cuts_anywhere(data, a):
  k = data.draw(st.integers(0, a.size))
  left, right = split(a, k)
  assert (left.size, right.size) == (k, a.size - k)
  assert meaning(left) + meaning(right) == meaning(a)


def test_a_cut_inside_a_product_takes_one_round_of_it_apart():
  a = Prod(Var(4), Var(5))
  left, right = split(a, 7)
  assert show(left) == '(2+3+2)' and show(right) == '(3+(2*(2+3)))'
  assert all(v.pins <= {UNIT} for v in leaves(a))


@given(st.data(), st.permutations(range(3)))
def test_what_was_solved_can_be_solved_again(data, order):
  """As a view of a coupling does: from the solved axes, the product's factors anew."""
  sizes = data.draw(st.tuples(st.integers(2, 3), st.integers(2, 4)))
  n = sizes[0] * sizes[1]
  a = Var(n)
  equations = [
    lambda a: unify(a, Prod(*map(Var, sizes))),
    lambda a: split(a, sizes[1]),
    lambda a: split(a, n // 2),
  ]
  for i in order:
    equations[i](a)
  again = copy(a, {})
  for equation in equations:
    equation(again)
  assert show(again) == show(a)
  assert [v.pins for v in leaves(again)] == [v.pins for v in leaves(a)]


@given(st.integers(1, 24), st.integers(1, 24))
def test_factor_is_row_major(n, outside):
  v = Var(n)
  if n % outside:
    with pytest.raises(LayoutError, match='as a product with'):
      factor(v, outside)
  else:
    outer, inner = factor(v, outside)
    assert outer.size == outside and meaning(Prod(outer, inner)) == meaning(v)


def test_only_variables_are_factored():
  with pytest.raises(LayoutError):
    factor(Cat(Var(2), Var(4)), 2)


def pinned(a) -> bool:
  return all('incompatible' in ' '.join(v.pins) or v.size == 1 for v in leaves(a))


def coupled_to_itself(a) -> bool:
  return any('part of itself' in why for v in leaves(a) for why in v.pins)


@given(st.data(), expressions)
def test_unify_makes_equal_or_pins_both(data, a):
  """What it solves means the same afterwards; what it does not is pinned throughout."""
  b = data.draw(expressions.filter(lambda b: b.size == a.size) | st.just(Var(a.size)))
  unify(a, b)
  if meaning(a) != meaning(b):
    assert coupled_to_itself(a) or coupled_to_itself(b) or (pinned(a) and pinned(b))


@given(st.lists(st.integers(2, 4), min_size=2, max_size=4), st.data())
def test_products_of_equal_factors_unify_without_pins(sizes, data):
  """Groupings of one chain of factors always have a common refinement."""

  def grouping():
    cuts = data.draw(st.sets(st.integers(1, len(sizes) - 1)))
    at = [0, *sorted(cuts), len(sizes)]
    return Prod(*(Var(math.prod(sizes[i:j])) for i, j in pairwise(at)))

  a, b = grouping(), grouping()
  unify(a, b)
  assert meaning(a) == meaning(b) and not any(v.pins for v in leaves(a))


@given(st.lists(st.integers(1, 4), min_size=1, max_size=5), st.data())
def test_concatenations_unify_without_pins(sizes, data):
  total = sum(sizes)
  cuts = sorted(data.draw(st.sets(st.integers(1, total), max_size=4)) - {total})
  at = [0, *cuts, total]
  a = Cat(*map(Var, sizes))
  b = Cat(*(Var(j - i) for i, j in pairwise(at)))
  unify(a, b)
  assert meaning(a) == meaning(b)
  assert all(v.pins <= {UNIT} for v in leaves(a))


def test_axes_of_different_size_are_never_equal():
  with pytest.raises(ValueError, match='different size cannot be equal: 3, 4'):
    unify(Var(3), Var(4))


def test_layouts_that_share_no_factor_are_pinned_on_both_sides():
  a, b = Prod(Var(4), Var(3)), Prod(Var(3), Var(4))
  unify(a, b)
  reasons = {why for v in (*leaves(a), *leaves(b)) for why in v.pins}
  assert reasons == {'incompatible layouts: (4*3) with (3*4)'}


def test_an_axis_is_never_a_part_of_itself():
  v = Var(4)
  unify(v, Cat(*split(v, 2)))  # known already
  assert not any(w.pins for w in leaves(v))
  v, w = Var(4), Var(2)
  unify(Cat(v, w), Cat(w, v))  # a rotation: all thirds are one
  assert len({*leaves(v), *leaves(w)}) == 1 and not any(x.pins for x in leaves(v))


@given(expressions)
def test_pins_and_notes_reach_every_variable_and_survive_binding(a):
  pin(a, 'why')
  note(a, 'reads')
  assert all('why' in v.pins and 'reads' in v.notes for v in leaves(a))
  b = Var(a.size)
  unify(a, b)
  assert all('why' in v.pins and 'reads' in v.notes for v in leaves(b) if v.size > 1)


@given(expressions)
def test_copies_share_nothing_but_the_shape(a):
  memo = {}
  pin(a, 'why')
  b = copy(a, memo)
  assert show(a) == show(b) and not {*leaves(a)} & {*leaves(b)}
  assert {*memo} == {*leaves(a)} and [memo[v] for v in leaves(a)] == [*leaves(b)]
  assert all('why' in v.pins for v in leaves(b))


def test_a_product_distributes_over_its_outer_concatenation():
  a, b, c = Var(2), Var(3), Var(2)
  assert show(Prod(Cat(a, b), c)) == '((2*2)+(3*2))'
  assert show(Prod(c, Cat(a, b))) == '(2*(2+3))'
