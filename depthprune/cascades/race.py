"""Times a cascade against its network alone on the device at hand."""

import dataclasses
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

from depthprune.cascades.cascade import Cascade, CascadeCost
from depthprune.timing import clock, compilation, latency
from depthprune.timing.latency import Timing


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


def race(cascade: Cascade, *inputs: Any, seconds: float = 4.0) -> Race:
  """Measures a cascade and its network alone on one batch.

  Args:
    cascade: the cascade.
    *inputs: arrays [batch, ...], moved to the device before the measurement.
    seconds: time to spend on the measurement.
  """
  inputs = jax.block_until_ready(jax.device_put(inputs))
  whole = _alone(cascade)
  started = time.perf_counter()
  lowered = cascade.lower(*inputs)
  traced = time.perf_counter() - started
  compiled = traced + compilation.compile_seconds(lowered)
  answer = cascade(*inputs)
  calls = [lambda: cascade(*inputs), lambda: whole(cascade.variables, *inputs)]
  taken = clock.interleave(calls, seconds)
  with_exits, without = map(latency.timing, taken)
  return Race(
    batch=int(np.shape(inputs[0])[0]),
    cost=cascade.cost(answer, *inputs),
    cascade=with_exits,
    whole=without,
    faster=int(np.sum(taken[0] < taken[1])),
    compile_s=compiled,
  )


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
