"""Image networks, written as people write them: no knowledge of pruning."""

from collections.abc import Callable, Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp


def conv(features, size=1, stride=1, name=None, **more):
  window, strides = (size, size), (stride, stride)
  return nn.Conv(features, window, strides, use_bias=False, name=name, **more)


def norm(train, name=None):
  return nn.BatchNorm(use_running_average=not train, name=name)


class Basic(nn.Module):
  features: int
  stride: int = 1

  @nn.compact
  def __call__(self, x, train):
    y = nn.relu(norm(train)(conv(self.features, 3, self.stride)(x)))
    y = norm(train)(conv(self.features, 3)(y))
    if x.shape != y.shape:
      x = norm(train, 'norm_proj')(conv(self.features, 1, self.stride, 'conv_proj')(x))
    return nn.relu(x + y)


class Bottleneck(nn.Module):
  features: int
  stride: int = 1
  groups: int = 1

  @nn.compact
  def __call__(self, x, train):
    grouped = {'feature_group_count': self.groups}
    y = nn.relu(norm(train)(conv(self.features)(x)))
    y = nn.relu(norm(train)(conv(self.features, 3, self.stride, **grouped)(y)))
    y = norm(train)(conv(self.features * 4)(y))
    if x.shape != y.shape:
      shortcut = conv(self.features * 4, 1, self.stride, 'conv_proj')
      x = norm(train, 'norm_proj')(shortcut(x))
    return nn.relu(x + y)


class ResNet(nn.Module):
  block: Callable = Basic
  stages: Sequence[int] = (2, 1)
  features: int = 8

  @nn.compact
  def __call__(self, x, train=False):
    x = nn.relu(norm(train)(conv(self.features, 3)(x)))
    x = nn.max_pool(x, (3, 3), (2, 2), 'SAME')
    for i, blocks in enumerate(self.stages):
      for j in range(blocks):
        x = self.block(self.features * 2**i, 2 if i and not j else 1)(x, train)
    return nn.Dense(10)(x.mean((1, 2)))


class PaddedShortcuts(nn.Module):
  """Option A of He et al. 2015: strided subsample, channels padded with zeros."""

  @nn.compact
  def __call__(self, x, train=False):
    x = nn.relu(norm(train)(nn.Conv(8, (3, 3))(x)))
    for f, s in ((8, 1), (16, 2), (32, 2)):
      y = nn.relu(norm(train)(nn.Conv(f, (3, 3), (s, s))(x)))
      y = norm(train)(nn.Conv(f, (3, 3))(y))
      if s > 1:
        x = jnp.pad(x[:, ::s, ::s], ((0, 0), (0, 0), (0, 0), (f // 4, f // 4)))
      x = nn.relu(x + y)
    return nn.Dense(10)(x.mean((1, 2)))


class InvertedResidual(nn.Module):
  features: int
  stride: int
  expand: int

  @nn.compact
  def __call__(self, x, train):
    inner = x.shape[-1] * self.expand
    y = x
    if self.expand != 1:
      y = nn.relu6(norm(train)(conv(inner)(y)))
    y = conv(inner, 3, self.stride, feature_group_count=inner)(y)
    y = norm(train)(conv(self.features)(nn.relu6(norm(train)(y))))
    return x + y if x.shape == y.shape else y


class MobileNetV2(nn.Module):
  @nn.compact
  def __call__(self, x, train=False):
    x = nn.relu6(norm(train)(conv(8, 3, 2)(x)))
    for expand, features, stride in ((1, 6, 1), (4, 8, 2), (4, 8, 1)):
      x = InvertedResidual(features, stride, expand)(x, train)
    return nn.Dense(10)(nn.relu6(norm(train)(conv(24)(x))).mean((1, 2)))


class DenseNet(nn.Module):
  """Huang et al. 2017; DenseNet-121 is growth 32, stages (6, 12, 24, 16)."""

  growth: int = 6
  stages: Sequence[int] = (2, 2)

  @nn.compact
  def __call__(self, x, train=False):
    x = conv(2 * self.growth, 3)(x)
    for stage, layers in enumerate(self.stages):
      for _ in range(layers):
        y = conv(4 * self.growth)(nn.relu(norm(train)(x)))
        y = conv(self.growth, 3)(nn.relu(norm(train)(y)))
        x = jnp.concatenate([x, y], -1)
      if stage + 1 < len(self.stages):
        x = conv(x.shape[-1] // 2)(nn.relu(norm(train)(x)))
        x = nn.pool(x, 0.0, jax.lax.add, (2, 2), (2, 2), 'VALID') / 4
    return nn.Dense(10)(nn.relu(norm(train)(x)).mean((1, 2)))


class VGG(nn.Module):
  """Flattens its last feature map into a dense layer; drops out while it trains."""

  @nn.compact
  def __call__(self, x, train=False):
    for features in (8, 12):
      x = nn.relu(norm(train)(nn.Conv(features, (3, 3))(x)))
      x = nn.max_pool(x, (2, 2), (2, 2))
    x = nn.relu(nn.Dense(16)(x.reshape(x.shape[0], -1)))
    return nn.Dense(10)(nn.Dropout(0.5, deterministic=not train)(x))


class MultiExit(nn.Module):
  """A head after every block, gates of its own on the residual branches."""

  @nn.compact
  def __call__(self, x, train=False):
    x = nn.relu(nn.Conv(8, (3, 3))(x))
    exits = []
    for i in range(3):
      gate = self.param(f'gate{i}', nn.initializers.ones, ())
      x = x + gate * Basic(8, name=f'block{i}')(x, train)
      exits.append(nn.Dense(10, name=f'exit{i}')(x.mean((1, 2))))
    return jnp.stack(exits)


class UNet(nn.Module):
  """Down by strides, up by transposed convolutions, skips by concatenation."""

  @nn.compact
  def __call__(self, x, train=False):
    fine = nn.relu(norm(train)(conv(6, 3)(x)))
    mid = nn.relu(norm(train)(conv(8, 3, 2)(fine)))
    low = nn.relu(norm(train)(conv(12, 3, 2)(mid)))
    up = nn.relu(nn.ConvTranspose(8, (2, 2), (2, 2))(low))
    up = nn.relu(conv(8, 3)(jnp.concatenate([mid, up], -1)))
    up = nn.relu(nn.ConvTranspose(6, (3, 3), (2, 2))(up))
    up = jnp.concatenate([up, fine], -1)
    return nn.Conv(2, (1, 1))(nn.relu(conv(8, 3)(up)))


class Atrous(nn.Module):
  """Parallel dilated convolutions, as in DeepLab's pyramid."""

  @nn.compact
  def __call__(self, x, train=False):
    x = nn.relu(norm(train)(conv(8, 3)(x)))
    views = [conv(4, 3, kernel_dilation=(d, d))(x) for d in (1, 2, 3)]
    x = nn.relu(norm(train)(jnp.concatenate(views, -1)))
    return nn.Conv(2, (1, 1))(x)


class SqueezeExcite(nn.Module):
  @nn.compact
  def __call__(self, x, train=False):
    x = nn.relu(norm(train)(conv(8, 3)(x)))
    for _ in range(2):
      y = norm(train)(conv(8, 3)(x))
      scale = nn.relu(nn.Dense(4)(y.mean((1, 2))))
      scale = nn.sigmoid(nn.Dense(8)(scale))
      x = nn.relu(x + y * scale[:, None, None])
    return nn.Dense(10)(x.mean((1, 2)))


class GroupNormed(nn.Module):
  """Whole groups of GroupNorm are independent of each other, channels are not."""

  @nn.compact
  def __call__(self, x, train=False):
    x = nn.relu(nn.GroupNorm(4)(conv(8, 3)(x)))
    x = x + nn.GroupNorm(2)(nn.silu(conv(8, 3)(x)))
    return nn.Dense(10)(x.mean((1, 2)))


class ShuffleNet(nn.Module):
  """Grouped convolutions with a channel shuffle between them."""

  @nn.compact
  def __call__(self, x, train=False):
    x = nn.relu(norm(train)(conv(12, 3)(x)))
    y = nn.relu(norm(train)(conv(12, feature_group_count=3)(x)))
    n, h, w, c = y.shape
    y = y.reshape(n, h, w, 3, c // 3).swapaxes(3, 4).reshape(n, h, w, c)
    y = norm(train)(conv(12, 3, feature_group_count=12)(y))
    y = norm(train)(conv(12, feature_group_count=3)(y))
    return nn.Dense(10)(nn.relu(x + y).mean((1, 2)))


class ChannelSoftmax(nn.Module):
  """Spatially pooled softmax over channels: masked is not small."""

  @nn.compact
  def __call__(self, x, train=False):
    x = nn.relu(conv(8, 3)(x))
    return nn.Dense(10)(jax.nn.softmax(conv(8, 3)(x)).mean((1, 2)))
