"""A network measured on a whole split."""

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from depthprune.training.method import Tree, as_dict, inputs_of, main
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
  """Loss and metrics of the network's answer in evaluation mode, over all examples.

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
  answer: Callable[[Tree], jax.Array] = main,
) -> Callable[..., dict[str, float]]:
  """measure(variables, batches, gates=None): `evaluate`, compiled once for many.

  answer: (outputs) -> logits, what is measured; 'main', or the only exit, by default.
  """
  measure = jax.jit(partial(totals, gated(model, coupling), task, answer))

  def over(variables: Tree, batches: Iterable[Tree], gates: Tree | None = None):
    gates = jax.tree.map(lambda g: jnp.asarray(g, jnp.float32), gates or {})
    sums = [measure(variables, gates, batch) for batch in batches]
    if not sums:
      raise ValueError(
        'evaluate: expected at least one batch, got none; is the split empty?'
      )
    total = jax.tree.map(lambda *xs: sum(map(float, xs)), *jax.device_get(sums))
    examples = max(total.pop('examples'), 1e-9)
    return {name: value / examples for name, value in total.items()}

  return over


def totals(run, task: Task, answer, variables, gates, batch) -> dict[str, jax.Array]:
  """Sums over the examples of one batch, and their number."""
  logits = answer(as_dict(run(variables, gates, *inputs_of(batch), train=False)))
  size = jnp.asarray(batch['label'].shape[0], jnp.float32)
  examples = batch['weight'].sum() if 'weight' in batch else size
  means = {'loss': task.loss(logits, batch), **task.metrics(logits, batch)}
  return {'examples': examples, **{k: v * examples for k, v in means.items()}}
