"""One run, described once: what the command line reads and `config.json` keeps."""

import dataclasses
import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import tyro


class ConfigError(ValueError):
  """A value of the configuration that no run can use: which, got, what to do."""


class Epochs(NamedTuple):
  """Passes over the training images in each stage."""

  train: int
  gates: int
  finetune: int


# Sized so that the stages reach their plateau: seconds for the digits, minutes to an
# hour on a CPU for the TFDS sets at 28x28, an accelerator for the rest.
DIGITS_EPOCHS = Epochs(train=20, gates=20, finetune=15)
FASHION_MNIST_EPOCHS = Epochs(train=12, gates=8, finetune=6)
OTHER_EPOCHS = Epochs(train=60, gates=40, finetune=30)


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
BY_DATA = tyro.conf.arg(metavar='INT', help_behavior_hint='(default: by data set)')
ALL = tyro.conf.arg(metavar='INT', help_behavior_hint='(default: all)')
NAMED = tyro.conf.arg(
  metavar='DIR', help_behavior_hint='(default: runs/METHOD-MODEL-DATA-TARGET-SEED)'
)


@dataclasses.dataclass(frozen=True)
class Config:
  """Train a network, decide what may go, cut it out, fine-tune what is left.

  Raises ConfigError for a value no run can use. Model, data set and method are
  looked up when the run starts, where the nearest names are known.
  """

  method: Annotated[str, tyro.conf.Suppress] = 'gates'
  """How the decision is made (given on the command line as `run METHOD`)."""

  model: str = 'resnet20'
  """Network, by name: resnet20 ... resnet110, vgg16, vgg19, mlp, and so on."""

  data: str = 'digits'
  """digits (comes with scikit-learn), or a TFDS image set found in $TFDS_DATA_DIR."""

  target: Annotated[float, FRACTION] = 0.5
  """Part of the network's cost that is to remain: 0.5, or 50%."""

  of: Literal['flops', 'params'] = 'flops'
  """The cost that the target counts. 1 MAC = 2 FLOPs."""

  round_to: int = 1
  """Widths become multiples of this, counted in the target (8 suits GPU and TPU)."""

  seed: int = 0
  """Of the initial weights, the order of the images, the augmentation."""

  batch: int = 128
  """Images in a training step."""

  train_epochs: Annotated[int | None, BY_DATA] = None
  """Passes over the images before anything is pruned."""

  gate_epochs: Annotated[int | None, BY_DATA] = None
  """Passes while gates and weights are trained together."""

  finetune_epochs: Annotated[int | None, BY_DATA] = None
  """Passes after the cut."""

  learning_rate: float = 0.1
  """Of the weights (SGD, momentum 0.9), at the peak of the schedule."""

  gate_learning_rate: float = 2e-4
  """Of the gates."""

  strength: float = 200.0
  """Weight of the distance to the target in the loss."""

  weight_decay: float = 5e-4
  """Of kernels; a gate that is closed spares its slices from it."""

  distill: bool = False
  """Fine-tune towards the unpruned network's answers as well as the labels."""

  subset: Annotated[int | None, ALL] = None
  """Use only this many training images."""

  scan: bool = False
  """Compile equal blocks once (scan): faster to compile, the same numbers."""

  bfloat16: bool = False
  """Compute in bfloat16; parameters stay float32."""

  checkpoint_every_s: float = 60.0
  """Seconds between checkpoints within a stage."""

  workdir: Annotated[str | None, NAMED] = None
  """Where everything is written."""

  resume: bool = True
  """Continue where an earlier run in the same directory stopped."""

  def __post_init__(self):
    if isinstance(self.target, str):
      object.__setattr__(self, 'target', fraction(self.target))
    if not 0 < self.target <= 1:
      raise ConfigError(
        f'target: expected a fraction in (0, 1], got {self.target:g}; '
        'it is the part that remains, so 0.5 (or 50%) halves the network'
      )
    if self.of not in ('flops', 'params'):
      raise ConfigError(f"of: expected 'flops' or 'params', got {self.of!r}")
    for name in ('train_epochs', 'gate_epochs', 'finetune_epochs', 'seed'):
      _at_least(self, name, 0)
    for name in ('round_to', 'batch', 'subset'):
      _at_least(self, name, 1)
    for name in ('strength', 'weight_decay', 'checkpoint_every_s'):
      _finite(self, name, positive=False)
    for name in ('learning_rate', 'gate_learning_rate'):
      _finite(self, name, positive=True)

  @property
  def epochs(self) -> Epochs:
    """Passes per stage, with the data set's defaults where none were asked for."""
    defaults = {
      'digits': DIGITS_EPOCHS,
      'fashion_mnist': FASHION_MNIST_EPOCHS,
    }.get(self.data, OTHER_EPOCHS)
    asked = (self.train_epochs, self.gate_epochs, self.finetune_epochs)
    return Epochs(
      *(d if a is None else a for a, d in zip(asked, defaults, strict=True))
    )

  @property
  def path(self) -> Path:
    """The run's directory: `workdir`, or one named after what is being run."""
    if self.workdir is not None:
      return Path(self.workdir)
    target = f'{self.of}{100 * self.target:g}'
    return Path('runs') / '-'.join(
      (self.method, self.model, self.data, target, f'seed{self.seed}')
    )

  def to_json(self) -> dict[str, Any]:
    """Plain values, as `config.json` and `result.json` keep them."""
    return dataclasses.asdict(self)


def from_json(values: Mapping[str, Any]) -> Config:
  """The Config whose `to_json()` gave `values`; fields added since get defaults."""
  known = {f.name for f in dataclasses.fields(Config)}
  unknown = sorted(set(values) - known)
  if unknown:
    raise ConfigError(
      f'config: unknown field {", ".join(unknown)}; it was written by another version, '
      f'this one knows {json.dumps(sorted(known))}'
    )
  return Config(**values)


def _at_least(config: Config, name: str, least: int) -> None:
  value = getattr(config, name)
  if value is None:
    return
  if isinstance(value, bool) or not isinstance(value, int) or value < least:
    raise ConfigError(f'{name}: expected a whole number >= {least}, got {value!r}')


def _finite(config: Config, name: str, positive: bool) -> None:
  value = getattr(config, name)
  if not math.isfinite(value) or value < 0 or (positive and value == 0):
    above = '> 0' if positive else '>= 0'
    raise ConfigError(f'{name}: expected a finite number {above}, got {value!r}')
