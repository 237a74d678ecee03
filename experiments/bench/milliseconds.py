"""Milliseconds as a target: the time that was asked for, foreseen and reached.

L1 cuts to parts of the time on this device, and to the same parts of the FLOPs beside
them. Batch 32, float32, one process. The network and all that is cut of it take turns;
times are medians over that of the whole network in the same turns.

  python -m experiments.bench.milliseconds

About 10 minutes on 2 cores. Expected: what is reached lies within 5 % of the whole
network's time of what was asked for, where a cut to FLOPs misses by more.
"""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import depthprune as dp
from depthprune.program import clock, cost
from depthprune.training import record, results

RESULTS = Path(__file__).parent / 'results'
BATCH = 32
MODELS = {'resnet20': 32, 'vgg11': 32, 'mobilenet_v2': 32}  # side of the images
TARGETS = (0.8, 0.65, 0.5)
SECONDS = 20


def case(name: str, side: int) -> dict[str, Any]:
  model = dp.models.build(name, classes=10)
  draw = np.random.default_rng(0).normal(size=(BATCH, side, side, 3))
  images = jnp.asarray(draw, jnp.float32)
  variables = jax.jit(model.init)(jax.random.key(0), images[:1])
  coupling = dp.couple(model, variables, images[:1])
  time = dp.milliseconds(coupling, batch=BATCH)
  costs = {'milliseconds': time, 'flops': cost.flops}
  rows, calls = [], [caller(model.apply, variables, images)]
  for target in TARGETS:
    for of, asked in costs.items():
      keep = dp.oneshot(coupling, variables, target, of=asked)
      pruned = dp.prune(model, variables, keep, images[:1], coupling=coupling)
      part = {kind: C(coupling, keep) / C(coupling) for kind, C in costs.items()}
      rows.append({'asked': target, 'of': of, 'foreseen': part})
      calls.append(caller(pruned.apply, pruned.variables, images))
  times = clock.interleave(calls, seconds=SECONDS, least=15)
  for row, taken in zip(rows, times[1:], strict=True):
    lower, reached, upper = np.percentile(taken / times[0], (25, 50, 75))
    row |= {'reached': float(reached), 'quartiles': [float(lower), float(upper)]}
  whole = {'side': side, 'whole_ms': float(np.median(times[0])), 'turns': len(times[0])}
  return {**whole, 'rows': rows}


def caller(apply: Any, variables: Any, images: jax.Array):
  run = jax.jit(lambda v, x: apply(v, x)['main'])
  return lambda: run(variables, images)


if __name__ == '__main__':
  found = {name: case(name, side) for name, side in MODELS.items()}
  content = {'command': record.command(), **results.surroundings(), 'batch': BATCH}
  path = RESULTS / f'milliseconds_{jax.default_backend()}.json'
  record.write(path, {**content, 'models': found})
  for name, row in found.items():
    print(name, row)
