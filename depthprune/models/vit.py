"""Vision transformers: patches as tokens, pre-normalised attention and perceptrons.

Source: Dosovitskiy et al., arXiv 2010.11929.
"""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.core import FrozenDict
from jax.typing import DTypeLike

from depthprune.models.arch import Arch, beneath, complete, within
from depthprune.models.layers import Pool, add_branch, classify
from depthprune.models.stages import check_tap, repeat

xavier = nn.initializers.xavier_uniform()


def layer_norm(x: jax.Array, dtype: DTypeLike) -> jax.Array:
  """Normalisation of every token, computed in float32 and returned as `dtype`."""
  norm = nn.LayerNorm(epsilon=1e-6, dtype=jnp.float32, name='norm')
  return norm(x.astype(jnp.float32)).astype(dtype)


class Attention(nn.Module):
  """x + gate · attention(norm(x)) on tokens [batch, tokens, width].

  Attributes:
    scale: what queries are multiplied with. That of the full network: pruning the
      width of queries and keys does not change it.
    arch: 'query', 'key', 'value': width of one head; 'heads'; 'out'.
    dropout: rate, of what is added.
  """

  scale: float
  arch: Arch
  dropout: float
  dtype: DTypeLike

  @nn.compact
  def __call__(self, x: jax.Array, train: bool) -> jax.Array:
    dense = partial(nn.DenseGeneral, kernel_init=xavier, dtype=self.dtype)
    y = layer_norm(x, self.dtype)
    q, k, v = (  # [batch, tokens, heads, width of one]
      dense((self.arch['heads'], self.arch[name]), name=name)(y)
      for name in ('query', 'key', 'value')
    )
    scores = jnp.einsum('bqhd,bkhd->bhqk', q * self.scale, k)
    weights = nn.softmax(scores.astype(jnp.float32)).astype(scores.dtype)
    y = jnp.einsum('bhqk,bkhd->bqhd', weights, v)
    y = dense(self.arch['out'], axis=(-2, -1), name='out')(y)
    return add_branch(self, x, nn.Dropout(self.dropout)(y, deterministic=not train))


class Perceptron(nn.Module):
  """x + gate · down(gelu(up(norm(x)))) on tokens [batch, tokens, width]."""

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


class Block(nn.Module):
  """Attention, then a perceptron; each is absent if its branch is removed."""

  scale: float
  arch: Arch
  dropout: float
  dtype: DTypeLike

  @nn.compact
  def __call__(self, x: jax.Array, train: bool) -> jax.Array:
    attention, mlp = within(self.arch, 'attention'), within(self.arch, 'mlp')
    rest = self.dropout, self.dtype
    if attention['branch']:
      x = Attention(self.scale, attention, *rest, name='attention')(x, train)
    if mlp['branch']:
      x = Perceptron(mlp, *rest, name='mlp')(x, train)
    return x


class ViT(nn.Module):
  """Images [batch, h, w, c] → {'block0': [batch, tokens, width], ..., 'main': logits}.

  Taps are the bare sums; what the head reads is normalised once more.

  Attributes:
    classes: number of logits, float32 [batch, classes].
    patch: height and width of the pixels that one token stands for.
    width: length of a token.
    depth: number of blocks.
    heads: of every attention; they divide the width.
    inner: width inside every perceptron.
    token: a class token stands before the patches, and the head reads it; else the
      head reads the mean of all tokens.
    dropout: rate behind every dense layer but queries, keys and values.
    arch: what differs from that, by key 'block0/mlp/up', 'block0/attention/value', ...;
      see `models.arch`. The number of heads is 'block0/attention/query:1', with the
      layer axis in front of a stack 'blocks0/attention/query:2'.
    dtype: compute type; parameters and logits are float32.
    scan: the blocks are `segments` stacks of one length, 'blocks0', 'blocks1', ...,
      with a tap at the end of each.
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

  def __post_init__(self):
    self.arch = FrozenDict(self.arch)
    if self.width % self.heads:
      raise ValueError(f'ViT: {self.heads} heads do not divide the width {self.width}')
    if self.scan and self.depth % self.segments:
      raise ValueError(
        f'ViT: {self.segments} segments do not divide the {self.depth} blocks'
      )
    super().__post_init__()

  @property
  def exits(self) -> tuple[str, ...]:
    return ('main',)

  @property
  def parts(self) -> list[tuple[str, str, int]]:
    """As `stages.segments`."""
    if not self.scan:
      return [(f'block{i}', f'block{i}', 1) for i in range(self.depth)]
    length = self.depth // self.segments
    ends = range(length - 1, self.depth, length)
    return [(f'blocks{i}', f'block{end}', length) for i, end in enumerate(ends)]

  @property
  def taps(self) -> tuple[str, ...]:
    return tuple(tap for _, tap, _ in self.parts)

  @property
  def pool(self) -> Pool:
    """How a head on a tap makes a vector of it; see `heads.Head`."""
    return 'cls' if self.token else 'avg'

  @property
  def widths(self) -> dict[str, int]:
    """Every key that `arch` may hold, with its value in the full network."""
    size = self.width // self.heads
    widths = {'embed': self.width}
    for name, _, times in self.parts:
      attention = {'query': size, 'key': size, 'value': size, 'out': self.width}
      attention |= {self._heads: self.heads, 'branch': times}
      mlp = {'up': self.inner, 'down': self.width, 'branch': times}
      unit = beneath(attention, 'attention') | beneath(mlp, 'mlp')
      widths |= beneath(unit, name)
    return widths

  @property
  def _heads(self) -> str:
    """The axis of a query kernel that counts the heads."""
    return 'query:2' if self.scan else 'query:1'

  @nn.compact
  def __call__(
    self, x: jax.Array, train: bool = False, until: str = ''
  ) -> dict[str, jax.Array]:
    """`until`: the last tap to compute, nothing behind it exists; '' for everything."""
    arch = complete(self.arch, self.widths, 'ViT')
    if until:
      check_tap(until, self.taps)
    x = nn.Dropout(self.dropout)(self._tokens(x, arch), deterministic=not train)
    outputs = {}
    for name, tap, _ in self.parts:
      part = within(arch, name)
      part['attention/heads'] = part.pop(f'attention/{self._heads}')
      scale = (self.width // self.heads) ** -0.5
      block = Block(scale, part, self.dropout, self.dtype, name=name)
      x = repeat(block, x, _layers(name, part), train) if self.scan else block(x, train)
      outputs[tap] = x
      if tap == until:
        return outputs
    x = layer_norm(x, self.dtype)
    return {**outputs, 'main': classify(x, self.classes, self.pool)}

  def _tokens(self, x: jax.Array, arch: Arch) -> jax.Array:
    """Images → embedded patches, the class token before them, at their positions."""
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


def _layers(name: str, arch: Arch) -> int:
  """The layers of a stack that are left: those of both branches, or of the one left."""
  left = {arch['attention/branch'], arch['mlp/branch']} - {0}
  if len(left) > 1:
    raise ValueError(
      f'{name}: arch leaves {arch["attention/branch"]} layers of attention/branch and '
      f'{arch["mlp/branch"]} of mlp/branch; expected one number, or 0 for a branch '
      'that is gone in all of them'
    )
  return max(left, default=0)


_imagenet = partial(ViT, classes=1000, patch=16, depth=12)
vit_tiny = partial(_imagenet, width=192, heads=3, inner=768)
vit_small = partial(_imagenet, width=384, heads=6, inner=1536)
vit_base = partial(_imagenet, width=768, heads=12, inner=3072)
vit_cifar = partial(ViT, patch=4, width=192, depth=6, heads=3, inner=768, segments=3)
