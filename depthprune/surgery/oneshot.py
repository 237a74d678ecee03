"""Decisions without training: slices are scored once and the lowest are closed.

This is the first thing to try, and the baseline of everything else. L1 and L2 are the
norms of the slices of the kernels that produce them (Li et al., arXiv 1608.08710).
Taylor is the first-order change of a loss when a gate closes (Molchanov et al., arXiv
1906.10771).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from depthprune.program import axes as ax
from depthprune.program import cost
from depthprune.program.coupling import WHY, Coupling, Group
from depthprune.program.trace import paths_of
from depthprune.surgery.plan import widest
from depthprune.timing.layers import TIME, CostFunction, counted

SCORES = ('l1', 'l2', 'random', 'taylor')
SCOPES = ('global', 'uniform')


def oneshot(
  coupling: Coupling,
  variables: Any,
  target: float | str,
  score: str = 'l1',
  scope: str = 'global',
  of: str | CostFunction = 'flops',
  round_to: int = 1,
  grads: Mapping | None = None,
  key: jax.Array | None = None,
) -> dict:
  """Decides which channels to keep so that the network costs what is asked for.

  Nothing is trained. Fine-tune the network after `prune`::

    coupling = dp.couple(model, variables, images, train=False)
    keep = dp.oneshot(coupling, variables, target='50%')
    pruned = dp.prune(model, variables, keep, images, train=False)

  Args:
    coupling: of the network, made by `couple`.
    variables: its arrays.
    target: what the network may cost: a fraction of its cost in (0, 1], a percentage
      such as '50%', or an absolute number above 1.
    score: what decides which channels stay. 'l1' and 'l2' are norms of the kernels,
      'random' needs `key`, 'taylor' needs `grads`.
    scope: 'global' ranks all channels of the network together, after dividing the
      scores of each group by their mean; 'uniform' keeps the same fraction of each
      group.
    of: what is counted: 'flops' (1 MAC = 2 FLOPs), 'params', or 'milliseconds', which
      are measured now, on this device, with a batch of 128. For another batch pass
      `milliseconds(coupling, batch, round_to=round_to)`.
    round_to: widths become multiples of this, and the target counts them so.
    grads: gradient of a loss with respect to `coupling.gates()`, through `plug`.
    key: jax random key.

  Returns:
    {'channels': {group: bool [slices]}} for `prune`. Groups that cannot be gated are
    whole, and every other group keeps at least one slice.

  Raises:
    ValueError: an unknown score, scope or cost; a missing `grads` or `key`; a target
      that cannot be reached; scores that are missing, not one per slice, or not
      finite; or a network of which no group can be gated.
  """
  _check(score, scope, grads, key)
  name, cost_of = counted(coupling, of, round_to)
  scores = rank(coupling, variables, score, grads, key)
  total = cost_of(coupling, None)
  goal = absolute(target, total)
  if not scores:
    raise ValueError(f'no group of this network can be gated; {WHY}')
  price = lambda keep: cost_of(coupling, {'channels': keep})
  keep_at, steps = (_uniform if scope == 'uniform' else _global)(scores, round_to)
  floor = price(keep_at(steps))
  if goal < floor:
    raise ValueError(
      f'target {target} is {goal:.4g} {name}; with at least one slice per group the '
      f'floor is {floor:.4g} ({floor / total:.3f} of {total:.4g}): raise the target'
    )
  low, high = 0, steps  # bisection: price(low) >= goal >= price(high)
  while high - low > 1:
    middle = (low + high) // 2
    low, high = (middle, high) if price(keep_at(middle)) >= goal else (low, middle)
  # Milliseconds fall in steps too large to take the nearest, so they stay below.
  if name == TIME and price(keep_at(low)) > goal:
    return {'channels': keep_at(high)}
  ends = keep_at(low), keep_at(high)
  return {'channels': min(ends, key=lambda keep: abs(price(keep) - goal))}


def absolute(target: float | str, total: float) -> float:
  """Returns a target as an absolute cost.

  Args:
    target: a fraction in (0, 1], a percentage such as '50%', or an absolute number.
    total: cost of the whole network.

  Raises:
    ValueError: the target is none of these, or above the total.
  """
  text = str(target).strip()
  number = float(text[:-1]) / 100 if text.endswith('%') else float(text)
  if 0 < number <= 1:
    return number * total
  if text.endswith('%') or not 1 < number <= total:
    raise ValueError(
      f'target {target}: expected a fraction in (0, 1], a percentage, or an absolute '
      f'number up to {total:.4g}'
    )
  return number


def rank(
  coupling: Coupling,
  variables: Any,
  score: str,
  grads: Mapping | None = None,
  key: jax.Array | None = None,
) -> dict[str, np.ndarray]:
  """Returns the score of every slice of every group that can be gated.

  Args:
    coupling: of the network, made by `couple`.
    variables: its arrays.
    score: 'l1', 'l2', 'random' or 'taylor', as in `oneshot`.
    grads: gradients of the gates, for 'taylor'.
    key: jax random key, for 'random'.

  Returns:
    {group: float [slices]}.

  Raises:
    ValueError: scores of a group are missing, not one per slice, or not finite.
  """
  groups = [g for g in coupling.groups.values() if not g.ungated]
  if key is not None and score == 'random':
    keys = jax.random.split(key, len(groups))
    pairs = zip(groups, keys, strict=True)
    return {g.name: np.asarray(jax.random.uniform(k, (g.size,))) for g, k in pairs}
  if score == 'taylor':
    channels = (grads or {}).get('channels', {})
    scores = {
      g.name: np.abs(widest(channels[g.name])) for g in groups if g.name in channels
    }
  else:
    power, leaves = 1 if score == 'l1' else 2, paths_of(variables)
    scores = {g.name: norms(coupling, leaves, g.name, power) for g in groups}
  for g in groups:
    _check_scores(g, score, scores.get(g.name))
  return scores


def norms(
  coupling: Coupling, leaves: Mapping[str, Any], group: str, power: int = 1
) -> np.ndarray:
  """Returns the p-norm of every slice of a group over the weights that write it.

  A complex weight counts by its modulus.
  Where no kernel is known to write the group, all weights that have its slices count.

  Args:
    coupling: of the network, made by `couple`.
    leaves: its arrays by path.
    group: name of the group.
    power: p, 1 or 2.

  Returns:
    float64 [slices].
  """
  variable, size = coupling.axis(group), coupling.groups[group].size
  members = [m for m in coupling.groups[group].members if np.ndim(leaves[m[0]]) > 1]
  written = [m for m in members if m not in coupling.reads] or members
  total = np.zeros(size)
  for path, axis in written or coupling.groups[group].members:
    at = ax.index_of(coupling.axes[path][axis], variable)
    weight = np.abs(widest(leaves[path])) ** power
    others = tuple(i for i in range(weight.ndim) if i != axis)
    np.add.at(total, at[at >= 0], weight.sum(axis=others)[at >= 0])
  return total ** (1 / power)


def _check_scores(group: Group, score: str, scores: np.ndarray | None):
  by_gates = 'grads is the gradient of a loss by coupling.gates()'
  if scores is None:
    raise ValueError(f"{group.name}: grads['channels'] has no such entry; {by_gates}")
  if scores.shape != (group.size,):
    raise ValueError(
      f'{group.name}: grads has shape {scores.shape}, its slices are {group.size}; '
      f'{by_gates}'
    )
  if bad := int(np.sum(~np.isfinite(scores))):
    where = (
      'grads' if score == 'taylor' else ', '.join(path for path, _ in group.members)
    )
    raise ValueError(
      f'{group.name}: the {score} scores of {bad} of its {group.size} slices are not '
      f'finite ({where}), so they say nothing about which slices to keep; look for an '
      'overflow or a diverged training, and pass finite values'
    )


def _check(score, scope, grads, key):
  for value, allowed, name in ((score, SCORES, 'score'), (scope, SCOPES, 'scope')):
    if value not in allowed:
      raise ValueError(f'{name}={value!r}: expected one of {", ".join(allowed)}')
  if score == 'taylor' and grads is None:
    raise ValueError(
      "score='taylor' needs grads: the gradient of a loss by coupling.gates(), e.g. "
      'jax.grad(lambda g: loss(plug(model, coupling)(variables, g, x)))'
    )
  if score == 'random' and key is None:
    raise ValueError("score='random' needs key, e.g. jax.random.key(0)")


def _uniform(scores: Mapping, round_to: int) -> tuple[Callable, int]:
  """Returns keep_at and its number of steps: step k keeps the fraction 1 - k/steps.

  Groups round at different points, so that the cost falls in small steps.
  """
  steps = 4 * max(s.size for s in scores.values())
  offset = {g: (i + 0.5) / len(scores) for i, g in enumerate(scores)}

  def keep_at(k):
    share = 1 - k / steps
    widths = {g: max(1, int(share * s.size + offset[g])) for g, s in scores.items()}
    return {g: _rounded(s, widths[g], round_to) for g, s in scores.items()}

  return keep_at, steps


def _global(scores: Mapping, round_to: int) -> tuple[Callable, int]:
  """Returns keep_at and its number of steps: step k closes the k lowest slices.

  The best slice of every group is never closed.
  """
  order = []
  for group, s in scores.items():
    relative = s / max(s.mean(), np.finfo(float).tiny)
    best = int(np.argmax(s))
    order += [(relative[i], group) for i in range(s.size) if i != best]
  order.sort()

  def keep_at(k):
    closed = dict.fromkeys(scores, 0)
    for _, group in order[:k]:
      closed[group] += 1
    return {g: _rounded(s, s.size - closed[g], round_to) for g, s in scores.items()}

  return keep_at, len(order)


def _rounded(scores: np.ndarray, width: int, round_to: int) -> np.ndarray:
  """The highest scores, as many as the rounded width. bool [len(scores)]"""
  kept = np.zeros(scores.size, bool)
  width = int(cost.multiple(width, scores.size, round_to))
  kept[np.argsort(-scores, kind='stable')[:width]] = True
  return kept
