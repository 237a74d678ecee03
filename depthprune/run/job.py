"""One stage of a run: a network trained for some epochs, recorded and resumable."""

import shutil
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from depthprune import distributed
from depthprune.data import images as data
from depthprune.data.dataset import count
from depthprune.data.streaming import Streamed
from depthprune.data.text import Texts
from depthprune.run import data as datasets
from depthprune.run import interrupts
from depthprune.run.config import Config, relevant
from depthprune.run.interrupts import Preempted
from depthprune.storage import checkpoint, directory
from depthprune.storage.keeper import SHARED, Keeper, same_config
from depthprune.timing import latency, throughput
from depthprune.train import mesh as meshes
from depthprune.train import task as tasks
from depthprune.train.distill import Teacher
from depthprune.train.evaluate import evaluator
from depthprune.train.loop import Row, first_batch, fit
from depthprune.train.method import Method
from depthprune.train.step import State, init_state, make_step
from depthprune.train.task import Tree


def optimizer(config: Config, peak: float, steps: int) -> optax.GradientTransformation:
  """What the config asks for: `sgd` below, or Adam, at a constant rate or scheduled."""
  if config.optimizer == 'sgd':
    return sgd(peak, steps, config.weight_decay)
  rate = peak if config.optimizer == 'adam' else scheduled(peak, steps)
  return optax.adamw(rate, weight_decay=config.weight_decay, mask=_kernels)


def sgd(peak: float, steps: int, weight_decay: float) -> optax.GradientTransformation:
  """Nesterov momentum 0.9, cosine to zero after a warm-up, decay of kernels only.

  Args:
    peak: learning rate after the warm-up, which is a twentieth of all `steps`.
    weight_decay: its gradient, weight_decay * kernel, goes through the momentum.
  """
  return optax.chain(
    optax.add_decayed_weights(weight_decay, mask=_kernels),
    optax.sgd(scheduled(peak, steps), momentum=0.9, nesterov=True),
  )


def scheduled(peak: float, steps: int) -> optax.Schedule:
  """(step) -> learning rate of `cosine`."""
  return lambda step: cosine(jnp.asarray(step), peak, steps)


def cosine(step: jax.Array, peak: float, steps: int) -> jax.Array:
  """Learning rate of a step: linear warm-up to peak, then half a cosine to zero."""
  t, warm = step.astype(jnp.float32), max(1, steps // 20)
  up = (t + 1) / warm
  down = 0.5 * (1 + jnp.cos(jnp.pi * jnp.clip((t - warm) / max(1, steps - warm), 0, 1)))
  return peak * jnp.minimum(up, down)


def _kernels(params: Tree) -> Tree:
  is_kernel = lambda path, _: getattr(path[-1], 'key', None) == 'kernel'
  return jax.tree_util.tree_map_with_path(is_kernel, params)


Callback = Callable[[State, Row], None]


def historian(folder: Path, stage: str) -> Callback:
  """Writes a line of history.jsonl."""

  def write(state: State, row: Row) -> None:
    del state
    line = {'stage': stage, 'flops': None, **row, 'step': int(row['step'])}
    directory.append(folder / 'history.jsonl', line)

  return write


def saver(
  keeper: Keeper, stage: str, steps: int, every_s: float, told: threading.Event
) -> Callback:
  """Saves every `every_s` seconds, at the last step, and where SIGTERM ends a process.

  The loss on the training images since the last line is the score.

  Raises: Preempted, when the state is on disk.
  """
  last = time.monotonic()

  def save(state: State, row: Row) -> None:
    nonlocal last
    step = int(row['step'])
    due = step == steps or time.monotonic() - last >= every_s
    due, ends = distributed.anywhere(due and distributed.writes(), told.is_set())
    if due or ends:
      keeper.save(step, state, score=row['loss'])
      last = time.monotonic()
    if ends:
      keeper.wait()
      raise Preempted(
        f'{stage}: stopped by SIGTERM and saved at step {step} of {steps}; the same '
        'command continues from there'
      )

  return save


def learnt(folder: Path, stage: str, method: Method) -> Callback:
  """Writes what the method has learnt so far, a line of gates.jsonl."""
  report = jax.jit(method.report)

  def write(state: State, row: Row) -> None:
    line = {
      'stage': stage,
      'step': int(row['step']),
      **directory.plain(report(state.theta)),
    }
    directory.append(folder / 'gates.jsonl', line)

  return write


LINES = 50  # of history that a stage writes
CACHED = 'checkpoints', 'features'
LOGS = 'history.jsonl', 'gates.jsonl', 'input.jsonl'
WRITTEN = *LOGS, 'costs.json', 'result.json', 'report.html'


class Job(NamedTuple):
  """What all stages of a run share.

  Attributes:
    config: of the run. folder: its directory.
    images: the data set, of images or of texts (or the features of either). train: its
      training examples, where they are batched: on the device, but texts on the host.
    task: what is learnt. mesh: the devices. show: whether to draw progress bars.
  """

  config: Config
  folder: Path
  images: data.Dataset | Streamed | Texts
  train: Tree
  task: tasks.Task
  mesh: Mesh
  show: bool = True

  @property
  def inputs(self) -> tuple[jax.Array, ...]:
    """One example as the network reads it: `apply(variables, *inputs)`.

    An image of zeros, [1, height, width, channels]; or tokens and mask [1, length].
    """
    return self.images.example()

  @property
  def labels(self) -> tuple[int, ...]:
    """Shape of the training labels: [n], [n, height, width] or [n, tasks]."""
    train = self.images.train
    return np.shape(train['label']) if 'label' in train else (count(train),)

  @property
  def example(self) -> jax.Array:
    """The first of the inputs; of images the only one."""
    return self.inputs[0]

  def steps(self, epochs: int) -> int:
    return epochs * data.epoch_steps(self.train, self.config.batch)

  def key(self, name: str) -> jax.Array:
    """A key of the run's seed, for the stage (or other use) of that name."""
    return jax.random.fold_in(
      jax.random.key(self.config.seed), zlib.crc32(name.encode()) >> 1
    )

  def batch_at(self, name: str) -> Any:
    """(examples, step) -> augmented training batch of the stage of that name.

    `batch_at(...).stepwise()` is the same, faster, for a loop on the host.
    """
    key, augment = self.key(f'{name}/data'), self.config.augment
    sampler = self.images.sampler(key, self.config.batch, augment)
    return meshes.Sharded(sampler, self.mesh)

  def batches(self, split: Tree) -> Iterator[Tree]:
    """All examples of a split once, for evaluation; 'weight' is 0 on padding."""
    return meshes.batches(self.mesh, self.images, split, self.config.batch)

  def own_batches(self, split: Tree) -> Iterator[Tree]:
    """The same, whole, on this process's own device."""
    return self.images.batches(split, self.config.batch)

  def on_mesh(self, tree: Tree) -> Tree:
    """Variables, or a state, where training and evaluation read them."""
    return meshes.by_weights(self.mesh, tree)

  def scores(self, model: Any, answer: Callable | None = None) -> Callable[..., dict]:
    """measure(variables, split): scores of the network over all of a split.

    model, answer: as for `evaluator`.
    """
    measure = evaluator(model, self.task, answer=answer)
    return lambda variables, split: measure(
      self.on_mesh(variables), self.batches(split)
    )

  def relevant(self, stage: str = '') -> dict[str, Any]:
    """The part of the config that training, or the stage of that name, depends on."""
    return relevant(self.config.to_json(), stage)


def prepare(config: Config, show: bool = True) -> Job:
  """Joins the other processes, reads the data and makes the run's directory ready.

  Raises: HostError where processes have other configs, versions or data, or one of them
    failed; ConfigError as `mesh.of`
    does; CheckpointError where the directory belongs
    to a run of another config, and DataError as `datasets.read` does.
  """
  distributed.join()
  told = {**checkpoint.paths(config.to_json()), **directory.versions()}
  distributed.alike('config', told, 'Start all of them by the same command')
  mesh = meshes.of(config.mesh, config.batch)
  images = distributed.together(lambda: datasets.read(config))
  told = datasets.digests(images) if jax.process_count() > 1 else {}
  distributed.alike(f'data {config.data!r}', told, 'Copy the files from one to all')
  task, folder = tasks.of(images), config.path
  train = images.on_device(partial(meshes.whole, mesh))
  job = Job(config, folder, images, train, task, mesh, show and distributed.writes())
  begun = any((folder / name).exists() for name in ('history.jsonl', *CACHED))
  distributed.alike(str(folder), {'begun': begun}, SHARED)
  if config.resume:
    # Damaged, it is written anew; every state has its own. Of one in which nothing was
    # trained a mistake in the command may be mended.
    stored = directory.read(folder / 'config.json') if begun else None
    if stored is not None:
      same_config(relevant(stored['config']), job.relevant(), str(folder))
  elif distributed.writes() and (folder / 'config.json').is_file():
    for name in WRITTEN:
      (folder / name).unlink(missing_ok=True)
    for name in (*CACHED, 'cascade', 'pruned'):
      shutil.rmtree(folder / name, ignore_errors=True)
  distributed.wait()
  return job


def surroundings() -> dict[str, Any]:
  """What a result depends on besides its config: versions, device and command."""
  return {
    'versions': directory.versions(),
    'device': latency.device(),
    'command': directory.command(),
  }


def record_config(job: Job) -> None:
  """Writes config.json: what is run, with what, and the command."""
  values = {'config': job.config.to_json(), **surroundings()}
  directory.write(job.folder / 'config.json', values)


def remembering(path: Path) -> Callable[..., np.ndarray]:
  """The `remember` of a `Setting`, which keeps what was measured in the file `path`.

  Of several processes the first one measures for all.
  """

  def remember(measure, to_json, from_json):
    known = directory.read(path)
    found = None if known is None else from_json(known)
    measured = distributed.agreed(measure() if found is None else found)
    if found is None:
      directory.write(path, to_json(measured))
    return measured

  return remember


def stage(
  job: Job,
  name: str,
  model: Any,
  method: Method,
  variables: Tree,
  *,
  epochs: int,
  peak: float,
  coupling: Any = None,
  teacher: Teacher | None = None,
) -> State:
  """Trains, from the newest checkpoint of this stage if there is one.

  Args:
    job: the run. name: of the stage; its random numbers depend on it.
    model, method, coupling: as for `make_step`. variables: where to start.
    epochs: passes over the training examples. peak: highest learning rate.
    teacher: a network to learn from, for methods wrapped by `distill`.

  The state that comes back lies on this process's own device, the same on all.
  """
  steps = job.steps(epochs)
  tx = optimizer(job.config, peak, steps)
  batch_at = job.batch_at(name)
  batch = first_batch(batch_at, job.train)
  state = job.on_mesh(init_state(model, method, tx, variables, coupling, batch))
  state = jax.tree.map(jnp.array, state)  # no alias of the host's memory is donated
  keeper = Keeper(job.folder / 'checkpoints' / name, 2, job.relevant(name))
  restored = keeper.restore_latest(state)
  if restored is not None:
    state = jax.tree.map(jnp.asarray, restored.state)
  apply, taught = None, None
  if teacher is not None:
    apply, taught = teacher.apply, job.on_mesh(teacher.variables)
  step = make_step(
    model, method, job.task, tx, coupling, apply, job.on_mesh, job.config.remat
  )
  key = job.key(name)
  if isinstance(job.images, Streamed) and int(state.step) < steps:
    rates = throughput.measure(batch_at, job.train, step, state, key, taught)
    line = throughput.tell(rates, name, job.show)
    directory.append(job.folder / 'input.jsonl', line)
  callbacks = [historian(job.folder, name)]
  if state.theta:
    callbacks.append(learnt(job.folder, name, method))
  try:
    with interrupts.noticed() as told:
      every_s = job.config.checkpoint_every_s
      state = fit(
        step,
        state,
        key,
        batch_at,
        job.train,
        steps=steps,
        every=max(1, min(100, steps // LINES)),
        teacher=taught,
        callbacks=[*callbacks, saver(keeper, name, steps, every_s, told)],
        label=name,
        show=job.show,
      )
      keeper.wait()
  finally:
    keeper.rest()
  return distributed.local(state)
