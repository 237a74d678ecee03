"""Runs a cascade: early exit for a batch in one program of static shapes.

The first stage runs on the whole batch. Examples that are confident enough leave, the
others move to the front, and the next stage runs on the smallest of a few static sizes
that holds them (`lax.switch`), and so on. Answers are written back to the places of
their examples. Sizes are steps of an eighth of the batch, so padding costs at most
that. `vmap` of `lax.cond` would not do: it computes both sides for every example.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Collection, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.export import is_symbolic_dim

from depthprune.cascades import confidence
from depthprune.program.stages import Crossing, Stages


class Answer(NamedTuple):
  """The answers of a cascade to a batch.

  Attributes:
    logits: [batch, classes], of the exit at which an example left.
    exit: int32 [batch], the index of that exit in `cascade.exits`.
    score: float32 [batch], its confidence; NaN at the last exit.
    rows: int32 [stages], the number of examples that every stage ran on, padding
      included; 0 everywhere if the network alone answered.
    broken: int32, how often a confidence was NaN; such an example goes on.
  """

  logits: jax.Array
  exit: jax.Array
  score: jax.Array
  rows: jax.Array
  broken: jax.Array


class Settings(NamedTuple):
  """The settings of a `Cascade` that may change without compiling again."""

  thresholds: jax.Array
  temperatures: jax.Array
  weights: jax.Array | None


class _Front(NamedTuple):
  """The examples of a batch, those that are still there in front."""

  rows: jax.Array  # int32 [batch], their places in the batch
  stays: jax.Array  # bool [batch], whether they are still there
  order: jax.Array  # int32 [batch], their places in the arrays of the block before
  crossed: list  # arrays that the next stage reads
  memory: confidence.Memory


def sizes(batch: Any, steps: int, least: int = 1) -> tuple[Any, ...]:
  """Returns the static sizes of a batch: 0, and `least` to `batch` in equal steps.

  A symbolic batch has symbolic sizes, among which some may be equal.
  """
  if is_symbolic_dim(batch):
    return (0, *(-(-batch * i // steps) for i in range(1, steps)), batch)
  rounded = {-(-batch * i // steps) for i in range(1, steps + 1)}
  return tuple(sorted({0, *(max(size, least) for size in rounded if size)}))


def run(
  stages: Stages,
  kind,
  steps: int,
  variables,
  settings: Settings,
  inputs,
  end: int,
  merged: tuple[str, ...] | None = (),
) -> Answer:
  """Answers inputs [batch, ...] at the first `end` exits.

  `kind` is the confidence, and `steps` the number of static sizes. The batch may be
  symbolic, as for `jax.export`, if the stages can be traced with it. The stage behind
  an exit in `merged` also runs on the examples that leave there, with the stage before
  it and without a branch; who leaves where, and with which answer, stays the same.
  None for `merged`: the network alone answers, at its own exit.
  """
  arrays = jax.tree.leaves(inputs)
  batch = stages.examples(inputs)
  if merged is None:
    return _alone(stages, variables, inputs, batch)
  stages = stages.again(*inputs)
  if not is_symbolic_dim(batch) and 0 < batch < stages.least:
    return _run_repeated(stages, kind, steps, variables, settings, inputs, end, merged)
  if not is_symbolic_dim(batch) and batch == 1:
    return _run_single(stages, kind, variables, settings, arrays, end, merged)
  static = sizes(batch, steps, stages.least)
  programs = {size: stages.runs(size) for size in static if size}
  shape = logits(stages, stages.exits[-1])
  answer = Answer(
    jnp.zeros((batch, *shape.shape[1:]), shape.dtype),
    jnp.zeros(batch, jnp.int32),
    jnp.full(batch, jnp.nan, jnp.float32),
    jnp.zeros(end, jnp.int32),
    jnp.zeros((), jnp.int32),
  )
  if not batch:
    return answer
  every = jnp.arange(batch, dtype=jnp.int32)
  memory = confidence.start(batch)
  front = _Front(every, jnp.ones(batch, bool), every, arrays, memory)
  for block in blocks(stages.exits[:end], merged):
    if 0 in block:
      at_exits, crossed = _chain(programs[batch], block, variables, arrays)
      ran = jnp.int32(batch)
    else:
      ran, at_exits, crossed = _run_block(
        stages, programs, variables, block, batch, static, front
      )
    for k, at_exit in zip(block, at_exits, strict=True):
      last = k + 1 == end
      answer, front = _leave(kind, settings, k, last, answer, front, at_exit, ran)
    front = _moved(front, crossed)
  return answer


def blocks(exits: Sequence[str], merged: Collection[str]) -> list[range]:
  """Groups stages that run on the same examples: those with only merged exits within.

  Args:
    exits: the exits of the stages.
    merged: the exits behind which the next stage is not skipped.
  """
  starts = [0, *(k + 1 for k, e in enumerate(exits[:-1]) if e not in merged)]
  return [range(*ends) for ends in itertools.pairwise([*starts, len(exits)])]


def _alone(stages: Stages, variables, inputs, batch: Any) -> Answer:
  """Answers a batch by the network without other exits."""
  *early, last = stages.exits
  return Answer(
    logits=stages.fn(variables, *inputs)[last],
    exit=jnp.full(batch, len(early), jnp.int32),
    score=jnp.full(batch, jnp.nan, jnp.float32),
    rows=jnp.zeros(len(stages.exits), jnp.int32),
    broken=jnp.zeros((), jnp.int32),
  )


def _run_repeated(
  stages: Stages, kind, steps, variables, settings, inputs, end, merged
) -> Answer:
  """Repeats a single example, for stages that run only on several."""
  arrays, tree = jax.tree.flatten(inputs)
  both = zip(arrays, stages.counts, strict=True)
  repeated = [jnp.repeat(x, stages.least, 0) if c else x for x, c in both]
  repeated = jax.tree.unflatten(tree, repeated)
  answer = run(stages, kind, steps, variables, settings, repeated, end, merged)
  return answer._replace(
    logits=answer.logits[:1],
    exit=answer.exit[:1],
    score=answer.score[:1],
    broken=answer.broken // stages.least,
  )


def _run_single(
  stages: Stages, kind, variables, settings: Settings, arrays: list, end: int, merged
) -> Answer:
  """Answers one example, which needs no places: a block is one branch within another.

  What sorts and scatters a batch takes a CPU as long as a small stage.
  """
  runs, parts = stages.runs(1), blocks(stages.exits[:end], merged)

  def answered(i: int, memory: confidence.Memory, crossed: list) -> Answer:
    """Runs block i and, if the example does not leave there, those behind it."""
    at_exits, crossed = _chain(runs, parts[i], variables, crossed)
    given = at_exits[0], jnp.zeros(1, jnp.int32), jnp.zeros(1, jnp.float32)
    stays, broken = jnp.ones(1, bool), jnp.int32(0)
    for k, at_exit in zip(parts[i], at_exits, strict=True):
      last = k + 1 == end
      score, leaves, bad, memory = _scored(
        kind, settings, k, last, stays, at_exit, memory
      )
      here = at_exit, jnp.full(1, k, jnp.int32), score
      logits, exit, scored = map(functools.partial(jnp.where, leaves[0]), here, given)
      given = logits, exit, scored
      stays, broken = stays & ~leaves, broken + bad
    ran = jnp.array([k < parts[i].stop for k in range(end)], jnp.int32)
    answer = Answer(*given, ran, broken)
    if parts[i].stop == end:
      return answer

    def go_on() -> Answer:
      later = answered(i + 1, memory, crossed)
      return later._replace(broken=later.broken + broken)

    return jax.lax.cond(stays[0], go_on, lambda: answer)

  return answered(0, confidence.start(1), arrays)


def _run_block(
  stages, programs, variables, block: range, batch: Any, static, front: _Front
):
  """Runs stages on the smallest size that holds the examples that are still there.

  Returns that size, the logits of every stage, and the crossing arrays, padded to the
  batch.
  """
  before = stages[block[0] - 1].crossing

  def on(size: int):
    def run(order, crossed):
      part = [_taken(c, x, order[:size]) for c, x in zip(before, crossed, strict=True)]
      at_exits, after = _chain(programs[size], block, variables, part)
      after = [
        x if c.axis is None else _padded(x, batch * c.shape[c.axis], c.axis)
        for c, x in zip(stages[block[-1]].crossing, after, strict=True)
      ]
      return [_padded(x, batch) for x in at_exits], after

    return run

  def on_none(order, crossed):
    shapes = jax.eval_shape(on(batch), order, crossed)
    return jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)

  alive = jnp.sum(front.stays, dtype=jnp.int32)
  chosen = jnp.sum(jnp.asarray(static, jnp.int32) < alive, dtype=jnp.int32)
  branches = [on(size) if size else on_none for size in static]
  at_exits, crossed = jax.lax.switch(chosen, branches, front.order, front.crossed)
  return jnp.asarray(static, jnp.int32)[chosen], at_exits, crossed


def _chain(runs: Sequence[Callable], block: range, variables, crossed):
  """Runs stages one after another; returns the logits of each, and what crosses."""
  at_exits = []
  for k in block:
    at_exit, crossed = runs[k](variables, crossed)
    at_exits.append(at_exit)
  return at_exits, crossed


def _leave(
  kind, settings: Settings, k: int, last: bool, answer: Answer, front, at_exit, ran
):
  """Answers the examples that leave at exit k."""
  batch = front.rows.shape[0]
  score, leaves, broken, memory = _scored(
    kind, settings, k, last, front.stays, at_exit, front.memory
  )
  at = jnp.where(leaves, front.rows, batch)  # those who stay are written nowhere
  answer = Answer(
    answer.logits.at[at].set(at_exit, mode='drop'),
    answer.exit.at[at].set(k, mode='drop'),
    answer.score.at[at].set(score, mode='drop'),
    answer.rows.at[k].set(ran),
    answer.broken + broken,
  )
  return answer, front._replace(stays=front.stays & ~leaves, memory=memory)


def _scored(
  kind, settings: Settings, k: int, last: bool, stays, at_exit, memory
) -> tuple[jax.Array, jax.Array, jax.Array, confidence.Memory]:
  """Scores the logits of exit k: (scores, who leaves, how many are NaN, memory)."""
  if last:
    never = jnp.full(stays.shape, jnp.nan, jnp.float32)
    return never, stays, jnp.int32(0), memory
  weights = None if settings.weights is None else settings.weights[k]
  tempered = at_exit.astype(jnp.float32) / settings.temperatures[k]
  score, memory = confidence.score(kind, tempered, memory, weights)
  broken = jnp.sum(stays & jnp.isnan(score), dtype=jnp.int32)
  return score, stays & (score > settings.thresholds[k]), broken, memory


def _moved(front: _Front, crossed: list) -> _Front:
  """Moves the examples that are still there to the front."""
  order = jnp.argsort(~front.stays, stable=True).astype(jnp.int32)
  return _Front(
    rows=front.rows[order],
    stays=front.stays[order],
    order=order,
    crossed=crossed,
    memory=jax.tree.map(lambda x: x[order], front.memory),
  )


def logits(stages: Stages, name: str) -> jax.ShapeDtypeStruct:
  """Returns the shape and type of the logits of the example at an exit."""
  fn = lambda variables, *inputs: stages.fn(variables, *inputs)[name]
  return jax.eval_shape(fn, stages.variables, *stages.inputs)


def _taken(c: Crossing, x: jax.Array, rows: jax.Array) -> jax.Array:
  """Selects some examples of an array that crosses from stage to stage."""
  if c.axis is None:
    return x
  before, behind = c.shape[: c.axis], c.shape[c.axis :]  # behind[0] is of one example
  folded = jnp.take(x.reshape(*before, -1, *behind), rows, axis=c.axis)
  return folded.reshape(*before, -1, *behind[1:])


def _padded(x: jax.Array, size: int, axis: int = 0) -> jax.Array:
  """Appends zeros up to `size` along an axis."""
  widths = [(0, size - n if i == axis else 0) for i, n in enumerate(x.shape)]
  return jnp.pad(x, widths)
