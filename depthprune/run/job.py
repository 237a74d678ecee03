"""What all stages of a run share, and `stage`, which trains and resumes one of them."""

import shutil
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from depthprune import distributed
from depthprune.data.corpus import Corpus
from depthprune.data.dataset import DataError, Dataset, count, epoch_steps
from depthprune.program.rounding import AUTO, STEPS, RoundTo, Suited, suited
from depthprune.run import interrupts
from depthprune.run.config import Config, ConfigFile, continued, relevant
from depthprune.run.curves import EVENTS, ID, Log
from depthprune.run.data import checksums, read
from depthprune.storage import checkpoint, directory
from depthprune.storage.checkpoint import CheckpointError
from depthprune.storage.keeper import SHARED, Keeper, same_config
from depthprune.timing import latency, throughput
from depthprune.train import mesh as meshes
from depthprune.train import task as tasks
from depthprune.train.distill import Teacher
from depthprune.train.evaluate import evaluator
from depthprune.train.language import language_model
from depthprune.train.loop import Row, first_batch, fit
from depthprune.train.method import Method
from depthprune.train.step import State, init_state, make_step
from depthprune.train.task import Tree

LINES = 50  # lines of history that a stage writes, at least
CACHED = 'checkpoints', 'features'
LOGS = 'history.jsonl', 'gates.jsonl', 'input.jsonl'
WRITTEN = *LOGS, 'costs.json', 'rounding.json', 'result.json', 'report.html', ID


class Job(NamedTuple):
  """What all stages of a run share.

  Attributes:
    config: the configuration of the run.
    folder: the run's directory.
    images: the data set, of images, texts or features.
    train: the training split where batches are made: on the device, or on the host for
      texts and streamed images.
    task: the task of the data set.
    mesh: the devices.
    show: whether to draw progress bars.
    logs: what gets the lines of history.jsonl besides.
  """

  config: Config
  folder: Path
  images: Dataset
  train: Tree
  task: tasks.Task
  mesh: Mesh
  show: bool = True
  logs: tuple[Log, ...] = ()

  @property
  def inputs(self) -> tuple[jax.Array, ...]:
    """One made-up example as the network reads it, `apply(variables, *inputs)`."""
    return self.images.example()

  @property
  def labels(self) -> tuple[int, ...]:
    """Shape of the training labels: [n], [n, height, width] or [n, tasks]."""
    train = self.images.train
    return np.shape(train['label']) if 'label' in train else (count(train),)

  def steps(self, epochs: float) -> int:
    """Returns the number of training steps in some epochs, or in part of one."""
    return round(epochs * epoch_steps(self.train, self.config.batch))

  def key(self, name: str) -> jax.Array:
    """Returns a random key made of the run's seed and a name, such as a stage's."""
    return jax.random.fold_in(
      jax.random.key(self.config.seed), zlib.crc32(name.encode()) >> 1
    )

  def batch_at(self, name: str) -> Any:
    """Returns (examples, step) -> augmented training batch, for the stage `name`.

    `batch_at(name).stepwise()` is the same function in a form that is fast in a loop.
    """
    key, augment = self.key(f'{name}/data'), self.config.augment
    sampler = self.images.sampler(key, self.config.batch, augment)
    return meshes.Sharded(sampler, self.mesh)

  def batches(self, split: Tree) -> Iterator[Tree]:
    """Yields all examples of a split once, for evaluation; 'weight' is 0 on padding."""
    return self.images.batches(split, self.config.batch, meshes.placement(self.mesh))

  def own_batches(self, split: Tree) -> Iterator[Tree]:
    """Yields the same batches as `batches`, complete and on this process's device."""
    return self.images.batches(split, self.config.batch)

  def on_mesh(self, tree: Tree) -> Tree:
    """Puts variables, or a state, where training and evaluation read them."""
    return meshes.by_weights(self.mesh, tree)

  def scores(self, model: Any, answer: Callable | None = None) -> Callable[..., dict]:
    """Returns (variables, split) -> scores of a network over a split.

    Args:
      model: a module with `apply`, or an apply function.
      answer: (outputs) -> the logits that are measured; None takes the task's answer.
    """
    measure = evaluator(model, self.task, answer=answer)
    return lambda variables, split: measure(
      self.on_mesh(variables), self.batches(split)
    )

  def accuracies(self, model: Any, variables: Tree) -> dict[str, float]:
    """Returns the accuracy of a network on 'test' and on 'held_out'."""
    measure = self.scores(model)
    splits = {'test': self.images.test, 'held_out': self.images.held_out}
    return {name: measure(variables, of)['accuracy'] for name, of in splits.items()}

  def relevant(self, stage: str = '') -> dict[str, Any]:
    """Returns the part of the config on which a stage depends, or any stage."""
    return relevant(self.config.to_json(), stage)


def prepare(config: Config, show: bool = True) -> Job:
  """Joins the other processes, reads the data and prepares the run's directory.

  Raises:
    HostError: processes differ in config, versions or data, or one of them failed.
    ConfigError: the mesh does not fit the devices or the batch.
    DataError: the data set cannot be read.
    CheckpointError: the directory belongs to a run of another config.
  """
  distributed.join()
  known = {**checkpoint.paths(config.to_json()), **directory.versions()}
  distributed.alike('config', known, 'Start all of them by the same command')
  mesh = meshes.make_mesh(config.mesh, config.batch)
  images = distributed.together(lambda: read(config))
  digests = checksums(images) if jax.process_count() > 1 else {}
  distributed.alike(f'data {config.data!r}', digests, 'Copy the files from one to all')
  folder = config.path
  train = images.on_device(partial(meshes.replicate, mesh))
  show = show and distributed.writes()
  task = _task(config, images)
  job = Job(config, folder, images, train, task, mesh, show)
  begun = any((folder / name).exists() for name in ('history.jsonl', *CACHED))
  distributed.alike(str(folder), {'begun': begun}, SHARED)
  if config.resume:
    # A damaged config.json is written again, as every checkpoint has the config too.
    # Before anything is trained, another config may replace it.
    stored = directory.read(folder / 'config.json', ConfigFile) if begun else None
    if stored is not None:
      job = job._replace(config=continued(config, stored['config']))
      same_config(relevant(stored['config']), job.relevant(), str(folder))
  elif distributed.writes() and (folder / 'config.json').is_file():
    for name in WRITTEN:
      (folder / name).unlink(missing_ok=True)
    for name in (*CACHED, 'cascade', 'exits', 'pruned', EVENTS):
      shutil.rmtree(folder / name, ignore_errors=True)
  distributed.wait()
  return job


def _task(config: Config, images: Dataset) -> tasks.Task:
  if not isinstance(images, Corpus):
    return tasks.task_of(images, config.metric, config.class_weights)
  if config.metric or config.class_weights:
    raise DataError(
      f'data {config.data!r}: metric, class_weights: for classes, these are texts to '
      'write: leave them out'
    )
  return language_model()


def surroundings() -> dict[str, Any]:
  """Returns what a result depends on besides its config: versions, device, command."""
  return {
    'versions': directory.versions(),
    'device': latency.device(),
    'command': directory.command(),
  }


def record_config(job: Job) -> None:
  """Writes config.json: the config, number of classes, versions, device and command."""
  config = {'config': job.config.to_json(), 'classes': job.images.classes}
  values = {**config, **surroundings()}
  directory.write(job.folder / 'config.json', values)


def remembering(path: Path) -> Callable[..., np.ndarray]:
  """Returns the `remember` of a `Setting`, which stores measurements in a file.

  All processes use the measurement of the first.
  """

  def remember(measure, to_json, from_json):
    stored = directory.read(path)
    try:
      known = None if stored is None else from_json(stored)
    except (AttributeError, LookupError, TypeError, ValueError) as error:
      raise CheckpointError(
        f'{path}: expected a measurement as it was written, got another: delete it'
      ) from error
    measured = distributed.agreed(measure() if known is None else known)
    if known is None:
      directory.write(path, to_json(measured))
    return measured

  return remember


def rounding(job: Job) -> RoundTo:
  """Returns what widths are multiples of in a run, wherever it is resumed.

  What 'auto' stands for on the device where the run began is stored in rounding.json.
  """
  asked = job.config.recipe.round_to(job.config.options)
  if asked != AUTO:
    return asked
  number = remembering(job.folder / 'rounding.json')(
    lambda: np.array(suited().number),
    lambda number: {'multiple': int(number), 'device': latency.device()},
    lambda stored: np.array({n: n for _, n in STEPS}[stored['multiple']]),
  )
  return Suited(int(number))


def stage(
  job: Job,
  name: str,
  model: Any,
  method: Method,
  variables: Tree,
  *,
  epochs: float,
  peak: float,
  coupling: Any = None,
  teacher: Teacher | None = None,
) -> State:
  """Trains a network for some epochs, from the stage's newest checkpoint if it has one.

  Args:
    job: the run.
    name: name of the stage, on which its random numbers depend.
    model: a module with `apply`, or an apply function.
    method: what is trained besides the weights, and how.
    variables: the variables to start from.
    epochs: passes over the training examples.
    peak: highest learning rate of the schedule; at 0 the weights rest.
    coupling: the network's coupling, for a method that gates channels.
    teacher: a network to learn from, for a method wrapped by `distill`.

  Returns:
    The state after training, on this process's own device and the same on all.

  Raises:
    NonFiniteLoss: training diverged.
    KeyboardInterrupt, Preempted: Ctrl-C or SIGTERM ended the stage, and its state is
      saved.
    CheckpointError: the checkpoints are damaged, or belong to another run.
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
  callbacks = [write_history(job.folder, name, job.logs)]
  if state.theta:
    callbacks.append(write_learned(job.folder, name, method))
  try:
    with interrupts.deferred() as stopping:
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
        callbacks=[*callbacks, save_state(keeper, name, steps, every_s, stopping)],
        label=name,
        show=job.show,
        # Several processes stop at the same line of their histories.
        stopping=lambda: bool(stopping) and jax.process_count() == 1,
      )
      keeper.wait()
  finally:
    keeper.rest()
  return distributed.local(state)


# ---- callbacks of the training loop --------------------------------------------------

Callback = Callable[[State, Row], None]


def write_history(folder: Path, stage: str, logs: Sequence[Log] = ()) -> Callback:
  """Returns a callback that writes a line of history.jsonl, and passes it to logs."""

  def write(state: State, row: Row) -> None:
    del state
    line = {'stage': stage, 'flops': None, **row, 'step': int(row['step'])}
    directory.append(folder / 'history.jsonl', line)
    values = {k: v for k, v in row.items() if k not in ('step', 'time')}
    for log in logs:
      log(stage, line['step'], values)

  return write


def save_state(
  keeper: Keeper, stage: str, steps: int, every_s: float, stopping: interrupts.Request
) -> Callback:
  """Returns a callback that saves the state, now and then and at the last step.

  Args:
    keeper: where states are saved; their score is the training loss.
    stage: name of the stage, for the message.
    steps: number of the last step.
    every_s: seconds between two checkpoints.
    stopping: set by a signal; the callback then saves and raises its exception.
  """
  last = time.monotonic()

  def save(state: State, row: Row) -> None:
    nonlocal last
    step = int(row['step'])
    due = step == steps or time.monotonic() - last >= every_s
    asked = [stopping.signal == number for number in interrupts.NAMES]
    due, *asked = distributed.anywhere(due and distributed.writes(), *asked)
    if due or any(asked):
      keeper.save(step, state, score=row['loss'])
      last = time.monotonic()
    for number, ends in zip(interrupts.NAMES, asked):
      if ends:
        keeper.wait()
        where = f' and saved at step {step} of {steps}'
        raise interrupts.stopped(number, where, before=f'{stage}: ')

  return save


def write_learned(folder: Path, stage: str, method: Method) -> Callback:
  """Returns a callback that writes what the method has learnt into gates.jsonl."""
  report = jax.jit(method.report)

  def write(state: State, row: Row) -> None:
    learned = directory.plain(report(state.theta))
    line = {'stage': stage, 'step': int(row['step']), **learned}
    directory.append(folder / 'gates.jsonl', line)

  return write


# ---- optimizers ----------------------------------------------------------------------


def optimizer(config: Config, peak: float, steps: int) -> optax.GradientTransformation:
  """Returns the config's optimizer: `sgd`, or Adam at a constant or scheduled rate.

  With a peak of 0 it leaves the weights alone, and their gradients are not computed.
  """
  if not peak:
    return optax.set_to_zero()
  if config.optimizer == 'sgd':
    return sgd(peak, steps, config.weight_decay)
  rate = peak if config.optimizer == 'adam' else scheduled(peak, steps)
  return optax.adamw(rate, weight_decay=config.weight_decay, mask=_kernels)


def sgd(peak: float, steps: int, weight_decay: float) -> optax.GradientTransformation:
  """Returns SGD with Nesterov momentum 0.9 and the schedule of `cosine`.

  Args:
    peak: highest learning rate.
    steps: steps of the schedule.
    weight_decay: of kernels only. Its gradient, weight_decay * kernel, goes through the
      momentum.
  """
  return optax.chain(
    optax.add_decayed_weights(weight_decay, mask=_kernels),
    optax.sgd(scheduled(peak, steps), momentum=0.9, nesterov=True),
  )


def scheduled(peak: float, steps: int) -> optax.Schedule:
  """Returns (step) -> learning rate of `cosine`."""
  return lambda step: cosine(jnp.asarray(step), peak, steps)


def cosine(step: jax.Array, peak: float, steps: int) -> jax.Array:
  """Computes the learning rate of a step: a linear warm-up over a twentieth of the
  steps to `peak`, then half a cosine to zero."""
  t, warm = step.astype(jnp.float32), max(1, steps // 20)
  up = (t + 1) / warm
  down = 0.5 * (1 + jnp.cos(jnp.pi * jnp.clip((t - warm) / max(1, steps - warm), 0, 1)))
  return peak * jnp.minimum(up, down)


def _kernels(params: Tree) -> Tree:
  is_kernel = lambda path, _: getattr(path[-1], 'key', None) == 'kernel'
  return jax.tree_util.tree_map_with_path(is_kernel, params)
