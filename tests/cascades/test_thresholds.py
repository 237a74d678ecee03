"""The choosers: each keeps its promise on the data it chose on."""

import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from depthprune.cascades import predictions, risk, thresholds
from tests.cascades.answers import answers, drawn

SETTINGS = settings(deadline=None, derandomize=True, database=None, max_examples=50)
P = predictions.validate(drawn(600))
NAN, INF = np.nan, np.inf


def test_a_fixed_threshold_is_that_of_every_exit():
  chosen = thresholds.fixed(P, 0.8)
  assert chosen.thresholds.tolist() == [np.float32(0.8)] * 2
  assert (chosen.kind, chosen.requested) == ('fixed', 0.8)


def test_a_choice_says_what_it_is_and_reaches_without_its_arrays():
  first, second = repr(choice := thresholds.fixed(P, 0.8)).splitlines()
  assert first.startswith('Choice: ') and first.count('above 0.8') == 2
  assert first.endswith('fixed 0.8') and 'held out: accuracy' in second
  assert 'array' not in repr(choice)


def test_above_one_never_exits_and_costs_the_heads():
  chosen = thresholds.fixed(P, 1.01)
  assert chosen.held_out.exits == (0, 0, 1)
  assert predictions.drop(chosen.held_out, P) == 0
  assert predictions.saved(chosen.held_out, P._replace(whole=2.5)) == pytest.approx(
    -0.2
  )


def test_a_fixed_threshold_of_nan_is_refused():
  with pytest.raises(ValueError, match='tau=nan'):
    thresholds.fixed(P, NAN)


def one_exit(right, network=None):
  """One exit, the sure first; cost 1 and 2."""
  n = len(right)
  return answers([right, network or [1] * n], [np.linspace(0.9, 0.1, n)])


def test_a_budget_by_hand():
  p = one_exit([1, 1, 0, 0])
  within = lambda budget: thresholds.for_budget(p, budget, least=1).held_out
  assert within(2) == within(1.5) == predictions.Measured(1, 1.5, (0.5, 0.5))
  assert within(1.49) == within(1) == predictions.Measured(0.5, 1, (1, 0))


def test_a_drop_by_hand():
  p = one_exit([1] * 6 + [0, 1, 1, 0])
  within = lambda drop: thresholds.for_drop(p, drop, least=1, folds=1).held_out.exits[0]
  assert within(0) == within(9.9) == 0.6
  assert within(10) == within(19) == 0.9  # 10 points of 10 samples: one of them
  assert within(20) == within(100) == 1


def test_a_drop_that_was_measured_can_be_asked_for():
  p = predictions.validate(one_exit([1, 1, 1, 1, 0]))
  measured = predictions.drop(thresholds.fixed(p, 0).held_out, p)
  assert measured < 20  # by the last bit
  chosen = thresholds.for_drop(p, measured, least=1, folds=1)
  assert chosen.held_out.exits[0] == 1


def test_a_budget_prefers_an_early_answer_that_is_better():
  p = one_exit([1] * 40, [0, 1] * 20)
  assert thresholds.for_budget(p, 2.0).held_out == predictions.Measured(1, 1, (1, 0))


@SETTINGS
@given(st.integers(0, 500), st.floats(1, 3.2))
def test_a_budget_is_kept(seed, budget):
  p = predictions.validate(drawn(80, seed=seed))
  chosen = thresholds.for_budget(p, budget, least=5, points=5)
  assert chosen.held_out.cost <= budget
  assert (chosen.kind, chosen.requested) == ('budget', budget)


@SETTINGS
@given(st.integers(0, 500), st.floats(0, 30), st.sampled_from([1, 2]))
def test_a_drop_is_kept(seed, drop, folds):
  p = predictions.validate(drawn(80, seed=seed))
  chosen = thresholds.for_drop(p, drop, least=5, points=5, folds=folds)
  assert predictions.drop(chosen.held_out, p) <= drop + 1e-9
  assert (chosen.kind, chosen.requested) == ('drop', drop)


def test_more_drop_is_cheaper_and_more_budget_is_better():
  costs = [
    thresholds.for_drop(P, drop, folds=1).held_out.cost for drop in (0, 1, 3, 10, 40)
  ]
  assert np.all(np.diff(costs) < 0)
  found = [
    thresholds.for_budget(P, b).held_out.accuracy for b in (1, 1.3, 1.6, 1.9, 2.2)
  ]
  assert np.all(np.diff(found) > 0)


def test_an_exit_is_used_by_at_least_so_many_samples():
  for least in (1, 50, 200):
    shares = thresholds.for_drop(P, 5, least=least).held_out.exits[:2]
    assert all(s == 0 or 600 * s >= least for s in shares)


def test_a_budget_below_the_floor_says_the_floor():
  with pytest.raises(
    ValueError, match=r'below the floor: exit exit0.* costs 1 a sample'
  ):
    thresholds.for_budget(P, 0.9)
  with pytest.raises(ValueError, match='below the floor'):
    thresholds.for_budget(P, NAN)


def test_scores_of_nan_raise_the_floor():
  scores = P.scores.copy()
  scores[:, :60] = NAN  # a tenth never leaves: 0.9 · 1 + 0.1 · 3
  p = P._replace(scores=scores)
  with pytest.raises(ValueError, match=r'no thresholds cost less than 1\.2 a sample'):
    thresholds.for_budget(p, 1.1)
  assert thresholds.for_budget(p, 1.2).held_out.cost == pytest.approx(1.2)


def test_too_few_samples_to_choose_on_leave_never_exit():
  few = drawn(19)
  assert thresholds.for_drop(few, 100).held_out.exits == (0, 0, 1)
  with pytest.raises(ValueError, match='cost less than 3 .* at least 20 must leave'):
    thresholds.for_budget(few, 2)


@pytest.mark.parametrize('drop', [-0.1, NAN])
def test_a_negative_drop_is_refused(drop):
  with pytest.raises(ValueError, match=r'drop=.*percentage points'):
    thresholds.for_drop(P, drop)


@pytest.mark.parametrize(
  'choose', [thresholds.for_budget, thresholds.for_drop, thresholds.for_risk]
)
def test_labels_are_needed_where_accuracy_counts(choose):
  with pytest.raises(ValueError, match='needs labels'):
    choose(
      P._replace(labels=None),
      {thresholds.for_budget: 2, thresholds.for_drop: 1}.get(choose, 0.1),
    )


def test_agreement_needs_no_labels():
  chosen = thresholds.for_risk(P._replace(labels=None), 0.2, risk='disagreement')
  assert np.isnan(chosen.held_out.accuracy)
  assert chosen.held_out.cost < 3
  assert chosen.risk.loss == 'disagreement'
  labelled = thresholds.for_risk(P, 0.2, risk='disagreement')
  assert labelled.thresholds.tolist() == chosen.thresholds.tolist()


def test_a_risk_level_has_its_certificate():
  chosen = thresholds.for_risk(P, 0.05, delta=0.1, seed=3)
  assert (chosen.kind, chosen.requested) == ('risk', 0.05)
  assert chosen.risk[:4] == ('gap', 0.05, 0.1, 300)
  assert chosen.risk.bound <= 0.05
  certified, certificate = risk.certify(P, 0.05, 0.1, seed=3)
  assert chosen.thresholds.tolist() == certified.tolist()
  assert chosen.risk == certificate != thresholds.for_risk(P, 0.05, delta=0.1).risk
  assert chosen.rows.tolist() == predictions.digest(P).tolist()  # both halves


@pytest.mark.parametrize(
  'choose',
  [
    lambda p: thresholds.fixed(p, 0.5),
    lambda p: thresholds.for_budget(p, 2),
    lambda p: thresholds.for_drop(p, 1),
    lambda p: thresholds.for_risk(p, 0.1),
    thresholds.front,
  ],
)
def test_data_that_does_not_fit_is_refused(choose):
  with pytest.raises(ValueError, match='scores: expected'):
    choose(P._replace(scores=P.scores[:1]))


@pytest.mark.parametrize('value', [NAN, INF, -INF, 0.5])
def test_scores_that_are_all_alike_are_all_or_nothing(value):
  p = P._replace(scores=np.full((2, 600), value))
  for chosen in (
    thresholds.for_drop(p, 100),
    thresholds.for_budget(p, 3),
    thresholds.for_risk(p, 0.9),
  ):
    assert max(chosen.held_out.exits) == 1


# ---- one threshold for all exits -----------------------------------------------------


@pytest.mark.parametrize('least', [1, 30])
@pytest.mark.parametrize('drop', [0.0, 0.5, 2.0, 20.0, 100.0])
def test_a_shared_threshold_is_the_cheapest_there_is(drop, least):
  p = predictions.validate(drawn(150, exits=4))
  found = thresholds.for_drop(p, drop, least, shared=True)
  own = predictions.measure(p, np.full(150, 3)).accuracy

  def tried(tau):
    """Closes the exits at which too few leave, the first first."""
    limits = np.full(3, tau, np.float32)
    for k in range(3):
      left = predictions.leave(p.scores, limits)
      if np.count_nonzero(left == k) < least:
        limits[k] = INF
    return predictions.measure(p, predictions.leave(p.scores, limits))

  every = [tried(tau) for tau in (INF, *np.unique(p.scores), -INF)]
  within = [m for m in every if m.accuracy >= own - drop / 100 - 1e-9]
  assert found.held_out == min(within, key=lambda m: m.cost)
  finite = found.thresholds[np.isfinite(found.thresholds)]
  assert len({*finite.tolist()}) <= 1


def test_a_shared_threshold_within_a_budget():
  p = predictions.validate(drawn(400, exits=4))
  found = thresholds.for_budget(p, 2.0, shared=True)
  assert 1.9 < found.held_out.cost <= 2.0
  tau = min(found.thresholds)
  sure = thresholds.fixed(p, tau).held_out
  assert found.held_out == sure
  floor = thresholds.for_budget(p, 1.0, shared=True).held_out
  assert floor.exits == (1, 0, 0, 0)


WAYS = {'one': {'shared': True}, 'each': {'folds': 1}, 'cross-validated': {}}


def on_other_data(samples, exits, drop, seeds):
  """{way: (points lost, cost)} on other data, the mean over some choices."""
  test = predictions.validate(drawn(20_000, exits=exits, seed=99))

  def reached(seed, way):
    p = drawn(samples, exits=exits, seed=seed)
    chosen = thresholds.for_drop(p, drop, points=10, **way)
    found = thresholds.measured(chosen, test)
    return predictions.drop(found, test), found.cost

  means = lambda way: np.mean([reached(seed, way) for seed in range(seeds)], 0).tolist()
  return {name: means(way) for name, way in WAYS.items()}


def test_on_other_data_many_thresholds_lose_more_than_was_asked_for():
  """Nine thresholds are fitted to what 1,000 samples are wrong by chance."""
  found = on_other_data(samples=1000, exits=10, drop=1.0, seeds=3)
  lost = {way: drop for way, (drop, _) in found.items()}
  assert lost['each'] > lost['one'] + 0.5
  assert max(lost['one'], lost['cross-validated']) < 1.5


def test_cross_validation_saves_more_than_one_threshold_where_there_are_samples():
  found = on_other_data(samples=5000, exits=10, drop=1.0, seeds=2)
  assert found['cross-validated'][0] < 1.0 < found['each'][0]
  assert found['cross-validated'][1] < found['one'][1] - 0.5


@pytest.mark.parametrize('samples', [1, 2, 3, 19])
def test_a_few_samples_have_as_many_folds(samples):
  p = drawn(samples)
  assert thresholds.for_drop(p, 100.0).held_out.exits == (0, 0, 1)
  assert predictions.drop(thresholds.for_drop(p, 5.0, least=1).held_out, p) <= 5


@pytest.mark.parametrize('folds', [0, -1])
def test_no_folds_are_refused(folds):
  with pytest.raises(ValueError, match='folds.*1'):
    thresholds.for_drop(P, 1.0, folds=folds)


def test_an_infinite_drop_allows_everything():
  chosen = thresholds.for_drop(P, INF)
  assert chosen.held_out.exits == (1, 0, 0)


def test_the_order_of_samples_does_not_matter():
  p = predictions.validate(drawn(300, exits=4, seed=3))
  order = np.random.default_rng(0).permutation(300)
  again = thresholds.for_drop(predictions.take(p, order), 2.0, points=5)
  np.testing.assert_array_equal(
    thresholds.for_drop(p, 2.0, points=5).thresholds, again.thresholds
  )


def test_a_sample_that_is_there_again_is_not_in_another_fold():
  """Five times the same samples tell no more of others than they do once."""
  p = predictions.validate(drawn(200, exits=8, seed=2))
  again = predictions.take(p, np.tile(np.arange(200), 5))
  once = thresholds.for_drop(p, 1.0, least=4, points=5)
  five = thresholds.for_drop(again, 1.0, least=20, points=5)
  np.testing.assert_array_equal(once.thresholds, five.thresholds)


def test_a_metric_may_be_nan_of_a_fold():
  labels = np.zeros(600, int)
  labels[7] = 1
  found_rare = lambda labels, answers: (answers[labels == 1] == 1).mean()
  p = P._replace(labels=labels)
  with np.errstate(invalid='ignore'), warnings.catch_warnings():
    warnings.simplefilter('ignore', RuntimeWarning)  # the mean of nothing
    chosen = thresholds.for_drop(p, 5.0, metric=found_rare, points=5)
    kept = predictions.leave(predictions.validate(p).scores, chosen.thresholds)
    own = predictions.scored(predictions.validate(p), np.full(600, 2), found_rare)
    assert predictions.scored(predictions.validate(p), kept, found_rare) >= own
    with pytest.raises(ValueError, match='is nan of the answers of the network'):
      thresholds.for_drop(P, 5.0, metric=found_rare)


def test_a_slow_metric_is_asked_once_for_the_same_thresholds():
  asked = []

  def metric(labels, answers):
    asked.append(answers.tobytes())
    return (labels == answers).mean()

  thresholds.for_drop(drawn(200), 5.0, points=5, metric=metric)
  assert len(asked) < 4000


@pytest.mark.parametrize('folds', [np.int8(5), np.uint8(5), np.int64(5)])
def test_folds_may_be_any_integer(folds):
  chosen = thresholds.for_drop(P, 5.0, least=300, points=5, folds=folds)
  expected = thresholds.for_drop(P, 5.0, least=300, points=5)
  np.testing.assert_array_equal(chosen.thresholds, expected.thresholds)


def test_folds_are_a_number():
  with pytest.raises(TypeError, match='folds: expected a whole number'):
    thresholds.for_drop(P, 1.0, folds=2.0)
