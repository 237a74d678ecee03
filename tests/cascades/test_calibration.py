"""Calibration: each number against one by hand, or against its definition."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize_scalar

from depthprune.cascades import calibration

SETTINGS = settings(deadline=None, derandomize=True, database=None)

# Two bins: .1 .5 | .6 .9 1.; half of the first are right, two thirds of the second.
CONFIDENCE = [0.1, 0.5, 0.6, 0.9, 1.0]
CORRECT = [False, True, True, False, True]


def test_a_reliability_diagram_by_hand():
  edges, mean, accuracy, count = calibration.reliability(CONFIDENCE, CORRECT, bins=2)
  assert edges.tolist() == [0, 0.5, 1]
  assert count.tolist() == [2, 3]  # the right end belongs to the bin: .5 to the first
  assert mean == pytest.approx([0.3, 2.5 / 3])
  assert accuracy == pytest.approx([1 / 2, 2 / 3])


def test_the_calibration_error_by_hand():
  by_hand = 2 / 5 * (0.5 - 0.3) + 3 / 5 * (2.5 / 3 - 2 / 3)
  assert calibration.ece(CONFIDENCE, CORRECT, bins=2) == pytest.approx(by_hand)


def test_an_empty_bin_has_no_accuracy_and_no_error():
  _, mean, accuracy, count = calibration.reliability([0.0, 1.0], [False, True])
  assert count.tolist() == [1] + [0] * 13 + [1]
  assert np.isnan(mean[1:-1]).all()
  assert np.isnan(accuracy[1:-1]).all()
  assert calibration.ece([0.0, 1.0], [False, True]) == 0


def test_confident_and_wrong_is_the_largest_error():
  assert calibration.ece([1.0, 1.0], [False, False]) == 1


@pytest.mark.parametrize(
  ('arguments', 'said'),
  [
    (([], []), 'at least one'),
    (([0.5], [True, False]), r'\(1,\) and \(2,\)'),
    (([0.5, 1.5], [True, True]), 'got 0.5 to 1.5'),
    (([np.nan], [True]), 'probabilities'),
    (([0.5], [True], 0), 'bins=0'),
  ],
)
def test_a_confidence_that_is_none_is_refused(arguments, said):
  with pytest.raises(ValueError, match=said):
    calibration.ece(*arguments)


def nll(logits, labels, t):
  scaled = logits / t
  log_z = np.log(np.exp(scaled).sum(1))
  return np.mean(log_z - scaled[np.arange(len(labels)), labels])


@pytest.mark.parametrize('true', [0.5, 1.0, 2.5])
def test_a_known_temperature_is_found(true):
  rng = np.random.default_rng(0)
  logits = rng.normal(0, 2, (20_000, 4))
  p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
  labels = (rng.uniform(size=(20_000, 1)) > p.cumsum(1)).sum(1)
  found = calibration.temperature(true * logits, labels)
  assert found == pytest.approx(true, rel=0.03)


@SETTINGS
@given(st.integers(0, 10_000), st.floats(0.1, 5))
def test_no_other_temperature_is_more_likely(seed, scale):
  rng = np.random.default_rng(seed)
  logits, labels = rng.normal(0, scale, (30, 3)), rng.integers(0, 3, 30)
  found = calibration.temperature(logits, labels)
  other = minimize_scalar(
    lambda log_t: nll(logits, labels, np.exp(log_t)),
    bounds=(np.log(0.05), np.log(20)),
    method='bounded',
  )
  assert nll(logits, labels, found) <= other.fun + 1e-9


SURE = 5 * np.eye(3)


def test_answers_all_right_or_all_wrong_end_at_the_clip():
  assert calibration.temperature(SURE, [0, 1, 2]) == 0.05
  assert calibration.temperature(SURE, [1, 2, 0]) == 20
  assert calibration.temperature(1e6 * SURE, [1, 2, 0]) == 20


def test_logits_that_say_nothing_stay_as_they_are():
  assert calibration.temperature(np.ones((4, 3)), [0, 1, 2, 0]) == 1


@pytest.mark.parametrize(
  ('logits', 'labels', 'said'),
  [
    (np.ones(3), [0, 1, 2], 'got shapes'),
    (SURE, [0, 1], 'got shapes'),
    (np.ones((0, 3)), np.ones(0, int), 'at least one'),
    (np.where(SURE, np.inf, 0), [0, 1, 2], 'finite'),
    (SURE, [0, 1, 3], r'0\.\.2, got int64 from 0 to 3'),
    (SURE, [0.0, 1, 2], 'float64'),
  ],
)
def test_logits_and_labels_that_do_not_fit_are_refused(logits, labels, said):
  with pytest.raises(ValueError, match=said):
    calibration.temperature(logits, labels)


def test_the_area_by_hand():
  # right: .9 .5 .5, wrong: .5 .1; pairs won 1 1 | 1/2 1 | 1/2 1
  area = calibration.auroc([0.9, 0.5, 0.5, 0.5, 0.1], [1, 1, 1, 0, 0])
  assert area == pytest.approx(5 / 6)


def test_the_area_of_one_class_is_not_known():
  assert np.isnan(calibration.auroc([0.1, 0.2], [True, True]))
  assert np.isnan(calibration.auroc([0.1, 0.2], [False, False]))


@SETTINGS
@given(
  st.lists(
    st.tuples(st.sampled_from([0.1, 0.2, 0.5, np.nan]), st.booleans()),
    min_size=1,
    max_size=12,
  )
)
def test_the_area_is_the_share_of_pairs_won(pairs):
  score, correct = (np.array(values) for values in zip(*pairs))
  rank = np.where(np.isnan(score), -1, score)
  won = [(a > b) + (a == b) / 2 for a in rank[correct] for b in rank[~correct]]
  expected = np.mean(won) if won else np.nan
  assert calibration.auroc(score, correct) == pytest.approx(expected, nan_ok=True)


def reported(left=(0, 0, 1), **changes):
  logits = np.log([[[0.8, 0.2], [0.6, 0.4], [0.3, 0.7]], [[0.9, 0.1]] * 3])
  given = {
    'logits': logits,
    'labels': np.array([0, 1, 1]),
    'left': np.array(left),
    'temperatures': [2.0, 1.0],
    'exits': ('side', 'main'),
  }
  return calibration.report(**{**given, **changes})


def test_the_report_of_an_exit_by_hand():
  side = reported()['side']
  everyone, exited = side['all'], side['exited']
  assert side['temperature'] == 2
  assert (everyone['n'], exited['n']) == (3, 2)
  assert everyone['accuracy'] == pytest.approx(2 / 3)
  assert exited['accuracy'] == 0.5
  assert everyone['before']['nll'] == pytest.approx(-np.log(0.8 * 0.4 * 0.7) / 3)
  assert exited['before']['nll'] == pytest.approx(-np.log(0.8 * 0.4) / 2)
  assert exited['before']['ece'] == pytest.approx((0.2 + 0.6) / 2)
  assert exited['before']['bins']['count'] == [0] * 8 + [1, 0, 0, 1, 0, 0, 0]
  assert exited['before']['bins']['accuracy'][8] == 0
  assert (everyone['auroc'], exited['auroc']) == (1, 1)
  halved = np.sqrt([0.8, 0.2]) / np.sqrt([0.8, 0.2]).sum()  # at temperature 2
  assert exited['after']['bins']['confidence'][9] == pytest.approx(halved[0])


def test_a_temperature_of_one_changes_nothing():
  main = reported()['main']['all']
  assert main['before'] == main['after']


def test_an_exit_that_nobody_takes_and_one_class_are_null_in_json():
  entry = json.loads(json.dumps(reported(left=(0, 0, 0)), allow_nan=False))
  assert list(entry) == ['side', 'main']
  assert entry['main']['exited'] is None
  assert entry['main']['all']['n'] == 3
  assert reported(labels=np.zeros(3, int))['main']['all']['auroc'] is None


@pytest.mark.parametrize(
  ('changes', 'said'),
  [
    ({'exits': ('main',)}, r'logits \[1, n, classes\].*\(2, 3, 2\)'),
    ({'left': np.array([0, 1])}, r'left: .* 3 samples, got shape \(2,\)'),
    ({'left': np.array([0, 1, 2])}, r'0\.\.1 .* from 0 to 2'),
    ({'temperatures': [1.0]}, 'expected 2 positive'),
    ({'temperatures': [1.0, 0.0]}, 'expected 2 positive'),
    ({'labels': np.array([0, 1, 2])}, 'labels'),
  ],
)
def test_a_report_of_what_does_not_fit_is_refused(changes, said):
  with pytest.raises(ValueError, match=said):
    reported(**changes)
