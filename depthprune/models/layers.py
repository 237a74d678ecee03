"""Convolution, normalisation and pooling as the reference networks have them.

Padding is symmetric, k // 2 on each side, at every stride. Flax's 'SAME' pads (0, 1) at
stride 2, which shifts the grid: a pretrained network would import without an error and
be wrong.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

he_normal = nn.initializers.he_normal()


def conv(
  features: int, size: int, stride: int = 1, *, dtype: DTypeLike, name: str
) -> nn.Conv:
  """A square convolution without bias: a normalisation follows, which has one."""
  return nn.Conv(
    features,
    (size, size),
    strides=(stride, stride),
    padding=((size // 2, size // 2),) * 2,
    use_bias=False,
    kernel_init=he_normal,
    dtype=dtype,  # pyright: ignore[reportArgumentType]
    name=name,
  )


def norm(x: jax.Array, train: bool, *, dtype: DTypeLike, name: str) -> jax.Array:
  """Batch normalisation, computed in float32 and returned as `dtype`."""
  return nn.BatchNorm(
    use_running_average=not train,
    momentum=0.9,
    epsilon=1e-5,
    dtype=dtype,  # pyright: ignore[reportArgumentType]
    name=name,
  )(x.astype(jnp.float32))


class ConvNorm(nn.Module):
  """[batch, h, w, c] → `conv`, `norm`, ReLU if asked → [batch, h', w', features]."""

  features: int
  size: int = 3
  stride: int = 1
  relu: bool = True
  dtype: DTypeLike = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array, train: bool) -> jax.Array:
    x = conv(self.features, self.size, self.stride, dtype=self.dtype, name='conv')(x)
    x = norm(x, train, dtype=self.dtype, name='norm')
    return nn.relu(x) if self.relu else x


def classify(x: jax.Array, classes: int, name: str = 'head') -> jax.Array:
  """Features [batch, ..., c] → mean over positions → logits [batch, classes].

  In float32 whatever the compute type is: it is a sliver of the cost, and losses and
  thresholds are taken from here.
  """
  x = x.astype(jnp.float32)
  if x.ndim > 2:
    x = x.mean(axis=tuple(range(1, x.ndim - 1)))
  return nn.Dense(classes, name=name)(x)
