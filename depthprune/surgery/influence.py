"""How much a block changes what goes through it, over a calibration set.

Source: Men et al., arXiv 2403.03853 (ShortGPT): the block influence 1 - E[cos(x, y)] of
what enters a block and what leaves it, over all tokens. Neither labels nor gradients
are needed.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from depthprune.program import arguments
from depthprune.program import jaxpr as jx
from depthprune.program.coupling import Coupling
from depthprune.program.trace import View, remembered, split_arrays
from depthprune.program.units import TRUNK, meetings
from depthprune.surgery.activations import calls

TINY = 1e-12  # for vectors of zeros


def block_influence(
  coupling: Coupling,
  variables: Any,
  batches: Iterable[Any],
  blocks: Mapping[str, Sequence[str]] | None = None,
) -> dict[str, float]:
  """Scores blocks by one minus the cosine between what enters and what leaves them.

  The block with the smallest influence is the first to go::

    blocks = {
      f'layer{i}': [f'layer{i}/attention/branch', f'layer{i}/mlp/branch']
      for i in range(model.depth)
    }
    influence = dp.block_influence(coupling, variables, [tokens], blocks)
    least = min(influence, key=influence.get)
    keep = {'branches': {branch: np.asarray(False) for branch in blocks[least]}}

  Where the branches of a block lie in a scan over layers, with gates [layers], every
  layer is scored as a block of its own, 'NAME[0]', 'NAME[1]', ...

  Args:
    coupling: of the network, made by `couple` in the mode that is to be measured.
    variables: its arrays.
    batches: the calibration set, in batches of any sizes, as `activations` takes it.
    blocks: {name: the branches of a block, first to last}. By default every branch is
      one. A block begins where the branch of its first gate is computed from, and ends
      where its last one is added.

  Returns:
    {name: influence}, 0 for a block that only scales what goes through it, 2 at most:
    the mean over examples and positions.

  Raises:
    KeyError: there is no such branch.
    ValueError: a branch that is added to nothing, a block of which only a part lies in
      a scan, or no batches.
  """
  arguments.coupling(coupling).fits(variables)
  if blocks is None:
    blocks = {b.removesuffix('/branch'): [b] for b in coupling.branches}
  if not blocks:
    raise arguments.wrong('coupling', 'the network has no branches to score', TRUNK)
  for branch in (b for branches in blocks.values() for b in branches):
    if branch not in coupling.branches:
      there = arguments.listed(coupling.branches)
      raise KeyError(f'blocks: no branch {branch!r}; there are: {there}')
  views = remembered(lambda inputs, kw: coupling.retrace(coupling.fn, inputs, kw))

  @jax.jit
  def measured(variables, inputs, named):
    kwargs = {**coupling.kwargs, **named}
    view = views(inputs, kwargs)
    ends = {name: _ends(view, branches) for name, branches in blocks.items()}
    arrays, _ = split_arrays((inputs, kwargs))
    flat = [*jax.tree.leaves(variables), *arrays]
    _, changes = _measure(view.program, flat, ends)
    if apart := ends.keys() - changes.keys():
      name = min(apart)
      what = f'blocks: {name}: {arguments.listed(blocks[name])} begin or end in a scan'
      raise ValueError(f'{what} that the others are not in; score them one by one')
    return changes

  parts = [measured(variables, *call) for call in calls(coupling, batches)]
  influence = {}
  for name, branches in blocks.items():
    layers = coupling.branch_shape(branches[0])
    rows = [part[name].reshape(*layers[:1], -1) for part in parts]
    mean = np.concatenate(rows, -1).mean(-1, dtype=float)
    named = {name: mean}
    if layers:
      named = {f'{name}[{i}]': each for i, each in enumerate(mean)}
    influence |= {key: float(each) for key, each in named.items()}
  return influence


def _measure(
  program: jx.Program, args: Sequence, ends: Mapping[str, tuple[jx.Value, jx.Value]]
) -> tuple[list, dict[str, jax.Array]]:
  """Runs a program; returns its outputs and {block: changes between its ends}.

  Of a block in a scan, the first axis of the changes is that of the layers.
  """
  wanted = {v for pair in ends.values() for v in pair}
  seen: dict[jx.Value, jax.Array] = {}
  changes: dict[str, jax.Array] = {}

  def execute(e: jx.Equation, ins: list) -> list:
    if e.name == 'scan':
      layer = lambda body, ins, _: _measure(body, ins, ends)
      outs, inside = jx.scan_with(e, ins, e.params, layer)
      changes.update(inside)
    else:
      outs = jx.bind(e, ins, e.params, jx.run)
    values = zip((*e.inputs, *e.outputs), (*ins, *outs), strict=True)
    seen.update((v, x) for v, x in values if v in wanted)
    return outs

  outputs = jx.interpret(program, args, execute)
  here = {n: pair for n, pair in ends.items() if seen.keys() >= {*pair}}
  return outputs, changes | {
    n: _changes(seen[x], seen[y]) for n, (x, y) in here.items()
  }


def _ends(view: View, branches: Sequence[str]) -> tuple[jx.Value, jx.Value]:
  """The values that enter and leave a block in the order of its branches."""
  met = []
  for branch in branches:
    first, *_ = [*meetings(view.program, view.leaves[f'branches/{branch}']), None]
    if first is None or first.shortcut is None or first.total is None:
      raise ValueError(f'{branch}: nothing is added to it')
    met.append((first.shortcut, first.total))
  return met[0][0], met[-1][1]


def _changes(x: jax.Array, y: jax.Array) -> jax.Array:
  """1 - cos(x, y) of vectors along the last axis."""
  x, y = x.astype(jnp.float32), y.astype(jnp.float32)
  sizes = jnp.linalg.norm(x, axis=-1) * jnp.linalg.norm(y, axis=-1)
  return 1 - (x * y).sum(-1) / jnp.maximum(sizes, TINY)
