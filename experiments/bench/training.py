"""Training on this device: images a second, where a step's time goes, beside the roof.

ResNet-20 (on an accelerator ResNet-56), 32x32x3, batch 128, images in the memory of the
device and augmented in jit, as `depthprune run` trains. One process:

  float32, bfloat16, remat  a step of each by turns, its memory and time to compile; the
                            roof is what the device does at most with the FLOPs and
                            bytes that XLA counts for the program
  split                      the batch alone, the step with it, an evaluation of as many
                            images, and a checkpoint: milliseconds
  torch                      the same network in PyTorch by turns, where it is installed
                            (it is no dependency): channels last; on an accelerator
                            bfloat16 autocast and torch.compile, against our bfloat16

  python -m experiments.bench.training

About 5 minutes on 2 cores.
"""

import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import depthprune as dp
from depthprune.data import images as data
from depthprune.data.augment import Augment
from depthprune.run.job import sgd
from depthprune.storage import keeper
from depthprune.timing import clock, roofline
from depthprune.train import task as tasks
from depthprune.train.evaluate import evaluator
from depthprune.train.method import plain
from depthprune.train.step import State, init_state, make_step
from experiments.bench import measure, pytorch

BATCH, SHAPE, CLASSES, IMAGES = 128, (32, 32, 3), 10, 2048
VARIANTS = {'float32': {}, 'bfloat16': {'dtype': 'bfloat16'}, 'remat': {}}
NORMAL = data.Normalisation((0.5,) * 3, (0.25,) * 3, 255.0)
SECONDS = 30


class Training(NamedTuple):
  """A network in training: `advance()` does a step, `state()` is where it is."""

  model: Any
  advance: Callable[[], Any]
  state: Callable[[], State]
  compiled: Any
  compile_s: float


def prepare(name: str, variant: str, split: Any, sampler: Any) -> Training:
  """A variant of a network, its step compiled."""
  model = dp.models.build(name, classes=CLASSES, **VARIANTS[variant])
  variables = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, *SHAPE)))
  tx, method = sgd(0.1, 10**6, 5e-4), plain()
  state = init_state(model, method, tx, variables)
  task = tasks.classification(CLASSES)
  step = make_step(model, method, task, tx, remat=variant == 'remat')
  batch_at, key = sampler.stepwise(), jax.random.key(1)
  started = time.perf_counter()
  compiled = step.lower(state, batch_at(split, 0), key).compile()
  seconds = time.perf_counter() - started
  count = 0

  def advance():
    nonlocal state, count
    state, metrics = step(state, batch_at(split, count), key)
    count += 1
    return metrics

  return Training(model, advance, lambda: state, compiled, seconds)


def variant_row(
  each: Training, times: np.ndarray, peak: roofline.Peak
) -> dict[str, Any]:
  """A variant's row: its median step beside the roof."""
  cost = each.compiled.cost_analysis() or {}
  memory = each.compiled.memory_analysis()
  flops, moved = cost.get('flops', 0.0), cost.get('bytes accessed', 0.0)
  step = float(np.median(times))
  return {
    'step_ms': step,
    'images_per_second': 1e3 * BATCH / step,
    'compile_s': each.compile_s,
    'flops': flops,
    'bytes': moved,
    'roof_ms': peak.milliseconds(flops, moved),
    'temporary_bytes': getattr(memory, 'temp_size_in_bytes', None),
  }


def parts(each: Training, split: Any, sampler: Any) -> dict[str, float]:
  """Milliseconds of what a run does besides the step."""
  batch_at = sampler.stepwise()
  evaluate = evaluator(each.model, tasks.classification(CLASSES))
  held = {k: v[:BATCH] for k, v in split.items()}
  batches = list(data.batches(jax.device_get(held), BATCH, NORMAL))
  with tempfile.TemporaryDirectory() as folder:
    keeps = keeper.Keeper(Path(folder), keep=1, config={})
    saved = iter(range(10**6))
    calls = {
      'input': lambda: batch_at(split, 0),
      'step_with_input': each.advance,
      'evaluation': lambda: evaluate(each.state().variables, batches),
      'checkpoint': lambda: keeps.save(next(saved), each.state()),
    }
    times = clock.interleave([*calls.values()], SECONDS, least=5, most=50)
  return {name: float(np.median(row)) for name, row in zip(calls, times)}


if __name__ == '__main__':
  accelerated = jax.default_backend() != 'cpu'
  depth = 56 if accelerated else 20
  name = f'resnet{depth}'
  rng = np.random.default_rng(0)
  split = {
    'image': jnp.asarray(rng.integers(0, 256, (IMAGES, *SHAPE)), jnp.uint8),
    'label': jnp.asarray(rng.integers(0, CLASSES, IMAGES), jnp.int32),
  }
  sampler = data.ImageSampler(jax.random.key(2), BATCH, NORMAL, Augment(4, True))
  networks = {variant: prepare(name, variant, split, sampler) for variant in VARIANTS}
  calls = {variant: each.advance for variant, each in networks.items()}
  other = pytorch.resnet_step(depth, BATCH, SHAPE, CLASSES, accelerated)
  calls |= {'torch': other} if other else {}
  times = clock.interleave([*calls.values()], SECONDS, least=9, most=200)
  peak = roofline.measure()
  rows = {
    variant: variant_row(networks[variant], row, peak)
    for variant, row in zip(calls, times)
    if variant in networks
  }
  content = {
    'model': name,
    'batch': BATCH,
    'shape': SHAPE,
    'peak': peak.to_json(),
    'variants': rows,
    'split_ms': parts(networks['float32'], split, sampler),
  }
  if other:
    mine = list(calls).index('bfloat16' if accelerated else 'float32')
    content['torch_step_ms'] = float(np.median(times[-1]))
    content['step_over_torch'] = float(np.median(times[mine] / times[-1]))
  measure.write(f'training_{jax.default_backend()}', content)
  print({k: v for k, v in content.items() if k != 'peak'})
