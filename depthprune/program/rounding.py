"""The widths that `round_to` allows for a group of channels.

Kernels work on blocks of channels: the lanes of a vector, the tiles of a matrix unit. A
layer of 41 channels takes as long as one of 48, or longer. So widths are multiples of a
number. A number that is asked for holds for every group. With 'auto' it depends on the
device, and on the channels that the group has:

  channels      256 or more   16-255   8-15   fewer
  CPU and GPU        8           8       2      1
  TPU              128           8       2      1

so that there are always several multiples to choose from. A target that is below what
one multiple in every group costs may also leave 1, 2, 4, ... channels of a group, so
that every target can be reached that can be reached without rounding.

This is a table, and nothing is measured: on a busy machine, the times of convolutions
of 40 to 64 channels named another number from one minute to the next, and the same
command would have cut another network.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import jax
import numpy as np

from depthprune.program import arguments

AUTO = 'auto'
FAST = {'tpu': 128}  # by platform; a TPU's matrix unit has 128 columns
OTHERWISE = 8
STEPS = (256, 128), (16, 8), (8, 2), (0, 1)
"""(fewest channels of a group, number): the first such number that is not above that of
the device is what the widths of the group are multiples of."""


class Suited(NamedTuple):
  """What 'auto' stands for on a device, to be used on any.

  Attributes:
    number: what widths are multiples of, in groups that are wide enough.
  """

  number: int


RoundTo = int | Literal['auto'] | Suited
"""What widths are multiples of: a number for every group, or 'auto'."""


def suited(platform: str | None = None) -> Suited:
  """Returns what 'auto' stands for on a platform, by default that of this process.

  Args:
    platform: 'cpu', 'gpu' or 'tpu', as `jax.default_backend` calls them.
  """
  return Suited(FAST.get(platform or jax.default_backend(), OTHERWISE))


def step(round_to: RoundTo, size: int) -> int:
  """Returns the number that the widths of one group are multiples of.

  Args:
    round_to: a number, which is returned, or 'auto'.
    size: channels of the group.
  """
  auto = suited() if round_to == AUTO else round_to
  if not isinstance(auto, Suited):
    return auto
  return next(n for least, n in STEPS if least <= size and n <= auto.number)


def possible(size: int, round_to: RoundTo) -> list[int]:
  """Returns the widths that an axis of `size` can have, narrowest first.

  They are the multiples of a number and the whole axis. A number that was asked for
  allows none below one multiple, and 'auto' allows 1, 2, 4, ... there.
  """
  by = step(round_to, size)
  return sorted({*_narrow(by, round_to), min(by, size), *range(by, size, by), size})


def built(n: Any, size: int, round_to: RoundTo, xp: Any = np) -> Any:
  """Returns the width that is built where n of `size` slices are kept.

  It is the widest of the possible ones that is not above n, or else the narrowest.

  Args:
    n: number of kept slices, an int or an array.
    size: number of slices of the axis.
    round_to: widths are multiples of this, or 'auto'.
    xp: numpy, or jax.numpy for a traced n.
  """
  by = step(round_to, size)
  down = n // by * by
  first, *more = [*_narrow(by, round_to), min(by, size)]
  for width in more:
    first = xp.where(n >= width, width, first)
  return xp.where(n >= size, size, xp.maximum(down, first))


def check(round_to: RoundTo) -> None:
  """Checks that an argument is a number of 1 or more, or 'auto'.

  Raises:
    TypeError: it is neither.
    ValueError: it is below 1.
  """
  if not isinstance(round_to, Suited) and round_to != AUTO:
    arguments.whole('round_to', round_to, write="or write 'auto'")


def _narrow(by: int, round_to: RoundTo) -> list[int]:
  """The widths below one multiple: powers of two, where no number was asked for."""
  auto = isinstance(round_to, Suited) or round_to == AUTO
  return [1 << i for i in range(by.bit_length() - 1)] if auto else []
