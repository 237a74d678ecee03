"""What a trained network would be worth without some of its parts, on held-out data.

A decision is judged masked, not cut, so that many can be judged in one compiled
program. Without a branch the batch statistics behind it are wrong; they are measured
anew before the network is judged, on batches augmented as in training.
"""

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np

from depthprune import distributed
from depthprune.data.dataset import inputs_of
from depthprune.train.evaluate import COLLECTION, added, recalibrate, totals
from depthprune.train.method import Method
from depthprune.train.step import State, branches_of, gated
from depthprune.train.task import Task, Tree, as_dict


class Decisions(NamedTuple):
  """One decision, or several: then every leaf has one more axis in front, [n, ...].

  Attributes:
    keep: {'channels': {group: [slices]}, 'branches': {path: []}}, float32, each part
      optional.
    closes: bool, whether it closes a branch.
    exit: int32, which of the exits that the program was told of answers.
    stats: batch statistics to run with; None for those that the network has.
  """

  keep: Tree
  closes: np.ndarray
  exit: np.ndarray
  stats: Tree = None


class Masked(NamedTuple):
  """Programs over a trained network, compiled once for every shape.

  `how` is 'vmap' or 'map' for several decisions, 'one' for one; `exits` are names of
  exits, and without any the method says what the answer is.

  Attributes:
    measure: (how, exits, decisions, batch) -> the task's sums over the batch.
    statistics: (how, decisions, batch) -> batch statistics of that batch alone.
    outputs: (*inputs) -> outputs by name, as trained.
    stats: the batch statistics that the network has, {} if none.
    scores: (sums of all batches) -> {'loss', 'accuracy', ...}, the task's.
  """

  measure: Callable[..., Tree]
  statistics: Callable[..., Tree]
  outputs: Callable[..., dict[str, jax.Array]]
  stats: Tree
  scores: Callable[[Tree], dict[str, np.ndarray]]


def masked(
  model: Any, method: Method, task: Task, state: State, coupling: Any = None
) -> Masked:
  """The programs of a network as a method has trained it; arguments as for `judge`."""
  run, variables = gated(model, coupling), state.variables
  given = method.forward(state.theta, None, state.step)
  gates = {
    'channels': given.get('channels', {}),
    'branches': {**branches_of(variables), **given.get('branches', {})},
  }
  answer = partial(_answer, method, task)
  measure = jax.jit(partial(_measure, run, task, answer), static_argnums=(3, 4))
  statistics = jax.jit(partial(_statistics, run), static_argnums=2)
  return Masked(
    partial(measure, variables, gates, state.theta),
    partial(statistics, variables, gates),
    lambda *inputs: as_dict(run(variables, gates, *inputs, train=False)),
    variables.get(COLLECTION, {}),
    task.scores,
  )


def _measure(run, task, answer, variables, gates, theta, how, exits, decisions, batch):
  def one(d: Decisions):
    arrays = variables if d.stats is None else {**variables, COLLECTION: d.stats}
    says = partial(answer, theta, exits, d.exit)
    return totals(run, task, says, arrays, kept_gates(gates, d.keep), batch)

  return _over(how, one, decisions)


def _statistics(run, variables, gates, how, decisions, batch):
  def one(d: Decisions):
    closed = kept_gates(gates, d.keep)
    apply = lambda variables, *args, **kwargs: run(variables, closed, *args, **kwargs)
    return recalibrate(apply, variables, [batch])[COLLECTION]

  return _over(how, one, decisions)


def _answer(method: Method, task: Task, theta, exits, exit, outputs: Tree) -> jax.Array:
  if not exits:
    return method.answer(task, outputs, theta)
  logits = [outputs[name] for name in exits]
  return logits[0] if len(exits) == 1 else jnp.stack(logits)[exit]


def kept_gates(gates: Tree, keep: Tree) -> Tree:
  """The values of gates that a decision leaves, 0 where it closes them.

  A channel that is kept although its gate is closed (to meet a target) counts as open.

  Args:
    gates: {'channels': {group: [n]}, 'branches': {path: ()}}, as trained.
    keep: the same, bool or 0 and 1; what is not named is as trained.
  """
  channels, branches = dict(gates.get('channels', {})), gates.get('branches', {})
  for group, kept in keep.get('channels', {}).items():
    gate = jnp.asarray(channels.get(group, jnp.ones(np.shape(kept), jnp.float32)))
    open_ = jnp.where(gate > 0, gate, jnp.ones_like(gate))
    channels[group] = open_ * jnp.asarray(kept, gate.dtype)
  # A path that is not among them is refused where the gates are put in place.
  closed = {
    p: branches.get(p, 1.0) * jnp.asarray(k, jnp.float32)
    for p, k in keep.get('branches', {}).items()
  }
  return {'channels': channels, 'branches': {**branches, **closed}}


def _over(how: str, one: Callable[[Decisions], Tree], decisions: Decisions) -> Tree:
  if how == 'one':
    return one(decisions)
  return jax.vmap(one)(decisions) if how == 'vmap' else jax.lax.map(one, decisions)


# Decisions times images in one call of vmap, at most. A CPU is slower with more:
# ResNet-56 at 32x32, one core, 211 images/s with 256 in a call, 215 with 512, 195 with
# 1024 and 156 with 2048.
IMAGES = {'cpu': 512, 'other': 4096}
PROBE = 8, 32  # decisions and images that vmap and map are timed with
SPARE = 3  # a program for so many decisions more is used rather than a new one compiled

Vectorise = Literal['vmap', 'map', 'auto']


@dataclasses.dataclass(frozen=True, eq=False)
class Judge:
  """evaluate(keep) -> {'loss', 'accuracy', ...}; made by `judge`.

  Attributes:
    network: the programs.
    exits: names of its outputs, sorted.
    held_out, calibration: the batches.
    vectorised: how `each` runs, {'by': 'vmap' | 'map' | 'auto'}; 'auto' until it has
      run once, then with the times 'vmap_ms' and 'map_ms' where they were measured.
    sizes: numbers of decisions that there are programs for.
  """

  network: Masked
  exits: tuple[str, ...]
  held_out: tuple[Tree, ...]
  calibration: tuple[Tree, ...]
  vectorised: dict[str, Any]
  sizes: set[int] = dataclasses.field(default_factory=set)

  def __call__(self, keep: Tree) -> dict[str, float]:
    """Scores of the network masked by keep, on all held-out examples.

    With exits in keep the one that is kept answers (the last by name, if several are)
    and nothing behind it is computed; without, what the method says.

    Args:
      keep: {'branches': {path: bool}, 'channels': {group: bool [slices]},
        'exits': {name: bool}}. Each part is optional and what is not named is as
        trained, so {} is the network as trained. A branch that is kept has the gate
        that it was trained with.

    Raises: KeyError for a branch, group or exit that there is not; ValueError where no
      exit is kept, or a branch is closed and there are no calibration batches.
    """
    keeps = jax.tree.map(lambda kept: np.asarray(kept)[None], keep)
    decisions, exits = self._read(keeps, 1)
    found = self._judged('one', exits, _rows(decisions, 0))
    return {name: float(value) for name, value in found.items()}

  def each(self, keeps: Tree) -> dict[str, np.ndarray]:
    """As calling it n times, in one compiled program: {'loss': [n], ...}.

    Args:
      keeps: as keep, every leaf with one more axis in front, [n, ...]. If that is too
        much for one call, they go through the same program in pieces.

    Raises: as calling it, and ValueError where n is not the same everywhere.
    """
    n = _count(keeps)
    decisions, exits = self._read(keeps, n)
    how = self._how(exits, decisions)
    size = self._size(n, how)
    rows = [np.arange(i, i + size).clip(max=n - 1) for i in range(0, n, size)]
    pieces = [_rows(decisions, r) for r in rows]
    found = [self._judged(how, exits, piece) for piece in pieces]
    return {k: np.concatenate([f[k] for f in found])[:n] for k in found[0]}

  def _read(self, keeps: Tree, n: int) -> tuple[Decisions, tuple[str, ...]]:
    """(decisions, names of the exits that answer in any of them)."""
    unknown = sorted(set(keeps) - {'channels', 'branches', 'exits'})
    if unknown:
      raise KeyError(
        f'keep has the entry {unknown[0]!r}: expected channels, branches, exits'
      )
    closes = np.zeros(n, bool)
    for kept in keeps.get('branches', {}).values():
      closes |= ~np.asarray(kept, bool).reshape(n, -1).all(1)
    answers = _answers(self.exits, keeps.get('exits', {}), n)
    exits = tuple(sorted(set(answers)))
    at = [exits.index(name) for name in answers] or [0] * n
    gates = {part: kept for part, kept in keeps.items() if part != 'exits'}
    gates = jax.tree.map(lambda kept: np.asarray(kept, np.float32), gates)
    return Decisions(gates, closes, np.asarray(at, np.int32)), exits

  def _judged(self, how: str, exits: tuple[str, ...], decisions: Decisions) -> dict:
    """Scores on the held-out examples, [n] or [] each."""
    if self.network.stats and decisions.closes.any():
      decisions = decisions._replace(stats=self._recalibrated(how, decisions))
    measure = partial(self.network.measure, how, exits, decisions)
    return self.network.scores(added([measure(batch) for batch in self.held_out]))

  def _recalibrated(self, how: str, decisions: Decisions) -> Tree:
    """Fresh statistics where a branch is closed, and where none is, those it has."""
    if not self.calibration:
      raise ValueError(
        'judge: a branch is closed, and without it the batch statistics are wrong; '
        'pass calibration=[batch, ...], augmented as in training'
      )
    statistics = partial(self.network.statistics, how, decisions)
    found = [statistics(batch) for batch in self.calibration]

    def chosen(old, *fresh):
      closes = decisions.closes.reshape(decisions.closes.shape + (1,) * old.ndim)
      mean = sum(fresh[1:], start=fresh[0]) / jnp.asarray(len(fresh), old.dtype)
      return jnp.where(closes, mean, old)

    return jax.tree.map(chosen, self.network.stats, *found)

  def _how(self, exits: tuple[str, ...], decisions: Decisions) -> str:
    """'vmap' or 'map': as asked; else vmap, but on a CPU whichever is faster."""
    if self.vectorised['by'] == 'auto':
      self.vectorised['by'] = 'vmap'
      if jax.default_backend() == 'cpu':
        few, images = PROBE
        first = _rows(decisions, slice(few)), _rows(self.held_out[0], slice(images))
        program = lambda how: self.network.measure(how, exits, *first)
        ms = {how: _milliseconds(partial(program, how)) for how in ('vmap', 'map')}
        faster = distributed.agreed(np.bool_(ms['vmap'] <= ms['map']))
        self.vectorised['by'] = 'vmap' if faster else 'map'
        self.vectorised.update({f'{how}_ms': taken for how, taken in ms.items()})
    return self.vectorised['by']

  def _size(self, n: int, how: str) -> int:
    """Decisions in one call: all, or as many as vmap may; all calls alike."""
    images = IMAGES.get(jax.default_backend(), IMAGES['other'])
    most = n if how == 'map' else max(1, images // len(self.held_out[0]['label']))
    size = -(-n // -(-n // most))
    size = min((s for s in self.sizes if size <= s <= size + SPARE), default=size)
    self.sizes.add(size)
    return size


def judge(
  model: Any,
  method: Method,
  task: Task,
  state: State,
  held_out: Sequence[Tree],
  calibration: Sequence[Tree] = (),
  coupling: Any = None,
  vectorise: Vectorise = 'auto',
) -> Judge:
  """The judge of a network as a method has trained it.

  Args:
    model, method, task, coupling: as for `make_step`.
    state: after training. (A later step would consume its arrays.)
    held_out: batches to judge on, all of one size; 'weight' as for `evaluate`.
    calibration: batches for fresh batch statistics, augmented as in training and of
      one size; needed where a branch is closed and there are such statistics.
    vectorise: how `each` runs all decisions in one program. 'vmap' makes one larger
      batch of them, 'map' is a loop. 'auto': vmap, but on a CPU (where convolutions in
      a loop may use one core only) whichever is faster when it is first used.

  Raises: ValueError without held-out batches, or for an unknown `vectorise`.
  """
  if vectorise not in get_args(Vectorise):
    expected = ', '.join(get_args(Vectorise))
    raise ValueError(f'judge: vectorise={vectorise!r}: expected one of {expected}')
  if not held_out:
    raise ValueError('judge: expected at least one held-out batch, got none')
  network = masked(model, method, task, state, coupling)
  exits = sorted(jax.eval_shape(network.outputs, *inputs_of(held_out[0])))
  batches = tuple(held_out), tuple(calibration)
  return Judge(network, tuple(exits), *batches, {'by': vectorise})


def _answers(exits: tuple[str, ...], keeps: Mapping, n: int) -> list[str]:
  """The exit that answers in each decision; [] where none is about exits."""
  unknown = [name for name in keeps if name not in exits]
  if unknown:
    raise KeyError(f'keep: no exit {unknown[0]!r}; there are: {", ".join(exits)}')
  kept = {name: np.asarray(keeps.get(name, [True] * n), bool) for name in exits}
  order = sorted(exits, key=lambda name: (name == 'main', name))
  answers = [
    max((e for e in order if kept[e][i]), default='', key=order.index) for i in range(n)
  ]
  if '' in answers:
    raise ValueError(f'keep drops every exit ({", ".join(exits)}): keep at least one')
  return answers if keeps else []


def _count(keeps: Tree) -> int:
  """How many decisions are stacked."""
  sizes = {np.shape(leaf)[:1] for leaf in jax.tree.leaves(keeps)}
  if len(sizes) != 1 or sizes & {(), (0,)}:
    raise ValueError(
      'judge.each: expected decisions stacked along a first axis of one length in all '
      f'leaves, got first axes {sorted(sizes)}'
    )
  return sizes.pop()[0]


def _rows(tree: Tree, rows: Any) -> Any:
  return jax.tree.map(lambda leaf: leaf[rows], tree)


def _milliseconds(call: Callable[[], Any]) -> float:
  """Of the second call; the first one compiles."""
  jax.block_until_ready(call())
  start = time.perf_counter()
  jax.block_until_ready(call())
  return 1e3 * (time.perf_counter() - start)
