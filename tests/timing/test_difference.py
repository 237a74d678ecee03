"""When one time is longer than another, and when that may be chance."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from depthprune.timing.difference import beyond_chance, compare

TIMES = st.floats(1e-3, 1e3)


@given(TIMES, TIMES)
def test_the_word_and_the_factor_agree_with_the_numbers(before, after):
  found = compare(before, after)
  if found.kind == 'speed-up':
    assert after < before and found.factor == before / after
  elif found.kind == 'slowdown':
    assert after > before and found.factor == after / before
  else:
    assert found.kind == 'no difference'
    assert 0.99 < before / after < 1.01


@given(TIMES, TIMES, st.floats(0, 1), st.floats(0, 1))
def test_quartiles_that_overlap_are_no_difference(before, after, one, other):
  ranges = [(t * (1 - p), t * (1 + p)) for t, p in ((before, one), (after, other))]
  (low, high), (lower, higher) = ranges
  found = compare(before, after, *ranges)
  if low <= higher and lower <= high:
    assert found.kind == 'no difference'
  else:
    assert found[:2] == compare(before, after)[:2]
    least, most = found.between or (0, math.inf)  # a quartile of 0 bounds nothing
    assert least <= found.factor * 1.001 and found.factor <= most * 1.001


def test_the_factor_has_an_interval_where_quartiles_are_known():
  assert compare(4.0, 2.0).between is None
  assert compare(4.0, 2.0, (3, 5), (1.5, 2.5)).between == (3 / 2.5, 5 / 1.5)
  assert compare(2.0, 4.0, (1.5, 2.5), (3, 5)).between == (3 / 2.5, 5 / 1.5)


@pytest.mark.parametrize(
  ('faster', 'turns', 'kind'),
  [(20, 20, 'speed-up'), (11, 20, 'no difference'), (0, 20, 'no difference')],
)
def test_turns_decide_where_they_were_counted(faster, turns, kind):
  """Also against quartiles, which a machine that is slow for a while moves apart.

  Medians that say the opposite of the turns say nothing.
  """
  wide = (1.0, 3.0), (0.5, 2.5)
  assert compare(2.0, 1.5, *wide, faster=faster, turns=turns).kind == kind
  assert compare(2.0, 1.5, (2, 2), (1.5, 1.5), faster, turns).kind == kind


def test_a_coin_is_faster_in_half_of_the_turns():
  assert [beyond_chance(n, 100) for n in (39, 40, 50, 60, 61)] == [1, 0, 0, 0, 1]


@pytest.mark.parametrize('wrong', [0.0, -1.0, math.nan, math.inf])
def test_what_is_no_time_is_not_compared(wrong):
  assert compare(wrong, 1.0).kind == compare(1.0, wrong).kind == 'not measured'
