"""A ResNet-110 with 54 heads, cut at 18, 36 and 54 blocks, beside networks built so.

CIFAR type, option A, 32x32x3, float32. For each depth the cut network and one of that
depth built from scratch (its head alone on that block) run by turns; their ratio should
be one, as they are the same program. FLOPs and time are also set against 54 blocks.

  python -m experiments.bench.depth

About 5 minutes on 2 cores. Expected: parameters 84,730, 414,362 and 1,727,962; ratio
of latencies within 10 % of one.
"""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import depthprune as dp
from depthprune.models.heads import WithHeads, every_tap
from depthprune.program.trace import runnable
from depthprune.run import result as results
from depthprune.storage import directory as record
from depthprune.timing import latency

RESULT = Path(__file__).parent / 'results' / 'depth.json'
BLOCKS, BATCHES = (18, 36, 54), (1, 128)


def cut(model, variables, coupling, images, blocks: int) -> tuple[Any, Any]:
  """(cut network, network of that depth built from scratch)."""
  keep = {'exits': {e: i == blocks for i, e in enumerate(coupling.exits, 1)}}
  pruned = dp.prune(model, variables, keep, images[:1], coupling=coupling)
  (name,) = pruned.model.exits
  scratch = WithHeads(model.trunk, {name: model.heads[name]}, {'exit/main': 0})
  # A cut network has no branch gates: they are folded into its weights.
  init = jax.jit(scratch.init)(jax.random.key(1), images[:1])
  init = {k: v for k, v in init.items() if k != 'branches'}
  return pruned, latency.Network(runnable(scratch), init)


def row(pruned, scratch, images) -> dict[str, Any]:
  small = latency.Network(runnable(pruned.model), pruned.variables)
  timed = latency.compare(scratch, small, images, batches=BATCHES, seconds=20)
  return {
    'params': dp.cost.params(dp.couple(*small, images[:1])),
    'flops': pruned.report['flops']['after'],
    'latency_ms': latency.to_json(timed),
    'compile_s': latency.compile_seconds(small, images),
  }


if __name__ == '__main__':
  trunk = dp.models.build('resnet110', classes=10)
  model = every_tap(trunk)
  rng = np.random.default_rng(0)
  images = jnp.asarray(rng.normal(size=(128, 32, 32, 3)), jnp.float32)
  variables = jax.jit(model.init)(jax.random.key(0), images[:1])
  coupling = dp.couple(model, variables, images[:1])
  rows = {}
  for blocks in BLOCKS:
    rows[str(blocks)] = row(*cut(model, variables, coupling, images, blocks), images)
    print(blocks, {k: v for k, v in rows[str(blocks)].items() if k != 'latency_ms'})
  for each in rows.values():
    each['flop_ratio'] = rows['54']['flops'] / each['flops']
  found = {'command': record.command(), **results.surroundings(), 'model': 'resnet110'}
  record.write(RESULT, {**found, 'blocks': rows})
