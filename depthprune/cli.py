"""The command line: `depthprune run METHOD ...`, `sweep`, `report`, `export`, `bench`.

What an option means is written once, at its field in `config.py`. The library itself is
imported when there is work to do, so that `--help` answers at once.
"""

import dataclasses
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import tyro

from depthprune.run import interrupts as preemption
from depthprune.run.config import Config
from depthprune.run.interrupts import speaks
from depthprune.words import Method, several

WRONG_INPUT = 2
INTERRUPTED, TERMINATED = 130, 143
TRY_AGAIN = 75  # EX_TEMPFAIL: the same command continues

EXPORTED = tyro.conf.arg(metavar='DIR', help_behavior_hint='(default: RUN/exported)')
ANY = tyro.conf.arg(metavar='INT', help_behavior_hint='(default: any)')
SEVERAL = tyro.conf.arg(metavar='RUN [RUN ...]', help_behavior_hint='')
PER_GPU = tyro.conf.arg(
  metavar='INT', help_behavior_hint='(default: one per GPU; 1 without, or with --mesh)'
)


@dataclasses.dataclass(frozen=True)
class Run:
  """Make a network smaller and faster: train, prune, fine-tune, report."""

  config: Method


@dataclasses.dataclass(frozen=True)
class Sweep:
  """Run one method at several settings, and show which are worth having. Options are
  those of run, and any of them may have several values: --target 0.3 0.5 --seed 0 1."""

  config: Method

  at_once: Annotated[int | None, tyro.conf.CascadeSubcommandArgs, PER_GPU] = None
  """Runs at the same time, each in a process of its own."""


@dataclasses.dataclass(frozen=True)
class Report:
  """Show what a finished run reached, and write its report.html again; or the front of
  a sweep, and write its front.svg again."""

  run: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar='RUN')]
  """Directory that `depthprune run` or `depthprune sweep` wrote."""


@dataclasses.dataclass(frozen=True)
class Export:
  """Write a network or a cascade for use without this library: StableHLO for cpu, cuda
  and tpu at any batch size, its arrays as safetensors, and ONNX."""

  run: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar='RUN')]
  """Directory that `depthprune run` wrote, or a folder with a saved network."""

  to: Annotated[Path | None, EXPORTED] = None
  """Folder to write; an earlier export there is replaced."""

  onnx: bool = False
  """As ONNX too: pip install 'depthprune[onnx]'."""

  batch: Annotated[int | None, ANY] = None
  """The only batch size. ONNX of a cascade has one in any case, 1 by default."""


@dataclasses.dataclass(frozen=True)
class Bench:
  """Measure latency and throughput of networks, in turns with what their runs began
  with, beside the most that the device can do, measured in the same process."""

  networks: Annotated[tyro.conf.Positional[tuple[Path, ...]], SEVERAL]
  """Directories that `depthprune run` wrote, or folders with saved networks."""

  batches: tuple[int, ...] = (1, 8, 32, 128)
  """Batch sizes."""

  seconds: float = 2.0
  """To spend on each batch size of each network."""

  to: Path = Path('bench.json')
  """File for the numbers."""


Command = (
  Annotated[Run, tyro.conf.subcommand('run')]
  | Annotated[Sweep, tyro.conf.subcommand('sweep')]
  | Annotated[Report, tyro.conf.subcommand('report')]
  | Annotated[Export, tyro.conf.subcommand('export')]
  | Annotated[Bench, tyro.conf.subcommand('bench')]
)


def main(words: Sequence[str] | None = None) -> int:
  """Runs one command; returns the exit code.

  0; 2 for input nobody can use; and where the same command continues: 130 after Ctrl-C,
  143 after SIGTERM, 75 for a disk without room or another process that is gone.
  """
  try:
    with preemption.ends():
      _obey(sys.argv[1:] if words is None else words)
  except KeyboardInterrupt:
    print('stopped; the same command continues from here', file=sys.stderr)
    return INTERRUPTED
  except preemption.Preempted as stopped:
    print(stopped, file=sys.stderr)
    return TERMINATED
  except BrokenPipeError:
    # The reader of our output (`| head`) has seen enough; nor shall the exit complain.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
  except Exception as error:
    if not speaks(error):
      raise
    print(f'error: {error}', file=sys.stderr)
    return TRY_AGAIN if isinstance(error, OSError) else WRONG_INPUT
  return 0


def _obey(words: Sequence[str]) -> None:
  each = several(words) if words[:1] == ['sweep'] else [words]
  command, *more = map(_parsed, each)
  if isinstance(command, Report):
    _report(command.run)
  elif isinstance(command, Export):
    _export(command)
  elif isinstance(command, Bench):
    _bench(command)
  elif isinstance(command, Sweep):
    _sweep([command, *more])
  elif isinstance(command, Run):
    _run(command.config)


def _parsed(words: Sequence[str]) -> Any:
  return tyro.cli(
    Command,  # pyright: ignore[reportArgumentType]
    prog='depthprune',
    description='A trained network goes in, a smaller and faster one comes out.',
    args=words,
    config=(tyro.conf.OmitArgPrefixes,),
  )


def _run(config: Config) -> None:
  from depthprune import distributed as hosts
  from depthprune import distributed as lost
  from depthprune.run import rounds as recipe

  try:
    recipe.run(config)
  except lost.HostLost:  # it is said when this process has ended, by its witness
    lost.leave(TRY_AGAIN)
  if hosts.writes():
    _report(config.path)


def _sweep(commands: Sequence[Sweep]) -> None:
  from depthprune.run import sweep

  planned = sweep.plan([command.config for command in commands])
  sweep.run(planned, commands[0].at_once)
  _report(planned.folder)


def _report(path: Path) -> None:
  import rich

  from depthprune.report import page
  from depthprune.report import run_files as artifacts
  from depthprune.report import sweep as front
  from depthprune.report import tables as screen

  if (path / front.SWEEP).is_file():
    found = front.read(path)
    rich.print(front.screen(found))
    print(f'\n  {front.draw(found, path)}')
    return
  run = artifacts.read(path)
  written = page.write(path)
  rich.print(screen.screen(run.result))
  for note in run.notes:
    print(note)
  print(f'\n  {written}')


def _export(command: Export) -> None:
  from depthprune.export import networks as saved
  from depthprune.export.stablehlo import export

  found = saved.find(command.run)
  to = command.to or (found.run or command.run) / 'exported'
  beside = found.folder / saved.TOKENIZER
  told = export(
    to,
    found.network,
    found.cascade,
    onnx=command.onnx,
    batch=command.batch,
    tokenizer=beside if beside.is_file() else None,
  )
  for name, program in told['programs'].items():
    files = [program[kind] for kind in ('stablehlo', 'onnx') if kind in program]
    print(f'  {name}: {", ".join(files)}')
  print(f'\n  {to}')


def _bench(command: Bench) -> None:
  import rich

  from depthprune.report import bench as shown
  from depthprune.run.bench import bench
  from depthprune.storage import directory as record

  result = bench(command.networks, command.batches, command.seconds)
  record.write(command.to, result)
  rich.print(shown.screen(result))
  print(f'\n  {command.to}')


if __name__ == '__main__':
  sys.exit(main())
