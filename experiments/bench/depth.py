"""A ResNet-110 with 54 heads, cut at 18, 36 and 54 blocks, beside networks built so.

CIFAR type, option A, 32x32x3, float32. For each depth the cut network and one of that
depth built from scratch (its head alone on that block) run by turns; their ratio should
be one, as they are the same program. FLOPs and time are also set against 54 blocks.

  python -m experiments.bench.depth

About 5 minutes on 2 cores. Expected: parameters 84,730, 414,362 and 1,727,962; ratio
of latencies within 10 % of one.
"""

from typing import Any

import jax

import depthprune as dp
from depthprune.models.heads import WithHeads, every_tap
from depthprune.program.modules import runnable
from depthprune.timing import latency
from experiments.bench import measure

BLOCKS, BATCHES = (18, 36, 54), (1, 128)


def cut(network: measure.Network, images: jax.Array, blocks: int) -> tuple[Any, Any]:
  """(cut network, network of that depth built from scratch)."""
  model, variables, coupling = network
  keep = {'exits': {e: i == blocks for i, e in enumerate(coupling.exits, 1)}}
  pruned = dp.prune(model, variables, keep, images[:1], coupling=coupling)
  (name,) = pruned.model.exits
  scratch = WithHeads(model.trunk, {name: model.heads[name]}, {'exit/main': 0})
  # A cut network has no branch gates: they are folded into its weights.
  init = jax.jit(scratch.init)(jax.random.key(1), images[:1])
  init = {k: v for k, v in init.items() if k != 'branches'}
  return pruned, latency.Network(runnable(scratch), init)


def row(pruned: Any, scratch: Any, images: jax.Array) -> dict[str, Any]:
  """What one depth costs, and both networks by turns."""
  small = latency.Network(runnable(pruned.model), pruned.variables)
  timed = latency.compare(scratch, small, images, batches=BATCHES, seconds=20)
  return {
    'params': dp.cost.params(dp.couple(*small, images[:1])),
    'flops': pruned.report['flops']['after'],
    'latency_ms': latency.to_json(timed),
    'compile_s': latency.compile_seconds(small, images),
  }


if __name__ == '__main__':
  images = measure.random_images(128, 32, 32, 3)
  model = every_tap(dp.models.build('resnet110', classes=10))
  network = measure.initialised(model, images)
  rows = {}
  for blocks in BLOCKS:
    rows[str(blocks)] = row(*cut(network, images, blocks), images)
    print(blocks, {k: v for k, v in rows[str(blocks)].items() if k != 'latency_ms'})
  for each in rows.values():
    each['flop_ratio'] = rows['54']['flops'] / each['flops']
  measure.write('depth', {'model': 'resnet110', 'blocks': rows})
