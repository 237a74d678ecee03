"""Several tasks at once: weighted losses, labels that are missing, outputs by name."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from depthprune.train import task as tasks
from depthprune.train.distill import distill
from depthprune.train.evaluate import evaluate
from depthprune.train.method import plain
from depthprune.train.step import init_state, make_step

LEFT, RIGHT = tasks.classification(3), tasks.classification(2)
TASK = tasks.combine({'left': LEFT, 'right': RIGHT}, {'right': 0.5})
RANDOM = np.random.RandomState(0)
LOGITS = {
  'left': jnp.asarray(RANDOM.randn(4, 3), jnp.float32),
  'right': jnp.asarray(RANDOM.randn(4, 2), jnp.float32),
}
LABEL = jnp.asarray([[0, 1], [1, 0], [2, 1], [1, 1]])


def rows(which, label=LABEL):
  which = np.asarray(which)
  logits = {name: x[which] for name, x in LOGITS.items()}
  return logits, {'label': label[which]}


def test_the_loss_is_the_weighted_sum_and_metrics_have_names():
  batch = {'label': LABEL}
  left, right = ({'label': LABEL[:, i]} for i in range(2))
  expected = LEFT.loss(LOGITS['left'], left) + 0.5 * RIGHT.loss(LOGITS['right'], right)
  assert float(TASK.loss(LOGITS, batch)) == pytest.approx(float(expected), rel=1e-6)
  found = TASK.metrics(LOGITS, batch)
  mine = [
    t.metrics(LOGITS[k], b)['accuracy']
    for k, t, b in (('left', LEFT, left), ('right', RIGHT, right))
  ]
  assert {*found} == {'accuracy_left', 'accuracy_right', 'accuracy'}
  np.testing.assert_allclose([found['accuracy_left'], found['accuracy_right']], mine)
  assert float(found['accuracy']) == pytest.approx(float(sum(mine)) / 2)


def test_labels_by_name_are_those_in_columns():
  named = {'label': {'right': LABEL[:, 1], 'left': LABEL[:, 0]}}
  assert TASK.loss(LOGITS, named) == TASK.loss(LOGITS, {'label': LABEL})


def test_missing_labels_are_masked_in_loss_gradient_and_metrics():
  label = LABEL.at[0, 0].set(-1).at[3, 0].set(-1).at[1, 1].set(-1)
  only = {'left': [1, 2], 'right': [0, 2, 3]}

  def alone(logits):  # the tasks one by one, on the rows that have their label
    left = LEFT.loss(logits['left'][1:3], {'label': LABEL[1:3, 0]})
    r = np.asarray(only['right'])
    return left + 0.5 * RIGHT.loss(logits['right'][r], {'label': LABEL[r, 1]})

  batch = {'label': label}
  loss, slope = jax.value_and_grad(TASK.loss)(LOGITS, batch)
  expected, theirs = jax.value_and_grad(alone)(LOGITS)
  assert float(loss) == pytest.approx(float(expected), rel=1e-6)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-7), slope, theirs)
  np.testing.assert_array_equal(slope['left'][0], jnp.zeros(3))
  found = TASK.metrics(LOGITS, batch)
  for i, (name, task) in enumerate((('left', LEFT), ('right', RIGHT))):
    r = np.asarray(only[name])
    mine = task.metrics(LOGITS[name][r], {'label': LABEL[r, i]})['accuracy']
    assert float(found[f'accuracy_{name}']) == pytest.approx(float(mine))


def test_a_task_without_any_label_is_not_in_the_mean_accuracy():
  batch = {'label': LABEL.at[:, 0].set(-1)}
  found = TASK.metrics(LOGITS, batch)
  assert float(found['accuracy_left']) == 0.0
  assert found['accuracy'] == found['accuracy_right'] > 0
  scores = TASK.scores(jax.device_get(TASK.sums(LOGITS, batch)))
  assert (scores['labelled_left'], scores['labelled_right']) == (0, 4)
  assert scores['accuracy'] == pytest.approx(float(found['accuracy']))
  nothing = {'label': jnp.full((4, 2), -1)}
  assert float(TASK.loss(LOGITS, nothing)) == 0.0


def test_scores_of_a_data_set_do_not_depend_on_its_batches():
  label = LABEL.at[0, 0].set(-1)
  whole = TASK.scores(jax.device_get(TASK.sums(LOGITS, {'label': label})))
  assert whole['loss'] == pytest.approx(float(TASK.loss(LOGITS, {'label': label})))

  def batches():
    for r, weight in (([0, 1, 2], [1, 1, 1]), ([3, 0, 0], [1, 0, 0])):
      logits, batch = rows(r, label)
      yield {'features': logits, **batch, 'weight': jnp.asarray(weight, jnp.float32)}

  apply = lambda variables, logits, train: logits
  found = evaluate(apply, {}, batches(), TASK)
  assert found.keys() == whole.keys() >= {'loss_left', 'accuracy_right', 'accuracy'}
  for name, value in whole.items():
    assert found[name] == pytest.approx(float(value), rel=1e-6), name


def test_pixels_and_classes_together():
  task = tasks.combine({'kind': LEFT, 'mask': tasks.segmentation(2)})
  logits = {'kind': LOGITS['left'], 'mask': jnp.zeros((4, 1, 2, 2))}
  mask = jnp.asarray([[[0, 1]], [[-1, -1]], [[1, -1]], [[0, 0]]])
  batch = {'label': {'kind': LABEL[:, 0], 'mask': mask}}
  scores = task.scores(jax.device_get(task.sums(logits, batch)))
  assert (scores['labelled_mask'], scores['labelled_kind']) == (3, 4)
  assert scores['accuracy_mask'] == pytest.approx(3 / 5)
  assert scores['miou_mask'] == pytest.approx((3 / 5 + 0) / 2)


def test_an_output_that_is_missing_is_an_error_with_all_names():
  with pytest.raises(ValueError, match='each of left, right, got left, aux: there is'):
    TASK.answer({'left': LOGITS['left'], 'aux': LOGITS['left']})
  with pytest.raises(ValueError, match='one array: there is none for left, right'):
    TASK.loss(LOGITS['left'], {'label': LABEL})


@pytest.mark.parametrize(
  'names, weights', [('', None), ('ab', {'c': 1.0}), ('a', {'a': -1})]
)
def test_wrong_weights_are_refused(names, weights):
  with pytest.raises(ValueError, match='combine: expected one task or more'):
    tasks.combine(dict.fromkeys(names, LEFT), weights)


def test_a_step_and_a_teacher_for_all_tasks():
  def apply(variables, image, train, rngs=None):
    del train, rngs
    heads = {name: image @ w for name, w in variables['params'].items()}
    return {**heads, 'aux': image}

  params = {'left': jnp.ones((5, 3)), 'right': jnp.ones((5, 2))}
  batch = {'image': jnp.asarray(RANDOM.randn(4, 5), jnp.float32), 'label': LABEL}
  method, tx = distill(plain(), weight=0.5), optax.sgd(0.1)
  state = init_state(apply, method, tx, {'params': params}, batch=batch)
  step = make_step(apply, method, TASK, tx, teacher=apply)
  taught = {'params': jax.tree.map(lambda w: w.at[0, 0].add(1.0), params)}
  losses = []
  for _ in range(5):
    state, metrics = step(state, batch, jax.random.key(0), taught)
    losses.append(float(metrics['loss']))
  assert losses[-1] < losses[0] and metrics['distillation'] > 0
  assert 'accuracy_left' in metrics


def test_the_divergence_of_pixels_is_their_mean():
  task, shape = tasks.segmentation(2), (2, 3, 4, 2)
  student, teacher = (jnp.asarray(RANDOM.randn(*shape), jnp.float32) for _ in range(2))
  batch = {'label': jnp.zeros(shape[:3], jnp.int32), 'teacher': teacher}
  method = distill(plain(), temperature=1.0, weight=1.0)
  loss, _ = method.objective(task, {'main': student}, batch, {}, jnp.int32(0))
  p, q = jax.nn.softmax(teacher), jax.nn.log_softmax(student)
  expected = (p * (jnp.log(p) - q)).sum(-1).mean()
  assert float(loss) == pytest.approx(float(expected), rel=1e-5)
