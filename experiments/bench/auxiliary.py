"""What an auxiliary path costs while it helps to train, and that it leaves no trace.

ResNet-20 at 32x32x3 and SegNet of width 8 at 64x64x3, float32. One process, calls by
turns, medians of the ratios:

  training  a step of network and path over a plain one, beside the ratio of their FLOPs
  stripped  the network that lost its path over the same network built without, in
            evaluation, at batch 1 and at the batch of training

  python -m experiments.bench.auxiliary

About 6 minutes on 2 cores. Expected: training at most 1.1 times what the FLOPs say,
stripped within 10 % of one.
"""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import depthprune as dp
from depthprune.models.auxiliary_path import beside
from depthprune.models.heads import WithHeads
from depthprune.program.trace import runnable
from depthprune.run import result as results
from depthprune.storage import directory as record
from depthprune.timing import clock, latency
from depthprune.train import task as tasks
from depthprune.train.method import plain
from experiments.bench.gates import stepper

RESULTS = Path(__file__).parent / 'results'
# model: (side, batch, width of the path)
CASES = {'resnet20': (32, 128, 64), 'segnet8': (64, 16, 32)}
STRUCTURES = {'all': False, 'search': True}
SECONDS = 30


def case(name: str) -> dict[str, Any]:
  side, size, width = CASES[name]
  trunk = dp.models.build(name, classes=10)
  rng = np.random.default_rng(0)
  images = jnp.asarray(rng.normal(size=(size, side, side, 3)), jnp.float32)
  shape = (size,) if trunk.pool else (size, side, side)
  batch = {'image': images, 'label': jnp.asarray(rng.integers(0, 10, shape))}
  task = (tasks.classification if trunk.pool else tasks.segmentation)(10)
  found: dict[str, Any] = {'side': side, 'batch': size, 'width': width}
  for structure, search in STRUCTURES.items():
    fields = {'classes': 10, 'width': width, 'pool': trunk.pool}
    wide = WithHeads(trunk, {'aux': beside(trunk.taps, search, **fields)})
    found[structure] = compared(trunk, wide, task, images, batch)
  return found


def compared(trunk: Any, wide: Any, task: Any, images: Any, batch: Any) -> dict:
  alone = jax.jit(trunk.init)(jax.random.key(0), images[:1])
  variables = jax.jit(wide.init)(jax.random.key(0), images[:1])
  coupling = dp.couple(wide, variables, images[:1])
  method = dp.auxiliary(coupling, steps=10**6)
  calls = [
    stepper(trunk, alone, plain(), None, batch, task),
    stepper(wide, variables, method, coupling, batch, task),
  ]
  times = clock.interleave(calls, seconds=SECONDS, least=11, most=101)
  keep = method.decide({}, {}, lambda keep: None)
  pruned = dp.prune(wide, variables, keep, images[:1], coupling=coupling)
  bare = {k: v for k, v in alone.items() if k != 'branches'}  # folded in when cut
  stripped = latency.compare(
    latency.Network(runnable(trunk), bare),
    latency.Network(runnable(pruned.model), pruned.variables),
    images,
    batches=(1, len(images)),
    seconds=SECONDS,
  )
  flops = pruned.report['flops']
  said, ratio = flops['before'] / flops['after'], np.median(times[1] / times[0])
  return {
    'plain_ms': float(np.median(times[0])),
    'beside_ms': float(np.median(times[1])),
    'ratio': float(ratio),
    'flop_ratio': said,
    'over_flops': float(ratio / said),
    'turns': len(times[0]),
    'stripped_ms': latency.to_json(stripped),
  }


if __name__ == '__main__':
  rows = {name: case(name) for name in CASES}
  found = {'command': record.command(), **results.surroundings()}
  path = RESULTS / f'auxiliary_{jax.default_backend()}.json'
  record.write(path, {**found, 'models': rows})
  for name, row in rows.items():
    print(name, row)
