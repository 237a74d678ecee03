"""Runs at the same time, each in a process of its own, over the GPUs that there are."""

import contextlib
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from multiprocessing import connection, get_context
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import NamedTuple

import jax

from depthprune.config import Config
from depthprune.training import preemption
from depthprune.training.disk import WriteError

OUTPUT = 'output.txt'
Work = Callable[[Config], str | None]
COUNT = """
import jax
print(jax.local_device_count() if jax.default_backend() == 'gpu' else 1)
"""


class Busy(NamedTuple):
  config: Config
  slot: int
  process: BaseProcess
  told: Connection


def gpus() -> int:
  """GPUs that jax sees, at least 1; another process asks: this one must hold none."""
  asked = [sys.executable, '-c', COUNT]
  done = subprocess.run(asked, capture_output=True, text=True, check=True)
  return int(done.stdout.split()[-1])


def over(
  runs: Sequence[Config],
  work: Work,
  many: int,
  devices: int,
  ready: Callable[[Config, Sequence[Config]], bool],
) -> Iterator[tuple[Config, str | None]]:
  """(run, what work(run) returned) as they end, at most `many` at the same time.

  Several share a GPU where there are more than `devices`. What they print is in
  `output.txt` of a run's directory; of a process that died the exit code is returned.
  A disk that is full ends all: WriteError.
  ready(run, running): whether the run may begin beside these, asked every second.
  This process ends all of them when it is stopped.
  """
  jax.config.update('jax_platforms', 'cpu')  # the GPUs are the others'
  waiting, busy = list(runs), []
  with _ending(busy):
    while waiting or busy:
      free = sorted(set(range(many)) - {b.slot for b in busy})
      for slot in free:
        running = [b.config for b in busy]
        config = next((c for c in waiting if ready(c, running)), None)
        if config is not None:
          waiting.remove(config)
          busy.append(_begun(config, work, slot, devices, many))
      connection.wait([b.process.sentinel for b in busy], timeout=1)
      for ended in [b for b in busy if not b.process.is_alive()]:
        busy.remove(ended)
        yield ended.config, _answer(ended)


def _begun(config: Config, work: Work, slot: int, devices: int, many: int) -> Busy:
  context = get_context('spawn')  # jax does not survive a fork
  told, tell = context.Pipe(duplex=False)
  shared = many > devices
  given = config, work, slot % devices, shared, tell
  process = context.Process(target=_alone, args=given)
  process.start()
  tell.close()
  print(f'{config.path.name} begins: {config.path / OUTPUT}', flush=True)
  return Busy(config, slot, process, told)


def _alone(config: Config, work: Work, device: int, shared: bool, tell: Connection):
  """What a process of its own does."""
  for name in ('jax_cuda_visible_devices', 'jax_rocm_visible_devices'):
    jax.config.update(name, str(device))
  if shared:
    os.environ['XLA_PYTHON_CLIENT_PREALLOCATE'] = 'false'
  config.path.mkdir(parents=True, exist_ok=True)
  with Path(config.path / OUTPUT).open('a') as file, preemption.ends():
    for stream in (sys.stdout, sys.stderr):
      os.dup2(file.fileno(), stream.fileno())
    try:
      tell.send(work(config))
    except WriteError as error:
      tell.send(error)


def _answer(ended: Busy) -> str | None:
  ended.process.join()
  try:
    told = ended.told.recv()
  except EOFError:
    where = ended.config.path / OUTPUT
    return f'ended with exit code {ended.process.exitcode}, see {where}'
  if isinstance(told, WriteError):
    raise told
  return told


@contextlib.contextmanager
def _ending(busy: list[Busy]) -> Iterator[None]:
  """Ends all that are busy, however this ends; SIGTERM is an end as any other."""
  with preemption.ends():
    try:
      yield
    finally:
      for one in busy:
        one.process.terminate()
      for one in busy:
        one.process.join()
