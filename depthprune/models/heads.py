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
from depthprune.models.auxiliary_path import Auxiliary as Auxiliary
from depthprune.models.auxiliary_path import AuxiliaryPath
from depthprune.models.auxiliary_path import beside as beside
from depthprune.models.layers import Classes, Pool, answer, hashable, he_normal, pooled
from depthprune.models.stages import check_tap


@dataclass(frozen=True)
class Head:
  """A perceptron on one tap of a trunk.

  Attributes:
    tap: name of the features it reads.
    classes: number of logits; or that of each of several tasks, by name.
    hidden: width of its hidden layer; 0 for a linear head.
    pool: how positions [batch, ..., c] become one vector: their mean 'avg', their
      maximum 'max', the means over a grid of 4 × 4 'grid4' (images only), or the first
      position 'cls'. A vector [batch, c] is taken as it is.
    dropout: rate, of what the last layer reads, while training.
  """

  tap: str
  classes: Classes = 10
  hidden: int = 0
  pool: Pool = 'avg'
  dropout: float = 0.0

  def __post_init__(self):
    object.__setattr__(self, 'classes', hashable(self.classes))

  @property
  def reads(self) -> tuple[str, ...]:
    """The taps that it reads."""
    return (self.tap,)

  @property
  def widths(self) -> dict[str, int]:
    """Every key that `arch` may hold beneath it."""
    return {'hidden': self.hidden} if self.hidden else {}


class Perceptron(nn.Module):
  """Features [batch, ..., c] → pool → float32 logits [batch, classes].

  Of several tasks {TASK: [batch, its classes]}.
  """

  head: Head
  arch: Arch
  dtype: DTypeLike

  @nn.compact
  def __call__(
    self, x: jax.Array, train: bool = False, mask: jax.Array | None = None
  ) -> Any:
    x = pooled(x, self.head.pool, mask)
    if self.head.hidden:
      width = self.arch['hidden']
      dense = nn.Dense(width, kernel_init=he_normal, dtype=self.dtype, name='hidden')
      x = nn.relu(dense(x))
    x = nn.Dropout(self.head.dropout)(x, deterministic=not train)
    return answer(x, self.head.classes, 'out')


class Heads(nn.Module):
  """Heads without their trunk, on features that were computed before.

  {NAME: features of head NAME's tap, pooled or not} → {NAME: [batch, classes]}. A
  'main' among the features, the trunk's own answer, is passed on. The arrays are
  params/head_NAME, as in `WithHeads`.

  Attributes:
    heads, arch, dtype: as those of `WithHeads`, and of its trunk.
  """

  heads: Mapping[str, Head]
  arch: Arch = FrozenDict()
  dtype: DTypeLike = jnp.float32

  def __post_init__(self):
    self.heads, self.arch = FrozenDict(self.heads), FrozenDict(self.arch)
    super().__post_init__()

  @nn.compact
  def __call__(
    self, features: Mapping[str, jax.Array], train: bool = False
  ) -> dict[str, jax.Array]:
    arch = complete(self.arch, hidden_widths(self.heads), 'Heads')
    answers = _answers(self.heads, arch, self.dtype, features, train)
    return answers | {k: v for k, v in features.items() if k == 'main'}


class WithHeads(nn.Module):
  """A trunk and heads on its taps: {**trunk's outputs, NAME: [batch, classes], ...}.

  The trunk's arrays are params/trunk, unchanged, so a trained trunk drops in; those of
  a head are params/head_NAME. Where the trunk's outputs hold a 'mask', bool [batch,
  tokens], heads leave padding out.

  `arch` has their keys beneath 'trunk' and 'head_NAME', and {'exit/NAME': 0} for an
  exit that is dropped: its head does not exist, and without 'main' neither does what
  lies behind the last tap that is still read.

  Attributes:
    trunk: a model of this package. An `arch` that it has is taken over.
    heads: what to put where, by name: perceptrons, or paths beside the trunk.
    arch: see above and `models.arch`.

  Raises:
    ValueError: a head named like an output of the trunk, or on a tap it does not have.
  """

  trunk: Any
  heads: Mapping[str, Head | Auxiliary]
  arch: Arch = FrozenDict()

  def __post_init__(self):
    for name, head in self.heads.items():
      for tap in head.reads:
        check_tap(tap, self.trunk.taps)
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
    exits = {f'exit/{name}': 1 for name in ('main', *self.heads)}
    return beneath(self.trunk.widths, 'trunk') | hidden_widths(self.heads) | exits

  @property
  def alone(self) -> Heads:
    """The heads, to be trained on what `features` gives."""
    arch = {k: v for k, v in self.arch.items() if k.startswith('head_')}
    return Heads(self._kept, FrozenDict(arch), self.trunk.dtype)

  @nn.compact
  def __call__(self, *inputs: jax.Array, train: bool = False) -> dict[str, jax.Array]:
    arch = complete(self.arch, self.widths, 'WithHeads')
    outputs = self._run_trunk(inputs, train)
    mask, dtype = outputs.get('mask'), self.trunk.dtype
    paths = {k: h for k, h in self._kept.items() if isinstance(h, Auxiliary)}
    heads = {k: h for k, h in self._kept.items() if k not in paths}
    taps = {name: outputs[head.tap] for name, head in heads.items()}
    answers = _answers(heads, arch, dtype, taps, train, mask)
    for name, path in paths.items():
      part = within(arch, f'head_{name}')
      run = AuxiliaryPath(path, part, dtype, name=f'head_{name}')
      answers[name] = run(outputs, train, mask, inputs[0].shape[1:-1])
    return outputs | answers

  def features(self, *inputs: jax.Array) -> dict[str, jax.Array]:
    """{NAME: what head NAME reads, pooled [batch, n]}, and the trunk's 'main' if kept.

    `model.apply(variables, x, method='features')`; the arrays of heads are not read.
    Raises ValueError for a path, which has no features of one tap.
    """
    if paths := [k for k, h in self._kept.items() if isinstance(h, Auxiliary)]:
      raise ValueError(f'features: {paths[0]} is an auxiliary path, no head on a tap')
    outputs = self._run_trunk(inputs, train=False)
    read = {
      name: pooled(outputs[head.tap], head.pool, outputs.get('mask'))
      for name, head in self._kept.items()
    }
    return read | ({'main': outputs['main']} if 'main' in self.exits else {})

  @property
  def _kept(self) -> dict[str, Any]:
    return {name: head for name, head in self.heads.items() if name in self.exits}

  def _run_trunk(self, inputs: tuple, train: bool) -> dict[str, jax.Array]:
    """As far as an exit needs it."""
    read = {tap for head in self._kept.values() for tap in head.reads}
    last = [tap for tap in self.taps if tap in read][-1:]
    until = '' if 'main' in self.exits else last[0]
    return self.trunk(*inputs, train=train, until=until)


def hidden_widths(heads: Mapping[str, Head | Auxiliary]) -> dict[str, int]:
  """The keys of `arch` that heads have, with their values in the full network."""
  keys = [beneath(head.widths, f'head_{name}') for name, head in heads.items()]
  return {key: width for part in keys for key, width in part.items()}


def _answers(
  heads: Mapping[str, Head], arch: Arch, dtype: DTypeLike, features, train, mask=None
) -> dict[str, jax.Array]:
  """Logits of every head; to be called where its module is a child, head_NAME."""
  logits = {}
  for name, head in heads.items():
    perceptron = Perceptron(
      head, within(arch, f'head_{name}'), dtype, name=f'head_{name}'
    )
    logits[name] = perceptron(features[name], train, mask)
  return logits


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
  taps = _taps(trunk, 'every_tap')
  head = partial(Head, classes=classes or trunk.classes, pool=pool or trunk.pool)
  digits = len(str(len(taps)))
  heads = {f'exit{i:0{digits}}': head(tap) for i, tap in enumerate(taps, 1)}
  return WithHeads(trunk, heads, FrozenDict({'exit/main': 0}))


def add_heads(network: Any, heads: Mapping[str, Head | Auxiliary]) -> WithHeads:
  """The network with more heads on its taps, or on those of its trunk if it has heads.

  Args:
    network: a model of this package, or one `WithHeads`.
    heads: what to add, by name.

  Raises:
    ValueError: a head named like another one or like an output of the trunk, or on a
      tap that it does not have.
  """
  own = getattr(network, 'heads', {})
  if both := sorted({*own} & {*heads}):
    raise ValueError(f'head {both[0]!r}: the network has an exit of that name')
  if not own:
    return WithHeads(network, heads)
  return WithHeads(network.trunk, {**own, **heads}, network.arch)


def multitask(trunk: Any, tasks: Mapping[str, int]) -> WithHeads:
  """Hard parameter sharing: one trunk, a linear head per task on its last tap.

  Inputs → {**trunk's taps, TASK: float32 logits [batch, classes], ...}. Each task is
  an exit. The trunk's own head is dropped, so there is no 'main'.

  Args:
    trunk: a model of this package.
    tasks: number of classes of each, such as {'left': 10, 'right': 10}.

  Raises:
    ValueError: no task, one named like an output of the trunk, a trunk without taps.

  Source: Caruana, Multitask Learning, Machine Learning 28, 1997.
  """
  last = _taps(trunk, 'multitask')[-1]
  if not tasks:
    raise ValueError('multitask: expected {task: number of classes}, got none')
  heads = {name: Head(last, n, pool=trunk.pool) for name, n in tasks.items()}
  return WithHeads(trunk, heads, FrozenDict({'exit/main': 0}))


def _taps(trunk: Any, who: str) -> tuple[str, ...]:
  taps = getattr(trunk, 'taps', ())
  if not taps:
    raise ValueError(
      f'{who}: {type(trunk).__name__} has no taps to put exits on; expected a model '
      f'with `taps` and `pool`, such as those of {__package__}'
    )
  return taps
