"""The branch gates of a network: as they are, trained, opened, and after a cut."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp

from depthprune.program.plug import with_branches
from depthprune.surgery.cut import Pruned
from depthprune.training.method import Method, Tree
from depthprune.training.step import State, branches_of


def trained(method: Method, state: State) -> Tree:
  """The state's variables with the branch gates that the method has trained."""
  gates = method.forward(state.theta, jax.random.key(0), state.step)
  found = gates.get('branches')
  return with_branches(state.variables, found) if found else state.variables


def opened(variables: Tree) -> Tree:
  """The variables with all branch gates one, so that a cut folds nothing."""
  ones = jax.tree.map(jnp.ones_like, branches_of(variables))
  return with_branches(variables, ones) if ones else variables


def carried(pruned: Pruned, gates: Mapping[str, jax.Array], *inputs: jax.Array) -> Tree:
  """The small variables of a cut that folded nothing, with the gates that are left.

  gates: {path: gate} before the cut. inputs: an example of what the network reads.
  """
  if not pruned.arch:
    return pruned.variables
  shapes = jax.eval_shape(pruned.model.init, jax.random.key(0), *inputs)
  ones = jax.tree.map(lambda s: jnp.ones(s.shape, s.dtype), shapes.get('branches', {}))
  if not ones:
    return pruned.variables
  variables, keep = {**pruned.variables, 'branches': ones}, pruned.keep['branches']
  left = {
    path: gates[path][keep[path]] if one.ndim else gates[path]
    for path, one in branches_of(variables).items()
  }
  return with_branches(variables, left)
