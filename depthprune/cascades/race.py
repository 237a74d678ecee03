"""A cascade against its network alone: what early exits gain on the device at hand."""

import dataclasses
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

from depthprune.cascades.cascade import Cascade, Cost
from depthprune.timing import clock, latency
from depthprune.timing.latency import Timing


class Race(NamedTuple):
  """One batch, by the cascade and by the network alone, in turns.

  Attributes:
    batch: examples. cost: FLOPs of one of them in the mean.
    cascade, whole: milliseconds of the batch. compile_s: seconds to compile the
      cascade for this batch size, tracing included.
  """

  batch: int
  cost: Cost
  cascade: Timing
  whole: Timing
  compile_s: float

  @property
  def share(self) -> float:
    """Time of the cascade as a part of that of the network."""
    return self.cascade.median / self.whole.median

  def to_json(self) -> dict[str, Any]:
    """Plain numbers; times in milliseconds."""
    quartiles = lambda t: [t.lower, t.upper]
    return {
      'batch': self.batch,
      'ideal': self.cost.ideal,
      'padded': self.cost.padded,
      'ms': self.cascade.median,
      'whole_ms': self.whole.median,
      'speedup': 1 / self.share,
      'compile_s': self.compile_s,
      'ms_quartiles': quartiles(self.cascade),
      'whole_ms_quartiles': quartiles(self.whole),
      'runs': self.cascade.runs,
    }


def race(cascade: Cascade, *inputs: Any, seconds: float = 4.0) -> Race:
  """Measures both on inputs [batch, ...], which are on the device before."""
  inputs = jax.block_until_ready(jax.device_put(inputs))
  whole = _alone(cascade)
  started = time.perf_counter()
  cascade.lower(*inputs).compile()
  compiled = time.perf_counter() - started
  answer = cascade(*inputs)
  calls = [lambda: cascade(*inputs), lambda: whole(cascade.variables, *inputs)]
  mine, other = map(latency.timing, clock.interleave(calls, seconds))
  batch = int(np.shape(inputs[0])[0])
  return Race(batch, cascade.cost(answer, *inputs), mine, other, compiled)


def exit_milliseconds(
  cascade: Cascade, *inputs: Any, seconds: float = 4.0
) -> tuple[np.ndarray, float]:
  """Milliseconds of an example: float64 [exits], rising, and of the network alone.

  Measured on inputs [batch, ...] that all go as far, by turns, and divided by the
  batch: the `cost` and `whole` of `Predictions`, and the cost of `Cascade.within`, in
  place of FLOPs.
  """
  inputs = jax.block_until_ready(jax.device_put(inputs))
  never = np.full_like(cascade.thresholds, np.inf)
  nobody = dataclasses.replace(cascade, thresholds=never)
  upto = lambda name: lambda: nobody(*inputs, last=name)
  alone = _alone(cascade)
  calls = [*map(upto, cascade.exits), lambda: alone(cascade.variables, *inputs)]
  taken = np.median(clock.interleave(calls, seconds), axis=1)
  *exits, whole = taken / np.shape(inputs[0])[0]
  # An exit is later than the one before, also where the clock cannot tell.
  rising = np.maximum.accumulate(exits) * (1 + 1e-6 * np.arange(len(exits)))
  return rising, min(float(whole), float(rising[-1]))


def _alone(cascade: Cascade) -> Callable[..., jax.Array]:
  """(variables, *inputs) -> logits of the network without its other exits."""
  fn, last = cascade.stages.fn, cascade.exits[-1]
  return jax.jit(lambda variables, *inputs: fn(variables, *inputs)[last])
