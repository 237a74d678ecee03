"""A trained network masked by a decision, or by several in one program.

What is closed is an argument of the compiled program, so that one serves them all.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from depthprune.training.evaluate import totals
from depthprune.training.method import Method, Tree, as_dict
from depthprune.training.recalibrate import COLLECTION, recalibrate
from depthprune.training.step import State, branches_of, gated
from depthprune.training.tasks import Task


class Decisions(NamedTuple):
  """One decision, or several: then every leaf has one more axis in front, [n, ...].

  Attributes:
    keep: {'channels': {group: [slices]}, 'branches': {path: []}}, float32, each part
      optional.
    closes: bool, whether it closes a branch.
    exit: int32, which of the exits that the program was told of answers.
    stats: batch statistics to run with; None for those that the network has.
  """

  keep: Tree
  closes: np.ndarray
  exit: np.ndarray
  stats: Tree = None


class Masked(NamedTuple):
  """Programs over a trained network, compiled once for every shape.

  `how` is 'vmap' or 'map' for several decisions, 'one' for one; `exits` are names of
  exits, and without any the method says what the answer is.

  Attributes:
    measure: (how, exits, decisions, batch) -> the task's sums over the batch.
    statistics: (how, decisions, batch) -> batch statistics of that batch alone.
    outputs: (*inputs) -> outputs by name, as trained.
    stats: the batch statistics that the network has, {} if none.
    scores: (sums of all batches) -> {'loss', 'accuracy', ...}, the task's.
  """

  measure: Callable[..., Tree]
  statistics: Callable[..., Tree]
  outputs: Callable[..., dict[str, jax.Array]]
  stats: Tree
  scores: Callable[[Tree], dict[str, np.ndarray]]


def masked(
  model: Any, method: Method, task: Task, state: State, coupling: Any = None
) -> Masked:
  """The programs of a network as a method has trained it; arguments as for `judge`."""
  run, variables = gated(model, coupling), state.variables
  given = method.forward(state.theta, jax.random.key(0), state.step)
  gates = {
    'channels': given.get('channels', {}),
    'branches': {**branches_of(variables), **given.get('branches', {})},
  }
  answer = partial(_answer, method, task)
  measure = jax.jit(partial(_measure, run, task, answer), static_argnums=(3, 4))
  statistics = jax.jit(partial(_statistics, run), static_argnums=2)
  return Masked(
    partial(measure, variables, gates, state.theta),
    partial(statistics, variables, gates),
    lambda *inputs: as_dict(run(variables, gates, *inputs, train=False)),
    variables.get(COLLECTION, {}),
    task.scores,
  )


def _measure(run, task, answer, variables, gates, theta, how, exits, decisions, batch):
  def one(d: Decisions):
    arrays = variables if d.stats is None else {**variables, COLLECTION: d.stats}
    says = partial(answer, theta, exits, d.exit)
    return totals(run, task, says, arrays, _closed(gates, d.keep), batch)

  return _over(how, one, decisions)


def _statistics(run, variables, gates, how, decisions, batch):
  def one(d: Decisions):
    closed = _closed(gates, d.keep)
    apply = lambda variables, *args, **kwargs: run(variables, closed, *args, **kwargs)
    return recalibrate(apply, variables, [batch])[COLLECTION]

  return _over(how, one, decisions)


def _answer(method: Method, task: Task, theta, exits, exit, outputs: Tree) -> jax.Array:
  if not exits:
    return method.answer(task, outputs, theta)
  logits = [outputs[name] for name in exits]
  return logits[0] if len(exits) == 1 else jnp.stack(logits)[exit]


def _closed(gates: Tree, keep: Tree) -> Tree:
  """The trained gates, closed where keep says so."""
  trained = gates['branches']
  # A path that is not among them is refused where the gates are put in place.
  branches = {p: trained.get(p, 1.0) * k for p, k in keep.get('branches', {}).items()}
  return {
    'channels': {**gates['channels'], **keep.get('channels', {})},
    'branches': {**trained, **branches},
  }


def _over(how: str, one: Callable[[Decisions], Tree], decisions: Decisions) -> Tree:
  if how == 'one':
    return one(decisions)
  return jax.vmap(one)(decisions) if how == 'vmap' else jax.lax.map(one, decisions)
