"""Coupling: which slices of which parameters of a function must go together."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import numpy as np

from depthprune.program import axes as ax
from depthprune.program import jaxpr as jx
from depthprune.program import rules
from depthprune.program.axes import fresh
from depthprune.program.trace import Decision, View, abstract, look, paths_of, runnable


@dataclasses.dataclass(frozen=True, eq=False)
class Coupling:
  """What `couple` found.

  Attributes:
    fn: the function that was traced.
    variables, inputs: its abstract arguments (ShapeDtypeStruct trees); kwargs as given.
    axes: axis expressions of every variable, by path.
    view: the traced program that everything was read from.
    groups: by name, in order of execution: every axis whose slices can be cut.
    pinned: axes that must stay whole for a reason worth telling.
    branches: paths of the scalar branch gates (leaves of the collection 'branches').
    exits: names of the outputs, where the function returns a dict, shallowest first."""

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

  @property
  def unknown(self) -> tuple[str, ...]:
    """Primitives without a rule; all that they touch is pinned."""
    return tuple(sorted(self.view.facts.unknown))

  def gates(self) -> dict:
    """Open gates: float32 ones, [n] per group that can be gated, () per branch
    ([layers] per branch of a scanned stack)."""
    free = (g for g in self.groups.values() if not g.ungated)
    return {
      'channels': {g.name: np.ones(g.size, np.float32) for g in free},
      'branches': {b: np.ones(self.branch_shape(b), np.float32) for b in self.branches},
    }

  def branch_shape(self, branch: str) -> tuple[int, ...]:
    """The shape of a branch gate: (), or [layers] in a scanned stack."""
    return tuple(d.size for d in self.axes[f'branches/{branch}'])

  @functools.cached_property
  def reads(self) -> frozenset[tuple[str, int]]:
    """(path, axis) of the variables that an equation sums over: the reading sides."""
    return find_reads(self.view)

  def axis(self, group: str) -> ax.Var:
    """The variable of a group. Raises: KeyError that names the nearest groups."""
    if group not in self.groups:
      raise KeyError(unknown_group(self, group))
    solved = ax.norm(self.view.groups[group])
    assert isinstance(solved, ax.Var)
    return solved

  def explain(self, group: str | None = None) -> str:
    """Why each slice is in its group; of all groups and pinned axes by default."""
    return explain(self, group)

  def again(
    self, fn: Callable, inputs: tuple, kwargs: dict, keep: Mapping | None = None
  ):
    """The view of fn (this function, perhaps in another mode) at other inputs.

    Its variables start with the axes solved here, so a group is the same group there.
    keep: a decision on branches and exits to carry out first."""
    memo: dict[ax.Var, ax.Var] = {}
    axes = {p: [ax.copy(d, memo) for d in ds] for p, ds in self.axes.items()}
    decision = None if keep is None else self.decision(keep)
    view = look(fn, self.variables, inputs, kwargs, axes, decision)
    return view._replace(groups={g: memo[self.axis(g)] for g in self.groups})

  def same(self, view: View, groups: Iterable[str]):
    """Checks that these groups can be cut or gated in a view as they were coupled.

    Raises: ValueError where its mode or shapes forbid what the coupling allows."""
    for group in groups:
      if self.groups[group].ungated:
        continue
      for v in ax.leaves(view.groups[group]):
        if reasons := v.pins - {ax.UNIT} | v.notes:
          raise ValueError(
            f'{group}: {"; ".join(sorted(reasons))}, which was not so where the '
            'function was coupled; couple() it in this mode and at these shapes'
          )

  def decision(self, keep: Mapping) -> Decision:
    """The depth part of keep, with the variables that it makes dead."""
    decision = Decision(keep.get('branches', {}), keep.get('exits', {}))
    before = self.view.unneeded(Decision({}, {}))
    return decision._replace(dead=self.view.unneeded(decision) - before)


def _exits(view: View) -> tuple[str, ...]:
  """Names of the outputs of a dict, by how many equations lead to them."""
  outputs = view.unpack(view.program.outputs)
  if not isinstance(outputs, Mapping):
    return ()
  upto = lambda name: tuple(jax.tree.leaves(outputs[name]))
  part = lambda name: dataclasses.replace(view.program, outputs=upto(name))
  return tuple(sorted(outputs, key=lambda name: len(jx.live(part(name))[0])))


@dataclasses.dataclass(frozen=True)
class _Output:
  """Stands for one output in what `fixed` selects from."""

  dims: ax.Dims


def couple(
  model: Any, variables: Any, *inputs: Any, fixed: Callable | None = None, **kwargs
) -> Coupling:
  """Finds every group of coupled slices of a traceable function.

  model: a function of (variables, *inputs, **kwargs), or an object with such an
    `apply` (a linen module). variables: a pytree, for linen the whole variables dict.
  inputs: arrays or ShapeDtypeStructs; nothing is computed.
  fixed: selects the outputs whose axes must stay, e.g. `lambda out: out[0]` where
    fn also returns updated statistics. Default: all outputs.
  kwargs: further arguments of the call, e.g. train=False.

  Source: design.md, "Coupling is type inference"; prototype/trace.py."""
  fn = runnable(model)
  variables = jax.eval_shape(lambda v: v, variables)
  inputs, kwargs = abstract((tuple(inputs), kwargs))
  paths = paths_of(variables)
  dims = {p: fresh(leaf.shape) for p, leaf in paths.items()}
  view = look(fn, variables, inputs, kwargs, dims)
  outputs = view.unpack([_Output(view.facts.dims[v]) for v in view.program.outputs])
  for output in jax.tree.leaves(outputs if fixed is None else fixed(outputs)):
    for d in output.dims:
      ax.pin(d, 'output')
  groups, solved = find_groups(view, dims)
  return Coupling(
    fn=fn, variables=variables, inputs=inputs, kwargs=kwargs, axes=dims,
    view=view._replace(groups=solved), groups=groups, pinned=find_pinned(dims),
    branches=tuple(
      p.removeprefix('branches/') for p in paths if p.startswith('branches/')
    ),
    exits=_exits(view),
  )  # fmt: skip


HARMLESS = {ax.UNIT, 'kernel window', 'input', 'output'}  # pins that surprise nobody


class Group(NamedTuple):
  """Slices that live and die together.

  Attributes:
    name: path of the first kernel that produces the axis, and which axis of it.
    size: number of slices.
    members: (path, axis) of every variable that has these slices.
    kind: 'channel', or 'layer' for the layer axis of scanned parameters.
    ungated: why no gate can stand for the slices, or ''."""

  name: str
  size: int
  members: tuple[tuple[str, int], ...]
  kind: str
  ungated: str


class Pinned(NamedTuple):
  """An axis of a variable that must keep all its slices, and why."""

  path: str
  axis: int
  size: int
  reasons: tuple[str, ...]


def find_groups(
  view: View, dims: Mapping[str, ax.Dims]
) -> tuple[dict[str, Group], dict[str, ax.Axis]]:
  """Groups by name in order of execution, and the axis variable of each."""
  members: dict[ax.Var, list] = {}
  for path, axes in dims.items():
    for i, d in enumerate(axes):
      for v in dict.fromkeys(ax.leaves(d)):
        if not v.pins and not path.startswith('branches/'):
          members.setdefault(v, []).append((path, i))
  first, read = _first_use(view), _contracted(view)
  found, names = [], set()
  for v, where in members.items():
    if all(first[path] == math.inf for path, _ in where):
      continue  # variables that nothing reads
    ungated = '; '.join(sorted(v.notes)) or ('' if v in read else 'no weight reads it')
    kind = 'layer' if rules.LAYER in v.notes else 'channel'
    name = _name(v, where, dims, first, names)
    names.add(name)
    found.append((Group(name, v.size, tuple(where), kind, ungated), v))
  found.sort(key=lambda pair: min(first[p] for p, _ in pair[0].members))
  return {g.name: g for g, _ in found}, {g.name: v for g, v in found}


def _name(v, where, dims, first, taken) -> str:
  """Path of the first kernel that produces the axis, its axis, and its factor.

  Without 'params/' and '/kernel', unless another group has that name."""

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


def _first_use(view: View) -> dict[str, float]:
  """When each variable is first read; infinity for one that nothing reads."""
  used: dict[jx.Value, int] = {}
  for i, v in enumerate(_reads(view.program)):
    used.setdefault(v, i)
  return {path: used.get(v, math.inf) for path, v in view.leaves.items()}


def _reads(program: jx.Program) -> Iterator[jx.Value]:
  """The inputs of every equation; those of a body as what stands outside for them."""
  for e in program.equations:
    for body, outer in jx.bodies_with_inputs(e):
      outside = dict(zip(body.inputs, outer, strict=True))
      yield from (outside[v] for v in _reads(body) if v in outside)
    yield from e.inputs


def _contracted(view: View) -> set[ax.Var]:
  """The variables that some equation sums over."""
  return {
    v
    for e in jx.walk(view.program)
    for side in rules.contracted(e)
    for k, axis in side
    for v in ax.leaves(view.facts.dims[e.inputs[k]][axis])
  }


def find_reads(view: View) -> frozenset[tuple[str, int]]:
  """Contracted axes of variables, seen through casts, transposes and control flow."""
  origin = {v: (p, tuple(range(len(v.shape)))) for p, v in view.leaves.items()}
  found = set()

  def walk(program: jx.Program):
    for e in program.equations:
      known = [origin.get(v) for v in e.inputs]
      for k, axis in (pair for side in rules.contracted(e) for pair in side):
        if (source := known[k]) is not None:
          found.add((source[0], source[1][axis]))
      if e.name in ('convert_element_type', 'copy') and known[0] is not None:
        origin[e.outputs[0]] = known[0]
      elif e.name == 'transpose' and known[0] is not None:
        path, at = known[0]
        origin[e.outputs[0]] = path, tuple(at[i] for i in e.params['permutation'])
      for body, outer in jx.bodies_with_inputs(e):
        scanned = len(jx.scan_parts(e, e.inputs)[2]) if e.name == 'scan' else 0
        for i, (v, o) in enumerate(zip(body.inputs, outer, strict=True)):
          if o in origin:
            path, at = origin[o]
            is_layer = i >= len(outer) - scanned
            origin[v] = (path, at[1:]) if is_layer else (path, at)
        walk(body)

  walk(view.program)
  return frozenset(found)


def find_pinned(dims: Mapping[str, ax.Dims]) -> tuple[Pinned, ...]:
  """The axes that must stay whole for a reason worth telling."""
  found = []
  for path, axes in dims.items():
    for i, d in enumerate(axes):
      reasons = {why for v in ax.leaves(d) for why in v.pins} - HARMLESS
      if reasons:
        found.append(Pinned(path, i, d.size, tuple(sorted(reasons))))
  return tuple(found)


if TYPE_CHECKING:
  pass


def explain(coupling: Coupling, group: str | None = None) -> str:
  """One block per group, with the equation that put each slice there, then the pins."""
  if group is not None:
    coupling.axis(group)
    return _group(coupling, group)
  lines = [_group(coupling, g) for g in coupling.groups]
  for pinned in coupling.pinned:
    parts = ax.leaves(coupling.axes[pinned.path][pinned.axis])
    extent = 'partly pinned' if any(not v.pins for v in parts) else 'pinned'
    lines.append(
      f'{extent}: {pinned.path} axis {pinned.axis} ({pinned.size}): '
      + '; '.join(pinned.reasons)
    )
  for name in coupling.unknown:
    lines.append(f'no rule for the primitive {name}: all that it touches is pinned')
  return '\n'.join(lines)


def _group(coupling: Coupling, name: str) -> str:
  group = coupling.groups[name]
  gate = f'cannot be gated: {group.ungated}' if group.ungated else 'can be gated'
  lines = [f'{name}: {group.size} slices, {gate}']
  for path, axis in group.members:
    lines.append(f'  {path} axis {axis}{_because(coupling.axes[path][axis])}')
  return '\n'.join(lines)


def _because(axis: ax.Axis) -> str:
  """The equation that first tied an axis of a variable to another one."""
  if isinstance(axis, ax.Var) and axis.why is not None:
    return f'  <- {axis.why.where}'
  return ''


def unknown_group(coupling: Coupling, name: str) -> str:
  """What to say when a group is asked for that there is not, or that is pinned."""
  path = name.rsplit(':', 1)[0]
  for pinned in coupling.pinned:
    if path in pinned.path and name.endswith(f':{pinned.axis}'):
      why = '; '.join(pinned.reasons)
      return f'{name}: this axis is pinned ({why}), so it has no gate and no group'
  near = difflib.get_close_matches(name, coupling.groups, n=3, cutoff=0.3)
  return f'{name}: no such group; nearest: {", ".join(near) or "none"}'
