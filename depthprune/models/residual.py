"""Residual units and stages of them, which several families share.

Source: He, Zhang, Ren, Sun, arXiv 1512.03385; pre-activation: arXiv 1603.05027.
Bottlenecks have their stride in the 3×3 convolution, like the common pretrained
networks.
"""

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike

from depthprune.models import stages
from depthprune.models.arch import Arch, beneath, within
from depthprune.models.layers import ConvNorm, add_branch, conv, norm


class ResNetShape(NamedTuple):
  """The sizes and the kind of a residual unit before any pruning."""

  inputs: int  # channels that it reads
  features: int  # channels that it returns
  stride: int
  bottleneck: bool  # three convolutions, 1×1, 3×3 and 1×1, instead of two 3×3
  shortcut: Literal['A', 'B']  # 'A' pads with zeros, 'B' convolves
  preact: bool = False  # normalises before it convolves
  first: bool = False  # the first unit of the network, which reads the stem

  @property
  def resized(self) -> bool:
    """Whether the unit changes resolution or width, so that its shortcut must too."""
    return self.stride > 1 or self.inputs != self.features

  @property
  def after(self) -> 'ResNetShape':
    """The sizes of the units that follow in the same stage."""
    return self._replace(inputs=self.features, stride=1, first=False)

  @property
  def layers(self) -> tuple[tuple[int, int], ...]:
    """Kernel size and stride of every convolution of the branch."""
    if self.bottleneck:
      return (1, 1), (3, self.stride), (1, 1)
    return (3, self.stride), (3, 1)

  @property
  def widths(self) -> dict[str, int]:
    """The keys that the unit has in `arch`, with their values in the full network."""
    inner = self.features // 4
    widths = [inner, inner, self.features] if self.bottleneck else [self.features] * 2
    keys = {f'conv{i}': width for i, width in enumerate(widths, 1)}
    if self.resized and self.shortcut == 'B':
      keys['shortcut' if self.preact else 'shortcut/conv'] = self.features
    return {**keys, 'branch': 1}


class ResNetUnit(nn.Module):
  """A residual unit: shortcut(x) + gate · F(x) on features [batch, h, w, c].

  With post-activation, F is convolutions that are each followed by a normalisation,
  with ReLU between them, and a ReLU follows the sum. With pre-activation, normalisation
  and ReLU precede every convolution. Before the first one they apply to both paths
  if the unit changes size, and are absent if the stem has them. A unit whose branch is
  removed has no F.
  """

  shape: ResNetShape
  arch: Arch
  dtype: DTypeLike

  @nn.compact
  def __call__(self, x: jax.Array, train: bool) -> jax.Array:
    shape = self.shape
    if shape.preact and shape.resized and not shape.first:
      x = nn.relu(norm(x, train, dtype=self.dtype, name='norm1'))
    kept = shortcut(x, shape, self.arch, train, self.dtype)
    if self.arch['branch']:
      f = preactivated if shape.preact else postactivated
      kept = add_branch(self, kept, f(x, shape, self.arch, train, self.dtype))
    return kept if shape.preact else nn.relu(kept)


def postactivated(x, shape: ResNetShape, arch: Arch, train: bool, dtype: DTypeLike):
  """The branch: conv, norm, ReLU, conv, norm; a bottleneck has a third convolution."""
  for i, (size, stride) in enumerate(shape.layers, 1):
    x = nn.relu(x) if i > 1 else x
    x = conv(arch[f'conv{i}'], size, stride, dtype=dtype, name=f'conv{i}')(x)
    x = norm(x, train, dtype=dtype, name=f'norm{i}')
  return x


def preactivated(x, shape: ResNetShape, arch: Arch, train: bool, dtype: DTypeLike):
  """The branch: norm, ReLU, conv, norm, ReLU, conv, unless x is normalised already."""
  normalised = shape.resized or shape.first
  for i, (size, stride) in enumerate(shape.layers, 1):
    if i > 1 or not normalised:
      x = nn.relu(norm(x, train, dtype=dtype, name=f'norm{i}'))
    x = conv(arch[f'conv{i}'], size, stride, dtype=dtype, name=f'conv{i}')(x)
  return x


def shortcut(x, shape: ResNetShape, arch: Arch, train: bool, dtype: DTypeLike):
  """Returns x, brought to its new size by option A or B if the unit changes size."""
  if not shape.resized:
    return x
  if shape.shortcut == 'A':
    return subsample_and_pad(x, shape)
  if shape.preact:
    return conv(arch['shortcut'], 1, shape.stride, dtype=dtype, name='shortcut')(x)
  width = arch['shortcut/conv']
  return ConvNorm(width, 1, shape.stride, False, dtype, name='shortcut')(x, train)


def subsample_and_pad(x: jax.Array, shape: ResNetShape) -> jax.Array:
  """Takes every stride-th pixel and pads new channels with zeros: shortcut option A.

  The number of zeros depends on the full network alone, so pruning never changes it.
  """
  new = shape.features - shape.inputs
  x = x[:, :: shape.stride, :: shape.stride]
  channels = (new // 2, new - new // 2, 0)
  return lax.pad(x, jnp.zeros((), x.dtype), ((0, 0, 0),) * 3 + (channels,))


class ResidualStage(nn.Module):
  """Residual units in a row on features [batch, h, w, c]; the first may change size.

  Returns the features after every unit or stack of units, by the name of their tap.
  """

  unit: Any  # class of the units, `ResNetUnit` or one with the same fields
  blocks: int
  shape: Any  # sizes of the first unit; those that follow have `shape.after`
  arch: Arch
  scan: bool
  dtype: DTypeLike

  @nn.compact
  def __call__(self, x: jax.Array, train: bool) -> dict[str, jax.Array]:
    outputs = {}
    for name, tap, _ in stages.segments(self.blocks, self.scan):
      shape = self.shape if name == 'block0' else self.shape.after
      unit = self.unit(shape, within(self.arch, name), self.dtype, name=name)
      if name == stages.STACK:
        x = stages.repeat(unit, x, self.arch[f'{name}/branch'], train)
      else:
        x = unit(x, train)
      outputs[tap] = x
    return outputs


def staged(
  x: jax.Array,
  train: bool,
  unit: Any,
  blocks: Sequence[int],
  shapes: Sequence,
  arch: Arch,
  scan: bool,
  dtype: DTypeLike,
) -> dict[str, jax.Array]:
  """Runs features through 'stage1', 'stage2', ..., within a module's compact method.

  `blocks` has the number of units of every stage, `shapes` the sizes of its first unit,
  and `arch` is complete. Returns {'stage1/block0': features, ...} for all taps.
  """
  outputs = {}
  for i, (count, shape) in enumerate(zip(blocks, shapes), 1):
    name = f'stage{i}'
    part = within(arch, name)
    stage = ResidualStage(unit, count, shape, part, scan, dtype, name=name)
    outputs |= beneath(stage(x, train), name)
    x = [*outputs.values()][-1]
  return outputs


def stage_widths(blocks: Sequence[int], shapes: Sequence, scan: bool) -> dict[str, int]:
  """Returns the keys that stages have in `arch`, with their full values.

  `blocks` has the number of units of every stage, `shapes` the sizes of its first unit.
  """
  widths = {}
  for i, (count, shape) in enumerate(zip(blocks, shapes), 1):
    for name, _, times in stages.segments(count, scan):
      unit = (shape if name == 'block0' else shape.after).widths
      branch = {'branch': times} if 'branch' in unit else {}
      widths |= beneath(unit | branch, f'stage{i}/{name}')
  return widths
