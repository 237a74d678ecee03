"""Wall time of NetCut on one core: MLP 20×200, fashion_mnist, 20 epochs, batch 128.

Pinned to one core, in one process: from images in memory to test accuracy before and
after the cut, compilation included. The authors' code takes 90 to 98 s for the same on
such a core (60,000 images; here 55,000, because 5,000 are held out to decide).

  export XLA_FLAGS='--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1'
  TFDS_DATA_DIR=../shared/data/tfds python -m experiments.bench.netcut

The flags keep XLA from sharing the core among two threads. Seconds depend on the core
that is at hand; where torch is installed (it is no dependency), a training step of the
same network in PyTorch is timed by turns with ours, and `step_over_torch` is the ratio
of the medians.
"""

import dataclasses
import os
import tempfile
import time

import jax
import jax.numpy as jnp
import numpy as np

import depthprune as dp
from depthprune import methods
from depthprune.run import rounds as recipe
from depthprune.run.job import optimizer, prepare, stage
from depthprune.run.network import initial_variables
from depthprune.timing import clock
from depthprune.train.step import init_state, make_step
from experiments.bench import measure, pytorch
from experiments.netcut.configs import MLP_FASHION_MNIST

EPOCHS, STEPS = 20, 20  # STEPS: of training, in one turn of the comparison


def steps(model, method, variables, job):
  """A function that does STEPS training steps on one batch that is there already."""
  tx = optimizer(job.config, job.config.learning_rate, 1000)
  batch = {'image': jnp.ones((128, *job.images.shape)), 'label': jnp.arange(128) % 10}
  state = init_state(model, method, tx, variables, batch=batch)
  step = make_step(model, method, job.task, tx)

  def run():
    nonlocal state
    for _ in range(STEPS):
      state, _ = step(state, batch, job.key('bench'))
    return state.step

  return run


def against_torch(model, method, variables, job) -> dict[str, float]:
  """Milliseconds of a step of each, and their ratio; nothing without torch."""
  inputs, classes = int(np.prod(job.images.shape)), job.images.classes
  beside = pytorch.netcut_steps(inputs, classes, job.config.options.beta, STEPS)
  if beside is None:
    return {}
  calls = steps(model, method, variables, job), beside
  ours, theirs = np.median(clock.interleave(calls, 20), axis=1) / STEPS
  return {
    'step_ms': float(ours),
    'torch_step_ms': float(theirs),
    'step_over_torch': float(ours / theirs),
  }


if __name__ == '__main__':
  if hasattr(os, 'sched_setaffinity'):
    os.sched_setaffinity(0, {0})
  folder = tempfile.mkdtemp()  # nothing to resume from
  config = dataclasses.replace(MLP_FASHION_MNIST, gate_epochs=EPOCHS, workdir=folder)
  job = prepare(config)
  started = time.perf_counter()
  model = recipe.network(config, job.images.classes)
  variables = initial_variables(job, model)
  coupling = dp.couple(model, variables, *job.inputs)
  method = methods.build(config, coupling, 0, {})
  peak = config.learning_rate
  state = stage(job, 'gates', model, method, variables, epochs=EPOCHS, peak=peak)
  trained = time.perf_counter()
  on = lambda batches: dp.judge(model, method, job.task, state, list(batches))
  judged = on(job.batches(job.images.held_out))
  keep = method.decide(jax.device_get(state.theta), {}, judged)
  tested = on(job.batches(job.images.test))
  accuracy = {
    name: tested(k)['accuracy'] for name, k in (('before', {}), ('cut', keep))
  }
  content = {
    'config': job.relevant(),
    'images': len(job.images.train['label']),
    'train_seconds': trained - started,
    'seconds': time.perf_counter() - started,
    'accuracy': accuracy,
    **against_torch(model, method, variables, job),
  }
  measure.write('netcut', content)
  print({k: v for k, v in content.items() if k != 'config'})
