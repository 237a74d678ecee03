"""Numbers and names as text for people, and names in their natural order."""

import math
import re
import statistics
from collections.abc import Iterable

from depthprune.timing.difference import Difference

NONE = '–'


def not_finite(value: float) -> str:
  """Returns words for a value that has no digits, '' for all others."""
  if math.isnan(value):
    return 'not a number'
  return 'infinite' if math.isinf(value) else ''


def count(number: float) -> str:
  """Returns `40.6 M` for 40550000, with three significant digits."""
  if words := not_finite(number):
    return words
  for unit, scale in (('T', 1e12), ('G', 1e9), ('M', 1e6), ('k', 1e3)):
    if number >= 0.9995 * scale:
      return f'{_three(number / scale)} {unit}'
  return f'{number:g}'


def counted(number: int, noun: str) -> str:
  """Returns `1 example` or `5,000 examples`."""
  return f'{number:,} {noun}{"" if number == 1 else "s"}'


def percent(fraction: float | None, digits: int = 1) -> str:
  """Returns `40.6 %` for 0.406, and a dash for None, which was not measured."""
  if fraction is None:
    return NONE
  return not_finite(fraction) or f'{100 * fraction:z.{digits}f} %'


def kept(part: float) -> str:
  """Returns `40.6 % kept` for 0.406, `3.1 % more` for 1.031, and '' for NaN."""
  if math.isnan(part):
    return ''
  return f'{percent(part - 1)} more' if exceeds(part) else f'{percent(part)} kept'


def exceeds(part: float) -> bool:
  """Returns whether a part is more than the whole, as far as `percent` shows it."""
  return round(100 * (part - 1), 1) > 0


def points(before: float, after: float | None) -> str:
  """Returns the change of a fraction in percentage points, with its sign.

  There is none, '', to or from what was not measured or is not a number.
  """
  if after is None or not math.isfinite(after - before):
    return ''
  return f'{100 * (after - before):+z.2f} points'


def speed(difference: Difference) -> str:
  """Returns `speed-up 1.50 x`, `slowdown 1.59 x`, `no difference`, or ''."""
  if difference.kind == 'not measured':
    return ''
  if difference.kind == 'no difference':
    return difference.kind
  return f'{difference.kind} {difference.factor:.2f} x'


def wilson(share: float, n: int) -> tuple[float, float]:
  """Returns Wilson's 95 % interval of a share of n independent examples."""
  z = 1.96
  middle = (share + z**2 / (2 * n)) / (1 + z**2 / n)
  half = z / (1 + z**2 / n) * math.sqrt(share * (1 - share) / n + z**2 / (4 * n**2))
  return middle - half, middle + half


def milliseconds(value: float) -> str:
  return f'{_three(value)} ms'


def seconds(value: float) -> str:
  return f'{_three(value)} s'


def _three(value: float) -> str:
  """Returns three significant digits without an exponent."""
  if value <= 0 or not math.isfinite(value):
    return not_finite(value) or f'{value:g}'
  rounded = float(f'{value:.3g}')
  return f'{rounded:.{max(0, 2 - math.floor(math.log10(rounded)))}f}'


def in_order(names: Iterable[str]) -> list[str]:
  """Sorts names by the numbers in them: `block2` before `block10`."""
  number = lambda word: (int(word), '') if word.isdigit() else (-1, word)
  return sorted(names, key=lambda name: [number(w) for w in re.split(r'(\d+)', name)])


def spread(values: Iterable[float], digits: int = 2) -> str:
  """Returns '97.10 ± 0.21': the mean and the standard deviation of the sample."""
  values = list(values)
  if words := not_finite(sum(values)):
    return words
  mean = f'{statistics.mean(values):z.{digits}f}'
  return f'{mean} ± {statistics.stdev(values):.{digits}f}' if len(values) > 1 else mean
