"""A program split at its exits: what each stage computes, what crosses each cut.

Stage k is every equation that exit k needs and no earlier exit did. What later stages
need of it crosses the cut: hidden states, in a masked transformer the mask too. Both
are read from the traced program, and so is which axis of what crosses counts examples.

Source: design.md, "Cascades"; prototype/stages.py.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from depthprune.program import axes as ax
from depthprune.program import cost, jaxpr
from depthprune.program import jaxpr as jx
from depthprune.program.axes import Facts, fresh
from depthprune.program.deadcode import dependent
from depthprune.program.trace import View, abstract, look, paths_of, runnable

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


Run = Callable[[Any, Sequence], tuple[Any, list]]
"""(variables, what crossed the cut before) -> (the exit, what crosses the next one);
the first stage gets the inputs."""


@dataclasses.dataclass(frozen=True, eq=False)
class Stages(Sequence[Stage]):
  """What `split` found; a sequence of its stages.

  Attributes:
    fn: the function, of (variables, *inputs). variables, inputs: abstract, one example.
    stages: in order.
    whole: FLOPs of one example for the last exit alone.
    least: examples that stages can run on, at least: 2 where one example crosses the
      cuts otherwise (a broadcast to the batch is nothing then), else 1.
    runs: (batch) -> the stages as functions for so many examples.
    again: (*inputs) -> the stages for inputs of another shape, such as longer texts.
  """

  fn: Callable
  variables: Any
  inputs: tuple
  stages: tuple[Stage, ...]
  whole: int
  least: int
  runs: Callable[[int], tuple[Run, ...]]
  again: Callable[..., Stages]

  def __len__(self) -> int:
    return len(self.stages)

  def __getitem__(self, index):
    return self.stages[index]

  @property
  def exits(self) -> tuple[str, ...]:
    return tuple(stage.exit for stage in self.stages)

  @property
  def flops(self) -> tuple[int, ...]:
    """FLOPs of one example that leaves at each exit: all stages up to there."""
    return tuple(int(n) for n in np.cumsum([stage.flops for stage in self.stages]))

  def explain(self) -> str:
    """The stages, one line each."""
    return '\n'.join(map(str, self.stages))


def split(
  model: Any, variables: Any, *inputs: Any, exits: Sequence[str] = (), **kwargs
) -> Stages:
  """Splits a function that returns a dict of exits.

  model: f(variables, *inputs, **kwargs), or an object with such an `apply`; examples
    lie along axis 0 of every input and do not look at each other.
  variables: its arrays. inputs: examples, arrays or shapes; nothing is computed.
  exits: in order, the last is the deepest. Default: all, by how many equations lead to
    them, 'main' last.

  Raises: ValueError for no dict of two exits or more, for an exit that there is not,
    one that costs nothing after the one before it (as those read from one scan do), a
    function of examples together (train mode), and where what crosses has no axis that
    counts examples; names it."""
  fn = functools.partial(runnable(model), **kwargs) if kwargs else runnable(model)
  variables = jax.eval_shape(lambda v: v, variables)
  known: dict[tuple, Stages] = {}

  def at(*inputs: Any) -> Stages:
    inputs = batched(abstract(inputs), 1)
    key = tuple((x.shape, x.dtype) for x in inputs)
    if key not in known:
      known[key] = _split(fn, variables, inputs, exits, at)
    return known[key]

  return at(*inputs)


def _split(fn: Callable, variables, inputs: tuple, exits, again: Callable) -> Stages:
  one, several = (_view(fn, variables, inputs, n) for n in (1, SEVERAL))
  names = _ordered(one, exits)
  parts, single = _parts(several, names), _parts(one, names)
  count = counting(several, len(inputs))
  crossings = [[crossing(several, v, count) for v in p.outward] for p in parts]
  named = {p for p in one.leaves if p.startswith('params/')}
  trainable = named or {p for p in one.leaves if not p.startswith('branches/')}
  stages, seen = [], set()
  for part, crossed in zip(single, crossings, strict=True):
    read = trainable & {*part.reads}
    sizes = [int(np.prod(one.leaves[p].shape)) for p in read - seen]
    flops = cost.of_program(one, part.program)
    stages.append(Stage(part.exit, flops, sum(sizes), tuple(crossed)))
    seen |= read
  _not_for_nothing(stages)

  @functools.cache
  def runs(batch: int) -> tuple[Run, ...]:
    return tuple(map(_run, _parts(_traced(fn, variables, inputs, batch), names)))

  kinds = lambda parts: [[(v.dtype, len(v.shape)) for v in p.outward] for p in parts]
  least = 1 if kinds(parts) == kinds(single) else SEVERAL
  whole = cost.of_program(one, _upto(one, names[-1]))
  return Stages(fn, variables, inputs, tuple(stages), whole, least, runs, again)


class _Part(NamedTuple):
  """A stage of one traced program; program: (variables read, what crossed) -> (leaves
  of the exit, what crosses)."""

  exit: str
  tree: Any
  program: jx.Program
  reads: tuple[str, ...]
  places: tuple[int, ...]
  outward: tuple[jx.Value, ...]


def _parts(view: View, names: Sequence[str]) -> list[_Part]:
  program, outputs = view.program, view.unpack(view.program.outputs)
  held = {v: i for i, v in enumerate(view.leaves.values())}
  paths = list(view.leaves)
  flat = {name: tuple(jax.tree.leaves(outputs[name])) for name in names}
  done: set[jx.Equation] = set()
  inside = []
  for name in names:
    kept = _upto(view, name).equations
    inside.append([e for e in kept if e not in done])
    done.update(kept)
  made = list(program.inputs[len(held) :])
  crossed, parts = tuple(made), []
  for k, name in enumerate(names):
    equations = inside[k]
    made += [v for e in equations for v in e.outputs]
    later = {v for es in inside[k + 1 :] for e in es for v in e.inputs}
    later |= {v for other in names[k + 1 :] for v in flat[other]}
    outward = tuple(v for v in made if v in later)
    outs = (*flat[name], *outward)
    used = {*outs, *(v for e in equations for v in e.inputs)}
    read = [v for v in held if v in used]
    constants = {v: c for v, c in program.constants.items() if v in used}
    own = jx.Program((*read, *crossed), constants, tuple(equations), outs)
    places = tuple(held[v] for v in read)
    reads, tree = tuple(paths[i] for i in places), jax.tree.structure(outputs[name])
    parts.append(_Part(name, tree, own, reads, places, outward))
    crossed = outward
  return parts


def _run(part: _Part) -> Run:
  def run(variables, crossed):
    leaves = jax.tree.leaves(variables)
    outs = jaxpr.run(part.program, [*(leaves[i] for i in part.places), *crossed])
    n = part.tree.num_leaves
    return jax.tree.unflatten(part.tree, outs[:n]), outs[n:]

  return run


def _view(fn: Callable, variables: Any, inputs: tuple, batch: int) -> View:
  dims = {p: fresh(leaf.shape) for p, leaf in paths_of(variables).items()}
  return look(fn, variables, batched(inputs, batch), {}, dims)


def _traced(fn: Callable, variables: Any, inputs: tuple, batch: Any) -> View:
  """The program alone, its axes not solved: its batch may be symbolic."""
  program, tree = jx.trace(fn, (variables, *batched(inputs, batch)))
  leaves = dict(zip(paths_of(variables), program.inputs, strict=False))
  return View(program, Facts(), leaves, {}, tree, frozenset())


def _ordered(view: View, exits: Sequence[str]) -> tuple[str, ...]:
  outputs = view.unpack(view.program.outputs)
  names = list(outputs) if isinstance(outputs, Mapping) else []
  if len(names) < 2:
    raise ValueError(
      'split: expected a function that returns a dict of two exits or more, got '
      f'{", ".join(names) or "none"}; models.heads.WithHeads puts heads on taps'
    )
  if missing := [name for name in exits if name not in names]:
    raise ValueError(f'split: no exit {missing[0]!r}; there are: {", ".join(names)}')
  if len(exits) == 1 or 'main' in exits[:-1] or len({*exits}) < len(exits):
    raise ValueError(
      "split: expected two different exits or more, 'main' the last of them, got "
      f'{", ".join(exits)}'
    )
  depth = lambda name: (name == 'main', len(_upto(view, name).equations))
  return tuple(exits) or tuple(sorted(names, key=depth))


def _upto(view: View, name: str) -> jx.Program:
  """What one exit needs."""
  outputs = tuple(jax.tree.leaves(view.unpack(view.program.outputs)[name]))
  return jx.lean(dataclasses.replace(view.program, outputs=outputs))


def _not_for_nothing(stages: Sequence[Stage]) -> None:
  for before, stage in itertools.pairwise(stages):
    if not stage.flops:
      raise ValueError(
        f'split: exit {stage.exit} costs nothing after {before.exit}: they are read '
        'from one place, or out of one scan, which always runs to its end; scan only '
        'between exits, or drop one of them'
      )
