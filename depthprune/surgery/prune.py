"""Surgery: cuts a network to what a decision keeps and proves the rest unchanged."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from depthprune.program import arguments, cost, modules
from depthprune.program import axes as ax
from depthprune.program.coupling import Coupling, couple
from depthprune.program.resize import slim
from depthprune.program.rounding import RoundTo
from depthprune.program.trace import paths_of, several
from depthprune.surgery.fold import fold, fold_channels
from depthprune.surgery.plan import (
  IndexPlan,
  complete,
  cut,
  cut_optimizer,
  gates_of,
  index_plan,
)
from depthprune.surgery.settle import settle
from depthprune.surgery.verify import Verdict, agrees, verify


class InexactCut(ValueError):
  """The cut was refused, because the masked and the small network differ.

  The message names the groups and tensors that are responsible, the first of them if
  there are many.

  Attributes:
    details: the whole message.
  """

  details: str


class Pruned(NamedTuple):
  """A network after surgery; `print(pruned)` shows what was gained.

  Run it as `pruned.apply(pruned.variables, inputs, train=False)`.

  Attributes:
    apply: f(variables, *inputs, **kwargs), for every input shape and mode of the model.
    variables: the small arrays, with gates that stay open multiplied into them.
    opt_state: the small optimizer state; None where none was given.
    arch: {module path: width} where the width is not the model's default; 0 for a
      branch or an exit that is gone.
    report: a dict ready for JSON: requested and reached cost, widths, kept indices.
    model: the small network in the kind that was given: `model.clone(arch=arch)` where
      the model has `arch`, a small NNX or Equinox module that holds its arrays, or the
      function itself. None where no such network computes what `apply` does, because
      the sizes stand in the code of the model.
    keep: the decision that was carried out.
    coupling: the Coupling of the full network.
  """

  apply: Callable
  variables: Any
  opt_state: Any
  arch: dict[str, int]
  report: dict
  model: Any
  keep: dict
  coupling: Coupling

  def __repr__(self) -> str:
    lines = ['Pruned:']
    for name, title in (('params', 'parameters'), ('flops', 'FLOPs (1 MAC = 2 FLOPs)')):
      before, after = self.report[name]['before'], self.report[name]['after']
      part = f'{100 * after / before:.1f} %' if before else 'none'
      lines.append(f'  {title}: {before:,} -> {after:,} ({part})')
    exits = [name for name, kept in self.report['exits'].items() if kept]
    lines += [f'  exits: {", ".join(exits)}'] if exits else []
    lines += [f'  note: {note}' for note in self.report['notes']]
    return '\n'.join(lines)


def prune(
  model: Any,
  variables: Any,
  keep: Mapping,
  example: Any,
  tx: Any = None,
  opt_state: Any = None,
  round_to: RoundTo = 1,
  allow_inexact: bool = False,
  gates: Mapping | None = None,
  coupling: Coupling | None = None,
  **kwargs,
) -> Pruned:
  """Cuts a network to what `keep` leaves and proves that nothing else changed.

  The small network is compared with the full one in which everything that is not kept
  is masked by gates::

    coupling = dp.couple(model, variables, images, train=False)
    keep = dp.oneshot(coupling, variables, target='50%')
    pruned = dp.prune(model, variables, keep, images, train=False)
    print(pruned)
    outputs = pruned.apply(pruned.variables, images, train=False)

  Args:
    model: a linen, NNX or Equinox module, or whatever else `couple` takes.
    variables: its arrays, as `couple` takes them.
    keep: {'channels': {group: bool [slices]}, 'branches': {path: bool}, 'exits':
      {name: bool}}, as `oneshot` or a method's `decide` returns it. Each part is
      optional, and what is missing is kept.
    example: the input, an array or a tree of arrays such as a dict or a NamedTuple; or
      a plain tuple or list of several inputs.
    tx: the optax optimizer of `opt_state`.
    opt_state: its state over variables['params'], or over `variables` where there is no
      such entry, or over some of these, as `nnx.Optimizer(net, tx, wrt=nnx.Param)` has
      it. It is cut like the variables; statistics of other shapes start anew, and
      `report['notes']` names them.
    round_to: widths become the next lower multiple of this, and at least one multiple.
      'auto' takes what this device is fast at, as `oneshot` does: decide with it, as
      rounding afterwards misses the target.
    allow_inexact: cut also where the masked and the small network differ; the report
      says by how much.
    gates: {'channels': {group: [slices]}}, the values of channel gates that are neither
      0 nor 1. They are multiplied into the weights that read the channels. The values
      of branch gates are taken from the variables.
    coupling: what `couple` returned for this model, to save calling it again.
    **kwargs: further arguments of the model's call, such as train=False.

  Returns:
    The Pruned network.

  Raises:
    InexactCut: the masked and the small network differ, for example because a width is
      normalised over; the message names the tensors. Or the network's own output is
      not finite.
    KeyError: `keep` has a group, branch or exit that the network does not have.
    ValueError: an entry of `keep` has the wrong shape or type, or no exit is left;
      gates cannot be multiplied into the weights; or opt_state does not belong to tx.
  """
  inputs = several(example)
  arguments.parts('keep', keep, known=('exits',))
  if coupling is None:
    coupling = couple(model, variables, *inputs, **kwargs)
  arguments.coupling(coupling).fits(variables)
  if gates is not None:
    arguments.parts('gates', gates)
  if opt_state is not None:
    if tx is None:
      has = 'opt_state was given without the tx that it belongs to'
      raise arguments.wrong('tx', has)
    arguments.optimizer(tx)
  settled, notes = settle(coupling, keep, variables, round_to)
  channels = (gates or {}).get('channels', {})
  inexact = _inexact(coupling, settled)
  if inexact and not allow_inexact:
    raise _refusal('masked and small network are not the same function', inexact)

  plan = index_plan(coupling, settled)

  def shrink(arrays, keep):
    folded = _folded(coupling, arrays, keep, channels)
    return cut(folded, plan if keep is settled else index_plan(coupling, keep))

  asked = dict(zip(('channels', 'branches', 'exits'), complete(coupling, keep)))
  small = shrink(variables, settled)
  verdict = verify(coupling, variables, small, inputs, shrink, asked, settled, channels)
  if verdict.responsible and not allow_inexact:
    if verdict.broken:
      raise arguments.brief(
        InexactCut(
          f'{verdict.broken}.\nNo cut of it can be checked: pass finite weights and '
          'inputs, or allow_inexact=True'
        )
      )
    raise _refusal(
      f'masked and small network differ by {verdict.difference:.1e} '
      f'(tolerance {verdict.tolerance:.0e})',
      verdict.responsible,
    )
  notes = [*notes, *inexact]
  if verdict.broken and not verdict.responsible:
    notes.append(verdict.broken)
  if opt_state is not None:
    full, left, prefix = variables, small, ''
    if isinstance(small, Mapping) and 'params' in small:
      full, left, prefix = variables['params'], small['params'], 'params/'
    opt_state, anew = cut_optimizer(tx, opt_state, full, left, plan, prefix)
    notes += anew
  apply = slim(model, coupling, settled)
  native, arch = _native(model, coupling, plan, settled, small, notes)
  kind = in_kind(model, coupling, apply, small) if native is None else native
  if kind is None and modules.is_module(model):
    notes.append('`model` is None, as its code states sizes: run it through `apply`')
  return Pruned(
    apply=apply,
    variables=small,
    opt_state=opt_state,
    arch=arch,
    report=_report(coupling, variables, keep, settled, plan, verdict, notes),
    model=kind,
    keep=settled,
    coupling=coupling,
  )


def in_kind(model: Any, coupling: Coupling, apply: Callable, variables: Any) -> Any:
  """Returns a small network in the kind of the full one, or None.

  Args:
    model: the full network.
    coupling: of the full network.
    apply: the small network as `slim` returns it.
    variables: the small arrays.

  Returns:
    A small module that holds the arrays where the network was such a module, otherwise
    the network itself; None unless it computes what `apply` does.
  """
  if modules.is_module(model):
    model = modules.rebuilt(model, variables)
  same = agrees(coupling, modules.runnable(model), apply, variables)
  return model if same else None


def has_shapes(model: Any, coupling: Coupling, variables: Any) -> bool:
  """Whether a linen module creates arrays of these shapes, branch gates left out."""
  key = jax.eval_shape(lambda: jax.random.key(0))
  wanted = paths_of(jax.eval_shape(model.init, key, *coupling.inputs))
  wanted = {p: x.shape for p, x in wanted.items() if not p.startswith('branches/')}
  return wanted == {p: x.shape for p, x in paths_of(variables).items()}


def _refusal(what: str, blame: Iterable[str]) -> InexactCut:
  reasons = '\n  '.join([f'{what}:', *blame])
  write = 'keep these groups whole, or pass allow_inexact=True'
  return arguments.brief(InexactCut(f'{reasons}\n{write}'))


def _inexact(coupling: Coupling, keep: Mapping) -> list[str]:
  """Describes every axis that is cut although its size enters the result."""
  sentences = []
  for name, kept in keep['channels'].items():
    group = coupling.groups[name]
    if group.kind == 'channel' and coupling.axis(name).notes and not np.all(kept):
      tensors = ', '.join(path for path, _ in group.members)
      sentences.append(f'{name}: {group.ungated}. Tensors: {tensors}')
  return sentences


def _folded(
  coupling: Coupling, variables: Any, keep: Mapping, channels: Mapping
) -> Any:
  """Multiplies gates that stay open, of branches and of channels, into the arrays."""
  leaves = paths_of(variables)
  layers = {
    branch: keep['channels'].get(group.name, True)
    for group in coupling.groups.values()
    if group.kind == 'layer'
    for branch in gates_of(coupling, group.name)
  }
  values = {}
  for branch in coupling.branches:
    kept = np.asarray(keep['branches'].get(branch, True))
    if kept.any():
      value = np.asarray(leaves[f'branches/{branch}']) * kept
      # A layer that is cut out takes its gate along, so its factor is 1.
      values[branch] = np.where(layers.get(branch, True), value, 1)
  variables = fold(coupling.view, variables, values, keep['exits'])
  open_ = {
    group: np.where(keep['channels'].get(group, True), np.asarray(gate), 1)
    for group, gate in channels.items()
  }
  return fold_channels(coupling.view, variables, open_, keep['exits'])


def _native(
  model: Any,
  coupling: Coupling,
  plan: IndexPlan,
  keep: Mapping,
  small: Any,
  notes: list,
) -> tuple[Any, dict[str, int]]:
  """The small network as a module, and its `arch`; None if `arch` cannot say it.

  A key of `arch` is the path of a kernel, whose last axis is its width, or the name of
  a group that the model knows, such as the heads of an attention.
  """
  known = getattr(model, 'widths', None)
  if not (isinstance(known, Mapping) and isinstance(model.arch, Mapping)):
    return None, {}
  arch = dict(model.arch)
  for path, masks in plan.items():
    if path.startswith('params/') and path.endswith('/kernel') and not masks[-1].all():
      name = path.removeprefix('params/').removesuffix('/kernel')
      arch[name] = int(masks[-1].sum())
  for group, kept in keep['channels'].items():
    if group in known and not np.all(kept):
      arch[group] = int(np.sum(kept))
  for branch, kept in keep['branches'].items():
    if not np.all(kept):
      arch[branch] = _layers_left(coupling, keep, branch)
  arch |= {f'exit/{e}': 0 for e, kept in keep['exits'].items() if not kept}
  if not {*arch} <= {*known}:  # the widths of a trunk that is not one of our models
    return None, {}
  make: Any = type(model.arch)
  native = model.clone(arch=make(arch))
  if not has_shapes(native, coupling, small):
    notes.append('this shape cannot be written as `arch`: run it through `apply`')
    return None, {}
  return native, arch


def _layers_left(coupling: Coupling, keep: Mapping, branch: str) -> int:
  """0 for a branch that is gone, else the number of layers left in its stack.

  Other branches may keep a layer in which this one is closed.
  """
  kept = keep['branches'][branch]
  if not np.any(kept):
    return 0
  axis = ax.norm(coupling.axes[f'branches/{branch}'][0])
  layers = (k for g, k in keep['channels'].items() if coupling.axis(g) is axis)
  return int(np.sum(next(layers, np.ones_like(kept))))


def _report(
  coupling: Coupling, variables: Any, asked: Mapping, keep: Mapping, plan: IndexPlan,
  verdict: Verdict, notes: list,
) -> dict:  # fmt: skip
  """What was asked for and what was reached, in plain JSON types."""
  decided = [*keep['channels'].values(), *keep['branches'].values()]
  if verdict.moved == 0 and not all(np.all(k) for k in decided):
    notes.append('closing these slices does not change the output')
  notes += verdict.responsible
  widths = {g: int(np.sum(k)) for g, k in keep['channels'].items()}
  costs = {'flops': cost.flops, 'params': cost.params, 'peak_bytes': cost.peak_bytes}
  left = cost.layers(coupling, keep)
  layers = {
    path: {
      'outputs': [*layer.outputs],
      'width': [layer.width, left[path].width if path in left else 0],
      'flops': [layer.flops, left[path].flops if path in left else 0],
    }
    for path, layer in cost.layers(coupling).items()
  }
  tensors = {}
  for path, x in paths_of(variables).items():
    if path in plan:
      masks = plan[path]
      cuts = {str(i): m for i, m in enumerate(masks) if not m.all()}
      tensors[path] = {
        'shape': [list(np.shape(x)), [int(m.sum()) for m in masks]],
        'kept': {i: np.flatnonzero(m).tolist() for i, m in cuts.items()},
      }
  return {
    'requested': {g: int(np.sum(k)) for g, k in asked.get('channels', {}).items()},
    **{
      name: {'before': int(of(coupling)), 'after': int(of(coupling, keep))}
      for name, of in costs.items()
    },
    'widths': {g: [x.size, widths.get(g, 0)] for g, x in coupling.groups.items()},
    'kept': {g: np.flatnonzero(k).tolist() for g, k in keep['channels'].items()},
    'branches': {b: bool(np.any(k)) for b, k in keep['branches'].items()},
    'exits': dict(keep['exits']),
    'tensors': tensors,
    'layers': layers,
    'verify': {
      'difference': verdict.difference,
      'settled': verdict.settled,
      'moved': verdict.moved,
      'tolerance': verdict.tolerance,
    },
    'notes': notes,
    'inputs': [list(np.shape(x)) for x in jax.tree.leaves(coupling.inputs)],
  }
