"""The `Method` type: a handful of pure functions over a tree of gates.

Methods differ only in these functions; the training step, the loop and the surgery are
the same for all of them. `theta` is what a method trains besides the weights, often the
gates themselves. The optimizer always sees {'params': weights, 'theta': theta}.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, NamedTuple

from etils import epy

with epy.lazy_imports():  # the command line's --help imports methods, but no jax
  import jax
  import jax.numpy as jnp
  import numpy as np
  import optax

  from depthprune.program import arguments, gating
  from depthprune.program import axes as ax
  from depthprune.program.coupling import Coupling
  from depthprune.train.task import Task, Tree


class CutRefused(ValueError):
  """A cut would cost too much accuracy; the message says how to force it."""


def supervised(task: Task, outputs: Tree, batch: Tree, theta: Tree, step: jax.Array):
  """Returns the task's own loss and metrics of the network's answer."""
  del theta, step
  logits = task.answer(outputs)
  return task.loss(logits, batch), task.metrics(logits, batch)


def exit_metrics(
  task: Task, own: Tree, outputs: Tree, batch: Tree, names: Sequence[str]
) -> dict[str, jax.Array]:
  """Returns the metrics of the network's answer, and of exits as '<metric>_<exit>'."""
  metrics = task.metrics(own, batch)
  for name in names:
    of_exit = task.metrics(outputs[name], batch)
    metrics |= {f'{metric}_{name}': value for metric, value in of_exit.items()}
  return metrics


def no_stats(gates: Tree, gate_grads: Tree, outputs: Tree, batch: Tree) -> Tree:
  """Observes nothing, which spares `init_state` the shape of a batch."""
  del gates, gate_grads, outputs, batch
  return {}


class Method(NamedTuple):
  """One way to decide what to cut from a network, as pure functions.

  Every function has a default, and the defaults together are plain supervised training.
  `theta` is the tree that the method trains besides the weights, and `gates` is
  {'channels': {group: [n]}, 'branches': {path: ()}}. A method of one's own:

      Method(
        init=lambda gates, outputs: gates,  # theta is the gates
        forward=lambda theta, key, step: theta,
        penalty=lambda theta, step: 1e-3 * sum(
          jnp.abs(g).sum() for g in theta['channels'].values()
        ),
        decide=lambda theta, stats, evaluate: {
          'channels': {name: g > 0.1 for name, g in theta['channels'].items()}
        },
      )

  Attributes:
    objective: (task, outputs, batch, theta, step) -> (loss, metrics). `outputs` are the
      network's outputs by name; `task` turns logits into loss and metrics. By default
      the task's own loss.
    decide: (theta, stats, evaluate) -> keep, a tree like gates of bool, with {name:
      bool} of the exits as 'exits'; parts that are left out are kept. evaluate(keep) is
      {'loss', 'accuracy', ...} of the masked network on held-out data, see `judge`.
    penalty: (theta, step) -> scalar that is added to the loss through the optimizer;
      None for no penalty.
    init: (gates, outputs) -> theta at the start. `gates` are open gates for all that
      can be gated, as `Coupling.gates` gives them; `outputs` are abstract arrays, whose
      names say which exits there are.
    forward: (theta, key, step) -> the gates that the network runs with. `key` is None
      in evaluation, where gates have no noise: they are as the cut will leave them.
    observe: (gates, gate_grads, outputs, batch) -> stats, which are averaged over steps
      and passed to `decide`.
    transform: (tx) -> the optimizer of {'params', 'theta'}, for learning rates of the
      method's own or frozen parts.
    trunk_train: whether the network runs in training mode. False uses stored batch
      statistics and no dropout; freezing parameters is left to `transform`.
    rounds: how many times the network is still to be trained and cut.
    answer: (task, outputs, theta) -> the logits that are the network's answer before
      the cut.
    report: (theta) -> nested dict of arrays that were learnt, for the records of a run.
  """

  objective: Callable[..., tuple[jax.Array, dict[str, jax.Array]]] = supervised
  decide: Callable[[Tree, Tree, Callable[[Tree], Any]], Tree] = (
    lambda theta, stats, evaluate: {}
  )
  penalty: Callable[[Tree, jax.Array], jax.Array] | None = None
  init: Callable[[Tree, Tree], Tree] = lambda gates, outputs: {}
  forward: Callable[[Tree, jax.Array | None, jax.Array], Tree] = (
    lambda theta, key, step: {}
  )
  observe: Callable[[Tree, Tree, Tree, Tree], Tree] = no_stats
  transform: Callable[[optax.GradientTransformation], optax.GradientTransformation] = (
    lambda tx: tx
  )
  trunk_train: bool = True
  rounds: int = 1
  answer: Callable[[Task, Tree, Tree], Tree] = lambda task, outputs, theta: task.answer(
    outputs
  )
  report: Callable[[Tree], Tree] = lambda theta: {}


def checked(method: Any) -> Method:
  """Returns an argument that has to be a Method; raises TypeError if it is none."""
  expected = 'a Method, as netcut(...) or trainable_gates(...) return it'
  return arguments.kind_of('method', method, Method, expected)


def plain() -> Method:
  """Returns the method that trains the weights as usual and cuts nothing."""
  return Method()


def optimizer(
  method: Method, tx: optax.GradientTransformation
) -> optax.GradientTransformationExtraArgs:
  """Returns an optimizer with the method's own learning rates and penalty.

  `make_step` and `init_state` do this by themselves; it is needed in a loop of your
  own that calls `tx.update`. Further arguments of `update`, such as value=loss, reach
  `tx`; optimizers that take none ignore them.

  Args:
    method: the method; its `transform` and its `penalty` are used.
    tx: optax optimizer of the weights.

  Returns:
    An optimizer of the tree {'params': weights, 'theta': what the method trains}.
  """
  tx = checked(method).transform(_with_extra(arguments.optimizer(tx)))
  if method.penalty is not None:
    tx = add_penalty(tx, method.penalty, where=lambda trained: trained['theta'])
  return optax.with_extra_args_support(tx)


def apart(
  params_tx: optax.GradientTransformation, theta_tx: optax.GradientTransformation
) -> optax.GradientTransformation:
  """Returns an optimizer of {'params', 'theta'} with one transformation for each."""
  labels = {'params': 'params', 'theta': 'theta'}
  return partitioned({'params': params_tx, 'theta': theta_tx}, labels)


def partitioned(
  parts: Mapping[Hashable, optax.GradientTransformation], labels: Any
) -> optax.GradientTransformation:
  """Returns `optax.multi_transform`, in whose parts line searches work too.

  Args:
    parts: {label: optimizer of the parameters with that label}.
    labels: a tree of labels that is a prefix of the parameters, or a function that
      returns it.
  """
  tx = optax.multi_transform(parts, labels, mask_compatible_extra_args=True)
  masked = lambda x: isinstance(x, optax.MaskedNode)

  def update(updates, state, params=None, *, value_fn=None, **extra):
    if value_fn is not None:  # a part knows its own parameters, the loss needs all
      others = lambda part, whole: whole if masked(part) else part
      extra['value_fn'] = functools.wraps(value_fn)(
        lambda part, *args, **kwargs: value_fn(
          jax.tree.map(others, part, params, is_leaf=masked), *args, **kwargs
        )
      )
    return tx.update(updates, state, params, **extra)

  return optax.GradientTransformationExtraArgs(tx.init, update)


class PenaltyState(NamedTuple):
  """State of `add_penalty`: number of updates, and the wrapped optimizer's state."""

  step: jax.Array  # int32 scalar
  inner: optax.OptState


def add_penalty(
  tx: optax.GradientTransformation,
  penalty: Callable[[Any, jax.Array], jax.Array],
  where: Callable[[Any], Any] = lambda params: params,
) -> optax.GradientTransformation:
  """Returns an optimizer that minimises loss + penalty(where(params), step).

  It adds the gradient of the penalty in `update`, so an existing training loop needs no
  other change. What `update` is passed for line searches (value, grad, value_fn)
  becomes that of the sum:

      gates = lambda params: params['gates']
      tx = add_penalty(tx, lambda g, step: 1e-3 * jnp.abs(g).sum(), where=gates)

  Args:
    tx: the optimizer to wrap; it sees the sum of both gradients.
    penalty: (subtree, step) -> scalar; step is int32 and counts updates from 0.
    where: (params) -> the subtree that the penalty depends on; by default all of it.

  Returns:
    An optax optimizer, whose `update` has to be called with params.

  Raises:
    ValueError: from `update`, if it is called without params.
  """

  arguments.optimizer(tx)
  of = 'a function of the parameters'
  arguments.function('penalty', penalty, of + ' and the step')
  arguments.function('where', where, of)

  def init(params):
    return PenaltyState(jnp.zeros((), jnp.int32), tx.init(params))

  def update(updates, state, params=None, **extra):
    params = _required(params, 'add_penalty')
    added = lambda tree: penalty(where(tree), state.step)
    size, slope = jax.value_and_grad(added)(params)
    plus = lambda grads: jax.tree.map(lambda g, s: g + s.astype(g.dtype), grads, slope)
    updates = plus(updates)
    if extra.get('value') is not None:
      extra['value'] += size.astype(jnp.result_type(extra['value']))
    if extra.get('grad') is not None:
      extra['grad'] = plus(extra['grad'])
    if (loss := extra.get('value_fn')) is not None:
      extra['value_fn'] = functools.wraps(loss)(
        lambda tree, *args, **kwargs: loss(tree, *args, **kwargs) + added(tree)
      )
    updates, inner = _update(tx, updates, state.inner, params, extra)
    return updates, PenaltyState(state.step + 1, inner)

  return optax.GradientTransformationExtraArgs(init, update)


def spare_closed(
  tx: optax.GradientTransformation, openness: Callable[[Any], Any]
) -> optax.GradientTransformation:
  """Returns an optimizer whose weight decay spares the slices behind closed gates.

  A slice behind a closed gate has no gradient, so weight decay alone would shrink it,
  and a gate that reopens would find nothing. The wrapped optimizer is passed
  openness(params) * params, from which optax computes weight decay: in AdamW, Lion, or
  a chain with `add_decayed_weights`. Optimizers with a trust ratio then measure the
  norm of the open part.

  Args:
    tx: the optimizer to wrap.
    openness: (params) -> tree of factors that broadcast to params, 0 for closed slices
      and 1 for open ones; `train.method.openness` computes it from gates.

  Returns:
    An optax optimizer, whose `update` has to be called with params.

  Raises:
    ValueError: from `update`, if it is called without params.
  """

  arguments.optimizer(tx)
  arguments.function('openness', openness, 'a function of the parameters')

  def update(updates, state, params=None, **extra):
    params = _required(params, 'spare_closed')
    open_part = jax.tree.map(
      lambda p, f: p * jnp.asarray(f, p.dtype), params, openness(params)
    )
    if (loss := extra.get('value_fn')) is not None:  # of the parameters as they are
      closed_part = jax.tree.map(jnp.subtract, params, open_part)
      extra['value_fn'] = functools.wraps(loss)(
        lambda tree, *args, **kwargs: loss(
          jax.tree.map(jnp.add, tree, closed_part), *args, **kwargs
        )
      )
    return _update(tx, updates, state, open_part, extra)

  return optax.GradientTransformationExtraArgs(tx.init, update)


def openness(coupling: Coupling, gates: Any, params: Any) -> Any:
  """Computes how open every slice of every parameter is, from the gates around it.

  Args:
    coupling: the network's coupling.
    gates: {'channels': {group: [n]}, 'branches': {path: () or [layers]}}; what it does
      not name is open.
    params: the coupled variables, or the tree under 'params' of them.

  Returns:
    A tree like params of products of gates, which broadcast to its leaves.

  Raises:
    ValueError: params has an array that the coupled variables do not have.
  """
  channels = gates.get('channels', {}).items()
  weights: dict[ax.Axis, Any] = {coupling.axis(g): w for g, w in channels}
  inside: dict[str, list[jax.Array]] = {}  # the gates of the branches around an array
  for branch, gate in gates.get('branches', {}).items():
    if layers := coupling.axes[f'branches/{branch}']:  # open where any branch is
      layer = ax.norm(layers[0])
      weights[layer] = jnp.maximum(gate, weights.get(layer, 0))
      continue
    closed = {'branches': {branch: np.asarray(False)}}
    for path in coupling.decision(closed).dead:
      inside.setdefault(path, []).append(gate)

  def factor(path, leaf):
    name = jax.tree_util.keystr(path, simple=True, separator='/')
    product = jnp.ones((), jnp.float32)
    full = f'params/{name}' if f'params/{name}' in coupling.axes else name
    axes = coupling.axes.get(full)
    if axes is None:
      raise ValueError(
        f'optimizer: {name} is none of the arrays that were coupled '
        f"({', '.join([*coupling.axes][:3])}, ...); train {{'params': variables, or "
        "variables['params'], 'theta': theta}"
      )
    for i, axis in enumerate(axes):
      gate = gating.expand(axis, weights)
      if gate is not None:
        product = product * gate.reshape(
          [-1 if k == i else 1 for k in range(leaf.ndim)]
        )
    for gate in inside.get(full, ()):
      product = product * gate
    return product

  return jax.tree_util.tree_map_with_path(factor, params)


def _update(tx, grads, state, params, extra):
  return _with_extra(tx).update(grads, state, params, **extra)


def _with_extra(tx: Any) -> optax.GradientTransformationExtraArgs:
  """tx, whose update takes further arguments, as that of `optax.MultiSteps` does.

  Its type does not say so, and optax would leave them out.
  """
  of: Any = getattr(tx.update, '__self__', None)
  if isinstance(of, optax.MultiSteps):
    update: Any = of.update
    return optax.GradientTransformationExtraArgs(of.init, update)
  return optax.with_extra_args_support(tx)


def _required(params: Any, who: str) -> Any:
  if params is None:
    raise ValueError(
      f'{who}: expected the parameters, got None; call '
      'tx.update(grads, state, params) with all three'
    )
  return params
