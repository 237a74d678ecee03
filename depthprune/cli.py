"""The command line: `depthprune run METHOD ...`, `report`, `export` and `bench`.

What an option means is written once, at its field in `config.py`. The library itself is
imported when there is work to do, so that `--help` answers at once.
"""

import dataclasses
import os
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import tyro

from depthprune.config import RECIPES, Config
from depthprune.options import Auxiliary, Gates, Implosion, NetCut, SideNet
from depthprune.training import preemption

WRONG_INPUT = 2
INTERRUPTED, TERMINATED = 130, 143
TRY_AGAIN = 75  # EX_TEMPFAIL: the same command continues

EXPORTED = tyro.conf.arg(metavar='DIR', help_behavior_hint='(default: RUN/exported)')
ANY = tyro.conf.arg(metavar='INT', help_behavior_hint='(default: any)')
SEVERAL = tyro.conf.arg(metavar='RUN [RUN ...]', help_behavior_hint='')
CONTINUES = 'Interrupted at any moment, the same command continues.'


def _method(word: str, file: str, description: str):
  return tyro.conf.subcommand(
    word,
    default=RECIPES[file],
    prefix_name=False,
    description=f'{description} {CONTINUES}',
  )


GATES = _method(
  'gates',
  'trainable_gates',
  'Train a network, learn with trainable gates which channels may go, cut them out, '
  'fine-tune the small network that remains, and report.',
)
NETCUT = _method(
  'netcut',
  'netcut',
  'Train a network with a head on every layer, let it find the layer to stop at, cut '
  'it there, and report.',
)
IMPLOSION = _method(
  'implosion',
  'implosion',
  'Train a residual network with a priority on every unit, erase the least important, '
  'retrain, and so on down to the depth that was asked for, and report.',
)
SIDENET = _method(
  'sidenet',
  'sidenet',
  'Put small heads on a pretrained network, find out how sure each must be, and save '
  'the cascade in which sure answers leave early, and report.',
)
AUXILIARY = _method(
  'auxiliary',
  'auxiliary',
  'Train a compact network beside a wider path that reads it everywhere, drop the '
  'path, and report.',
)
Method = (
  Annotated[Config[Gates], GATES]
  | Annotated[Config[NetCut], NETCUT]
  | Annotated[Config[Implosion], IMPLOSION]
  | Annotated[Config[SideNet], SIDENET]
  | Annotated[Config[Auxiliary], AUXILIARY]
)


@dataclasses.dataclass(frozen=True)
class Run:
  """Make a network smaller and faster: train, prune, fine-tune, report."""

  config: Method


@dataclasses.dataclass(frozen=True)
class Report:
  """Show what a finished run reached, and write its report.html again."""

  run: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar='RUN')]
  """Directory that `depthprune run` wrote."""


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
      command = tyro.cli(
        Command,  # pyright: ignore[reportArgumentType]
        prog='depthprune',
        description='A trained network goes in, a smaller and faster one comes out.',
        args=words,
        config=(tyro.conf.OmitArgPrefixes,),
      )
      if isinstance(command, Report):
        _report(command.run)
      elif isinstance(command, Export):
        _export(command)
      elif isinstance(command, Bench):
        _bench(command)
      elif isinstance(command, Run):
        _run(command.config)
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
    if not _meant_for_the_reader(error):
      raise
    print(f'error: {error}', file=sys.stderr)
    return TRY_AGAIN if isinstance(error, OSError) else WRONG_INPUT
  return 0


def _run(config: Config) -> None:
  from depthprune.training import hosts, lost, recipe

  try:
    recipe.run(config)
  except lost.HostLost:  # it is said when this process has ended, by its witness
    lost.leave(TRY_AGAIN)
  if hosts.writes():
    _report(config.path)


def _report(path: Path) -> None:
  import rich

  from depthprune.report import artifacts, page, tables

  run = artifacts.read(path)
  written = page.write(path)
  rich.print(tables.screen(run.result))
  for note in run.notes:
    print(note)
  print(f'\n  {written}')


def _export(command: Export) -> None:
  from depthprune.inference import saved
  from depthprune.inference.export import export

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

  from depthprune.inference.bench import bench
  from depthprune.report import bench as shown
  from depthprune.training import record

  result = bench(command.networks, command.batches, command.seconds)
  record.write(command.to, result)
  rich.print(shown.screen(result))
  print(f'\n  {command.to}')


def _meant_for_the_reader(error: Exception) -> bool:
  """Whether the message says it all, or the traceback is needed to find a mistake.

  Errors of our own classes, and a ValueError that our own code raises, name what was
  given, what was expected and what to do. What comes from below is a mistake of ours.
  """
  if type(error).__module__.split('.')[0] == 'depthprune':
    return True
  frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
  raised_in = frames[-1].f_globals.get('__name__', '') if frames else ''
  return isinstance(error, ValueError) and raised_in.split('.')[0] == 'depthprune'


if __name__ == '__main__':
  sys.exit(main())
