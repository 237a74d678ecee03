"""What NetCut lets a user choose."""

import dataclasses
from typing import Annotated, ClassVar, Literal

import tyro

from depthprune.train.options import ConfigError, Epochs, finite, one_of

BY_MODEL = tyro.conf.arg(help_behavior_hint='(default: by model)')


@dataclasses.dataclass(frozen=True)
class NetCut:
  """NetCut: a head on every layer, and the network finds where to stop."""

  beta: float = 0.01
  """Nats of cross-entropy that a unit of cost (one layer) must be worth to be kept."""

  aggregate: Literal['log', 'linear', 'geometric'] = 'log'
  """How the heads' answers are mixed while training; only `log` settles on one."""

  gamma: float = 0.0
  """Share of the mixture's normaliser in the loss of `log` (0: the paper's)."""

  cost: Literal['index', 'flops', 'params', 'milliseconds'] = 'index'
  """What a depth costs, scaled so that the whole network costs its number of heads."""

  tolerance: float = 0.5
  """Points of held-out accuracy that the cut may cost; above it is refused."""

  force: bool = False
  """Cut whatever it costs."""

  importance_learning_rate: float = 1e-3
  """Of the heads' importance (Adam)."""

  pool: Annotated[Literal['max', 'avg', 'cls', 'grid4'] | None, BY_MODEL] = None
  """How a head turns positions into one vector."""

  method: ClassVar[str] = 'netcut'
  heads: ClassVar[bool] = True
  cascades: ClassVar[bool] = False
  round_to: ClassVar[int] = 1
  peaks: ClassVar[tuple[float, float]] = (1.0, 1.0)
  epochs: ClassVar[dict[str, Epochs]] = {
    'digits': Epochs(train=0, gates=200, finetune=0),
    'fashion_mnist': Epochs(train=0, gates=20, finetune=0),
    '': Epochs(train=0, gates=150, finetune=0),
  }

  def __post_init__(self):
    one_of(self, 'aggregate', ('log', 'linear', 'geometric'))
    one_of(self, 'cost', ('index', 'flops', 'params', 'milliseconds'))
    for name in ('beta', 'gamma', 'tolerance'):
      finite(self, name, positive=False)
    finite(self, 'importance_learning_rate', positive=True)
    if self.gamma and self.aggregate != 'log':
      raise ConfigError(
        f'gamma: expected 0 for aggregate {self.aggregate!r}, got {self.gamma:g}'
      )

  @property
  def label(self) -> str:
    gamma = f'-gamma{self.gamma:g}' if self.gamma else ''
    cost = '' if self.cost == 'index' else f'-{self.cost}'
    return f'beta{self.beta:g}-{self.aggregate}{gamma}{cost}'
