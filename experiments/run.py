"""Runs the experiments: one, several, or all that have a size for an accelerator.

  python -m experiments.run netcut.mlp_fashion_mnist
  python -m experiments.run sidenet.resnet56_cifar10 --full --seeds 0 1 --minutes 10
  python -m experiments.run --full --minutes 10

An experiment is a function in the configs.py of its paper; its docstring says what it
is and what to expect, and `--about` prints it. Without a name all experiments run, the
most valuable first. Each row is written when it is done, and a row that was interrupted
resumes from the checkpoints of its run, so the same command continues where it stopped.
Processes with different `--seeds` may run side by side. TFDS_DATA_DIR says where the
data are; an experiment that fails, because its data or weights are missing, is reported
and skipped.
"""

import argparse
import contextlib
import dataclasses
import functools
import importlib
import inspect
import json
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax

from depthprune.run.compilation import keep_programs
from depthprune.run.config import Config
from depthprune.run.job import Job
from experiments.result_files import Case, Row, Rows, path_of

SEEDS = 3
BOTH_SIZES = (  # the most valuable first
  'trainable_gates.resnet56_cifar10',
  'implosion.resnet56_distilled',
  'implosion.resnet56_pretrained',
  'netcut.resnet110_cifar10',
  'sidenet.resnet56_cifar10',
  'auxiliary.resnet8_fashion_mnist',
  'auxiliary.segnet_camvid',
  'auxiliary.resnet8_multi_fashion',
  'auxiliary.composed',
  'sidenet.minilm_sst2',
  'sidenet.resnet20_cifar10',
  'netcut.mlp_fashion_mnist',
  'netcut.conv_fashion_mnist',
  'implosion.resnet56_oneshot',
  'implosion.resnet20_fashion_mnist',
  'netcut.vgg19_cifar10',
  'netcut.vit_cifar10',
  'netcut.mlp_cifar10',
  'netcut.conv_cifar10',
  'implosion.resnet56_cifar10',
)
CPU_ONLY = (
  'trainable_gates.digits',
  'trainable_gates.fashion_mnist',
  'trainable_gates.resnet56_half_an_epoch',
  'trainable_gates.resnet20_cifar10',
  'trainable_gates.resnet20_small_drop',
  'trainable_gates.resnet20_ablation',
  'implosion.resnet56_refitted',
  'decoder.smollm2',
  'decoder.healing',
  'decoder.speculation',
  'sidenet.composed',
  'sidenet.resnet56_heads',
  'sidenet.resnet20_heads',
)


class Arguments(NamedTuple):
  """What every experiment is asked.

  Attributes:
    full: The size for an accelerator instead of the one for a CPU.
    minutes: When to stop; 0 is never.
    seeds: Of the rows to add; none means all of the experiment.
    left: Nothing is run, only what is left is counted.
  """

  full: bool = False
  minutes: float = 0
  seeds: tuple[int, ...] = ()
  left: bool = False


Experiment = Callable[[Arguments], list[Case]]
"""Adds the rows that are missing, and returns the cases that are left."""


class Progress(NamedTuple):
  """What one call did: the rows it added, and the cases left, None after a failure."""

  rows: int
  left: list[Case] | None


def find(names: Sequence[str]) -> dict[str, Experiment]:
  """{name: experiment}, where a name is PAPER.FUNCTION.

  Raises:
    ValueError: Where there is no experiment of a name.
  """
  known = experiments()
  if unknown := [name for name in names if name not in known]:
    raise ValueError(
      f'no experiment is called {", ".join(unknown)}; choose from {", ".join(known)}'
    )
  return {name: known[name] for name in names}


def experiments() -> dict[str, Experiment]:
  """All there are: the public functions of every configs.py."""
  files = sorted(Path(__file__).parent.glob('*/configs.py'))
  papers = [path.parent.name for path in files]
  modules = {p: importlib.import_module(f'experiments.{p}.configs') for p in papers}
  return {
    f'{paper}.{name}': function
    for paper, module in modules.items()
    for name, function in inspect.getmembers(module, inspect.isfunction)
    if function.__module__ == module.__name__ and not name.startswith('_')
  }


def run(chosen: Mapping[str, Experiment], arguments: Arguments) -> dict[str, Progress]:
  """Runs experiments in order until the minutes are over; reports those that fail."""
  end = time.monotonic() + 60 * arguments.minutes
  progress = {}
  for name, experiment in chosen.items():
    remaining = (end - time.monotonic()) / 60
    over = arguments.left or (arguments.minutes > 0 and remaining <= 0)
    before = row_count(name, arguments.full)
    try:
      left = experiment(arguments._replace(left=True))
      if left and not over:
        print(f'{name}: {len(left)} rows are left', flush=True)
        minutes = remaining if arguments.minutes else 0
        left = experiment(arguments._replace(minutes=minutes))
    except Exception:
      traceback.print_exc()
      left = None
    progress[name] = Progress(row_count(name, arguments.full) - before, left)
  return progress


def row_count(name: str, full: bool) -> int:
  """How many rows the result file of an experiment has."""
  path = path_of(*name.split('.'), full=full)
  content = json.loads(path.read_text()) if path.is_file() else {}
  return len(content.get('rows', content.get('runs', [])))


def summary(progress: Mapping[str, Progress]) -> str:
  """A line for each experiment; where there is one alone, what is left of it too."""
  width = max(map(len, progress))
  lines = []
  for name, (rows, left) in progress.items():
    outcome = 'failed, see above' if left is None else f'{len(left)} left'
    lines.append(f'{name:{width}}  {rows:+3d} rows, {outcome}')
    if len(progress) == 1:
      lines += [f'  {case}' for case in (left or [])[:5]]
  return '\n'.join(lines)


@contextlib.contextmanager
def within(minutes: float) -> Iterator[None]:
  """Ends the block when the minutes are over, and says how to continue; 0 is never."""

  def stop(signum, frame):
    raise TimeIsUp

  before = signal.signal(signal.SIGALRM, stop)
  signal.setitimer(signal.ITIMER_REAL, 60 * minutes)
  try:
    yield
  except TimeIsUp:
    print(f'stopped after {minutes:g} minutes; the same command goes on from here')
  finally:
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, before)


class TimeIsUp(BaseException):
  """Raised wherever the program is when its minutes are over."""


def fill(
  rows: Rows,
  cases: Callable[[], Iterable[Case]],
  make: Callable[[Case], Mapping[str, Any]],
  arguments: Arguments,
  scratch: Callable[[Case], Path] | None = None,
) -> list[Case]:
  """Adds the rows that are missing, case by case, until the minutes are over.

  Args:
    rows: The result file.
    cases: All cases in order; they may depend on rows that are there.
    make: Computes the rest of the row of a case.
    arguments: What the experiment is asked.
    scratch: The folder of a case that is deleted when its row has been added.

  Returns:
    The cases that are left.
  """
  if not arguments.left:
    with within(arguments.minutes):
      for case in cases():
        if rows.missing(**case):
          rows.add({**case, **make(case)})
          if scratch:
            shutil.rmtree(scratch(case), ignore_errors=True)
  return [case for case in cases() if rows.missing(**case)]


def sized(
  paper: str, name: str, full: Config, small: Mapping[str, Any], arguments: Arguments
) -> tuple[Path, Config]:
  """The result file and the config of an experiment, at the size that is asked for.

  Args:
    paper: The folder of the experiment.
    name: The function in its configs.py.
    full: The config for an accelerator.
    small: What differs from `full` at the size for a CPU.
    arguments: What the experiment is asked.
  """
  path = path_of(paper, name, arguments.full)
  config = full if arguments.full else dataclasses.replace(full, **small)
  return path, dataclasses.replace(config, workdir=f'runs/{paper}/{path.stem}')


def on_unseen(job: Job, deciding: int | None = None) -> Job:
  """The job of a pretrained network, which may have seen all training images.

  The first half of the test images is held out instead, to decide on, and the second
  half reports.

  Args:
    job: The run.
    deciding: How many of the first half; None takes all.
  """
  test = job.images.test
  middle = len(test['label']) // 2
  part = lambda a, b: jax.tree.map(lambda x: x[a:b], test)
  held_out, reported = part(0, min(deciding or middle, middle)), part(middle, None)
  return job._replace(images=job.images._replace(held_out=held_out, test=reported))


def run_folder(config: Config, case: Case) -> Path:
  """The folder of the run of a case, below that of its experiment."""
  return config.path / '-'.join(f'{k}{v}' for k, v in case.items())


def compare(
  path: Path,
  config: Config,
  cases: Sequence[Case],
  make_row: Callable[[Config, Case, list[Row]], Mapping[str, Any]],
  arguments: Arguments,
) -> list[Case]:
  """Fills a result file with a run for every case, seed by seed.

  Args:
    path: The result file.
    config: What all runs share.
    cases: What differs between the runs, apart from the seed.
    make_row: (config of the run, case, rows of its seed) -> the rest of its row.
    arguments: What the experiment is asked.

  Returns:
    The cases that are left.
  """
  rows = Rows(path, config.to_json(), ('seed', *cases[0]))
  seeds = arguments.seeds or range(SEEDS)
  every = [{'seed': seed, **case} for seed in seeds for case in cases]
  folder = functools.partial(run_folder, config)

  def make(case: Case) -> Mapping[str, Any]:
    same_seed = [row for row in rows.rows if row['seed'] == case['seed']]
    own = dataclasses.replace(config, seed=case['seed'], workdir=str(folder(case)))
    return make_row(own, case, same_seed)

  return fill(rows, lambda: every, make, arguments, folder)


def main() -> None:
  """The command line. Exits with 1 where an experiment failed."""
  parser = argparse.ArgumentParser(
    prog='python -m experiments.run',
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  parser.add_argument('names', nargs='*', help='PAPER.EXPERIMENT; default: all')
  parser.add_argument('--full', action='store_true', help='the size for an accelerator')
  parser.add_argument('--minutes', type=float, default=0, help='stop after; 0: never')
  parser.add_argument(
    '--seeds', type=int, nargs='+', default=(), help='of the rows to add; default: all'
  )
  parser.add_argument('--left', action='store_true', help='only say what is left')
  parser.add_argument('--about', action='store_true', help='only say what it is')
  words = parser.parse_args()
  try:
    chosen = find(words.names or BOTH_SIZES)
  except ValueError as error:
    parser.error(str(error))
  if words.about:
    print('\n\n'.join(f'{n}\n\n{inspect.getdoc(f)}' for n, f in chosen.items()))
    return
  if words.full and (small := [name for name in chosen if name in CPU_ONLY]):
    parser.error(f'{", ".join(small)}: there is no other size than that for a CPU')
  keep_programs()
  arguments = Arguments(words.full, words.minutes, tuple(words.seeds), words.left)
  progress = run(chosen, arguments)
  print(summary(progress))
  sys.exit(any(left is None for _, left in progress.values()))


if __name__ == '__main__':
  main()
