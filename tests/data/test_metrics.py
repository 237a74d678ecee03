"""Metrics of classes: those of scikit-learn, from counts of labels and answers."""

import numpy as np
import pytest
import sklearn.metrics

from depthprune.data import metrics

RNG = np.random.default_rng(0)
LABELS = RNG.choice(4, 300, p=[0.7, 0.2, 0.1, 0.0])
ANSWERS = np.where(RNG.random(300) < 0.6, LABELS, RNG.integers(0, 3, 300))
COUNTS = metrics.confusion(LABELS, ANSWERS, 4)
F1 = lambda y, x: sklearn.metrics.f1_score(y, x, average='macro')


@pytest.mark.parametrize(
  ('metric', 'expected'),
  [
    ('accuracy', sklearn.metrics.accuracy_score),
    ('balanced_accuracy', sklearn.metrics.balanced_accuracy_score),
    ('f1', F1),
    (F1, F1),
    (sklearn.metrics.matthews_corrcoef, sklearn.metrics.matthews_corrcoef),
  ],
)
def test_they_are_those_of_scikit_learn(metric, expected):
  np.testing.assert_array_equal(
    COUNTS, sklearn.metrics.confusion_matrix(LABELS, ANSWERS, labels=range(4))
  )
  assert metrics.score(metric, COUNTS) == pytest.approx(expected(LABELS, ANSWERS))
  stacked = metrics.score(metric, np.stack([[COUNTS], [2 * COUNTS]]))
  assert stacked.shape == (2, 1) and np.allclose(stacked, stacked[0])


def test_by_hand():
  """Of 8 and 2 examples, 8 and 1 are right."""
  counts = np.array([[8, 0], [1, 1]])
  assert metrics.score('accuracy', counts) == pytest.approx(0.9)
  assert metrics.score('balanced_accuracy', counts) == pytest.approx(0.75)
  assert metrics.score('f1', counts) == pytest.approx((16 / 17 + 2 / 3) / 2)
  assert metrics.score('f1', np.array([[5, 0], [0, 0]])) == 1


def test_an_unknown_metric_is_refused():
  with pytest.raises(ValueError, match="metric='F1': expected 'accuracy'"):
    metrics.score('F1', COUNTS)
  assert metrics.name_of(sklearn.metrics.f1_score) == 'f1_score'


def test_balanced_weights():
  weights = metrics.balanced_weights(np.array([0, 0, 0, 2]), 3)
  np.testing.assert_allclose(weights, [4 / 9, 0, 4 / 3])
  by_sklearn = sklearn.utils.class_weight.compute_class_weight(
    'balanced', classes=np.arange(3), y=LABELS
  )
  np.testing.assert_allclose(metrics.balanced_weights(LABELS, 3), by_sklearn)
