"""A pruning method: a handful of pure functions over a tree of gates.

Everything that tells one paper from another is in these functions; the training step,
the loop and the surgery are the same for all of them. `theta` is what a method trains
besides the weights (often the gates themselves), and the trainable tree that the
optimizer sees is always `{'params': weights, 'theta': theta}`.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, NamedTuple

from etils import epy

with epy.lazy_imports():  # the command line reads the files of methods for its help
  import jax
  import jax.numpy as jnp
  import optax

  from depthprune.program import gating
  from depthprune.program.coupling import Coupling
  from depthprune.train.task import Task, Tree


class CutRefused(ValueError):
  """A decision that would cost too much; says how much, and how to force it."""


def supervised(task: Task, outputs: Tree, batch: Tree, theta: Tree, step: jax.Array):
  """The task's own loss and metrics on the network's answer."""
  del theta, step
  logits = task.answer(outputs)
  return task.loss(logits, batch), task.metrics(logits, batch)


def exit_metrics(
  task: Task, own: Tree, outputs: Tree, batch: Tree, names: Sequence[str]
) -> dict[str, jax.Array]:
  """The metrics of the network's own logits, and of exits as '<metric>_<exit>'."""
  metrics = task.metrics(own, batch)
  for name in names:
    found = task.metrics(outputs[name], batch)
    metrics |= {f'{metric}_{name}': value for metric, value in found.items()}
  return metrics


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


def no_gates(theta: Tree, key: jax.Array | None, step: jax.Array) -> Tree:
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
    forward: (theta, key, step) -> gates that the forward pass uses. Without a key
      (None) those of evaluation: the judge, the cut and folding use no noise.
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
  forward: Callable[[Tree, jax.Array | None, jax.Array], Tree] = no_gates
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


class PenaltyState(NamedTuple):
  step: jax.Array  # int32 scalar: number of updates so far
  inner: optax.OptState


def whole(params: Any) -> Any:
  return params


def add_penalty(
  tx: optax.GradientTransformation,
  penalty: Callable[[Any, jax.Array], jax.Array],
  where: Callable[[Any], Any] = whole,
) -> optax.GradientTransformation:
  """tx, minimising loss + penalty(where(params), step).

  Args:
    tx: the optimizer to wrap; it sees the sum of both gradients.
    penalty: (subtree, step) -> scalar; step counts updates from 0, int32.
    where: selects the subtree of params that the penalty depends on.

  Raises: ValueError from `update` without params.
  """

  def init(params):
    return PenaltyState(jnp.zeros((), jnp.int32), tx.init(params))

  def update(updates, state, params=None, **extra):
    params = _given(params, 'add_penalty')
    slope = jax.grad(lambda tree: penalty(where(tree), state.step))(params)
    updates = jax.tree.map(lambda g, s: g + s.astype(g.dtype), updates, slope)
    updates, inner = _update(tx, updates, state.inner, params, extra)
    return updates, PenaltyState(state.step + 1, inner)

  return optax.GradientTransformationExtraArgs(init, update)


def spare_closed(
  tx: optax.GradientTransformation, openness: Callable[[Any], Any]
) -> optax.GradientTransformation:
  """tx, with its weight decay scaled slice by slice.

  A slice behind a closed gate has no gradient, so weight decay alone would shrink it,
  and a gate that reopens would find nothing. optax computes weight decay from the
  `params` given to `update`, so giving it `openness * params` there is enough, in
  AdamW, LION, or a chain with `add_decayed_weights`. (Optimizers with a trust ratio
  then measure the norm of the open part.)

  Args:
    tx: the optimizer to wrap.
    openness: (params) -> tree of factors shaped like (or broadcasting to) params.

  Raises: ValueError from `update` without params.
  """

  def update(updates, state, params=None, **extra):
    params = _given(params, 'spare_closed')
    open_part = jax.tree.map(
      lambda p, f: p * jnp.asarray(f, p.dtype), params, openness(params)
    )
    return _update(tx, updates, state, open_part, extra)

  return optax.GradientTransformationExtraArgs(tx.init, update)


def openness(coupling: Coupling, gates: Any, params: Any) -> Any:
  """How open every slice of every parameter is: the product of the gates of its axes.

  Args:
    coupling: of the network. gates: {'channels': {group: [n]}}; other parts are not
      looked at. params: the tree under 'params' of the coupled variables.

  Returns: a tree like params, of factors that broadcast to its leaves.
  """
  weights = {coupling.axis(g): w for g, w in gates.get('channels', {}).items()}

  def factor(path, leaf):
    name = jax.tree_util.keystr(path, simple=True, separator='/')
    product = jnp.ones((), jnp.float32)
    for i, axis in enumerate(coupling.axes[f'params/{name}']):
      gate = gating.expand(axis, weights)
      if gate is not None:
        product = product * gate.reshape(
          [-1 if k == i else 1 for k in range(leaf.ndim)]
        )
    return product

  return jax.tree_util.tree_map_with_path(factor, params)


def _update(tx, grads, state, params, extra):
  return optax.with_extra_args_support(tx).update(grads, state, params, **extra)


def _given(params: Any, who: str) -> Any:
  if params is None:
    raise ValueError(
      f'{who}: expected the parameters, got None; call '
      'tx.update(grads, state, params) with all three'
    )
  return params
