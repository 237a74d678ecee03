"""A light segmentation network: residual encoder, decoder that adds skip connections.

Source: the plan is LinkNet's (Chaurasia, Culurciello, arXiv 1707.03718): a ResNet's
stages, and on the way back the sum with each of them. Upsampling repeats pixels in
front of a convolution (Odena, Dumoulin, Olah, distill.pub/2016/deconv-checkerboard).
The head is ERFNet's (Romera et al., T-ITS 2018), a 2×2 transposed convolution of stride
2, written as four 1×1 convolutions, one for each pixel of the square.
"""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.core import FrozenDict
from jax.typing import DTypeLike

from depthprune.models import stages
from depthprune.models.arch import Arch, complete, within
from depthprune.models.layers import ConvNorm, Pool
from depthprune.models.residual import Shape, Unit, stage_widths, staged


class Up(nn.Module):
  """Features [batch, h, w, c] and a skip [batch, h', w', d] → [batch, h', w', width].

  1×1 convolution, each pixel twice in both directions, the sum with the skip, 3×3
  convolution; h' is 2h or 2h - 1, and w' likewise.
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
        f'{"/".join(self.path)}: what comes up has shape {x.shape}, the skip '
        f'{skip.shape}; arch must give kernels that are added to each other one width'
      )
    merge = ConvNorm(self.arch['merge/conv'], dtype=self.dtype, name='merge')
    return merge(x + skip, train)


class SegNet(nn.Module):
  """Images [batch, h, w, c] of any size → {taps, 'main': [batch, h, w, classes]}.

  A stem of stride 2, stages of residual units, each but the first of stride 2, then
  back. Taps are the units, 'stage1/block0' at half the size and so on, and what is
  merged, 'up3', 'up2', 'up1', in the size of that stage. Sizes are rounded up on the
  way down and cropped on the way back.

  Attributes:
    classes: number of logits of each pixel, float32.
    blocks: number of units in each stage; the default ends at 1/16 of the size.
    width: channels of the first stage; they double with every stage.
    arch: what differs from that, by key 'stage1/block0/conv1', 'up1/merge/conv', ...;
      see `models.arch`.
    dtype: compute type; parameters and logits are float32.
    scan: the units after the first of each stage are one stack, 'blocks'.
  """

  classes: int = 11
  blocks: tuple[int, ...] = (2, 2, 2, 2)
  width: int = 16
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
    return (*stages.taps(self.blocks, self.scan), *self.ups)

  @property
  def ups(self) -> tuple[str, ...]:
    """The decoder in order: which stage each part comes back to."""
    return tuple(f'up{i}' for i in range(len(self.blocks) - 1, 0, -1))

  @property
  def pool(self) -> Pool | None:
    """None: what is asked for is a class of every pixel, not one of a vector."""
    return None

  @property
  def shapes(self) -> list[Shape]:
    """The first unit of each stage."""
    features = [self.width * 2**i for i, _ in enumerate(self.blocks)]
    return [
      Shape(inputs, outputs, 2 if i else 1, bottleneck=False, shortcut='B')
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
    """`until`: the last tap to compute, nothing behind it exists; '' for everything."""
    arch = complete(self.arch, self.widths, 'SegNet')
    if until:
      stages.check_tap(until, self.taps)
    _, height, width, _ = x.shape
    stem = ConvNorm(arch['stem/conv'], stride=2, dtype=self.dtype, name='stem')
    x = stem(x, train)
    end = '' if until in self.ups else until
    counts = stages.up_to(end, self.blocks, self.scan)
    given = Unit, counts, self.shapes, arch, self.scan, self.dtype
    outputs = staged(x, train, *given)
    if end:
      return outputs
    *skips, x = (outputs[f'stage{i}/block{n - 1}'] for i, n in enumerate(counts, 1))
    for name, skip in zip(self.ups, reversed(skips)):
      up = Up(within(arch, name), self.dtype, name=name)
      outputs[name] = x = up(x, skip, train)
      if name == until:
        return outputs
    return {**outputs, 'main': label(x, self.classes, height, width)}


def label(x: jax.Array, classes: int, height: int, width: int) -> jax.Array:
  """Features [batch, h, w, c] → float32 logits [batch, height, width, classes].

  height and width: of the image, at most 2h and 2w; what is more is cropped. The
  kernel has 4 · classes outputs: row and column within the square, then class.
  """
  x = nn.Dense(4 * classes, name='head')(x.astype(jnp.float32))
  n, h, w, _ = x.shape
  x = x.reshape(n, h, w, 2, 2, classes).transpose(0, 1, 3, 2, 4, 5)
  return x.reshape(n, 2 * h, 2 * w, classes)[:, :height, :width]


def small() -> tuple[SegNet, jax.ShapeDtypeStruct]:
  """A small network of this family and an example of its input, for tests."""
  return SegNet(blocks=(1, 2, 1), width=4, classes=3), jax.ShapeDtypeStruct(
    (1, 8, 8, 3), jnp.float32
  )


segnet = SegNet
segnet8 = partial(SegNet, width=8)  # what a CPU trains
