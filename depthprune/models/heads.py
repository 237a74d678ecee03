"""Heads on the taps of a trunk: early exits, several tasks, auxiliary paths."""

from collections.abc import Callable, Mapping
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
from depthprune.models.decoder import Decoder, DecoderNorm
from depthprune.models.layers import (
  Classes,
  Pool,
  answer,
  hashable,
  he_normal,
  norm,
  pooled,
)
from depthprune.models.stages import check_tap


@dataclass(frozen=True)
class Head:
  """An exit on one tap of a trunk: a linear layer or a perceptron.

  Attributes:
    tap: name of the features that it reads.
    classes: number of logits, or {task: number of logits} for several tasks.
    hidden: width of the hidden layer; 0 for a linear head.
    pool: how features [batch, ..., c] become one vector: 'avg' takes the mean of all
      positions, 'max' their maximum, 'grid4' the means over a grid of 4×4 cells (images
      only), and 'cls' the first position. Vectors [batch, c] are left as they are.
    dropout: dropout rate on the input of the last layer.
    norm: whether batch normalisation comes first, as features of a trained network are
      of very unlike sizes.
    after: name of another head, whose log-probabilities the last layer reads too; ''
      for none. No gradient goes back into that head. Source: Wołczyk et al., Zero Time
      Waste, arXiv 2106.05409.
  """

  tap: str
  classes: Classes = 10
  hidden: int = 0
  pool: Pool = 'avg'
  dropout: float = 0.0
  norm: bool = False
  after: str = ''

  def __post_init__(self):
    object.__setattr__(self, 'classes', hashable(self.classes))
    if self.after and isinstance(self.classes, Mapping):
      raise ValueError(
        f'head after {self.after!r}: expected one task, got {", ".join(self.classes)}'
      )

  @property
  def reads(self) -> tuple[str, ...]:
    """The taps that the head reads."""
    return (self.tap,)

  @property
  def widths(self) -> dict[str, int]:
    """Every key that `arch` may hold within the head, with its full value."""
    return {'hidden': self.hidden} if self.hidden else {}


@dataclass(frozen=True)
class Unembedding:
  """An exit of a decoder that shares its last normalisation and its logits.

  The features x [batch, length, width] of a tap become logits [batch, length, vocab] of
  the token that follows each. With a hidden layer they first pass a perceptron that can
  be trained, x + out(relu(hidden(norm(x)))): 2 · width · hidden weights instead of the
  width · vocab of logits of its own. `out` begins with zeros, so that the exit begins
  as one without a perceptron. Sources: Elhoushi et al., arXiv 2404.16710 (LayerSkip),
  for the shared logits; Morisot, arXiv 2007.13512 (SideNet), for the perceptron.

  Attributes:
    tap: name of the features that it reads.
    hidden: width of the hidden layer; 0 for an exit without arrays of its own.
  """

  tap: str
  hidden: int = 0

  @property
  def reads(self) -> tuple[str, ...]:
    """The taps that the head reads."""
    return (self.tap,)

  @property
  def widths(self) -> dict[str, int]:
    """Every key that `arch` may hold within the head, besides the width of `out`."""
    return {'hidden': self.hidden} if self.hidden else {}


AnyHead = Head | Unembedding | Auxiliary


class HeadPerceptron(nn.Module):
  """The module of a `Head`: features [batch, ..., c] → float32 logits [batch, classes].

  For several tasks it returns {task: logits}. `before` are the logits of the head that
  it comes after, if it does.
  """

  head: Head
  arch: Arch
  dtype: DTypeLike

  @nn.compact
  def __call__(
    self,
    x: jax.Array,
    train: bool = False,
    mask: jax.Array | None = None,
    before: jax.Array | None = None,
  ) -> Any:
    x = pooled(x, self.head.pool, mask)
    if self.head.norm:
      x = norm(x, train, dtype=self.dtype, name='norm')
    if self.head.hidden:
      width = self.arch['hidden']
      dense = nn.Dense(width, kernel_init=he_normal, dtype=self.dtype, name='hidden')
      x = nn.relu(dense(x))
    x = nn.Dropout(self.head.dropout)(x, deterministic=not train)
    if before is not None:
      log_p = nn.log_softmax(jax.lax.stop_gradient(before))
      x = jnp.concatenate([x, log_p.astype(x.dtype)], -1)
    return answer(x, self.head.classes, 'out')


class UnembeddingPerceptron(nn.Module):
  """The perceptron of an `Unembedding`: features [batch, length, width] → the same."""

  norm: Callable[..., DecoderNorm]
  arch: Arch  # 'hidden' and 'out'
  dtype: DTypeLike

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    dense = partial(nn.Dense, use_bias=False, dtype=self.dtype)
    y = self.norm(name='norm')(x)
    y = nn.relu(dense(self.arch['hidden'], kernel_init=he_normal, name='hidden')(y))
    zeros = nn.initializers.zeros
    return x + dense(self.arch['out'], kernel_init=zeros, name='out')(y)


class Heads(nn.Module):
  """Heads without their trunk, to be trained on features that were computed before.

  It maps {name of a head: features of its tap, pooled or not} to {name: float32 logits
  [batch, classes]}. Features called 'main', the trunk's own logits, are passed on. The
  arrays of a head are params/head_NAME, as in `WithHeads`.

  Attributes:
    heads: the heads by name.
    arch: as in `WithHeads`, without the keys of the trunk.
    dtype: type of the computation; parameters and logits are float32.
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
  """A network with further exits: a trunk, and heads on its taps.

      trunk = dp.models.build('resnet20')
      model = WithHeads(trunk, {'early': Head('stage1/block2', hidden=64)})
      outputs = model.apply(variables, images)  # has outputs['early'], outputs['main']

  It returns the outputs of the trunk, and the float32 logits [batch, classes] of every
  head by its name. The arrays of the trunk are params/trunk, unchanged, so that those
  of a trained trunk can be put there; those of a head are params/head_NAME. If the
  outputs of the trunk hold a 'mask', bool [batch, tokens], heads leave padding out.

  Attributes:
    trunk: a model of this package, whose `arch` is taken over.
    heads: a `Head`, an `Unembedding` of a decoder, or an `Auxiliary` path, for every
      exit besides 'main', by name.
    arch: what pruning changed, by key 'trunk/...', 'head_NAME/...' and 'exit/NAME'; see
      `depthprune.models.arch`. The value 0 drops an exit with its head; without 'main',
      the trunk ends with the last tap that is read.

  Raises:
    ValueError: a head is named like an output of the trunk, or reads a tap that the
      trunk does not have, or `arch` drops every exit.
  """

  trunk: Any
  heads: Mapping[str, AnyHead]
  arch: Arch = FrozenDict()

  def __post_init__(self):
    for name, head in self.heads.items():
      for tap in head.reads:
        check_tap(tap, _values(self.trunk))
      if name in (*_values(self.trunk), 'main'):
        raise ValueError(f'head {name!r}: the trunk has an output of that name')
      if len(_line(self.heads, name)) > len(self.heads):
        raise ValueError(f'head {name!r} comes after itself')
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
    """The names of the exits that are not dropped."""
    names = ('main', *self.heads)
    return tuple(name for name in names if self.arch.get(f'exit/{name}', 1))

  @property
  def taps(self) -> tuple[str, ...]:
    """The taps of the trunk, in order of depth."""
    return self.trunk.taps

  @property
  def widths(self) -> dict[str, int]:
    """Every key that `arch` may hold, with its value in the full network."""
    exits = {f'exit/{name}': 1 for name in ('main', *self.heads)}
    out = {
      f'head_{name}/out': self.trunk.width
      for name, head in self.heads.items()
      if isinstance(head, Unembedding) and head.hidden
    }
    return beneath(self.trunk.widths, 'trunk') | hidden_widths(self.heads) | out | exits

  @property
  def alone(self) -> Heads:
    """The heads as a module of their own, to be trained on what `features` returns."""
    arch = {k: v for k, v in self.arch.items() if k.startswith('head_')}
    return Heads(self._kept, FrozenDict(arch), self.trunk.dtype)

  @nn.compact
  def __call__(self, *inputs: jax.Array, train: bool = False) -> dict[str, jax.Array]:
    arch = complete(self.arch, self.widths, 'WithHeads')
    outputs = self._run_trunk(inputs, train)
    mask, dtype = outputs.get('mask'), self.trunk.dtype
    paths = {k: h for k, h in self._kept.items() if isinstance(h, Auxiliary)}
    heads = {k: h for k, h in self._kept.items() if isinstance(h, Head)}
    taps = {name: outputs[head.tap] for name, head in heads.items()}
    answers = _answers(heads, arch, dtype, taps, train, mask)
    for name, head in self._kept.items():
      if isinstance(head, Unembedding):
        x = outputs[head.tap]
        x = self.perceptron(name)(x) if head.hidden else x
        answers[name] = self.trunk(x, since=self.taps[-1])['main']
    # A class of every pixel is as large as the network's own answer, or the image.
    images = jax.tree.leaves((outputs.get('main'), inputs))
    size = next((jnp.shape(x)[1:-1] for x in images if jnp.ndim(x) > 2), ())
    for name, path in paths.items():
      part = within(arch, f'head_{name}')
      run = AuxiliaryPath(path, part, dtype, name=f'head_{name}')
      answers[name] = run(outputs, train, mask, size)
    return outputs | {k: v for k, v in answers.items() if k in self.exits}

  def features(self, *inputs: jax.Array) -> dict[str, jax.Array]:
    """Computes the pooled features [batch, c] that every head reads, by its name.

        read = model.apply(variables, images, method='features')

    The trunk's own logits, 'main', are among them unless that exit is dropped. The
    arrays of the heads are not read.

    Raises:
      ValueError: the network has an auxiliary path, which reads several taps, or an
        exit that shares the logits of the network.
    """
    if others := [k for k, h in self._kept.items() if not isinstance(h, Head)]:
      raise ValueError(f'features: {others[0]} is no head on a tap with its own arrays')
    outputs = self._run_trunk(inputs, train=False)
    read = {
      name: pooled(outputs[head.tap], head.pool, outputs.get('mask'))
      for name, head in self._kept.items()
    }
    return read | ({'main': outputs['main']} if 'main' in self.exits else {})

  @nn.nowrap
  def perceptron(self, name: str) -> UnembeddingPerceptron:
    """Returns the module of an `Unembedding` with a hidden layer, to run it alone.

        perceptron = model.perceptron('early')
        x = perceptron.apply({'params': variables['params']['head_early']}, x)

    Args:
      name: name of the head.
    """
    trunk, path = self.trunk, f'head_{name}'
    norm = partial(DecoderNorm, trunk.width, trunk.epsilon, trunk.offset, trunk.dtype)
    part = FrozenDict(within(complete(self.arch, self.widths, 'WithHeads'), path))
    return UnembeddingPerceptron(norm, part, trunk.dtype, name=path)

  @property
  def _kept(self) -> dict[str, Any]:
    """The heads of the exits, and those that they come after."""
    lines = [_line(self.heads, name) for name in self.exits if name != 'main']
    read = {name for line in lines for name in line}
    return {name: head for name, head in self.heads.items() if name in read}

  def _run_trunk(self, inputs: tuple, train: bool) -> dict[str, jax.Array]:
    """Runs the trunk as far as an exit needs it."""
    read = {tap for head in self._kept.values() for tap in head.reads}
    last = [tap for tap in _values(self.trunk) if tap in read][-1:]
    until = '' if 'main' in self.exits else last[0]
    return self.trunk(*inputs, train=train, until=until)


def variables_of_trunk(variables: Mapping[str, Any]) -> dict[str, Any]:
  """Returns the variables of the trunk of a `WithHeads`, without those of its heads."""
  return {name: tree['trunk'] for name, tree in variables.items() if 'trunk' in tree}


def _line(heads: Mapping[str, AnyHead], name: str) -> list[str]:
  """Returns a head and those that it comes after, one after the other.

  It is longer than all heads together where a head comes after itself.

  Raises:
    ValueError: one comes after what is no head.
  """
  line = [name]
  while len(line) <= len(heads) and (after := getattr(heads[line[-1]], 'after', '')):
    if not isinstance(heads.get(after), Head):
      heads_ = ', '.join(k for k, head in heads.items() if isinstance(head, Head))
      raise ValueError(
        f'head {line[-1]!r}: expected to come after one of {heads_}, got {after!r}'
      )
    line.append(after)
  return line


def _values(trunk: Any) -> tuple[str, ...]:
  """All taps of a trunk that a head may read, in order of depth."""
  return getattr(trunk, 'values', trunk.taps)


def hidden_widths(heads: Mapping[str, AnyHead]) -> dict[str, int]:
  """Returns the keys that heads have in `arch`, with their full values."""
  keys = [beneath(head.widths, f'head_{name}') for name, head in heads.items()]
  return {key: width for part in keys for key, width in part.items()}


def _answers(
  heads: Mapping[str, Head], arch: Arch, dtype: DTypeLike, features, train, mask=None
) -> dict[str, jax.Array]:
  """Computes the logits of every head, within a module's compact method."""
  logits = {}

  def compute(name: str) -> jax.Array:
    if name not in logits:
      head, part = heads[name], within(arch, f'head_{name}')
      before = compute(head.after) if head.after else None
      perceptron = HeadPerceptron(head, part, dtype, name=f'head_{name}')
      logits[name] = perceptron(features[name], train, mask, before)
    return logits[name]

  return {name: compute(name) for name in heads}


def every_tap(
  trunk: Any, classes: int | None = None, pool: Pool | None = None
) -> WithHeads:
  """Puts a linear head on every tap of a trunk instead of its own: NetCut's network.

      model = every_tap(dp.models.build('mlp20x200'))
      model.exits  # ('exit01', 'exit02', ..., 'exit20')

  Numbers are padded with zeros, so that names sort by depth. The trunk's own head is
  dropped. The exits of a decoder share its logits, see `Unembedding`.

  Args:
    trunk: a model of this package.
    classes: number of logits of every exit; that of the trunk by default.
    pool: how features become a vector, see `Head`; `trunk.pool` by default.

  Raises:
    ValueError: the trunk has no taps, or `classes` or `pool` is given for a decoder.

  Source: Wójcik, Wołczyk, Bałazy, Tabor, arXiv 2004.08172.
  """
  taps = _taps(trunk, 'every_tap')
  if isinstance(trunk, Decoder):
    if classes or pool:
      given = f'classes={classes}, pool={pool}'
      raise ValueError(f'every_tap: {given}: a decoder tells the tokens that follow')
    head: Callable[[str], Head | Unembedding] = Unembedding
  else:
    head = partial(Head, classes=classes or trunk.classes, pool=pool or trunk.pool)
  digits = len(str(len(taps)))
  heads = {f'exit{i:0{digits}}': head(tap) for i, tap in enumerate(taps, 1)}
  return WithHeads(trunk, heads, FrozenDict({'exit/main': 0}))


def add_heads(network: Any, heads: Mapping[str, AnyHead]) -> WithHeads:
  """Adds heads to a network, or to the trunk of a network that has heads already.

  Args:
    network: a model of this package, possibly a `WithHeads`.
    heads: the heads and auxiliary paths to add, by name.

  Returns:
    A new network; `network` is unchanged.

  Raises:
    ValueError: a head is named like another exit or an output of the trunk, or reads a
      tap that the trunk does not have.
  """
  own = getattr(network, 'heads', {})
  if both := sorted({*own} & {*heads}):
    raise ValueError(f'head {both[0]!r}: the network has an exit of that name')
  if not own:
    return WithHeads(network, heads)
  return WithHeads(network.trunk, {**own, **heads}, network.arch)


def multitask(trunk: Any, tasks: Mapping[str, int]) -> WithHeads:
  """Makes a network for several tasks: a trunk with a linear head per task.

  All heads read the last tap (hard parameter sharing). Every task is an exit with
  float32 logits [batch, classes]. The trunk's own head is dropped, so there is no exit
  'main'.

  Args:
    trunk: a model of this package.
    tasks: number of classes of every task, such as {'left': 10, 'right': 10}.

  Raises:
    ValueError: there is no task, or one is named like an output of the trunk, or the
      trunk has no taps.

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
      f'{who}: {type(trunk).__name__} has no taps to put exits on; expected a model of '
      f'{__package__}, or any other as dp.trunk(model, variables, *inputs)'
    )
  return taps
