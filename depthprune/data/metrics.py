"""Metrics of the answers to a data set of classes, of which one may decide.

A metric is 'accuracy', 'balanced_accuracy' (mean recall of the classes), 'f1' (mean F1
of the classes), or a function (labels [n], answers [n]) -> score, such as those of
sklearn.metrics. Higher is better.
"""

from collections.abc import Callable
from typing import Any

import numpy as np

Metric = str | Callable[[np.ndarray, np.ndarray], Any]
NAMES = 'accuracy', 'balanced_accuracy', 'f1'


def name_of(metric: Metric) -> str:
  """Returns the name of a metric.

  Raises:
    ValueError: there is no such metric.
  """
  if callable(metric):
    return getattr(metric, '__name__', 'score')
  if metric not in NAMES:
    raise ValueError(
      f'metric={metric!r}: expected {", ".join(map(repr, NAMES))} or a function '
      '(labels, answers) -> score'
    )
  return metric


def score(metric: Metric, confusion: np.ndarray) -> np.ndarray:
  """Computes a metric from numbers of examples [..., label, answer]; returns [...]."""
  counts = np.asarray(confusion)
  hits = np.diagonal(counts, axis1=-2, axis2=-1)
  labels, answers = counts.sum(-1), counts.sum(-2)
  if callable(metric):
    each = counts.reshape(-1, *counts.shape[-2:])
    scores = [float(metric(*_examples(one))) for one in each]
    return np.array(scores).reshape(counts.shape[:-2])
  if name_of(metric) == 'accuracy':
    return hits.sum(-1) / np.maximum(counts.sum((-2, -1)), 1e-9)
  # A class that is in no label (or for F1 in no answer either) does not count.
  if metric == 'balanced_accuracy':
    value, counted = hits / np.maximum(labels, 1e-9), labels > 0
  else:
    both = labels + answers
    value, counted = 2 * hits / np.maximum(both, 1e-9), both > 0
  return np.where(counted, value, 0).sum(-1) / np.maximum(counted.sum(-1), 1)


def confusion(labels: np.ndarray, answers: np.ndarray, classes: int) -> np.ndarray:
  """Counts examples by label and answer, int [classes, classes]."""
  pairs = np.bincount(labels * classes + answers, minlength=classes * classes)
  return pairs.reshape(classes, classes)


def balanced_weights(labels: np.ndarray, classes: int) -> np.ndarray:
  """Returns a weight for every class, n / (classes × its examples), float64 [classes].

  So all classes weigh the same together, and an example weighs 1 on average. The weight
  of a class without examples is 0.
  """
  counts = np.bincount(labels, minlength=classes)
  weights = len(labels) / (classes * np.maximum(counts, 1))
  return np.where(counts > 0, weights, 0.0)


def _examples(counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Returns labels [n] and answers [n] with these counts."""
  label, answer = np.indices(counts.shape)
  times = np.rint(counts).astype(int).ravel()
  return np.repeat(label.ravel(), times), np.repeat(answer.ravel(), times)
