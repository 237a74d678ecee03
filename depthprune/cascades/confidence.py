"""The confidence of an exit in its answer: a score per example, higher is surer.

An example leaves at the first exit whose score is above that exit's threshold.

  probability  max_c p(c); SideNet, arXiv 2007.13512
  entropy      1 - H(p) / log C; after BranchyNet, arXiv 1709.01686
  margin       the largest p(c) minus the second largest
  patience     number of exits in a row that repeated the same answer; a threshold of
               t - 1/2 waits for t repetitions; PABEE, arXiv 2006.04152
  learned      P(leaving loses nothing), a logistic regression on the first three; ours
"""

from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np

Kind = Literal['probability', 'entropy', 'margin', 'patience', 'learned']

KINDS = get_args(Kind)
STEPS, RIDGE = 25, 1e-3  # Newton steps and ridge per example of a logistic regression


class Memory(NamedTuple):
  """What 'patience' remembers of earlier exits."""

  answer: jax.Array  # int32 [batch], the class that the last exit answered
  repeated: jax.Array  # int32 [batch], how often it was repeated in a row


def start(batch: Any) -> Memory:
  """Returns the memory before the first exit."""
  return Memory(jnp.full(batch, -1, jnp.int32), jnp.full(batch, -1, jnp.int32))


def score(
  kind: Kind, logits: jax.Array, memory: Memory, weights: jax.Array | None = None
) -> tuple[jax.Array, Memory]:
  """Computes the confidence of one exit.

  Args:
    kind: one of `KINDS`.
    logits: [batch, classes], divided by the exit's temperature.
    memory: the memory that the exit before returned, or `start`.
    weights: [4] of this exit, for 'learned'.

  Returns:
    The score float32 [batch], NaN for logits that are not finite, and the memory for
    the next exit.

  Raises:
    ValueError: an unknown kind, or 'learned' without weights.
  """
  logits = logits.astype(jnp.float32)
  answer = jnp.argmax(logits, axis=-1).astype(jnp.int32)
  again = jnp.where(answer == memory.answer, memory.repeated + 1, 0)
  memory = Memory(answer, again)
  # No example leaves with an answer that is not finite: its score is NaN.
  finite = jnp.isfinite(logits).all(-1)
  if kind == 'patience':
    return jnp.where(finite, again.astype(jnp.float32), jnp.nan), memory
  logits = jnp.where(finite[:, None], logits, jnp.nan)
  top, entropy, margin = _features(logits)
  if kind == 'learned':
    if weights is None:
      raise ValueError("confidence: 'learned' needs weights; `learn` fits them")
    features = jnp.stack([jnp.ones_like(top), top, entropy, margin], -1)
    return jax.nn.sigmoid(features @ weights), memory
  by_kind = {'probability': top, 'entropy': entropy, 'margin': margin}
  if kind not in by_kind:
    raise ValueError(f'confidence: {kind!r}: expected one of {", ".join(KINDS)}')
  return by_kind[kind], memory


def scores(kind: Kind, logits: Any, weights: np.ndarray | None = None) -> np.ndarray:
  """Computes the scores of all exits but the last, float32 [exits - 1, n].

  Args:
    kind: one of `KINDS`.
    logits: [exits, n, classes], divided by the temperatures.
    weights: [exits - 1, 4], for 'learned'.
  """
  compiled = jax.jit(score, static_argnums=0)
  memory, rows = start(logits.shape[1]), []
  for k, answer in enumerate(logits[:-1]):
    w = None if weights is None else jnp.asarray(weights[k], jnp.float32)
    row, memory = compiled(kind, jnp.asarray(answer), memory, w)
    rows.append(np.asarray(row))
  return np.stack(rows)


def learn(logits: Any, labels: np.ndarray) -> np.ndarray:
  """Fits the weights of 'learned' for all exits but the last, float32 [exits - 1, 4].

  It is a logistic regression, with a small ridge on all weights, of whether leaving
  loses nothing: the exit is right, or the last exit, the network's own, is wrong.

  Args:
    logits: [exits, n, classes] of held-out data, divided by the temperatures. On
      training data nearly all answers are right.
    labels: int [n].
  """
  right = np.asarray(logits).argmax(-1) == labels
  pairs = zip(logits[:-1], right[:-1] | ~right[-1])
  return np.stack([_regression(jnp.asarray(at), kept) for at, kept in pairs])


def _regression(logits: jax.Array, y: np.ndarray) -> np.ndarray:
  features = [np.asarray(x, np.float64) for x in _features(logits)]
  x = np.stack([np.ones(len(logits)), *features], -1)
  rows = np.isfinite(x).all(-1)  # other examples never leave
  x, y = x[rows], y[rows]
  w, ridge = np.zeros(x.shape[1]), RIDGE * max(1, len(x))
  for _ in range(
    STEPS
  ):  # Newton; scikit-learn would refuse an exit that is never wrong
    p = 1 / (1 + np.exp(-x @ w))
    slope = x.T @ (p - y) + ridge * w
    curvature = (x * (p * (1 - p))[:, None]).T @ x + ridge * np.eye(len(w))
    w -= np.linalg.solve(curvature, slope)
  return w.astype(np.float32)


def _features(logits: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Returns the scores probability, entropy and margin, [batch] each."""
  log_p = jax.nn.log_softmax(logits.astype(jnp.float32))
  p = jnp.exp(log_p)
  # A program that sorts, as top_k does, takes a CPU longer than a small stage.
  first, place = jnp.max(p, -1), jnp.argmax(p, -1)
  others = jnp.where(jnp.arange(p.shape[-1]) == place[:, None], -jnp.inf, p)
  entropy = -jnp.sum(jnp.where(p > 0, p * log_p, 0.0), -1)
  possible = jnp.log(jnp.float32(logits.shape[-1]))
  # `where` hides it in the sum, and XLA's maximum loses it on some CPUs.
  broken = jnp.isnan(log_p).any(-1)
  found = first, 1 - entropy / possible, first - jnp.max(others, -1)
  top, normalised, margin = (jnp.where(broken, jnp.nan, x) for x in found)
  return top, normalised, margin
