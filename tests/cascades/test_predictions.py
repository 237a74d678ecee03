"""Who leaves where, what it costs, and which inputs are refused."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from depthprune.cascades import predictions
from tests.cascades.answers import answers, drawn

SETTINGS = settings(deadline=None, derandomize=True, database=None)
NAN, INF = np.nan, np.inf

# Three exits, four samples; wrong / right at each exit.
RIGHT = [[1, 0, 0, 1], [1, 1, 0, 0], [1, 0, 0, 1]]
SCORES = [[0.9, 0.5, 0.2, 0.7], [0.9, 0.8, 0.3, 0.6]]


def test_a_sample_leaves_at_the_first_exit_above_its_threshold():
  assert predictions.leave(SCORES, [0.6, 0.5]).tolist() == [0, 1, 2, 0]


def test_a_score_at_the_threshold_stays():
  assert predictions.leave([[0.5, 0.5000001]], [0.5]).tolist() == [1, 0]


def test_a_score_of_nan_and_a_threshold_of_infinity_stay():
  assert predictions.leave([[NAN, 1.0, 1.0]], [-INF]).tolist() == [1, 0, 0]
  assert predictions.leave([[NAN, 1.0, INF]], [INF]).tolist() == [1, 1, 1]


def test_thresholds_and_scores_are_compared_in_float32():
  score = np.float32(0.9)  # less than 0.9 in float64
  assert predictions.leave(np.array([[score]]), np.array([0.9])).tolist() == [1]
  assert predictions.leave(np.array([[0.9]]), np.array([score])).tolist() == [1]


@pytest.mark.parametrize('thresholds', [[0.5], [0.5, 0.5, 0.5], 0.5, [[0.5, 0.5]]])
def test_a_threshold_too_many_or_too_few_is_refused(thresholds):
  with pytest.raises(ValueError, match=r'one threshold per row, got shapes \(2, 4\)'):
    predictions.leave(SCORES, thresholds)


LEVELS = st.sampled_from([0.0, 0.25, 0.5, 1.0, NAN, INF, -INF])


@SETTINGS
@given(st.data(), st.integers(1, 3), st.integers(1, 6))
def test_leaving_is_what_a_loop_over_exits_does(data, exits, n):
  row = lambda size: st.lists(LEVELS, min_size=size, max_size=size)
  scores = data.draw(st.lists(row(n), min_size=exits, max_size=exits))
  thresholds = data.draw(row(exits))
  expected = [
    next((k for k in range(exits) if scores[k][i] > thresholds[k]), exits)
    for i in range(n)
  ]
  assert predictions.leave(scores, thresholds).tolist() == expected


def test_losses_by_hand():
  p = predictions.validate(answers(RIGHT, SCORES))
  error = [[0, 1, 1, 0], [0, 0, 1, 1], [0, 1, 1, 0]]
  assert predictions.losses(p, 'error').astype(int).tolist() == error
  gap = [[0, 0, 0, 0], [0, 0, 0, 1], [0, 0, 0, 0]]
  assert predictions.losses(p, 'gap').astype(int).tolist() == gap
  other = [[0, 0, 0, 0], [0, 1, 0, 1], [0, 0, 0, 0]]
  assert predictions.losses(p, 'disagreement').astype(int).tolist() == other


def test_losses_that_are_unknown_or_need_labels_are_refused():
  p = predictions.validate(answers(RIGHT, SCORES)._replace(labels=None))
  assert predictions.losses(p, 'disagreement').sum() == 2
  with pytest.raises(ValueError, match="'gap' needs labels.*'disagreement' needs none"):
    predictions.losses(p, 'gap')
  with pytest.raises(ValueError, match="'accuracy': expected one of error, gap"):
    predictions.losses(p, 'accuracy')


def test_what_thresholds_give_by_hand():
  p = predictions.validate(answers(RIGHT, SCORES, cost=[1, 2, 4], whole=3.5))
  found = predictions.measure(p, np.array([0, 1, 2, 0]))
  assert found == predictions.Measured(3 / 4, (1 + 2 + 4 + 1) / 4, (0.5, 0.25, 0.25))
  assert predictions.drop(found, p) == -25  # 3 right, 2 by the network alone
  assert predictions.saved(found, p) == 1 - 2 / 3.5
  alone = predictions.measure(p, np.full(4, 2))
  assert (predictions.drop(alone, p), predictions.saved(alone, p)) == (0, 1 - 4 / 3.5)


def test_without_labels_there_is_no_accuracy():
  p = predictions.validate(answers(RIGHT, SCORES)._replace(labels=None))
  assert np.isnan(predictions.measure(p, np.zeros(4, int)).accuracy)


def test_some_rows_are_taken_of_everything():
  p = predictions.validate(drawn(9))
  some = predictions.take(p, np.array([2, 5]))
  assert some.logits.tolist() == p.logits[:, [2, 5]].tolist()
  assert some.scores.tolist() == p.scores[:, [2, 5]].tolist()
  assert some.labels.tolist() == p.labels[[2, 5]].tolist()
  assert predictions.take(p._replace(labels=None), np.array([1])).labels is None
  predictions.validate(some)


def test_a_sample_is_recognised_whatever_the_exits_and_the_order():
  p = predictions.validate(drawn(50))
  rows = np.arange(50)[::-1]
  fewer = predictions.take(p._replace(logits=p.logits[1:], scores=p.scores[1:]), rows)
  assert predictions.digest(fewer).tolist() == predictions.digest(p)[::-1].tolist()
  assert len(set(predictions.digest(p).tolist())) == 50
  other = predictions.validate(drawn(50, seed=1))
  assert not np.isin(predictions.digest(other), predictions.digest(p)).any()


def test_validated_data_has_one_type_each():
  p = answers(RIGHT, SCORES)
  double = p._replace(
    logits=p.logits.astype(float), scores=p.scores.astype(float), cost=[1, 2, 3]
  )
  p = predictions.validate(double)
  assert (p.logits.dtype, p.scores.dtype, p.cost.dtype) == (
    np.float32, np.float32, np.float64,
  )  # fmt: skip
  assert p.exits == ('exit0', 'exit1', 'main')


GOOD = answers(RIGHT, SCORES)
NOT_FINITE = np.where(np.arange(3)[:, None, None] == 1, np.nan, GOOD.logits)


def test_who_never_leaves_may_have_no_answer():
  scores = np.where(np.arange(2)[:, None] == 1, np.nan, GOOD.scores)
  p = predictions.validate(GOOD._replace(logits=NOT_FINITE, scores=scores))
  assert 1 not in predictions.leave(p.scores, [0.0, 0.0])
  nothing = np.where(np.arange(3)[:, None, None] == 2, np.nan, GOOD.logits)
  with pytest.raises(ValueError, match='logits of main: expected finite'):
    predictions.validate(GOOD._replace(logits=nothing))


@pytest.mark.parametrize(
  ('changes', 'said'),
  [
    ({'exits': ('main',)}, r"two different names.*\['main'\]"),
    ({'exits': ('a', 'a', 'main')}, 'two different names'),
    ({'exits': ('a', 'main')}, r'logits: expected \[2, n, classes\].*\(3, 4, 3\)'),
    ({'logits': GOOD.logits[0]}, r'logits: .* got shape \(4, 3\)'),
    ({'logits': GOOD.logits[:, :0]}, r'n >= 1'),
    ({'logits': GOOD.logits[:, :, :1]}, r'classes >= 2'),
    ({'logits': NOT_FINITE}, 'logits of exit1: expected finite'),
    ({'scores': GOOD.scores[:1]}, r'scores: expected \[2, 4\].*\(1, 4\)'),
    ({'scores': GOOD.scores[:, :3]}, r'scores: expected \[2, 4\].*\(2, 3\)'),
    ({'cost': [1, 2]}, r'cost: expected \[3\]'),
    ({'cost': [1, 2, 2]}, r'increase.*\[1\.0, 2\.0, 2\.0\]'),
    ({'cost': [0, 1, 2]}, 'positive'),
    ({'cost': [1, 2, INF]}, 'increase'),
    ({'cost': [1, NAN, 3]}, 'increase'),
    ({'whole': 0.0}, r'whole: .*\(3\).*got 0'),
    ({'whole': 4.0}, 'whole: .*in its unit, got 4'),
    ({'whole': NAN}, 'whole'),
    ({'labels': GOOD.labels[:3]}, r'labels: expected integers \[4\]'),
    ({'labels': GOOD.labels.astype(float)}, 'float64'),
    ({'labels': np.array([0, 1, 2, 3])}, r'0\.\.2.*got 0 to 3'),
    ({'labels': np.array([0, 1, 2, -1])}, 'got -1 to 2'),
  ],
)
def test_data_that_does_not_fit_is_refused(changes, said):
  with pytest.raises(ValueError, match=said):
    predictions.validate(GOOD._replace(**changes))
