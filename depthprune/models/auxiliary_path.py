"""An auxiliary path beside a trunk: a wider network while training, dropped afterwards.

Liu, Zhuang, Shen, Chen, Yin, "Training Compact Neural Networks via Auxiliary
Overparameterization", arXiv 1909.02214. The path is that of the authors' later code
(CVPR 2020); stages of several taps, and one width for all of it, are ours:

  h_s   = relu( D_s(h_{s-1}) + sum_j g_js phi_js(out_j) )
  aux   = head(h_S)

  out_j     features of the trunk at tap j
  phi, D    dense over channels (a 1 × 1 convolution) and batch normalisation, at the
            size of the stage's last tap or, if smaller, of the next stage's: where D is
            strided nothing else is read; there is no D in the first
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

NODES = 3  # stages of the path beside a trunk whose taps are one chain


@dataclass(frozen=True)
class Auxiliary:
  """A path that reads many taps, and has an answer of its own.

  Attributes:
    stages: taps that feed each stage of the path, in the order of depth.
    classes: number of logits; or that of each of several tasks, by name.
    width: channels of the path.
    pool: how features become a vector, as in `heads.Head`; None for a class of every
      pixel: logits [batch, height, width, classes], of the size of the image.
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
    """The taps that it reads, each once."""
    return tuple(dict.fromkeys(tap for taps in self.stages for tap in taps))

  @property
  def widths(self) -> dict[str, int]:
    """Every key that `arch` may hold beneath it, with its value in the full path."""
    keys = {}
    for s, taps in enumerate(self.stages):
      for tap in taps:
        keys[f'stage{s}/{_word(tap)}/dense'] = self.width
        if self.gated:
          keys[f'stage{s}/{_word(tap)}/branch'] = 1
      if s:
        keys[f'stage{s}/before/dense'] = self.width
    return keys


def beside(taps: tuple[str, ...], search: bool = False, **fields: Any) -> Auxiliary:
  """An auxiliary path for a trunk with these taps.

  A tap called 'stage1/block0' feeds a stage with all others of its 'stage1'; of taps
  without such a name equally many feed each of three stages. With `search` a tap may
  feed its own and every later stage, by a gate for each.

  fields: classes, width and pool of `Auxiliary`. Raises ValueError without taps.
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


def _word(tap: str) -> str:
  """The name of a tap as that of a module."""
  return tap.replace('/', '_')


class Adaptor(nn.Module):
  """[batch, ..., c] → [batch, *size, width]: phi or D, times its gate if it has one.

  What is smaller than `size`, or no multiple of it, comes in its own size.
  """

  width: int
  gated: bool
  dtype: DTypeLike

  @nn.compact
  def __call__(self, x: jax.Array, size: tuple[int, ...], train: bool) -> jax.Array:
    for axis, (there, wanted) in enumerate(zip(x.shape[1:-1], size), 1):
      step = -(-there // wanted)
      if step > 1 and -(-there // step) == wanted:  # as a convolution of that stride
        x = x[(slice(None),) * axis + (slice(None, None, step),)]
    layer = DenseNorm(self.width, name='dense')(x, train)
    if self.gated:  # the layer is far smaller than what it gives
      gate = branch(self, jnp.ones(()))
      layer = tuple(gate * each for each in layer)
    kernel, bias = (each.astype(self.dtype) for each in layer)
    return x.astype(self.dtype) @ kernel + bias


class DenseNorm(nn.Module):
  """The layer that is a dense one and batch normalisation: kernel [c, width], bias.

  While training, mean and variance of what the kernel gives follow from those of its
  input, [batch, ..., c], which has fewer channels: the path is wide, and normalising it
  would cost several times what it computes.
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
      mean, var = _moments(x, kernel)
      if not self.is_initializing():
        for each, new in zip(running, (mean, var)):
          each.value = self.momentum * each.value + (1 - self.momentum) * new
    slope = scale * jax.lax.rsqrt(var + self.epsilon)
    return kernel * slope, bias - mean * slope


def _moments(x: jax.Array, kernel: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Mean and variance [width] of x @ kernel over all positions, in float32."""
  rows = x.reshape(-1, x.shape[-1]).astype(jnp.float32)
  dot = functools.partial(jnp.matmul, precision='highest')
  mean = rows.mean(0)
  apart = rows - mean
  covariance = dot(apart.T, apart) / rows.shape[0]
  return dot(mean, kernel), (kernel * dot(covariance, kernel)).sum(0)


class AuxiliaryPath(nn.Module):
  """{tap: features [batch, ..., c]} → float32 logits of `Auxiliary`, of several tasks
  {TASK: logits}.

  Stages without an open connection pass on what came before them. Of vectors, images
  and sequences; a mask bool [batch, tokens] leaves padding out of the answer.
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
    """size: height and width of the answer, where it is one of pixels."""
    h, sizes = None, [features[taps[-1]].shape[1:-1] for taps in self.spec.stages]
    for s, taps in enumerate(self.spec.stages):
      name, given = f'stage{s}', {tap: features[tap] for tap in taps}
      # Not larger than the next stage, which would read but a part of it.
      here = tuple(map(min, sizes[s], sizes[min(s + 1, len(sizes) - 1)]))
      part = within(self.arch, name)
      h = Stage(self.spec.gated, part, self.dtype, name=name)(given, h, here, train)
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


class Stage(nn.Module):
  """h_s of h_{s-1} and the taps of a stage; None where there is neither."""

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
      name = _word(tap)
      if self.arch.get(f'{name}/branch', 1):
        width = self.arch[f'{name}/dense']
        adaptor = Adaptor(width, self.gated, self.dtype, name=name)
        parts.append(adaptor(x, size, train))
    return nn.relu(_summed(parts, size)) if parts else None


def _summed(parts: Sequence[jax.Array], size: tuple[int, ...]) -> jax.Array:
  """The sum, [batch, *size, width], of parts of any size: of each at once, in bulk."""
  sums: dict[tuple[int, ...], jax.Array] = {}
  for x in parts:
    sums[x.shape] = sums[x.shape] + x if x.shape in sums else x
  full = lambda x: jax.image.resize(x, (x.shape[0], *size, x.shape[-1]), 'bilinear')
  sized = [x if x.shape[1:-1] == size else full(x) for x in sums.values()]
  return functools.reduce(jnp.add, sized)
