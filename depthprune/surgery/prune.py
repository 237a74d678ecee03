"""Surgery: a decision goes in, a physically smaller network comes out, proven equal."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from depthprune.program import axes as ax
from depthprune.program import cost
from depthprune.program.coupling import Coupling, couple
from depthprune.program.resize import slim
from depthprune.program.trace import paths_of
from depthprune.surgery.fold import fold, fold_channels
from depthprune.surgery.plan import Plan, cut, cut_optimizer, index_plan
from depthprune.surgery.settle import complete, settle
from depthprune.surgery.verify import Verdict, verify


class InexactCut(ValueError):
  """Masked and small network differ, so the cut was refused; the message says why."""


class Pruned(NamedTuple):
  """What surgery leaves.

  Attributes:
    apply: f(variables, *inputs, **kwargs), at every input shape and in every mode.
    variables: the small arrays; branch gates are folded in.
    opt_state: cut by the same plan; None where none was given.
    arch: {module path: width} of what differs from the model's default, 0 for a branch
      or an exit that is gone.
    report: a dict ready for JSON: requested and reached cost, widths, kept indices.
    model: model.clone(arch=arch) for a model that has `arch`, else what was given.
    keep: the settled decision. coupling: of the full network."""

  apply: Callable
  variables: Any
  opt_state: Any
  arch: dict[str, int]
  report: dict
  model: Any
  keep: dict
  coupling: Coupling


def prune(
  model: Any,
  variables: Any,
  keep: Mapping,
  example: Any,
  tx: Any = None,
  opt_state: Any = None,
  round_to: int = 1,
  allow_inexact: bool = False,
  gates: Mapping | None = None,
  coupling: Coupling | None = None,
  **kwargs,
) -> Pruned:
  """Cuts a network to what `keep` leaves and proves that nothing else changed.

  model: a linen module, or any traceable f(variables, *inputs). variables: its arrays.
  keep: {'channels': {group: bool [n]}, 'branches': {path: bool},
    'exits': {name: bool}}, each part optional.
  example: one input array, or a tuple of all inputs.
  tx, opt_state: an optax optimizer and its state over variables['params'] (or over
    variables, where there is no such entry): cut by the same plan.
  round_to: widths become multiples of it (see `settle`).
  gates: {'channels': {group: [n]}}, the values that channel gates have where they are
    neither 0 nor 1; of slices that are kept they are folded into the weights that read
    them, and the proof compares with the network so gated. Branch gates are among the
    variables.
  allow_inexact: cut also where masked and small network differ, and report by how much.
  coupling: that of the model, where it has been computed already.
  kwargs: further arguments of the model's call, e.g. train=False.

  Raises: InexactCut where masked is not small (a width that is normalised over, say),
    naming the tensors; ValueError and KeyError for a keep that does not fit."""
  inputs = example if isinstance(example, tuple) else (example,)
  coupling = coupling or couple(model, variables, *inputs, **kwargs)
  settled = settle(coupling, keep, variables, round_to)
  channels = (gates or {}).get('channels', {})
  inexact = _inexact(coupling, settled.keep)
  if inexact and not allow_inexact:
    raise _refusal('masked and small network are not the same function', inexact)

  def shrink(arrays, keep):
    folded = _folded(coupling, arrays, keep, channels)
    return cut(folded, index_plan(coupling, keep))

  asked = dict(zip(('channels', 'branches', 'exits'), complete(coupling, keep)))
  verdict = verify(coupling, variables, inputs, shrink, asked, settled.keep, channels)
  if verdict.responsible and not allow_inexact:
    raise _refusal(
      f'masked and small network differ by {verdict.difference:.1e} '
      f'(tolerance {verdict.tolerance:.0e})',
      verdict.responsible,
    )
  plan = index_plan(coupling, settled.keep)
  small = shrink(variables, settled.keep)
  notes = [*settled.notes, *inexact]
  if opt_state is not None:
    opt_state, anew = _small_state(tx, opt_state, variables, small, plan)
    notes += anew
  small_model, arch = _native(model, coupling, plan, settled.keep, small, notes)
  report = _report(coupling, variables, keep, settled.keep, plan, verdict, notes)
  apply = slim(model, coupling, settled.keep)
  return Pruned(
    apply, small, opt_state, arch, report, small_model, settled.keep, coupling
  )


def _refusal(what: str, blame: Iterable[str]) -> InexactCut:
  lines = [f'{what}:', *blame]
  advice = 'keep these groups whole, or pass allow_inexact=True'
  return InexactCut('\n  '.join(lines) + '\n' + advice)


def _inexact(coupling: Coupling, keep: Mapping) -> list[str]:
  """One sentence for every axis that is cut although its size enters the result."""
  found = []
  for name, kept in keep['channels'].items():
    group = coupling.groups[name]
    if group.kind == 'channel' and coupling.axis(name).notes and not np.all(kept):
      tensors = ', '.join(path for path, _ in group.members)
      found.append(f'{name}: {group.ungated}. Tensors: {tensors}')
  return found


def _folded(
  coupling: Coupling, variables: Any, keep: Mapping, channels: Mapping
) -> Any:
  """Gates that stay, of branches and of channels, multiplied into the arrays."""
  leaves = paths_of(variables)
  values = {}
  for branch in coupling.branches:
    kept = np.asarray(keep['branches'].get(branch, True))
    if kept.any():
      values[branch] = np.asarray(leaves[f'branches/{branch}']) * kept
  variables = fold(coupling.view, variables, values, keep['exits'])
  open_ = {
    group: np.where(keep['channels'].get(group, True), np.asarray(gate), 1)
    for group, gate in channels.items()
  }
  return fold_channels(coupling.view, variables, open_, keep['exits'])


def _small_state(tx, opt_state, full, small, plan: Plan):
  if tx is None:
    raise ValueError('opt_state was given without the tx that it belongs to')
  is_flax = isinstance(small, Mapping) and 'params' in small
  if is_flax:
    full, small = full['params'], small['params']
  return cut_optimizer(tx, opt_state, full, small, plan, 'params/' if is_flax else '')


def _native(model, coupling, plan, keep, small, notes) -> tuple[Any, dict[str, int]]:
  """The small network as a module of its own, where the model has `arch`."""
  full = getattr(model, 'widths', None)
  if not (isinstance(full, Mapping) and isinstance(model.arch, Mapping)):
    return model, {}
  arch = {
    **dict(model.arch),
    **_arch(coupling, plan, keep, full),
  }
  make: Any = type(model.arch)
  native = model.clone(arch=make(arch))
  key = jax.eval_shape(lambda: jax.random.key(0))
  wanted = jax.eval_shape(native.init, key, *coupling.inputs)
  wanted = {p: x.shape for p, x in paths_of(wanted).items() if p[:9] != 'branches/'}
  if wanted != {p: x.shape for p, x in paths_of(small).items()}:
    notes.append('this shape cannot be written as `arch`: run it through `apply`')
    return model, {}
  return native, arch


def _arch(
  coupling, plan: Plan, keep: Mapping, names: Collection[str]
) -> dict[str, int]:
  """Widths that changed, read off the arrays; branches and exits that are gone.

  names: the keys that the model knows. A group may be one, by its name, if no last axis
    of a kernel tells its size (the heads of an attention)."""
  arch = {}
  for path, masks in plan.items():
    if path.startswith('params/') and path.endswith('/kernel') and not masks[-1].all():
      name = path.removeprefix('params/').removesuffix('/kernel')
      arch[name] = int(masks[-1].sum())
  groups = {g: kept for g, kept in keep['channels'].items() if g in names}
  arch |= {g: int(np.sum(kept)) for g, kept in groups.items() if not np.all(kept)}
  closed = {b: kept for b, kept in keep['branches'].items() if not np.all(kept)}
  arch |= {b: _layers_left(coupling, keep, b) for b in closed}
  return arch | {f'exit/{e}': 0 for e, kept in keep['exits'].items() if not kept}


def _layers_left(coupling: Coupling, keep: Mapping, branch: str) -> int:
  """0 for a branch that is gone, else the layers of its stack, which other branches
  may keep although this one is closed there."""
  kept = keep['branches'][branch]
  if not np.any(kept):
    return 0
  axis = ax.norm(coupling.axes[f'branches/{branch}'][0])
  layers = (k for g, k in keep['channels'].items() if coupling.axis(g) is axis)
  return int(np.sum(next(layers, np.ones_like(kept))))


def _report(coupling, variables, asked, keep, plan, verdict: Verdict, notes) -> dict:
  """Everything that a person or a table wants to know, in plain JSON types."""
  costs = {'flops': cost.flops, 'params': cost.params, 'peak_bytes': cost.peak_bytes}
  groups = coupling.groups
  shapes = {p: np.shape(x) for p, x in paths_of(variables).items()}
  widths = {g: int(np.sum(k)) for g, k in keep['channels'].items()}
  closed = [*keep['channels'].values(), *keep['branches'].values()]
  if verdict.moved == 0 and not all(np.all(k) for k in closed):
    notes.append('closing these slices does not change the output')
  if verdict.responsible:
    notes += verdict.responsible
  return {
    'requested': {
      g: int(np.sum(k)) for g, k in asked.get('channels', {}).items()
    },
    **{
      name: {'before': int(of(coupling)), 'after': int(of(coupling, keep))}
      for name, of in costs.items()
    },
    'widths': {g: [groups[g].size, widths.get(g, 0)] for g in groups},
    'kept': {g: np.flatnonzero(k).tolist() for g, k in keep['channels'].items()},
    'branches': {b: bool(np.any(k)) for b, k in keep['branches'].items()},
    'exits': dict(keep['exits']),
    'tensors': {
      path: {
        'shape': [list(shape), [int(m.sum()) for m in plan[path]]],
        'kept': {
          str(i): np.flatnonzero(m).tolist()
          for i, m in enumerate(plan[path])
          if not m.all()
        },
      }
      for path, shape in shapes.items()
      if path in plan
    },
    'verify': {
      'difference': verdict.difference,
      'settled': verdict.settled,
      'moved': verdict.moved,
      'tolerance': verdict.tolerance,
    },
    'notes': notes,
    'inputs': [list(x.shape) for x in jax.tree.leaves(coupling.inputs)],
  }  # fmt: skip
