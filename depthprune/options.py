"""What each method lets a user choose: one frozen dataclass per method.

A run's `Config` holds one of them. Raises ConfigError for a value that no run can use.
"""

import dataclasses
import math
import re
from typing import Annotated, Any, ClassVar, Literal, NamedTuple

import tyro


class ConfigError(ValueError):
  """A value of the configuration that no run can use: which, got, what to do."""


class Epochs(NamedTuple):
  """Passes over the training images in each stage.

  train: of the plain network, before anything else. gates: of the weights together
  with what the method learns. finetune: after each cut.
  """

  train: int
  gates: int
  finetune: int


def fraction(value: str) -> float:
  """`0.5` and `50%` both read as 0.5; raises ConfigError for anything else."""
  text = str(value).strip()
  number = re.fullmatch(r'([-+.\deE]+)\s*(%?)', text)
  try:
    read = float(number[1]) / (100 if number[2] else 1) if number else math.nan
  except ValueError:
    read = math.nan
  if math.isnan(read):
    raise ConfigError(
      f'target: expected a fraction such as 0.5, or 50%, got {text!r}; '
      'give the part of the network that is to remain'
    )
  return read


# How the command line reads and describes what is more than a plain number.
FRACTION = tyro.constructors.PrimitiveConstructorSpec(
  nargs=1,
  metavar='FRACTION',
  instance_from_str=lambda words: fraction(words[0]),
  is_instance=lambda value: isinstance(value, float),
  str_from_instance=lambda value: [f'{value:g}'],
)
BY_MODEL = tyro.conf.arg(help_behavior_hint='(default: by model)')
THREE_QUARTERS = tyro.conf.arg(
  metavar='INT', help_behavior_hint='(default: three quarters of them)'
)
ANY = tyro.conf.arg(metavar='NAME', help_behavior_hint='(default: any)')


@dataclasses.dataclass(frozen=True)
class Gates:
  """Trainable gates: which channels may go."""

  target: Annotated[float, FRACTION] = 0.5
  """Part of the network's cost that is to remain: 0.5, or 50%."""

  of: Literal['flops', 'params'] = 'flops'
  """The cost that the target counts. 1 MAC = 2 FLOPs."""

  round_to: int = 1
  """Widths become multiples of this, counted in the target (8 suits GPU and TPU)."""

  gate_learning_rate: float = 2e-4
  """Of the gates."""

  strength: float = 200.0
  """Weight of the distance to the target in the loss."""

  method: ClassVar[str] = 'trainable_gates'
  heads: ClassVar[bool] = False
  # Highest learning rate of the gate stage and after the cut, as part of the run's.
  peaks: ClassVar[tuple[float, float]] = (0.5, 0.5)
  # Sized so that the stages reach their plateau: seconds for the digits, minutes to an
  # hour on a CPU for the TFDS sets at 28x28, an accelerator for the rest.
  epochs: ClassVar[dict[str, Epochs]] = {
    'digits': Epochs(train=20, gates=20, finetune=15),
    'fashion_mnist': Epochs(train=12, gates=8, finetune=6),
    '': Epochs(train=60, gates=40, finetune=30),
  }

  def __post_init__(self):
    if isinstance(self.target, str):
      object.__setattr__(self, 'target', fraction(self.target))
    if not 0 < self.target <= 1:
      raise ConfigError(
        f'target: expected a fraction in (0, 1], got {self.target:g}; '
        'it is the part that remains, so 0.5 (or 50%) halves the network'
      )
    one_of(self, 'of', ('flops', 'params'))
    at_least(self, 'round_to', 1)
    finite(self, 'strength', positive=False)
    finite(self, 'gate_learning_rate', positive=True)

  @property
  def label(self) -> str:
    return f'{self.of}{100 * self.target:g}'


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


Options = Gates | NetCut | Implosion
METHODS: dict[str, type] = {kind.method: kind for kind in (Gates, NetCut, Implosion)}


def one_of(values: Any, name: str, known: tuple[str, ...]) -> None:
  if getattr(values, name) not in known:
    expected = ' or '.join(map(repr, known))
    raise ConfigError(f'{name}: expected {expected}, got {getattr(values, name)!r}')


def at_least(values: Any, name: str, least: int) -> None:
  value = getattr(values, name)
  if value is None:
    return
  if isinstance(value, bool) or not isinstance(value, int) or value < least:
    raise ConfigError(f'{name}: expected a whole number >= {least}, got {value!r}')


def finite(values: Any, name: str, positive: bool) -> None:
  value = getattr(values, name)
  if not math.isfinite(value) or value < 0 or (positive and value == 0):
    above = '> 0' if positive else '>= 0'
    raise ConfigError(f'{name}: expected a finite number {above}, got {value!r}')
