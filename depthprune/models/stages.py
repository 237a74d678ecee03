"""Stages of equal blocks: the names of their blocks and taps, unrolled or scanned.

A stage of n blocks has the modules 'block0' to 'block{n-1}'. With `scan`, all blocks
after the first, which may change width or resolution, are one module 'blocks' whose
arrays are stacked along axis 0. Features inside a scan cannot be read, so only its end
is a tap. A network that is a single chain says 'layer' instead of 'block'.
"""

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import flax.linen as nn
import jax

from depthprune.models.arch import Arch, nearest

STACK = 'blocks'  # the module of all blocks of a stage after the first

Parts = list[tuple[str, str, int]]  # module, tap at its end, number of blocks in it


def parts(depth: int, count: int, kind: str) -> Parts:
  """Names the modules of a chain of `depth` equal blocks, in order.

  With a `count`, they are so many equal stacks, 'blocks0', 'blocks1', ...; with 0,
  every block is a module. A block is called a `kind`.
  """
  if not count:
    return [(f'{kind}{i}', f'{kind}{i}', 1) for i in range(depth)]
  length = depth // count
  ends = range(length - 1, depth, length)
  return [(f'{kind}s{i}', f'{kind}{end}', length) for i, end in enumerate(ends)]


class Chain:
  """What modules of networks that are one chain of layers have in common."""

  @property
  def parts(self) -> Parts:
    """The layers and stacks of layers in order; see `parts` and `segments`."""
    raise NotImplementedError

  @property
  def taps(self) -> tuple[str, ...]:
    """The names of the outputs that are features, in order of depth."""
    return tuple(tap for _, tap, _ in self.parts)


class Stacks(Chain):
  """A chain of `depth` layers; with `scan`, of so many `segments`, each one stack.

  Attributes:
    kind: what a layer is called.
  """

  kind: ClassVar[str] = 'layer'
  depth: int
  scan: bool
  segments: int

  @property
  def parts(self) -> Parts:
    """The layers and stacks of layers in order; see `stages.parts`."""
    return parts(self.depth, self.segments if self.scan else 0, self.kind)

  def check_segments(self) -> None:
    """Raises ValueError unless the segments divide the depth."""
    if self.scan and self.depth % self.segments:
      raise ValueError(
        f'{type(self).__name__}: {self.segments} segments do not divide the '
        f'{self.depth} {self.kind}s'
      )


def segments(blocks: int, scan: bool, kind: str = 'block') -> Parts:
  """Names the modules of a stage: its blocks, or the first and a stack of the rest."""
  if not scan:
    return parts(blocks, 0, kind)
  rest = (f'{kind}s', f'{kind}{blocks - 1}', blocks - 1)
  return [(f'{kind}0', f'{kind}0', 1), rest][:blocks]


def taps(stages: Sequence[int], scan: bool) -> tuple[str, ...]:
  """Returns the taps of a network in order, given the number of blocks per stage."""
  return tuple(
    f'stage{i}/{tap}'
    for i, blocks in enumerate(stages, 1)
    for _, tap, _ in segments(blocks, scan)
  )


def up_to(until: str, stages: Sequence[int], scan: bool) -> tuple[int, ...]:
  """Returns the number of blocks per stage up to the tap `until`, or all if it is ''.

  Raises:
    ValueError: there is no such tap.
  """
  if not until:
    return tuple(stages)
  check_tap(until, taps(stages, scan))
  stage, block = until.split('/')
  last = int(stage.removeprefix('stage'))
  return (*stages[: last - 1], int(block.removeprefix('block')) + 1)


def check_tap(tap: str, names: Sequence[str]) -> None:
  """Raises ValueError unless `tap` is one of the taps `names` of a network."""
  if tap not in names:
    raise ValueError(
      f'no tap {tap!r} (a scan has a tap at its end only: unroll it; in models of '
      f'this package scan=False gives one per block). {nearest(tap, names)} All: '
      f'{", ".join(names) or "none"}.'
    )


def repeat(
  block: nn.Module,
  x: jax.Array,
  times: int,
  *args,
  call: Callable = lambda block, x, *args: block(x, *args),
) -> jax.Array:
  """Runs `x` through `times` blocks that each have their own weights, as one scan.

  Parameters, batch statistics and gates of `block` are stacked along axis 0. It keeps
  the shape of `x`; `args` are its further arguments, the same in every call. `call`
  says how a block is applied.
  """
  run = lambda block, x, _, *args: (call(block, x, *args), None)
  return repeat_with(block, x, None, times, *args, call=run)[0]


def repeat_with(
  block: nn.Module, x: jax.Array, states: Any, times: int, *args, call: Callable
) -> tuple[jax.Array, Any]:
  """Runs `x` through blocks as `repeat` does, each of which has a state of its own.

  Args:
    block: the block.
    x: what goes through the blocks.
    states: a tree of arrays [times, ...], or None.
    times: number of blocks.
    *args: further arguments of the block, the same in every call.
    call: (block, x, state of this block, *args) -> (x, its new state).

  Returns:
    x, and the new states [times, ...].
  """
  scan = nn.scan(
    call,
    variable_axes={'params': 0, 'batch_stats': 0, 'branches': 0},
    split_rngs={'params': True, 'dropout': True},
    in_axes=(0, *[nn.broadcast] * len(args)),  # pyright: ignore[reportArgumentType]
    length=times,
  )
  return scan(block, x, states, *args) if times else (x, states)


def layers_left(name: str, arch: Arch) -> int:
  """Returns how many layers of a stack are left; a branch that is gone has no say.

  Args:
    name: of the stack.
    arch: its part of `arch`, with 'attention/branch' and 'mlp/branch'.

  Raises:
    ValueError: the branches leave different numbers of layers.
  """
  left = {arch['attention/branch'], arch['mlp/branch']} - {0}
  if len(left) > 1:
    raise ValueError(
      f'{name}: arch leaves {arch["attention/branch"]} layers of attention/branch and '
      f'{arch["mlp/branch"]} of mlp/branch; expected one number, or 0 for a branch '
      'that is removed from all of them'
    )
  return max(left, default=0)
