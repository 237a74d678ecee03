"""Scores of a trained network without some of its parts, on held-out data.

Decisions are judged on the masked network, not on one that is cut, so that several of
them can be judged in one compiled program. A closed branch makes the batch statistics
behind it wrong; they are measured anew before the network is judged, on batches
augmented as in training.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np

from depthprune import distributed
from depthprune.data import batches
from depthprune.data.dataset import inputs_of
from depthprune.program import arguments
from depthprune.program.arguments import listed
from depthprune.program.gating import with_branches
from depthprune.surgery.influence import block_influence
from depthprune.train import labels
from depthprune.train.evaluate import COLLECTION, add_up, recalibrate, totals
from depthprune.train.method import Method, checked
from depthprune.train.step import USED, State, branches_of, gated
from depthprune.train.task import Task, Tree, as_dict, is_task

# Decisions times images in one call of vmap, at most. A CPU is slower with more:
# ResNet-56 at 32x32, one core, 211 images/s with 256 in a call, 215 with 512, 195 with
# 1024 and 156 with 2048.
IMAGES = {'cpu': 512, 'other': 4096}
PROBE = 8, 32  # decisions and images that vmap and map are timed with
SPARE = 3  # a program for up to this many more decisions is reused, not compiled anew

Vectorise = Literal['vmap', 'map', 'auto']


def judge(
  model: Any,
  method: Method,
  task: Task,
  state: State,
  held_out: Any,
  calibration: Any = (),
  coupling: Any = None,
  vectorise: Vectorise = 'auto',
  batch: int = 128,
) -> Judge:
  """Returns a function that scores a trained network without some of its parts.

      evaluate = judge(model, method, task, state, held_out, coupling=coupling)
      evaluate({})['accuracy']  # of the network as trained
      evaluate({'branches': {'stage2/block1/branch': False}})['accuracy']
      keep = method.decide(state.theta, state.stats, evaluate)

  Args:
    model: the network, as for `make_step`.
    method: the method that trained it.
    task: what is measured.
    state: the state after training. A later training step would consume its arrays.
    held_out: what to judge on: arrays, {'image': x, 'label': y} or (x, y), or an
      iterable of such batches. An entry 'weight' [batch] is 0 on rows that only pad a
      batch; batches of unlike sizes are padded so.
    calibration: the same, for fresh batch statistics, augmented as in training; the
      rows of arrays that fill no batch are left out. They are needed where a branch is
      closed in a network with such statistics.
    coupling: the network's coupling, needed to close channels.
    vectorise: how `Judge.each` runs several decisions in one program: 'vmap' makes one
      larger batch of them and 'map' is a loop. 'auto' is vmap; on a CPU, where the
      convolutions of a loop may use one core only, it is whichever is faster when it
      is first used.
    batch: examples in a batch of arrays.

  Returns:
    The `Judge`, evaluate(keep) -> {'loss', 'accuracy', ...}.

  Raises:
    ValueError: there are no held-out batches, or `vectorise` is unknown.
  """
  if vectorise not in get_args(Vectorise):
    expected = ', '.join(get_args(Vectorise))
    raise ValueError(f'judge: vectorise={vectorise!r}: expected one of {expected}')
  checked(method)
  is_task(task)
  write = 'write the State that the last step returned'
  arguments.kind_of('state', state, State, 'the State after training', write)
  arguments.alive('state', state, USED)
  held_out = held_out_of(held_out, batch, task)
  network = masked_programs(model, method, task, state, coupling)
  return Judge(
    network=network,
    exits=tuple(sorted(jax.eval_shape(network.outputs, *inputs_of(held_out[0])))),
    held_out=tuple(held_out),
    calibration=tuple(batches.full(calibration, batch)),
    vectorised={'by': vectorise},
    decides_by=task.decides_by,
  )


def held_out_of(source: Any, size: int, task: Task) -> list[Tree]:
  """Returns held-out examples in batches of one size, and not none of them.

  Args:
    source: arrays or an iterable of batches.
    size: examples in a batch of arrays.
    task: what is measured, which knows its labels.

  Raises:
    ValueError: there are no batches, or they lack inputs or labels.
  """
  held_out = batches.whole(source, size)
  if not held_out:
    has = 'expected at least one held-out batch, got none'
    raise arguments.wrong(
      'held_out', has, 'pass a list, or an iterator not yet used up'
    )
  for batch in held_out:
    inputs_of(batch)
    labels.of(batch)
    task.check(batch)
  return held_out


@dataclasses.dataclass(frozen=True, eq=False)
class Judge:
  """evaluate(keep) -> {'loss', 'accuracy', ...}; made by `judge`.

  Attributes:
    network: the compiled programs.
    exits: names of the network's outputs, sorted.
    held_out: batches to judge on.
    calibration: batches for fresh batch statistics.
    decides_by: name of the score that decides, higher is better.
    vectorised: how `each` runs, {'by': 'vmap', 'map' or 'auto'}. 'auto' stands there
      until it has run once; then 'vmap_ms' and 'map_ms' are added if they were timed.
    sizes: numbers of decisions for which there are compiled programs.
  """

  network: Masked
  exits: tuple[str, ...]
  held_out: tuple[Tree, ...]
  calibration: tuple[Tree, ...]
  vectorised: dict[str, Any]
  decides_by: str = 'accuracy'
  sizes: set[int] = dataclasses.field(default_factory=set)

  def __call__(self, keep: Tree) -> dict[str, float]:
    """Scores the network masked by `keep` on all held-out examples.

    Where `keep` names exits, the kept one answers (the last by name if several are
    kept) and nothing behind it is computed; otherwise the method's answer is scored.

    Args:
      keep: {'branches': {path: bool}, 'channels': {group: bool [slices]},
        'exits': {name: bool}}. Each part is optional, and everything that is not named
        stays as trained, so {} is the network as trained. A kept branch has the gate
        that it was trained with.

    Returns:
      The task's scores, {'loss', 'accuracy', ...}.

    Raises:
      KeyError: there is no such branch, group or exit.
      ValueError: no exit is kept, or a branch is closed without calibration batches.
    """
    arguments.parts('keep', keep, known=('exits',))
    keeps = jax.tree.map(lambda kept: np.asarray(kept)[None], keep)
    decisions, exits = self._read(keeps, 1)
    scores = self._scores('one', exits, _rows(decisions, 0))
    return {name: float(value) for name, value in scores.items()}

  def of(self, variables: Tree) -> Judge:
    """Returns the judge of the network with other arrays, such as refitted ones.

    Nothing is compiled anew. Branch gates stay those of the state.

    Args:
      variables: the arrays, of the structure and shapes of those of the state.
    """
    return dataclasses.replace(self, network=self.network.of(variables))

  def each(self, keeps: Tree) -> dict[str, np.ndarray]:
    """Scores n decisions in one compiled program.

    Args:
      keeps: as `keep` of a call, with one more axis in front of every leaf, [n, ...].
        Too many for one call go through the same program in pieces.

    Returns:
      {'loss': [n], 'accuracy': [n], ...}.

    Raises:
      KeyError: there is no such branch, group or exit.
      ValueError: as for a call, or n is not the same in all leaves.
    """
    arguments.parts('keeps', keeps, known=('exits',))
    n = _count(keeps)
    decisions, exits = self._read(keeps, n)
    how = self._how(exits, decisions)
    size = self._size(n, how)
    rows = [np.arange(i, i + size).clip(max=n - 1) for i in range(0, n, size)]
    scores = [self._scores(how, exits, _rows(decisions, r)) for r in rows]
    return {k: np.concatenate([s[k] for s in scores])[:n] for k in scores[0]}

  def influence(self, blocks: Mapping[str, Sequence[str]]) -> dict[str, float]:
    """Measures how much blocks change what goes through them, on held-out inputs.

    It reads no labels. The branch gates are those that were trained.

    Args:
      blocks: {name: the branches of a block, first to last}.

    Returns:
      {name: influence} as `surgery.influence.block_influence` defines it; of a block
      in a scan {'NAME[layer]': influence}.

    Raises:
      ValueError: the judge was made without a coupling, or what `block_influence`
        refuses.
    """
    parts = []
    for batch in self.held_out:
      inputs = inputs_of(batch)
      if 'weight' in batch:  # other rows pad the batch
        inputs = _rows(inputs, np.flatnonzero(batch['weight']))
      parts.append(inputs)
    return self.network.influence(blocks, parts)

  def _read(self, keeps: Tree, n: int) -> tuple[Decisions, tuple[str, ...]]:
    """Returns (decisions, names of the exits that answer in any of them)."""
    closes = np.zeros(n, bool)
    for kept in keeps.get('branches', {}).values():
      closes |= ~np.asarray(kept, bool).reshape(n, -1).all(1)
    answers = _answers(self.exits, keeps.get('exits', {}), n)
    exits = tuple(sorted(set(answers)))
    at = [exits.index(name) for name in answers] or [0] * n
    gates = {part: kept for part, kept in keeps.items() if part != 'exits'}
    self.network.fits(gates, n)
    gates = jax.tree.map(lambda kept: np.asarray(kept, np.float32), gates)
    return Decisions(gates, closes, np.asarray(at, np.int32)), exits

  def _scores(self, how: str, exits: tuple[str, ...], decisions: Decisions) -> dict:
    """Returns the scores on the held-out examples, [n] or [] each."""
    if self.network.stats and decisions.closes.any():
      decisions = decisions._replace(stats=self._fresh_statistics(how, decisions))
    measure = partial(self.network.measure, how, exits, decisions)
    return self.network.scores(add_up([measure(batch) for batch in self.held_out]))

  def _fresh_statistics(self, how: str, decisions: Decisions) -> Tree:
    """Returns fresh statistics where a branch is closed, and otherwise the old ones."""
    if not self.calibration:
      raise ValueError(
        'judge: a branch is closed, and without it the batch statistics are wrong; '
        'pass calibration=[batch, ...], augmented as in training'
      )
    statistics = partial(self.network.statistics, how, decisions)

    def choose(old, *fresh):
      closes = decisions.closes.reshape(decisions.closes.shape + (1,) * old.ndim)
      mean = sum(fresh[1:], start=fresh[0]) / jnp.asarray(len(fresh), old.dtype)
      return jnp.where(closes, mean, old)

    return jax.tree.map(choose, self.network.stats, *map(statistics, self.calibration))

  def _how(self, exits: tuple[str, ...], decisions: Decisions) -> str:
    """Returns 'vmap' or 'map', and times both where that was left open on a CPU."""
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
    """Returns how many decisions a call gets, so that all calls are alike."""
    images = IMAGES.get(jax.default_backend(), IMAGES['other'])
    most = n if how == 'map' else max(1, images // len(self.held_out[0]['label']))
    size = -(-n // -(-n // most))
    size = min((s for s in self.sizes if size <= s <= size + SPARE), default=size)
    self.sizes.add(size)
    return size


def _answers(exits: tuple[str, ...], keeps: Mapping, n: int) -> list[str]:
  """Returns the exit that answers in each decision; [] where no exits are named."""
  unknown = [name for name in keeps if name not in exits]
  if unknown:
    raise KeyError(f'keep: no exit {unknown[0]!r}; there are: {listed(exits)}')
  kept = {name: np.asarray(keeps.get(name, [True] * n), bool) for name in exits}
  order = sorted(exits, key=lambda name: (name == 'main', name))
  answers = [
    max((e for e in order if kept[e][i]), default='', key=order.index) for i in range(n)
  ]
  if '' in answers:
    raise ValueError(f'keep drops every exit ({listed(exits)}): keep at least one')
  return answers if keeps else []


def _count(keeps: Tree) -> int:
  """Returns how many decisions are stacked."""
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
  """Times the second call, as the first one compiles."""
  jax.block_until_ready(call())
  start = time.perf_counter()
  jax.block_until_ready(call())
  return 1e3 * (time.perf_counter() - start)


# ---- compiled programs ---------------------------------------------------------------


class Decisions(NamedTuple):
  """One decision, or n decisions with one more axis in front of every leaf.

  Attributes:
    keep: {'channels': {group: [slices]}, 'branches': {path: []}}, float32, each part
      optional.
    closes: bool, whether the decision closes a branch.
    exit: int32, index of the exit that answers among the exits of the program.
    stats: batch statistics to run with; None for those of the network.
  """

  keep: Tree
  closes: np.ndarray
  exit: np.ndarray
  stats: Tree = None


class Masked(NamedTuple):
  """Programs over a trained network, compiled once for every shape.

  In these programs `how` is 'one' for one decision and 'vmap' or 'map' for several, and
  `exits` are names of exits; without any, the method's answer is measured.

  Attributes:
    measure: (how, exits, decisions, batch) -> the task's sums over the batch.
    statistics: (how, decisions, batch) -> batch statistics of that batch alone.
    outputs: (*inputs) -> outputs by name, as trained.
    fits: (gates, n) -> None; raises where they are no n decisions on its gates.
    stats: the batch statistics that the network has, {} if none.
    scores: (sums of all batches) -> {'loss', 'accuracy', ...}, the task's.
    of: (variables) -> the same programs, compiled once, with other arrays.
    influence: (blocks, inputs of the batches) -> {block: influence}.
  """

  measure: Callable[..., Tree]
  statistics: Callable[..., Tree]
  outputs: Callable[..., dict[str, jax.Array]]
  fits: Callable[[Tree, int], None]
  stats: Tree
  scores: Callable[[Tree], dict[str, np.ndarray]]
  of: Callable[[Tree], Masked]
  influence: Callable[[Mapping, Sequence[tuple]], dict[str, float]]


def masked_programs(
  model: Any, method: Method, task: Task, state: State, coupling: Any = None
) -> Masked:
  """Returns the programs of a trained network; arguments as for `judge`."""
  run, variables = gated(model, coupling), state.variables
  own = method.forward(state.theta, None, state.step)
  gates = {
    'channels': own.get('channels', {}),
    'branches': {**branches_of(variables), **own.get('branches', {})},
  }

  def answer(theta, exits, exit, outputs):
    if not exits:
      return method.answer(task, outputs, theta)
    logits = [outputs[name] for name in exits]
    return logits[0] if len(exits) == 1 else jnp.stack(logits)[exit]

  # Large arrays are arguments of the programs, not constants in them.
  def measure(variables, gates, theta, how, exits, decisions, batch):
    def one(d: Decisions):
      arrays = variables if d.stats is None else {**variables, COLLECTION: d.stats}
      says = partial(answer, theta, exits, d.exit)
      return totals(run, task, says, arrays, kept_gates(gates, d.keep), batch)

    return _over(how, one, decisions)

  def statistics(variables, gates, how, decisions, batch):
    def one(d: Decisions):
      closed = kept_gates(gates, d.keep)
      apply = lambda variables, *args, **kwargs: run(variables, closed, *args, **kwargs)
      return recalibrate(apply, variables, [batch])[COLLECTION]

    return _over(how, one, decisions)

  def fits(decided, n):
    for part, kept in decided.items():
      for name, value in kept.items():
        own = np.shape(gates[part][name]) if name in gates[part] else None
        if own is not None and np.shape(value) != (n, *own):
          has = f'{name}: has shape {np.shape(value)[1:]}, its gate {own}'
          raise arguments.wrong('keep', has)

  def influence(variables, blocks, inputs):
    if coupling is None:
      write = 'write judge(..., coupling=couple(model, variables, example))'
      raise arguments.wrong('coupling', 'expected one to measure influences', write)
    arrays = with_branches(variables, own.get('branches', {}))
    return block_influence(coupling, arrays, inputs, blocks)

  measure = jax.jit(measure, static_argnames=('how', 'exits'))
  statistics = jax.jit(statistics, static_argnames='how')

  def programs(variables):
    return Masked(
      measure=partial(measure, variables, gates, state.theta),
      statistics=partial(statistics, variables, gates),
      outputs=lambda *inputs: as_dict(run(variables, gates, *inputs, train=False)),
      fits=fits,
      stats=variables.get(COLLECTION, {}),
      scores=task.scores,
      influence=partial(influence, variables),
      of=programs,
    )

  return programs(variables)


def _over(how: str, one: Callable[[Decisions], Tree], decisions: Decisions) -> Tree:
  if how == 'one':
    return one(decisions)
  return jax.vmap(one)(decisions) if how == 'vmap' else jax.lax.map(one, decisions)


def kept_gates(gates: Tree, keep: Tree) -> Tree:
  """Returns the gates that a decision leaves, 0 where it closes them.

  A channel that is kept although its gate is closed (to meet a target) counts as open.

  Args:
    gates: {'channels': {group: [n]}, 'branches': {path: ()}}, as trained.
    keep: the same, bool or 0 and 1; gates that it does not name stay as trained.
  """
  channels, branches = dict(gates.get('channels', {})), gates.get('branches', {})
  for group, kept in keep.get('channels', {}).items():
    gate = jnp.asarray(channels.get(group, jnp.ones(np.shape(kept), jnp.float32)))
    open_ = jnp.where(gate > 0, gate, jnp.ones_like(gate))
    channels[group] = open_ * jnp.asarray(kept, gate.dtype)
  # An unknown path is refused later, where the gates are put in place.
  closed = {
    p: branches.get(p, 1.0) * jnp.asarray(k, jnp.float32)
    for p, k in keep.get('branches', {}).items()
  }
  return {'channels': channels, 'branches': {**branches, **closed}}
