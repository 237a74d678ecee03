"""What gates cost while they train, and what the cut gains afterwards.

ResNet-20, 32x32x3, batch 128, float32. One process, calls by turns, medians:

  gating   a training step with gates and the FLOPs penalty, over a plain one
  speedup  the network before over after an L1 cut to half of its FLOPs, in evaluation,
           with any widths and with multiples of 8

  python -m experiments.bench.gates

About 2 minutes on 2 cores. Expected: gating at most 1.05; speedup below the FLOP ratio
of 2 (memory-bound layers and narrow channels do not shrink in proportion).
"""

import jax
import numpy as np

import depthprune as dp
from depthprune.timing import clock, latency
from depthprune.train.method import plain
from experiments.bench import measure

BATCH, SHAPE = 128, (32, 32, 3)


def gating(network: measure.Network, batch: dict[str, jax.Array]) -> dict:
  """Median milliseconds of both steps and the ratio of every pair of turns."""
  model, variables, coupling = network
  method = dp.trainable_gates(coupling, 0.5)
  calls = [
    measure.training_step(model, variables, plain(), None, batch),
    measure.training_step(model, variables, method, coupling, batch),
  ]
  without, gated = clock.interleave(calls, seconds=60, least=21, most=61)
  return {
    'plain_ms': float(np.median(without)),
    'gated_ms': float(np.median(gated)),
    **measure.ratio(gated, without),
    'turns': len(gated),
  }


def speedup(network: measure.Network, images: jax.Array, round_to: int) -> dict:
  """Measured latency before and after a cut to half of the FLOPs."""
  model, variables, coupling = network
  keep = dp.oneshot(coupling, variables, 0.5, round_to=round_to)
  pruned = dp.prune(model, variables, keep, images[:1], coupling=coupling)
  flops = pruned.report['flops']
  compared = latency.compare(
    latency.Network(lambda v, x: model.apply(v, x)['main'], variables),
    latency.Network(lambda v, x: pruned.apply(v, x)['main'], pruned.variables),
    images,
  )
  return {
    'flop_ratio': flops['before'] / flops['after'],
    'latency_ms': latency.to_json(compared),
  }


if __name__ == '__main__':
  batch = measure.random_batch(np.random.default_rng(0), (BATCH, *SHAPE), (BATCH,))
  images = batch['image']
  network = measure.initialised(dp.models.build('resnet20', classes=10), images)
  content = {
    'model': 'resnet20',
    'batch': BATCH,
    'shape': SHAPE,
    'gating': gating(network, batch),
    'speedup': {f'round_to_{n}': speedup(network, images, n) for n in (1, 8)},
  }
  measure.write('gates', content)
  print(content['gating'], content['speedup'])
