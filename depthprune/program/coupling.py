"""Coupling: which slices of which arrays of a function must be removed together."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from depthprune.program import arguments, cost, modules, routing, rules
from depthprune.program import axes as ax
from depthprune.program import jaxpr as jx
from depthprune.program.trace import (
  Decision,
  View,
  abstract,
  carried_names,
  counts_examples,
  look,
  paths_of,
  signature,
  solve,
  sources,
  split_arrays,
)

HARMLESS = {ax.UNIT, 'kernel window', 'input', 'output'}  # pins that surprise nobody

FIXED = (
  'outputs keep their size; where only some have to, couple(..., fixed=lambda outputs: '
  "outputs['logits']) selects these"
)
WHY = f'print(coupling.explain()) says why ({FIXED})'  # the end of messages elsewhere


class Group(NamedTuple):
  """Slices of several arrays that are removed together or not at all.

  Attributes:
    name: path of the first kernel that produces the axis, and which axis of it.
    size: number of slices.
    members: (path, axis) of every variable that has these slices.
    kind: 'channel', 'layer' for the layer axis of scanned parameters, or 'expert' where
      slices compete by the logits of a router.
    ungated: why the slices cannot be multiplied by a gate; '' where they can.
  """

  name: str
  size: int
  members: tuple[tuple[str, int], ...]
  kind: str
  ungated: str


class Pinned(NamedTuple):
  """An axis of a variable that must keep all its slices, for the reasons given."""

  path: str
  axis: int
  size: int
  reasons: tuple[str, ...]


@dataclasses.dataclass(frozen=True, eq=False)
class Coupling:
  """The groups of slices of a network that can be cut, as `couple` found them.

  `print(coupling)` shows how many there are, `print(coupling.explain())` names them.
  Pass it to `oneshot`, `plug`, `slim`, `prune` and the functions of `cost`.

  Attributes:
    model: the network that was given.
    fn: the network as a function of (variables, *inputs, **kwargs).
    variables: its variables, a tree of ShapeDtypeStruct.
    inputs: its inputs, a tuple of ShapeDtypeStruct trees.
    kwargs: the further arguments of the call.
    axes: the axis expressions of every variable, by path.
    view: the traced program from which everything was read.
    groups: the groups of slices that can be cut, by name, in order of execution.
    pinned: the axes that cannot be cut for a reason that may surprise.
    branches: paths of the scalar branch gates (leaves of the collection 'branches').
    exits: names of the outputs where the function returns a dict, shallowest first.
  """

  model: Any
  fn: Callable
  variables: Any
  inputs: tuple
  kwargs: dict
  axes: Mapping[str, ax.Dims]
  view: View
  groups: dict[str, Group]
  pinned: tuple[Pinned, ...]
  branches: tuple[str, ...]
  exits: tuple[str, ...]

  def __repr__(self) -> str:
    channels = [g for g in self.groups.values() if g.kind == 'channel']
    gated = sum(not g.ungated for g in channels)
    shapes = (f'{x.dtype}{list(x.shape)}' for x in split_arrays(self.inputs)[0])
    return '\n'.join(
      (
        f'Coupling: {len(channels)} groups of {sum(g.size for g in channels):,} '
        f'channels, {gated} groups can be gated',
        f'  branches: {len(self.branches)}, pinned axes: {len(self.pinned)}, '
        f'exits: {", ".join(self.exits) or "none"}',
        f'  {cost.params(self):,} parameters, {cost.flops(self):,} FLOPs '
        f'(1 MAC = 2 FLOPs) for {", ".join(shapes)}',
      )
    )

  @property
  def unknown(self) -> tuple[str, ...]:
    """Names of primitives without a rule; every axis that they touch is pinned."""
    return tuple(sorted(self.view.facts.unknown))

  def gates(self) -> dict:
    """Returns open gates for everything that can be gated.

    Returns:
      {'channels': {group: float32 ones [slices]}, 'branches': {path: float32 1, or ones
      [layers] for a branch of a scanned stack}}.
    """
    free = (g for g in self.groups.values() if not g.ungated)
    return {
      'channels': {g.name: np.ones(g.size, np.float32) for g in free},
      'branches': {b: np.ones(self.branch_shape(b), np.float32) for b in self.branches},
    }

  def has_size(self, group: str, gate: Any) -> None:
    """Checks that there is a group, and that a gate has an entry for each slice.

    Raises:
      KeyError: no such group.
      ValueError: the gate has another shape.
    """
    self.axis(group)
    path, axis = self.groups[group].members[0]
    if np.shape(gate) != (self.groups[group].size,):
      slices = f'its axis has {self.groups[group].size} slices ({path}, axis {axis})'
      raise arguments.wrong(group, f'gate has shape {np.shape(gate)}, {slices}')

  def fits(self, variables: Any) -> Any:
    """Returns the arrays of the coupled network, of the shapes that they had.

    Raises:
      ValueError: an array is missing, has another shape, or was deleted; the message
        names the first one.
    """
    arguments.alive('variables', variables, 'pass arrays that no step was given')
    given = paths_of(variables)
    for path, dims in self.axes.items():
      expected = [d.size for d in dims]
      got = [*np.shape(given[path])] if path in given else None
      if got != expected:
        others = len(self.axes) - len(self.axes.keys() & given.keys())
        raise arguments.wrong(
          'variables',
          f'{path}: expected shape {expected}, as coupled, got {got or "no such array"}'
          + (f' ({others} of {len(self.axes)} are missing)' if others else ''),
          'pass the variables of the coupled network, or couple it with these',
        )
    return variables

  def branch_shape(self, branch: str) -> tuple[int, ...]:
    """Returns the shape of a branch gate: (), or [layers] in a scanned stack."""
    return tuple(d.size for d in self.axes[f'branches/{branch}'])

  @property
  def named(self) -> dict[str, Any]:
    """The arguments by keyword that hold arrays; the others are static."""
    return {name: x for name, x in self.kwargs.items() if split_arrays(x)[0]}

  @functools.cached_property
  def counts(self) -> tuple[bool, ...]:
    """Whether axis 0 of each array among `(inputs, kwargs)` counts examples."""
    return counts_examples((self.inputs, self.kwargs), self.view.program.outputs)

  @functools.cached_property
  def carried(self) -> dict[str, ax.Dims]:
    """The axes of every array that is carried from call to call, by its path.

    These arrays are cut with the network. The path begins with the name of the argument
    by keyword and of the output, such as 'cache/layer0/key'.
    """
    data = self.view.program.inputs[len(self.view.leaves) :]
    _, merge = split_arrays((self.inputs, self.kwargs))
    named = paths_of(merge(data)[1])
    dims = self.view.facts.dims
    return {p: dims[v] for p, v in named.items() if v in self.view.carried}

  @functools.cached_property
  def trainable(self) -> frozenset[str]:
    """Paths of the variables that training changes; a search for a width asks often."""
    return modules.parameters_of(self.variables)

  @functools.cached_property
  def reads(self) -> frozenset[tuple[str, int]]:
    """(path, axis) of the variables that some equation sums over."""
    return _contracted_members(self.view)

  def needed(self, decision: Decision) -> frozenset[jx.Value]:
    """Returns the values that are computed after a decision on branches and exits."""
    closed = (b for b, kept in decision.branches.items() if not np.any(kept))
    dropped = (e for e, kept in decision.exits.items() if not kept)
    return self._left(frozenset(closed), frozenset(dropped))

  def unneeded(self, decision: Decision) -> frozenset[str]:
    """Returns the paths of the variables that nothing reads after a decision."""
    needed = self.needed(decision)
    return frozenset(p for p, v in self.view.leaves.items() if v not in needed)

  @functools.cached_property
  def _left(self) -> Callable[[frozenset, frozenset], frozenset[jx.Value]]:
    """What `needed` computes; a search for a width asks it again and again."""

    @functools.lru_cache(maxsize=64)
    def left(closed, dropped):
      decision = Decision(dict.fromkeys(closed, False), dict.fromkeys(dropped, False))
      program = self.view.decided(decision)
      within = (v for e in jx.walk(program) for v in (*e.inputs, *e.outputs))
      return frozenset((*program.outputs, *within))

    return left

  def axis(self, group: str) -> ax.Var:
    """Returns the axis variable of a group.

    Raises:
      KeyError: no such group; the message names the most similar ones.
    """
    if group in self.groups:
      solved = ax.norm(self.view.groups[group])
      assert isinstance(solved, ax.Var)
      return solved
    path = group.rsplit(':', 1)[0]
    for pinned in self.pinned:
      if path in pinned.path and group.endswith(f':{pinned.axis}'):
        why = arguments.listed(pinned.reasons, 3)
        raise KeyError(
          f'{group}: this axis is pinned ({why}), so it has no gate and no group'
        )
    for where, axis, _ in self._outputs():
      if path in where and group.endswith(f':{axis}'):
        raise KeyError(f'{group}: this axis ends in an output, so it is whole; {FIXED}')
    near = difflib.get_close_matches(group, self.groups, n=3, cutoff=0.3)
    what = f'no such group; nearest: {arguments.listed(near)}'
    raise arguments.wrong(group, what, 'print(coupling.explain()) shows all', KeyError)

  def _outputs(self) -> list[tuple[str, int, int]]:
    """(path, axis, size) of every axis of a variable that only an output pins."""
    told = {(pinned.path, pinned.axis) for pinned in self.pinned}
    return [
      (path, i, d.size)
      for path, axes in self.axes.items()
      for i, d in enumerate(axes)
      if (path, i) not in told and any('output' in v.pins for v in ax.leaves(d))
    ]

  def explain(self, group: str | None = None) -> str:
    """Says which slices are cut together, and which equation ties each of them.

    The names of groups and the paths of arrays that it shows, and patterns of them, are
    what `exclude`, `at_least` and `at_most` of `oneshot` and `trainable_gates` take.

    Args:
      group: name of the group. By default all groups are explained, then the axes that
        are pinned, those that end in an output, and the primitives without a rule.

    Returns:
      Text of several lines.

    Raises:
      KeyError: no such group; the message names the most similar ones.
    """
    if group is not None:
      self.axis(group)
    lines = []
    for name in self.groups if group is None else [group]:
      g = self.groups[name]
      gate = f'cannot be gated: {g.ungated}' if g.ungated else 'can be gated'
      lines.append(f'{name}: {g.size} slices, {gate}')
      for path, i in g.members:
        axis = self.axes[path][i]
        why = axis.why if isinstance(axis, ax.Var) else None
        tie = '' if why is None else f'  <- {why.where}'
        lines.append(f'  {path} axis {i}{tie}')
    if group is not None:
      return '\n'.join(lines)
    for path, i, size, reasons in self.pinned:
      partly = any(not v.pins for v in ax.leaves(self.axes[path][i]))
      extent = 'partly pinned' if partly else 'pinned'
      lines.append(f'{extent}: {path} axis {i} ({size}): {"; ".join(reasons)}')
    outputs = [f'ends in an output: {p} axis {i} ({n})' for p, i, n in self._outputs()]
    if outputs:
      lines += [*outputs, FIXED]
    for name in self.unknown:
      lines.append(f'no rule for the primitive {name}: all that it touches is pinned')
    return '\n'.join(lines)

  def retrace(
    self, fn: Callable, inputs: tuple, kwargs: dict, keep: Mapping | None = None
  ) -> View:
    """Traces the function at other inputs or in another mode, with the same groups.

    Args:
      fn: the coupled function.
      inputs: its inputs, arrays or ShapeDtypeStructs.
      kwargs: further arguments of the call.
      keep: a decision on branches and exits that is carried out first.

    Returns:
      The view, whose variables start with the axes that were solved here.
    """
    call, before = abstract((inputs, kwargs)), (self.inputs, self.kwargs)
    # A module that holds its arrays may be in another mode by now.
    known = fn is self.fn and not modules.is_module(self.model)
    known = known and signature(call) == signature(before)
    if known and keep is None:
      return self.view
    memo: dict[ax.Var, ax.Var] = {}
    axes = {p: [ax.copy(d, memo) for d in ds] for p, ds in self.axes.items()}
    decision = None if keep is None else self.decision(keep)
    if known:
      traced = jx.Traced(self.view.program, self.view.tree)
      view = solve(traced, self.view.leaves, self.view.carried, axes, decision)
    else:
      view = look(fn, self.variables, inputs, kwargs, axes, decision)
    return view._replace(groups={g: memo[self.axis(g)] for g in self.groups})

  def check_view(self, view: View, groups: Iterable[str]) -> None:
    """Checks that these groups can be cut or gated in a view from `retrace`.

    Raises:
      ValueError: the mode or the shapes of the view forbid it.
    """
    for group in groups:
      expert = self.groups[group].kind == 'expert'
      if self.groups[group].ungated and not expert:
        continue
      for v in ax.leaves(view.groups[group]):
        if reasons := v.pins - {ax.UNIT} | (set() if expert else v.notes):
          raise ValueError(
            f'{group}: {"; ".join(sorted(reasons))}, which was not so where the '
            'function was coupled; couple() it in this mode and at these shapes'
          )

  def decision(self, keep: Mapping) -> Decision:
    """Returns what `keep` says of branches and exits, and which variables it kills.

    Statistics that only training reads, such as a counter, die with those beside them.
    """
    decision = Decision(keep.get('branches', {}), keep.get('exits', {}))
    before, after = self.unneeded(Decision({}, {})), self.unneeded(decision)
    beside = lambda path: path.rpartition('/')[0]
    emptied = {*map(beside, after - before)} - {*map(beside, {*self.axes} - after)}
    unread = (p for p in before & after if not p.startswith('params/'))
    lost = {p for p in unread if beside(p) in emptied}
    return decision._replace(dead=after - before | lost)


@dataclasses.dataclass(frozen=True)
class _Output:
  """Stands for an output in the tree from which `fixed` selects."""

  dims: ax.Dims


def couple(
  model: Any, variables: Any, *inputs: Any, fixed: Callable | None = None, **kwargs
) -> Coupling:
  """Finds which channels of a network have to be cut together.

  The network is traced on shapes, and nothing is computed::

    coupling = dp.couple(model, variables, images, train=False)
    print(coupling.explain())
    keep = dp.oneshot(coupling, variables, target='50%')
    pruned = dp.prune(model, variables, keep, images, train=False)

  Args:
    model: a linen, NNX or Equinox module, a haiku transform, a Flax model of
      transformers, or any traceable function of (variables, *inputs, **kwargs).
    variables: its arrays or ShapeDtypeStructs. Of a linen module this is the dict with
      'params' and the other collections, of an NNX module `nnx.state(module)`, of an
      Equinox module `equinox.filter(module, equinox.is_array)`.
    *inputs: arrays or ShapeDtypeStructs, or trees of them.
    fixed: selects the outputs whose axes cannot be cut, e.g. `lambda out: out[0]` where
      the function also returns updated statistics. By default all outputs.
    **kwargs: further arguments of the call, e.g. train=False. A tree of arrays that the
      function also returns under the same name, such as a key/value cache, is carried
      from call to call: it is cut with the network, and so is no input of fixed size.

  Returns:
    The Coupling: groups of slices, pinned axes with reasons, branch gates and exits.

  Raises:
    ValueError: two variables have the same path, or the call updates variables.
    TypeError: the variables are not those of the module.
  """
  fn = modules.runnable(modules.checked_call(model, variables, inputs))
  if fixed is not None:
    arguments.function('fixed', fixed, 'a function of the outputs')
  if modules.is_module(model):
    modules.rebuilt(model, variables)  # refuses what is not its arrays, before tracing
  variables = jax.eval_shape(lambda v: v, variables)
  inputs, kwargs = abstract((tuple(inputs), kwargs))
  paths = paths_of(variables)
  dims = {p: ax.fresh(leaf.shape) for p, leaf in paths.items()}
  with modules.explained(variables, inputs):
    view = look(fn, variables, inputs, kwargs, dims)
  outputs = view.unpack([_Output(view.facts.dims[v]) for v in view.program.outputs])
  passed_on = carried_names(kwargs, outputs)
  exits = {}
  if isinstance(outputs, Mapping):
    exits = {name: x for name, x in outputs.items() if name not in passed_on}
  answers = exits if passed_on else outputs
  for output in jax.tree.leaves(answers if fixed is None else fixed(outputs)):
    for d in output.dims:
      ax.pin(d, 'output')
  pinned = []
  for path, axes in dims.items():
    for i, d in enumerate(axes):
      reasons = {why for v in ax.leaves(d) for why in v.pins} - HARMLESS
      if reasons:
        pinned.append(Pinned(path, i, d.size, tuple(sorted(reasons))))
  groups, solved = _groups(view, dims)
  branches = [p for p in paths if p.startswith('branches/')]
  return Coupling(
    model=model,
    fn=fn,
    variables=variables,
    inputs=inputs,
    kwargs=kwargs,
    axes=dims,
    view=view._replace(groups=solved),
    groups=groups,
    pinned=tuple(pinned),
    branches=tuple(p.removeprefix('branches/') for p in branches),
    exits=tuple(sorted(exits, key=lambda name: len(view.upto(name).equations))),
  )


def _groups(
  view: View, dims: Mapping[str, ax.Dims]
) -> tuple[dict[str, Group], dict[str, ax.Axis]]:
  """Groups by name in order of execution, and the axis variable of each."""
  members: dict[ax.Var, list] = {}
  for path, axes in dims.items():
    for i, d in enumerate(axes):
      for v in dict.fromkeys(ax.leaves(d)):
        if not v.pins and not path.startswith('branches/'):
          members.setdefault(v, []).append((path, i))
  when: dict[jx.Value, int] = {}
  for i, value in enumerate(_inputs_in_order(view.program)):
    when.setdefault(value, i)
  first = {path: when.get(v, math.inf) for path, v in view.leaves.items()}
  contracted = {
    v
    for e in jx.walk(view.program)
    for side in rules.contracted(view.facts, e)
    for k, axis in side
    for v in ax.leaves(view.facts.dims[e.inputs[k]][axis])
  }
  competing = routing.experts(view.facts)
  named: dict[str, tuple[Group, ax.Var]] = {}
  for v, where in members.items():
    if all(first[path] == math.inf for path, _ in where):
      continue  # nothing reads these variables
    reason = '' if v in contracted else 'no weight reads it'
    ungated = '; '.join(sorted(v.notes)) or reason
    kind = 'layer' if rules.LAYER in v.notes else 'channel'
    if v in competing:
      kind, ungated = 'expert', routing.EXPERT
    name = _name(v, where, dims, first, named)
    named[name] = Group(name, v.size, tuple(where), kind, ungated), v
  order = lambda item: min(first[p] for p, _ in item[1][0].members)
  named = dict(sorted(named.items(), key=order))
  return {n: g for n, (g, _) in named.items()}, {n: v for n, (_, v) in named.items()}


def _name(v, where, dims, first, taken) -> str:
  """Path of the first kernel that produces the axis, its axis, and its factor.

  'params/' and '/kernel' are left out where no other group has that name.
  """

  def order(member):
    layers = (rules.LAYER in w.notes for d in dims[member[0]] for w in ax.leaves(d))
    rank = len(dims[member[0]]) - sum(layers)
    return rank < 2, first[member[0]], -rank, member

  path, axis = min(where, key=order)
  parts = list(dict.fromkeys(ax.leaves(dims[path][axis])))
  factor = f'.{parts.index(v)}' if len(parts) > 1 else ''
  short = path.removeprefix('params/').removesuffix('/value').removesuffix('/kernel')
  name = f'{short}:{axis}{factor}'
  return f'{path}:{axis}{factor}' if name in taken else name


def _inputs_in_order(program: jx.Program) -> Iterator[jx.Value]:
  """The inputs of every equation; for those of a body, the values outside of it."""
  for e in program.equations:
    for body, outer in jx.bodies_with_inputs(e):
      outside = dict(zip(body.inputs, outer, strict=True))
      yield from (outside[v] for v in _inputs_in_order(body) if v in outside)
    yield from e.inputs


def _contracted_members(view: View) -> frozenset[tuple[str, int]]:
  """Contracted axes of variables, seen through casts, transposes and control flow."""
  found = sources(view)
  members = set()
  for e in jx.walk(view.program):
    for k, axis in (pair for side in rules.contracted(view.facts, e) for pair in side):
      if (source := found.get(e.inputs[k])) is not None:
        members.add((source.path, source.axes[axis]))
  return frozenset(members)
