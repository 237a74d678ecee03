"""Runs the experiments behind the claims at the top of docs/results.md.

  python -m experiments.claims --minutes 60
  python -m experiments.claims --full --at-once 4 --minutes 14

The most valuable rows come first. Each is written when it is done, and one that was
interrupted resumes from its checkpoints, so the same command continues where it
stopped. Several run at once, each in a process of its own, where the device has room;
on a CPU each has its share of the cores, as one network does not keep several busy.
`python -m experiments.tables` then writes the page.
"""

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor

from experiments.run import BOTH_SIZES, Arguments, find, run, summary

ON_A_CPU = (  # the most valuable first
  'trainable_gates.resnet56_cifar10',
  'trainable_gates.resnet20_cifar10',
  'trainable_gates.resnet20_small_drop',
  'implosion.resnet56_distilled',
  'sidenet.resnet56_cifar10',
  'sidenet.resnet20_cifar10',
  'auxiliary.segnet_camvid',
  'netcut.mlp_fashion_mnist',
  'sidenet.minilm_sst2',
  'trainable_gates.resnet20_ablation',
)
Unit = tuple[str, int]
"""An experiment, by name, and a seed: what one process runs."""


def units(full: bool) -> list[Unit]:
  """What has rows left, in the order in which it is to run."""
  progress = run(find(BOTH_SIZES if full else ON_A_CPU), Arguments(full, left=True))
  cases = [(name, case) for name, (_, left) in progress.items() for case in left or []]
  return [*dict.fromkeys((name, case['seed']) for name, case in cases)]


def work(left: Iterable[Unit], full: bool, minutes: float, at_once: int) -> None:
  """Runs units in order, several at once, until the minutes are over; 0 is never."""
  end = time.monotonic() + 60 * minutes
  environment = dict(os.environ)
  if at_once > 1:  # they share the memory of an accelerator
    environment.setdefault('XLA_PYTHON_CLIENT_PREALLOCATE', 'false')

  def one(unit: Unit) -> None:
    name, seed = unit
    remaining = (end - time.monotonic()) / 60 if minutes else 0.0
    if minutes and remaining < 0.01:
      return
    words = [name, '--seeds', str(seed), '--minutes', f'{remaining:.3f}']
    command = [sys.executable, '-m', 'experiments.run', *words, *['--full'] * full]
    subprocess.run(command, env=environment, check=False)

  own_cores = None
  if hasattr(os, 'sched_getaffinity'):  # not on a Mac
    shares = iter(split(sorted(os.sched_getaffinity(0)), at_once))
    # A process inherits the cores of the thread that starts it.
    own_cores = lambda: os.sched_setaffinity(0, next(shares))
  with ThreadPoolExecutor(at_once, initializer=own_cores) as pool:
    list(pool.map(one, left))


def split(cores: Sequence[int], parts: int) -> list[set[int]]:
  """The cores of each process; where there are too few, processes share them."""
  if parts > len(cores):
    return [{cores[i % len(cores)]} for i in range(parts)]
  return [set(cores[i::parts]) for i in range(parts)]


def main() -> None:
  """The command line."""
  parser = argparse.ArgumentParser(
    prog='python -m experiments.claims',
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  parser.add_argument('--full', action='store_true', help='the size for an accelerator')
  parser.add_argument('--minutes', type=float, default=0, help='stop after; 0: never')
  parser.add_argument('--at-once', type=int, default=1, help='processes side by side')
  words = parser.parse_args()
  if words.at_once < 1:
    parser.error(f'--at-once: expected at least 1, got {words.at_once}')
  work(units(words.full), words.full, words.minutes, words.at_once)
  names = BOTH_SIZES if words.full else ON_A_CPU
  print(summary(run(find(names), Arguments(words.full, left=True))))


if __name__ == '__main__':
  main()
