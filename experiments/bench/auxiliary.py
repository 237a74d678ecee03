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

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

import depthprune as dp
from depthprune.models.auxiliary_path import beside
from depthprune.models.heads import WithHeads
from depthprune.program.modules import runnable
from depthprune.timing import clock, latency
from depthprune.train import task as tasks
from depthprune.train.method import plain
from experiments.bench import measure

# model: (side, batch, width of the path)
CASES = {'resnet20': (32, 128, 64), 'segnet8': (64, 16, 32)}
STRUCTURES = {'all': False, 'search': True}
SECONDS = 30


def case(name: str) -> dict[str, Any]:
  """The rows of one network, beside what it was measured on."""
  side, size, width = CASES[name]
  trunk = dp.models.build(name, classes=10)
  labels = (size,) if trunk.pool else (size, side, side)
  rng = np.random.default_rng(0)
  batch = measure.random_batch(rng, (size, side, side, 3), labels)
  task = (tasks.classification if trunk.pool else tasks.segmentation)(10)
  content: dict[str, Any] = {'side': side, 'batch': size, 'width': width}
  for structure, search in STRUCTURES.items():
    fields = {'classes': 10, 'width': width, 'pool': trunk.pool}
    wide = WithHeads(trunk, {'aux': beside(trunk.taps, search, **fields)})
    content[structure] = compared(trunk, wide, task, batch)
  return content


def compared(
  trunk: Any, wide: Any, task: Any, batch: Mapping[str, jax.Array]
) -> dict[str, Any]:
  """A step of `wide` over one of `trunk`, and both without the path in evaluation."""
  images = batch['image']
  alone = jax.jit(trunk.init)(jax.random.key(0), images[:1])
  _, variables, coupling = measure.initialised(wide, images)
  method = dp.auxiliary(coupling, steps=10**6)
  calls = [
    measure.training_step(trunk, alone, plain(), None, batch, task),
    measure.training_step(wide, variables, method, coupling, batch, task),
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
  expected, ratio = flops['before'] / flops['after'], np.median(times[1] / times[0])
  return {
    'plain_ms': float(np.median(times[0])),
    'beside_ms': float(np.median(times[1])),
    'ratio': float(ratio),
    'flop_ratio': expected,
    'over_flops': float(ratio / expected),
    'turns': len(times[0]),
    'stripped_ms': latency.to_json(stripped),
  }


if __name__ == '__main__':
  rows = {name: case(name) for name in CASES}
  measure.write(f'auxiliary_{jax.default_backend()}', {'models': rows})
  for name, row in rows.items():
    print(name, row)
