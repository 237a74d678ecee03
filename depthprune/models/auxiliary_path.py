"""An auxiliary path beside a trunk: a wider network while training, dropped afterwards.

Liu, Zhuang, Shen, Chen, Yin, "Training Compact Neural Networks via Auxiliary
Overparameterization", arXiv 1909.02214. The path follows the authors' later code
(CVPR 2020); stages with several taps, and one width for the whole path, are ours:

  h_s   = relu( D_s(h_{s-1}) + sum_j g_js phi_js(out_j) )
  aux   = head(h_S)

  out_j     features of the trunk at tap j
  phi, D    a 1×1 convolution and a batch normalisation, at the resolution of the last
            tap of the stage, or of the next stage if that is smaller, because a strided
            D reads no other positions; the first stage has no D
  g_js      gate of the connection from tap j to stage s: 1, or trained
"""

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from depthprune.gates import branch
from depthprune.models.arch import Arch, within
from depthprune.models.layers import Classes, Pool, answer, hashable, he_normal, pooled

NODES = 3  # stages of the path beside a trunk whose taps form a single chain


@dataclass(frozen=True)
class Auxiliary:
  """An auxiliary path: an exit that reads many taps of a trunk.

  `beside` makes one for the taps of a given trunk.

  Attributes:
    stages: the taps that feed each stage of the path, in order of depth.
    classes: number of logits, or {task: number of logits} for several tasks.
    width: channels of the path.
    pool: how features become a vector, as in `heads.Head`; None for a class of every
      pixel, logits [batch, height, width, classes] of the size of the image.
    gated: whether connections have gates, which a search can close.
  """

  stages: tuple[tuple[str, ...], ...]
  classes: Classes = 10
  width: int = 64
  pool: Pool | None = 'avg'
  gated: bool = False

  def __post_init__(self):
    object.__setattr__(self, 'classes', hashable(self.classes))

  @property
  def reads(self) -> tuple[str, ...]:
    """The taps that the path reads, each once."""
    return tuple(dict.fromkeys(tap for taps in self.stages for tap in taps))

  @property
  def widths(self) -> dict[str, int]:
    """Every key that `arch` may hold within the path, with its full value."""
    keys = {}
    for s, taps in enumerate(self.stages):
      for tap in taps:
        name = tap.replace('/', '_')
        keys[f'stage{s}/{name}/dense'] = self.width
        if self.gated:
          keys[f'stage{s}/{name}/branch'] = 1
      if s:
        keys[f'stage{s}/before/dense'] = self.width
    return keys


def beside(taps: tuple[str, ...], search: bool = False, **fields: Any) -> Auxiliary:
  """Makes an auxiliary path that reads the taps of a trunk.

      trunk = dp.models.build('resnet20')
      model = WithHeads(trunk, {'auxiliary': beside(trunk.taps, width=64)})

  Taps with a common first part, such as 'stage1/block0' and 'stage1/block1', feed the
  same stage of the path. Taps without a '/' are divided equally among three stages.

  Args:
    taps: names of the taps, in order of depth.
    search: whether a tap may feed its own and every later stage, each by a gate that a
      search can close.
    **fields: the fields classes, width and pool of `Auxiliary`.

  Raises:
    ValueError: there are no taps.
  """
  if not taps:
    raise ValueError('auxiliary: the trunk has no taps that a path could read')
  chain = [tap for tap in taps if '/' not in tap]
  groups: dict[Any, list[str]] = {}
  for tap in taps:
    stage = tap.rpartition('/')[0]
    if not stage:
      stage = chain.index(tap) * min(NODES, len(chain)) // len(chain)
    groups.setdefault(stage, []).append(tap)
  stages = [tuple(group) for group in groups.values()]
  if search:
    stages = [tuple(t for g in stages[: s + 1] for t in g) for s in range(len(stages))]
  return Auxiliary(tuple(stages), gated=search, **fields)


class Adaptor(nn.Module):
  """phi or D of the equations, times its gate: [batch, ..., c] → [batch, *size, width].

  Features that are smaller than `size`, or not a multiple of it, keep their size. Those
  with another number of axes, such as a sequence beside images, count by their mean.
  """

  width: int
  gated: bool
  dtype: DTypeLike

  @nn.compact
  def __call__(self, x: jax.Array, size: tuple[int, ...], train: bool) -> jax.Array:
    if x.ndim != len(size) + 2:
      x = pooled(x, 'avg').reshape(x.shape[0], *[1] * len(size), x.shape[-1])
    for axis, (n, wanted) in enumerate(zip(x.shape[1:-1], size), 1):
      step = -(-n // wanted)
      if step > 1 and -(-n // step) == wanted:  # like a convolution of that stride
        x = x[(slice(None),) * axis + (slice(None, None, step),)]
    layer = DenseNorm(self.width, name='dense')(x, train)
    if self.gated:  # the arrays of the layer are far smaller than its outputs
      gate = branch(self, jnp.ones(()))
      layer = tuple(gate * each for each in layer)
    kernel, bias = (each.astype(self.dtype) for each in layer)
    return x.astype(self.dtype) @ kernel + bias


class DenseNorm(nn.Module):
  """A dense layer with the batch normalisation behind it folded in: kernel and bias.

  It reads features [batch, ..., c] and returns the arrays, kernel [c, width] and bias
  [width]. In training, mean and variance of the outputs are computed from those of the
  inputs, which have fewer channels: normalising the wide outputs would cost several
  times as much as the layer.
  """

  width: int
  momentum: float = 0.9
  epsilon: float = 1e-5

  @nn.compact
  def __call__(self, x: jax.Array, train: bool) -> tuple[jax.Array, jax.Array]:
    kernel = self.param('kernel', he_normal, (x.shape[-1], self.width))
    scale = self.param('scale', nn.initializers.ones, (self.width,))
    bias = self.param('bias', nn.initializers.zeros, (self.width,))
    running = (
      self.variable('batch_stats', 'mean', jnp.zeros, (self.width,)),
      self.variable('batch_stats', 'var', jnp.ones, (self.width,)),
    )
    mean, var = (each.value for each in running)
    if train:
      rows = x.reshape(-1, x.shape[-1]).astype(jnp.float32)
      dot = functools.partial(jnp.matmul, precision='highest')
      mean = rows.mean(0)
      centred = rows - mean
      covariance = dot(centred.T, centred) / rows.shape[0]
      mean, var = dot(mean, kernel), (kernel * dot(covariance, kernel)).sum(0)
      if not self.is_initializing():
        for each, new in zip(running, (mean, var)):
          each.value = self.momentum * each.value + (1 - self.momentum) * new
    slope = scale * jax.lax.rsqrt(var + self.epsilon)
    return kernel * slope, bias - mean * slope


class AuxiliaryPath(nn.Module):
  """The module of an `Auxiliary`: {tap: features [batch, ..., c]} → float32 logits.

  Features may be vectors, images or sequences, also in one trunk. A stage without an
  open connection passes on the features before it. For several tasks it returns {task:
  logits}.
  """

  spec: Auxiliary
  arch: Arch
  dtype: DTypeLike

  @nn.compact
  def __call__(
    self,
    features: Mapping[str, jax.Array],
    train: bool = False,
    mask: jax.Array | None = None,
    size: tuple[int, ...] = (),
  ) -> Any:
    """Computes the logits.

    Args:
      features: {tap: features [batch, ..., c]}, more taps than are read if need be.
      train: whether to normalise by the statistics of the batch, and update them.
      mask: bool [batch, tokens], False on padding, which is left out of the answer.
      size: height and width of the logits, if they are those of pixels.

    Raises:
      ValueError: `arch` closes every connection.
    """
    h, sizes = None, [features[taps[-1]].shape[1:-1] for taps in self.spec.stages]
    for s, taps in enumerate(self.spec.stages):
      name, read = f'stage{s}', {tap: features[tap] for tap in taps}
      # Not larger than the next stage, which would read only a part of it.
      size_s, after = sizes[s], sizes[min(s + 1, len(sizes) - 1)]
      if len(after) == len(size_s):
        size_s = tuple(map(min, size_s, after))
      part = within(self.arch, name)
      stage = PathStage(self.spec.gated, part, self.dtype, name=name)
      h = stage(read, h, size_s, train)
    if h is None:
      raise ValueError('auxiliary: arch closes every connection; drop the exit instead')
    h = h.astype(jnp.float32)
    if self.spec.pool:
      h = pooled(h, self.spec.pool, mask)
    logits = answer(h, self.spec.classes, 'head')
    if self.spec.pool or h.shape[1:-1] == size:
      return logits
    large = lambda z: jax.image.resize(z, (z.shape[0], *size, z.shape[-1]), 'bilinear')
    return jax.tree.map(large, logits)


class PathStage(nn.Module):
  """Computes h_s of h_{s-1} and the taps of a stage; None if there is neither."""

  gated: bool
  arch: Arch
  dtype: DTypeLike

  @nn.compact
  def __call__(
    self,
    features: Mapping[str, jax.Array],
    h: jax.Array | None,
    size: tuple[int, ...],
    train: bool,
  ) -> jax.Array | None:
    parts = []
    if h is not None:
      before = Adaptor(self.arch['before/dense'], False, self.dtype, name='before')
      parts.append(before(h, size, train))
    for tap, x in features.items():
      name = tap.replace('/', '_')
      if self.arch.get(f'{name}/branch', 1):
        width = self.arch[f'{name}/dense']
        adaptor = Adaptor(width, self.gated, self.dtype, name=name)
        parts.append(adaptor(x, size, train))
    return nn.relu(_summed(parts, size)) if parts else None


def _summed(parts: Sequence[jax.Array], size: tuple[int, ...]) -> jax.Array:
  """Sums features of any size to [batch, *size, width], resizing each size once."""
  sums: dict[tuple[int, ...], jax.Array] = {}
  for x in parts:
    sums[x.shape] = sums[x.shape] + x if x.shape in sums else x
  full = lambda x: jax.image.resize(x, (x.shape[0], *size, x.shape[-1]), 'bilinear')
  sized = [x if x.shape[1:-1] == size else full(x) for x in sums.values()]
  return functools.reduce(jnp.add, sized)
