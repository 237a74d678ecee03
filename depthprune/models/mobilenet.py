"""MobileNetV2: inverted residual units with linear bottlenecks, CIFAR and ImageNet.

Source: Sandler, Howard, Zhu, Zhmoginov, Chen, arXiv 1801.04381, table 2; widths are
rounded as in its code, and the stride in the first 3×3 convolution of a stage.
"""

from functools import partial
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.core import FrozenDict
from jax.typing import DTypeLike

from depthprune.models import stages
from depthprune.models.arch import Arch, complete
from depthprune.models.layers import ConvNorm, Pool, add_branch, classify
from depthprune.models.residual import stage_widths, staged

EXPANSION = (1, 6, 6, 6, 6, 6, 6)
FEATURES = (16, 24, 32, 64, 96, 160, 320)
STRIDES = (1, 2, 2, 2, 1, 2, 1)
STEM, LAST = 32, 1280
ConvNorm6 = partial(ConvNorm, ceiling=6.0)


class Shape(NamedTuple):
  """What an inverted residual unit is before any pruning."""

  inputs: int
  features: int
  stride: int
  expansion: int

  @property
  def identity(self) -> bool:
    return self.stride == 1 and self.inputs == self.features

  @property
  def after(self) -> 'Shape':
    """The units that follow in the same stage: identity shortcuts."""
    return self._replace(inputs=self.features, stride=1)

  @property
  def widths(self) -> dict[str, int]:
    """The unit's keys of `arch` in the full network."""
    inner = self.inputs * self.expansion
    expand = {'expand/conv': inner} if self.expansion > 1 else {}
    branch = {'branch': 1} if self.identity else {}
    return {
      **expand, 'depthwise/conv': inner, 'project/conv': self.features, **branch
    }  # fmt: skip


class Unit(nn.Module):
  """x + gate · F(x) on [batch, h, w, c], or F(x) alone where the unit resizes.

  F is a 1×1 convolution that expands, a depthwise 3×3, both with ReLU6, and a 1×1 that
  projects, linear. Without expansion the first one is missing.
  """

  shape: Shape
  arch: Arch
  dtype: DTypeLike

  @nn.compact
  def __call__(self, x: jax.Array, train: bool) -> jax.Array:
    if not self.shape.identity:
      return self.bottleneck(x, train)
    return add_branch(self, x, self.bottleneck(x, train)) if self.arch['branch'] else x

  def bottleneck(self, x: jax.Array, train: bool) -> jax.Array:
    arch, dtype = self.arch, self.dtype
    if self.shape.expansion > 1:
      x = ConvNorm6(arch['expand/conv'], 1, dtype=dtype, name='expand')(x, train)
    width, groups = arch['depthwise/conv'], x.shape[-1]
    if width != groups:
      raise ValueError(
        f'{"/".join(self.path)}/depthwise: arch gives it {width} outputs, it reads '
        f'{groups} channels; a depthwise convolution has as many of the one as of the '
        'other'
      )
    depthwise = ConvNorm6(
      width, 3, self.shape.stride, groups=groups, dtype=dtype, name='depthwise'
    )
    x = depthwise(x, train)
    project = ConvNorm(arch['project/conv'], 1, relu=False, dtype=dtype, name='project')
    return project(x, train)


class MobileNetV2(nn.Module):
  """Images [batch, h, w, c] → {'stage1/block0': features, ..., 'main': logits}.

  The last tap, 'last', is the 1×1 convolution that the head reads.

  Attributes:
    classes: number of logits, float32 [batch, classes].
    width: times the paper's channels, rounded to multiples of 8; what the head reads
      has never less than 1280.
    imagenet: the paper's strides, 32 altogether; else stem and stage 2 keep the
      resolution, so that 8 is left of the strides.
    blocks: number of units in each stage; a shorter tuple has fewer stages.
    arch: what differs from that, by key 'stage2/block0/expand/conv', ...; see
      `models.arch`.
    dtype: compute type; parameters and logits are float32.
    scan: the units after the first of each stage are one stack, 'blocks'.
  """

  classes: int = 10
  width: float = 1.0
  imagenet: bool = False
  blocks: tuple[int, ...] = (1, 2, 3, 4, 3, 3, 1)
  arch: Arch = FrozenDict()
  dtype: DTypeLike = jnp.float32
  scan: bool = False

  def __post_init__(self):
    self.arch = FrozenDict(self.arch)
    super().__post_init__()

  @property
  def exits(self) -> tuple[str, ...]:
    return ('main',)

  @property
  def taps(self) -> tuple[str, ...]:
    return (*stages.taps(self.blocks, self.scan), 'last')

  @property
  def pool(self) -> Pool:
    """How a head on a tap makes a vector of it, as in NetCut; see `heads.Head`."""
    return 'avg'

  @property
  def shapes(self) -> list[Shape]:
    """The first unit of each stage."""
    features = [rounded(self.width * n) for n in (STEM, *FEATURES)]
    strides = STRIDES if self.imagenet else (1, 1, *STRIDES[2:])
    units = zip(features, features[1:], strides, EXPANSION)
    return [Shape(*unit) for unit, _ in zip(units, self.blocks)]

  @property
  def widths(self) -> dict[str, int]:
    """Every key that `arch` may hold, with its value in the full network."""
    last = rounded(max(self.width, 1.0) * LAST)
    ends = {'stem/conv': rounded(self.width * STEM), 'last/conv': last}
    return ends | stage_widths(self.blocks, self.shapes, self.scan)

  @nn.compact
  def __call__(
    self, x: jax.Array, train: bool = False, until: str = ''
  ) -> dict[str, jax.Array]:
    """`until`: the last tap to compute, nothing behind it exists; '' for everything."""
    arch = complete(self.arch, self.widths, 'MobileNetV2')
    if until:
      stages.check_tap(until, self.taps)
    stride = 2 if self.imagenet else 1
    x = ConvNorm6(arch['stem/conv'], 3, stride, dtype=self.dtype, name='stem')(x, train)
    end = '' if until == 'last' else until
    counts = stages.up_to(end, self.blocks, self.scan)
    given = Unit, counts, self.shapes, arch, self.scan, self.dtype
    outputs = staged(x, train, *given)
    if end:
      return outputs
    last = ConvNorm6(arch['last/conv'], 1, dtype=self.dtype, name='last')
    outputs['last'] = x = last(outputs[self.taps[-2]], train)
    return outputs if until else {**outputs, 'main': classify(x, self.classes)}


def rounded(width: float) -> int:
  """The nearest multiple of 8, at least 8, and never below 0.9 of `width`."""
  multiple = max(8, int(width + 4) // 8 * 8)
  return multiple if multiple >= 0.9 * width else multiple + 8


def small() -> tuple[MobileNetV2, jax.ShapeDtypeStruct]:
  """A small network of this family and an example of its input, for tests."""
  return MobileNetV2(blocks=(1, 3), width=0.5), jax.ShapeDtypeStruct(
    (1, 8, 8, 3), jnp.float32
  )


mobilenet_v2 = MobileNetV2
mobilenet_v2_imagenet = partial(MobileNetV2, imagenet=True, classes=1000)
