"""A stage of a program, what crosses to the next, and which axis counts examples."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import jax

from depthprune.program import axes as ax
from depthprune.program import jaxpr as jx
from depthprune.program.deadcode import dependent
from depthprune.program.view import View

SEVERAL = 2  # examples that are traced to see which axes count them
# Reasons to keep every slice of an axis that do not mix its slices.
APART = ('input', ax.UNIT, 'indexed')


class Crossing(NamedTuple):
  """An array that a later stage needs.

  Attributes:
    shape, dtype: for one example.
    axis: which of its axes counts examples, None where it is the same for all of them.
      Where that axis is a product, as `reshape` builds it, examples vary slowest.
  """

  shape: tuple[int, ...]
  dtype: Any
  axis: int | None


class Stage(NamedTuple):
  """What is computed between the exit before and this one.

  Attributes:
    exit: name of the output that it ends with.
    flops: of one example, 1 MAC = 2 FLOPs; those of all stages add up to the whole.
    params: trainable parameters that no earlier stage has read.
    crossing: what the stages behind it need, of it or of earlier ones.
  """

  exit: str
  flops: int
  params: int
  crossing: tuple[Crossing, ...]

  def __str__(self) -> str:
    arrays = (f'{c.dtype}{list(c.shape)}' for c in self.crossing)
    return (
      f'{self.exit}: {self.flops:,} FLOPs, {self.params:,} parameters; '
      f'then {", ".join(arrays) or "nothing"} crosses'
    )


def batched(inputs: tuple, batch: Any) -> tuple[jax.ShapeDtypeStruct, ...]:
  """The inputs for so many examples, a number or a symbolic size."""
  if not inputs or any(not getattr(x, 'shape', ()) for x in inputs):
    raise ValueError(
      'expected arrays with examples along axis 0 of every input (no dict, no scalar), '
      f'got {[*map(str, inputs)]}'
    )
  return tuple(jax.ShapeDtypeStruct((batch, *x.shape[1:]), x.dtype) for x in inputs)


def counting(view: View, inputs: int) -> set[ax.Axis]:
  """The axes that count examples, from those of the `inputs` last inputs.

  Raises: ValueError where examples are summed over: one would depend on the others."""
  count = {ax.norm(view.facts.dims[v][0]) for v in view.program.inputs[-inputs:]}
  parts = [v for a in count for v in ax.leaves(a)]
  why = {note for v in parts for note in v.notes}
  why |= {pin for v in parts for pin in v.pins if not pin.startswith(APART)}
  why |= set(_summed(view, count))
  if why:
    raise ValueError(
      f'split: examples look at each other ({"; ".join(sorted(why))}), so they cannot '
      'leave one by one; a network is split in evaluation mode: train=False'
    )
  return count


def crossing(view: View, v: jx.Value, count: Iterable[ax.Axis]) -> Crossing:
  """What a value is where it crosses a cut; `view` is of SEVERAL examples.

  Raises: ValueError where examples are told apart, but along no axis."""
  count = set(count)
  data = view.program.inputs[len(view.leaves) :]
  for i, d in enumerate(map(ax.norm, view.facts.dims[v])):
    first = ax.norm(d.parts[0]) if isinstance(d, ax.Prod) else d
    if first in count:
      shape = (*v.shape[:i], v.shape[i] // SEVERAL, *v.shape[i + 1 :])
      return Crossing(shape, v.dtype, i)
  if v not in dependent(view.program, data):
    return Crossing(v.shape, v.dtype, None)
  maker = next((e for e in view.program.equations if v in e.outputs), None)
  unknown = ', '.join(sorted(view.facts.unknown))
  hint = f' (primitives without a rule: {unknown})' if unknown else ''
  raise ValueError(
    f'split: {v.dtype}{list(v.shape)} of {maker.where if maker else "an input"} '
    f'crosses a cut, but no axis of it counts examples{hint}; put the exit elsewhere'
  )


def _summed(view: View, count: set[ax.Axis]) -> Iterator[str]:
  """The contractions that sum over examples, which leave no other trace."""
  for e in jx.walk(view.program):
    if e.name == 'dot_general':
      ((contracted, _), _), axes = e.params['dimension_numbers'], view.facts.dims
      read = [axes[e.inputs[0]][i] for i in contracted]
    elif e.name == 'conv_general_dilated':
      lhs = view.facts.dims[e.inputs[0]]
      read = [lhs[i] for i in e.params['dimension_numbers'].lhs_spec[1:]]
    else:
      continue
    if any(v in count for d in read for v in ax.leaves(d)):
      yield f'summed over by {e.where}'
