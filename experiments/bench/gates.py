"""What gates cost while they train, and what the cut gains afterwards.

ResNet-20, 32x32x3, batch 128, float32. One process, calls by turns, medians:

  gating   a training step with gates and the FLOPs penalty, over a plain one
  speedup  the network before over after an L1 cut to half of its FLOPs, in evaluation,
           with any widths and with multiples of 8

  python -m experiments.bench.gates

About 2 minutes on 2 cores. Expected: gating at most 1.05; speedup below the FLOP ratio
of 2 (memory-bound layers and narrow channels do not shrink in proportion).
"""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax

import depthprune as dp
from depthprune.run import result as results
from depthprune.storage import directory as record
from depthprune.timing import clock, latency
from depthprune.train import task as tasks
from depthprune.train.method import Method, plain
from depthprune.train.step import init_state

RESULT = Path(__file__).parent / 'results' / 'gates.json'
BATCH, SHAPE = 128, (32, 32, 3)


def stepper(
  model, variables, method: Method, coupling, batch, task=tasks.classification(10)
):
  """A function without arguments that does the next training step."""
  tx = optax.sgd(0.1, momentum=0.9, nesterov=True)
  state = init_state(model, method, tx, variables, coupling, batch)
  step = dp.make_step(model, method, task, tx, coupling)

  def advance():
    nonlocal state
    state, metrics = step(state, batch, jax.random.key(0))
    return metrics

  return advance


def gating(model, variables, coupling, batch) -> dict:
  """Median milliseconds of both steps and the ratio of every pair of turns."""
  calls = [
    stepper(model, variables, plain(), None, batch),
    stepper(model, variables, dp.trainable_gates(coupling, 0.5), coupling, batch),
  ]
  without, gated = clock.interleave(calls, seconds=60, least=21, most=61)
  lower, ratio, upper = np.percentile(gated / without, (25, 50, 75))
  return {
    'plain_ms': float(np.median(without)),
    'gated_ms': float(np.median(gated)),
    'ratio': float(ratio),
    'quartiles': [float(lower), float(upper)],
    'turns': len(gated),
  }


def speedup(model, variables, coupling, images, round_to: int) -> dict:
  """Measured latency before and after a cut to half of the FLOPs."""
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
  model = dp.models.build('resnet20', classes=10)
  rng = np.random.default_rng(0)
  images = jnp.asarray(rng.normal(size=(BATCH, *SHAPE)), jnp.float32)
  batch = {'image': images, 'label': jnp.asarray(rng.integers(0, 10, BATCH))}
  variables = jax.jit(model.init)(jax.random.key(0), images[:1])
  coupling = dp.couple(model, variables, images[:1])
  found = {
    'command': record.command(),
    **results.surroundings(),
    'model': 'resnet20',
    'batch': BATCH,
    'shape': SHAPE,
    'gating': gating(model, variables, coupling, batch),
    'speedup': {
      f'round_to_{n}': speedup(model, variables, coupling, images, n) for n in (1, 8)
    },
  }
  record.write(RESULT, found)
  print(found['gating'], found['speedup'])
