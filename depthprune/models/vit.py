"""Vision transformers: patches as tokens, and normalisation before every branch.

Source: Dosovitskiy et al., arXiv 2010.11929.
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
from depthprune.models.layers import Pool, add_branch, classify
from depthprune.models.transformer import (
  attend,
  chain,
  check_sizes,
  layer_norm,
  layer_widths,
  xavier,
)


class ViTAttention(nn.Module):
  """The branch x + gate · attention(norm(x)) on tokens [batch, tokens, width]."""

  scale: float  # factor on the queries
  arch: Arch  # as for `transformer.attend`
  dropout: float
  dtype: DTypeLike

  @nn.compact
  def __call__(self, x: jax.Array, train: bool) -> jax.Array:
    y = attend(layer_norm(x, self.dtype), self.scale, self.arch, self.dtype)
    return add_branch(self, x, nn.Dropout(self.dropout)(y, deterministic=not train))


class ViTPerceptron(nn.Module):
  """The branch x + gate · down(gelu(up(norm(x)))) on tokens [batch, tokens, width]."""

  arch: Arch
  dropout: float
  dtype: DTypeLike

  @nn.compact
  def __call__(self, x: jax.Array, train: bool) -> jax.Array:
    dense = partial(nn.Dense, kernel_init=xavier, dtype=self.dtype)
    drop = nn.Dropout(self.dropout, deterministic=not train)
    y = nn.gelu(dense(self.arch['up'], name='up')(layer_norm(x, self.dtype)))
    y = dense(self.arch['down'], name='down')(drop(y))
    return add_branch(self, x, drop(y))


class ViTBlock(nn.Module):
  """An attention and a perceptron; each is absent if its branch is removed."""

  scale: float
  arch: Arch
  dropout: float
  dtype: DTypeLike

  @nn.compact
  def __call__(self, x: jax.Array, train: bool) -> jax.Array:
    attention, mlp = within(self.arch, 'attention'), within(self.arch, 'mlp')
    if attention['branch']:
      x = ViTAttention(
        self.scale, attention, self.dropout, self.dtype, name='attention'
      )(x, train)
    if mlp['branch']:
      x = ViTPerceptron(mlp, self.dropout, self.dtype, name='mlp')(x, train)
    return x


class ViT(stages.Stacks, nn.Module):
  """A vision transformer.

  It maps images [batch, h, w, c] to {'block0': [batch, tokens, width], ..., 'main':
  logits}: the tokens after every block, not normalised, and float32 logits [batch,
  classes] of the normalised tokens.

  Attributes:
    classes: number of logits.
    patch: height and width of the square of pixels that becomes a token.
    width: length of a token.
    depth: number of blocks.
    heads: number of heads of every attention; it divides the width.
    inner: width inside every perceptron.
    token: whether a class token stands before the patches and is read by the head.
      Otherwise the head reads the mean of all tokens.
    dropout: dropout rate after every dense layer but queries, keys and values.
    arch: the sizes that pruning changed, by key 'block0/mlp/up',
      'block0/attention/value', ...; see `depthprune.models.arch`. The number of heads
      is 'block0/attention/query:1', or 'blocks0/attention/query:2' in a stack, whose
      first axis is the layer.
    dtype: type of the computation; parameters and logits are float32.
    scan: whether the blocks are stacks of arrays, 'blocks0', 'blocks1', ..., that
      compile once; each has a tap at its end.
    segments: number of stacks; it divides the depth.
  """

  classes: int = 10
  patch: int = 4
  width: int = 192
  depth: int = 6
  heads: int = 3
  inner: int = 768
  token: bool = True
  dropout: float = 0.0
  arch: Arch = FrozenDict()
  dtype: DTypeLike = jnp.float32
  scan: bool = False
  segments: int = 1
  exits: ClassVar[tuple[str, ...]] = ('main',)
  kind: ClassVar[str] = 'block'

  def __post_init__(self):
    self.arch = FrozenDict(self.arch)
    check_sizes(self)
    super().__post_init__()

  @property
  def pool(self) -> Pool:
    """How a head on a tap reduces it to a vector; see `heads.Head`."""
    return 'cls' if self.token else 'avg'

  @property
  def widths(self) -> dict[str, int]:
    """Every key that `arch` may hold, with its value in the full network."""
    layers = layer_widths(self.parts, self.width, self.heads, self.inner, self.scan)
    return {'embed': self.width} | layers

  @nn.compact
  def __call__(
    self, x: jax.Array, train: bool = False, until: str = ''
  ) -> dict[str, jax.Array]:
    """Computes all outputs, or those up to the tap `until` if it is not ''."""
    arch = complete(self.arch, self.widths, 'ViT')
    scale = (self.width // self.heads) ** -0.5
    layer = lambda part, name: ViTBlock(
      scale, part, self.dropout, self.dtype, name=name
    )
    x = nn.Dropout(self.dropout)(self._tokens(x, arch), deterministic=not train)
    x, outputs = chain(layer, x, arch, self.parts, self.scan, until, train)
    if until:
      return outputs
    x = layer_norm(x, self.dtype)
    return {**outputs, 'main': classify(x, self.classes, self.pool)}

  def _tokens(self, x: jax.Array, arch: Arch) -> jax.Array:
    """Embeds patches, puts the class token before them and adds their positions."""
    if x.shape[1] % self.patch or x.shape[2] % self.patch:
      raise ValueError(f'ViT: images {x.shape} are not made of patches of {self.patch}')
    patch, normal = (self.patch, self.patch), nn.initializers.normal(0.02)
    x = nn.Conv(arch['embed'], patch, patch, dtype=self.dtype, name='embed')(x)
    x = x.reshape(x.shape[0], -1, x.shape[-1])
    if self.token:
      first = self.param('token', nn.initializers.zeros, (1, 1, x.shape[-1]))
      first = jnp.broadcast_to(first.astype(x.dtype), (x.shape[0], 1, x.shape[-1]))
      x = jnp.concatenate([first, x], 1)
    return x + self.param('position', normal, (1, *x.shape[1:])).astype(x.dtype)


_imagenet = partial(ViT, classes=1000, patch=16, depth=12)


def small() -> tuple[ViT, jax.ShapeDtypeStruct]:
  """Returns a small network of this family and an example of its input, for tests."""
  return ViT(width=8, depth=3, heads=4, inner=6), jax.ShapeDtypeStruct(
    (1, 8, 8, 3), jnp.float32
  )


vit_tiny = partial(_imagenet, width=192, heads=3, inner=768)
vit_small = partial(_imagenet, width=384, heads=6, inner=1536)
vit_base = partial(_imagenet, width=768, heads=12, inner=3072)
vit_cifar = partial(ViT, patch=4, width=192, depth=6, heads=3, inner=768, segments=3)
