"""Values of a run's configuration: how they are read, checked and refused."""

import math
import re
from typing import Any, NamedTuple

import tyro

STRONGEST = 30  # largest magnitude of RandAugment


class ConfigError(ValueError):
  """A value of the configuration cannot be used; the message names it."""


class Epochs(NamedTuple):
  """Passes over the training images in each stage, or parts of one.

  Attributes:
    train: of the plain network, before anything else.
    gates: of the weights together with what the method learns.
    finetune: after each cut.
  """

  train: float
  gates: float
  finetune: float


def fraction(value: str, name: str = 'value') -> float:
  """Reads `0.5` and `50%` as 0.5; raises ConfigError for anything else."""
  text = str(value).strip()
  number = re.fullmatch(r'([-+.\deE]+)\s*(%?)', text)
  try:
    read = float(number[1]) / (100 if number[2] else 1) if number else math.nan
  except ValueError:
    read = math.nan
  if math.isnan(read):
    raise ConfigError(f'{name}: expected a fraction such as 0.5, or 50%, got {text!r}')
  return read


# How the command line reads and describes an optional fraction.
FRACTION = tyro.constructors.PrimitiveConstructorSpec(
  nargs=1,
  metavar='FRACTION',
  instance_from_str=lambda words: fraction(words[0]),
  is_instance=lambda value: value is None or isinstance(value, float),
  str_from_instance=lambda value: ['none' if value is None else f'{value:g}'],
)

# How the command line describes the names that are left whole.
PATTERNS = tyro.conf.arg(metavar='PATTERN', help_behavior_hint='(default: none)')


# How the command line describes what widths are multiples of.
MULTIPLES = tyro.conf.arg(metavar='{auto,INT}')


def axes(text: str) -> tuple[int | None, int]:
  """Reads the axes (data, model) of a mesh, such as 'data=4,model=2'.

  The size of data is None, for all devices that are left, where no number is given.

  Raises:
    ConfigError: the text has another form, or names an axis twice.
  """
  pattern = r'(data|model)=([1-9]\d*)|(data)'
  parts = [re.fullmatch(pattern, word.strip()) for word in text.split(',')]
  sizes = {m[1] or m[3]: int(m[2]) if m[2] else None for m in parts if m}
  if len(sizes) < len(parts):
    raise ConfigError(
      f'mesh: expected data=N, data=N,model=M, or data alone for all devices, got '
      f'{text!r}'
    )
  return sizes.get('data'), sizes.get('model') or 1


def one_of(values: Any, name: str, known: tuple[str, ...]) -> None:
  """Checks that a field of a dataclass is one of the known words."""
  if getattr(values, name) not in known:
    expected = ' or '.join(map(repr, known))
    raise ConfigError(f'{name}: expected {expected}, got {getattr(values, name)!r}')


def at_least(values: Any, name: str, least: int) -> None:
  """Checks that a field of a dataclass is None or a whole number >= `least`."""
  value = getattr(values, name)
  if value is None:
    return
  if isinstance(value, bool) or not isinstance(value, int) or value < least:
    raise ConfigError(f'{name}: expected a whole number >= {least}, got {value!r}')


def finite(values: Any, name: str, positive: bool) -> None:
  """Checks that a field is a finite number >= 0, or > 0 where `positive`."""
  value = getattr(values, name)
  is_number = isinstance(value, int | float) and not isinstance(value, bool)
  if not (is_number and 0 <= value < math.inf) or (positive and value == 0):
    above = '> 0' if positive else '>= 0'
    raise ConfigError(f'{name}: expected a finite number {above}, got {value!r}')


def inside(
  values: Any, name: str, least: float, most: float, open_: bool = False
) -> None:
  """Checks that a field is in [least, most), or in (least, most) where `open_`."""
  value = getattr(values, name)
  if not least <= value < most or (open_ and value == least):
    raise ConfigError(
      f'{name}: expected a number in {"(" if open_ else "["}{least:g}, {most:g}), got '
      f'{value!r}'
    )


def shown(value: Any) -> str:
  """Returns a setting as a word."""
  return f'{value:g}' if isinstance(value, float) else str(value)
