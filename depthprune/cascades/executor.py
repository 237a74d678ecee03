"""The inside of a cascade: early exit for a batch in one program of static shapes.

  run stage 1 on the whole batch; who is sure enough leaves; the others move to the
  front; the next stage runs on the smallest of a few static sizes that holds them
  (`lax.switch`); and so on. Answers are written back where their examples stood.

Sizes are steps of an eighth of the batch, so padding costs at most that. `vmap` of
`lax.cond` is no way to do it: it computes both sides for everybody.

Source: design.md, "Cascades".
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.export import is_symbolic_dim

from depthprune.cascades import confidence as sure
from depthprune.program.stages import Crossing, Stages


class Answer(NamedTuple):
  """What a cascade says of a batch.

  Attributes:
    logits: [batch, classes], of the exit where each example left.
    exit: int32 [batch], which of `cascade.exits` that was.
    score: float32 [batch], how sure it was; NaN where it could not tell.
    rows: int32 [stages], examples that every stage ran on, padding included.
    broken: int32, how often a confidence was NaN; such an example goes on.
  """

  logits: jax.Array
  exit: jax.Array
  score: jax.Array
  rows: jax.Array
  broken: jax.Array


class Settings(NamedTuple):
  """What may change without compiling again; see `Cascade`."""

  thresholds: jax.Array
  temperatures: jax.Array
  weights: jax.Array | None


def sizes(batch: Any, steps: int, least: int = 1) -> tuple[Any, ...]:
  """0, ... batch in `steps` steps, each size once; none between 0 and `least`.

  Of a symbolic batch they are symbolic, and those that may be equal all stay.
  """
  if is_symbolic_dim(batch):
    return (0, *(-(-batch * i // steps) for i in range(1, steps)), batch)
  found = {-(-batch * i // steps) for i in range(1, steps + 1)}
  return tuple(sorted({0, *(max(size, least) for size in found if size)}))


def _few(batch: Any, least: int) -> bool:
  """What is traced for a symbolic batch takes one example for several."""
  return not is_symbolic_dim(batch) and 0 < batch < least


def _alone(stages: Stages, kind, steps, variables, settings, inputs, end) -> Answer:
  """One example, where stages need more: it goes in several times."""
  more = [jnp.repeat(x, stages.least, 0) for x in inputs]
  answer = run(stages, kind, steps, variables, settings, more, end)
  of_one = ('logits', 'exit', 'score')
  broken = answer.broken // stages.least
  return answer._replace(
    broken=broken, **{name: getattr(answer, name)[:1] for name in of_one}
  )


class _Front(NamedTuple):
  """Those who are still there: the first `alive` of `rows`, and what they carry."""

  rows: jax.Array
  alive: jax.Array
  order: jax.Array
  crossed: list
  memory: sure.Memory


def run(
  stages: Stages, kind, steps: int, variables, settings: Settings, inputs, end: int
) -> Answer:
  """The answers of the first `end` exits, for a batch as large as its inputs.

  It may be symbolic, as `jax.export` has it, if the stages trace that too."""
  batch = inputs[0].shape[0]
  stages = stages.again(*inputs)
  several = sizes(batch, steps, stages.least)
  if _few(batch, stages.least):
    return _alone(stages, kind, steps, variables, settings, inputs, end)
  programs = {size: stages.runs(size) for size in several if size}
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
  front = _Front(every, jnp.int32(batch), every, list(inputs), sure.start(batch))
  for k in range(end):
    if k == 0:
      said, crossed = programs[batch][0](variables, inputs)
      ran = jnp.int32(batch)
    else:
      tail = functools.partial(_tail, stages, programs, variables, k, batch)
      ran, said, crossed = tail(several, front)
    front = front._replace(crossed=crossed)
    answer, front = _leave(kind, settings, k, k + 1 == end, answer, front, said, ran)
  return answer


def _tail(stages, programs, variables, k: int, batch: int, several, front: _Front):
  """(size, logits, crossed) of stage k on the smallest size that holds those alive;
  all padded to the batch."""
  before = stages[k - 1].crossing

  def on(size: int):
    def run(order, crossed):
      part = [_taken(c, x, order[:size]) for c, x in zip(before, crossed, strict=True)]
      said, after = programs[size][k](variables, part)
      after = [
        _padded(c, x, batch) for c, x in zip(stages[k].crossing, after, strict=True)
      ]
      return _rows(said, batch), after

    return run

  def nobody(order, crossed):
    shapes = jax.eval_shape(on(batch), order, crossed)
    return jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)

  chosen = jnp.sum(jnp.asarray(several, jnp.int32) < front.alive, dtype=jnp.int32)
  branches = [on(size) if size else nobody for size in several]
  said, crossed = jax.lax.switch(chosen, branches, front.order, front.crossed)
  return jnp.asarray(several, jnp.int32)[chosen], said, crossed


def _leave(kind, settings: Settings, k, last: bool, answer: Answer, front, said, ran):
  """Who is sure enough at exit k has an answer; the others move to the front."""
  batch = front.rows.shape[0]
  alive = jnp.arange(batch) < front.alive
  if last:
    score, memory = jnp.full(batch, jnp.nan, jnp.float32), front.memory
    leaves = alive
  else:
    weights = None if settings.weights is None else settings.weights[k]
    tempered = said.astype(jnp.float32) / settings.temperatures[k]
    score, memory = sure.score(kind, tempered, front.memory, weights)
    leaves = alive & (score > settings.thresholds[k])
  broken = jnp.sum(alive & jnp.isnan(score), dtype=jnp.int32)
  at = jnp.where(leaves, front.rows, batch)  # nowhere for those who stay
  answer = Answer(
    answer.logits.at[at].set(said, mode='drop'),
    answer.exit.at[at].set(k, mode='drop'),
    answer.score.at[at].set(score, mode='drop'),
    answer.rows.at[k].set(ran),
    answer.broken + (0 if last else broken),
  )
  stays = alive & ~leaves
  order = jnp.argsort(~stays, stable=True).astype(jnp.int32)
  memory = jax.tree.map(lambda x: x[order], memory)
  front = front._replace(
    rows=front.rows[order],
    alive=jnp.sum(stays, dtype=jnp.int32),
    order=order,
    memory=memory,
  )
  return answer, front


def logits(stages: Stages, name: str) -> jax.ShapeDtypeStruct:
  """Of one example at an exit, abstract."""
  fn = lambda variables, *inputs: stages.fn(variables, *inputs)[name]
  return jax.eval_shape(fn, stages.variables, *stages.inputs)


def _taken(c: Crossing, x: jax.Array, rows: jax.Array) -> jax.Array:
  """What crosses, of some examples."""
  if c.axis is None:
    return x
  before, behind = c.shape[: c.axis], c.shape[c.axis :]  # behind[0]: of one example
  folded = jnp.take(x.reshape(*before, -1, *behind), rows, axis=c.axis)
  return folded.reshape(*before, -1, *behind[1:])


def _padded(c: Crossing, x: jax.Array, batch: int) -> jax.Array:
  if c.axis is None:
    return x
  return _rows(x, batch * c.shape[c.axis], c.axis)


def _rows(x: jax.Array, size: int, axis: int = 0) -> jax.Array:
  """x with zeros behind, up to `size` along an axis."""
  widths = [(0, size - n if i == axis else 0) for i, n in enumerate(x.shape)]
  return jnp.pad(x, widths)
