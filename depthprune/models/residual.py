"""Residual units: what they are before any pruning, their shortcuts, their branch.

Source: He, Zhang, Ren, Sun, arXiv 1512.03385. Bottlenecks have their stride in the 3×3
convolution, as the common pretrained networks do.
"""

from typing import Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike

from depthprune.gates import branch
from depthprune.models.arch import Arch
from depthprune.models.layers import ConvNorm, conv, norm


class Shape(NamedTuple):
  """What a residual unit is before any pruning. Shortcuts of option A pad by these."""

  inputs: int
  features: int
  stride: int
  bottleneck: bool
  shortcut: Literal['A', 'B']

  @property
  def resized(self) -> bool:
    return self.stride > 1 or self.inputs != self.features

  @property
  def after(self) -> 'Shape':
    """The units that follow in the same stage: identity shortcuts."""
    return self._replace(inputs=self.features, stride=1)

  @property
  def layers(self) -> tuple[tuple[int, int], ...]:
    """Kernel size and stride of each convolution of the branch."""
    if self.bottleneck:
      return (1, 1), (3, self.stride), (1, 1)
    return (3, self.stride), (3, 1)

  @property
  def widths(self) -> dict[str, int]:
    """The unit's keys of `arch` in the full network."""
    inner = self.features // 4
    widths = [inner, inner, self.features] if self.bottleneck else [self.features] * 2
    keys = {f'conv{i}': width for i, width in enumerate(widths, 1)}
    if self.resized and self.shortcut == 'B':
      keys['shortcut/conv'] = self.features
    return {**keys, 'branch': 1}


class Unit(nn.Module):
  """relu(shortcut(x) + gate · F(x)) on [batch, h, w, c]; without F if it is removed."""

  shape: Shape
  arch: Arch
  dtype: DTypeLike

  @nn.compact
  def __call__(self, x: jax.Array, train: bool) -> jax.Array:
    kept = x
    if self.shape.resized and self.shape.shortcut == 'A':
      kept = subsample_and_pad(x, self.shape)
    elif self.shape.resized:
      width, stride = self.arch['shortcut/conv'], self.shape.stride
      project = ConvNorm(width, 1, stride, False, self.dtype, name='shortcut')
      kept = project(x, train)
    if not self.arch['branch']:
      return nn.relu(kept)
    for i, (size, stride) in enumerate(self.shape.layers, 1):
      x = nn.relu(x) if i > 1 else x
      width = self.arch[f'conv{i}']
      x = conv(width, size, stride, dtype=self.dtype, name=f'conv{i}')(x)
      x = norm(x, train, dtype=self.dtype, name=f'norm{i}')
    if x.shape != kept.shape:  # a width of one would broadcast in silence
      raise ValueError(
        f'{"/".join(self.path)}: the branch has shape {x.shape}, its shortcut '
        f'{kept.shape}; arch must give kernels that are added to each other one width'
      )
    return nn.relu(kept + branch(self, x))


def subsample_and_pad(x: jax.Array, shape: Shape) -> jax.Array:
  """Shortcut of option A: every stride-th pixel, zeros for the channels that are new.

  How many zeros depends on the full network alone, so pruning never changes the pad.
  """
  new = shape.features - shape.inputs
  x = x[:, :: shape.stride, :: shape.stride]
  channels = (new // 2, new - new // 2, 0)
  return lax.pad(x, jnp.zeros((), x.dtype), ((0, 0, 0),) * 3 + (channels,))
