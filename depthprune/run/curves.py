"""Curves of a run for TensorBoard and Weights & Biases, beside its history.jsonl.

Both get the lines that are written there, and nothing of the run depends on them: it
may be continued with or without.
"""

import importlib
import importlib.util
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager

from depthprune import distributed
from depthprune.run.config import Config
from depthprune.storage import directory
from depthprune.train.options import ConfigError

PACKAGES = {'tensorboard': 'tensorboardX', 'wandb': 'wandb'}
EVENTS = 'tensorboard'  # folder of the event files, in the directory of a run
ID = 'wandb.json'  # which run of Weights & Biases a directory is

Log = Callable[[str, int, Mapping[str, float]], None]
"""(stage, step, {name: value}) -> None, called for every line of the history."""


def check(config: Config) -> None:
  """Raises ConfigError where an option needs a package that is not installed."""
  for option, package in PACKAGES.items():
    if getattr(config, option) and importlib.util.find_spec(package) is None:
      raise ConfigError(
        f'{option}: the package {package} is not installed: pip install '
        f"'depthprune[{option}]', or leave --{option} out"
      )


@contextmanager
def opened(config: Config) -> Iterator[tuple[Log, ...]]:
  """Opens what the options ask for, and closes it after the run.

  Of several processes only the one that writes has any.
  """
  openers = {'tensorboard': tensorboard, 'wandb': wandb}
  with ExitStack() as stack:
    yield tuple(
      stack.enter_context(opener(config))
      for option, opener in openers.items()
      if getattr(config, option) and distributed.writes()
    )


@contextmanager
def tensorboard(config: Config) -> Iterator[Log]:
  """Writes event files: a curve `STAGE/NAME` for every number and stage."""
  from tensorboardX import SummaryWriter

  with SummaryWriter(str(config.path / EVENTS), flush_secs=10) as writer:

    def log(stage: str, step: int, values: Mapping[str, float]) -> None:
      for name, value in values.items():
        writer.add_scalar(f'{stage}/{name}', value, step)

    yield log


@contextmanager
def wandb(config: Config) -> Iterator[Log]:
  """Sends the same curves to Weights & Biases, to one run for a directory.

  The environment says where to, as for any program: WANDB_MODE, WANDB_PROJECT, ...
  """
  client = importlib.import_module(PACKAGES['wandb'])
  stored = directory.read(config.path / ID)
  if stored is None:
    directory.write(config.path / ID, stored := {'id': uuid.uuid4().hex[:12]})
  names = {**stored, 'name': config.path.name, 'dir': str(config.path)}
  with client.init(resume='allow', config=config.to_json(), **names) as run:
    stages = set()

    def log(stage: str, step: int, values: Mapping[str, float]) -> None:
      if stage not in stages:  # its curves have an axis of their own
        run.define_metric(f'{stage}/*', step_metric=f'{stage}/step')
        stages.add(stage)
      values = {'step': step, **values}
      run.log({f'{stage}/{name}': value for name, value in values.items()})

    yield log
