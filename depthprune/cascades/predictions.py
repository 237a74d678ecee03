"""What an early-exit cascade would do, known for every sample at every exit.

K exits in order, the last is the network's own answer. A sample leaves at the first
exit whose score is above its threshold, strictly; the last exit takes the rest.
"""

import hashlib
from typing import Any, NamedTuple

import numpy as np

LOSSES = ('error', 'gap', 'disagreement')
# A measured time may be off by this much; a larger excess is another unit.
OFF = 1.1


class Predictions(NamedTuple):
  """A data set as every exit of a cascade sees it."""

  exits: tuple[str, ...]
  """Names [K], in order; the last is the network's own answer."""
  logits: np.ndarray
  """[K, n, classes]"""
  labels: np.ndarray | None
  """int [n]; None where only the agreement with the network's own answer counts."""
  scores: np.ndarray
  """Confidence [K - 1, n]: higher is more confident, nan never leaves."""
  cost: np.ndarray
  """[K] of a sample that leaves there, all heads on its way included. Any one unit."""
  whole: float
  """Cost of the network without any head, in the same unit: what savings refer to."""


class Measured(NamedTuple):
  """What thresholds do on some data."""

  accuracy: float
  """In [0, 1]; nan without labels."""
  cost: float
  """Mean over the samples, in the unit of Predictions.cost."""
  exits: tuple[float, ...]
  """Share of the samples that leave at each exit [K]."""


def validate(p: Predictions) -> Predictions:
  """The same with float32 logits and scores, and float64 costs.

  Raises ValueError that names the field, for shapes that do not fit together, fewer
  than two exits, no samples, costs that are not finite or do not increase, a `whole`
  in another unit, labels that are no class, and for logits that are not finite, but
  where an exit's score is nan, so that nobody has that answer.
  """
  count = len(p.exits)
  if count < 2 or len(set(p.exits)) < count:
    raise ValueError(
      f"exits: expected at least two different names, the network's own last, got "
      f'{list(p.exits)}'
    )
  logits, scores = (np.asarray(x, np.float32) for x in (p.logits, p.scores))
  if logits.ndim != 3 or len(logits) != count or not logits.size or logits.shape[2] < 2:
    raise ValueError(
      f'logits: expected [{count}, n, classes] with n >= 1 and classes >= 2, got shape '
      f'{logits.shape}; exits are {", ".join(p.exits)}'
    )
  n = logits.shape[1]
  if scores.shape != (count - 1, n):
    raise ValueError(
      f'scores: expected [{count - 1}, {n}], one row per exit but the last, got shape '
      f'{scores.shape}'
    )
  leaves = np.concatenate([~np.isnan(scores), np.full((1, n), True)])
  broken = leaves & ~np.isfinite(logits).all(axis=2)  # who stays may have no answer
  if broken.any():
    bad = [p.exits[k] for k in np.flatnonzero(broken.any(axis=1))]
    raise ValueError(f'logits of {", ".join(bad)}: expected finite numbers')
  cost, whole = _costs(p)
  labels = p.labels if p.labels is None else _labels(p.labels, n, logits.shape[2])
  return Predictions(tuple(p.exits), logits, labels, scores, cost, whole)


def leave(scores: Any, thresholds: Any) -> np.ndarray:
  """The exit at which each sample leaves. int [n]

  scores [K - 1, n], thresholds [K - 1], compared in float32 as the cascade does; a
  score that equals its threshold, or is nan, stays. Raises ValueError for other shapes.
  """
  scores, thresholds = (np.asarray(x, np.float32) for x in (scores, thresholds))
  if scores.ndim != 2 or thresholds.shape != scores.shape[:1]:
    raise ValueError(
      'expected scores [exits - 1, n] and one threshold per row, got shapes '
      f'{scores.shape} and {thresholds.shape}'
    )
  gone = scores > thresholds[:, None]
  return np.where(gone.any(axis=0), gone.argmax(axis=0), len(gone))


def losses(p: Predictions, loss: str) -> np.ndarray:
  """Whether each exit's answer to each sample is a loss. bool [K, n]

  'error': wrong; 'gap': wrong where the network's own answer is right; 'disagreement':
  other than the network's own answer, which needs no labels. p: validated.
  Raises ValueError for another loss, or one that needs labels which are not there.
  """
  if loss not in LOSSES:
    raise ValueError(f'loss={loss!r}: expected one of {", ".join(LOSSES)}')
  answers = p.logits.argmax(axis=2)
  if loss == 'disagreement':
    return answers != answers[-1]
  if p.labels is None:
    raise ValueError(f"loss={loss!r} needs labels, got None; 'disagreement' needs none")
  wrong = answers != p.labels
  return wrong if loss == 'error' else wrong & ~wrong[-1]


def measure(p: Predictions, left: np.ndarray) -> Measured:
  """What samples give that leave at left int [n]. p: validated."""
  n, accuracy = len(left), float('nan')
  if p.labels is not None:
    answers = p.logits[left, np.arange(n)].argmax(axis=1)
    accuracy = float((answers == p.labels).mean())
  count = np.bincount(left, minlength=len(p.exits))
  return Measured(accuracy, float(count @ p.cost / n), tuple((count / n).tolist()))


def drop(measured: Measured, p: Predictions) -> float:
  """Accuracy lost against the network's own answer, in percentage points."""
  own = measure(p, np.full(p.logits.shape[1], len(p.exits) - 1))
  return 100 * (own.accuracy - measured.accuracy)


def saved(measured: Measured, p: Predictions) -> float:
  """Share of the cost of the network without heads that is saved; may be negative."""
  return 1 - measured.cost / p.whole


def take(p: Predictions, rows: np.ndarray) -> Predictions:
  """Some of the samples: rows int or bool [n]."""
  labels = None if p.labels is None else p.labels[rows]
  return p._replace(logits=p.logits[:, rows], labels=labels, scores=p.scores[:, rows])


def digest(p: Predictions) -> np.ndarray:
  """Four bytes per sample that recognise it: a hash of the network's own logits.

  uint32 [n]. The exits do not enter, so a sample stays the same with other exits. Bit
  for bit: run again in batches of another size, a network may answer in other bits.
  """
  rows = np.ascontiguousarray(p.logits[-1])
  hashes = b''.join(hashlib.blake2b(r.tobytes(), digest_size=4).digest() for r in rows)
  return np.frombuffer(hashes, '<u4')


def _costs(p: Predictions) -> tuple[np.ndarray, float]:
  cost, whole, count = np.asarray(p.cost, np.float64), float(p.whole), len(p.exits)
  if cost.shape != (count,):
    raise ValueError(f'cost: expected [{count}], one per exit, got shape {cost.shape}')
  if not (np.isfinite(cost).all() and cost[0] > 0 and np.all(np.diff(cost) > 0)):
    raise ValueError(
      'cost: expected positive numbers that increase from exit to exit, each with all '
      f'that is computed on the way, got {cost.tolist()}'
    )
  if not 0 < whole <= OFF * cost[-1]:
    raise ValueError(
      f'whole: expected the cost of the network without heads, at most that of the '
      f'last exit ({cost[-1]:g}) and in its unit, got {whole:g}'
    )
  return cost, whole


def _labels(labels: Any, n: int, classes: int) -> np.ndarray:
  labels = np.asarray(labels)
  if labels.shape != (n,) or labels.dtype.kind not in 'iu':
    raise ValueError(
      f'labels: expected integers [{n}], got {labels.dtype} of shape {labels.shape}'
    )
  if labels.min() < 0 or labels.max() >= classes:
    raise ValueError(
      f'labels: expected 0..{classes - 1}, the classes of the logits, got '
      f'{labels.min()} to {labels.max()}'
    )
  return labels
