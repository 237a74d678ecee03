"""Coupling: which slices of which parameters of a function must go together."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import numpy as np

from depthprune.program import axes as ax
from depthprune.program import explain as ex
from depthprune.program import jaxpr as jx
from depthprune.program.facts import fresh
from depthprune.program.groups import (
  Group,
  Pinned,
  find_groups,
  find_pinned,
  find_reads,
)
from depthprune.program.view import (
  Decision,
  View,
  abstract,
  look,
  paths_of,
  runnable,
)


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
      raise KeyError(ex.unknown_group(self, group))
    solved = ax.norm(self.view.groups[group])
    assert isinstance(solved, ax.Var)
    return solved

  def explain(self, group: str | None = None) -> str:
    """Why each slice is in its group; of all groups and pinned axes by default."""
    return ex.explain(self, group)

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
