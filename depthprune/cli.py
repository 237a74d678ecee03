"""The command line: `depthprune run METHOD ...`, `sweep`, `report`, `models`, ...

What an option means is written once: at its field in `run/config.py`, or in the file of
its method. The library itself is imported when there is work to do, so that `--help`
answers at once.
"""

from __future__ import annotations

import runpy

if __name__ == '__main__':  # `python -m depthprune` handles signals before the imports
  runpy.run_module('depthprune', run_name='__main__', alter_sys=True)

import contextlib
import dataclasses
import glob
import io
import itertools
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Union

import tyro

import depthprune
from depthprune import methods, mistakes
from depthprune.run import interrupts
from depthprune.run.config import OPTIONS, Config, default

WRONG_INPUT = 2
INTERRUPTED, TERMINATED = 130, 143  # as `interrupts.code`
TRY_AGAIN = 75  # EX_TEMPFAIL: the same command continues

EXPORTED = tyro.conf.arg(metavar='DIR', help_behavior_hint='(default: RUN/exported)')
ANY = tyro.conf.arg(metavar='INT', help_behavior_hint='(default: any)')
SEVERAL = tyro.conf.arg(metavar='RUN [RUN ...]', help_behavior_hint='')
ANY_MODEL = tyro.conf.arg(metavar='[MODEL ...]', help_behavior_hint='(default: all)')
ANY_DATA = tyro.conf.arg(
  metavar='[DATA ...]', help_behavior_hint='(default: those that are on this machine)'
)
PER_GPU = tyro.conf.arg(
  metavar='INT', help_behavior_hint='(default: one per GPU; 1 without, or with --mesh)'
)


CONTINUES = 'Interrupted at any moment, the same command continues.'
# Former names of options, which are still read: those of their fields.
FORMERLY = {
  f'--{field}'.replace('_', '-'): f'--{option}'.replace('_', '-')
  for field, option in OPTIONS.items()
}


def _subcommand(name: str) -> Any:
  """METHOD of the command line: a config whose options are those of that method."""
  recipe, word = methods.recipe(name), methods.word(name)
  found = tyro.conf.subcommand(
    word,
    default=default(name),
    prefix_name=False,
    description=f'{recipe.description} {CONTINUES}\n\n{_epochs(recipe)}',
  )
  return Annotated[Config[recipe.options], found]


def _epochs(recipe: methods.Recipe) -> str:
  """Describes how long a method trains by default, for each data set it knows."""
  each = [
    f'{e.train}, {e.gates}, {e.finetune} for {data or "other data"}'
    for data, e in recipe.epochs.items()
  ]
  options = '--pretrain-epochs, --epochs and --finetune-epochs'
  return f'By default, {options} are {"; ".join(each)}.'


_subcommands = tuple(map(_subcommand, sorted(methods.names(), key=methods.word)))
AnyMethod: Any = Union[_subcommands]  # noqa: UP007
# Options that one run has several values of, and the one that METHOD may follow.
LISTS = {
  *('--at-once', '--model-args'),
  *(
    f'--{name}'
    for recipe in methods.all().values()
    for name, value in vars(recipe.options()).items()
    if isinstance(value, tuple)
  ),
}


@dataclasses.dataclass(frozen=True)
class Run:
  """Make a network smaller and faster: train, prune, fine-tune, report."""

  config: AnyMethod  # pyright: ignore[reportInvalidTypeForm]
  """The method, and its options:"""


@dataclasses.dataclass(frozen=True)
class Sweep:
  """Run one method at several settings, and show which are worth having. Options are
  those of run, and any of them may have several values: --target 0.3 0.5 --seed 0 1."""

  config: AnyMethod  # pyright: ignore[reportInvalidTypeForm]
  """The method, and its options:"""

  at_once: Annotated[int | None, tyro.conf.CascadeSubcommandArgs, PER_GPU] = None
  """Runs at the same time, each in a process of its own."""


@dataclasses.dataclass(frozen=True)
class Report:
  """Show what a finished run reached, and write its report.html again; or the front of
  a sweep, and write its report.html and its front.svg again."""

  run: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar='RUN')]
  """Directory that `depthprune run` or `depthprune sweep` wrote."""


@dataclasses.dataclass(frozen=True)
class Compare:
  """Write one page about several finished runs: accuracy against cost, a table that
  sorts, and the charts of the runs side by side."""

  runs: Annotated[tyro.conf.Positional[tuple[Path, ...]], SEVERAL]
  """Directories that `depthprune run` wrote, or `depthprune sweep` for all its runs."""

  to: Path = Path('compare.html')
  """File for the page."""


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


@dataclasses.dataclass(frozen=True)
class Models:
  """List the networks that come with the library, with parameters and FLOPs."""

  names: Annotated[tyro.conf.Positional[tuple[str, ...]], ANY_MODEL] = ()
  """Names of networks."""

  input: tuple[int, ...] = (32, 32, 3)
  """Height, width and channels of an image; or the tokens of a text, for a BERT."""

  classes: int = 10
  """Number of classes."""


@dataclasses.dataclass(frozen=True)
class Data:
  """List the data sets that can be read here, with their sizes; or say of some that are
  named what they hold, or why they cannot be read."""

  names: Annotated[tyro.conf.Positional[tuple[str, ...]], ANY_DATA] = ()
  """Data sets, as --data takes them: a name, a folder or a file."""


COMMANDS: dict[str, type] = {
  'run': Run,
  'sweep': Sweep,
  'report': Report,
  'compare': Compare,
  'export': Export,
  'bench': Bench,
  'models': Models,
  'data': Data,
}
_commands = tuple(
  Annotated[kind, tyro.conf.subcommand(name)] for name, kind in COMMANDS.items()
)
Command: Any = Union[_commands]  # noqa: UP007


def main(words: Sequence[str] | None = None) -> int:
  """Runs one command; returns the exit code.

  0; 2 for input nobody can use; 130 after Ctrl-C, 143 after SIGTERM; and where the same
  command continues, 75 for a disk without room or another process that is gone.
  """
  words = [*_renamed(sys.argv[1:] if words is None else words)]
  try:
    _obey(words)
  except (KeyboardInterrupt, interrupts.Preempted) as stopped:
    _tell(str(stopped) or 'stopped')
    return interrupts.code(stopped)
  except BrokenPipeError:
    # The reader of our output (`| head`) has seen enough; nor shall the exit complain.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
  except Exception as error:
    if not interrupts.is_explained(error):
      raise
    _, given = mistakes.divided(words)
    _tell(f'error: {mistakes.named(str(error), given)}')
    return TRY_AGAIN if isinstance(error, OSError) else WRONG_INPUT
  return 0


def _renamed(words: Iterable[str]) -> Iterator[str]:
  """Yields words in which the former names of options are replaced."""
  for word in words:
    name, equals, value = word.partition('=')
    yield FORMERLY.get(name.replace('_', '-'), name) + equals + value


def _tell(message: object) -> None:
  """Writes a line at once: `print` lets threads that end write before its newline."""
  sys.stderr.write(f'{message}\n')


def _obey(words: Sequence[str]) -> None:
  match words:
    case ['--version']:
      print(f'depthprune {depthprune.__version__}')
      return
    case ['run' | 'sweep' as command, name, *rest] if name in methods.names():
      words = [command, methods.word(name), *rest]
  each = combinations(words) if words[:1] == ['sweep'] else [words]
  command, *more = map(parsed, each)
  if isinstance(command, Report):
    _report(command.run)
  elif isinstance(command, Compare):
    _compare(command)
  elif isinstance(command, Export):
    _export(command)
  elif isinstance(command, Bench):
    _bench(command)
  elif isinstance(command, Models):
    _models(command)
  elif isinstance(command, Data):
    _data(command)
  elif isinstance(command, Sweep):
    _sweep([command, *more])
  elif isinstance(command, Run):
    with _continued(command.config, command.config.path):
      _run(command.config)


@contextmanager
def _continued(config: Config, folder: Path) -> Iterator[None]:
  """Where a run or a sweep is stopped, says whether the same command continues it."""
  again = 'the same command' + ' without --no-resume' * (not config.resume)

  def saved() -> str:
    states = 'checkpoints/*/[0-9]*', '*/checkpoints/*/[0-9]*'
    there = any(glob.glob(state, root_dir=folder) for state in states)
    return f'; {again} continues' if there else ' before anything was saved'

  try:
    with interrupts.ending(saved):
      yield
  except (KeyboardInterrupt, interrupts.Preempted) as stopped:
    if not str(stopped):
      raise
    raise type(stopped)(f'{stopped}; {again} continues from there') from stopped


def combinations(words: Sequence[str]) -> list[list[str]]:
  """The words of every run of a sweep, the last option changing fastest.

  `gates --target 0.3 0.5 --seed 0 1` is four runs: an option with several values stands
  for one run with each of them, several such options for all combinations.
  """
  choices = [
    [[name, value] for value in values]
    if len(values) > 1 and name.startswith('--') and name not in LISTS
    else [[name, *values]]
    for name, *values in _options(words)
  ]
  return [list(itertools.chain(*each)) for each in itertools.product(*choices)]


def _options(words: Sequence[str]) -> Iterator[list[str]]:
  """[name, value, ...] of each option; words before the first one are by themselves."""
  option: list[str] = []
  for word in words:
    if option and (word.startswith('--') or not option[0].startswith('--')):
      yield option
      option = []
    option.append(word)
  if option:
    yield option


def parsed(words: Sequence[str]) -> Any:
  """Returns the command that some words are; raises Mistake if they are none."""
  try:
    return _parse(words)
  except SystemExit as stopped:
    if not stopped.code:  # --help was answered
      raise
  raise mistakes.explained(words, COMMANDS, _error)


def _error(words: Sequence[str]) -> BaseException | None:
  """Returns the exception of the parser that refuses words, if it does."""
  try:
    _parse(words)
  except SystemExit as stopped:
    return stopped
  return None


def _parse(words: Sequence[str]) -> Any:
  with contextlib.redirect_stderr(io.StringIO()):  # `mistakes` says it in fewer lines
    return tyro.cli(
      Command,
      prog='depthprune',
      description='A trained network goes in, a smaller and faster one comes out. '
      '`depthprune --version` prints the version.',
      args=words,
      config=(tyro.conf.OmitArgPrefixes,),
    )


def _run(config: Config) -> None:
  from depthprune import distributed
  from depthprune.run import compilation, rounds

  try:
    distributed.join()
    compilation.keep_programs()
    rounds.run(config)
  except distributed.HostLost:  # it is said when this process has ended, by its witness
    distributed.leave(TRY_AGAIN)
  except (KeyboardInterrupt, interrupts.Preempted):  # in all processes
    distributed.part()
    raise
  if distributed.writes():
    _report(config.path)
    _next(f'report {config.path}', f'export {config.path}')


def _sweep(commands: Sequence[Sweep]) -> None:
  from depthprune.run import sweep

  planned = sweep.plan([command.config for command in commands])
  with _continued(commands[0].config, planned.folder):
    sweep.run(planned, commands[0].at_once)
    _report(planned.folder)
    _next(f'report {planned.folder}')


def _next(*commands: str) -> None:
  print('\n'.join(f'  next: depthprune {command}' for command in commands))


def _report(path: Path) -> None:
  import rich

  from depthprune.report import compare, page, run_files, screen, sweep

  if (path / sweep.SWEEP).exists():
    found = sweep.read(path)
    with run_files.fitting(path):
      shown, drawn = sweep.screen(found), sweep.draw(found, path)
      written = compare.write_sweep(found, path)
    rich.print(shown)
    print(f'\n  {drawn}\n  {written}')
    return
  run = run_files.read(path)
  written = page.write(path)
  with run_files.fitting(path):
    shown = screen.screen(run.result)
  rich.print(shown)
  for note in run.notes:
    print(note)
  print(f'\n  {written}')


def _compare(command: Compare) -> None:
  from depthprune.report import compare

  print(f'  {compare.write(command.runs, command.to)}')


def _export(command: Export) -> None:
  from depthprune.exports import networks
  from depthprune.exports.stablehlo import export
  from depthprune.run.network import of_run

  found = networks.find(command.run, of_run(command.run))
  to = command.to or (found.run or command.run) / 'exported'
  beside = found.folder / networks.TOKENIZER
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
  from depthprune.storage import directory

  result = bench(command.networks, command.batches, command.seconds)
  directory.write(command.to, result)
  rich.print(shown.screen(result))
  print(f'\n  {command.to}')


def _models(command: Models) -> None:
  from depthprune.report.numbers import count
  from depthprune.run.network import sizes

  shape = 'x'.join(map(str, command.input))
  print(f'  {"":20s}  parameters  FLOPs (1 MAC = 2) of an input {shape}')
  for name, found in sizes(command.names, command.input, command.classes):
    if isinstance(found, str):
      print(f'  {name:20s}  {found}')
    else:
      params, flops = found
      print(f'  {name:20s}  {count(params):>10s}  {count(flops):>10s}', flush=True)


def _data(command: Data) -> None:
  from depthprune.run.data import listed

  print(f'  {"":16s}  {"":27s}  classes      train      test')
  for name, known in listed(command.names):
    if isinstance(known, str):
      print(f'  {name:16s}  {known}')
    else:
      what, *numbers = known
      print(f'  {name:16s}  {what:27s}  {{:7,}}  {{:9,}}  {{:8,}}'.format(*numbers))
  if not command.names:
    print('\n  TFDS sets are looked for in $TFDS_DATA_DIR, or ~/tensorflow_datasets.')
