"""What trainable gates let a user choose."""

import dataclasses
from typing import Annotated, ClassVar, Literal

from depthprune.train.options import (
  FRACTION,
  ConfigError,
  Epochs,
  at_least,
  finite,
  fraction,
  one_of,
)


@dataclasses.dataclass(frozen=True)
class Gates:
  """Trainable gates: which channels may go."""

  target: Annotated[float, FRACTION] = 0.5
  """Part of the network's cost that is to remain: 0.5, or 50%."""

  of: Literal['flops', 'params', 'milliseconds'] = 'flops'
  """The cost that the target counts. 1 MAC = 2 FLOPs; milliseconds are measured on this
  device, layer by layer."""

  latency_batch: int = 128
  """Examples in a call, where the target counts milliseconds."""

  round_to: int = 1
  """Widths become multiples of this, counted in the target (8 suits GPU and TPU)."""

  gate_learning_rate: float = 2e-4
  """Of the gates."""

  strength: float = 200.0
  """Weight of the distance to the target in the loss."""

  method: ClassVar[str] = 'trainable_gates'
  heads: ClassVar[bool] = False
  cascades: ClassVar[bool] = False
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
      object.__setattr__(self, 'target', fraction(self.target, 'target'))
    if not 0 < self.target <= 1:
      raise ConfigError(
        f'target: expected a fraction in (0, 1], got {self.target:g}; '
        'it is the part that remains, so 0.5 (or 50%) halves the network'
      )
    one_of(self, 'of', ('flops', 'params', 'milliseconds'))
    at_least(self, 'latency_batch', 1)
    at_least(self, 'round_to', 1)
    finite(self, 'strength', positive=False)
    finite(self, 'gate_learning_rate', positive=True)

  @property
  def label(self) -> str:
    batch = f'-batch{self.latency_batch}' if self.of == 'milliseconds' else ''
    return f'{self.of}{100 * self.target:g}{batch}'
