"""Multiplies gates that stay open without being 1 into the arrays of the network.

Branches: y·g with y = BN(conv(x)) equals BN with its scale and bias multiplied by g.
`program.carriers` finds the arrays that can carry the factor.

Channels: a gate acts where its axis is contracted, so the weight that is contracted
carries it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from depthprune.program import axes as ax
from depthprune.program import gating
from depthprune.program import jaxpr as jx
from depthprune.program.carriers import carriers_of
from depthprune.program.trace import View, paths_of


def fold(
  view: View, variables: Any, values: Mapping[str, np.ndarray], exits: Mapping[str, Any]
) -> Any:
  """Returns the variables with each branch gate multiplied into its branch's arrays.

  Args:
    view: of the full network.
    variables: its arrays. They keep their branch gates.
    values: {path: value} of each gate that stays, with 0 where a layer of a scan is
      closed. Gates that are 1 everywhere change nothing.
    exits: {name: bool}. Arrays that only a dropped exit needs are not changed.

  Raises:
    ValueError: some value that the gate scales cannot be traced back to variables that
      are read only there.
  """
  leaves, program = paths_of(variables), view.kept(exits)
  names = {v: p for p, v in view.leaves.items() if not p.startswith('branches/')}
  for branch, value in values.items():
    if np.all(value == 1):
      continue
    path = f'branches/{branch}'
    positive = bool(np.all(value >= 0))
    carriers = carriers_of(program, view.leaves[path], set(names), positive)
    if carriers is None:
      raise ValueError(
        f'{path}: its value {np.round(value, 4)} cannot be folded: all that it scales '
        'must end in weights of its own; set the gate to 1 or close the branch'
      )
    for v in carriers:
      leaf = leaves[names[v]]
      factor = np.reshape(value, np.shape(value) + (1,) * (leaf.ndim - np.ndim(value)))
      if not isinstance(leaf, Tracer):  # on the host, where nothing is compiled
        leaf = np.asarray(leaf)
      leaves[names[v]] = jnp.asarray(leaf * factor.astype(leaf.dtype))
  return jax.tree.unflatten(jax.tree.structure(variables), list(leaves.values()))


def fold_channels(
  view: View, variables: Any, values: Mapping[str, np.ndarray], exits: Mapping[str, Any]
) -> Any:
  """Returns the variables with channel gates multiplied into the weights they scale.

  Args:
    view: of the full network.
    variables: its arrays.
    values: {group: [slices]}, the values of the gates where slices are kept, else 1.
    exits: {name: bool}. Arrays that only a dropped exit needs are not changed.

  Raises:
    ValueError: a gate that is not 1 is read by something other than weights that are
      read once.
  """
  soft = {group: value for group, value in values.items() if not np.all(value == 1)}
  if not soft:
    return variables
  gates: dict[ax.Axis, Any] = {}
  for group, value in soft.items():
    gating.place(group, view.groups[group], jnp.asarray(value, jnp.float32), gates)
  leaves = paths_of(variables)
  paths = {v: (path, 0) for path, v in view.leaves.items()}
  for path, factor in _channel_factors(view, view.kept(exits), paths, gates):
    leaf = leaves[path]
    leaves[path] = jnp.asarray(leaf * factor.astype(leaf.dtype))
  return jax.tree.unflatten(jax.tree.structure(variables), list(leaves.values()))


def _channel_factors(
  view: View, program: jx.Program, paths: Mapping, gates: Mapping
) -> Iterator[tuple[str, jax.Array]]:
  """Yields (path of a variable, factor that broadcasts to it) per gated contraction.

  `paths` is {value: (path of the variable, number of its leading axes that loops run
  over)}.
  """
  equations, _ = jx.live(program)
  made_by = {v: e for e in equations for v in e.outputs}
  uses = Counter(v for e in equations for v in e.inputs)
  for e in equations:
    for k, axis in gating.gated_side(view.facts, e):
      gate = gating.expand(view.facts.dims[e.inputs[k]][axis], gates)
      if gate is not None:
        yield _carried_by(e, k, axis, gate, made_by, uses, paths)
    for body, inputs in jx.bodies_with_inputs(e):
      loops = set(jx.scan_parts(e, list(body.inputs))[2]) if e.name == 'scan' else set()
      inside = {
        inner: (paths[v][0], paths[v][1] + (inner in loops))
        for inner, v in zip(body.inputs, inputs)
        if v in paths and uses[v] == 1
      }
      yield from _channel_factors(view, body, inside, gates)


def _carried_by(e, k: int, axis: int, gate, made_by, uses, paths):
  """Returns the path behind input k of an equation, and the factor that it carries."""
  v = e.inputs[k]
  shape = [-1 if i == axis else 1 for i in range(len(v.shape))]
  factor = jnp.broadcast_to(gate.reshape(shape), v.shape)
  while v not in paths and v in made_by and uses[v] == 1:
    move = made_by[v]
    if move.name not in ('transpose', 'reshape', 'squeeze', 'convert_element_type'):
      break
    if move.name == 'transpose':
      factor = factor.transpose(np.argsort(move.params['permutation']))
    v = move.inputs[0]
    factor = factor.reshape(v.shape)
  if v not in paths or uses[v] != 1:
    raise ValueError(
      f'{e.where}: a channel gate that is neither 0 nor 1 cannot be folded: what reads '
      'the channels has to be a weight that is read once. Round the gates to 0 or 1, '
      'or keep the group whole'
    )
  path, loops = paths[v]
  return path, factor.reshape((1,) * loops + factor.shape)
