"""The accelerator-sized experiments of all methods, most valuable first.

  python -m experiments.run_all --minutes 10

Each call goes on where the last one ended, and says what it did and what is left.
`--left` only says what is left; calls with `--seeds 0` and others may share a device.
TFDS_DATA_DIR says where the data are; an experiment that fails (its data or weights are
not there) is left out, with the reason.
"""

import importlib
import json
import time
import traceback
from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import Any, NamedTuple

from experiments.found import HERE, table
from experiments.pieces import Arguments, arguments

EXPERIMENTS = (
  'trainable_gates.resnet56_cifar10',
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
HEAD = 'experiment', 'rows', 'left', 'device'


class Done(NamedTuple):
  """rows: added by this call. left: rows still missing, None where it failed."""

  rows: int
  left: int | None


def run(experiments: Mapping[str, Any], given: Arguments) -> dict[str, Done]:
  """What each experiment did, in order, until the minutes given are over (0: never).

  experiments: {name: module, or what has a `run` as theirs}.
  """
  end = time.monotonic() + 60 * given.minutes
  done = {}
  for name, module in experiments.items():
    rest = (end - time.monotonic()) / 60
    over = given.left or (given.minutes > 0 and rest <= 0)
    mine = given._replace(full=True, minutes=rest if given.minutes else 0)
    before = rows(name)
    try:
      missing = len(module.run(mine._replace(left=True)))
      if missing and not over:
        print(f'{name}: {missing} rows are left', flush=True)
        missing = len(module.run(mine))
    except Exception:
      traceback.print_exc()
      missing = None
    done[name] = Done(rows(name) - before, missing)
  return done


def rows(name: str) -> int:
  """How many an experiment has."""
  return len(_found(name).get('rows', []))


def said(done: Mapping[str, Done]) -> str:
  """A line for each experiment."""
  number = max(map(len, done))
  left = lambda d: 'failed, see above' if d.left is None else f'{d.left} left'
  lines = (f'{name:{number}}  {d.rows:+3d} rows, {left(d)}' for name, d in done.items())
  return '\n'.join(lines)


def progress() -> str:
  """Which of the experiments have results, for the README; a dash where there are none.

  Rows that depend on others count once these are there.
  """
  done = run(modules(EXPERIMENTS), Arguments(left=True))
  line = lambda name, d: (
    name,
    str(rows(name) or '–'),
    '–' if d.left is None else str(d.left),
    _found(name).get('device', '–'),
  )
  return (
    'The accelerator-sized experiments (`python -m experiments.run_all --minutes 10`), '
    'most valuable first:\n\n' + table(HEAD, [line(*each) for each in done.items()])
  )


def modules(names: Sequence[str]) -> dict[str, ModuleType]:
  return {name: importlib.import_module(f'experiments.{name}') for name in names}


def _found(name: str) -> dict:
  paper, file = name.split('.')
  path = HERE / paper / 'results' / f'{file}_full.json'
  return json.loads(path.read_text()) if path.is_file() else {}


if __name__ == '__main__':
  print(said(run(modules(EXPERIMENTS), arguments(__doc__))))
