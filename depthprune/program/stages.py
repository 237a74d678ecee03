"""A network split at its exits: what each stage computes, and what crosses each cut.

Stage k is every equation that exit k needs and no earlier exit does. What later stages
need of these values crosses the cut: hidden states, and in a masked transformer the
mask too. Both are read from the traced program, as is the axis along which an array
that crosses counts examples.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from depthprune.program import axes as ax
from depthprune.program import cost, modules, rules
from depthprune.program import jaxpr as jx
from depthprune.program.arguments import listed
from depthprune.program.deadcode import dependent
from depthprune.program.trace import (
  View,
  batched,
  counts_examples,
  look,
  paths_of,
  split_arrays,
)

SEVERAL = 2  # examples that are traced to find the axes that count them
# Pins of an axis whose slices are nevertheless computed independently.
APART = ('input', ax.UNIT, 'indexed')


class Crossing(NamedTuple):
  """An array that a later stage needs.

  Attributes:
    shape: shape for one example.
    dtype: type of its elements.
    axis: which of its axes counts examples; None where the array is the same for all of
      them. Where that axis is a product, as `reshape` builds it, examples vary slowest.
  """

  shape: tuple[int, ...]
  dtype: Any
  axis: int | None


class Stage(NamedTuple):
  """The part of a network between the previous exit and this one.

  Attributes:
    exit: name of the output that it ends with.
    flops: FLOPs of one example, where 1 MAC = 2 FLOPs.
    params: trainable parameters that no earlier stage has read.
    crossing: the arrays that later stages need from this stage or earlier ones.
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


"""(variables, what crossed the cut before) -> (the exit, what crosses the next one);
the first stage gets the inputs."""


@dataclasses.dataclass(frozen=True, eq=False)
class Stages(Sequence[Stage]):
  """A network split at its exits, as `split` returns it; a sequence of `Stage`.

  `print(stages.explain())` shows the stages. `cascade` runs them.

  Attributes:
    fn: the network, a function of (variables, *inputs).
    variables: its variables, a tree of ShapeDtypeStruct.
    inputs: the inputs of one example, trees of ShapeDtypeStruct; those that count
      examples are [1, ...], others are shared by all examples.
    counts: whether axis 0 of each array of the inputs counts examples.
    stages: the stages in order.
    whole: FLOPs of one example that is answered by the last exit alone.
    least: the smallest batch that stages can run on: 2 where the arrays that cross the
      cuts differ for a single example (a broadcast over the batch disappears then),
      else 1.
    runs: (batch) -> one function per stage for that many examples. Each maps
      (variables, what crossed the previous cut) to (the exit, what crosses the next
      one); the first gets the inputs.
    again: (*inputs) -> the Stages for inputs of another shape, such as longer texts.
  """

  fn: Callable
  variables: Any
  inputs: tuple
  counts: tuple[bool, ...]
  stages: tuple[Stage, ...]
  whole: int
  least: int
  runs: Callable[[int], tuple[Callable, ...]]
  again: Callable[..., Stages]

  def __len__(self) -> int:
    return len(self.stages)

  def __getitem__(self, index):
    return self.stages[index]

  def examples(self, inputs: Any) -> Any:
    """Returns how many examples there are in arrays of the form of the inputs."""
    return np.shape(jax.tree.leaves(inputs)[self.counts.index(True)])[0]

  @property
  def exits(self) -> tuple[str, ...]:
    """Names of the exits in order."""
    return tuple(stage.exit for stage in self.stages)

  @property
  def flops(self) -> tuple[int, ...]:
    """FLOPs of one example that leaves at each exit: all stages up to there."""
    return tuple(int(n) for n in np.cumsum([stage.flops for stage in self.stages]))

  def explain(self) -> str:
    """Returns the stages as text, one line each."""
    return '\n'.join(map(str, self.stages))


def split(
  model: Any, variables: Any, *inputs: Any, exits: Sequence[str] = (), **kwargs
) -> Stages:
  """Splits a network that returns a dict of exits into one stage per exit.

  Args:
    model: a linen module, or a function of (variables, *inputs, **kwargs). Its examples
      do not influence each other.
    variables: its arrays or ShapeDtypeStructs.
    *inputs: trees of arrays or ShapeDtypeStructs with examples along axis 0. Those of
      another first size than the outputs, scalars and keys are shared by all examples.
    exits: names of the exits to split at, in order; the last is the deepest. By default
      all of them, in the order of how many equations lead to them, 'main' last.
    **kwargs: further arguments of the call, such as train=False. An array among them
      stays as it is, so it must not count examples.

  Returns:
    The Stages.

  Raises:
    ValueError: the model returns no dict of two exits or more; an exit is unknown or
      costs nothing after the previous one (as those read from one scan do); examples
      influence each other (as in train mode); or an array that crosses a cut has no
      axis that counts examples. The message names the exit or the array.
  """
  modules.checked_call(model, variables, inputs)
  exits = (exits,) if isinstance(exits, str) else exits
  fn = functools.partial(modules.runnable(model), **kwargs)
  variables = jax.eval_shape(lambda v: v, variables)
  # A number among the inputs is a scalar: it may be another one in the next call.
  shapes = functools.partial(jax.eval_shape, lambda inputs: inputs)
  example = shapes(inputs)
  batched(example, 1)  # refuses what has no examples at all
  with modules.explained(variables, inputs):
    outputs = jax.eval_shape(fn, variables, *example)
  counts = counts_examples(example, outputs)
  _check_named(kwargs, example, counts)
  known: dict[tuple, Stages] = {}

  def at(*inputs: Any) -> Stages:
    inputs = batched(shapes(inputs), 1, counts)
    leaves, tree = jax.tree.flatten(inputs)
    key = (tree, *((x.shape, x.dtype) for x in leaves))
    if key not in known:
      known[key] = _split(fn, variables, inputs, counts, exits, at)
    return known[key]

  return at(*inputs)


def _check_named(kwargs: Mapping, example: tuple, counts: Sequence[bool]) -> None:
  """Refuses arrays by keyword that count examples: stages run at any batch size."""
  leaves = zip(jax.tree.leaves(example), counts, strict=True)
  examples = next((x.shape[0] for x, c in leaves if c), None)
  for name, value in kwargs.items():
    for x in split_arrays(value)[0]:
      if isinstance(x, jax.ShapeDtypeStruct) or (*x.shape, None)[0] == examples:
        raise ValueError(
          f'split: {name} is an array by keyword, {x.dtype}{list(x.shape)}: make it '
          f'an input, as in lambda v, x, {name}: model.apply(v, x, {name}={name})'
        )


def _split(
  fn: Callable, variables, inputs: tuple, counts: tuple, exits, again: Callable
) -> Stages:
  def view(batch: int) -> View:
    dims = {p: ax.fresh(leaf.shape) for p, leaf in paths_of(variables).items()}
    return look(fn, variables, batched(inputs, batch, counts), {}, dims)

  one, several = view(1), view(SEVERAL)
  names = _ordered(one, exits)
  parts, single = _parts(several, names), _parts(one, names)
  data = several.program.inputs[len(several.leaves) :]
  data = [v for v, c in zip(data, counts, strict=True) if c]
  counting = _counting(several, data)
  varies = dependent(several.program, data)
  crossings = [
    [_crossing(several, v, counting, v in varies) for v in p.outward] for p in parts
  ]
  named = {p for p in one.leaves if p.startswith('params/')}
  trainable = named or {p for p in one.leaves if not p.startswith('branches/')}
  paths, stages = list(one.leaves), []
  seen: set[str] = set()
  for part, crossed in zip(single, crossings, strict=True):
    new = trainable & {paths[i] for i in part.places} - seen
    sizes = [int(np.prod(one.leaves[p].shape)) for p in new]
    flops = cost.of_program(one, part.program)
    if stages and not flops:
      raise ValueError(
        f'split: exit {part.exit} costs nothing after {stages[-1].exit}: they are read '
        'from one place, or out of one scan, which always runs to its end; scan only '
        'between exits, or drop one of them'
      )
    stages.append(Stage(part.exit, flops, sum(sizes), tuple(crossed)))
    seen |= new

  @functools.cache
  def runs(batch: int) -> tuple[Callable, ...]:
    # Axes are not solved here, so `batch` may be a symbolic size.
    program, tree = jx.trace(fn, (variables, *batched(inputs, batch, counts)))
    leaves = dict(zip(paths_of(variables), program.inputs, strict=False))
    view = View(program, ax.Facts(), leaves, {}, tree, frozenset())
    return tuple(functools.partial(_run, part) for part in _parts(view, names))

  kinds = lambda parts: [[(v.dtype, len(v.shape)) for v in p.outward] for p in parts]
  least = 1 if kinds(parts) == kinds(single) else SEVERAL
  whole = cost.of_program(one, one.upto(names[-1]))
  stages = tuple(stages)
  return Stages(fn, variables, inputs, counts, stages, whole, least, runs, again)


class _Part(NamedTuple):
  """A stage of one traced program.

  Attributes:
    exit: name of the exit.
    tree: structure of the exit.
    program: (variables read, what crossed) -> (leaves of the exit, what crosses).
    places: positions of the variables that are read among all variables.
    outward: the values that cross the next cut.
  """

  exit: str
  tree: Any
  program: jx.Program
  places: tuple[int, ...]
  outward: tuple[jx.Value, ...]


def _parts(view: View, names: Sequence[str]) -> list[_Part]:
  program, outputs = view.program, view.unpack(view.program.outputs)
  held = {v: i for i, v in enumerate(view.leaves.values())}
  flat = {name: tuple(jax.tree.leaves(outputs[name])) for name in names}
  done: set[jx.Equation] = set()
  inside = []
  for name in names:
    kept = view.upto(name).equations
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
    parts.append(_Part(name, jax.tree.structure(outputs[name]), own, places, outward))
    crossed = outward
  return parts


def _run(part: _Part, variables: Any, crossed: Sequence) -> tuple[Any, list]:
  leaves = jax.tree.leaves(variables)
  read = (leaves[i] for i in part.places)
  outs = jx.run(part.program, [*read, *jax.tree.leaves(crossed)])
  n = part.tree.num_leaves
  return jax.tree.unflatten(part.tree, outs[:n]), outs[n:]


def _counting(view: View, data: Sequence[jx.Value]) -> set[ax.Axis]:
  """The axes that count examples: axis 0 of the inputs `data` of the program."""
  count = {ax.norm(view.facts.dims[v][0]) for v in data}
  parts = [v for a in count for v in ax.leaves(a)]
  why = {note for v in parts for note in v.notes}
  why |= {pin for v in parts for pin in v.pins if not pin.startswith(APART)}
  for e in jx.walk(view.program):  # sums over examples leave no other trace
    if e.name == 'dot_general':
      ((read, _), _) = e.params['dimension_numbers']
    elif e.name == 'conv_general_dilated':
      read = e.params['dimension_numbers'].lhs_spec[1:]
    elif e.name in rules.NORMS:
      read = e.params['axes']
    else:
      continue
    lhs = view.facts.dims[e.inputs[0]]
    if any(v in count for i in read for v in ax.leaves(lhs[i])):
      why.add(f'summed over by {e.where}')
  if why:
    raise ValueError(
      f'split: examples look at each other ({listed(sorted(why), 3)}), so they cannot '
      'leave one by one; a network is split in evaluation mode: train=False'
    )
  return count


def _crossing(
  view: View, v: jx.Value, counting: set[ax.Axis], varies: bool
) -> Crossing:
  """Describes a value that crosses a cut, in a view of SEVERAL examples.

  `varies` says whether it depends on an input that counts examples.
  """
  for i, d in enumerate(map(ax.norm, view.facts.dims[v])):
    first = ax.norm(d.parts[0]) if isinstance(d, ax.Prod) else d
    if first in counting:
      shape = (*v.shape[:i], v.shape[i] // SEVERAL, *v.shape[i + 1 :])
      return Crossing(shape, v.dtype, i)
  if not varies:
    return Crossing(v.shape, v.dtype, None)
  maker = next((e for e in view.program.equations if v in e.outputs), None)
  unknown = listed(sorted(view.facts.unknown)) if view.facts.unknown else ''
  hint = f' (primitives without a rule: {unknown})' if unknown else ''
  raise ValueError(
    f'split: {v.dtype}{list(v.shape)} of {maker.where if maker else "an input"} '
    f'crosses a cut, but no axis of it counts examples{hint}; put the exit elsewhere'
  )


def _ordered(view: View, exits: Sequence[str]) -> tuple[str, ...]:
  outputs = view.unpack(view.program.outputs)
  names = list(outputs) if isinstance(outputs, Mapping) else []
  if len(names) < 2:
    raise ValueError(
      'split: expected a function that returns a dict of two exits or more, got '
      f'{listed(names)}; models.heads.WithHeads puts heads on taps'
    )
  if missing := [name for name in exits if name not in names]:
    raise ValueError(f'split: no exit {missing[0]!r}; there are: {listed(names)}')
  if len(exits) == 1 or 'main' in exits[:-1] or len({*exits}) < len(exits):
    raise ValueError(
      "split: expected two different exits or more, 'main' the last of them, got "
      f'{listed(exits)}'
    )
  depth = lambda name: (name == 'main', len(view.upto(name).equations))
  return tuple(exits) or tuple(sorted(names, key=depth))
