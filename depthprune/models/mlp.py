"""A plain multi-layer perceptron: dense layers with ReLU on the flattened input."""

from functools import partial
from typing import ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.core import FrozenDict
from jax.typing import DTypeLike

from depthprune.models.arch import Arch, complete
from depthprune.models.layers import Pool, classify, he_normal
from depthprune.models.stages import Chain, Parts, check_tap, repeat, segments


class MLPLayer(nn.Module):
  """A dense layer with ReLU, [batch, n] → [batch, features]."""

  features: int
  dtype: DTypeLike = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    dense = partial(nn.Dense, kernel_init=he_normal, dtype=self.dtype)
    return nn.relu(dense(self.features, name='dense')(x))


class MLP(Chain, nn.Module):
  """A multi-layer perceptron.

  It maps inputs [batch, ...] to {'layer0': [batch, n], 'layer1': ..., 'main': logits}:
  the features after every layer, and float32 logits [batch, classes].

  Attributes:
    classes: number of logits.
    hidden: width of every hidden layer.
    arch: the widths that pruning changed, by key 'layer0/dense', ...; see
      `depthprune.models.arch`.
    dtype: type of the computation; parameters and logits are float32.
    scan: whether the layers after the first, which then must have its width, are one
      stack of arrays, 'layers', that compiles once.
    pool: how a head on a tap reduces it to a vector; see `heads.Head`.
  """

  classes: int = 10
  hidden: tuple[int, ...] = (200, 200)
  arch: Arch = FrozenDict()
  dtype: DTypeLike = jnp.float32
  scan: bool = False
  exits: ClassVar[tuple[str, ...]] = ('main',)
  pool: ClassVar[Pool] = 'max'

  def __post_init__(self):
    self.arch = FrozenDict(self.arch)
    if self.scan and len(set(self.hidden)) > 1:
      raise ValueError(f'MLP: scan needs layers of one width, got {self.hidden}')
    super().__post_init__()

  @property
  def parts(self) -> Parts:
    """The layers and stacks of layers in order; see `stages.segments`."""
    return segments(len(self.hidden), self.scan, 'layer')

  @property
  def widths(self) -> dict[str, int]:
    """Every key that `arch` may hold, with its value in the full network."""
    names = (f'{name}/dense' for name, _, _ in self.parts)
    return dict(zip(names, self.hidden))

  @nn.compact
  def __call__(
    self, x: jax.Array, train: bool = False, until: str = ''
  ) -> dict[str, jax.Array]:
    """Computes all outputs, or those up to the tap `until` if it is not ''."""
    del train
    arch = complete(self.arch, self.widths, 'MLP')
    if until:
      check_tap(until, self.taps)
    x = x.reshape(x.shape[0], -1)
    outputs = {}
    for name, tap, times in self.parts:
      layer = MLPLayer(arch[f'{name}/dense'], self.dtype, name=name)
      x = layer(x) if name == tap else repeat(layer, x, times)
      outputs[tap] = x
      if tap == until:
        return outputs
    return {**outputs, 'main': classify(x, self.classes)}


def small() -> tuple[MLP, jax.ShapeDtypeStruct]:
  """Returns a small network of this family and an example of its input, for tests."""
  return MLP(hidden=(8, 6, 6)), jax.ShapeDtypeStruct((1, 8, 8, 3), jnp.float32)


mlp = MLP
mlp20x200 = partial(MLP, hidden=(200,) * 20)
mlp20x1000 = partial(MLP, hidden=(1000,) * 20)
