"""Layers that all families share: convolution, normalisation, pooling, logits.

Padding is symmetric, k // 2 on each side, at every stride. Flax's 'SAME' pads (0, 1) at
stride 2, which shifts the grid: a pretrained network would import without an error and
be wrong.
"""

import math
from collections.abc import Mapping
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.core import FrozenDict
from jax import lax
from jax.typing import DTypeLike

from depthprune.gates import branch

Pool = Literal['avg', 'max', 'grid4', 'cls']
Classes = int | Mapping[str, int]  # number of classes, or one for every task by name

he_normal = nn.initializers.he_normal()


def conv(
  features: int,
  size: int,
  stride: int = 1,
  *,
  bias: bool = False,
  groups: int = 1,
  dtype: DTypeLike,
  name: str,
) -> nn.Conv:
  """Makes a square convolution; a normalisation behind it makes its bias redundant."""
  return nn.Conv(
    features,
    (size, size),
    strides=(stride, stride),
    padding=((size // 2, size // 2),) * 2,
    use_bias=bias,
    feature_group_count=groups,
    kernel_init=he_normal,
    dtype=dtype,  # pyright: ignore[reportArgumentType]
    name=name,
  )


def norm(x: jax.Array, train: bool, *, dtype: DTypeLike, name: str) -> jax.Array:
  """Applies batch normalisation, computed in float32 and returned as `dtype`."""
  return nn.BatchNorm(
    use_running_average=not train,
    momentum=0.9,
    epsilon=1e-5,
    dtype=dtype,  # pyright: ignore[reportArgumentType]
    name=name,
  )(x.astype(jnp.float32))


class ConvNorm(nn.Module):
  """A convolution, a batch normalisation and a ReLU on features [batch, h, w, c]."""

  features: int  # channels that it returns
  size: int = 3  # height and width of the kernel
  stride: int = 1
  relu: bool = True
  dtype: DTypeLike = jnp.float32
  bias: bool = False
  groups: int = 1  # c for a depthwise convolution
  ceiling: float = math.inf  # upper limit of the result, 6 for a ReLU6

  @nn.compact
  def __call__(self, x: jax.Array, train: bool) -> jax.Array:
    x = conv(
      self.features,
      self.size,
      self.stride,
      bias=self.bias,
      groups=self.groups,
      dtype=self.dtype,
      name='conv',
    )(x)
    x = norm(x, train, dtype=self.dtype, name='norm')
    x = nn.relu(x) if self.relu else x
    return jnp.minimum(x, self.ceiling) if math.isfinite(self.ceiling) else x


def add_branch(module: nn.Module, kept: jax.Array, y: jax.Array) -> jax.Array:
  """Returns kept + gate · y: the shortcut and the gated branch of the unit `module`.

  Raises:
    ValueError: the shapes differ. A width of 1 would broadcast silently.
  """
  if y.shape != kept.shape:
    raise ValueError(
      f'{"/".join(module.path)}: the branch has shape {y.shape}, its shortcut '
      f'{kept.shape}; arch must give kernels that are added to each other one width'
    )
  return kept + branch(module, y)


def pooled(x: jax.Array, pool: Pool, mask: jax.Array | None = None) -> jax.Array:
  """Reduces features [batch, ..., c] to one vector per example.

  Args:
    x: the features; vectors [batch, c] are returned as they are.
    pool: 'avg', 'max', 'cls' or 'grid4', explained at `heads.Head`.
    mask: bool [batch, tokens], False on the padding of a sequence, which 'avg' and
      'max' leave out.

  Returns:
    [batch, c], or [batch, 16 c] for 'grid4' of images that are large enough.

  Raises:
    ValueError: features that cannot be pooled in this way, or a mask without tokens.
  """
  positions = tuple(range(1, x.ndim - 1))
  if not positions:
    return x
  if mask is not None and x.ndim != 3:
    raise ValueError(f'head: a mask needs features [batch, tokens, c], got {x.shape}')
  if pool == 'avg' and mask is not None:
    weight = mask.astype(x.dtype)[..., None]
    return (x * weight).sum(1) / jnp.maximum(weight.sum(1), 1)
  if pool == 'max' and mask is not None:
    return jnp.where(mask[..., None], x, jnp.finfo(x.dtype).min).max(1)
  if pool == 'avg':
    return x.mean(axis=positions)
  if pool == 'max':
    return x.max(axis=positions)
  if pool == 'cls' and x.ndim == 3:
    return x[:, 0]
  if pool == 'grid4' and x.ndim == 4:
    # Cells overlap where 4 does not divide the size; smaller images stay as they are.
    strides = tuple(max(size // 4, 1) for size in x.shape[1:3])
    cells = tuple(max(n - 3 * step, 1) for n, step in zip(x.shape[1:3], strides))
    x = nn.pool(x, 0.0, lax.add, cells, strides, 'VALID') / math.prod(cells)
    return x.reshape(x.shape[0], -1)
  raise ValueError(
    f'head: cannot pool features {x.shape} by {pool!r}; expected avg, max, grid4 '
    f'(images only) or cls'
  )


def classify(
  x: jax.Array, classes: int, pool: Pool = 'avg', name: str = 'head'
) -> jax.Array:
  """Pools features [batch, ..., c] and computes logits [batch, classes] of them.

  This is done in float32 whatever the type of the computation is: it costs little, and
  losses and thresholds depend on it.
  """
  return answer(pooled(x.astype(jnp.float32), pool), classes, name)


def hashable(classes: Classes) -> Classes:
  """Makes `classes` hashable, for a field of a frozen dataclass."""
  return FrozenDict(classes) if isinstance(classes, Mapping) else classes


def answer(x: jax.Array, classes: Classes, name: str) -> Any:
  """Computes float32 logits [..., classes] of features [..., c] by the layer `name`.

  For several tasks, returns {task: logits} by the layers 'name_task'.
  """
  if isinstance(classes, Mapping):
    return {task: answer(x, n, f'{name}_{task}') for task, n in classes.items()}
  return nn.Dense(classes, name=name)(x.astype(jnp.float32))
