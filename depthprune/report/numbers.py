"""Numbers and names as text for people, and names in their natural order."""

import math
import re
import statistics
from collections.abc import Iterable


def count(number: float) -> str:
  """Returns `40.6 M` for 40550000, with three significant digits."""
  for unit, scale in (('T', 1e12), ('G', 1e9), ('M', 1e6), ('k', 1e3)):
    if number >= 0.9995 * scale:
      return f'{_three(number / scale)} {unit}'
  return f'{number:g}'


def percent(fraction: float, digits: int = 1) -> str:
  return f'{100 * fraction:.{digits}f} %'


def points(before: float, after: float) -> str:
  """Returns the change of a fraction in percentage points, with its sign."""
  return f'{100 * (after - before):+.2f} points'


def milliseconds(value: float) -> str:
  return f'{_three(value)} ms'


def seconds(value: float) -> str:
  return f'{_three(value)} s'


def _three(value: float) -> str:
  """Returns three significant digits without an exponent."""
  if value <= 0:
    return f'{value:g}'
  rounded = float(f'{value:.3g}')
  return f'{rounded:.{max(0, 2 - math.floor(math.log10(rounded)))}f}'


def in_order(names: Iterable[str]) -> list[str]:
  """Sorts names by the numbers in them: `block2` before `block10`."""
  number = lambda word: (int(word), '') if word.isdigit() else (-1, word)
  return sorted(names, key=lambda name: [number(w) for w in re.split(r'(\d+)', name)])


def spread(values: Iterable[float], digits: int = 2) -> str:
  """Returns '97.10 ± 0.21': the mean and the standard deviation of the sample."""
  values = list(values)
  mean = f'{statistics.mean(values):z.{digits}f}'
  return f'{mean} ± {statistics.stdev(values):.{digits}f}' if len(values) > 1 else mean
