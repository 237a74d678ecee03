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
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

import depthprune as dp
from depthprune import methods
from depthprune.program import clock
from depthprune.training import recipe, record, results
from depthprune.training.optimizers import optimizer
from depthprune.training.stage import prepare, stage
from depthprune.training.train import init_state, make_step
from experiments.netcut.configs import MLP_FASHION_MNIST

RESULT = Path(__file__).parent / 'results' / 'netcut.json'
EPOCHS, STEPS = 20, 20  # STEPS: of training, in one turn of the comparison


def ours(model, method, variables, job):
  """() -> STEPS training steps on one batch that is there already."""
  tx = optimizer(job.config, job.config.learning_rate, 1000)
  batch = {'image': jnp.ones((128, *job.images.shape)), 'label': jnp.arange(128) % 10}
  held = [init_state(model, method, tx, variables, batch=batch)]
  step = make_step(model, method, job.task, tx)

  def run():
    for _ in range(STEPS):
      held[0], _ = step(held[0], batch, job.key('bench'))
    return held[0].step

  return run


def theirs(torch, inputs: int, classes: int, beta: float):
  """The same steps in PyTorch: 20 layers of 200, a head on each, two Adams."""
  nn = torch.nn
  sizes = [inputs, *[200] * 20]
  layers = nn.ModuleList(map(nn.Linear, sizes[:-1], sizes[1:]))
  heads = nn.ModuleList(nn.Linear(200, classes) for _ in layers)
  v = nn.Parameter(torch.zeros(len(layers)))
  cost = torch.arange(1.0, len(layers) + 1)
  weights = torch.optim.Adam([*layers.parameters(), *heads.parameters()], 1e-3)
  both = weights, torch.optim.Adam([v], 1e-3)
  x, y = torch.ones(128, inputs), torch.arange(128) % classes

  def run():
    for _ in range(STEPS):
      h, said = x, []
      for layer, head in zip(layers, heads, strict=True):
        h = torch.relu(layer(h))
        said.append(torch.log_softmax(head(h), -1))
      w = torch.softmax(v, 0)
      s = torch.tensordot(w, torch.stack(said), 1)
      loss = nn.functional.nll_loss(s, y) + beta * (cost @ w)
      for tx in both:
        tx.zero_grad()
      loss.backward()
      for tx in both:
        tx.step()

  return run


def against_torch(model, method, variables, job) -> dict[str, float]:
  """Milliseconds of a step of each, and their ratio; nothing without torch."""
  try:
    import torch  # pyright: ignore[reportMissingImports]
  except ImportError:
    return {}
  torch.set_num_threads(1)
  shape, classes = job.images.shape, job.images.classes
  calls = (
    ours(model, method, variables, job),
    theirs(torch, int(np.prod(shape)), classes, job.config.options.beta),
  )
  mine, other = np.median(clock.interleave(calls, 20), axis=1) / STEPS
  return {
    'step_ms': float(mine),
    'torch_step_ms': float(other),
    'step_over_torch': float(mine / other),
  }


if __name__ == '__main__':
  if hasattr(os, 'sched_setaffinity'):
    os.sched_setaffinity(0, {0})
  folder = tempfile.mkdtemp()  # nothing to resume from
  config = dataclasses.replace(MLP_FASHION_MNIST, gate_epochs=EPOCHS, workdir=folder)
  job = prepare(config)
  started = time.perf_counter()
  model = recipe.network(config, job.images.classes)
  variables = recipe.start(job, model)
  coupling = dp.couple(model, variables, job.example)
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
  found = {
    'command': record.command(),
    **results.surroundings(),
    'config': job.relevant(),
    'images': len(job.images.train['label']),
    'train_seconds': trained - started,
    'seconds': time.perf_counter() - started,
    'accuracy': accuracy,
    **against_torch(model, method, variables, job),
  }
  record.write(RESULT, found)
  print({k: v for k, v in found.items() if k not in ('config', 'versions')})
