"""Pixels: cross-entropy, accuracy and IoU against values worked out by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from depthprune.train import task as tasks
from depthprune.train.evaluate import evaluate

# Two images of one row and three pixels; 2 of three classes are in them, 3 is ignored.
ANSWER = np.asarray([[[0.5, 0.25, 0.25], [0.1, 0.8, 0.1], [0.7, 0.2, 0.1]]] * 2)
LOGITS = jnp.log(jnp.asarray(ANSWER, jnp.float32))[:, None]  # [2, 1, 3, 3]
LABEL = jnp.asarray([[[0, 0, 3]], [[1, 1, 0]]], jnp.uint8)  # [2, 1, 3]
TASK = tasks.segmentation(3, ignore=3, names=('road', 'car', 'tree'))


def scores(task, logits, batch):
  sums = jax.device_get(task.sums(logits, batch))
  return {name: float(value) for name, value in task.scores(sums).items()}


def test_loss_accuracy_and_iou_by_hand():
  batch = {'label': LABEL}
  right = [0.5, 0.1, 0.25, 0.8, 0.7]  # probability of the label, where there is one
  assert float(TASK.loss(LOGITS, batch)) == pytest.approx(-np.mean(np.log(right)))
  # Answers: road car road, twice; right are the first, and the two last.
  assert float(TASK.metrics(LOGITS, batch)['accuracy']) == pytest.approx(3 / 5)
  found = scores(TASK, LOGITS, batch)
  assert found['loss'] == pytest.approx(-np.mean(np.log(right)))
  assert found['accuracy'] == pytest.approx(3 / 5)
  # road: 2 of the 3 labelled and 1 more answered so; car: 1 of 2, and 1 more.
  assert found['iou_road'] == pytest.approx(2 / 4)
  assert found['iou_car'] == pytest.approx(1 / 3)


def test_a_class_that_is_absent_is_left_out_of_the_mean_and_counted():
  found = scores(TASK, LOGITS, {'label': LABEL})
  assert np.isnan(found['iou_tree'])
  assert found['miou'] == pytest.approx((2 / 4 + 1 / 3) / 2)
  assert found['classes'] == 2
  # Where an answer names it, it is not absent: no label of it is found, its IoU is 0.
  named = LOGITS.at[0, 0, 0, 2].set(9.0)
  found = scores(TASK, named, {'label': LABEL})
  assert (found['iou_tree'], found['classes']) == (0.0, 3)
  # But an answer where nothing is labelled does not name it.
  unseen = scores(TASK, LOGITS.at[0, 0, 2, 2].set(9.0), {'label': LABEL})
  assert unseen['classes'] == 2


def test_padding_does_not_count():
  batch = {'label': LABEL, 'weight': jnp.asarray([0.0, 1.0])}
  found, alone = (
    scores(TASK, LOGITS, batch),
    scores(TASK, LOGITS[1:], {'label': LABEL[1:]}),
  )
  np.testing.assert_allclose([*found.values()], [*alone.values()], rtol=1e-6)
  loss = TASK.loss(LOGITS[1:], {'label': LABEL[1:]})
  assert float(TASK.loss(LOGITS, batch)) == pytest.approx(float(loss), rel=1e-6)
  nothing = {**batch, 'weight': jnp.zeros(2)}
  assert float(TASK.loss(LOGITS, nothing)) == 0.0
  assert scores(TASK, LOGITS, nothing)['miou'] == 0.0


def test_what_is_ignored_has_no_gradient():
  batch = {'label': LABEL}
  slope = jax.grad(TASK.loss)(LOGITS, batch)
  np.testing.assert_array_equal(slope[0, 0, 2], jnp.zeros(3))
  assert (np.abs(slope[0, 0, :2]) > 0).all()
  negative = {'label': jnp.where(LABEL == 3, -1, LABEL.astype(jnp.int32))}
  np.testing.assert_array_equal(slope, jax.grad(TASK.loss)(LOGITS, negative))


def test_a_label_outside_the_classes_is_loud():
  assert np.isnan(tasks.segmentation(3).loss(LOGITS, {'label': LABEL}))
  padding = {'label': LABEL, 'weight': jnp.asarray([0.0, 1.0])}
  assert np.isfinite(tasks.segmentation(3).loss(LOGITS, padding))


@settings(max_examples=8, deadline=None)
@given(st.integers(0, 999), st.integers(1, 5), st.integers(1, 4))
def test_scores_do_not_depend_on_the_batches(seed, size, count):
  """Any batching and padding gives the confusion matrix of the whole split."""
  random = np.random.RandomState(seed)
  logits = random.randn(count, 2, 3, 4).astype(np.float32)
  label = random.randint(0, 5, (count, 2, 3))
  task = tasks.segmentation(4, ignore=4)
  pad = -count % size
  rows = np.arange(count + pad)
  weight = (rows < count).astype(np.float32)
  whole = task.scores(jax.device_get(task.sums(logits, {'label': label})))
  batches = [
    {'image': logits[r.clip(max=count - 1)], 'label': label[r.clip(max=count - 1)]}
    | {'weight': weight[r]}
    for r in np.split(rows, len(rows) // size)
  ]
  apply = lambda variables, image, train: image * variables
  found = evaluate(apply, jnp.ones(()), batches, task)
  assert found.keys() == whole.keys()
  for name, value in whole.items():
    np.testing.assert_allclose(found[name], value, rtol=2e-6, err_msg=name)


def test_iou_of_many_confusions_at_once():
  counts = np.random.RandomState(0).randint(0, 9, (5, 3, 3)).astype(float)
  sums = {'loss': np.ones(5), 'confusion': counts}
  together = TASK.scores(sums)
  for i in range(5):
    alone = TASK.scores({'loss': np.ones(()), 'confusion': counts[i]})
    for name in alone:
      np.testing.assert_allclose(together[name][i], alone[name])


def test_wrong_shapes_and_names_are_refused():
  with pytest.raises(ValueError, match='logits|integers'):
    tasks.segmentation(4).loss(LOGITS, {'label': LABEL})
  with pytest.raises(ValueError, match='logits|integers'):
    TASK.loss(LOGITS, {'label': LABEL[:, :, :2]})
  with pytest.raises(ValueError, match='logits|integers'):
    tasks.classification(3).loss(LOGITS[:, 0, 0], {'label': LABEL})
  with pytest.raises(ValueError, match='a name for each of 3 classes, got 1'):
    tasks.segmentation(3, names=('road',))
