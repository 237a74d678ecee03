"""Sequence networks, written as people write them: no knowledge of pruning."""

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np


class EncoderBlock(nn.Module):
  heads: int = 4
  inner: int = 20
  dropout: float = 0.0

  @nn.compact
  def __call__(self, x, train=False):
    width = x.shape[-1]
    y = nn.LayerNorm()(x)
    x = x + nn.MultiHeadDotProductAttention(num_heads=self.heads)(y, y)
    y = nn.gelu(nn.Dense(self.inner)(nn.LayerNorm()(x)))
    y = nn.Dropout(self.dropout, deterministic=not train)(y)
    return x + nn.Dense(width)(y)


class FusedBlock(nn.Module):
  """One matrix for query, key and value, as timm writes attention."""

  heads: int = 4
  inner: int = 20

  @nn.compact
  def __call__(self, x, train=False):
    n, l, c = x.shape
    y = nn.Dense(3 * c, name='qkv')(nn.LayerNorm()(x))
    y = y.reshape(n, l, 3, self.heads, c // self.heads)
    q, k, v = jnp.moveaxis(y, 2, 0)
    logits = jnp.einsum('nqhd,nkhd->nhqk', q, k) * (c // self.heads) ** -0.5
    y = jnp.einsum('nhqk,nkhd->nqhd', jax.nn.softmax(logits), v).reshape(n, l, c)
    x = x + nn.Dense(c, name='proj')(y)
    y = nn.Dense(self.inner)(nn.LayerNorm()(x))
    return x + nn.Dense(c)(nn.gelu(y))


class ViT(nn.Module):
  """ViT-B/16 is width 768, depth 12, patch 16, heads 12, inner 3072."""

  width: int = 16
  depth: int = 2
  patch: int = 4
  block: Callable = EncoderBlock

  @nn.compact
  def __call__(self, x, train=False):
    patch = (self.patch, self.patch)
    x = nn.Conv(self.width, patch, patch, name='embedding')(x)
    n, h, w, c = x.shape
    x = x.reshape(n, h * w, c)
    x = x + self.param('pos', nn.initializers.normal(0.02), (1, h * w, c))
    cls = self.param('cls', nn.initializers.normal(0.02), (1, 1, c))
    x = jnp.concatenate([jnp.tile(cls, (n, 1, 1)), x], 1)
    for _ in range(self.depth):
      x = self.block()(x, train)
    return nn.Dense(10)(nn.LayerNorm()(x)[:, 0])


class GatedLayer(nn.Module):
  block: Callable

  @nn.compact
  def __call__(self, x, _):
    gate = self.param('gate', nn.initializers.ones, ())
    return x + gate * (self.block(name='block')(x) - x), None


class ScannedViT(nn.Module):
  """Scan over layers: every parameter has a leading layer axis. Or no scan."""

  width: int = 16
  depth: int = 3
  patch: int = 4
  block: Callable = EncoderBlock
  scan: bool = True

  @nn.compact
  def __call__(self, x, train=False):
    patch = (self.patch, self.patch)
    x = nn.Conv(self.width, patch, patch, name='embedding')(x)
    n, h, w, c = x.shape
    x = x.reshape(n, h * w, c)
    if not self.scan:
      for i in range(self.depth):
        x, _ = GatedLayer(self.block, name=f'layer{i}')(x, None)
      return nn.Dense(10)(nn.LayerNorm()(x).mean(1))
    layers = nn.scan(
      GatedLayer,
      variable_axes={'params': 0},
      split_rngs={'params': True},
      length=self.depth,
    )
    x, _ = layers(self.block, name='layers')(x, None)
    return nn.Dense(10)(nn.LayerNorm()(x).mean(1))


class Mixer(nn.Module):
  """MLP-Mixer. Its token layers write their bias over every channel."""

  normed: bool = True

  @nn.compact
  def __call__(self, x, train=False):
    x = nn.Conv(8, (4, 4), (4, 4))(x)
    n, h, w, c = x.shape
    x = x.reshape(n, h * w, c)
    for _ in range(2):
      y = nn.LayerNorm()(x) if self.normed else x
      y = nn.Dense(h * w)(nn.gelu(nn.Dense(6)(y.swapaxes(1, 2)))).swapaxes(1, 2)
      x = x + y
      y = nn.LayerNorm()(x) if self.normed else x
      x = x + nn.Dense(c)(nn.gelu(nn.Dense(12)(y)))
    return nn.Dense(10)(x.mean(1))


class CharCNN(nn.Module):
  @nn.compact
  def __call__(self, tokens, train=False):
    x = nn.Embed(20, 8)(tokens)
    x = nn.max_pool(nn.relu(nn.Conv(12, (7,))(x)), (3,), (3,))
    x = nn.relu(nn.Conv(10, (3,))(x)).max(1)
    x = nn.relu(nn.Dense(16)(x))
    return nn.Dense(4)(nn.Dropout(0.3, deterministic=not train)(x))


class TiedEmbedding(nn.Module):
  """The embedding is gathered from at the start and multiplied with at the end."""

  @nn.compact
  def __call__(self, tokens, train=False):
    embed = nn.Embed(20, 8)
    x = embed(tokens)
    x = x + nn.Dense(8)(nn.relu(nn.Dense(12)(x)))
    return embed.attend(x)


class Rotary(nn.Module):
  """Causal attention with rotary positions: constant angles over half of each head."""

  heads: int = 2
  head: int = 8

  @nn.compact
  def __call__(self, tokens, train=False):
    x = nn.Embed(20, 12)(tokens)
    split = lambda name: nn.DenseGeneral((self.heads, self.head), name=name)(x)
    q, k, v = rotated(split('query')), rotated(split('key')), split('value')
    logits = jnp.einsum('nqhd,nkhd->nhqk', q, k) / self.head**0.5
    causal = np.tril(np.ones(logits.shape[-2:], bool))
    weights = jax.nn.softmax(jnp.where(causal, logits, -1e9))
    y = jnp.einsum('nhqk,nkhd->nqhd', weights, v)
    x = x + nn.DenseGeneral(12, axis=(-2, -1), name='out')(y)
    return nn.Dense(4)(x.mean(1))


def rotated(x):
  length, half = x.shape[1], x.shape[-1] // 2
  angle = np.arange(length)[:, None] / 100.0 ** (np.arange(half)[None] / half)
  cos, sin = (jnp.asarray(f(angle), x.dtype)[:, None] for f in (np.cos, np.sin))
  a, b = jnp.split(x, 2, -1)
  return jnp.concatenate([a * cos - b * sin, a * sin + b * cos], -1)


class GatedUnits(nn.Module):
  """SwiGLU in two spellings: one kernel split in two, and two kernels."""

  @nn.compact
  def __call__(self, tokens, train=False):
    x = nn.Embed(20, 8)(tokens)
    x = x + nn.Dense(8)(nn.glu(nn.Dense(20)(x)))
    x = x + nn.Dense(8)(nn.silu(nn.Dense(10)(x)) * nn.Dense(10)(x))
    return nn.Dense(4)(x.mean(1))


class Recurrent(nn.Module):
  """A GRU-like cell scanned over time; its state is one coupled group."""

  @nn.compact
  def __call__(self, tokens, train=False):
    x = nn.Embed(20, 6)(tokens)
    cell = nn.GRUCell(10)
    carry = cell.initialize_carry(jax.random.key(0), x[:, 0].shape)
    scan = nn.scan(
      lambda cell, carry, x: cell(carry, x),
      variable_broadcast='params',
      split_rngs={'params': False},
      in_axes=1,
      out_axes=1,
    )
    _, states = scan(cell, carry, x)
    return nn.Dense(4)(nn.relu(nn.Dense(8)(states)).max(1))
