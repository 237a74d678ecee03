"""MobileNetV2: inverted residual units with linear bottlenecks, for CIFAR and ImageNet.

Source: Sandler, Howard, Zhu, Zhmoginov, Chen, arXiv 1801.04381, table 2. Widths are
rounded as in the authors' code; the first 3×3 convolution of a stage has the stride.
"""

from functools import partial
from typing import ClassVar, NamedTuple

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


class MobileShape(NamedTuple):
  """The sizes of an inverted residual unit before any pruning."""

  inputs: int  # channels that it reads
  features: int  # channels that it returns
  stride: int  # stride of its depthwise convolution
  expansion: int  # channels inside it, as a multiple of `inputs`

  @property
  def identity(self) -> bool:
    """Whether the unit has a shortcut, which needs equal sizes at both ends."""
    return self.stride == 1 and self.inputs == self.features

  @property
  def after(self) -> 'MobileShape':
    """The sizes of the units that follow in the same stage."""
    return self._replace(inputs=self.features, stride=1)

  @property
  def widths(self) -> dict[str, int]:
    """The keys that the unit has in `arch`, with their values in the full network."""
    inner = self.inputs * self.expansion
    expand = {'expand/conv': inner} if self.expansion > 1 else {}
    branch = {'branch': 1} if self.identity else {}
    return {
      **expand, 'depthwise/conv': inner, 'project/conv': self.features, **branch
    }  # fmt: skip


class MobileUnit(nn.Module):
  """An inverted residual unit: x + gate · F(x) on features [batch, h, w, c].

  F is a 1×1 convolution that expands the channels and a depthwise 3×3 convolution, both
  with ReLU6, and a linear 1×1 convolution that projects. Without expansion the first is
  absent. A unit that changes size is F(x) alone.
  """

  shape: MobileShape
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
        f'{groups} channels; a depthwise convolution must have equally many of both'
      )
    depthwise = ConvNorm6(
      width, 3, self.shape.stride, groups=groups, dtype=dtype, name='depthwise'
    )
    x = depthwise(x, train)
    project = ConvNorm(arch['project/conv'], 1, relu=False, dtype=dtype, name='project')
    return project(x, train)


class MobileNetV2(nn.Module):
  """MobileNetV2.

  It maps images [batch, h, w, c] to {'stage1/block0': features, ..., 'last': features,
  'main': logits}: the features after every unit and after the last 1×1 convolution,
  which the head reads, and float32 logits [batch, classes].

  Attributes:
    classes: number of logits.
    width: factor on the paper's channels, which are rounded to multiples of 8; the head
      always reads at least 1280.
    imagenet: whether the network has the paper's strides, which divide the resolution
      by 32. Otherwise stem and stage 2 keep it, and it is divided by 8.
    blocks: number of units in each stage; a shorter tuple makes fewer stages.
    arch: the sizes that pruning changed, by key 'stage2/block0/expand/conv', ...; see
      `depthprune.models.arch`.
    dtype: type of the computation; parameters and logits are float32.
    scan: whether the units after the first of each stage are one stack of arrays,
      'blocks', that compiles once.
    pool: how a head on a tap reduces it to a vector; see `heads.Head`.
  """

  classes: int = 10
  width: float = 1.0
  imagenet: bool = False
  blocks: tuple[int, ...] = (1, 2, 3, 4, 3, 3, 1)
  arch: Arch = FrozenDict()
  dtype: DTypeLike = jnp.float32
  scan: bool = False
  exits: ClassVar[tuple[str, ...]] = ('main',)
  pool: ClassVar[Pool] = 'avg'

  def __post_init__(self):
    self.arch = FrozenDict(self.arch)
    super().__post_init__()

  @property
  def taps(self) -> tuple[str, ...]:
    """The names of the outputs that are features, in order of depth."""
    return (*stages.taps(self.blocks, self.scan), 'last')

  @property
  def shapes(self) -> list[MobileShape]:
    """The sizes of the first unit of each stage."""
    features = [rounded(self.width * n) for n in (STEM, *FEATURES)]
    strides = STRIDES if self.imagenet else (1, 1, *STRIDES[2:])
    units = zip(features, features[1:], strides, EXPANSION)
    return [MobileShape(*unit) for unit, _ in zip(units, self.blocks)]

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
    """Computes all outputs, or those up to the tap `until` if it is not ''."""
    arch = complete(self.arch, self.widths, 'MobileNetV2')
    if until:
      stages.check_tap(until, self.taps)
    stride = 2 if self.imagenet else 1
    x = ConvNorm6(arch['stem/conv'], 3, stride, dtype=self.dtype, name='stem')(x, train)
    end = '' if until == 'last' else until
    counts = stages.up_to(end, self.blocks, self.scan)
    outputs = staged(
      x, train, MobileUnit, counts, self.shapes, arch, self.scan, self.dtype
    )
    if end:
      return outputs
    last = ConvNorm6(arch['last/conv'], 1, dtype=self.dtype, name='last')
    outputs['last'] = x = last(outputs[self.taps[-2]], train)
    return outputs if until else {**outputs, 'main': classify(x, self.classes)}


def rounded(width: float) -> int:
  """Rounds to the nearest multiple of 8 that is at least 8 and 0.9 times `width`."""
  multiple = max(8, int(width + 4) // 8 * 8)
  return multiple if multiple >= 0.9 * width else multiple + 8


def small() -> tuple[MobileNetV2, jax.ShapeDtypeStruct]:
  """Returns a small network of this family and an example of its input, for tests."""
  return MobileNetV2(blocks=(1, 3), width=0.5), jax.ShapeDtypeStruct(
    (1, 8, 8, 3), jnp.float32
  )


mobilenet_v2 = MobileNetV2
mobilenet_v2_imagenet = partial(MobileNetV2, imagenet=True, classes=1000)
