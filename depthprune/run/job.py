"""What all stages of a run share, and one stage: trained, recorded and resumable."""

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
from depthprune.data.dataset import Dataset, count, epoch_steps
from depthprune.run import interrupts
from depthprune.run.config import Config, relevant
from depthprune.run.data import checksums, read
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

LINES = 50  # of history that a stage writes
CACHED = 'checkpoints', 'features'
LOGS = 'history.jsonl', 'gates.jsonl', 'input.jsonl'
WRITTEN = *LOGS, 'costs.json', 'result.json', 'report.html'


class Job(NamedTuple):
  """What all stages of a run share.

  Attributes:
    config: what is run. folder: its directory.
    images: the data set, of images, of texts or of features.
    train: its training examples, where batches are made: on the device, or for texts
      and streamed images on the host.
    task: what is learnt. mesh: the devices. show: whether to draw progress bars.
  """

  config: Config
  folder: Path
  images: Dataset
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

  def steps(self, epochs: int) -> int:
    """Training steps in so many epochs."""
    return epochs * epoch_steps(self.train, self.config.batch)

  def key(self, name: str) -> jax.Array:
    """A random key made of the run's seed and a name, such as that of a stage."""
    return jax.random.fold_in(
      jax.random.key(self.config.seed), zlib.crc32(name.encode()) >> 1
    )

  def batch_at(self, name: str) -> Any:
    """(examples, step) -> augmented training batch, for the stage of that name.

    `batch_at(name).stepwise()` is the same function, faster, for a loop on the host.
    """
    key, augment = self.key(f'{name}/data'), self.config.augment
    sampler = self.images.sampler(key, self.config.batch, augment)
    return meshes.Sharded(sampler, self.mesh)

  def batches(self, split: Tree) -> Iterator[Tree]:
    """All examples of a split once, for evaluation; 'weight' is 0 on padding."""
    return self.images.batches(split, self.config.batch, meshes.placement(self.mesh))

  def own_batches(self, split: Tree) -> Iterator[Tree]:
    """The same batches as `batches`, whole, on this process's own device."""
    return self.images.batches(split, self.config.batch)

  def on_mesh(self, tree: Tree) -> Tree:
    """Variables, or a state, where training and evaluation read them."""
    return meshes.by_weights(self.mesh, tree)

  def scores(self, model: Any, answer: Callable | None = None) -> Callable[..., dict]:
    """measure(variables, split): scores of a network over all of a split.

    Args:
      model: a module with `apply`, or such a function.
      answer: (outputs) -> logits, what is measured; by default the task's answer.
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

  Raises:
    HostError: processes have other configs, versions or data, or one of them failed.
    ConfigError: the mesh does not fit the devices or the batch.
    DataError: the data set cannot be read.
    CheckpointError: the directory belongs to a run of another config.
  """
  distributed.join()
  known = {**checkpoint.paths(config.to_json()), **directory.versions()}
  distributed.alike('config', known, 'Start all of them by the same command')
  mesh = meshes.of(config.mesh, config.batch)
  images = distributed.together(lambda: read(config))
  digests = checksums(images) if jax.process_count() > 1 else {}
  distributed.alike(f'data {config.data!r}', digests, 'Copy the files from one to all')
  folder = config.path
  train = images.on_device(partial(meshes.whole, mesh))
  show = show and distributed.writes()
  job = Job(config, folder, images, train, tasks.of(images), mesh, show)
  begun = any((folder / name).exists() for name in ('history.jsonl', *CACHED))
  distributed.alike(str(folder), {'begun': begun}, SHARED)
  if config.resume:
    # A damaged config.json is written anew, as every state has the config too. Where
    # nothing was trained yet, a mistake in the command may be mended.
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
  """Trains a network for some epochs, from the stage's newest checkpoint if it has one.

  Args:
    job: the run.
    name: of the stage; its random numbers depend on it.
    model: a module with `apply`, or such a function.
    method: what is trained besides the weights, and how.
    variables: where to start.
    epochs: passes over the training examples.
    peak: highest learning rate of the schedule.
    coupling: of the network, for a method that gates channels.
    teacher: a network to learn from, for a method wrapped by `distill`.

  Returns:
    The state after training, on this process's own device and the same on all.

  Raises:
    NonFiniteLoss: training diverged. Preempted: SIGTERM ended it, the state is saved.
    CheckpointError: the checkpoints are of another run or damaged.
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
  if job.images.streamed and int(state.step) < steps:
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


# ---- what a stage does every few steps -----------------------------------------------

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
  """Saves every `every_s` seconds, at the last step, and when SIGTERM has come.

  The score of a state is the training loss since the last line of history.

  Raises: Preempted after SIGTERM, once the state is on disk.
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


# ---- optimizers ----------------------------------------------------------------------


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
