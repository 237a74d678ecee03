"""Residual units: what they are before any pruning, shortcuts, branch, stages of them.

Source: He, Zhang, Ren, Sun, arXiv 1512.03385; pre-activation: arXiv 1603.05027.
Bottlenecks have their stride in the 3×3 convolution, as the common pretrained networks
do.
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


class Shape(NamedTuple):
  """What a residual unit is before any pruning. Shortcuts of option A pad by these."""

  inputs: int
  features: int
  stride: int
  bottleneck: bool
  shortcut: Literal['A', 'B']
  preact: bool = False
  first: bool = False  # of the network: its input comes from the stem

  @property
  def resized(self) -> bool:
    return self.stride > 1 or self.inputs != self.features

  @property
  def after(self) -> 'Shape':
    """The units that follow in the same stage: identity shortcuts."""
    return self._replace(inputs=self.features, stride=1, first=False)

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
      keys['shortcut' if self.preact else 'shortcut/conv'] = self.features
    return {**keys, 'branch': 1}


class Unit(nn.Module):
  """shortcut(x) + gate · F(x) on [batch, h, w, c]; without F if it is removed.

  Post-activation: F is convolutions that are each normalised, and a ReLU follows the
  sum. Pre-activation: normalisation and ReLU stand before each convolution, before the
  first one on both paths where the unit is resized, and not where the stem has them.
  """

  shape: Shape
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


def postactivated(x, shape: Shape, arch: Arch, train: bool, dtype: DTypeLike):
  """conv, norm, ReLU, conv, norm; a bottleneck has one convolution more."""
  for i, (size, stride) in enumerate(shape.layers, 1):
    x = nn.relu(x) if i > 1 else x
    x = conv(arch[f'conv{i}'], size, stride, dtype=dtype, name=f'conv{i}')(x)
    x = norm(x, train, dtype=dtype, name=f'norm{i}')
  return x


def preactivated(x, shape: Shape, arch: Arch, train: bool, dtype: DTypeLike):
  """norm, ReLU, conv, norm, ReLU, conv; the first two only if x was not yet through."""
  done = shape.resized or shape.first
  for i, (size, stride) in enumerate(shape.layers, 1):
    if i > 1 or not done:
      x = nn.relu(norm(x, train, dtype=dtype, name=f'norm{i}'))
    x = conv(arch[f'conv{i}'], size, stride, dtype=dtype, name=f'conv{i}')(x)
  return x


def shortcut(x, shape: Shape, arch: Arch, train: bool, dtype: DTypeLike):
  """x itself, or where the unit is resized x in its new size, by option A or B."""
  if not shape.resized:
    return x
  if shape.shortcut == 'A':
    return subsample_and_pad(x, shape)
  if shape.preact:
    return conv(arch['shortcut'], 1, shape.stride, dtype=dtype, name='shortcut')(x)
  width = arch['shortcut/conv']
  return ConvNorm(width, 1, shape.stride, False, dtype, name='shortcut')(x, train)


def subsample_and_pad(x: jax.Array, shape: Shape) -> jax.Array:
  """Shortcut of option A: every stride-th pixel, zeros for the channels that are new.

  How many zeros depends on the full network alone, so pruning never changes the pad.
  """
  new = shape.features - shape.inputs
  x = x[:, :: shape.stride, :: shape.stride]
  channels = (new // 2, new - new // 2, 0)
  return lax.pad(x, jnp.zeros((), x.dtype), ((0, 0, 0),) * 3 + (channels,))


class Stage(nn.Module):
  """[batch, h, w, c] → `blocks` units, the first of which may resize → their taps."""

  unit: Any  # (shape, arch, dtype, name) -> module, such as `Unit`
  blocks: int
  shape: Any  # of the first unit; those that follow have shape.after
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
  x: jax.Array, train: bool, unit: Any, blocks: Sequence[int], shapes: Sequence,
  arch: Arch, scan: bool, dtype: DTypeLike,
) -> dict[str, jax.Array]:  # fmt: skip
  """Features through stage1, stage2, ... → {'stage1/block0': ..., ...}, their taps.

  blocks: number of units in each; shapes: of the first unit of each, or of more stages
  than there are. The rest as in `Stage`. To be called where its modules are children.
  """
  outputs = {}
  for i, (count, shape) in enumerate(zip(blocks, shapes), 1):
    name = f'stage{i}'
    stage = Stage(unit, count, shape, within(arch, name), scan, dtype, name=name)
    outputs |= beneath(stage(x, train), name)
    x = [*outputs.values()][-1]
  return outputs


def stage_widths(blocks: Sequence[int], shapes: Sequence, scan: bool) -> dict[str, int]:
  """The keys of `arch` of stages; shapes: of the first unit of each."""
  widths = {}
  for i, (count, shape) in enumerate(zip(blocks, shapes), 1):
    for name, _, times in stages.segments(count, scan):
      unit = (shape if name == 'block0' else shape.after).widths
      branch = {'branch': times} if 'branch' in unit else {}
      widths |= beneath(unit | branch, f'stage{i}/{name}')
  return widths
