"""How much every channel of a network matters to its loss, by the slope of its gate.

Molchanov, Mallya, Tyree, Frosio, Kautz: "Importance Estimation for Neural Network
Pruning" (CVPR 2019, arXiv 1906.10771). With a gate on the channel's output,

  I = E[ (dL / dg)^2 ]        at g = 1: the squared first-order change of the loss
"""

from collections.abc import Iterable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from depthprune.data.dataset import inputs_of
from depthprune.distributed import fetch
from depthprune.program.coupling import Coupling
from depthprune.train.step import branches_of, gated
from depthprune.train.task import Task, Tree, as_dict


def taylor(
  model: Any,
  coupling: Coupling,
  variables: Tree,
  task: Task,
  batches: Iterable[Tree],
  branches: bool = False,
) -> dict[str, np.ndarray]:
  """Estimates how much the loss changes when a channel, or a branch, is closed.

  Args:
    model: the network, in evaluation mode.
    coupling: its coupling.
    variables: its arrays.
    task: whose loss it is.
    batches: batches of training data, at least one; smaller ones tell more.
    branches: whether to score the branches of the network too.

  Returns:
    {group: float [slices]}, the mean over batches of the squared slope of the loss by
    the channel's gate, for all groups that can be gated; and with `branches`
    {path: float () or [layers]} for their gates.
  """
  run = partial(gated(model, coupling), train=False)

  @jax.jit
  def squared(variables, gates, batch):
    def loss(gates):
      outputs = as_dict(run(variables, gates, *inputs_of(batch)))
      return task.loss(task.answer(outputs), batch)

    slopes = jax.grad(loss)(gates)
    return {k: jnp.square(s) for part in slopes.values() for k, s in part.items()}

  gates = {'channels': coupling.gates()['channels']}
  if branches:
    gates['branches'] = branches_of(variables)
  gates = jax.tree.map(jnp.asarray, gates)
  each = [squared(variables, gates, batch) for batch in batches]
  return {name: np.mean([fetch(one[name]) for one in each], axis=0) for name in each[0]}
