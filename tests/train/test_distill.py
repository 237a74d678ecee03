import jax
import jax.numpy as jnp
import numpy as np
import pytest

from depthprune.train.distill import distill, with_teacher
from depthprune.train.method import plain
from depthprune.train.task import classification

BATCH = {'image': jnp.ones((2, 3)), 'label': jnp.asarray([0, 2])}
LOGITS = jnp.asarray([[1.0, 0.0, -1.0], [0.5, 0.2, 2.0]])
STEP = jnp.zeros((), jnp.int32)


def value(method, teacher_logits):
  batch = {**BATCH, 'teacher': teacher_logits}
  return method.objective(classification(3), {'main': LOGITS}, batch, {}, STEP)


def test_a_student_that_equals_its_teacher_has_only_the_task_left():
  task_loss = classification(3).loss(LOGITS, BATCH)
  loss, metrics = value(distill(plain(), weight=0.25), LOGITS)
  assert float(loss) == pytest.approx(0.75 * float(task_loss), rel=1e-6)
  assert float(metrics['distillation']) == pytest.approx(0.0, abs=1e-7)
  assert 'accuracy' in metrics


def test_divergence_by_hand():
  teacher, T = jnp.asarray([[2.0, 0.0, 0.0], [0.0, 0.0, 0.0]]), 2.0
  p = np.asarray(jax.nn.softmax(teacher / T))
  q = np.asarray(jax.nn.softmax(LOGITS / T))
  expected = T**2 * (p * np.log(p / q)).sum(-1).mean()
  loss, _ = value(distill(plain(), temperature=T, weight=1.0), teacher)
  assert float(loss) == pytest.approx(expected, rel=1e-5)


def test_the_teacher_gets_no_gradient_and_runs_in_evaluation_mode():
  def apply(variables, image, train):
    assert not train
    return {'main': image @ variables}

  def loss(variables):
    return with_teacher(apply, variables, BATCH)['teacher'].sum()

  np.testing.assert_array_equal(jax.grad(loss)(jnp.ones((3, 3))), jnp.zeros((3, 3)))


def test_a_missing_teacher_is_an_error_that_says_what_to_pass():
  with pytest.raises(ValueError, match='teacher=apply'):
    distill(plain()).objective(classification(3), {'main': LOGITS}, BATCH, {}, STEP)


@pytest.mark.parametrize('bad', [{'temperature': 0.0}, {'weight': 1.5}])
def test_values_out_of_range(bad):
  with pytest.raises(ValueError, match='expected a finite number'):
    distill(plain(), **bad)
