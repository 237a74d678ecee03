"""A pruning method: a handful of pure functions over a tree of gates.

Everything that tells one paper from another is in these functions; the training step,
the loop and the surgery are the same for all of them. `theta` is what a method trains
besides the weights (often the gates themselves), and the trainable tree that the
optimizer sees is always `{'params': weights, 'theta': theta}`.
"""

from collections.abc import Callable, Hashable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
import optax

from depthprune.training.penalties import add_penalty
from depthprune.training.task import Task as Task
from depthprune.training.task import Tree as Tree
from depthprune.training.task import main as main

INPUTS = ('image', 'tokens', 'mask', 'types', 'features')
"""What of a batch a network may read, in the order in which it takes them."""


class CutRefused(ValueError):
  """A decision that would cost too much; says how much, and how to force it."""


def supervised(task: Task, outputs: Tree, batch: Tree, theta: Tree, step: jax.Array):
  """The task's own loss and metrics on the network's answer."""
  del theta, step
  logits = task.answer(outputs)
  return task.loss(logits, batch), task.metrics(logits, batch)


def answer_of_task(task: Task, outputs: Tree, theta: Tree) -> Tree:
  del theta
  return task.answer(outputs)


def nothing_to_say(theta: Tree) -> Tree:
  del theta
  return {}


def keep_everything(theta: Tree, stats: Tree, evaluate: Callable[[Tree], Any]) -> Tree:
  """The decision that cuts nothing: an empty keep tree."""
  del theta, stats, evaluate
  return {}


def no_theta(gates: Tree, outputs: Tree) -> Tree:
  del gates, outputs
  return {}


def no_gates(theta: Tree, key: jax.Array, step: jax.Array) -> Tree:
  del theta, key, step
  return {}


def no_stats(gates: Tree, gate_grads: Tree, outputs: Tree, batch: Tree) -> Tree:
  del gates, gate_grads, outputs, batch
  return {}


class Method(NamedTuple):
  """One way to decide what to cut. The defaults are plain supervised training.

  Attributes:
    objective: (task, outputs, batch, theta, step) -> (loss, metrics). `outputs` is the
      network's dict of outputs; `task` turns logits into loss and metrics.
    decide: (theta, stats, evaluate) -> keep; `evaluate` is a Judge: evaluate(keep) is
      {'loss', 'accuracy', ...} of the network masked by keep on held-out data.
    penalty: (theta, step) -> scalar, what depends on theta alone; its gradient is added
      through optax. None: no penalty.
    init: (gates, outputs) -> theta; outputs are abstract, their names say which exits
      there are.
    forward: (theta, key, step) -> gates that the forward pass uses.
    observe: (gates, gate_grads, outputs, batch) -> stats, averaged over steps.
    transform: (tx) -> tx for {'params', 'theta'}: own learning rates, frozen parts.
    trunk_train: False runs the network in evaluation mode (stored batch statistics, no
      dropout); which parameters then stay as they are is up to `transform`.
    rounds: how many times fit, decide, prune are to be done, this time included.
    answer: (task, outputs, theta) -> logits: what the network says before the cut.
    report: (theta) -> nested dict of arrays: what was learnt, to be recorded.
  """

  objective: Callable[..., tuple[jax.Array, dict[str, jax.Array]]] = supervised
  decide: Callable[[Tree, Tree, Callable[[Tree], Any]], Tree] = keep_everything
  penalty: Callable[[Tree, jax.Array], jax.Array] | None = None
  init: Callable[[Tree, Tree], Tree] = no_theta
  forward: Callable[[Tree, jax.Array, jax.Array], Tree] = no_gates
  observe: Callable[[Tree, Tree, Tree, Tree], Tree] = no_stats
  transform: Callable[[optax.GradientTransformation], optax.GradientTransformation] = (
    lambda tx: tx
  )
  trunk_train: bool = True
  rounds: int = 1
  answer: Callable[[Task, Tree, Tree], Tree] = answer_of_task
  report: Callable[[Tree], Tree] = nothing_to_say


def plain() -> Method:
  """Ordinary training of the weights: no gates, nothing is cut."""
  return Method()


def optimizer(
  method: Method, tx: optax.GradientTransformation
) -> optax.GradientTransformation:
  """tx as the method wants it: transformed, and with the method's penalty.

  Works on {'params': weights, 'theta': theta}.
  """
  tx = method.transform(tx)
  if method.penalty is not None:
    tx = add_penalty(tx, method.penalty, where=lambda trained: trained['theta'])
  return tx


def apart(
  params_tx: optax.GradientTransformation, theta_tx: optax.GradientTransformation
) -> optax.GradientTransformation:
  """An optimizer for {'params', 'theta'} that treats the two each in its own way."""
  parts: Mapping[Hashable, Any] = {'params': params_tx, 'theta': theta_tx}
  return optax.multi_transform(parts, {'params': 'params', 'theta': 'theta'})


def inputs_of(batch: Mapping[str, Tree]) -> tuple[Tree, ...]:
  """What the network reads of a batch: `apply(variables, *inputs_of(batch))`.

  Of images: (image [batch, height, width, channels],). Of texts: (tokens int32
  [batch, length], mask bool [batch, length]) and, of pairs, types int32 [batch,
  length]. Of precomputed features: ({name: [batch, n]},).

  Raises: ValueError for a batch without any of them.
  """
  found = tuple(batch[name] for name in INPUTS if name in batch)
  if not found:
    raise ValueError(
      f'batch: expected an entry for the network to read ({", ".join(INPUTS)}), got '
      f'{", ".join(batch) or "none"}'
    )
  return found


def real_rows(batch: Mapping[str, Tree]) -> np.ndarray:
  """Which examples of a batch are no padding: bool [batch]."""
  weight = batch.get('weight')
  return (
    np.ones(len(batch['label']), bool) if weight is None else np.asarray(weight) > 0
  )


def as_dict(outputs: Any) -> dict[str, Any]:
  """A network's outputs by name; a single array is 'main'."""
  return dict(outputs) if hasattr(outputs, 'keys') else {'main': outputs}
