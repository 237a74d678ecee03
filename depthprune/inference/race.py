"""A cascade against its network alone: what early exits gain on the device at hand."""

import dataclasses
import time
from typing import Any, NamedTuple

import jax
import numpy as np

from depthprune.inference import latency
from depthprune.inference.cascade import Cascade, Cost
from depthprune.inference.latency import Timing


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
  fn, last = cascade.stages.fn, cascade.exits[-1]
  whole = jax.jit(lambda variables, *inputs: fn(variables, *inputs)[last])
  started = time.perf_counter()
  cascade.lower(*inputs).compile()
  compiled = time.perf_counter() - started
  answer = cascade(*inputs)
  calls = [lambda: cascade(*inputs), lambda: whole(cascade.variables, *inputs)]
  mine, other = map(latency.timing, latency.interleave(calls, seconds))
  batch = int(np.shape(inputs[0])[0])
  return Race(batch, cascade.cost(answer, *inputs), mine, other, compiled)


def exit_milliseconds(
  cascade: Cascade, *inputs: Any, seconds: float = 4.0
) -> np.ndarray:
  """Milliseconds of an example that leaves at each exit, float64 [exits], not falling.

  Measured on inputs [batch, ...] that all go as far, by turns, and divided by the
  batch: costs for `thresholds.for_budget` and `Cascade.within` in place of FLOPs.
  """
  inputs = jax.block_until_ready(jax.device_put(inputs))
  never = np.full_like(cascade.thresholds, np.inf)
  nobody = dataclasses.replace(cascade, thresholds=never)
  upto = lambda name: lambda: nobody(*inputs, last=name)
  taken = np.median(latency.interleave([*map(upto, cascade.exits)], seconds), axis=1)
  return np.maximum.accumulate(taken) / np.shape(inputs[0])[0]
