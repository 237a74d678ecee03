"""BERT: an encoder of text that normalises after every branch.

Source: Devlin, Chang, Lee, Toutanova, arXiv 1810.04805. MiniLM is the same network,
thinner and shallower: Wang et al., arXiv 2002.10957.
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
)

normal = nn.initializers.normal(0.02)
EPSILON = 1e-12


class BERTTable(nn.Module):
  """Looks up rows [..., features] of a kernel [rows, features] by numbers [...]."""

  rows: int
  features: int

  @nn.compact
  def __call__(self, numbers: jax.Array) -> jax.Array:
    kernel = self.param('kernel', normal, (self.rows, self.features))
    return jnp.take(kernel, numbers, axis=0)  # NaN for a number that has no row


class BERTAttention(nn.Module):
  """The branch x + gate · attention(x) on tokens [batch, tokens, width]."""

  scale: float  # factor on the queries
  arch: Arch  # as for `transformer.attend`
  dropout: float  # on the attention weights and on the result
  dtype: DTypeLike

  @nn.compact
  def __call__(self, x: jax.Array, mask: jax.Array, train: bool) -> jax.Array:
    drop = nn.Dropout(self.dropout, deterministic=not train)
    y = attend(x, self.scale, self.arch, self.dtype, mask, normal, drop)
    return add_branch(self, x, drop(y))


class BERTPerceptron(nn.Module):
  """The branch x + gate · down(gelu(up(x))) on tokens, with the exact gelu."""

  arch: Arch
  dropout: float
  dtype: DTypeLike

  @nn.compact
  def __call__(self, x: jax.Array, train: bool) -> jax.Array:
    dense = partial(nn.Dense, kernel_init=normal, dtype=self.dtype)
    y = nn.gelu(dense(self.arch['up'], name='up')(x), approximate=False)
    y = dense(self.arch['down'], name='down')(y)
    return add_branch(self, x, nn.Dropout(self.dropout)(y, deterministic=not train))


class BERTLayer(nn.Module):
  """An attention and a perceptron, each followed by a normalisation of its sum.

  A branch that is removed leaves its normalisation, which is not the identity.
  """

  scale: float
  arch: Arch
  dropout: float
  dtype: DTypeLike

  @nn.compact
  def __call__(self, x: jax.Array, mask: jax.Array, train: bool) -> jax.Array:
    attention, mlp = within(self.arch, 'attention'), within(self.arch, 'mlp')
    if attention['branch']:
      x = BERTAttention(
        self.scale, attention, self.dropout, self.dtype, name='attention'
      )(x, mask, train)
    x = layer_norm(x, self.dtype, EPSILON, 'norm1')
    if mlp['branch']:
      x = BERTPerceptron(mlp, self.dropout, self.dtype, name='mlp')(x, train)
    return layer_norm(x, self.dtype, EPSILON, 'norm2')


class BERT(stages.Stacks, nn.Module):
  """A BERT classifier of texts.

  It maps tokens int [batch, length] to {'mask': bool [batch, length], 'layer0': [batch,
  length, width], ..., 'main': logits}: which tokens are not padding, as `WithHeads`
  needs it; the tokens after every layer; and float32 logits [batch, classes] of
  tanh(dense(first token)).

  Attributes:
    classes: number of logits.
    vocab: number of different tokens.
    positions: length of the longest text, in tokens.
    types: number of token types, such as the two sentences of a pair.
    width: length of the vector of a token.
    depth: number of layers.
    heads: number of heads of every attention; it divides the width.
    inner: width inside every perceptron.
    dropout: dropout rate on the embeddings, the attention weights, the branches and the
      input of the head; 0.1 in the paper.
    arch: the sizes that pruning changed, by key 'layer0/mlp/up',
      'layer0/attention/value', ...; see `depthprune.models.arch`. The number of heads
      is 'layer0/attention/query:1', or 'layers0/attention/query:2' in a stack, whose
      first axis is the layer.
    dtype: type of the computation; parameters and logits are float32.
    scan: whether the layers are stacks of arrays, 'layers0', 'layers1', ..., that
      compile once; each has a tap at its end. Surgery cannot remove a single layer from
      a stack, because its normalisations stay.
    segments: number of stacks; it divides the depth.
    pool: how a head on a tap reduces it to a vector; see `heads.Head`.
  """

  classes: int = 2
  vocab: int = 30_522
  positions: int = 512
  types: int = 2
  width: int = 768
  depth: int = 12
  heads: int = 12
  inner: int = 3072
  dropout: float = 0.0
  arch: Arch = FrozenDict()
  dtype: DTypeLike = jnp.float32
  scan: bool = False
  segments: int = 1
  exits: ClassVar[tuple[str, ...]] = ('main',)
  pool: ClassVar[Pool] = 'cls'

  def __post_init__(self):
    self.arch = FrozenDict(self.arch)
    check_sizes(self)
    super().__post_init__()

  @property
  def widths(self) -> dict[str, int]:
    """Every key that `arch` may hold, with its value in the full network."""
    tables = dict.fromkeys(('word', 'position', 'type'), self.width)
    layers = layer_widths(self.parts, self.width, self.heads, self.inner, self.scan)
    return tables | layers | {'pooler': self.width}

  @nn.compact
  def __call__(
    self,
    tokens: jax.Array,
    mask: jax.Array | None = None,
    types: jax.Array | None = None,
    train: bool = False,
    until: str = '',
  ) -> dict[str, jax.Array]:
    """Computes the features and logits of texts that are padded to one length.

    Args:
      tokens: int [batch, length].
      mask: bool or int [batch, length], 0 on padding; by default there is none.
      types: int [batch, length], the sentence that a token belongs to; 0 by default.
      train: whether there is dropout.
      until: the last tap to compute; '' for all outputs.

    Raises:
      ValueError: texts longer than `positions`, or arrays of different shapes.
    """
    arch = complete(self.arch, self.widths, 'BERT')
    mask = jnp.ones(tokens.shape, bool) if mask is None else mask.astype(bool)
    types = jnp.zeros_like(tokens) if types is None else types
    self._check(tokens, mask, types)
    scale = (self.width // self.heads) ** -0.5
    layer = lambda part, name: BERTLayer(
      scale, part, self.dropout, self.dtype, name=name
    )
    drop = nn.Dropout(self.dropout, deterministic=not train)
    x = drop(self._embedded(tokens, types, arch))
    x, taps = chain(layer, x, arch, self.parts, self.scan, until, mask, train)
    outputs = {'mask': mask, **taps}
    if until:
      return outputs
    dense = nn.Dense(
      arch['pooler'], kernel_init=normal, dtype=self.dtype, name='pooler'
    )
    x = drop(nn.tanh(dense(x[:, 0])))
    return {**outputs, 'main': classify(x, self.classes, self.pool)}

  def _embedded(self, tokens: jax.Array, types: jax.Array, arch: Arch) -> jax.Array:
    """Adds the embeddings of the tokens, their positions and their types."""
    x = BERTTable(self.vocab, arch['word'], name='word')(tokens)
    where = jnp.arange(tokens.shape[1])
    x = x + BERTTable(self.positions, arch['position'], name='position')(where)
    x = x + BERTTable(self.types, arch['type'], name='type')(types)
    return layer_norm(x, self.dtype, EPSILON)

  def _check(self, tokens: jax.Array, mask: jax.Array, types: jax.Array) -> None:
    if tokens.ndim != 2 or not tokens.shape == mask.shape == types.shape:
      raise ValueError(
        f'BERT: expected tokens, mask and types of one shape [batch, length], got '
        f'{tokens.shape}, {mask.shape} and {types.shape}'
      )
    if tokens.shape[1] > self.positions:
      raise ValueError(
        f'BERT: texts of {tokens.shape[1]} tokens, but there are {self.positions} '
        'positions; cut the texts to that length'
      )


def small() -> tuple[BERT, jax.ShapeDtypeStruct]:
  """Returns a small network of this family and an example of its input, for tests."""
  return BERT(
    vocab=20, positions=9, width=8, depth=3, heads=4, inner=6
  ), jax.ShapeDtypeStruct((1, 9), jnp.int32)


bert_base = BERT
bert_minilm = partial(BERT, width=384, depth=6, heads=12, inner=1536)
bert_tiny = partial(
  BERT, vocab=64, positions=16, width=16, depth=4, heads=4, inner=24, segments=2
)
