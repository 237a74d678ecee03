"""Distillation: the network before the cut teaches the one after it.

Hinton, Vinyals, Dean: "Distilling the Knowledge in a Neural Network" (2015,
arXiv 1503.02531), wrapped around the objective of any method.

  L = (1 - a) L_method + a T^2 KL( p_teacher(T) || p_student(T) )

`make_step(..., teacher=apply)` runs the teacher on every batch, with arrays that are
an argument of the step, and puts its logits into `batch['teacher']`. Divergences of
several tasks are added, and those of pixels are averaged, unlabelled ones included.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from depthprune.data.dataset import inputs_of
from depthprune.program import arguments
from depthprune.train.method import Method, checked
from depthprune.train.task import Task, Tree, as_dict, main, mean


class Teacher(NamedTuple):
  """A network to learn from.

  Attributes:
    apply: (variables, *inputs, train=False) -> outputs.
    variables: its variables.
  """

  apply: Callable[..., Any]
  variables: Tree


def distill(method: Method, temperature: float = 4.0, weight: float = 0.5) -> Method:
  """Makes a method learn from a teacher network's logits as well as from its own loss.

  The loss becomes (1 - weight) * the method's loss + weight * temperature^2 * the
  Kullback-Leibler divergence of the student from the teacher:

      method = dp.distill(dp.Method())
      step = dp.make_step(small, method, task, tx, teacher=large.apply)
      state, metrics = step(state, batch, key, large_variables)

  Args:
    method: the method to wrap; everything but its objective stays as it is.
    temperature: both networks' logits are divided by it before the softmax; above 0.
    weight: share of the divergence in the loss, from 0 to 1.

  Returns:
    The wrapped Method, whose metrics also contain 'distillation', the divergence.

  Raises:
    ValueError: an argument is out of range; or, in the first training step, the batch
      has no 'teacher' logits because `make_step` was called without a teacher.

  Source: Hinton, Vinyals, Dean, arXiv 1503.02531.
  """
  checked(method)
  arguments.number('temperature', temperature, above=0)
  arguments.number('weight', weight, least=0, most=1)

  def objective(task: Task, outputs, batch, theta, step):
    if 'teacher' not in batch:
      raise ValueError(
        "distill: the batch has no 'teacher' logits; pass the teacher's apply to "
        'make_step(..., teacher=apply) and its variables to step(..., teacher)'
      )
    if not task.softmax:
      raise ValueError(
        'distill: a divergence is that of classes, which this task does not have: '
        'train without distill'
      )
    loss, metrics = method.objective(task, outputs, batch, theta, step)
    T = temperature
    soft = lambda logits: task.log_probs(jax.tree.map(lambda z: z / T, logits))
    q, p = soft(method.answer(task, outputs, theta)), soft(batch['teacher'])

    def divergence_of(p, q):  # the mean over examples, and over pixels if there are any
      each = (jnp.exp(p) * (p - q)).sum(-1)
      return mean(each.mean(range(1, each.ndim)) if each.ndim > 1 else each, batch)

    divergence = sum(jax.tree.leaves(jax.tree.map(divergence_of, p, q)))
    loss = (1 - weight) * loss + weight * T**2 * divergence
    return loss, {**metrics, 'distillation': divergence}

  return method._replace(objective=objective)


def with_teacher(
  apply: Any,
  variables: Any,
  batch: dict[str, Any],
  answer: Callable[[Tree], Tree] = main,
) -> dict[str, Any]:
  """Adds to a batch, as 'teacher', the logits of a network in evaluation mode."""
  logits = answer(as_dict(apply(variables, *inputs_of(batch), train=False)))
  return {**batch, 'teacher': jax.lax.stop_gradient(logits)}
