"""A network measured on a whole split."""

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from depthprune.training.mesh import fetch
from depthprune.training.method import Tree, as_dict, inputs_of
from depthprune.training.step import gated
from depthprune.training.tasks import Task


def evaluate(
  model: Any,
  variables: Tree,
  batches: Iterable[Tree],
  task: Task,
  coupling: Any = None,
  gates: Tree | None = None,
) -> dict[str, float]:
  """Scores of the network's answer in evaluation mode, over all examples.

  They are the task's: {'loss', 'accuracy', ...}.

  Args:
    model: a module with `apply`, or such a function (a Pruned's `apply`).
    variables: its variables.
    batches: batches, each shape compiled once; 'weight' [batch] is 0 where one was
      padded.
    task: what is measured.
    coupling, gates: a coupling and gates (or a keep tree) to mask the network by.

  Raises: ValueError when there is no batch.
  """
  return evaluator(model, task, coupling)(variables, batches, gates)


def evaluator(
  model: Any,
  task: Task,
  coupling: Any = None,
  answer: Callable[[Tree], Tree] | None = None,
) -> Callable[..., dict[str, float]]:
  """measure(variables, batches, gates=None): `evaluate`, compiled once for many.

  answer: (outputs) -> logits, what is measured; the task's answer by default.
  """
  answer = answer or task.answer
  measure = jax.jit(partial(totals, gated(model, coupling), task, answer))

  def over(variables: Tree, batches: Iterable[Tree], gates: Tree | None = None):
    gates = jax.tree.map(lambda g: jnp.asarray(g, jnp.float32), gates or {})
    sums = [measure(variables, gates, batch) for batch in batches]
    if not sums:
      raise ValueError(
        'evaluate: expected at least one batch, got none; is the split empty?'
      )
    return {name: float(x) for name, x in task.scores(added(sums)).items()}

  return over


def totals(run, task: Task, answer, variables, gates, batch) -> Tree:
  """The task's sums over the examples of one batch."""
  logits = answer(as_dict(run(variables, gates, *inputs_of(batch), train=False)))
  return task.sums(logits, batch)


def added(sums: Sequence[Tree]) -> Tree:
  """The sums of several batches, added in float64, numpy."""
  exact = lambda *batches: sum(np.asarray(x, np.float64) for x in batches)
  return jax.tree.map(exact, *fetch(sums))
