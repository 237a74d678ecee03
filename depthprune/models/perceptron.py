"""A head: a perceptron with at most one hidden layer, on one tap of a trunk."""

from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
from jax.typing import DTypeLike

from depthprune.models.arch import Arch
from depthprune.models.layers import Classes, Pool, answer, hashable, he_normal, pooled


@dataclass(frozen=True)
class Head:
  """A perceptron on one tap of a trunk.

  Attributes:
    tap: name of the features it reads.
    classes: number of logits; or that of each of several tasks, by name.
    hidden: width of its hidden layer; 0 for a linear head.
    pool: how positions [batch, ..., c] become one vector: their mean 'avg', their
      maximum 'max', the means over a grid of 4 × 4 'grid4' (images only), or the first
      position 'cls'. A vector [batch, c] is taken as it is.
    dropout: rate, of what the last layer reads, while training.
  """

  tap: str
  classes: Classes = 10
  hidden: int = 0
  pool: Pool = 'avg'
  dropout: float = 0.0

  def __post_init__(self):
    object.__setattr__(self, 'classes', hashable(self.classes))

  @property
  def reads(self) -> tuple[str, ...]:
    """The taps that it reads."""
    return (self.tap,)

  @property
  def widths(self) -> dict[str, int]:
    """Every key that `arch` may hold beneath it."""
    return {'hidden': self.hidden} if self.hidden else {}


class Perceptron(nn.Module):
  """Features [batch, ..., c] → pool → float32 logits [batch, classes].

  Of several tasks {TASK: [batch, its classes]}.
  """

  head: Head
  arch: Arch
  dtype: DTypeLike

  @nn.compact
  def __call__(
    self, x: jax.Array, train: bool = False, mask: jax.Array | None = None
  ) -> Any:
    x = pooled(x, self.head.pool, mask)
    if self.head.hidden:
      width = self.arch['hidden']
      dense = nn.Dense(width, kernel_init=he_normal, dtype=self.dtype, name='hidden')
      x = nn.relu(dense(x))
    x = nn.Dropout(self.head.dropout)(x, deterministic=not train)
    return answer(x, self.head.classes, 'out')
