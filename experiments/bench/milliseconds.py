"""Milliseconds as a target: the time that was asked for, foreseen and reached.

L1 cuts to parts of the time on this device, and to the same parts of the FLOPs beside
them, with any widths and with multiples of 8. Batch 32, float32, one process. The
network and all that is cut of it take turns; times are medians over that of the whole
network in the same turns.

  python -m experiments.bench.milliseconds

About 10 minutes on 2 cores. Expected: what is reached is near what was asked for, or
below it, where a cut to FLOPs misses by more; nearest with multiples of 8.
"""

import itertools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import depthprune as dp
from depthprune.program import cost
from depthprune.run import result as results
from depthprune.storage import directory as record
from depthprune.timing import clock

RESULTS = Path(__file__).parent / 'results'
BATCH = 32
MODELS = {'resnet20': 32, 'vgg11': 32, 'mobilenet_v2': 32}  # side of the images
TARGETS = (0.85, 0.75, 0.65)
ROUND_TO = (1, 8)
SECONDS = 20


def case(name: str, side: int) -> dict[str, Any]:
  model = dp.models.build(name, classes=10)
  draw = np.random.default_rng(0).normal(size=(BATCH, side, side, 3))
  images = jnp.asarray(draw, jnp.float32)
  variables = jax.jit(model.init)(jax.random.key(0), images[:1])
  coupling = dp.couple(model, variables, images[:1])
  rows, calls = [], [caller(model.apply, variables, images)]
  for n in ROUND_TO:
    time = dp.milliseconds(coupling, batch=BATCH, round_to=n)
    costs = {'milliseconds': time, 'flops': cost.flops}
    for target, (of, asked) in itertools.product(TARGETS, costs.items()):
      keep = dp.oneshot(coupling, variables, target, of=asked, round_to=n)
      pruned = dp.prune(model, variables, keep, images[:1], coupling=coupling)
      part = {kind: C(coupling, keep) / C(coupling) for kind, C in costs.items()}
      rows.append({'asked': target, 'of': of, 'round_to': n, 'foreseen': part})
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
