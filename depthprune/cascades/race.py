"""Times a cascade against its network alone on the device at hand."""

import dataclasses
import functools
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from depthprune.cascades.cascade import Cascade, CascadeCost
from depthprune.program import arguments
from depthprune.timing import clock, compilation, latency
from depthprune.timing.latency import Timing

PARTS = 8  # batches of another size than that of the inputs
NOISE = 0.02  # of two ways nearly as fast the one that skips more is taken
SLOWER = 1.05  # a cascade may take so much longer than its network alone


class Race(NamedTuple):
  """Times of a cascade and of its network alone, measured in turns on one batch.

  Attributes:
    batch: number of examples.
    cost: mean FLOPs per example.
    cascade: milliseconds of the cascade for the batch.
    whole: milliseconds of the network alone for the batch.
    faster: number of turns in which the cascade was faster.
    compile_s: seconds to trace and compile the cascade for this batch size.
  """

  batch: int
  cost: CascadeCost
  cascade: Timing
  whole: Timing
  faster: int
  compile_s: float

  @property
  def share(self) -> float:
    """The time of the cascade divided by that of the network."""
    return self.cascade.median / self.whole.median

  def to_json(self) -> dict[str, Any]:
    """Returns plain numbers by name; times are in milliseconds."""
    return {
      'batch': self.batch,
      'ideal': self.cost.ideal,
      'padded': self.cost.padded,
      'ms': self.cascade.median,
      'whole_ms': self.whole.median,
      'speedup': 1 / self.share,
      'compile_s': self.compile_s,
      'ms_quartiles': [self.cascade.lower, self.cascade.upper],
      'whole_ms_quartiles': [self.whole.lower, self.whole.upper],
      'runs': self.cascade.runs,
      'faster': self.faster,
    }


def race(
  cascade: Cascade, *inputs: Any, seconds: float = 4.0, batch: int | None = None
) -> Race:
  """Measures a cascade and its network alone on one batch, or several of another size.

  Args:
    cascade: the cascade.
    *inputs: arrays [n, ...], moved to the device before the measurement.
    seconds: time to spend on the measurement.
    batch: size of the batches into which the inputs are cut, n by default. Of single
      examples a few are taken, which leave at the exits as all of them do; times and
      costs are means over the batches.
  """
  parts = typical_batches(cascade, inputs, batch)
  whole = _alone(cascade)
  started = time.perf_counter()
  lowered = cascade.lower(*parts[0])
  traced = time.perf_counter() - started
  compiled = traced + compilation.compile_seconds(lowered)
  costs = [cascade.cost(cascade(*part), *part) for part in parts]
  alone = functools.partial(whole, cascade.variables)
  calls = [_all(cascade, parts), _all(alone, parts)]
  turns = clock.interleave(calls, seconds) / len(parts)
  with_exits, without = map(latency.timing, turns)
  return Race(
    batch=cascade.stages.examples(parts[0]),
    cost=CascadeCost(*np.mean(costs, axis=0).tolist()),
    cascade=with_exits,
    whole=without,
    faster=int(np.sum(turns[0] < turns[1])),
    compile_s=compiled,
  )


def merge(
  cascade: Cascade, *inputs: Any, seconds: float = 4.0, batch: int | None = None
) -> Cascade:
  """Finds by measurement where a batch of a size should skip nothing behind an exit.

  A stage that is skipped saves its time, but whether to skip it takes time, too: on an
  accelerator the host decides it, and a small network is mostly launches. Behind the
  exits that save less than that, the next stage is part of the same program. Examples
  still leave at these exits, with the same answers; they only save nothing. Where even
  so the cascade takes over 5 % longer than its network, no exit is used, and the
  network alone answers.

  Args:
    cascade: the cascade, with its thresholds.
    *inputs: arrays [n, ...] of typical examples.
    seconds: time to spend on the measurement, compilation not counted.
    batch: the size of batch to measure, n by default; others stay as they are.

  Returns:
    The cascade with `merged[batch]`, which is empty if it is faster to skip, and None
    if the network alone answers.
  """
  parts = typical_batches(cascade, inputs, batch)
  size, early = cascade.stages.examples(parts[0]), cascade.exits[:-1]
  merging = lambda exits: dataclasses.replace(
    cascade, merged={**cascade.merged, size: exits}
  )
  left = np.concatenate([np.asarray(cascade(*part).exit) for part in parts])
  calls = [_leaving_at(merging(()), k, parts[0]) for k in range(len(early) + 1)]
  calls.append(_all(merging(early), parts[:1]))
  *upto, joined = np.median(clock.interleave(calls, seconds / 2), axis=1)
  branch = (upto[-1] - joined) / len(early)  # what it takes to decide
  saved = [(left <= k).mean() * (upto[k + 1] - upto[k]) for k in range(len(early))]
  chosen = tuple(e for e, ms in zip(early, saved, strict=True) if ms < branch)
  plans = list(dict.fromkeys([(), chosen, early]))
  calls = [_all(merging(plan), parts) for plan in [*plans, None]]
  *taken, alone = np.median(clock.interleave(calls, seconds / 2), axis=1)
  best = next(p for p, ms in zip(plans, taken) if ms <= min(taken) * (1 + NOISE))
  return merging(best if min(taken) <= alone * SLOWER else None)


def typical_batches(
  cascade: Cascade, inputs: tuple, batch: int | None = None
) -> list[tuple]:
  """Cuts some batches of a size out of typical examples, and moves them to the device.

  Single examples are chosen evenly among all, sorted by the exit at which they leave.

  Raises:
    ValueError: there are fewer examples than one batch.
  """
  arrays, tree = jax.tree.flatten(inputs)
  counts, n = cascade.stages.counts, cascade.stages.examples(inputs)
  batch = int(n) if batch is None else batch
  arguments.whole('batch', batch)
  if batch > n:
    raise ValueError(f'batch: expected at most the {n} examples there are, got {batch}')
  many = min(PARTS, n // batch)
  rows = np.arange(n)
  if batch == 1 < n:
    rows = np.argsort(np.asarray(cascade(*inputs).exit), kind='stable')
    rows = rows[(2 * np.arange(many) + 1) * n // (2 * many)]
  parts = []
  for part in rows[: many * batch].reshape(many, batch):
    cut = [x[part] if c else x for x, c in zip(arrays, counts, strict=True)]
    parts.append(jax.tree.unflatten(tree, cut))
  return jax.block_until_ready(jax.device_put(parts))


def _all(call: Callable, parts: Sequence[tuple]) -> Callable[[], None]:
  """Returns a function that answers batches one after another, as they come in."""

  def answer() -> None:
    for part in parts:
      jax.block_until_ready(call(*part))

  return answer


def _leaving_at(cascade: Cascade, k: int, part: tuple) -> Callable[[], Any]:
  """Returns a function that lets a batch leave at exit k; all have one program."""
  limits = np.full_like(cascade.thresholds, np.inf)
  limits[k:] = -np.inf
  there = dataclasses.replace(cascade, thresholds=limits)
  return lambda: there(*part)


def exit_milliseconds(
  cascade: Cascade, *inputs: Any, seconds: float = 4.0
) -> tuple[np.ndarray, float]:
  """Measures the time of an example that leaves at each exit.

  The whole batch goes to the same exit; its time is divided by its size. The results
  can replace FLOPs as `cost` and `whole` of `Predictions`, and as the cost in
  `Cascade.within`.

  Args:
    cascade: the cascade.
    *inputs: arrays [batch, ...].
    seconds: time to spend on the measurement.

  Returns:
    Milliseconds per example for every exit, float64 [exits], increasing; and for the
    network alone.
  """
  inputs = jax.block_until_ready(jax.device_put(inputs))
  never = np.full_like(cascade.thresholds, np.inf)
  closed = dataclasses.replace(cascade, thresholds=never)
  upto = lambda name: lambda: closed(*inputs, last=name)
  alone = _alone(cascade)
  calls = [*map(upto, cascade.exits), lambda: alone(cascade.variables, *inputs)]
  taken = np.median(clock.interleave(calls, seconds), axis=1)
  *exits, whole = taken / np.shape(inputs[0])[0]
  # Costs must increase from exit to exit, even if the clock sees no difference.
  rising = np.maximum.accumulate(exits) * (1 + 1e-6 * np.arange(len(exits)))
  return rising, min(float(whole), float(rising[-1]))


def _alone(cascade: Cascade) -> Callable[..., jax.Array]:
  """Compiles (variables, *inputs) -> logits of the network without other exits."""
  fn, last = cascade.stages.fn, cascade.exits[-1]
  return jax.jit(lambda variables, *inputs: fn(variables, *inputs)[last])
