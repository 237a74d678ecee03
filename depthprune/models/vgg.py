"""VGG with batch normalisation, in the CIFAR form: one dense layer as head.

Source: Simonyan, Zisserman, arXiv 1409.1556, configurations A, B, D and E.
"""

from functools import partial
from typing import ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.core import FrozenDict
from jax.typing import DTypeLike

from depthprune.models import stages
from depthprune.models.arch import Arch, beneath, complete, within
from depthprune.models.layers import ConvNorm, Pool, classify

GROWTH = (1, 2, 4, 8, 8)  # width of each stage, in units of the first


class VGGStage(nn.Module):
  """Blocks of convolution, batch normalisation and ReLU on features [batch, h, w, c].

  Returns the features after every block or stack of blocks, by the name of their tap.
  """

  blocks: int
  arch: Arch
  scan: bool
  dtype: DTypeLike

  @nn.compact
  def __call__(self, x: jax.Array, train: bool) -> dict[str, jax.Array]:
    outputs = {}
    for name, tap, times in stages.segments(self.blocks, self.scan):
      block = ConvNorm(self.arch[f'{name}/conv'], dtype=self.dtype, name=name)
      if name == stages.STACK:
        x = stages.repeat(block, x, times, train)
      else:
        x = block(x, train)
      outputs[tap] = x
    return outputs


class VGG(nn.Module):
  """A VGG network with batch normalisation.

  It maps images [batch, h, w, c] to {'stage1/block0': features, ..., 'main': logits}:
  the features after every block, and float32 logits [batch, classes]. Every stage is
  followed by a 2×2 max pool while the features are larger than one pixel: five times
  for images of 32×32, four times for 28×28, three times for 8×8. The head reads the
  mean over the pixels that are left.

  Attributes:
    classes: number of logits.
    blocks: number of convolutions in each of the five stages.
    width: channels of the first stage; the others have 2, 4, 8 and 8 times as many.
    arch: the widths that pruning changed, by key 'stage1/block0/conv', ...; see
      `depthprune.models.arch`.
    dtype: type of the computation; parameters and logits are float32.
    scan: whether the blocks after the first of each stage are one stack of arrays,
      'blocks', that compiles once.
    pool: how a head on a tap reduces it to a vector; see `heads.Head`.
  """

  classes: int = 10
  blocks: tuple[int, ...] = (2, 2, 3, 3, 3)
  width: int = 64
  arch: Arch = FrozenDict()
  dtype: DTypeLike = jnp.float32
  scan: bool = False
  exits: ClassVar[tuple[str, ...]] = ('main',)
  pool: ClassVar[Pool] = 'max'

  def __post_init__(self):
    self.arch = FrozenDict(self.arch)
    super().__post_init__()

  @property
  def taps(self) -> tuple[str, ...]:
    """The names of the outputs that are features, in order of depth."""
    return stages.taps(self.blocks, self.scan)

  @property
  def widths(self) -> dict[str, int]:
    """Every key that `arch` may hold, with its value in the full network."""
    return {
      f'stage{i}/{name}/conv': self.width * growth
      for i, (blocks, growth) in enumerate(zip(self.blocks, GROWTH), 1)
      for name, _, _ in stages.segments(blocks, self.scan)
    }

  @nn.compact
  def __call__(
    self, x: jax.Array, train: bool = False, until: str = ''
  ) -> dict[str, jax.Array]:
    """Computes all outputs, or those up to the tap `until` if it is not ''."""
    arch = complete(self.arch, self.widths, 'VGG')
    outputs = {}
    for i, blocks in enumerate(stages.up_to(until, self.blocks, self.scan), 1):
      name = f'stage{i}'
      stage = VGGStage(blocks, within(arch, name), self.scan, self.dtype, name=name)
      outputs |= beneath(stage(x, train), name)
      x = outputs[self.taps[len(outputs) - 1]]
      if min(x.shape[1:3]) > 1:
        x = nn.max_pool(x, (2, 2), strides=(2, 2))
    if until:
      return outputs
    return {**outputs, 'main': classify(x, self.classes)}


def small() -> tuple[VGG, jax.ShapeDtypeStruct]:
  """Returns a small network of this family and an example of its input, for tests."""
  return VGG(blocks=(1, 2, 1), width=4), jax.ShapeDtypeStruct((1, 8, 8, 3), jnp.float32)


vgg11 = partial(VGG, blocks=(1, 1, 2, 2, 2))
vgg13 = partial(VGG, blocks=(2, 2, 2, 2, 2))
vgg16 = partial(VGG, blocks=(2, 2, 3, 3, 3))
vgg19 = partial(VGG, blocks=(2, 2, 4, 4, 4))
