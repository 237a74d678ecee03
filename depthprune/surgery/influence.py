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
from depthprune.program.units import meetings
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
    ValueError: a branch that lies in a scan or is added to nothing, or no batches.
  """
  arguments.coupling(coupling).fits(variables)
  if blocks is None:
    blocks = {b.removesuffix('/branch'): [b] for b in coupling.branches}
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
    wanted = {v for pair in ends.values() for v in pair}
    seen: dict[jx.Value, jax.Array] = {}

    def execute(e: jx.Equation, ins: list) -> list:
      outs = jx.bind(e, ins, e.params, run)
      values = zip((*e.inputs, *e.outputs), (*ins, *outs), strict=True)
      seen.update((v, x) for v, x in values if v in wanted)
      return outs

    def run(program: jx.Program, args: Sequence) -> list:
      return jx.interpret(program, args, execute)

    arrays, _ = split_arrays((inputs, kwargs))
    run(view.program, [*jax.tree.leaves(variables), *arrays])
    return {name: _changes(seen[x], seen[y]) for name, (x, y) in ends.items()}

  parts = [measured(variables, *call) for call in calls(coupling, batches)]
  changes = {n: np.concatenate([part[n].ravel() for part in parts]) for n in blocks}
  return {name: float(each.mean(dtype=float)) for name, each in changes.items()}


def _ends(view: View, branches: Sequence[str]) -> tuple[jx.Value, jx.Value]:
  """The values that enter and leave a block in the order of its branches."""
  met = []
  for branch in branches:
    first, *_ = [*meetings(view.program, view.leaves[f'branches/{branch}']), None]
    if first is None or first.shortcut is None or first.total is None:
      raise ValueError(
        f'{branch}: it lies in a scan, or nothing is added to it; unroll the network '
        '(scan=False) to measure its blocks'
      )
    met.append((first.shortcut, first.total))
  return met[0][0], met[-1][1]


def _changes(x: jax.Array, y: jax.Array) -> jax.Array:
  """1 - cos(x, y) of vectors along the last axis."""
  x, y = x.astype(jnp.float32), y.astype(jnp.float32)
  sizes = jnp.linalg.norm(x, axis=-1) * jnp.linalg.norm(y, axis=-1)
  return 1 - (x * y).sum(-1) / jnp.maximum(sizes, TINY)
