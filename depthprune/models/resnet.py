"""Residual networks: CIFAR (6n + 2 layers) and ImageNet (18 to 152).

Source: He, Zhang, Ren, Sun, arXiv 1512.03385; pre-activation: arXiv 1603.05027.
"""

from functools import partial
from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.core import FrozenDict
from jax import lax
from jax.typing import DTypeLike

from depthprune.models import stages
from depthprune.models.arch import Arch, complete
from depthprune.models.layers import ConvNorm, Pool, classify, norm
from depthprune.models.residual import Shape, Unit, stage_widths, staged

IMAGENET = {
  18: (2, 2, 2, 2),
  34: (3, 4, 6, 3),
  50: (3, 4, 6, 3),
  101: (3, 4, 23, 3),
  152: (3, 8, 36, 3),
}


class ResNet(nn.Module):
  """Images [batch, h, w, c] → {'stage1/block0': features, ..., 'main': logits}.

  Attributes:
    classes: number of logits, float32 [batch, classes].
    depth: number of layers. CIFAR: 6n + 2, with bottlenecks 9n + 2. ImageNet: 18, 34,
      50, 101 or 152.
    imagenet: four stages behind a 7×7 convolution and a max pool, which take 1/4 of
      the resolution; else three stages behind a 3×3 convolution.
    bottleneck: units of 1×1, 3×3, 1×1 with 4 times the width outside.
    shortcut: where a unit changes size, 'A' subsamples and pads with zeros, 'B' has a
      1×1 convolution.
    width: channels of the stem; they double with every stage.
    arch: what differs from that, by key 'stage1/block0/conv1', ...; see `models.arch`.
    dtype: compute type; parameters and logits are float32.
    scan: the units after the first of each stage are one stack, 'blocks'.
    preact: units normalise before they convolve, and the sum of a unit stays as it is;
      what the head reads is normalised once more. Taps are the bare sums.
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

  def __post_init__(self):
    self.arch = FrozenDict(self.arch)
    super().__post_init__()

  @property
  def exits(self) -> tuple[str, ...]:
    return ('main',)

  @property
  def taps(self) -> tuple[str, ...]:
    return stages.taps(self.blocks, self.scan)

  @property
  def pool(self) -> Pool:
    """How a head on a tap makes a vector of it, as in NetCut; see `heads.Head`."""
    return 'avg'

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
  def shapes(self) -> list[Shape]:
    """The first unit of each stage."""
    growth = 4 if self.bottleneck else 1
    features = [self.width * growth * 2**i for i, _ in enumerate(self.blocks)]
    style = self.bottleneck, self.shortcut, self.preact
    return [
      Shape(inputs, outputs, 2 if i else 1, *style, first=i == 0)
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
    """`until`: the last tap to compute, nothing behind it exists; '' for everything."""
    arch = complete(self.arch, self.widths, 'ResNet')
    size, stride = (7, 2) if self.imagenet else (3, 1)
    stem = ConvNorm(arch['stem/conv'], size, stride, dtype=self.dtype, name='stem')
    x = stem(x, train)
    if self.imagenet:
      x = nn.pool(x, -jnp.inf, lax.max, (3, 3), (2, 2), ((1, 1), (1, 1)))
    counts = stages.up_to(until, self.blocks, self.scan)
    given = Unit, counts, self.shapes, arch, self.scan, self.dtype
    outputs = staged(x, train, *given)
    if until:
      return outputs
    x = outputs[self.taps[-1]]
    if self.preact:
      x = nn.relu(norm(x, train, dtype=self.dtype, name='norm'))
    return {**outputs, 'main': classify(x, self.classes)}


def small() -> tuple[ResNet, jax.ShapeDtypeStruct]:
  """A small network of this family and an example of its input, for tests."""
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
