"""Decoders of text: causal language models of the Llama family, with a cache.

Sources: Touvron et al., arXiv 2302.13971 (Llama). Jiang et al., arXiv 2310.06825
(Mistral). Yang et al., arXiv 2407.10671 and 2505.09388 (Qwen2 and Qwen3). Gemma Team,
arXiv 2403.08295. Ben Allal et al., arXiv 2502.02737 (SmolLM2). They differ in the
fields of `Decoder` alone.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, ClassVar, Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.core import FrozenDict
from jax import lax
from jax.typing import DTypeLike

from depthprune.models import stages
from depthprune.models.arch import Arch, beneath, complete, within
from depthprune.models.layers import Pool, add_branch

normal = nn.initializers.normal(0.02)
Activation = Literal['silu', 'gelu']
Cache = Mapping[str, Any]  # as `Decoder.empty_cache` makes it


class DecoderNorm(nn.Module):
  """Divides vectors by their root mean square and multiplies them with a scale.

  The mean is the sum of squares divided by the width of the full network, which pruning
  does not change: slices that are cut count as the zeros that they were.
  """

  width: int  # of the full network
  epsilon: float
  offset: float  # what is added to the scale, 1 for Gemma
  dtype: DTypeLike

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    start = nn.initializers.constant(1 - self.offset)
    scale = self.param('scale', start, (x.shape[-1],))
    x = x.astype(jnp.float32)
    mean = jnp.square(x).sum(-1, keepdims=True) / self.width
    x = x * lax.rsqrt(mean + self.epsilon)
    return (x * (self.offset + scale)).astype(self.dtype)


class DecoderTable(nn.Module):
  """A kernel [rows, features] for the embedding of tokens, and for logits if tied."""

  rows: int
  features: int

  def setup(self):
    self.kernel = self.param('kernel', normal, (self.rows, self.features))

  def __call__(self, tokens: jax.Array) -> jax.Array:
    """Looks up the rows [..., features] of tokens [...]."""
    return jnp.take(self.kernel, tokens, axis=0)  # NaN for one that has no row

  def logits(self, x: jax.Array) -> jax.Array:
    """Multiplies vectors [..., features] with every row: [..., rows]."""
    return x @ self.kernel.T


class Place(NamedTuple):
  """Where the tokens of a call are, for all layers alike.

  Attributes:
    start: number of tokens before them, int ().
    cos: cosines of the rotation of every token [tokens, width of a head].
    sin: its sines, negative in the first half.
    seen: bool [tokens, keys], which keys a token attends to.
  """

  start: jax.Array
  cos: jax.Array
  sin: jax.Array
  seen: jax.Array


def place(start: jax.Array, count: int, keys: int, model: 'Decoder') -> Place:
  """Returns the Place of `count` tokens behind `start` others, among so many keys.

  Source of the rotation: Su et al., arXiv 2104.09864.
  """
  half = model.size // 2
  position, pair = start + jnp.arange(count), jnp.arange(half).astype(jnp.float32)
  angles = position.astype(jnp.float32)[:, None] * model.theta ** (-pair / half)
  angles = jnp.concatenate([angles, angles], 1)
  # This comparison pins the width of queries and keys: `arch` is a number, which cannot
  # say which frequencies are left.
  sign = jnp.where(jnp.arange(model.size) < half, -1.0, 1.0)
  key = jnp.arange(keys)
  seen = key <= position[:, None]
  if model.window:
    seen &= key > position[:, None] - model.window
  return Place(start, jnp.cos(angles), sign * jnp.sin(angles), seen)


def rotated(x: jax.Array, where: Place) -> jax.Array:
  """Rotates pairs of slices of heads [batch, tokens, ..., size] by their positions."""
  shape = (x.shape[1], *(1,) * (x.ndim - 3), x.shape[-1])
  cos, sin = (a.astype(x.dtype).reshape(shape) for a in (where.cos, where.sin))
  return x * cos + jnp.roll(x, x.shape[-1] // 2, -1) * sin


class DecoderAttention(nn.Module):
  """The branch x + gate · attention(norm(x)) on tokens [batch, tokens, width].

  Every group of queries shares one key and one value. With a cache, what tokens wrote
  in earlier calls is attended to as well.
  """

  norm: Callable[..., DecoderNorm]  # makes one for a width of the full network
  width: int  # of the full network
  size: int  # width of a query and a key
  bias: bool
  query_norm: bool
  arch: Arch  # 'groups', 'heads' per group, 'value' and 'out'
  dtype: DTypeLike

  @nn.compact
  def __call__(
    self, x: jax.Array, where: Place, cache: Cache | None, skip: bool = False
  ) -> tuple[jax.Array, Cache | None]:
    groups, heads = self.arch['groups'], self.arch['heads']
    dense = partial(nn.DenseGeneral, kernel_init=normal, dtype=self.dtype)
    read = partial(dense, use_bias=self.bias)
    y = self.norm(self.width, name='norm')(x)
    q = read((groups, heads, self.size), name='query')(y)
    k = read((groups, self.size), name='key')(y)
    v = read((groups, self.arch['value']), name='value')(y)
    if self.query_norm:
      q = self.norm(self.size, name='query_norm')(q)
      k = self.norm(self.size, name='key_norm')(k)
    q, k = rotated(q, where), rotated(k, where)
    if cache is not None:
      at = (0, where.start, 0, 0)
      k, v = (
        lax.dynamic_update_slice(cache[name], new.astype(cache[name].dtype), at)
        for name, new in (('key', k), ('value', v))
      )
      cache = {'key': k, 'value': v}
    if skip:
      return x, cache
    scores = jnp.einsum('btghd,bkgd->bghtk', q * self.size**-0.5, k)
    lowest = jnp.finfo(jnp.float32).min
    weights = jnp.where(where.seen, scores.astype(jnp.float32), lowest)
    weights = nn.softmax(weights).astype(v.dtype)
    y = jnp.einsum('bghtk,bkgd->btghd', weights, v)
    out = dense(self.arch['out'], axis=(-3, -2, -1), use_bias=False, name='out')
    return add_branch(self, x, out(y)), cache


class DecoderPerceptron(nn.Module):
  """The branch x + gate · down(act(gate(norm(x))) · up(norm(x))) on tokens."""

  norm: Callable[..., DecoderNorm]
  width: int  # of the full network
  activation: Activation
  arch: Arch
  dtype: DTypeLike

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    dense = partial(nn.Dense, use_bias=False, kernel_init=normal, dtype=self.dtype)
    y = self.norm(self.width, name='norm')(x)
    gate = dense(self.arch['gate'], name='gate')(y)
    gate = nn.silu(gate) if self.activation == 'silu' else nn.gelu(gate)
    y = gate * dense(self.arch['up'], name='up')(y)
    return add_branch(self, x, dense(self.arch['down'], name='down')(y))


class DecoderLayer(nn.Module):
  """An attention and a perceptron; each is absent if its branch is removed."""

  attention: Callable[..., DecoderAttention]
  mlp: Callable[..., DecoderPerceptron]
  arch: Arch

  @nn.compact
  def __call__(
    self, x: jax.Array, where: Place, cache: Cache | None = None, skip: bool = False
  ) -> tuple[jax.Array, Cache | None]:
    attention, mlp = within(self.arch, 'attention'), within(self.arch, 'mlp')
    if attention['branch']:
      x, cache = self.attention(arch=attention, name='attention')(x, where, cache, skip)
    if mlp['branch'] and not skip:
      x = self.mlp(arch=mlp, name='mlp')(x)
    return x, cache


class Decoder(stages.Stacks, nn.Module):
  """A causal language model.

  It maps tokens int [batch, length] to {'layer0': [batch, length, width], ..., 'main':
  logits}: the tokens after every layer, not normalised, and float32 logits [batch,
  length, vocab] of the token that follows each.

  A call with a cache continues the tokens of earlier calls, and returns the cache with
  its own tokens added under 'cache'::

    cache = model.empty_cache(batch=1, length=64)
    outputs = model.apply(variables, prompt, cache=cache)
    outputs = model.apply(variables, next_token, cache=outputs['cache'])

  Attributes:
    vocab: number of different tokens.
    positions: length of the longest text, in tokens.
    width: length of the vector of a token.
    depth: number of layers.
    heads: number of queries of every attention.
    groups: number of keys and values of every attention; it divides the heads, and
      consecutive heads share one.
    size: width of one query, key or value; it is even.
    inner: width inside every perceptron.
    theta: the base of the wavelengths of the rotation.
    epsilon: what the normalisations add to the mean square.
    activation: of the perceptrons, 'silu', or 'gelu' for its tanh approximation.
    tied: whether the embedding is also the kernel of the logits.
    bias: whether queries, keys and values have a bias (Qwen2).
    query_norm: whether queries and keys are normalised (Qwen3).
    offset: what is added to the scale of every normalisation; 1 for Gemma.
    scaled: whether the embedding is multiplied with the root of the width (Gemma).
    window: how many tokens an attention sees, itself included; 0 for all (Mistral).
    arch: the sizes that pruning changed, by key 'layer0/mlp/up',
      'layer0/attention/value', ...; see `depthprune.models.arch`. The number of groups
      is 'layer0/attention/query:1' and that of heads in each of them
      'layer0/attention/query:2'; in a stack, whose first axis is the layer, they are
      'layers0/attention/query:2' and 'layers0/attention/query:3'. The width of queries
      and keys cannot change.
    dtype: type of the computation; parameters and logits are float32.
    scan: whether the layers are stacks of arrays, 'layers0', 'layers1', ..., that
      compile once; each has a tap at its end, and its part of a cache is stacked too.
    segments: number of stacks; it divides the depth.
  """

  vocab: int = 49_152
  positions: int = 8192
  width: int = 576
  depth: int = 30
  heads: int = 9
  groups: int = 3
  size: int = 64
  inner: int = 1536
  theta: float = 10_000.0
  epsilon: float = 1e-5
  activation: Activation = 'silu'
  tied: bool = True
  bias: bool = False
  query_norm: bool = False
  offset: float = 0.0
  scaled: bool = False
  window: int = 0
  arch: Arch = FrozenDict()
  dtype: DTypeLike = jnp.float32
  scan: bool = False
  segments: int = 1
  exits: ClassVar[tuple[str, ...]] = ('main',)
  pool: ClassVar[Pool] = 'avg'

  def __post_init__(self):
    self.arch = FrozenDict(self.arch)
    if self.heads % self.groups or self.size % 2:
      raise ValueError(
        f'Decoder: expected groups that divide the heads, and an even size, got '
        f'{self.groups} groups, {self.heads} heads and size {self.size}'
      )
    self.check_segments()
    super().__post_init__()

  @property
  def widths(self) -> dict[str, int]:
    """Every key that `arch` may hold, with its value in the full network."""
    groups, heads = self._counts
    widths = {'embed': self.width}
    for name, _, times in self.parts:
      attention = {groups: self.groups, heads: self.heads // self.groups}
      attention |= {'value': self.size, 'out': self.width, 'branch': times}
      mlp = {'gate': self.inner, 'up': self.inner, 'down': self.width, 'branch': times}
      unit = beneath(attention, 'attention') | beneath(mlp, 'mlp')
      widths |= beneath(unit, name)
    return widths

  def first(self, depth: int) -> 'Decoder':
    """Returns the network of the first layers, before or after a cut.

    It has no variables of its own: call it with those of the whole network, for which
    it can draft, for example::

      dp.speculate(model, variables, model.first(8), variables, prompts, steps=50)

    Args:
      depth: how many layers it has. Layers that a cut has emptied count too.

    Raises:
      ValueError: the network has fewer layers, or its layers are stacks.
    """
    if self.scan or depth not in range(1, self.depth + 1):
      raise ValueError(
        f'Decoder: expected 1 to {self.depth} first layers and scan=False, got {depth} '
        f'and scan={self.scan}'
      )
    known = self.clone(depth=depth, arch={}).widths
    arch = {key: n for key, n in self.arch.items() if key in known}
    return self.clone(depth=depth, arch=arch)

  @property
  def _counts(self) -> tuple[str, str]:
    """The keys of the numbers of groups and of heads in each, of an attention."""
    return f'query:{1 + self.scan}', f'query:{2 + self.scan}'

  def empty_cache(self, batch: int, length: int) -> dict[str, Any]:
    """Returns a cache that holds no tokens yet.

    Args:
      batch: number of texts.
      length: how many tokens of each text there is space for. Tokens beyond it
        overwrite the last ones.

    Returns:
      {'length': int32 (), the number of tokens in it, 'layer0': {'key': [batch, length,
      groups, size], 'value': [batch, length, groups, value]}, ...}, at the sizes of
      `arch`, without the layers whose attention is removed. That of a stack, 'layers0',
      has the layers as the first axis of its arrays.

    Raises:
      ValueError: the length exceeds `positions`.
    """
    if length > self.positions:
      raise ValueError(
        f'Decoder: expected at most {self.positions} positions, got a cache of length '
        f'{length}'
      )
    arch = complete(self.arch, self.widths, 'Decoder')
    cache: dict[str, Any] = {'length': jnp.zeros((), jnp.int32)}
    for name, *_ in self.parts:
      attention = within(arch, f'{name}/attention')
      sizes = {'key': self.size, 'value': attention['value']}
      if layers := attention['branch']:
        shape = (batch, length, attention[self._counts[0]])
        shape = (layers, *shape) if self.scan else shape
        cache[name] = {
          part: jnp.zeros((*shape, n), self.dtype) for part, n in sizes.items()
        }
    return cache

  @nn.compact
  def __call__(
    self,
    tokens: jax.Array,
    train: bool = False,
    until: str = '',
    cache: Cache | None = None,
    since: str = '',
    skip: bool = False,
  ) -> dict[str, Any]:
    """Computes the features and logits of texts, or a part of the way there.

    Args:
      tokens: int [batch, length]; with `since`, features [batch, length, width].
      train: changes nothing, since there is no dropout.
      until: the last tap to compute; '' for all outputs.
      cache: the tokens before these, as `empty_cache` or an earlier call returned it.
      since: the tap whose features are given instead of tokens; '' for none. Only what
        follows this tap is computed: after the last one, the logits alone.
      skip: whether features pass the layers unchanged. A cache gets the keys and values
        that the layers make of them, for the tokens that follow.

    Returns:
      The outputs by name, and if a cache was given the 'cache', with the layers that
      were computed.

    Raises:
      ValueError: texts longer than `positions`, an unknown tap, or an `until` that does
        not follow `since`.
    """
    del train
    arch = complete(self.arch, self.widths, 'Decoder')
    for tap in filter(None, (since, until)):
      stages.check_tap(tap, self.taps)
    first = self.taps.index(since) + 1 if since else 0
    if until and self.taps.index(until) < first:
      raise ValueError(f'Decoder: until: expected a tap after {since}, got {until}')
    if tokens.ndim != 2 + bool(since) or tokens.shape[1] > self.positions:
      what = f'features of {since}' if since else 'tokens'
      shape = '[batch, length, width]' if since else '[batch, length]'
      raise ValueError(
        f'Decoder: expected {what} {shape} of at most {self.positions} positions, got '
        f'{tokens.shape}'
      )
    table = DecoderTable(self.vocab, arch['embed'], name='embed')
    x = tokens if since else table(tokens).astype(self.dtype)
    x = x * self.width**0.5 if self.scaled and not since else x
    where, kept = self._place(tokens.shape[1], cache)
    outputs: dict[str, Any] = {}
    for name, tap, _ in self.parts[first:]:
      x, new = self._layer(name, arch, x, where, (cache or {}).get(name), skip)
      outputs[tap] = x
      kept |= {} if new is None else {name: new}
      if tap == until:
        return outputs if cache is None else {**outputs, 'cache': kept}
    x = self._norm(self.width, name='norm')(x).astype(jnp.float32)
    head = nn.Dense(self.vocab, use_bias=False, kernel_init=normal, name='head')
    outputs['main'] = table.logits(x) if self.tied else head(x)
    return outputs if cache is None else {**outputs, 'cache': kept}

  @property
  def _norm(self) -> Callable[..., DecoderNorm]:
    return partial(
      DecoderNorm, epsilon=self.epsilon, offset=self.offset, dtype=self.dtype
    )

  def _place(self, count: int, cache: Cache | None) -> tuple[Place, dict[str, Any]]:
    """Returns where so many tokens are, and the start of the cache behind them."""
    if cache is None:
      return place(jnp.zeros((), jnp.int32), count, count, self), {}
    layers = [layer for name, layer in cache.items() if name != 'length']
    keys = layers[0]['key'].shape[-3] if layers else count
    start = cache['length']
    return place(start, count, keys, self), {'length': start + count}

  def _layer(
    self,
    name: str,
    arch: Arch,
    x: jax.Array,
    where: Place,
    cache: Cache | None,
    skip: bool,
  ) -> tuple[jax.Array, Cache | None]:
    """Runs tokens through a layer or a stack of layers."""
    part = within(arch, name)
    for own, key in zip(('groups', 'heads'), self._counts):
      part[f'attention/{own}'] = part.pop(f'attention/{key}')
    both = {'norm': self._norm, 'width': self.width, 'dtype': self.dtype}
    attention = partial(
      DecoderAttention,
      size=self.size,
      bias=self.bias,
      query_norm=self.query_norm,
      **both,
    )
    mlp = partial(DecoderPerceptron, activation=self.activation, **both)
    layer = DecoderLayer(attention, mlp, FrozenDict(part), name=name)
    if not self.scan:
      return layer(x, where, cache, skip)
    run = lambda layer, x, cache, where: layer(x, where, cache, skip)
    times = stages.layers_left(name, part)
    return stages.repeat_with(layer, x, cache, times, where, call=run)


def small() -> tuple[Decoder, jax.ShapeDtypeStruct]:
  """Returns a small network of this family and an example of its input, for tests."""
  return Decoder(
    vocab=20, positions=9, width=8, depth=3, heads=4, groups=2, size=4, inner=6
  ), jax.ShapeDtypeStruct((1, 9), jnp.int32)


decoder_smollm2 = partial(Decoder, theta=100_000.0)
decoder_tiny = partial(
  Decoder, vocab=64, positions=32, width=16, depth=4, heads=4, groups=2, size=4,
  inner=24, segments=2,
)  # fmt: skip
