"""Which slices survive: masks, decisions and indices against the meaning of an axis."""

import jax.export
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from depthprune.program.axes import (
  Cat,
  LayoutError,
  Prod,
  Var,
  assign,
  count,
  index_of,
  leaves,
  mask,
  unify,
)
from tests.program.test_axes import expressions, meaning


@st.composite
def decided(draw, empty=True):
  """An expression, and a decision on some of its variables."""
  a = draw(expressions)
  keep = {}
  for v in dict.fromkeys(leaves(a)):
    kept = draw(st.lists(st.booleans(), min_size=v.size, max_size=v.size))
    if draw(st.booleans()) and v.size > 1 and (empty or any(kept)):
      keep[v] = np.array(kept)
  return a, keep


@given(decided())
def test_a_slice_survives_where_all_its_variables_do(both):
  a, keep = both
  by_id = {id(v): kept for v, kept in keep.items()}
  expected = [
    all(by_id[v][i] for v, i in slice_ if v in by_id) for slice_ in meaning(a)
  ]
  assert mask(a, keep).tolist() == expected


@given(decided())
def test_as_many_survive_as_are_counted(both):
  a, keep = both
  assert count(a, keep) == mask(a, keep).sum()


def test_an_axis_of_any_size_is_counted_by_its_symbol():
  (b,) = jax.export.symbolic_shape('b')
  batch, rows = Var(3), Var(4)
  keep = {rows: np.array([True, False, True, True])}
  assert count(Prod(batch, rows), keep, {batch: b}) == 3 * b
  assert count(Cat(Prod(batch, rows), rows, batch), keep, {batch: b}) == 4 * b + 3


@given(decided(empty=False))
def test_assign_finds_the_decision_behind_a_mask(both):
  a, keep = both
  found = {}
  assign(a, mask(a, keep), found)
  assert mask(a, found).tolist() == mask(a, keep).tolist()
  assert all(found[v].tolist() == kept.tolist() for v, kept in keep.items())


def test_assign_refuses_what_no_decision_gives():
  grid = np.array([True, False, False, True])
  with pytest.raises(LayoutError, match=r'kept of \(2\*2\) are not a product'):
    assign(Prod(Var(2), Var(2)), grid, {})
  v = Var(2)
  with pytest.raises(LayoutError, match='two different decisions'):
    assign(Cat(v, v), grid, {})


@given(expressions)
def test_index_of_is_the_place_in_the_variable(a):
  for v in leaves(a):
    if v.size > 1:
      places = [next((i for w, i in slice_ if w == id(v)), -1) for slice_ in meaning(a)]
      assert index_of(a, v).tolist() == places


def test_bound_variables_are_seen_through():
  v, a, b = Var(6), Var(2), Var(3)
  unify(v, Prod(a, b))
  assert index_of(v, b).tolist() == [0, 1, 2, 0, 1, 2]
  kept = mask(v, {a: np.array([False, True])})
  assert kept.tolist() == [False] * 3 + [True] * 3
