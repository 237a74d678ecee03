"""One method at several settings: ordinary runs, in one directory, and what they reach.

Runs that differ only in what comes after a stage train it once: the checkpoints of the
one that did are copied to the others, which go on from them to the bits that they would
reach alone. Whatever is stopped goes on: a finished run is read, another one resumed.

On one device runs follow one another: trained together by `vmap` they were slower on a
CPU (experiments/bench/vmapped.py), and after a cut their shapes differ.
"""

import contextlib
import dataclasses
import functools
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from multiprocessing import connection, get_context
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, NamedTuple

import jax

from depthprune import distributed
from depthprune.run import interrupts, rounds
from depthprune.run.config import TRAIN, Config, relevant
from depthprune.run.interrupts import speaks
from depthprune.storage import directory
from depthprune.storage.checkpoint import CheckpointError
from depthprune.storage.directory import WriteError
from depthprune.storage.keeper import same_config
from depthprune.train.options import ConfigError, shown

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
  with Path(config.path / OUTPUT).open('a') as file, interrupts.ends():
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
  with interrupts.ends():
    try:
      yield
    finally:
      for one in busy:
        one.process.terminate()
      for one in busy:
        one.process.join()


FILE = 'sweep.json'
# How, not what.
ABOUT = 'workdir', 'resume', 'checkpoint_every_s', 'mesh', 'remat', 'workers'
TOLD = 'accuracy', 'held_out', 'flops', 'params', 'latency_ms', 'device', 'wall_seconds'
WHOLE = 'checkpoints', 'features'
FULL = 'RESOURCE_EXHAUSTED'  # XLA, of the memory of a device
LINES = 'history.jsonl', 'gates.jsonl'


class Plan(NamedTuple):
  """folder: of the sweep. swept: {option: its values}. runs: each in a folder of it."""

  folder: Path
  swept: dict[str, tuple]
  runs: tuple[Config, ...]


def plan(configs: Sequence[Config]) -> Plan:
  """The sweep over all options in which the configs of one method differ.

  Its folder is their `workdir`, or one named after what is swept.

  Raises: ConfigError where nothing differs, where two are the same, and for what cannot
    be swept.
  """
  settings = [_settings(config) for config in configs]
  values = {
    name: tuple(dict.fromkeys(s[name] for s in settings)) for name in settings[0]
  }
  swept = {name: found for name, found in values.items() if len(found) > 1}
  if wrong := [name for name in ABOUT if name in swept]:
    raise ConfigError(f'{wrong[0]}: expected one for the whole sweep, got {swept}')
  if not swept or len(set(configs)) < len(configs):
    raise ConfigError(
      'sweep: expected an option with several values, each of them once, such as '
      f'--seed 0 1 2, got {swept or "one value of each"}'
    )
  first = configs[0]
  same = [getattr(first, k) for k in ('model', 'data') if k not in swept]
  words = ['sweep', first.method, *same, 'over', *swept]
  folder = Path(first.workdir or f'runs/{_name(words)}')
  name = lambda s: _name(f'{option}{shown(s[option])}' for option in swept)
  runs = (
    dataclasses.replace(config, workdir=str(folder / name(found)))
    for config, found in zip(configs, settings)
  )
  return Plan(folder, swept, tuple(runs))


def run(planned: Plan, at_once: int | None = None, show: bool = True) -> dict[str, Any]:
  """Finishes all runs, and writes sweep.json after each: what it returns.

  at_once: runs at the same time; by default one for each GPU, and one where there is
    none or where runs have a mesh. A run that is refused (a target out of reach, a cut
    that costs too much) is left out, with the reason.

  Raises: ConfigError where all are refused; WriteError where there is no room, InUse
    where one is alive that should begin anew; HostError in one of several processes.
  """
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
  """One of `runs`, with what others have trained already; why not, if it is refused
  or needs more memory than the device has."""
  inherit(config, runs)
  try:
    rounds.run(config, show)
  except directory.WriteError:
    raise
  except Exception as error:
    if FULL in str(error):
      return str(error).splitlines()[0]
    if not speaks(error):
      raise
    return str(error)
  return None


def finished(config: Config) -> dict[str, Any] | None:
  """The result of a run, if it is there."""
  path = config.path / 'result.json'
  result = directory.read(path)
  if result is None:
    return None
  what = lambda values: {k: v for k, v in values.items() if k not in ABOUT}
  try:
    same_config(what(result['config']), what(config.to_json()), str(path))
  except CheckpointError:
    return None  # of another run: what begins there says so, or decides anew
  return result


def shared(one: Config, other: Config) -> tuple[str, ...]:
  """What in the directory of one run serves the other as it is."""
  a, b = one.to_json(), other.to_json()
  if relevant(a) == relevant(b):
    return WHOLE
  alike = relevant(a, TRAIN) == relevant(b, TRAIN)
  return (f'checkpoints/{TRAIN}',) if alike and one.epochs.train else ()


def inherit(config: Config, runs: Iterable[Config]) -> None:
  """Copies what other runs have trained, of what this one has not begun, and says so
  in its history."""
  for other in runs:
    for part in shared(config, other) if other != config else ():
      source, to = other.path / part, config.path / part
      if not source.is_dir() or to.exists():
        continue
      for name in LINES:
        lines = _lines(other.path / name)
        kept = [x for x in lines if part in WHOLE or json.loads(x)['stage'] == TRAIN]
        config.path.mkdir(parents=True, exist_ok=True)
        (config.path / name).write_text(''.join(kept))
      scratch = config.path / '.inherited'
      shutil.rmtree(scratch, ignore_errors=True)
      shutil.copytree(source, scratch, ignore=shutil.ignore_patterns('.*'))
      to.parent.mkdir(exist_ok=True)
      scratch.rename(to)


def ready(config: Config, running: Iterable[Config]) -> bool:
  """Whether no run that goes on is training what this one could inherit."""
  return not any(_waits(config, other) for other in running)


def _waits(config: Config, other: Config) -> bool:
  parts = shared(config, other)
  if all((config.path / part).exists() for part in parts):
    return False
  lines = _lines(other.path / 'history.jsonl')
  return parts == WHOLE or not lines or json.loads(lines[-1])['stage'] == TRAIN


def _attempts(
  planned: Plan, missing: Sequence[Config], at_once: int | None, show: bool
) -> Iterator[tuple[Config, str | None]]:
  """(run, why it is refused) of those that are missing, as they end."""
  runs, wanted = planned.runs, at_once or (1 if planned.runs[0].mesh else len(missing))
  if min(wanted, len(missing)) > 1:
    devices = gpus()
    many = min(at_once or devices, len(missing))
    if many > 1:
      work = functools.partial(attempt, runs=runs, show=False)
      yield from over(missing, work, many, devices, ready)
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


def _write(planned: Plan, refused: Mapping[str, str]) -> dict[str, Any]:
  found = {
    'config': planned.runs[0].to_json(),
    'swept': planned.swept,
    'versions': directory.versions(),
    'command': directory.command(),
    'runs': [_row(planned, config, refused) for config in planned.runs],
  }
  directory.write(planned.folder / FILE, found)
  return found


def _row(planned: Plan, config: Config, refused: Mapping[str, str]) -> dict[str, Any]:
  settings, result = _settings(config), finished(config)
  return {
    'folder': config.path.name,
    'settings': {name: settings[name] for name in planned.swept},
    'result': result and {k: result[k] for k in TOLD if k in result},
    'refused': refused.get(config.path.name),
  }


def _lines(path: Path) -> list[str]:
  """Those that are whole."""
  lines = path.read_text().splitlines(True) if path.is_file() else []
  return [line for line in lines if line.endswith('\n')]


def _settings(config: Config) -> dict[str, Any]:
  of = lambda values: {
    f.name: getattr(values, f.name) for f in dataclasses.fields(values)
  }
  values = of(config)
  return {**of(values.pop('options')), **values}


def _name(words: Iterable[str]) -> str:
  return '-'.join(words).replace('/', '_')
