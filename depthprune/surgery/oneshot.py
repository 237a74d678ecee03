"""Decisions without training: score every slice once, close the lowest to a target.

The first thing to try, and the control of everything else. L1 and L2 are the norms of
the producing kernels' slices (Li et al., arXiv 1608.08710); Taylor is the first-order
change of a loss when a gate closes (Molchanov et al., arXiv 1906.10771).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from depthprune.program import axes as ax
from depthprune.program import cost
from depthprune.program.coupling import Coupling
from depthprune.program.trace import paths_of
from depthprune.timing.layers import TIME, Cost, counted

SCORES = ('l1', 'l2', 'random', 'taylor')
SCOPES = ('global', 'uniform')


def oneshot(
  coupling: Coupling,
  variables: Any,
  target: float | str,
  score: str = 'l1',
  scope: str = 'global',
  of: str | Cost = 'flops',
  round_to: int = 1,
  grads: Mapping | None = None,
  key: jax.Array | None = None,
) -> dict:
  """keep = {'channels': {group: bool [n]}} that reaches a cost target.

  target: kept fraction of the cost in (0, 1], '50%', or an absolute number above 1.
  score: 'l1' | 'l2' | 'random' (needs key) | 'taylor' (needs grads: the gradient of a
    loss by the gates, a tree like coupling.gates(), through `plug`).
  scope: 'global' ranks all slices together, each group's scores divided by their mean;
    'uniform' keeps the same fraction of every group. of: 'flops' |
    'params' | 'milliseconds', measured now on this device for a batch of 128; for
    another, `milliseconds(coupling, batch, round_to=round_to)`.
  round_to: widths become multiples of it, and the target counts them so.
  Groups that cannot be gated keep all slices; every other group keeps at least one.

  Raises: ValueError for wrong arguments, or a target below what can be reached."""
  _check(score, scope, grads, key)
  name, C = counted(coupling, of, round_to)
  scores = rank(coupling, variables, score, grads, key)
  total = C(coupling, None)
  goal = absolute(target, total)

  def price(keep):
    return C(coupling, {'channels': keep})

  choose = _uniform if scope == 'uniform' else _global
  if not scores:
    raise ValueError('no group of this network can be gated: see coupling.explain()')
  keep_at, steps = choose(scores, round_to)
  floor = price(keep_at(steps))
  if goal < floor:
    raise ValueError(
      f'target {target} is {goal:.4g} {name}; with at least one slice per group the '
      f'floor is {floor:.4g} ({floor / total:.3f} of {total:.4g}): ask for more'
    )
  return {'channels': _nearest(keep_at, steps, price, goal, name == TIME)}


def absolute(target: float | str, total: float) -> float:
  """A target as an absolute cost. Raises: ValueError outside (0, 1] or the total."""
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
  """The score of every slice of every group that can be gated. {group: float [n]}"""
  groups = [g for g in coupling.groups.values() if not g.ungated]
  if key is not None and score == 'random':
    keys = jax.random.split(key, len(groups))
    pairs = zip(groups, keys, strict=True)
    return {g.name: np.asarray(jax.random.uniform(k, (g.size,))) for g, k in pairs}
  if score == 'taylor':
    channels = (grads or {})['channels']
    return {g.name: np.abs(np.asarray(channels[g.name], np.float64)) for g in groups}
  power = 1 if score == 'l1' else 2
  leaves = paths_of(variables)
  return {g.name: norms(coupling, leaves, g.name, power) for g in groups}


def norms(
  coupling: Coupling, leaves: Mapping[str, Any], group: str, power: int = 1
) -> np.ndarray:
  """The p-norm of every slice of a group over the weights that write it. [n]

  Where no kernel is known to write it, over all weights that have the slice."""
  variable, size = coupling.axis(group), coupling.groups[group].size
  members = [m for m in coupling.groups[group].members if np.ndim(leaves[m[0]]) > 1]
  written = [m for m in members if m not in coupling.reads] or members
  total = np.zeros(size)
  for path, axis in written or coupling.groups[group].members:
    at = ax.index_of(coupling.axes[path][axis], variable)
    weight = np.abs(np.asarray(leaves[path], np.float64)) ** power
    others = tuple(i for i in range(weight.ndim) if i != axis)
    np.add.at(total, at[at >= 0], weight.sum(axis=others)[at >= 0])
  return total ** (1 / power)


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


def _top(scores: np.ndarray, n: int) -> np.ndarray:
  """The n highest. bool [len(scores)]"""
  kept = np.zeros(scores.size, bool)
  kept[np.argsort(-scores, kind='stable')[:n]] = True
  return kept


def _uniform(scores: Mapping, round_to: int) -> tuple[Callable, int]:
  """keep_at(k): every group keeps the fraction 1 - k/steps of its slices.

  Groups round at different points, so that the cost falls in small steps."""
  steps = 4 * max(s.size for s in scores.values())
  offset = {g: (i + 0.5) / len(scores) for i, g in enumerate(scores)}

  def keep_at(k):
    part = 1 - k / steps
    widths = {g: max(1, int(part * s.size + offset[g])) for g, s in scores.items()}
    return {g: _rounded(s, widths[g], round_to) for g, s in scores.items()}

  return keep_at, steps


def _global(scores: Mapping, round_to: int) -> tuple[Callable, int]:
  """keep_at(k): the k lowest slices closed, the best of every group never."""
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
  return _top(scores, int(cost.multiple(width, scores.size, round_to)))


def _nearest(
  keep_at: Callable, steps: int, price: Callable, goal: float, jumps: bool
) -> dict:
  """Bisects for the step whose price is nearest to the goal; price falls with k.

  jumps: by much; then the one that is not above the goal.
  """
  low, high = 0, steps  # price(low) >= goal >= price(high)
  while high - low > 1:
    middle = (low + high) // 2
    low, high = (middle, high) if price(keep_at(middle)) >= goal else (low, middle)
  if jumps and price(keep_at(low)) > goal:
    return keep_at(high)
  return min((keep_at(low), keep_at(high)), key=lambda keep: abs(price(keep) - goal))
