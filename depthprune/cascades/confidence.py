"""How sure an exit is of its answer: one score per example, higher is surer.

An example leaves at the first exit whose score is above that exit's threshold.

  probability  max_c p(c); SideNet, arXiv 2007.13512
  entropy      1 - H(p) / log C; after BranchyNet, arXiv 1709.01686
  margin       the largest p(c) minus the second largest
  patience     how many exits in a row repeated the same answer: a threshold of t - 1/2
               waits for t repetitions; PABEE, arXiv 2006.04152
  learned      P(answer is right) by a logistic regression on what the others see; ours
"""

from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np

Kind = Literal['probability', 'entropy', 'margin', 'patience', 'learned']

KINDS = get_args(Kind)
STEPS, RIDGE = 25, 1e-3  # of Newton's method, which a logistic regression needs few of


class Memory(NamedTuple):
  """What patience remembers of the exits before, int32 [batch] each."""

  answer: jax.Array
  repeated: jax.Array


def start(batch: int) -> Memory:
  """Before the first exit."""
  return Memory(jnp.full(batch, -1, jnp.int32), jnp.full(batch, -1, jnp.int32))


def score(
  kind: Kind, logits: jax.Array, memory: Memory, weights: jax.Array | None = None
) -> tuple[jax.Array, Memory]:
  """(score of every example, float32 [batch], memory for the next exit).

  Args:
    kind: see above. logits: [batch, classes], divided by the exit's temperature.
    memory: from the exit before. weights: [4] of this exit, for 'learned'.

  Raises: ValueError for an unknown kind, and 'learned' without weights.
  """
  logits = logits.astype(jnp.float32)
  answer = jnp.argmax(logits, axis=-1).astype(jnp.int32)
  again = jnp.where(answer == memory.answer, memory.repeated + 1, 0)
  memory = Memory(answer, again)
  # An answer that is not finite is none: its score is NaN, and nobody leaves by it.
  finite = jnp.isfinite(logits).all(-1)
  if kind == 'patience':
    return jnp.where(finite, again.astype(jnp.float32), jnp.nan), memory
  logits = jnp.where(finite[:, None], logits, jnp.nan)
  top, entropy, margin = _seen(logits)
  if kind == 'learned':
    if weights is None:
      raise ValueError("confidence: 'learned' needs weights; `learn` fits them")
    features = jnp.stack([jnp.ones_like(top), top, entropy, margin], -1)
    return jax.nn.sigmoid(features @ weights), memory
  found = {'probability': top, 'entropy': entropy, 'margin': margin}
  if kind not in found:
    raise ValueError(f'confidence: {kind!r}: expected one of {", ".join(KINDS)}')
  return found[kind], memory


def scores(kind: Kind, logits: Any, weights: np.ndarray | None = None) -> np.ndarray:
  """What a cascade would see at its exits but the last: float32 [exits - 1, n].

  logits: [exits, n, classes], divided by the temperatures; weights: [exits - 1, 4].
  """
  one = jax.jit(score, static_argnums=0)
  memory, found = start(logits.shape[1]), []
  for k, answer in enumerate(logits[:-1]):
    given = None if weights is None else jnp.asarray(weights[k], jnp.float32)
    seen, memory = one(kind, jnp.asarray(answer), memory, given)
    found.append(np.asarray(seen))
  return np.stack(found)


def learn(logits: Any, labels: np.ndarray) -> np.ndarray:
  """Weights of 'learned' for every exit but the last, float32 [exits - 1, 4].

  Newton's method on the cross-entropy of being right, with a small ridge.

  logits: [exits, n, classes], divided by the temperatures; labels: int [n]. Both held
    out: on training images every exit is nearly always right.
  """
  return np.stack([_regression(jnp.asarray(at), labels) for at in logits[:-1]])


def _regression(logits: jax.Array, labels: np.ndarray) -> np.ndarray:
  seen = np.stack([np.asarray(x, np.float64) for x in _seen(logits)], -1)
  x = np.concatenate([np.ones((len(seen), 1)), seen], -1)
  y = np.asarray(logits.argmax(-1)) == labels
  rows = np.isfinite(x).all(-1)  # others never leave, and teach nothing
  x, y = x[rows], y[rows]
  w, ridge = np.zeros(x.shape[1]), RIDGE * max(1, len(x))
  for _ in range(STEPS):
    p = 1 / (1 + np.exp(-x @ w))
    slope = x.T @ (p - y) + ridge * w
    curvature = (x * (p * (1 - p))[:, None]).T @ x + ridge * np.eye(len(w))
    w -= np.linalg.solve(curvature, slope)
  return w.astype(np.float32)


def _seen(logits: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
  """(largest probability, 1 - entropy of the possible, margin), [batch] each."""
  log_p = jax.nn.log_softmax(logits.astype(jnp.float32))
  p = jnp.exp(log_p)
  two = jax.lax.top_k(p, 2)[0]
  entropy = -jnp.sum(jnp.where(p > 0, p * log_p, 0.0), -1)
  possible = jnp.log(jnp.float32(logits.shape[-1]))
  broken = jnp.isnan(log_p).any(-1)  # `where` would hide it
  return (
    two[..., 0],
    jnp.where(broken, jnp.nan, 1 - entropy / possible),
    (two[..., 0] - two[..., 1]),
  )
