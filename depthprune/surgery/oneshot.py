"""Decisions without training: slices are scored once and the lowest are closed.

This is the first thing to try, and the baseline of everything else. L1 and L2 are the
norms of the slices of the kernels that produce them (Li et al., arXiv 1608.08710).
Taylor is the first-order change of a loss when a gate closes (Molchanov et al., arXiv
1906.10771).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import numpy as np

from depthprune.program import arguments, rounding
from depthprune.program import axes as ax
from depthprune.program.coupling import WHY, Coupling, Group
from depthprune.program.rounding import RoundTo
from depthprune.program.trace import paths_of
from depthprune.program.widths import (
  Counts,
  Range,
  allowed,
  in_multiples,
  nearest,
  ranges,
)
from depthprune.surgery.budget import (
  Constraint,
  constraints,
  fitting,
  met,
  reachable,
)
from depthprune.surgery.plan import complete, widest
from depthprune.timing.layers import COSTS, TIME, CostFunction

SCORES = ('l1', 'l2', 'random', 'taylor')
SCOPES = ('global', 'uniform')
TOLERANCE = 0.005  # how far rounded widths may be off the target, as a part of the cost

Score = str | Mapping[str, Any] | Callable[[Coupling, Any], Mapping[str, Any]]
"""A name of SCORES, {group: [slices]}, or a function of (coupling, variables) that
returns that."""


def oneshot(
  coupling: Coupling,
  variables: Any,
  target: float | str | Mapping[Any, Any],
  score: Score = 'l1',
  scope: str = 'global',
  of: str | CostFunction = 'flops',
  round_to: RoundTo = 1,
  grads: Mapping | None = None,
  key: jax.Array | None = None,
  exclude: str | Sequence[str] = (),
  at_least: Counts | None = None,
  at_most: Counts | None = None,
  branches: Mapping[str, Any] | None = None,
) -> dict:
  """Decides which channels to keep so that the network costs what is asked for.

  Nothing is trained. Fine-tune the network after `prune`::

    coupling = dp.couple(model, variables, images, train=False)
    keep = dp.oneshot(coupling, variables, target='50%')
    pruned = dp.prune(model, variables, keep, images, train=False)

  Groups are chosen by the names that `print(coupling.explain())` shows, of groups and
  of arrays, or by patterns of them::

    keep = dp.oneshot(
      coupling, variables, '50%', exclude=['head', 'stage3/*'], at_least={'*conv1': 8}
    )

  A pattern is compared with the names of groups ('stage2/block0/conv1:3') and with the
  paths of arrays and of the modules around them ('stage2/block0'; 'params/' can be left
  out). `*` also matches '/'. A number of channels is an int; a part of them is a float
  in (0, 1], or a text such as '25%'. Of several patterns that match a group, its own
  name counts, else the one that matches the fewest groups.

  Args:
    coupling: of the network, made by `couple`.
    variables: its arrays.
    target: what the network may cost: a fraction of its cost in (0, 1], a percentage
      such as '50%', or an absolute number above 1, met as nearly as channels allow. Or
      several costs at once, {'params': '80%', 'flops': '70%'}, none of which is
      exceeded: their names are those that `of` takes, and `of` is ignored. Or {pattern:
      channels}, how many channels the matching arrays are to produce, as near as the
      other arguments allow: then nothing else is cut, and no cost is counted.
    score: what decides which channels stay. 'l1' and 'l2' are norms of the kernels,
      'random' needs `key`, 'taylor' needs `grads`. Or a score of your own, higher for
      what should stay: {group: [slices]}, as `activations` returns, or a function of
      (coupling, variables) that returns it.
    scope: 'global' ranks all channels of the network together, after dividing the
      scores of each group by their mean (of their sizes, where some are negative);
      'uniform' keeps the same fraction of each group.
    of: what is counted: 'flops' (1 MAC = 2 FLOPs), 'params', 'bytes' (of the variables
      and of a cache with which the network was coupled), or 'milliseconds', which are
      measured now, on this device, with a batch of 128. For another batch pass
      `milliseconds(coupling, batch, round_to=round_to)`. Or a function of (coupling,
      gates), as those in `cost` are; errors call it by its name.
    round_to: widths become multiples of this, and the target counts them so. 'auto'
      takes what this device is fast at: 8 on a CPU or GPU, 128 on a TPU, and less for
      groups with few channels (8 below 256 on a TPU; 4 below 32, 2 below 16, 1 below
      8). 1 takes any width.
    grads: gradient of a loss with respect to `coupling.gates()`, through `plug`.
    key: jax random key.
    exclude: patterns of groups, arrays or modules that are left whole: a matching array
      keeps its shape, and so do the channels that it reads.
    at_least: fewest channels of every group, or {pattern: channels} of the matching
      arrays' output.
    at_most: most channels, in the same way. Of a floor and a ceiling that contradict
      each other, one with a pattern goes before one for every group.
    branches: {path: bool}, a decision on branches that is made already. Costs leave
      out the closed ones and all that goes with them.

  Returns:
    {'channels': {group: bool [slices]}} for `prune`, and with `branches` those too. The
    decision keeps groups whole that cannot be gated or go with a branch, and at least
    one slice of every other group.

  Raises:
    KeyError: an unknown branch.
    ValueError: an unknown score, scope or cost; a missing `grads` or `key`; a target
      that cannot be reached; scores that are missing, not one per slice, or not
      finite; a pattern that matches nothing, with the nearest names; a floor above the
      ceiling; or a network of which no group can be gated.
  """
  arguments.coupling(coupling).fits(variables)
  check(score, scope, grads, key)
  if not coupling.gates()['channels']:
    raise ValueError(f'no group of this network can be gated; {WHY}')
  closed = closing(coupling, branches)
  several = isinstance(target, Mapping) and any(map(_is_cost, target))
  ratios = target if isinstance(target, Mapping) and not several else None
  limits = left_by(
    coupling, ranges(coupling, round_to, exclude, at_least, at_most, ratios), closed
  )
  scores = rank(coupling, variables, score, grads, key, limits)
  if ratios is not None:
    kept = {g: highest(s, limits[g].most) for g, s in scores.items()}
    return complemented(coupling, closed, kept)
  asked = constraints(coupling, target, of, round_to, closed)
  least = 'at least one slice per group'
  least = 'what exclude and at_least keep' if exclude or at_least else least
  keep_at, steps, limits = narrowing(
    coupling, scores, limits, asked, scope, round_to, closed
  )
  reachable(coupling, asked, keep_at(steps), least)
  first = fitting(coupling, asked, keep_at, steps)
  if several:
    return keep_at(first)
  (one,) = asked
  price = lambda keep: one.cost(coupling, keep)
  ceiling = price(keep_at(0))
  if one.goal > ceiling:
    left = 'at_most and branches leave' if branches else 'at_most leaves'
    raise ValueError(
      f'target {target} is {one.goal:.4g} {one.name}; with what {left} the ceiling is '
      f'{ceiling:.4g} ({ceiling / one.total:.3f} of {one.total:.4g}): lower the target'
    )
  # Milliseconds fall in steps too large to take the nearest, so they stay below.
  if one.name == TIME:
    return keep_at(first)
  ends = keep_at(max(first - 1, 0)), keep_at(first)
  keep = min(ends, key=lambda keep: abs(price(keep) - one.goal))
  if round_to == 1:
    return keep
  choices = allowed({g: s.size for g, s in scores.items()}, round_to, limits)
  best = lambda widths: complemented(
    coupling, closed, {g: highest(scores[g], n) for g, n in widths.items()}
  )
  off = lambda widths: (price(best(widths)) - one.goal) / one.total
  built = {g: int(keep['channels'][g].sum()) for g in scores}
  return best(nearest(built, choices, off, TOLERANCE))


# ---- widths that a budget leaves -----------------------------------------------------


def narrowing(
  coupling: Coupling,
  scores: Mapping[str, np.ndarray],
  limits: Mapping[str, Range],
  asked: Sequence[Constraint],
  scope: str,
  round_to: RoundTo,
  closed: Mapping,
) -> tuple[Callable[[int], dict], int, Mapping[str, Range]]:
  """Returns ever narrower networks, from the widest to the narrowest.

  Args:
    coupling: of the network, made by `couple`.
    scores: {group: float [slices]}, of the groups that may be cut.
    limits: {group: Range}, of the same groups.
    asked: the constraints; with 'auto', widths stay multiples if these can be met so.
    scope: one of SCOPES.
    round_to: widths are multiples of this, or 'auto'.
    closed: the decision on branches, as `closing` returns it.

  Returns:
    (number, from 0 to the last) -> decision; the last number; and the limits, in
    multiples if the constraints allow that.
  """
  keep = partial(complemented, coupling, closed)
  fits = lambda least: met(coupling, asked, keep(least['channels']))
  limits = in_multiples(coupling, round_to, limits, fits)
  kept_at, steps = PLANS[scope](scores, limits, round_to)
  return lambda k: keep(kept_at(k)), steps, limits


def complemented(
  coupling: Coupling, closed: Mapping, kept: Mapping[str, np.ndarray]
) -> dict:
  """Returns the decision on all channels and on branches, from that on some groups.

  Args:
    coupling: of the network, made by `couple`.
    closed: the decision on branches, as `closing` returns it.
    kept: {group: bool [slices]}; other groups are whole.
  """
  whole = {g: gate > 0 for g, gate in coupling.gates()['channels'].items()}
  return {**closed, 'channels': {**whole, **closed['channels'], **kept}}


def closing(coupling: Coupling, branches: Mapping[str, Any] | None) -> dict:
  """Returns a decision on branches alone, with the layers of stacks that it removes.

  Args:
    coupling: of the network, made by `couple`.
    branches: {path: bool}; None for no decision.

  Returns:
    {'channels': {group of layers: bool [layers]}, 'branches': {path: bool}}.

  Raises:
    KeyError: an unknown branch.
    ValueError: an entry has the wrong shape or is not bool.
  """
  if not branches:
    return {'channels': {}}
  channels, kept, _ = complete(coupling, {'branches': branches})
  stacks = {g: x for g, x in channels.items() if coupling.groups[g].kind == 'layer'}
  return {'channels': stacks, 'branches': {b: kept[b] for b in branches}}


def left_by(
  coupling: Coupling, limits: Mapping[str, Range], closed: Mapping
) -> dict[str, Range]:
  """Returns the limits of the groups that do not go with the branches of a decision."""
  dead = coupling.decision(closed).dead
  members = {g: {path for path, _ in coupling.groups[g].members} for g in limits}
  return {g: limit for g, limit in limits.items() if members[g] - dead}


def _is_cost(key: Any) -> bool:
  """Whether a key of a target is a cost, and not a pattern of arrays."""
  return callable(key) or key == TIME or key in COSTS


def rank(
  coupling: Coupling,
  variables: Any,
  score: Score,
  grads: Mapping | None = None,
  key: jax.Array | None = None,
  among: Collection[str] | None = None,
) -> dict[str, np.ndarray]:
  """Returns the score of every slice of every group that can be gated.

  Args:
    coupling: of the network, made by `couple`.
    variables: its arrays.
    score: 'l1', 'l2', 'random' or 'taylor', or a score of your own, as in `oneshot`.
    grads: gradients of the gates, for 'taylor'.
    key: jax random key, for 'random'.
    among: the groups to score, by default all that can be gated.

  Returns:
    {group: float [slices]}.

  Raises:
    ValueError: scores of a group are missing, not one per slice, or not finite, or a
      score of your own names a group that there is not.
  """
  gated = [g for g in coupling.groups.values() if not g.ungated]
  groups = [g for g in gated if among is None or g.name in among]
  if key is not None and score == 'random':
    keys = dict(zip((g.name for g in gated), jax.random.split(key, len(gated))))
    draw = lambda g: np.asarray(jax.random.uniform(keys[g.name], (g.size,)))
    return {g.name: draw(g) for g in groups}
  if score == 'taylor':
    channels = (grads or {}).get('channels', {})
    scores = {
      g.name: np.abs(widest(channels[g.name])) for g in groups if g.name in channels
    }
  elif isinstance(score, str):
    power, leaves = 1 if score == 'l1' else 2, paths_of(variables)
    scores = {g.name: norms(coupling, leaves, g.name, power) for g in groups}
  else:
    own = score(coupling, variables) if callable(score) else score
    if not isinstance(own, Mapping):
      raise arguments.refused(
        'score', '{group: [slices]} from the function', own, kind=ValueError
      )
    for name in own:
      coupling.axis(name)
    scores = {g.name: widest(own[g.name]) for g in groups if g.name in own}
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


def _check_scores(group: Group, score: Score, scores: np.ndarray | None):
  members = arguments.listed(path for path, _ in group.members)
  kind, entries, where = f'{score} ', 'grads', members
  expected = 'grads is the gradient of a loss by coupling.gates()'
  if score == 'taylor':
    where = 'grads'
  elif not isinstance(score, str):
    kind, entries, where = '', 'score', 'score'
    expected = 'score is {group: [slices]}, for all groups that may be cut'
  if scores is None:
    channels = "['channels']" if score == 'taylor' else ''
    raise ValueError(f'{group.name}: {entries}{channels} has no such entry; {expected}')
  if scores.shape != (group.size,):
    raise ValueError(
      f'{group.name}: {entries} has shape {scores.shape}, its slices are {group.size}; '
      f'{expected}'
    )
  if bad := int(np.sum(~np.isfinite(scores))):
    raise ValueError(
      f'{group.name}: the {kind}scores of {bad} of its {group.size} slices are not '
      f'finite ({where}), so they say nothing about which slices to keep; look for an '
      'overflow or a diverged training, and pass finite values'
    )


def check(
  score: Score, scope: str, grads: Mapping | None = None, key: jax.Array | None = None
) -> None:
  """Checks the arguments of `oneshot` that say how channels are ranked.

  Raises:
    TypeError: `key` is no random key.
    ValueError: an unknown score or scope, or `grads` or `key` is missing.
  """
  own = callable(score) or isinstance(score, Mapping)
  if not own and not (isinstance(score, str) and score in SCORES):
    raise arguments.refused(
      'score',
      f'one of {", ".join(SCORES)}, {{group: [slices]}}, or a function of (coupling, '
      'variables) that returns it',
      score,
      kind=ValueError,
    )
  if scope not in SCOPES:
    expected = f'one of {", ".join(SCOPES)}'
    raise arguments.refused('scope', expected, scope, kind=ValueError)
  if score == 'taylor' and not isinstance(grads, Mapping):
    raise arguments.refused(
      'grads',
      "the gradient of a loss by coupling.gates(), which score='taylor' needs",
      grads,
      'write jax.grad(lambda g: loss(plug(model, coupling)(variables, g, x)))',
      ValueError,
    )
  if score == 'random' and key is None:
    what = "score='random' needs key, a random key"
    raise arguments.wrong('key', what, 'write jax.random.key(0)')
  if score == 'random':
    arguments.key(key)


def _uniform(
  scores: Mapping, limits: Mapping[str, Range], round_to: RoundTo
) -> tuple[Callable, int]:
  """Returns keep_at and its number of steps: step k keeps the fraction 1 - k/steps.

  Groups round at different points, so that the cost falls in small steps.
  """
  steps = 4 * max((s.size for s in scores.values()), default=0)
  offset = {g: (i + 0.5) / len(scores) for i, g in enumerate(scores)}

  def keep_at(k):
    share = 1 - k / max(steps, 1)
    widths = {g: int(share * s.size + offset[g]) for g, s in scores.items()}
    return _built(scores, widths, limits, round_to)

  return keep_at, steps


def _global(
  scores: Mapping, limits: Mapping[str, Range], round_to: RoundTo
) -> tuple[Callable, int]:
  """Returns keep_at and its number of steps: step k closes the k lowest slices.

  Slices above the ceiling of their group are closed at step 0, those below its floor
  never.
  """
  order = []
  for group, s in scores.items():
    relative = np.sort(s) / max(np.abs(s).mean(), np.finfo(float).tiny)
    least, most = limits[group]
    order += [(r, group) for r in relative[s.size - most : s.size - least]]
  order.sort()

  def keep_at(k):
    closed = dict.fromkeys(scores, 0)
    for _, group in order[:k]:
      closed[group] += 1
    widths = {g: limits[g].most - closed[g] for g in scores}
    return _built(scores, widths, limits, round_to)

  return keep_at, len(order)


def _built(scores, widths, limits, round_to: RoundTo) -> dict[str, np.ndarray]:
  """The highest scores of every group, as many as can be built. {group: bool [n]}"""
  built = {}
  for group, s in scores.items():
    width = int(rounding.built(widths[group], s.size, round_to))
    built[group] = highest(s, min(max(width, limits[group].least), limits[group].most))
  return built


def highest(scores: np.ndarray, width: int) -> np.ndarray:
  """Returns where the `width` highest scores are, bool [len(scores)]."""
  kept = np.zeros(scores.size, bool)
  kept[np.argsort(-scores, kind='stable')[:width]] = True
  return kept


PLANS = {'global': _global, 'uniform': _uniform}
