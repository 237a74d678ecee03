"""A sweep: one method at several settings, as ordinary runs in one directory.

Runs that have a stage in common train it once: the checkpoints of the first are copied
to the others, which continue from them and reach the same bits as alone. A sweep that
was stopped continues: finished runs are read, and the others are resumed.

On one device runs follow one another: trained together by `vmap` they were slower on a
CPU (experiments/bench/vmapped.py), and after a cut their shapes differ. With several
GPUs, each run has a process of its own.
"""

import contextlib
import dataclasses
import functools
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from multiprocessing import connection, get_context, resource_tracker
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, NamedTuple

import jax

from depthprune import distributed
from depthprune.run import compilation, interrupts, own, rounds
from depthprune.run.config import TRAIN, UNRELATED, Config, continued, relevant
from depthprune.storage import directory, files
from depthprune.storage.checkpoint import CheckpointError
from depthprune.storage.directory import WriteError
from depthprune.storage.keeper import same_config
from depthprune.train.options import ConfigError, shown

FILE = 'sweep.json'
# The entries of a run's result that are copied into sweep.json.
COPIED = (
  'accuracy', 'held_out', 'flops', 'params', 'latency_ms', 'device', 'wall_seconds',
)  # fmt: skip
WHOLE = 'checkpoints', 'features'  # what equal trainings have in common
FULL = 'RESOURCE_EXHAUSTED'  # XLA's word for a device without memory left
LOGS = 'history.jsonl', 'gates.jsonl'
OUTPUT = 'output.txt'
COUNT = """
import jax
print(jax.local_device_count() if jax.default_backend() == 'gpu' else 1)
"""


class SweepPlan(NamedTuple):
  """The runs of a sweep.

  Attributes:
    folder: directory of the sweep.
    swept: {option: its values}.
    runs: configs of the runs, each with a folder in that of the sweep.
  """

  folder: Path
  swept: dict[str, tuple]
  runs: tuple[Config, ...]


def plan(configs: Sequence[Config]) -> SweepPlan:
  """Plans a sweep over all options in which some configs of one method differ.

  Its folder is their `workdir`, or one named after the options that are swept.

  Raises:
    ConfigError: nothing differs, two configs are the same, or an option differs that
      cannot be swept.
  """
  settings = [_settings(config) for config in configs]
  values = {
    name: tuple(dict.fromkeys(s[name] for s in settings)) for name in settings[0]
  }
  swept = {name: each for name, each in values.items() if len(each) > 1}
  if wrong := [name for name in UNRELATED if name in swept]:
    raise ConfigError(f'{wrong[0]}: expected one for the whole sweep, got {swept}')
  if not swept or len(set(configs)) < len(configs):
    raise ConfigError(
      'sweep: expected an option with several values, each of them once, such as '
      f'--seed 0 1 2, got {swept or "one value of each"}'
    )
  first = configs[0]
  same = [own.word(getattr(first, k)) for k in ('model', 'data') if k not in swept]
  words = ['sweep', first.method, *same, 'over', *swept]
  folder = Path(first.workdir or f'runs/{_name(words)}')
  name = lambda s: _name(f'{option}{shown(s[option])}' for option in swept)
  runs = (
    dataclasses.replace(config, workdir=str(folder / name(setting)))
    for config, setting in zip(configs, settings)
  )
  return SweepPlan(folder, swept, tuple(runs))


def run(
  planned: SweepPlan, at_once: int | None = None, show: bool = True
) -> dict[str, Any]:
  """Finishes all runs of a sweep, and writes sweep.json after each.

  A run that is refused (the target is out of reach, the cut costs too much) is left out
  with the reason.

  Args:
    planned: the sweep.
    at_once: number of runs at the same time. None takes one for each GPU, or one if
      there is no GPU or the runs have a mesh.
    show: whether to draw progress bars.

  Returns:
    The content of sweep.json.

  Raises:
    ConfigError: all runs were refused, or `at_once` is below 1.
    WriteError: the disk is full.
    InUse: a process is alive in the directory of a run that is to begin anew.
    HostError: the sweep was started in several processes.
  """
  if at_once is not None and at_once < 1:
    raise ConfigError(f'at_once: expected a whole number >= 1, got {at_once}')
  runs, refused = planned.runs, {}
  for config in runs:
    if not config.resume:
      directory.empty(config.path)
  missing = [config for config in runs if finished(config) is None]
  for config, error in _attempts(planned, missing, at_once, show):
    if error is not None:
      refused[config.path.name] = error
    print(f'{config.path.name}: {error or "done"}', flush=True)
    _write(planned, refused)
  if len(refused) == len(runs):
    raise ConfigError(f'no run of the sweep was possible: {refused[runs[0].path.name]}')
  return _write(planned, refused)


def attempt(config: Config, runs: Sequence[Config], show: bool) -> str | None:
  """Does one of `runs`, starting from the stages that others have trained.

  Returns:
    None, or why the run is refused or that the device has too little memory.
  """
  inherit(config, runs)
  compilation.keep_programs()
  try:
    rounds.run(config, show)
  except directory.WriteError:
    raise
  except Exception as error:
    if FULL in str(error):
      return str(error).splitlines()[0]
    if not interrupts.is_explained(error):
      raise
    return str(error)
  return None


def finished(config: Config) -> dict[str, Any] | None:
  """Returns the result of a run, None if it is not finished."""
  path = config.path / 'result.json'
  result = directory.read(path)
  if result is None or not isinstance(result.get('config'), dict):
    return None
  config = continued(config, result['config'])
  related = lambda values: {k: v for k, v in values.items() if k not in UNRELATED}
  try:
    same_config(related(result['config']), related(config.to_json()), str(path))
  except CheckpointError:
    return None  # it is that of another run, which `rounds.run` refuses or continues
  return result


def shared(one: Config, other: Config) -> tuple[str, ...]:
  """Returns the folders in the directory of one run that the other can use."""
  a, b = one.to_json(), other.to_json()
  if relevant(a) == relevant(b):
    return WHOLE
  alike = relevant(a, TRAIN) == relevant(b, TRAIN)
  return (f'checkpoints/{TRAIN}',) if alike and one.epochs.train else ()


def inherit(config: Config, runs: Iterable[Config]) -> None:
  """Copies the stages that other runs have trained and this one has not begun."""
  for other in runs:
    for part in shared(config, other) if other != config else ():
      source, to = other.path / part, config.path / part
      if not source.is_dir() or to.exists():
        continue
      for name in LOGS:
        lines = _complete_lines(other.path / name)
        kept = [x for x in lines if part in WHOLE or _stage(x) == TRAIN]
        config.path.mkdir(parents=True, exist_ok=True)
        (config.path / name).write_text(''.join(kept))
      scratch = config.path / '.inherited'
      shutil.rmtree(scratch, ignore_errors=True)
      shutil.copytree(source, scratch, ignore=shutil.ignore_patterns('.*'))
      to.parent.mkdir(exist_ok=True)
      scratch.rename(to)


def ready(config: Config, running: Iterable[Config]) -> bool:
  """Whether no running run is training what this one could inherit."""

  def waits(other: Config) -> bool:
    parts = shared(config, other)
    if all((config.path / part).exists() for part in parts):
      return False
    lines = _complete_lines(other.path / 'history.jsonl')
    return parts == WHOLE or not lines or _stage(lines[-1]) == TRAIN

  return not any(map(waits, running))


def _attempts(
  planned: SweepPlan, missing: Sequence[Config], at_once: int | None, show: bool
) -> Iterator[tuple[Config, str | None]]:
  """Does the missing runs, and yields (run, why it is refused) as they end."""
  runs, wanted = planned.runs, at_once or (1 if planned.runs[0].mesh else len(missing))
  if min(wanted, len(missing)) > 1:
    devices = count_gpus()
    together = min(at_once or devices, len(missing))
    if together > 1:
      work = functools.partial(attempt, runs=runs, show=False)
      yield from run_in_processes(missing, work, together, devices, ready)
      return
  distributed.join()
  if jax.process_count() > 1:
    raise distributed.HostError(
      f'sweep: expected one process, got {jax.process_count()}: it spreads runs over '
      'GPUs itself; for runs over several hosts start `depthprune run` for each'
    )
  for number, config in enumerate(missing, 1):
    print(f'{config.path.name} ({number} of {len(missing)})', flush=True)
    yield config, attempt(config, runs, show)
    jax.clear_caches()  # the next run has other shapes


def _write(planned: SweepPlan, refused: Mapping[str, str]) -> dict[str, Any]:
  """Writes sweep.json and returns its content."""

  def row(config: Config) -> dict[str, Any]:
    settings, result = _settings(config), finished(config)
    return {
      'folder': config.path.name,
      'settings': {name: settings[name] for name in planned.swept},
      'result': result and {k: result[k] for k in COPIED if k in result},
      'refused': refused.get(config.path.name),
    }

  values = {
    'config': planned.runs[0].to_json(),
    'swept': planned.swept,
    'versions': directory.versions(),
    'command': directory.command(),
    'runs': list(map(row, planned.runs)),
  }
  directory.write(planned.folder / FILE, values)
  return values


def _complete_lines(path: Path) -> list[str]:
  """Returns the lines of a file but the last, if a kill has cut that short."""
  lines = path.read_text().splitlines(True) if path.is_file() else []
  return [line for line in lines if line.endswith('\n')]


def _stage(line: str) -> Any:
  """Returns the stage of a line of history.jsonl or gates.jsonl."""
  return files.parsed(line.encode(), dict[str, Any], 'a log', ConfigError).get('stage')


def _settings(config: Config) -> dict[str, Any]:
  """Returns all options of the method and all fields of the config, by name."""
  fields = {k: v for k, v in vars(config).items() if k != 'options'}
  return {**vars(config.options), **fields}


def _name(words: Iterable[str]) -> str:
  return '-'.join(words).replace('/', '_')


# ---- runs in processes of their own --------------------------------------------------


class Busy(NamedTuple):
  """A run in a process of its own, and the connection that receives its answer."""

  config: Config
  slot: int
  process: BaseProcess
  answer: Connection


def count_gpus() -> int:
  """Counts the GPUs in another process, so that this one holds none; at least 1."""
  asked = [sys.executable, '-c', COUNT]
  done = subprocess.run(asked, capture_output=True, text=True, check=True)
  return int(done.stdout.split()[-1])


def run_in_processes(
  runs: Sequence[Config],
  work: Callable[[Config], str | None],
  at_once: int,
  devices: int,
  ready: Callable[[Config, Sequence[Config]], bool],
) -> Iterator[tuple[Config, str | None]]:
  """Does runs in processes of their own, which end when this one is stopped.

  The output of a run is written to `output.txt` in its directory.

  Args:
    runs: the runs to do.
    work: the function of a run that each process calls.
    at_once: number of runs at the same time.
    devices: number of GPUs, which runs share if there are more of them.
    ready: (run, running runs) -> whether the run may begin, called every second.

  Yields:
    (run, the value of work(run), or the exit code of a process that died) as they end.

  Raises:
    WriteError: the disk is full, which ends all runs.
  """
  jax.config.update('jax_platforms', 'cpu')  # the other processes use the GPUs
  waiting, busy = list(runs), []
  with interrupts.deferred() as stopping, _ending(busy):
    while (waiting or busy) and not stopping:
      free = sorted(set(range(at_once)) - {b.slot for b in busy})
      for slot in free:
        running = [b.config for b in busy]
        config = next((c for c in waiting if ready(c, running)), None)
        if config is not None:
          waiting.remove(config)
          busy.append(_begin(config, work, slot, devices, at_once > devices))
      connection.wait([b.process.sentinel for b in busy], timeout=1)
      for ended in [b for b in busy if not b.process.is_alive()]:
        busy.remove(ended)
        yield ended.config, _answer(ended)


def _begin(
  config: Config, work: Callable, slot: int, devices: int, share: bool
) -> Busy:
  context = get_context('spawn')  # jax does not survive a fork
  answer, send = context.Pipe(duplex=False)
  process = context.Process(
    target=_in_process, args=(config, work, slot % devices, share, send)
  )
  # A terminal sends Ctrl-C to all processes, but this one ends the others. They inherit
  # which signals are blocked, and the tracker unblocks some when it starts.
  resource_tracker.ensure_running()
  blocked = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
  try:
    process.start()
  finally:
    signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
  send.close()
  print(f'{config.path.name} begins: {config.path / OUTPUT}', flush=True)
  return Busy(config, slot, process, answer)


def _in_process(
  config: Config, work: Callable, device: int, share: bool, send: Connection
) -> None:
  """Runs in the new process: does the work on one device and sends the answer.

  The process ends by SIGTERM from the first one, also when that has received Ctrl-C.
  """
  for name in ('jax_cuda_visible_devices', 'jax_rocm_visible_devices'):
    jax.config.update(name, str(device))
  if share:
    os.environ['XLA_PYTHON_CLIENT_PREALLOCATE'] = 'false'
  config.path.mkdir(parents=True, exist_ok=True)
  with Path(config.path / OUTPUT).open('a') as file, interrupts.ending():
    for stream in (sys.stdout, sys.stderr):
      os.dup2(file.fileno(), stream.fileno())
    try:
      send.send(work(config))
    except WriteError as error:
      send.send(error)
    except interrupts.Preempted as stopped:
      interrupts.leave(interrupts.code(stopped), f'{stopped}\n')


def _answer(ended: Busy) -> str | None:
  ended.process.join()
  try:
    answer = ended.answer.recv()
  except EOFError:
    where = ended.config.path / OUTPUT
    return f'ended with exit code {ended.process.exitcode}, see {where}'
  if isinstance(answer, WriteError):
    raise answer
  return answer


@contextlib.contextmanager
def _ending(busy: list[Busy]) -> Iterator[None]:
  """Ends all busy processes when the context is left, when they have saved."""
  try:
    yield
  finally:
    for one in busy:
      one.process.terminate()
    for one in busy:
      one.process.join()
