"""A plain convolutional network: equal layers at full resolution, no shortcuts.

Source: Wójcik, Wołczyk, Bałazy, Tabor, arXiv 2004.08172 (NetCut): 15 layers for MNIST,
20 for CIFAR-10, 50 filters of 5×5 each.
"""

from functools import partial
from typing import ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.core import FrozenDict
from jax.typing import DTypeLike

from depthprune.models.arch import Arch, complete
from depthprune.models.layers import ConvNorm, Pool, classify
from depthprune.models.stages import Chain, Parts, check_tap, repeat, segments


class ConvNet(Chain, nn.Module):
  """A plain convolutional network.

  It maps images [batch, h, w, c] to {'layer0': [batch, h, w, n], 'layer1': ..., 'main':
  logits}: the features after every layer, and float32 logits [batch, classes]. A layer
  is a convolution with bias, a batch normalisation and a ReLU. The head reads the
  maximum of every channel.

  Attributes:
    classes: number of logits.
    layers: number of convolutions.
    width: channels of each of them.
    size: height and width of their kernels; an odd number.
    arch: the widths that pruning changed, by key 'layer0/conv', ...; see
      `depthprune.models.arch`.
    dtype: type of the computation; parameters and logits are float32.
    scan: whether the layers after the first are one stack of arrays, 'layers', that
      compiles once.
    pool: how a head on a tap reduces it to a vector; see `heads.Head`.
  """

  classes: int = 10
  layers: int = 15
  width: int = 50
  size: int = 5
  arch: Arch = FrozenDict()
  dtype: DTypeLike = jnp.float32
  scan: bool = False
  exits: ClassVar[tuple[str, ...]] = ('main',)
  pool: ClassVar[Pool] = 'max'

  def __post_init__(self):
    self.arch = FrozenDict(self.arch)
    if self.size % 2 == 0:
      raise ValueError(f'ConvNet: size must be odd to keep images whole: {self.size}')
    super().__post_init__()

  @property
  def parts(self) -> Parts:
    """The layers and stacks of layers in order; see `stages.segments`."""
    return segments(self.layers, self.scan, 'layer')

  @property
  def widths(self) -> dict[str, int]:
    """Every key that `arch` may hold, with its value in the full network."""
    return {f'{name}/conv': self.width for name, _, _ in self.parts}

  @nn.compact
  def __call__(
    self, x: jax.Array, train: bool = False, until: str = ''
  ) -> dict[str, jax.Array]:
    """Computes all outputs, or those up to the tap `until` if it is not ''."""
    arch = complete(self.arch, self.widths, 'ConvNet')
    if until:
      check_tap(until, self.taps)
    outputs = {}
    for name, tap, times in self.parts:
      width = arch[f'{name}/conv']
      layer = ConvNorm(width, self.size, dtype=self.dtype, bias=True, name=name)
      x = layer(x, train) if name == tap else repeat(layer, x, times, train)
      outputs[tap] = x
      if tap == until:
        return outputs
    return {**outputs, 'main': classify(x, self.classes, self.pool)}


def small() -> tuple[ConvNet, jax.ShapeDtypeStruct]:
  """Returns a small network of this family and an example of its input, for tests."""
  return ConvNet(layers=3, width=6, size=3), jax.ShapeDtypeStruct(
    (1, 8, 8, 3), jnp.float32
  )


convnet15 = partial(ConvNet, layers=15)
convnet20 = partial(ConvNet, layers=20)
convnet10x8 = partial(ConvNet, layers=10, width=8)  # trains in a minute on a CPU
