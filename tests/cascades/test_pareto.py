"""The search for thresholds against all thresholds there are."""

import itertools
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from depthprune.cascades import pareto, predictions
from tests.cascades.answers import answers, drawn

SETTINGS = settings(deadline=None, derandomize=True, database=None)
NAN, INF = np.nan, np.inf


def every(scores):
  """All thresholds that differ in what they do. [..., K - 1]"""
  levels = [np.r_[-INF, row[~np.isnan(row)], INF] for row in scores]
  return [np.array(t, np.float32) for t in itertools.product(*levels)]


def allowed(s, thresholds):
  """Whether at least `least` leave at every exit that anybody leaves at."""
  left = predictions.leave(s.scores, thresholds)
  count = np.bincount(left, minlength=len(s.cost))[:-1]
  return all(c == 0 or c >= s.least for c in count)


def never(s):
  return np.full(len(s.scores), INF, np.float32)


@st.composite
def tables(draw, exits, most=8):
  """Predictions with ties and nan among the scores, and exits that may be worse."""
  n = draw(st.integers(1, most))
  row = lambda values: st.lists(values, min_size=n, max_size=n)
  right = draw(st.lists(row(st.booleans()), min_size=exits, max_size=exits))
  level = st.sampled_from([0.1, 0.3, 0.5, 0.7, 0.9, NAN, INF, -INF])
  scores = draw(st.lists(row(level), min_size=exits - 1, max_size=exits - 1))
  steps = draw(
    st.lists(st.sampled_from([0.25, 1.0, 2.0]), min_size=exits, max_size=exits)
  )
  return predictions.validate(answers(right, scores, np.cumsum(steps)))


PRICES = st.sampled_from([0.0, 0.1, 0.3, 1.0, 3.0, 100.0])


@SETTINGS
@given(tables(exits=2), PRICES, st.integers(1, 3))
def test_one_exit_is_solved_exactly(p, price, least):
  s = pareto.search(p, least=least)
  found = pareto.solve(s, price, never(s))
  lowest = min(pareto.value(s, price, t) for t in every(s.scores) if allowed(s, t))
  assert allowed(s, found)
  assert pareto.value(s, price, found) == pytest.approx(lowest)


@SETTINGS
@given(tables(exits=3, most=5), PRICES)
def test_of_two_exits_neither_alone_can_be_bettered(p, price):
  s = pareto.search(p, least=1)
  found = pareto.solve(s, price, never(s))
  reached = pareto.value(s, price, found)
  for other in every(s.scores):
    if (other == found).sum() == 1:
      assert reached <= pareto.value(s, price, other) + 1e-6


def test_two_exits_are_nearly_always_solved_exactly():
  exact = 0
  for seed in range(60):
    s = pareto.search(predictions.validate(drawn(8, seed=seed)), least=1)
    price = (0.5, 1.0, 2.0, 4.0)[seed % 4]
    lowest = min(pareto.value(s, price, t) for t in every(s.scores))
    exact += pareto.value(s, price, pareto.solve(s, price, never(s))) <= lowest + 1e-9
  assert exact >= 57


@SETTINGS
@given(tables(exits=3), PRICES, st.integers(1, 4))
def test_a_solution_is_no_worse_than_its_start_and_keeps_least(p, price, least):
  s = pareto.search(p, least=least)
  for start in every(s.scores)[::7]:
    start = pareto._used(s, start)
    found = pareto.solve(s, price, start)
    assert allowed(s, found)
    assert pareto.value(s, price, found) <= pareto.value(s, price, start)


def test_a_threshold_by_hand():
  # sure samples are right: leaving saves 1 each, a loss costs 3
  right = [[1, 1, 0, 1, 0], [1, 1, 1, 1, 1]]
  s = pareto.search(
    predictions.validate(answers(right, [[0.9, 0.8, 0.7, 0.6, 0.5]])), least=1
  )
  assert pareto.solve(s, 3.0, never(s)).tolist() == [
    np.float32(0.7)
  ]  # highest that stays
  assert pareto.solve(s, 0.5, never(s)).tolist() == [-INF]
  assert pareto.solve(s, 1.5, never(s)).tolist() == [np.float32(0.5)]
  assert pareto.value(s, 3.0, np.array([0.7])) == 1 + 1 + 2 + 2 + 2
  assert pareto.value(s, 3.0, np.array([0.6])) == 1 + 1 + (1 + 3) + 2 + 2


def test_an_exit_that_is_always_wrong_is_never_used():
  s = pareto.search(
    predictions.validate(answers([[0, 0], [1, 1]], [[0.9, 0.8]])), least=1
  )
  assert pareto.solve(s, 3.0, never(s)).tolist() == [INF]


def test_a_threshold_does_not_stand_between_equal_scores():
  # leaving one of the two at .9 would be best, but they leave together or not at all
  right = [[1, 0, 1], [1, 1, 1]]
  s = pareto.search(predictions.validate(answers(right, [[0.9, 0.9, 0.1]])), least=1)
  assert pareto.solve(s, 10.0, never(s)).tolist() == [INF]
  assert pareto.solve(s, 1.5, never(s)).tolist() == [-INF]


def test_an_exit_that_few_leave_at_is_closed_and_they_count_at_the_next():
  scores = [[0.9, 0.1, 0.1, 0.1], [0.9, 0.8, 0.7, 0.1]]
  s = pareto.search(predictions.validate(answers(np.ones((3, 4)), scores)), least=3)
  # one leaves at the first: too few; with it the second has its three
  assert pareto._used(s, np.float32([0.5, 0.5])).tolist() == [INF, 0.5]
  assert pareto._used(s, np.float32([0.0, 0.0])).tolist() == [0, INF]


@SETTINGS
@given(tables(exits=2, most=12))
def test_the_dearer_a_loss_the_fewer_there_are(p):
  s = pareto.search(p, least=1)
  rows = np.arange(p.scores.shape[1])
  points = []
  for price in (0.1, 0.3, 0.9, 2.7, 8.1):
    left = predictions.leave(s.scores, pareto.solve(s, price, never(s)))
    points.append((s.cost[left].sum(), s.loss[left, rows].sum()))
  costs, lost = zip(*points)
  assert np.all(np.diff(costs) >= -1e-9)
  assert np.all(np.diff(lost) <= 0)


@SETTINGS
@given(tables(exits=3, most=12), st.integers(1, 4))
def test_a_front_goes_from_never_exit_to_the_cheapest(p, least):
  found = pareto.front(p, least=least, points=10)
  assert np.isposinf(found[0].thresholds).all()
  assert found[0].measured.cost == p.cost[-1]
  costs = [q.measured.cost for q in found]
  risks = [q.risk for q in found]
  assert np.all(np.diff(costs) < 0)
  assert np.all(np.diff(risks[1:]) > 0)
  s = pareto.search(p, least=least)
  for q in found:
    left = predictions.leave(p.scores, q.thresholds)
    assert allowed(s, q.thresholds)
    assert q.measured == predictions.measure(p, left)
    assert q.risk == pytest.approx(1 - q.measured.accuracy)


@SETTINGS
@given(tables(exits=2, most=12))
def test_the_front_of_one_exit_has_all_that_a_price_can_find(p):
  s = pareto.search(p, least=1)
  found = pareto.front(p, least=1)
  for price in (0.0, 0.2, 0.7, 1.0, 1.3, 4.0, 50.0):
    lowest = min(pareto.value(s, price, t) for t in every(s.scores))
    best = min(pareto.value(s, price, q.thresholds) for q in found)
    assert best == pytest.approx(lowest)


def test_the_cheapest_lets_everybody_leave_at_the_first_exit():
  last = pareto.front(drawn(100))[-1]
  assert last.measured.exits == (1, 0, 0)
  assert last.thresholds.tolist() == [-INF, INF]


def test_no_least_is_a_least_of_one():
  one, none = (pareto.front(drawn(60), least=least) for least in (1, 0))
  assert [q.measured for q in one] == [q.measured for q in none]
  assert len(one) > 5


def test_too_few_samples_for_any_exit_leave_never_exit_alone():
  (only,) = pareto.front(drawn(19), least=20)
  assert only.thresholds.tolist() == [INF, INF]


@pytest.mark.parametrize('loss', predictions.LOSSES)
def test_a_front_falls_in_the_loss_that_was_asked_for(loss):
  p = predictions.validate(drawn(300))
  lost = predictions.losses(p, loss)
  for q in pareto.front(p, loss):
    left = predictions.leave(p.scores, q.thresholds)
    assert q.risk == lost[left, np.arange(300)].mean()


def test_a_gap_and_a_disagreement_are_none_where_nobody_leaves():
  assert pareto.front(drawn(300), 'gap')[0].risk == 0
  unlabelled = drawn(300)._replace(labels=None)
  found = pareto.front(unlabelled, 'disagreement')
  assert found[0].risk == 0
  assert len(found) > 5


def test_points_are_spent_where_the_answer_changes():
  p = drawn(2000)
  within = lambda q: q.measured.cost <= 2.3
  closest = lambda found: max(q.measured.cost for q in found if within(q))
  coarse, fine = pareto.front(p, points=4), pareto.front(p, points=4, within=within)
  assert closest(coarse) < closest(fine) <= 2.3
  assert len(coarse) < len(fine) <= len(coarse) + 4


def test_neither_prices_nor_thresholds_depend_on_the_unit_of_cost():
  p = drawn(500)
  small, large = (
    pareto.front(p._replace(cost=p.cost * u, whole=3 * u)) for u in (1, 1e9)
  )
  assert [q.thresholds.tolist() for q in small] == [
    q.thresholds.tolist() for q in large
  ]


def test_five_thousand_samples_and_six_exits_take_a_moment():
  p, start = drawn(5000, exits=6), time.perf_counter()
  assert len(pareto.front(p)) > 20
  assert time.perf_counter() - start < 3
