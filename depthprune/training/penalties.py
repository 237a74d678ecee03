"""Penalties, applied through optax: two lines in anybody's training loop.

  tx = add_penalty(optax.adam(1e-3), penalty, where=lambda params: params['gates'])
  tx = spare_closed(tx, lambda params: openness(coupling, gates, params))

The first adds a penalty to the loss, the second keeps weight decay off closed slices.
Both wrap a complete optimizer, keep its state as theirs, and need `params` in
`tx.update(grads, state, params)`.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from depthprune.program.couple import Coupling
from depthprune.program.plug import expand


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
      gate = expand(axis, weights)
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
