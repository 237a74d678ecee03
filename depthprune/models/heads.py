"""Heads on the taps of a trunk: exits of a network, early answers, auxiliary paths."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.core import FrozenDict
from jax.typing import DTypeLike

from depthprune.models.arch import Arch, beneath, complete, within
from depthprune.models.layers import Pool, he_normal, pooled
from depthprune.models.stages import check_tap


@dataclass(frozen=True)
class Head:
  """A perceptron on one tap of a trunk.

  Attributes:
    tap: name of the features it reads.
    classes: number of logits.
    hidden: width of its hidden layer; 0 for a linear head.
    pool: how positions [batch, ..., c] become one vector: their mean 'avg', their
      maximum 'max', the means over a grid of 4 × 4 'grid4' (images only), or the first
      position 'cls'. A vector [batch, c] is taken as it is.
  """

  tap: str
  classes: int = 10
  hidden: int = 0
  pool: Pool = 'avg'


class Perceptron(nn.Module):
  """Features [batch, ..., c] → pool → float32 logits [batch, classes]."""

  head: Head
  arch: Arch
  dtype: DTypeLike

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    x = pooled(x, self.head.pool)
    if self.head.hidden:
      width = self.arch['hidden']
      dense = nn.Dense(width, kernel_init=he_normal, dtype=self.dtype, name='hidden')
      x = nn.relu(dense(x))
    return nn.Dense(self.head.classes, name='out')(x.astype(jnp.float32))


class WithHeads(nn.Module):
  """A trunk and heads on its taps: {**trunk's outputs, NAME: [batch, classes], ...}.

  The trunk's arrays are params/trunk, unchanged, so a trained trunk drops in; those of
  a head are params/head_NAME. `arch` has their keys beneath 'trunk' and 'head_NAME',
  and {'exit/NAME': 0} for an exit that is dropped: its head does not exist, and without
  'main' neither does what lies behind the last tap that is still read.

  Attributes:
    trunk: a model of this package. An `arch` that it has is taken over.
    heads: what to put where, by name.
    arch: see above and `models.arch`.

  Raises:
    ValueError: a head named like an output of the trunk, or on a tap it does not have.
  """

  trunk: Any
  heads: Mapping[str, Head]
  arch: Arch = FrozenDict()

  def __post_init__(self):
    for name, head in self.heads.items():
      check_tap(head.tap, self.trunk.taps)
      if name in (*self.trunk.taps, 'main'):
        raise ValueError(f'head {name!r}: the trunk has an output of that name')
    self.heads = FrozenDict(self.heads)
    self.arch = FrozenDict({**beneath(self.trunk.arch, 'trunk'), **self.arch})
    part = FrozenDict(within(self.arch, 'trunk'))
    if self.trunk.arch != part:
      self.trunk = self.trunk.clone(arch=part)
    if not self.exits:
      raise ValueError('WithHeads: arch drops every exit; keep at least one')
    super().__post_init__()

  @property
  def exits(self) -> tuple[str, ...]:
    names = ('main', *self.heads)
    return tuple(name for name in names if self.arch.get(f'exit/{name}', 1))

  @property
  def taps(self) -> tuple[str, ...]:
    return self.trunk.taps

  @property
  def widths(self) -> dict[str, int]:
    """Every key that `arch` may hold, with its value in the full network."""
    hidden = {f'head_{n}/hidden': h.hidden for n, h in self.heads.items() if h.hidden}
    exits = {f'exit/{name}': 1 for name in ('main', *self.heads)}
    return beneath(self.trunk.widths, 'trunk') | hidden | exits

  @nn.compact
  def __call__(self, x: jax.Array, train: bool = False) -> dict[str, jax.Array]:
    arch = complete(self.arch, self.widths, 'WithHeads')
    heads = {name: head for name, head in self.heads.items() if name in self.exits}
    read = {head.tap for head in heads.values()}
    last = [tap for tap in self.taps if tap in read][-1:]
    outputs = self.trunk(x, train, until='' if 'main' in self.exits else last[0])
    logits = {}
    for name, head in heads.items():
      part = within(arch, f'head_{name}')
      perceptron = Perceptron(head, part, self.trunk.dtype, name=f'head_{name}')
      logits[name] = perceptron(outputs[head.tap])
    return outputs | logits


def every_tap(
  trunk: Any, classes: int | None = None, pool: Pool | None = None
) -> WithHeads:
  """A linear head on every tap of a trunk, in place of its own: NetCut's network.

  The exits are exit1, exit2, ..., their numbers of one length ('exit01'), so that the
  order of the names is that of depth. The trunk's own head is dropped.

  Args:
    trunk: a model of this package.
    classes: number of logits of each; default that of the trunk.
    pool: how features become a vector, see `Head`; default what the trunk says.

  Raises:
    ValueError: the trunk has no taps.
  """
  taps = getattr(trunk, 'taps', ())
  if not taps:
    raise ValueError(
      f'every_tap: {type(trunk).__name__} has no taps to put exits on; expected a '
      f'model with `taps` and `pool`, such as those of {__package__}'
    )
  head = partial(Head, classes=classes or trunk.classes, pool=pool or trunk.pool)
  digits = len(str(len(taps)))
  heads = {f'exit{i:0{digits}}': head(tap) for i, tap in enumerate(taps, 1)}
  return WithHeads(trunk, heads, FrozenDict({'exit/main': 0}))
