"""What Network Implosion lets a user choose."""

import dataclasses
from typing import Annotated, ClassVar, Literal

import tyro

from depthprune.train.options import Epochs, at_least, one_of

THREE_QUARTERS = tyro.conf.arg(
  metavar='INT', help_behavior_hint='(default: three quarters of them)'
)
ANY = tyro.conf.arg(metavar='NAME', help_behavior_hint='(default: any)')


@dataclasses.dataclass(frozen=True)
class Implosion:
  """Network Implosion: residual units are erased by priority, the rest retrained."""

  depth: Annotated[int | None, THREE_QUARTERS] = None
  """Residual units (or layers of a scanned stack) that are to remain."""

  per_round: int = 1
  """Units erased between two retrainings."""

  importance: Literal['priority', 'drop', 'greedy', 'random'] = 'priority'
  """priority: |w| of a unit (the paper's). drop: held-out loss without it. greedy:
  drop, scored again after every erasure. random: the control."""

  units: Annotated[tuple[str, ...], ANY] = ()
  """Units that may be erased, such as stage1/block3."""

  method: ClassVar[str] = 'implosion'
  heads: ClassVar[bool] = False
  cascades: ClassVar[bool] = False
  round_to: ClassVar[int] = 1
  peaks: ClassVar[tuple[float, float]] = (1.0, 1.0)
  epochs: ClassVar[dict[str, Epochs]] = {
    'digits': Epochs(train=0, gates=20, finetune=8),
    'fashion_mnist': Epochs(train=0, gates=12, finetune=4),
    '': Epochs(train=0, gates=160, finetune=60),
  }

  def __post_init__(self):
    one_of(self, 'importance', ('priority', 'drop', 'greedy', 'random'))
    for name in ('depth', 'per_round'):
      at_least(self, name, 1)

  @property
  def label(self) -> str:
    depth = 'default' if self.depth is None else self.depth
    return f'depth{depth}by{self.per_round}-{self.importance}'
