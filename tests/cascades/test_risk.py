"""The guarantee of a risk level: its formulas, and that it holds."""

import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binom

from depthprune.cascades import predictions, risk
from depthprune.cascades.pareto import front
from depthprune.cascades.risk import Certificate
from tests.cascades.answers import answers, drawn

SETTINGS = settings(deadline=None, derandomize=True, database=None)


def test_a_p_value_by_hand():
  assert risk.p_value(0, 10, 0.2) == pytest.approx(0.8**10)
  assert risk.p_value(1, 10, 0.2) == pytest.approx(0.8**10 + 10 * 0.2 * 0.8**9)
  assert risk.p_value(10, 10, 0.2) == 1


def test_an_upper_bound_by_hand():
  assert risk.upper(0, 100, 0.05) == pytest.approx(1 - 0.05**0.01)
  assert risk.upper(7, 7, 0.05) == 1
  assert binom.cdf(3, 50, risk.upper(3, 50, 0.1)) == pytest.approx(0.1)


@SETTINGS
@given(st.integers(1, 400), st.data(), st.floats(0.01, 0.5), st.floats(0.01, 0.5))
def test_a_level_is_certified_from_the_upper_bound_on(rows, data, alpha, delta):
  losses = data.draw(st.integers(0, rows))
  bound = risk.upper(losses, rows, delta)
  assert risk.p_value(losses, rows, alpha) == pytest.approx(
    binom.cdf(losses, rows, alpha)
  )
  if abs(alpha - bound) > 1e-9:
    assert (risk.p_value(losses, rows, alpha) <= delta) == (bound <= alpha)


def test_the_walk_ends_at_the_first_that_is_not_certified():
  certified = lambda *losses: risk.walk(losses, rows=100, alpha=0.1, delta=0.05)
  assert risk.p_value(4, 100, 0.1) < 0.05 < risk.p_value(5, 100, 0.1)
  assert certified(0, 2, 4) == 3
  assert certified(0, 5, 4) == 1
  assert certified(5, 0, 0) == 0
  assert certified() == 0
  assert risk.p_value(0, 1, 0.5) == 0.5
  assert risk.walk([0, 1], rows=1, alpha=0.5, delta=0.5) == 1  # at delta, not above


def test_halves_are_disjoint_complete_and_the_same_each_time():
  one, other = risk.halves(11, seed=3)
  assert sorted([*one, *other]) == list(range(11))
  assert (len(one), len(other)) == (5, 6)
  assert one.tolist() == risk.halves(11, seed=3)[0].tolist()
  assert one.tolist() != risk.halves(11, seed=4)[0].tolist()


@pytest.mark.parametrize('loss', predictions.LOSSES)
def test_a_certificate_counts_losses_on_rows_that_were_not_searched(loss):
  p = predictions.validate(drawn(600))
  alpha = {'error': 0.2, 'gap': 0.05, 'disagreement': 0.15}[loss]
  thresholds, found = risk.certify(p, alpha, 0.1, loss, seed=2)
  searched, tested = risk.halves(600, seed=2)
  candidates = front(predictions.take(p, searched), loss)
  assert thresholds.tolist() in [q.thresholds.tolist() for q in candidates]
  left = predictions.leave(p.scores[:, tested], thresholds)
  lost = predictions.losses(p, loss)[left, tested].sum()
  assert found == Certificate(loss, alpha, 0.1, 300, lost, risk.upper(lost, 300, 0.1))
  assert found.bound <= alpha
  assert (left < 2).any()


def test_the_higher_the_level_the_cheaper_the_cascade():
  p = predictions.validate(drawn(2000))
  costs = []
  for alpha in (0.005, 0.02, 0.05, 0.2, 0.6):
    thresholds, _ = risk.certify(p, alpha)
    costs.append(predictions.measure(p, predictions.leave(p.scores, thresholds)).cost)
  assert np.all(np.diff(costs) < 0)


def test_an_exit_that_is_safer_than_the_network_is_taken():
  # the first exit is always right, the network errs on a fifth
  right = np.ones((2, 400), bool)
  right[1, ::5] = False
  p = predictions.validate(answers(right, np.linspace(0, 1, 400)[None]))
  for alpha in (0.05, 0.4):  # at the second, never exit passes after it
    thresholds, found = risk.certify(p, alpha, loss='error')
    assert thresholds.tolist() == [-np.inf]
    assert found.losses == 0


def lowest(said) -> float:
  return float(re.search(r'certified is ([\d.]+)', said)[1])


def test_a_level_out_of_reach_names_the_lowest_that_is_not():
  p = drawn(600)
  with pytest.raises(ValueError, match='the safest lose [1-9]') as refused:
    risk.certify(p, 0.01, loss='error')
  said = str(refused.value)
  assert "risk 0.01 of 'error' at delta 0.05 is reached by no thresholds" in said
  assert 'of the 300 held-out samples' in said
  level = lowest(said)
  assert risk.certify(p, level, loss='error')[1].bound <= level
  with pytest.raises(ValueError, match=f'{level:g}'):
    risk.certify(p, level - 2e-5, loss='error')


def test_too_few_samples_are_named_as_the_reason():
  with pytest.raises(ValueError, match=r'300 samples certify nothing below') as refused:
    risk.certify(drawn(600), 0.005)
  said = str(refused.value)
  assert 'lose 0 of the 300' in said
  assert lowest(said) == pytest.approx(1 - 0.05 ** (1 / 300), abs=1e-5)
  takes = int(re.search(r'this level takes (\d+)', said)[1])
  assert 0.995**takes <= 0.05 < 0.995 ** (takes - 1)
  # as many as were asked for are enough
  assert risk.certify(drawn(2 * takes), 0.005)[1].losses == 0
  with pytest.raises(ValueError, match='the safest lose [1-9]') as refused:
    risk.certify(drawn(2 * takes), 0.005, loss='error')
  assert 'certify nothing' not in str(refused.value)


def test_enough_samples_are_not_named_as_the_reason():
  with pytest.raises(ValueError) as refused:
    risk.certify(drawn(600), 0.02, loss='error')
  assert 'certify nothing' not in str(refused.value)


@pytest.mark.parametrize(
  ('arguments', 'said'),
  [
    ({'alpha': 0}, 'alpha=0: expected a share'),
    ({'alpha': 5}, 'alpha=5'),
    ({'alpha': 0.1, 'delta': 1}, 'delta=1'),
    ({'alpha': np.nan}, 'alpha=nan'),
    ({'alpha': 0.1, 'loss': 'accuracy'}, 'expected one of error'),
  ],
)
def test_a_level_that_is_none_is_refused(arguments, said):
  with pytest.raises(ValueError, match=said):
    risk.certify(drawn(100), **arguments)


def test_one_sample_cannot_be_split():
  with pytest.raises(ValueError, match='at least 2, got 1'):
    risk.certify(drawn(1), 0.5)


def violations(p, alpha, delta, loss, rows, times) -> tuple[float, float]:
  """Shares of held-out sets drawn from p: certified above the level, certified at all.

  p is what the world is: the risk of thresholds is known."""
  world = p.scores.shape[1]
  lost, everyone = predictions.losses(p, loss), np.arange(world)
  above = certified = 0
  for seed in range(times):
    held_out = np.random.default_rng(seed).integers(0, world, rows)
    try:
      some = predictions.take(p, held_out)
      thresholds, _ = risk.certify(some, alpha, delta, loss, 5, 10, seed)
    except ValueError:
      continue
    certified += 1
    above += lost[predictions.leave(p.scores, thresholds), everyone].mean() > alpha
  return above / times, certified / times


@pytest.mark.parametrize(('loss', 'alpha'), [('gap', 0.05), ('disagreement', 0.2)])
def test_the_guarantee_holds(loss, alpha):
  delta, times = 0.2, 200
  world = predictions.validate(drawn(4000, seed=9))
  above, certified = violations(world, alpha, delta, loss, 200, times)
  assert certified > 0.95  # it is not kept by refusing
  assert above <= delta + 3 * np.sqrt(delta * (1 - delta) / times)
  assert above > 0.02  # nor by never leaving: the level is used
