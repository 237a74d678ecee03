"""Stages of equal blocks: the names of their blocks and taps, unrolled or scanned.

A stage of n blocks is `block0` to `block{n-1}`. With `scan` all blocks after the first,
which may change width or resolution, are one module `blocks` whose arrays are stacked
along axis 0. Inside a scan no features can be read, so only its end is a tap. A network
that is one chain has `layer` for `block`.
"""

from collections.abc import Sequence

import flax.linen as nn
import jax

from depthprune.models.arch import nearest

STACK = 'blocks'  # the module that stands for all blocks of a stage after the first


Parts = list[tuple[str, str, int]]  # module, tap at its end, number of blocks in it


def parts(depth: int, count: int, kind: str) -> Parts:
  """A chain of equal blocks: each a module, or all of them in `count` equal stacks.

  count: number of stacks, named `blocks0`, `blocks1`, ...; 0 for none."""
  if not count:
    return [(f'{kind}{i}', f'{kind}{i}', 1) for i in range(depth)]
  length = depth // count
  ends = range(length - 1, depth, length)
  return [(f'{kind}s{i}', f'{kind}{end}', length) for i, end in enumerate(ends)]


def segments(blocks: int, scan: bool, kind: str = 'block') -> Parts:
  """(name of the module, name of the tap at its end, number of blocks in it)."""
  if not scan:
    return parts(blocks, 0, kind)
  rest = (f'{kind}s', f'{kind}{blocks - 1}', blocks - 1)
  return [(f'{kind}0', f'{kind}0', 1), rest][:blocks]


def taps(stages: Sequence[int], scan: bool) -> tuple[str, ...]:
  """The taps of a network, in order; `stages` holds the number of blocks of each."""
  return tuple(
    f'stage{i}/{tap}'
    for i, blocks in enumerate(stages, 1)
    for _, tap, _ in segments(blocks, scan)
  )


def up_to(until: str, stages: Sequence[int], scan: bool) -> tuple[int, ...]:
  """The stages of the network that ends with the tap `until`; all of them if ''."""
  if not until:
    return tuple(stages)
  check_tap(until, taps(stages, scan))
  stage, block = until.split('/')
  last = int(stage.removeprefix('stage'))
  return (*stages[: last - 1], int(block.removeprefix('block')) + 1)


def check_tap(tap: str, names: Sequence[str]) -> None:
  """Raises ValueError unless `tap` is one of the `names` that a trunk has."""
  if tap not in names:
    raise ValueError(
      f'no tap {tap!r} (a scanned segment has one at its end only; scan=False gives '
      f'one per block). {nearest(tap, names)} All: {", ".join(names) or "none"}.'
    )


def repeat(block: nn.Module, x: jax.Array, times: int, *args) -> jax.Array:
  """`x` through `times` blocks, each with its own weights, as one scan.

  The arrays of `block` are stacked along axis 0, its batch statistics and gates too.
  args: what every block is called with behind x, the same for all.
  """
  scan = nn.scan(
    lambda block, x, *args: (block(x, *args), None),
    variable_axes={'params': 0, 'batch_stats': 0, 'branches': 0},
    split_rngs={'params': True, 'dropout': True},
    in_axes=nn.broadcast,  # pyright: ignore[reportArgumentType]
    length=times,
  )
  return scan(block, x, *args)[0] if times else x
