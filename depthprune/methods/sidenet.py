"""SideNet: small perceptrons on the features of a pretrained network answer early.

Morisot: "Add a SideNet to your MainNet" (NLDL 2022, arXiv 2007.13512). An example
leaves at the first SideNet that is surer than a threshold; the others go on. Several
SideNets, pooling to a grid and the regimes other than `frozen` are ours or of others:

  z_k    = W2 relu(W1 pool(h_k) + b1) + b2
  L      = sum_k CE(z_k, y)                  frozen (the paper's), and first of mixed
  L      = CE(z, y) + sum_k CE(z_k, y)       joint, and second of mixed

  h_k      features of the MainNet at the tap of SideNet k; a perceptron on them is
           models.heads.Head(tap, hidden=...)
  z_k, z   logits of SideNet k and of the MainNet
  y        labels;  CE their cross-entropy in nats

Frozen: neither parameters nor batch statistics of the MainNet change, so its features
can be computed once (`training.features`). Joint: all is trained together from the
start. Mixed: the MainNet first, then all together; reported best by arXiv 2407.14320.
"""

from collections.abc import Mapping
from typing import Literal, get_args

import jax
import jax.numpy as jnp
import optax

from depthprune.program.coupling import Coupling
from depthprune.program.trace import Decision
from depthprune.run.config import Config
from depthprune.train.method import Method
from depthprune.train.task import Task, Tree

Regime = Literal['frozen', 'joint']


def sidenet(coupling: Coupling, regime: Regime = 'frozen') -> Method:
  """The method for a network with a 'main' exit and others, such as `WithHeads`.

  What 'main' does not read belongs to the SideNets, in any network.

  Args:
    coupling: of the network, from `couple`.
    regime: 'frozen' trains the SideNets alone, 'joint' everything. Mixed is 'frozen',
      then 'joint' from what it left.

  Raises: ValueError without 'main' and another exit, for an unknown regime, and where a
    network in training mode is coupled: a MainNet is frozen in evaluation mode.
  """
  names = early(coupling)
  if regime not in get_args(Regime):
    expected = ', '.join(get_args(Regime))
    raise ValueError(f'sidenet: regime={regime!r}: expected one of {expected}')
  if coupling.kwargs.get('train'):
    raise ValueError(
      'sidenet: the MainNet is in training mode, where its batch statistics move and '
      'examples see each other; couple it with train=False'
    )
  trained = names if regime == 'frozen' else (*names, 'main')
  keep = dict.fromkeys(coupling.exits, True)

  def objective(task, outputs, batch, theta, step):
    del theta, step
    loss = jnp.stack([task.loss(outputs[name], batch) for name in trained]).sum()
    return loss, measured(task, outputs['main'], outputs, batch, names)

  return Method(
    objective=objective,
    decide=lambda theta, stats, evaluate: {'exits': keep},
    transform=lambda tx: tx if regime == 'joint' else only(tx, side_paths(coupling)),
    trunk_train=regime == 'joint',
  )


def early(coupling: Coupling) -> tuple[str, ...]:
  """The exits before the network's own. Raises ValueError where there are none."""
  names = tuple(name for name in coupling.exits if name != 'main')
  if not names or 'main' not in coupling.exits:
    raise ValueError(
      f"sidenet: expected a network with an exit 'main' and others, got "
      f'{", ".join(coupling.exits) or "none"}; models.heads.WithHeads has them on taps'
    )
  return names


def measured(
  task: Task, own: Tree, outputs: Tree, batch: Tree, names: tuple[str, ...]
) -> dict:
  """The metrics of the network's own logits, and of exits as '<metric>_<exit>'."""
  metrics = task.metrics(own, batch)
  for name in names:
    found = task.metrics(outputs[name], batch)
    metrics |= {f'{metric}_{name}': value for metric, value in found.items()}
  return metrics


def side_paths(coupling: Coupling) -> frozenset[str]:
  """Paths of the parameters that 'main' does not read: those of the SideNets."""
  main = Decision({}, {name: name == 'main' for name in coupling.exits})
  return coupling.view.unneeded(main) - coupling.view.unneeded(Decision({}, {}))


def only(
  tx: optax.GradientTransformation, paths: frozenset[str]
) -> optax.GradientTransformation:
  """tx for the parameters at these paths ('params/...'); the others stay."""

  def labels(tree: Tree) -> Tree:
    name = lambda path, _: jax.tree_util.keystr(path, simple=True, separator='/')
    kind = lambda path, leaf: 'side' if name(path, leaf) in paths else 'main'
    return jax.tree_util.tree_map_with_path(kind, tree)

  return optax.multi_transform({'side': tx, 'main': optax.set_to_zero()}, labels)


def configured(
  config: Config, coupling: Coupling, steps: int, scores: Mapping, whole: Coupling
) -> Method:
  """The method as a run describes it: its first stage, where there are two."""
  del steps, scores, whole
  o = config.options
  return sidenet(coupling, 'joint' if o.regime == 'joint' else 'frozen')
