"""Distillation: the network before the cut teaches the one after it.

Hinton, Vinyals, Dean: "Distilling the Knowledge in a Neural Network" (2015,
arXiv 1503.02531), wrapped around the objective of any method.

  L = (1 - a) L_method + a T^2 KL( p_teacher(T) || p_student(T) )

`make_step(..., teacher=apply)` runs the teacher on every batch, with arrays that are
an argument of the step, and leaves its logits in `batch['teacher']`. Divergences of
several tasks are added, those of pixels averaged (of unlabelled ones too).
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from depthprune.data.dataset import inputs_of
from depthprune.train.method import Method
from depthprune.train.task import Task, Tree, as_dict, main, mean


class Teacher(NamedTuple):
  """A network to learn from: apply(variables, *inputs) -> its answer."""

  apply: Callable[..., Any]
  variables: Tree


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
    soft = lambda logits: task.log_probs(jax.tree.map(lambda z: z / T, logits))
    q, p = soft(method.answer(task, outputs, theta)), soft(batch['teacher'])
    divergence = sum(jax.tree.leaves(jax.tree.map(partial(_divergence, batch), p, q)))
    loss = (1 - weight) * loss + weight * T**2 * divergence
    return loss, {**metrics, 'distillation': divergence}

  return method._replace(objective=objective)


def _divergence(batch: Tree, p: jax.Array, q: jax.Array) -> jax.Array:
  """Mean over the examples, and where there are any over their pixels."""
  each = (jnp.exp(p) * (p - q)).sum(-1)
  return mean(each.mean(range(1, each.ndim)) if each.ndim > 1 else each, batch)


def with_teacher(
  apply: Any,
  variables: Any,
  batch: dict[str, Any],
  answer: Callable[[Tree], Tree] = main,
) -> dict[str, Any]:
  """The batch and, as 'teacher', the logits of a network in evaluation mode."""
  logits = answer(as_dict(apply(variables, *inputs_of(batch), train=False)))
  return {**batch, 'teacher': jax.lax.stop_gradient(logits)}
