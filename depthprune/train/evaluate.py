"""Fresh batch statistics for a network whose weights have changed."""

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from depthprune.data.dataset import inputs_of
from depthprune.distributed import fetch
from depthprune.train.step import apply_of, gated
from depthprune.train.task import Task, Tree, as_dict


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


COLLECTION = 'batch_stats'


def recalibrate(model: Any, variables: Tree, batches: Iterable[Tree]) -> Tree:
  """The variables with batch statistics averaged over `batches`.

  Every statistic becomes the plain mean of its values on the single batches (mean of
  the means, mean of the variances), whatever the momentum of the layers. Give it
  batches augmented as in training: statistics of clean images cost a ResNet-56 on
  CIFAR-10 1.7 points of accuracy, those of augmented ones 0.3.

  Works for any model whose training mode replaces a statistic s by m s + (1 - m) b
  with b taken from the batch; a statistic that does not move (m = 1) stays.

  Args:
    model: a module with `apply(variables, *inputs, train=..., mutable=...)`, or such a
      function. variables: with a 'batch_stats' collection.
    batches: {'image': [batch, ...]}, or texts, of equal size.

  Raises: ValueError when there are no batch statistics, or no batch.
  """
  if not jax.tree.leaves(variables.get(COLLECTION, {})):
    raise ValueError(
      f'recalibrate: the variables have no {COLLECTION!r} collection, got '
      f'{sorted(variables)}; a network without batch normalisation needs none'
    )
  measure = jax.jit(partial(_measure, apply_of(model)))
  total, count = None, 0
  for batch in batches:
    found = measure(variables, *inputs_of(batch))
    total = found if total is None else jax.tree.map(jnp.add, total, found)
    count += 1
  if total is None:
    raise ValueError('recalibrate: expected at least one batch, got none')
  fresh = jax.tree.map(lambda t: t / jnp.asarray(count, t.dtype), total)
  return {**variables, COLLECTION: fresh}


def _measure(apply, variables, *inputs):
  """The statistics of one batch, with the momentum undone."""
  old = variables[COLLECTION]

  def updated(stats):
    collections = {**variables, COLLECTION: stats}
    rngs = {'dropout': jax.random.key(0)}
    return apply(collections, *inputs, train=True, mutable=[COLLECTION], rngs=rngs)[1][
      COLLECTION
    ]

  # In s -> m s + (1 - m) b the slope is m, and (1 - m) b is what becomes of zero.
  zero, one = jax.tree.map(jnp.zeros_like, old), jax.tree.map(jnp.ones_like, old)
  moved, momentum = jax.jvp(updated, (zero,), (one,))

  def undo(s, moved, m):
    return jnp.where(m == 1, s, moved / jnp.where(m == 1, jnp.ones_like(m), 1 - m))

  return jax.tree.map(undo, old, moved, momentum)
