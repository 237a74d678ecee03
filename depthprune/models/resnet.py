"""Residual networks: CIFAR (6n + 2 layers) and ImageNet (18 to 152).

Source: He, Zhang, Ren, Sun, arXiv 1512.03385; pre-activation: arXiv 1603.05027.
"""

from functools import partial
from typing import ClassVar, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.core import FrozenDict
from jax import lax
from jax.typing import DTypeLike

from depthprune.models import stages
from depthprune.models.arch import Arch, complete
from depthprune.models.layers import ConvNorm, Pool, classify, norm
from depthprune.models.residual import ResNetShape, ResNetUnit, stage_widths, staged

IMAGENET = {
  18: (2, 2, 2, 2),
  34: (3, 4, 6, 3),
  50: (3, 4, 6, 3),
  101: (3, 4, 23, 3),
  152: (3, 8, 36, 3),
}


class ResNet(nn.Module):
  """A residual network.

  It maps images [batch, h, w, c] to {'stage1/block0': features, ..., 'main': logits}:
  the features after every residual unit, and float32 logits [batch, classes].

  Attributes:
    classes: number of logits.
    depth: number of layers. The CIFAR networks have 6n + 2, or 9n + 2 with
      bottlenecks; those for ImageNet have 18, 34, 50, 101 or 152.
    imagenet: whether the stem is a 7×7 convolution and a max pool, which reduce the
      resolution to a quarter, before four stages. Otherwise the stem is a 3×3
      convolution before three stages.
    bottleneck: whether a unit is a 1×1, a 3×3 and a 1×1 convolution, with 4 times as
      many channels at its ends, instead of two 3×3 convolutions.
    shortcut: the shortcut of a unit that changes size: 'A' subsamples and pads with
      zeros, 'B' is a 1×1 convolution.
    width: channels of the stem; every further stage has twice as many.
    arch: the sizes that pruning changed, by key 'stage1/block0/conv1', ...; see
      `depthprune.models.arch`.
    dtype: type of the computation; parameters and logits are float32.
    scan: whether the units after the first of each stage are one stack of arrays,
      'blocks', that compiles once.
    preact: whether units normalise before they convolve. The taps are then the bare
      sums, and the head reads them normalised.
    pool: how a head on a tap reduces it to a vector; see `heads.Head`.
  """

  classes: int = 10
  depth: int = 20
  imagenet: bool = False
  bottleneck: bool = False
  shortcut: Literal['A', 'B'] = 'A'
  width: int = 16
  arch: Arch = FrozenDict()
  dtype: DTypeLike = jnp.float32
  scan: bool = False
  preact: bool = False
  exits: ClassVar[tuple[str, ...]] = ('main',)
  pool: ClassVar[Pool] = 'avg'

  def __post_init__(self):
    self.arch = FrozenDict(self.arch)
    super().__post_init__()

  @property
  def taps(self) -> tuple[str, ...]:
    """The names of the outputs that are features, in order of depth."""
    return stages.taps(self.blocks, self.scan)

  @property
  def blocks(self) -> tuple[int, ...]:
    """Number of residual units in each stage."""
    if self.imagenet:
      if self.depth not in IMAGENET:
        raise ValueError(f'ResNet: depth {self.depth} is none of {[*IMAGENET]}')
      return IMAGENET[self.depth]
    layers = 9 if self.bottleneck else 6
    units, rest = divmod(self.depth - 2, layers)
    if rest or units < 1:
      raise ValueError(
        f'ResNet: depth must be {layers}n + 2 with n ≥ 1, got {self.depth}; '
        f'nearest is {layers * max(units, 1) + 2}'
      )
    return (units,) * 3

  @property
  def shapes(self) -> list[ResNetShape]:
    """The sizes of the first unit of each stage."""
    growth = 4 if self.bottleneck else 1
    features = [self.width * growth * 2**i for i, _ in enumerate(self.blocks)]
    return [
      ResNetShape(
        inputs,
        outputs,
        stride=2 if i else 1,
        bottleneck=self.bottleneck,
        shortcut=self.shortcut,
        preact=self.preact,
        first=i == 0,
      )
      for i, (inputs, outputs) in enumerate(zip([self.width, *features], features))
    ]

  @property
  def widths(self) -> dict[str, int]:
    """Every key that `arch` may hold, with its value in the full network."""
    units = stage_widths(self.blocks, self.shapes, self.scan)
    return {'stem/conv': self.width} | units

  @nn.compact
  def __call__(
    self, x: jax.Array, train: bool = False, until: str = ''
  ) -> dict[str, jax.Array]:
    """Computes all outputs, or those up to the tap `until` if it is not ''."""
    arch = complete(self.arch, self.widths, 'ResNet')
    size, stride = (7, 2) if self.imagenet else (3, 1)
    stem = ConvNorm(arch['stem/conv'], size, stride, dtype=self.dtype, name='stem')
    x = stem(x, train)
    if self.imagenet:
      x = nn.pool(x, -jnp.inf, lax.max, (3, 3), (2, 2), ((1, 1), (1, 1)))
    counts = stages.up_to(until, self.blocks, self.scan)
    outputs = staged(
      x, train, ResNetUnit, counts, self.shapes, arch, self.scan, self.dtype
    )
    if until:
      return outputs
    x = outputs[self.taps[-1]]
    if self.preact:
      x = nn.relu(norm(x, train, dtype=self.dtype, name='norm'))
    return {**outputs, 'main': classify(x, self.classes)}


def small() -> tuple[ResNet, jax.ShapeDtypeStruct]:
  """Returns a small network of this family and an example of its input, for tests."""
  return ResNet(depth=14, width=4), jax.ShapeDtypeStruct((1, 8, 8, 3), jnp.float32)


resnet8 = partial(ResNet, depth=8)
resnet14 = partial(ResNet, depth=14)
resnet20 = partial(ResNet, depth=20)
resnet32 = partial(ResNet, depth=32)
resnet44 = partial(ResNet, depth=44)
resnet56 = partial(ResNet, depth=56)
resnet110 = partial(ResNet, depth=110)

_imagenet = partial(ResNet, imagenet=True, shortcut='B', width=64, classes=1000)
resnet18 = partial(_imagenet, depth=18)
resnet34 = partial(_imagenet, depth=34)
resnet50 = partial(_imagenet, depth=50, bottleneck=True)
resnet101 = partial(_imagenet, depth=101, bottleneck=True)
resnet152 = partial(_imagenet, depth=152, bottleneck=True)
