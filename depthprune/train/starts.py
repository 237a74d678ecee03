"""Where the weights of trainable gates start: all open, and evenly spaced."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from depthprune.program import arguments
from depthprune.train.task import Tree

START = 0.1  # mean gate weight of a group at the start
RANKED = (
  'surgery.oneshot.rank(coupling, variables, "l1") makes those of channels, '
  'block_influence with blocks={branch: [branch]} those of branches outside of scans'
)


def check_open(gates: Mapping[str, jax.Array]) -> None:
  """Checks that the gates of branches have not been trained before.

  Raises:
    ValueError: one is not 1.
  """
  for path, gate in gates.items():
    if not isinstance(gate, Tracer) and np.any(np.asarray(gate) != 1):
      what = f'{path}: its gate is {gate}, expected 1'
      raise arguments.wrong('layers', what, 'dp.prune folds gates into the weights')


def shared(scores: Mapping, branches: Mapping[str, Sequence[str]]) -> dict[str, Any]:
  """Gives the gate that branches share the sum of their scores.

  Args:
    scores: {group or branch: an array like its gate}.
    branches: {branch that has a gate: all that share it}.

  Raises:
    ValueError: some of the branches that share a gate have scores and some have not, or
      scores are not finite.
  """
  found = {name: np.asarray(score) for name, score in scores.items()}
  for name, score in found.items():
    if not np.isfinite(score).all():
      raise arguments.wrong('scores', f'{name}: its scores are not finite', RANKED)
  for first, paths in branches.items():
    given = [found[path] for path in paths if path in found]
    if given and len(given) < len(paths):
      missing = next(path for path in paths if path not in found)
      what = f'{missing}: needs its scores, for {first} has some and shares its gate'
      raise arguments.wrong('scores', what, RANKED)
    if given:
      for path, score in zip(paths, given, strict=True):
        _check_size(path, given[0], score)
      found[first] = np.sum(given, axis=0)
  return found


def spread(start: Tree, scores: Mapping, prices: Tree) -> Tree:
  """Spaces the gates of every group evenly in (0, 2 START), in the order of the scores.

  Groups are out of step with each other, so that their gates close one by one. All
  branches together are one group, spaced in (START / 2, 2 START) and in the order of
  their score per price. So until about a quarter of the channels is closed, a layer
  goes only if its gradient closes it.

  Args:
    start: open gates, {'channels': {group: [n]}, 'branches': {path: () or [layers]}}.
    scores: {group or branch: an array like its gate}. The order of a group without
      scores is arbitrary; of branches the later ones are nearer to closing.
    prices: what an open gate costs, in the form of `start`; of each entry the mean.

  Returns:
    Gate weights in the form of `start`.
  """
  channels = {}
  for i, (group, b) in enumerate(start['channels'].items()):
    score = scores.get(group, np.random.RandomState(i).permutation(b.size))
    _check_size(group, b, score)
    w = (_ranks(score) + (i + 0.5) / len(start['channels'])) / b.size
    channels[group] = jnp.asarray(2 * START * w, jnp.float32)
  if 'branches' not in start:
    return {'channels': channels}
  branches = start['branches']
  below = _evenly(branches, _per_price(scores, prices['branches']) or None)
  upper = {b: START / 2 + 3 / 4 * w for b, w in below.items()}
  return {'channels': channels, 'branches': upper}


def spread_globally(start: Tree, scores: Mapping, prices: Tree) -> Tree:
  """Spaces all gates of a network evenly in (0, 2 START), by their score per price.

  Args:
    start: open gates, as for `spread`.
    scores: {group or branch: an array like its gate}, of all of them.
    prices: what an open gate costs, in the form of `start`; its mean in a group counts.

  Returns:
    Gate weights in the form of `start`.
  """
  price = {name: c for part in prices.values() for name, c in part.items()}
  flat = {name: gate for part in start.values() for name, gate in part.items()}
  w = _evenly(flat, _per_price(scores, price))
  return {part: {name: w[name] for name in gates} for part, gates in start.items()}


def _per_price(scores: Mapping, prices: Mapping) -> dict[str, np.ndarray]:
  """Scores of gates divided by their mean price; those below 0 multiplied by it."""
  found = {}
  for name in scores.keys() & prices:
    score, price = np.asarray(scores[name]), float(np.mean(prices[name]))
    found[name] = np.where(score < 0, score * price, score / price)
  return found


def _evenly(gates: Mapping, scores: Mapping | None) -> dict[str, jax.Array]:
  """Spaces gates evenly in (0, 2 START), whatever group they belong to."""
  sizes = [gate.size for gate in gates.values()]
  if scores is None:
    worth = -np.arange(sum(sizes))
  else:
    for name, gate in gates.items():
      if name not in scores:
        what = f'{name}: needs its scores, for it is compared with others'
        raise arguments.wrong('scores', what, RANKED)
      _check_size(name, gate, scores[name])
    worth = np.concatenate([np.ravel(scores[name]) for name in gates])
  w = 2 * START * (_ranks(worth) + 0.5) / worth.size
  parts = np.split(w.astype(np.float32), np.cumsum(sizes)[:-1])
  return {
    name: jnp.asarray(part.reshape(gate.shape))
    for (name, gate), part in zip(gates.items(), parts, strict=True)
  }


def _check_size(group: str, b: np.ndarray, score: np.ndarray) -> None:
  if np.shape(score) != b.shape:
    has = f'{group}: has shape {np.shape(score)}, expected {b.shape}'
    raise arguments.wrong('scores', has, RANKED)


def _ranks(score: np.ndarray) -> np.ndarray:
  """The place of every score in their order, from 0."""
  return np.argsort(np.argsort(score, kind='stable'), kind='stable')
