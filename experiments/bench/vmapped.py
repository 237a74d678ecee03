"""Runs of a sweep trained at once by `vmap`, beside one after the other.

A training step with gates and the FLOPs penalty of four networks that differ in their
weights, 28x28x1, batch 128, float32. One process, calls by turns, medians:

  loop   four calls of the step of one network
  vmap   one call of the step of four

  python -m experiments.bench.vmapped

About 3 minutes on two cores of a CPU. Found there: vmap takes 1.1 of the time of the
loop for an MLP and 2.7 for a ResNet-8, whose convolutions become grouped ones; so
`depthprune sweep` has one run after the other on a device. After the cut the networks
have different shapes in any case. Not measured on an accelerator.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax

import depthprune as dp
from depthprune.timing.clock import interleave
from depthprune.train.step import init_state
from experiments.bench import measure

RUNS, BATCH, SHAPE = 4, 128, (28, 28, 1)
MODELS = 'mlp', 'resnet8'


def steps(name: str, batch: dict) -> tuple:
  """(loop, vmap): functions without arguments that do the next step of all runs."""
  model = dp.models.build(name, classes=10)
  example = batch['image'][:1]
  init = lambda seed: jax.jit(model.init)(jax.random.key(seed), example)
  coupling = dp.couple(model, init(0), example)
  method = dp.trainable_gates(coupling, 0.5)
  tx = optax.sgd(0.1, momentum=0.9, nesterov=True)
  step = dp.make_step(model, method, dp.classification(10), tx, coupling)
  state = lambda seed: init_state(model, method, tx, init(seed), coupling, batch)
  apart = [state(seed) for seed in range(RUNS)]
  stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *map(state, range(RUNS)))
  at_once = jax.jit(jax.vmap(step, in_axes=(0, None, None)), donate_argnums=0)
  key = jax.random.key(0)

  def loop():
    for i, each in enumerate(apart):
      apart[i], _ = step(each, batch, key)
    return [each.params for each in apart]

  def vmap():
    nonlocal stacked
    stacked, _ = at_once(stacked, batch, key)
    return stacked.params

  return loop, vmap


def measured(name: str, batch: dict) -> dict:
  """Median milliseconds of both, and of the ratio of every pair of turns."""
  loop, vmap = interleave(steps(name, batch), seconds=60, least=9, most=61)
  ratio = measure.ratio(vmap, loop)
  return {
    'loop_ms': float(np.median(loop)),
    'vmap_ms': float(np.median(vmap)),
    'vmap_over_loop': ratio['ratio'],
    'quartiles': ratio['quartiles'],
    'turns': len(loop),
  }


if __name__ == '__main__':
  batch = measure.random_batch(np.random.default_rng(0), (BATCH, *SHAPE), (BATCH,))
  models = {name: measured(name, batch) for name in MODELS}
  measure.write('vmapped', {'runs': RUNS, 'batch': BATCH, 'shape': SHAPE, **models})
  print(models)
