"""One stage of a run: a network trained for some epochs, recorded and resumable."""

import json
import shutil
import time
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from depthprune.config import Config
from depthprune.options.sidenet import REQUESTS
from depthprune.training import data, datasets, record, tasks
from depthprune.training.keeper import Keeper, same_config
from depthprune.training.method import Method, Tree
from depthprune.training.step import State, init_state, make_step
from depthprune.training.text import Texts
from depthprune.training.train import Row, first_batch, fit

LINES = 50  # of history that a stage writes
# What training does not depend on, of a run's config and of any method's options.
UNRELATED = (
  *('workdir', 'resume', 'checkpoint_every_s', 'tolerance', 'force'),
  *('drop', *REQUESTS, 'delta', 'confidence'),
)


class Job(NamedTuple):
  """What all stages of a run share.

  Attributes:
    config: of the run. folder: its directory.
    images: the data set, of images or of texts (or the features of either). train: its
      training examples, where they are batched: on the device, but texts on the host.
    task: what is learnt. show: whether to draw progress bars.
  """

  config: Config
  folder: Path
  images: data.Dataset | Texts
  train: Tree
  task: tasks.Task
  show: bool = True

  @property
  def inputs(self) -> tuple[jax.Array, ...]:
    """One example as the network reads it: `apply(variables, *inputs)`.

    An image of zeros, [1, height, width, channels]; or tokens and mask [1, length].
    """
    return self.images.example()

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
    return self.images.sampler(key, self.config.batch, augment)

  def held_out(self) -> Iterator[Tree]:
    """Batches of the examples that decisions may look at."""
    return self.batches(self.images.held_out)

  def batches(self, split: Tree) -> Iterator[Tree]:
    """All examples of a split once, for evaluation; 'weight' is 0 on padding."""
    return self.images.batches(split, self.config.batch)

  def relevant(self) -> dict[str, Any]:
    """The part of the config that training depends on."""
    return relevant(self.config.to_json())


def relevant(values: Mapping[str, Any]) -> dict[str, Any]:
  """`Config.to_json()` without what training does not depend on."""
  rest = {k: v for k, v in values.items() if k not in UNRELATED}
  return {k: relevant(v) if isinstance(v, Mapping) else v for k, v in rest.items()}


def prepare(config: Config, show: bool = True) -> Job:
  """Reads the data and makes the run's directory ready.

  Raises: CheckpointError where the directory belongs to a run of another config, and
    DataError as `datasets.read` does.
  """
  images = datasets.read(config)
  task, folder = tasks.of(images), config.path
  job = Job(config, folder, images, images.on_device(), task, show)
  before = folder / 'config.json'
  if not before.is_file():
    return job
  if config.resume:
    stored = json.loads(before.read_text())['config']
    same_config(relevant(stored), job.relevant(), str(folder))
  else:
    for name in ('history.jsonl', 'gates.jsonl', 'costs.json', 'result.json'):
      (folder / name).unlink(missing_ok=True)
    for name in ('checkpoints', 'features', 'cascade'):
      shutil.rmtree(folder / name, ignore_errors=True)
  return job


class Teacher(NamedTuple):
  apply: Callable[..., Any]
  variables: Tree


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
  """
  steps = job.steps(epochs)
  tx = optimizer(job.config, peak, steps)
  batch_at = job.batch_at(name)
  batch = first_batch(batch_at, job.train)
  state = init_state(model, method, tx, variables, coupling, batch)
  keeper = Keeper(job.folder / 'checkpoints' / name, keep=2, config=job.relevant())
  restored = keeper.restore_latest(state)
  if restored is not None:
    state = jax.tree.map(jnp.asarray, restored.state)
  step = make_step(
    model, method, job.task, tx, coupling, teacher.apply if teacher else None
  )
  callbacks = [_historian(job, name), _saver(keeper, job.config)]
  if state.theta:
    callbacks.append(_watch(job, name, method))
  state = fit(
    step,
    state,
    job.key(name),
    batch_at,
    job.train,
    steps=steps,
    every=max(1, min(100, steps // LINES)),
    teacher=teacher.variables if teacher else None,
    callbacks=callbacks,
    label=name,
    show=job.show,
  )
  if steps and steps not in keeper.steps():
    keeper.save(steps, state)
  return state


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


def _historian(job: Job, name: str) -> Callable[[State, Row], None]:
  def write(state: State, row: Row) -> None:
    del state
    line = {'stage': name, 'flops': None, **row, 'step': int(row['step'])}
    record.append(job.folder / 'history.jsonl', line)

  return write


def _saver(keeper: Keeper, config: Config) -> Callable[[State, Row], None]:
  last = time.monotonic()

  def save(state: State, row: Row) -> None:
    nonlocal last
    if time.monotonic() - last >= config.checkpoint_every_s:
      keeper.save(int(row['step']), state)
      last = time.monotonic()

  return save


def _watch(job: Job, name: str, method: Method) -> Callable[[State, Row], None]:
  """Writes what the method has learnt so far."""
  report = jax.jit(method.report)

  def write(state: State, row: Row) -> None:
    learnt = record.plain(report(state.theta))
    line = {'stage': name, 'step': int(row['step']), **learnt}
    record.append(job.folder / 'gates.jsonl', line)

  return write
