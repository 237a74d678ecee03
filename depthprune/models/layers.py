"""Convolution, normalisation and pooling as the reference networks have them.

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
Classes = int | Mapping[str, int]  # of several tasks: for each its number of classes

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
  """A square convolution, without bias where a normalisation follows: it has one."""
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
  """Batch normalisation, computed in float32 and returned as `dtype`."""
  return nn.BatchNorm(
    use_running_average=not train,
    momentum=0.9,
    epsilon=1e-5,
    dtype=dtype,  # pyright: ignore[reportArgumentType]
    name=name,
  )(x.astype(jnp.float32))


class ConvNorm(nn.Module):
  """[batch, h, w, c] → `conv`, `norm`, ReLU if asked → [batch, h', w', features].

  Attributes:
    groups: of the convolution; c for a depthwise one.
    ceiling: where the ReLU ends, 6 for a ReLU6.
  """

  features: int
  size: int = 3
  stride: int = 1
  relu: bool = True
  dtype: DTypeLike = jnp.float32
  bias: bool = False
  groups: int = 1
  ceiling: float = math.inf

  @nn.compact
  def __call__(self, x: jax.Array, train: bool) -> jax.Array:
    options = {'bias': self.bias, 'dtype': self.dtype, 'name': 'conv'}
    x = conv(self.features, self.size, self.stride, groups=self.groups, **options)(x)
    x = norm(x, train, dtype=self.dtype, name='norm')
    x = nn.relu(x) if self.relu else x
    return jnp.minimum(x, self.ceiling) if math.isfinite(self.ceiling) else x


def add_branch(module: nn.Module, kept: jax.Array, y: jax.Array) -> jax.Array:
  """kept + gate · y, the end of a unit: a shortcut and the branch of `module`.

  Raises:
    ValueError: they differ in shape; a width of one would broadcast in silence.
  """
  if y.shape != kept.shape:
    raise ValueError(
      f'{"/".join(module.path)}: the branch has shape {y.shape}, its shortcut '
      f'{kept.shape}; arch must give kernels that are added to each other one width'
    )
  return kept + branch(module, y)


def pooled(x: jax.Array, pool: Pool, mask: jax.Array | None = None) -> jax.Array:
  """Features [batch, ..., c] → one vector per example, as `Head.pool` says.

  mask: bool [batch, tokens], False on the padding of a sequence, which is left out.
  """
  positions = tuple(range(1, x.ndim - 1))
  if not positions:
    return x
  if mask is not None and x.ndim != 3:
    raise ValueError(f'head: a mask goes with [batch, tokens, c], got {x.shape}')
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
  """Features [batch, ..., c] → one vector per example → logits [batch, classes].

  In float32 whatever the compute type is: it is a sliver of the cost, and losses and
  thresholds are taken from here.
  """
  return answer(pooled(x.astype(jnp.float32), pool), classes, name)


def hashable(classes: Classes) -> Classes:
  """The same, for a field of a frozen dataclass."""
  return FrozenDict(classes) if isinstance(classes, Mapping) else classes


def answer(x: jax.Array, classes: Classes, name: str) -> Any:
  """[..., c] → float32 logits [..., classes] by the layer NAME; or, of several tasks,
  {TASK: [..., its classes]} by the layers NAME_TASK."""
  if isinstance(classes, Mapping):
    return {task: answer(x, n, f'{name}_{task}') for task, n in classes.items()}
  return nn.Dense(classes, name=name)(x.astype(jnp.float32))
