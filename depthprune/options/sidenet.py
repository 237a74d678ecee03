"""What SideNet lets a user choose."""

import dataclasses
from typing import Annotated, ClassVar, Literal, get_args

import tyro

from depthprune.train.options import (
  FRACTION,
  ConfigError,
  Epochs,
  at_least,
  finite,
  fraction,
  inside,
  one_of,
)

BY_INPUT = tyro.conf.arg(help_behavior_hint='(default: grid4 of images, avg of tokens)')
SPREAD = tyro.conf.arg(metavar='NAME', help_behavior_hint='(default: five, spread)')
NUMBER = tyro.conf.arg(metavar='NUMBER')

REQUESTS = ('budget', 'milliseconds', 'threshold', 'risk')  # instead of a drop
Confidence = Literal['probability', 'entropy', 'margin', 'patience', 'learned']


@dataclasses.dataclass(frozen=True)
class SideNet:
  """SideNet: small heads on a pretrained network, where sure answers leave early."""

  taps: Annotated[tuple[str, ...], SPREAD] = ()
  """Where heads are put, such as stage1/block5."""

  hidden: int = 256
  """Width of a head's hidden layer."""

  pool: Annotated[Literal['max', 'avg', 'cls', 'grid4'] | None, BY_INPUT] = None
  """How a head turns positions into one vector."""

  regime: Literal['frozen', 'joint', 'mixed'] = 'frozen'
  """frozen: the heads alone are trained (the paper's). joint: all together. mixed:
  frozen, then all together for finetune_epochs."""

  views: int = 2
  """Augmented copies of every image whose features are kept (frozen, mixed)."""

  dropout: float = 0.3
  """Of the heads."""

  smoothing: float = 0.05
  """Of the labels that heads learn from."""

  head_learning_rate: float = 1e-3
  """Of the heads, while nothing else is trained (Adam, cosine)."""

  confidence: Confidence = 'probability'
  """What an exit is judged sure by."""

  drop: float = 0.5
  """Points of accuracy that the cascade which is saved may lose against the network
  alone, as it is after training."""

  budget: Annotated[float | None, FRACTION] = None
  """Save the best cascade for this part of the network's FLOPs, such as 0.6 or 60%,
  instead of by drop."""

  milliseconds: Annotated[float | None, NUMBER] = None
  """Save the best cascade for this time of an example, in full batches, as measured
  here on this device, instead of by drop."""

  threshold: Annotated[float | None, NUMBER] = None
  """Save the cascade with this threshold at every exit, instead of by drop."""

  risk: Annotated[float | None, FRACTION] = None
  """Save the cascade that is wrong where the network is right on at most this part of
  all examples, guaranteed with confidence 1 - delta, instead of by drop."""

  delta: float = 0.05
  """How likely the guarantee may fail."""

  decide_on: Literal['auto', 'train', 'test'] = 'auto'
  """train: thresholds come from images held out of training. test: from the first half
  of the test images, and the second half reports, because pretrained weights may have
  seen all training images. auto: test where weights are pretrained, not trained on."""

  method: ClassVar[str] = 'sidenet'
  heads: ClassVar[bool] = False
  cascades: ClassVar[bool] = True
  round_to: ClassVar[int] = 1
  peaks: ClassVar[tuple[float, float]] = (1.0, 0.1)
  epochs: ClassVar[dict[str, Epochs]] = {
    'digits': Epochs(train=30, gates=30, finetune=20),
    'fashion_mnist': Epochs(train=12, gates=20, finetune=6),
    '': Epochs(train=60, gates=20, finetune=10),
  }

  def __post_init__(self):
    one_of(self, 'regime', ('frozen', 'joint', 'mixed'))
    one_of(self, 'decide_on', ('auto', 'train', 'test'))
    one_of(self, 'confidence', get_args(Confidence))
    at_least(self, 'hidden', 0)
    at_least(self, 'views', 1)
    finite(self, 'drop', positive=False)
    finite(self, 'head_learning_rate', positive=True)
    for name in ('dropout', 'smoothing'):
      inside(self, name, 0, 1)
    for name in ('budget', 'risk', 'delta'):
      if isinstance(value := getattr(self, name), str):
        object.__setattr__(self, name, fraction(value, name))
      if value is not None:
        inside(self, name, 0, 1, open_=True)
    if self.milliseconds is not None:
      finite(self, 'milliseconds', positive=True)
    if self.threshold is not None:
      finite(self, 'threshold', positive=False)
    given = [name for name in REQUESTS if getattr(self, name) is not None]
    if len(given) > 1:
      raise ConfigError(f'{", ".join(given)}: expected one of them, got {len(given)}')

  @property
  def asked(self) -> tuple[str, float]:
    """('drop', points), or one of REQUESTS and its value."""
    given = ((name, getattr(self, name)) for name in REQUESTS)
    return next((one for one in given if one[1] is not None), ('drop', self.drop))

  @property
  def label(self) -> str:
    kind, value = self.asked
    much = 100 * value if kind in ('budget', 'risk') else value
    return f'{self.regime}-{kind}{much:g}-{self.confidence}'
