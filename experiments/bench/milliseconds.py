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
from typing import Any

import jax
import numpy as np

import depthprune as dp
from depthprune.program import cost
from depthprune.timing import clock
from experiments.bench import measure

BATCH = 32
MODELS = {'resnet20': 32, 'vgg11': 32, 'mobilenet_v2': 32}  # side of the images
TARGETS = (0.85, 0.75, 0.65)
ROUND_TO = (1, 8)
SECONDS = 20


def case(name: str, side: int) -> dict[str, Any]:
  """Every cut of one network: what was asked for, foreseen and reached."""
  images = measure.random_images(BATCH, side, side, 3)
  network = measure.initialised(dp.models.build(name, classes=10), images)
  model, variables, coupling = network
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
    part = measure.ratio(taken, times[0])
    row |= {'reached': part['ratio'], 'quartiles': part['quartiles']}
  whole = {'side': side, 'whole_ms': float(np.median(times[0])), 'turns': len(times[0])}
  return {**whole, 'rows': rows}


def caller(apply: Any, variables: Any, images: jax.Array):
  """A function without arguments that does the next evaluation."""
  run = jax.jit(lambda v, x: apply(v, x)['main'])
  return lambda: run(variables, images)


if __name__ == '__main__':
  models = {name: case(name, side) for name, side in MODELS.items()}
  content = {'batch': BATCH, 'models': models}
  measure.write(f'milliseconds_{jax.default_backend()}', content)
  for name, row in models.items():
    print(name, row)
