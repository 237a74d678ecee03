"""Distillation: the network before the cut teaches the one after it.

Hinton, Vinyals, Dean: "Distilling the Knowledge in a Neural Network" (2015,
arXiv 1503.02531), wrapped around the objective of any method.

  L = (1 - a) L_method + a T^2 KL( p_teacher(T) || p_student(T) )

`make_step(..., teacher=apply)` runs the teacher on every batch, with arrays that are
an argument of the step, and leaves its logits in `batch['teacher']`.
"""

from typing import Any

import jax
import jax.numpy as jnp

from depthprune.training.method import Method, as_dict, inputs_of, main
from depthprune.training.tasks import Task, mean


def distill(method: Method, temperature: float = 4.0, weight: float = 0.5) -> Method:
  """The method, learning from a teacher's logits as well.

  Args:
    method: its objective keeps the share 1 - weight.
    temperature: T > 0; both distributions are softened by it.
    weight: a in [0, 1].

  Raises: ValueError for values outside these ranges, and in the first step when the
    batch has no 'teacher' entry.
  """
  if temperature <= 0 or not 0 <= weight <= 1:
    raise ValueError(
      f'distill: expected temperature > 0 and weight in [0, 1], '
      f'got temperature={temperature}, weight={weight}'
    )

  def objective(task: Task, outputs, batch, theta, step):
    if 'teacher' not in batch:
      raise ValueError(
        "distill: the batch has no 'teacher' logits; pass the teacher's apply to "
        'make_step(..., teacher=apply) and its variables to step(..., teacher)'
      )
    loss, metrics = method.objective(task, outputs, batch, theta, step)
    T = temperature
    q = task.log_probs(method.answer(task, outputs, theta) / T)
    p = task.log_probs(batch['teacher'] / T)
    divergence = mean((jnp.exp(p) * (p - q)).sum(-1), batch)
    loss = (1 - weight) * loss + weight * T**2 * divergence
    return loss, {**metrics, 'distillation': divergence}

  return method._replace(objective=objective)


def with_teacher(apply: Any, variables: Any, batch: dict[str, Any]) -> dict[str, Any]:
  """The batch and, as 'teacher', the logits of a network in evaluation mode."""
  logits = main(as_dict(apply(variables, *inputs_of(batch), train=False)))
  return {**batch, 'teacher': jax.lax.stop_gradient(logits)}
