"""The only training loop: steps, log lines, a progress bar, and a check of the loss."""

import itertools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Column

from depthprune.data import batches
from depthprune.data.dataset import inputs_of
from depthprune.program import arguments
from depthprune.train import labels
from depthprune.train.step import USED, State, Step
from depthprune.train.task import Tree

BAR = 10  # characters of a progress bar

Row = dict[str, float]
"""One line of the log: step, loss, the metrics, images_per_second, time in seconds."""


@contextmanager
def bar(
  label: str, start: int, steps: int, show: bool = True
) -> Iterator[Callable[[int, Mapping[str, float]], None]]:
  """Shows a progress bar within the context, whose value is draw(step, row).

  Its line has the whole label, and as much of `describe` as there is room for.
  """
  columns = (
    TextColumn('[bold]{task.description}', table_column=Column(no_wrap=True)),
    BarColumn(bar_width=BAR),
    TextColumn('{task.completed:.0f}/{task.total:.0f}'),
    TimeRemainingColumn(compact=True),
    TextColumn('{task.fields[text]}', table_column=Column(no_wrap=True)),
  )
  with Progress(*columns, disable=not show) as shown:
    label = f'{label:8s}'  # those of most stages stand below each other
    task = shown.add_task(label, completed=start, total=steps, text='compiling')
    taken = len(f'{label}  {steps}/{steps} 0:00:00 ') + BAR
    room = shown.console.width - taken

    def draw(step: int, row: Mapping[str, float]) -> None:
      shown.update(task, completed=step, text=describe(row, room))

    yield draw


def describe(row: Mapping[str, float], room: int = 1000) -> str:
  """Returns 'loss 0.213, accuracy 98.1 %, flops 62 -> 50 %, 2510 images/s'.

  What comes last is left out where that is longer than `room` characters.
  """
  parts = [f'loss {row["loss"]:.3f}']
  if 'accuracy' in row:
    parts.append(f'accuracy {100 * row["accuracy"]:.1f} %')
  costs = ('flops', 'params', 'milliseconds')
  for cost in costs:
    if cost in row:
      goal = f' -> {100 * row["target"]:.0f}' if 'target' in row else ''
      parts.append(f'{cost} {100 * row[cost]:.0f}{goal} %')
  shown = {'step', 'loss', 'accuracy', *costs, 'target', 'time'}
  rest = set(row) - shown - {'images_per_second'}
  parts += [f'{name} {row[name]:.3g}' for name in sorted(rest)]
  if 'images_per_second' in row:
    parts.append(f'{row["images_per_second"]:,.0f} images/s')
  lengths = itertools.accumulate(len(part) + len(', ') for part in parts)
  fit = sum(length <= room + len(', ') for length in lengths)
  return ', '.join(parts[:fit])


class NonFiniteLoss(ArithmeticError):
  """The loss or a parameter became infinite or NaN; the message names the step."""


def fit(
  step: Callable[..., Any],
  state: State,
  key: jax.Array,
  batch_at: Any,
  data: Tree = None,
  *,
  steps: int,
  batch: int = 128,
  every: int = 50,
  teacher: Tree = None,
  callbacks: Sequence[Callable[[State, Row], None]] = (),
  label: str = 'train',
  show: bool = True,
  fused: bool | None = None,
  stopping: Callable[[], bool] = lambda: False,
) -> State:
  """Trains a network up to a number of steps, with log lines and a progress bar.

      step = make_step(model, method, task, tx)
      state = init_state(model, method, tx, variables)
      state = fit(step, state, jax.random.key(0), (x, y), batch=128, steps=1000)

  Random keys, and batches but those of an iterable, depend only on the number of the
  step, so neither `every` nor where a run was resumed changes the result.

  Args:
    step: the training step, from `make_step`.
    state: the state to start from, at any step; it is consumed.
    key: random key, the same for all steps.
    batch_at: what to train on. Arrays, {'image': x, 'label': y} or (x, y), are shuffled
      in every epoch. An iterable of such batches (a list, a loader of PyTorch or Grain,
      a tf.data.Dataset) is gone through again and again. Or a function (data, number of
      the step) -> batch. With `data` it must be traceable;
      without, it is called outside jit. Where steps run one by one, a function with a
      method `stepwise()` is replaced by what that returns; an attribute `on_host` that
      is true says that it can only be called outside jit.
    data: for a function, the training data as arrays on the device, or None.
    steps: the step at which to stop, counted from step 0 and not from state.step.
    batch: examples in a batch of arrays; unused for all else.
    every: steps between two log lines.
    teacher: the teacher's variables, if the step was made with a teacher.
    callbacks: functions (state, row) that are called after every `every` steps, with a
      `Row` of means over these steps. The state is valid until the next step.
    label: name of what is trained, for the progress bar and messages.
    show: whether to draw the progress bar.
    fused: whether `every` steps run as one compiled program, which needs `data`. None
      does so unless batches are made on the host or the device is a CPU, where XLA's
      convolutions inside a loop are far slower (ResNet-20 at 8x8, batch 128, 2 cores:
      2.6 s instead of 0.18 s per step).
    stopping: asked between steps that run one by one. While it returns True, every step
      has a log line of its own, so that a callback can end the training there.

  Returns:
    The state after training.

  Raises:
    NonFiniteLoss: the loss or a parameter is not finite. No callback has seen it.
    DataError: arrays differ in length or are fewer than `batch`; or an iterator has
      ended before the last step.
    ValueError: `fused` is True although batches are made on the host.
  """
  write = 'write fit(step, state, key, data, steps=1000)'
  arguments.function('step', step, 'what make_step returned', write)
  arguments.kind_of('state', state, State, 'the State of init_state', write)
  arguments.alive('state', state, USED)
  arguments.key(key)
  arguments.whole('steps', steps, least=0)
  arguments.whole('every', every)
  start = int(state.step)
  if start >= steps:
    return state
  if not callable(batch_at):
    arguments.whole('batch', batch)
    if isinstance(step, Step) and batches.are_arrays(batch_at):
      arrays = batches.named(batch_at)
      inputs_of(arrays)
      labels.of(arrays)
      step.check(arrays)
    ordering = jax.random.fold_in(key, 0)
    batch_at, data = batches.sampled(batch_at, ordering, batch)
  if fused is None:
    on_device = data is not None and not _on_host(batch_at)
    fused = on_device and jax.default_backend() != 'cpu'
  if fused and _on_host(batch_at):
    raise ValueError(
      f'{label}: batches of {type(batch_at).__name__} are made on the host, so steps '
      'cannot be fused into one program: leave fused=None'
    )
  program = partial(_fused, every) if fused else partial(_one_by_one, stopping)
  advance = program(step, batch_at, state, key, data, teacher)
  clock = time.perf_counter()
  with bar(label, start, steps, show) as draw:
    while start < steps:
      stop = min(start + every - start % every, steps)
      state, log, images, finite = advance(state, key, data, teacher, stop)
      stop = int(state.step)
      log = {k: np.asarray(v)[: stop - start] for k, v in log.items()}
      _check_finite(label, start, log['loss'], finite)
      now = time.perf_counter()
      row = {'step': float(stop), **{k: float(v.mean()) for k, v in log.items()}}
      row |= {'images_per_second': images * (stop - start) / (now - clock)}
      row |= {'time': time.time()}
      for callback in callbacks:
        callback(state, row)
      draw(stop, row)
      start, clock = stop, time.perf_counter()
  return state


def _fused(every, step, batch_at, state, key, data, teacher):
  """Compiles advance(state, key, data, teacher, stop) -> (state, log, images, finite).

  log is {metric: [every]} with one entry per step, of which the first stop - state.step
  are filled; images is the number of examples in a batch.
  """

  def advance(state, key, data, teacher, stop):
    first = state.step

    def body(i, carry):
      state, log = carry
      state, metrics = step(state, batch_at(data, i), key, teacher)
      log = jax.tree.map(lambda row, m: row.at[i - first].set(m), log, metrics)
      return state, log

    one = lambda state: step(state, batch_at(data, first), key, teacher)[1]
    shapes = jax.eval_shape(one, state)
    log = jax.tree.map(lambda s: jnp.zeros((every, *s.shape), s.dtype), shapes)
    state, log = jax.lax.fori_loop(first, stop, body, (state, log))
    return state, log, _finite(state)

  images = _size(jax.eval_shape(batch_at, data, state.step))
  # Compiled here, so that the first line's images per second are of training alone.
  example = (state, key, data, teacher, jnp.zeros((), jnp.int32))
  shardings = jax.tree.map(lambda x: x.sharding, state), None, None  # as before
  program = jax.jit(advance, donate_argnums=0, out_shardings=shardings)
  compiled = program.lower(*example).compile()

  def run(state, key, data, teacher, stop):
    state, log, finite = compiled(state, key, data, teacher, jnp.int32(stop))
    return state, jax.device_get(log), images, bool(finite)

  return run


def _one_by_one(stopping, step, batch_at, state, key, data, teacher):
  """Returns the same function as `_fused`, but every step is dispatched by itself.

  Once stopping() is true, it does no more steps, but one in any case.
  """
  lengths_differ = _on_host(batch_at)  # each length is compiled when it first comes
  if hasattr(batch_at, 'stepwise'):
    batch_at = batch_at.stepwise()
  elif data is not None:
    batch_at = jax.jit(batch_at)
  if data is not None and hasattr(step, 'lower') and not lengths_differ:
    step.lower(state, batch_at(data, int(state.step)), key, teacher).compile()
  finite = jax.jit(_finite)

  def run(state, key, data, teacher, stop):
    rows, images = [], 0
    for i in range(int(state.step), stop):
      if rows and stopping():
        break
      batch = batch_at(data, i)
      images = _size(batch)
      state, metrics = step(state, batch, key, teacher)
      rows.append(metrics)
    log = jax.tree.map(lambda *values: np.stack(values), *jax.device_get(rows))
    return state, log, images, bool(finite(state))

  return run


def first_batch(batch_at: Callable[[Any, Any], Tree], data: Tree) -> Tree:
  """Returns the batch of step 0, as shapes, or as arrays where the host makes them."""
  return batch_at(data, 0) if _on_host(batch_at) else jax.eval_shape(batch_at, data, 0)


def _on_host(batch_at: Any) -> bool:
  return getattr(batch_at, 'on_host', False)


def _size(batch: Tree) -> int:
  if not jax.tree.leaves(batch):
    raise arguments.refused('batch_at', 'to return a batch of arrays', batch)
  return jax.tree.leaves(batch)[0].shape[0]


def _finite(state: State) -> jax.Array:
  trained = jax.tree.leaves((state.params, state.theta))
  return jnp.all(jnp.stack([jnp.isfinite(leaf).all() for leaf in trained]))


def _check_finite(label: str, start: int, losses: np.ndarray, finite: bool) -> None:
  bad = np.flatnonzero(~np.isfinite(losses))
  if finite and not bad.size:
    return
  first = int(bad[0]) if bad.size else len(losses)
  what = f'the loss is {losses[first]}' if bad.size else 'a parameter is not finite'
  step, good = start + first, losses[:first]
  before = f' (the loss was {good[-1]:.4g} one step before)' if good.size else ''
  raise NonFiniteLoss(
    f'{label}: {what} at step {step}{before}; lower the learning rate or the strength '
    'of the penalty, or look for an infinite value in the data. Nothing was saved '
    'after the last good checkpoint'
  )
