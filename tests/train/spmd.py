"""What one process does in test_mesh.py: `python -m tests.train.spmd TASK DIR MESH`.

Everything goes through the library as a user calls it; what was found is written to
DIR, by process 0 where all must have found the same.
"""

import dataclasses
import functools
import json
import sys
import zlib
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from depthprune import distributed, methods
from depthprune.data import images as data
from depthprune.data.features import FeatureSampler
from depthprune.data.text import TextSampler
from depthprune.distributed import fetch
from depthprune.methods.trainable_gates import GateOptions
from depthprune.run import rounds
from depthprune.run.config import Config
from depthprune.run.job import Job, optimizer, prepare, stage
from depthprune.storage import checkpoint
from depthprune.train import mesh as meshes
from depthprune.train.loop import fit
from depthprune.train.method import plain
from depthprune.train.step import init_state, make_step

STEPS = 10


class Net(nn.Module):
  """Batch statistics, and no kink: a rounding error stays one."""

  classes: int = 10

  @nn.compact
  def __call__(self, x, train=False):
    for i, width in enumerate((8, 16)):
      x = nn.Conv(width, (3, 3), (i + 1, i + 1), use_bias=False, name=f'conv{i}')(x)
      x = jnp.tanh(nn.BatchNorm(not train, name=f'norm{i}')(x))
    return {'main': nn.Dense(self.classes, name='head')(x.mean((1, 2)))}


def config(folder: Path, mesh: str | None) -> Config:
  return Config(
    GateOptions(0.6, gate_learning_rate=0.01),
    batch=16,
    subset=16 * STEPS,
    learning_rate=0.05,
    gate_epochs=1,
    finetune_epochs=0,
    mesh=mesh,
    workdir=str(folder),
    checkpoint_every_s=0,
  )


def train(folder: Path, mesh: str | None) -> None:
  """Ten steps of SGD, then gates, a cut and its measurement."""
  job = prepare(config(folder, mesh), show=False)
  variables = Net().init(job.key('init'), *job.inputs)
  state = ten(job, variables)
  build: Any = functools.partial(methods.build, job.config.options)
  small = rounds.shrink(job, Net(), state.variables, build)
  test = job.scores(small.model)(small.variables, job.images.test)
  arrays = checkpoint.paths(jax.device_get((state, small.variables)))
  sums = {path: zlib.crc32(np.ascontiguousarray(x)) for path, x in arrays.items()}
  (folder / f'sums{jax.process_index()}.json').write_text(json.dumps(sums))
  fused, same = as_one_program(job, variables), batches_of_the_host(job)
  if distributed.writes():
    np.savez(folder / 'state.npz', **checkpoint.paths(jax.device_get(state)))
    np.savez(folder / 'fused.npz', **checkpoint.paths(fetch(fused)))
    kernel = fused.params['conv1']['kernel']
    (image,) = {shard.data.shape for shard in image_of(job).addressable_shards}
    (part,) = {shard.data.shape for shard in kernel.addressable_shards}
    parts = {'image': image, 'kernel': part, 'of_the_host': same}
    (folder / 'parts.json').write_text(json.dumps(parts))
    np.savez(folder / 'keep.npz', **small.pruned.keep['channels'])
    held_out = dataclasses.asdict(small.rounds[0].held_out)
    np.savez(folder / 'found.npz', loss=test['loss'], **held_out)


def ten(job: Job, variables: Any) -> Any:
  given = Net(), plain(), variables
  return stage(job, 'ten', *given, epochs=1, peak=job.config.learning_rate)


def as_one_program(job: Job, variables: Any) -> Any:
  """The same ten steps, compiled as on an accelerator; still on the mesh."""
  tx = optimizer(job.config, job.config.learning_rate, STEPS)
  state = job.on_mesh(init_state(Net(), plain(), tx, variables))
  step = make_step(Net(), plain(), job.task, tx, lay=job.on_mesh)
  given = job.key('ten'), job.batch_at('ten'), job.train
  return fit(step, state, *given, steps=STEPS, every=5, show=False, fused=True)


def batches_of_the_host(job: Job) -> dict[str, bool]:
  """Whether texts, and features that lie on disk, are split and stay as they are."""
  rng, label = np.random.RandomState(0), np.arange(64, dtype=np.int32)
  mask = np.arange(24) < rng.randint(1, 24, (64, 1))
  texts = {'tokens': rng.randint(9, size=mask.shape), 'mask': mask, 'label': label}
  rows = {'features': {'tap': rng.normal(size=(64, 5))}, 'label': label}
  key = jax.random.key(3)
  samplers = {'texts': (TextSampler(key, 16), texts)}
  samplers['features'] = FeatureSampler(key, 16, on_host=True), rows
  found = {}
  for name, (sampler, split) in samplers.items():
    batch = meshes.Sharded(sampler, job.mesh).stepwise()(split, 2)
    there, whole = fetch(batch), jax.device_get(sampler(split, 2))
    equal = jax.tree.all(jax.tree.map(np.array_equal, there, whole))
    found[name] = equal and batch['label'].sharding.spec == meshes.ROWS
  return found


def image_of(job: Job) -> jax.Array:
  return job.batch_at('ten').stepwise()(job.train, 0)['image']


def streams(folder: Path, mesh: str | None) -> None:
  """Steps on images that each process reads its part of, and evaluation on them."""
  asked = {'data': 'imagenet2012', 'stream': 'always', 'resize': 8, 'subset': 24}
  changed = dataclasses.replace(config(folder, mesh), batch=8, mixup=0.3, **asked)
  job = prepare(changed, show=False)
  batch = job.batch_at('steps').stepwise()(job.train, 1)
  given = Net(job.images.classes), plain()
  variables = given[0].init(job.key('init'), *job.inputs)
  state = stage(job, 'steps', *given, variables, epochs=3, peak=0.05)
  test = job.scores(given[0])(state.variables, job.images.test)
  own = meshes.rows_here(job.mesh, changed.batch).tolist()
  (folder / f'own{jax.process_index()}.json').write_text(json.dumps(own))
  split = {batch[name].sharding.spec for name in ('image', 'label')}
  assert split == {meshes.ROWS} or job.mesh.size == 1, split
  batch = fetch(batch)
  if distributed.writes():
    np.savez(folder / 'batch.npz', **batch)
    np.savez(folder / 'state.npz', **checkpoint.paths(jax.device_get(state)))
    np.savez(folder / 'test.npz', **test)


def strangers(folder: Path, mesh: str | None) -> None:
  """What processes that do not belong together are told, each by itself."""
  distributed.join()
  me, said = jax.process_index(), {}

  def told(name, call):
    try:
      call()
    except ValueError as error:
      said[name] = f'{type(error).__name__}: {error}'

  mine = config(folder, mesh)
  other = Config(GateOptions(0.6 + me / 10), batch=16 + me, workdir=mine.workdir)
  told('config', lambda: prepare(other, show=False))
  divided, source = data.divided, data.source
  data.divided = lambda *args, **kwargs: darker(divided(*args, **kwargs), me)
  told('data', lambda: prepare(mine, show=False))
  data.divided = divided
  data.source = lambda *args: source('digit' + 's' * (1 - me))
  told('failed', lambda: prepare(mine, show=False))
  data.source = source
  apart = folder / f'host{me}'
  checkpoint.write(folder / 'whole', 'state.json', {'w': jnp.zeros(2)}, {})
  (apart / 'checkpoints' / 'ten' / '00000003').mkdir(parents=True) if me else None
  job = prepare(config(folder, mesh), show=False)._replace(folder=apart)
  told('folder', lambda: ten(job, Net().init(job.key('init'), *job.inputs)))
  told('few', lambda: meshes.make_mesh('data=1', 8))
  odd = {'kept': np.arange(5) > me, 'x': np.array([-0.0, 1 / (3 + me)], np.float32)}
  said['agreed'] = [x.tobytes().hex() for x in distributed.agreed(odd).values()]
  (folder / f'said{me}.json').write_text(json.dumps(said))


def darker(images: data.ImageSet, by: int) -> data.ImageSet:
  """One pixel of one training image is another."""
  images.train['image'][3, 2, 1] += by
  return images


if __name__ == '__main__':
  task, where, axes = sys.argv[1:]
  tasks = {'train': train, 'streams': streams, 'strangers': strangers}
  tasks[task](Path(where), axes or None)
