import jax.numpy as jnp
import numpy as np
import pytest

from depthprune.train import task as tasks

LOGITS = jnp.log(jnp.asarray([[0.5, 0.25, 0.25], [0.1, 0.1, 0.8]]))


def test_loss_and_accuracy_by_hand():
  task = tasks.classification(3)
  batch = {'label': jnp.asarray([0, 1])}
  expected = -(np.log(0.5) + np.log(0.1)) / 2
  assert float(task.loss(LOGITS, batch)) == pytest.approx(expected, rel=1e-6)
  assert float(task.metrics(LOGITS, batch)['accuracy']) == 0.5


def test_padding_does_not_count():
  task = tasks.classification(3)
  batch = {'label': jnp.asarray([0, 1]), 'weight': jnp.asarray([1.0, 0.0])}
  assert float(task.loss(LOGITS, batch)) == pytest.approx(-np.log(0.5), rel=1e-6)
  assert float(task.metrics(LOGITS, batch)['accuracy']) == 1.0
  nothing = {**batch, 'weight': jnp.zeros(2)}
  assert float(task.loss(LOGITS, nothing)) == 0.0


def test_label_smoothing_spreads_the_label():
  task = tasks.classification(3, label_smoothing=0.3)
  batch = {'label': jnp.asarray([0])}
  expected = -(0.8 * np.log(0.5) + 0.2 * np.log(0.25))
  assert float(task.loss(LOGITS[:1], batch)) == pytest.approx(expected, rel=1e-6)


def test_log_probs_are_normalised():
  logits = jnp.asarray([[1.0, -2.0, 3.0]])
  probabilities = jnp.exp(tasks.classification(3).log_probs(logits))
  assert float(probabilities.sum()) == pytest.approx(1.0, rel=1e-6)


def test_wrong_number_of_classes_is_refused():
  with pytest.raises(ValueError, match='4 classes need logits'):
    tasks.classification(4).loss(LOGITS, {'label': jnp.asarray([0, 1])})
