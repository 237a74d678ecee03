"""What auxiliary overparameterization lets a user choose."""

import dataclasses
from typing import ClassVar, Literal

from depthprune.train.options import Epochs, at_least, finite, one_of

STRUCTURES = ('all', 'search', 'deep-supervision', 'none')


@dataclasses.dataclass(frozen=True)
class Auxiliary:
  """A wider path beside a compact network, for training alone: dropped afterwards."""

  structure: Literal['all', 'search', 'deep-supervision', 'none'] = 'all'
  """all: every tap feeds the stage of the path that it belongs to. search: or any later
  one, by gates that are trained. deep-supervision: a linear head at the end of every
  stage instead of the path. none: the network alone."""

  weight: float = 1.0
  """Of the path's loss; the network's own counts 1 (the paper's: both 1)."""

  decay: Literal['constant', 'linear', 'cosine'] = 'constant'
  """How that weight goes to zero over the training, if it does."""

  width: int = 64
  """Channels of the path."""

  price: float = 0.005
  """Nats of loss that a connection of mean cost must be worth to stay open (search)."""

  gate_learning_rate: float = 0.02
  """Of the gates (search)."""

  method: ClassVar[str] = 'auxiliary'
  heads: ClassVar[bool] = True
  cascades: ClassVar[bool] = False
  round_to: ClassVar[int] = 1
  peaks: ClassVar[tuple[float, float]] = (1.0, 0.1)
  epochs: ClassVar[dict[str, Epochs]] = {
    'digits': Epochs(train=0, gates=40, finetune=0),
    'fashion_mnist': Epochs(train=0, gates=20, finetune=0),
    '': Epochs(train=0, gates=160, finetune=0),
  }

  def __post_init__(self):
    one_of(self, 'structure', STRUCTURES)
    one_of(self, 'decay', ('constant', 'linear', 'cosine'))
    at_least(self, 'width', 1)
    for name in ('weight', 'price', 'gate_learning_rate'):
      finite(self, name, positive=False)

  @property
  def label(self) -> str:
    decay = '' if self.decay == 'constant' else f'-{self.decay}'
    return f'{self.structure}-weight{self.weight:g}{decay}-width{self.width}'
