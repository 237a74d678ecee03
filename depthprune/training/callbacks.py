"""What a stage does every few steps: a line of history, a checkpoint, the gates."""

import threading
import time
from collections.abc import Callable
from pathlib import Path

import jax

from depthprune.training import hosts, record
from depthprune.training.keeper import Keeper
from depthprune.training.method import Method
from depthprune.training.preemption import Preempted
from depthprune.training.step import State
from depthprune.training.train import Row

Callback = Callable[[State, Row], None]


def historian(folder: Path, stage: str) -> Callback:
  """Writes a line of history.jsonl."""

  def write(state: State, row: Row) -> None:
    del state
    line = {'stage': stage, 'flops': None, **row, 'step': int(row['step'])}
    record.append(folder / 'history.jsonl', line)

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
    due, ends = hosts.anywhere(due and hosts.writes(), told.is_set())
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
      **record.plain(report(state.theta)),
    }
    record.append(folder / 'gates.jsonl', line)

  return write
