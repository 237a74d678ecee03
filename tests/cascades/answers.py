"""Predictions made to measure: who is right, and how sure every exit is."""

import numpy as np

from depthprune.cascades.predictions import Predictions


def answers(right, scores, cost=None, whole=None, seed=0) -> Predictions:
  """right: bool [K, n]; scores: [K - 1, n]; cost: [K], 1 to K by default.

  Every label is 0, and a wrong answer is class 1. No two samples have equal logits.
  """
  right = np.asarray(right, bool)
  logits = np.where(right[..., None], (1.0, 0, 0), (0.0, 1, 0))
  logits[..., 2] = -np.random.default_rng(seed).uniform(1, 2, right.shape[1])
  cost = np.arange(1.0, len(right) + 1) if cost is None else np.asarray(cost, float)
  return Predictions(
    exits=(*(f'exit{k}' for k in range(len(right) - 1)), 'main'),
    logits=logits.astype(np.float32),
    labels=np.zeros(right.shape[1], int),
    scores=np.asarray(scores, np.float32),
    cost=cost,
    whole=float(cost[-1]) if whole is None else whole,
  )


def drawn(n, exits=3, seed=0) -> Predictions:
  """A cascade as they are: later exits are better, sure ones more often right."""
  rng = np.random.default_rng(seed)
  ease = rng.uniform(size=n)
  chance = [np.clip(ease + k / exits, 0, 0.97) for k in range(exits)]
  right = rng.uniform(size=(exits, n)) < chance
  scores = np.clip(chance[:-1] + rng.normal(0, 0.1, (exits - 1, n)), 0, 1)
  return answers(right, scores, seed=seed)
