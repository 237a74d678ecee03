"""A light segmentation network: a residual encoder, and a decoder with skips.

Source: the plan is that of LinkNet (Chaurasia, Culurciello, arXiv 1707.03718): the
stages of a ResNet, each of which is added again on the way back. Upsampling repeats
pixels before a convolution (Odena, Dumoulin, Olah, distill.pub/2016/
deconv-checkerboard). The head is that of ERFNet (Romera et al., T-ITS 2018), a 2×2
transposed convolution of stride 2, written as one dense layer of four times the width.
"""

from functools import partial
from typing import ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.core import FrozenDict
from jax.typing import DTypeLike

from depthprune.models import stages
from depthprune.models.arch import Arch, complete, within
from depthprune.models.layers import ConvNorm
from depthprune.models.residual import ResNetShape, ResNetUnit, stage_widths, staged


class SegNetUp(nn.Module):
  """One step of the decoder: doubles the resolution and adds a skip connection.

  It maps features [batch, h, w, c] and a skip [batch, h', w', d] to [batch, h', w',
  width], where h' is 2h or 2h - 1 and w' likewise: a 1×1 convolution, every pixel twice
  in both directions, the sum with the skip, and a 3×3 convolution.
  """

  arch: Arch
  dtype: DTypeLike

  @nn.compact
  def __call__(self, x: jax.Array, skip: jax.Array, train: bool) -> jax.Array:
    reduce = ConvNorm(self.arch['reduce/conv'], 1, dtype=self.dtype, name='reduce')
    x = reduce(x, train)
    x = jnp.repeat(jnp.repeat(x, 2, axis=1), 2, axis=2)
    x = x[:, : skip.shape[1], : skip.shape[2]]
    if x.shape != skip.shape:
      raise ValueError(
        f'{"/".join(self.path)}: the upsampled features have shape {x.shape}, the skip '
        f'{skip.shape}; arch must give kernels that are added to each other one width'
      )
    merge = ConvNorm(self.arch['merge/conv'], dtype=self.dtype, name='merge')
    return merge(x + skip, train)


class SegNet(nn.Module):
  """A network that classifies every pixel of an image.

  It maps images [batch, h, w, c] of any size to {'stage1/block0': features, ...,
  'up1': features, 'main': logits [batch, h, w, classes]}. The encoder is a stem of
  stride 2 and stages of residual units, each but the first of stride 2; sizes are
  rounded up. The decoder goes back, stage by stage, and crops to their sizes: its taps
  'up3', 'up2', 'up1' have the resolution of the stage of that number.

  Attributes:
    classes: number of logits of each pixel.
    blocks: number of units in each stage; the default ends at 1/16 of the size.
    width: channels of the first stage; every further stage has twice as many.
    arch: the sizes that pruning changed, by key 'stage1/block0/conv1',
      'up1/merge/conv', ...; see `depthprune.models.arch`.
    dtype: type of the computation; parameters and logits are float32.
    scan: whether the units after the first of each stage are one stack of arrays,
      'blocks', that compiles once.
    pool: None: the answer is a class of every pixel, not one of a vector.
  """

  classes: int = 11
  blocks: tuple[int, ...] = (2, 2, 2, 2)
  width: int = 16
  arch: Arch = FrozenDict()
  dtype: DTypeLike = jnp.float32
  scan: bool = False
  exits: ClassVar[tuple[str, ...]] = ('main',)
  pool: ClassVar[None] = None

  def __post_init__(self):
    self.arch = FrozenDict(self.arch)
    super().__post_init__()

  @property
  def taps(self) -> tuple[str, ...]:
    """The names of the outputs that are features, in order of depth."""
    return (*stages.taps(self.blocks, self.scan), *self.ups)

  @property
  def ups(self) -> tuple[str, ...]:
    """The steps of the decoder in order, numbered by the stage that they return to."""
    return tuple(f'up{i}' for i in range(len(self.blocks) - 1, 0, -1))

  @property
  def shapes(self) -> list[ResNetShape]:
    """The sizes of the first unit of each stage."""
    features = [self.width * 2**i for i, _ in enumerate(self.blocks)]
    return [
      ResNetShape(inputs, outputs, 2 if i else 1, bottleneck=False, shortcut='B')
      for i, (inputs, outputs) in enumerate(zip([self.width, *features], features))
    ]

  @property
  def widths(self) -> dict[str, int]:
    """Every key that `arch` may hold, with its value in the full network."""
    widths = {'stem/conv': self.width}
    widths |= stage_widths(self.blocks, self.shapes, self.scan)
    for name in self.ups:
      features = self.shapes[int(name.removeprefix('up')) - 1].features
      widths |= {f'{name}/{part}/conv': features for part in ('reduce', 'merge')}
    return widths

  @nn.compact
  def __call__(
    self, x: jax.Array, train: bool = False, until: str = ''
  ) -> dict[str, jax.Array]:
    """Computes all outputs, or those up to the tap `until` if it is not ''."""
    arch = complete(self.arch, self.widths, 'SegNet')
    if until:
      stages.check_tap(until, self.taps)
    _, height, width, _ = x.shape
    stem = ConvNorm(arch['stem/conv'], stride=2, dtype=self.dtype, name='stem')
    x = stem(x, train)
    end = '' if until in self.ups else until
    counts = stages.up_to(end, self.blocks, self.scan)
    outputs = staged(
      x, train, ResNetUnit, counts, self.shapes, arch, self.scan, self.dtype
    )
    if end:
      return outputs
    *skips, x = (outputs[f'stage{i}/block{n - 1}'] for i, n in enumerate(counts, 1))
    for name, skip in zip(self.ups, reversed(skips)):
      up = SegNetUp(within(arch, name), self.dtype, name=name)
      outputs[name] = x = up(x, skip, train)
      if name == until:
        return outputs
    return {**outputs, 'main': label(x, self.classes, height, width)}


def label(x: jax.Array, classes: int, height: int, width: int) -> jax.Array:
  """Computes logits of every pixel from features of half the resolution.

  Args:
    x: features [batch, h, w, c].
    classes: number of classes. The kernel has four times as many outputs: the row and
      the column within a square of 2×2 pixels, then the class.
    height: height of the image, at most 2h; the rest is cropped.
    width: width of the image, at most 2w.

  Returns:
    float32 logits [batch, height, width, classes].
  """
  x = nn.Dense(4 * classes, name='head')(x.astype(jnp.float32))
  n, h, w, _ = x.shape
  x = x.reshape(n, h, w, 2, 2, classes).transpose(0, 1, 3, 2, 4, 5)
  return x.reshape(n, 2 * h, 2 * w, classes)[:, :height, :width]


def small() -> tuple[SegNet, jax.ShapeDtypeStruct]:
  """Returns a small network of this family and an example of its input, for tests."""
  return SegNet(blocks=(1, 2, 1), width=4, classes=3), jax.ShapeDtypeStruct(
    (1, 8, 8, 3), jnp.float32
  )


segnet = SegNet
segnet8 = partial(SegNet, width=8)  # trains on a CPU
