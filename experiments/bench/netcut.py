"""Wall time of NetCut on one core: MLP 20×200, fashion_mnist, 20 epochs, batch 128.

Pinned to one core, in one process: from images in memory to test accuracy before and
after the cut, compilation included. The authors' code takes 90 to 98 s for the same on
such a core (60,000 images; here 55,000, because 5,000 are held out to decide).

  export XLA_FLAGS='--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1'
  TFDS_DATA_DIR=../shared/data/tfds python -m experiments.bench.netcut

The flags keep XLA from sharing the core among two threads.
"""

import dataclasses
import os
import tempfile
import time
from pathlib import Path

import jax

import depthprune as dp
from depthprune import methods
from depthprune.training import recipe, record, results
from depthprune.training.stage import prepare, stage
from experiments.netcut.mlp_fashion_mnist import FULL

RESULT = Path(__file__).parent / 'results' / 'netcut.json'
EPOCHS = 20

if __name__ == '__main__':
  if hasattr(os, 'sched_setaffinity'):
    os.sched_setaffinity(0, {0})
  folder = tempfile.mkdtemp()  # nothing to resume from
  config = dataclasses.replace(FULL, gate_epochs=EPOCHS, workdir=folder)
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
  judged = on(job.held_out())
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
  }
  record.write(RESULT, found)
  print({k: found[k] for k in ('train_seconds', 'seconds', 'accuracy')})
