"""Runs a cascade: early exit for a batch in one program of static shapes.

The first stage runs on the whole batch. Examples that are confident enough leave, the
others move to the front, and the next stage runs on the smallest of a few static sizes
that holds them (`lax.switch`), and so on. Answers are written back to the places of
their examples. Sizes are steps of an eighth of the batch, so padding costs at most
that. `vmap` of `lax.cond` would not do: it computes both sides for every example.
"""

from __future__ import annotations

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
      included.
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
  """The examples that are still there: the first `alive` ones."""

  rows: jax.Array  # int32 [batch], their places in the batch
  alive: jax.Array  # int32
  order: jax.Array  # int32 [batch], their places in the arrays of the stage before
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
  stages: Stages, kind, steps: int, variables, settings: Settings, inputs, end: int
) -> Answer:
  """Answers inputs [batch, ...] at the first `end` exits.

  `kind` is the confidence, and `steps` the number of static sizes. The batch may be
  symbolic, as for `jax.export`, if the stages can be traced with it.
  """
  arrays = jax.tree.leaves(inputs)
  batch = arrays[stages.counts.index(True)].shape[0]
  stages = stages.again(*inputs)
  if not is_symbolic_dim(batch) and 0 < batch < stages.least:
    return _run_one(stages, kind, steps, variables, settings, inputs, end)
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
  front = _Front(every, jnp.int32(batch), every, arrays, memory)
  for k in range(end):
    if k == 0:
      at_exit, crossed = programs[batch][0](variables, arrays)
      ran = jnp.int32(batch)
    else:
      ran, at_exit, crossed = _run_stage(
        stages, programs, variables, k, batch, static, front
      )
    front = front._replace(crossed=crossed)
    answer, front = _leave(kind, settings, k, k + 1 == end, answer, front, at_exit, ran)
  return answer


def _run_one(stages: Stages, kind, steps, variables, settings, inputs, end) -> Answer:
  """Repeats a single example, for stages that run only on several."""
  arrays, tree = jax.tree.flatten(inputs)
  both = zip(arrays, stages.counts, strict=True)
  repeated = [jnp.repeat(x, stages.least, 0) if c else x for x, c in both]
  repeated = jax.tree.unflatten(tree, repeated)
  answer = run(stages, kind, steps, variables, settings, repeated, end)
  return answer._replace(
    logits=answer.logits[:1],
    exit=answer.exit[:1],
    score=answer.score[:1],
    broken=answer.broken // stages.least,
  )


def _run_stage(stages, programs, variables, k: int, batch: Any, static, front: _Front):
  """Runs stage k on the smallest size that holds the examples that are still there.

  Returns that size, and the logits and crossing arrays, padded to the batch.
  """
  before = stages[k - 1].crossing

  def on(size: int):
    def run(order, crossed):
      part = [_taken(c, x, order[:size]) for c, x in zip(before, crossed, strict=True)]
      at_exit, after = programs[size][k](variables, part)
      after = [
        x if c.axis is None else _padded(x, batch * c.shape[c.axis], c.axis)
        for c, x in zip(stages[k].crossing, after, strict=True)
      ]
      return _padded(at_exit, batch), after

    return run

  def on_none(order, crossed):
    shapes = jax.eval_shape(on(batch), order, crossed)
    return jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)

  chosen = jnp.sum(jnp.asarray(static, jnp.int32) < front.alive, dtype=jnp.int32)
  branches = [on(size) if size else on_none for size in static]
  at_exit, crossed = jax.lax.switch(chosen, branches, front.order, front.crossed)
  return jnp.asarray(static, jnp.int32)[chosen], at_exit, crossed


def _leave(
  kind, settings: Settings, k: int, last: bool, answer: Answer, front, at_exit, ran
):
  """Answers the examples that leave at exit k, and moves the others to the front."""
  batch = front.rows.shape[0]
  alive = jnp.arange(batch) < front.alive
  if last:
    score, memory = jnp.full(batch, jnp.nan, jnp.float32), front.memory
    leaves = alive
  else:
    weights = None if settings.weights is None else settings.weights[k]
    tempered = at_exit.astype(jnp.float32) / settings.temperatures[k]
    score, memory = confidence.score(kind, tempered, front.memory, weights)
    leaves = alive & (score > settings.thresholds[k])
  broken = jnp.sum(alive & jnp.isnan(score), dtype=jnp.int32)
  at = jnp.where(leaves, front.rows, batch)  # those who stay are written nowhere
  answer = Answer(
    answer.logits.at[at].set(at_exit, mode='drop'),
    answer.exit.at[at].set(k, mode='drop'),
    answer.score.at[at].set(score, mode='drop'),
    answer.rows.at[k].set(ran),
    answer.broken + (0 if last else broken),
  )
  stays = alive & ~leaves
  order = jnp.argsort(~stays, stable=True).astype(jnp.int32)
  front = front._replace(
    rows=front.rows[order],
    alive=jnp.sum(stays, dtype=jnp.int32),
    order=order,
    memory=jax.tree.map(lambda x: x[order], memory),
  )
  return answer, front


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
