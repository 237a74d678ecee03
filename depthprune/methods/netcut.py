"""NetCut: a head on every layer, and training finds the layer to stop at.

Wójcik, Wołczyk, Bałazy, Tabor: "Finding the Optimal Network Depth in Classification
Tasks" (ECML-PKDD 2020, arXiv 2004.08172). Costs other than the layer's index, and when
a cut is refused, are ours:

  w      = softmax(v),  v = 0 at the start
  s(c)   = sum_k w_k log p_k(c)
  L      = mean_i[ -s(y_i) ] + gamma mean_i[ log sum_c exp s(c) ] + beta sum_k c_k w_k
  k*     = argmax_k w_k

  p_k      probabilities of head k;  y_i  the label of example i
  v, w     importance of the heads, logits and weights
  s        the network's answer before the cut: log-probabilities, not normalised
  gamma    share of their normaliser in the loss; 0 in the paper, 0.9 or 1 its ablation
  c_k      cost of a network that ends at head k; c_k = k, or scaled so that c_K = K
  beta     price of a unit of cost, in nats of cross-entropy
  k*       where the network is cut, once, after training

With gamma = 0, L = sum_k w_k (CE_k + beta c_k) is linear in w, so its minimum is a
single head. That is not so of the two other aggregates, given for comparison: `linear`
is s = log sum_k w_k p_k, and `geometric` normalises s, which is gamma = 1.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
import optax

from depthprune import distributed as hosts
from depthprune.program import cost as costs
from depthprune.program.coupling import Coupling
from depthprune.run.config import Config
from depthprune.storage import directory as record
from depthprune.timing import clock
from depthprune.train.method import CutRefused, Method, apart
from depthprune.train.task import Task, Tree, mean

Aggregate = Literal['log', 'linear', 'geometric']
Cost = Literal['index', 'flops', 'params', 'milliseconds']
BATCH = 128  # images that milliseconds are measured with


def netcut(
  coupling: Coupling,
  beta: float = 0.01,
  aggregate: Aggregate = 'log',
  gamma: float = 0.0,
  cost: Cost | np.ndarray = 'index',
  tolerance: float = 0.5,
  force: bool = False,
  importance_lr: float = 1e-3,
) -> Method:
  """The method for one network with exits, such as `models.heads.every_tap` gives.

  Args:
    coupling: of the network, from `couple`; every exit is a candidate.
    beta: as above, >= 0. aggregate: 'log' is the paper's. gamma: of 'log' alone.
    cost: c, what it is measured in, or [exits] itself, from the first exit on.
    tolerance: points of held-out accuracy that the cut may cost. force: cut anyway.
    importance_lr: of v, which Adam trains.

  Raises: ValueError for fewer than two exits, and for a beta, gamma or cost that is
    negative, not finite, or of another shape. `decide` raises CutRefused.
  """
  exits = coupling.exits
  _check(exits, beta, aggregate, gamma)
  c = cost_of_exits(coupling, cost) if isinstance(cost, str) else np.asarray(cost)
  if c.shape != (len(exits),):
    raise ValueError(f'netcut: cost has shape {c.shape}, expected ({len(exits)},)')
  _not_negative('cost', c)
  importance = lambda theta: jax.nn.softmax(theta['importance'])
  answer = partial(_mixture, exits, aggregate)

  def objective(task, outputs, batch, theta, step):
    del step
    w, s = importance(theta), answer(task, outputs, theta)
    if aggregate == 'log':
      loss = w @ jnp.stack([task.loss(outputs[e], batch) for e in exits])
      if gamma:
        loss += gamma * mean(jax.nn.logsumexp(s, axis=-1), batch)
    else:
      loss = task.loss(s, batch)  # which normalises s
    return loss, {**task.metrics(s, batch), 'expected_cost': w @ jnp.float32(c)}

  def decide(theta, stats, evaluate):
    del stats
    kept = exits[int(np.argmax(theta['importance']))]
    keep = {'exits': {name: name == kept for name in exits}}
    _worth_it(report(theta), kept, evaluate, keep, tolerance, force)
    return keep

  report = lambda theta: _said(exits, importance(theta), c)
  return Method(
    objective=objective,
    decide=decide,
    penalty=lambda theta, step: beta * (jnp.float32(c) @ importance(theta)),
    init=lambda gates, outputs: {'importance': jnp.zeros(len(exits), jnp.float32)},
    transform=lambda tx: apart(tx, optax.adam(importance_lr)),
    answer=answer,
    report=report,
  )


def _check(exits: tuple[str, ...], beta, aggregate: str, gamma) -> None:
  if len(exits) < 2:
    raise ValueError(
      f'netcut: expected a network with two or more exits, got {len(exits)}; '
      'models.heads.every_tap(model) puts a head on every layer, or at the end of '
      'every scanned segment'
    )
  if aggregate not in get_args(Aggregate):
    expected = ', '.join(get_args(Aggregate))
    raise ValueError(f'netcut: aggregate={aggregate!r}: expected one of {expected}')
  _not_negative('beta', beta)
  _not_negative('gamma', gamma)
  if aggregate != 'log' and gamma:
    raise ValueError(
      f"netcut: gamma is for aggregate='log', got {aggregate!r}: leave gamma at 0"
    )


def _mixture(exits, aggregate: str, task: Task, outputs: Tree, theta: Tree):
  """s, the network's answer."""
  log_p = jnp.stack([task.log_probs(outputs[e]) for e in exits])
  if aggregate == 'linear':
    log_w = jax.nn.log_softmax(theta['importance'])
    log_w = jnp.expand_dims(log_w, range(1, log_p.ndim))
    return jax.nn.logsumexp(log_w + log_p, axis=0)
  return jnp.tensordot(jax.nn.softmax(theta['importance']), log_p, 1)


def cost_of_exits(coupling: Coupling, of: Cost) -> np.ndarray:
  """c [exits] of the networks that end at each exit, float64, the last of them K.

  of: 'index' (1, 2, ... K), 'flops' (1 MAC = 2 FLOPs), 'params', or 'milliseconds' on
    this device, the medians of interleaved calls with BATCH images.
  """
  exits = coupling.exits
  if of not in get_args(Cost):
    raise ValueError(f'cost={of!r}: expected one of {", ".join(get_args(Cost))}')
  if of == 'index':
    return np.arange(1.0, len(exits) + 1)
  if of == 'milliseconds':
    c = _milliseconds(coupling)
  else:
    count: Callable = {'flops': costs.flops, 'params': costs.params}[of]
    only = lambda kept: {'exits': {name: name == kept for name in exits}}
    c = np.array([float(count(coupling, only(name))) for name in exits])
  return c * len(exits) / c[-1]


def configured(
  config: Config, coupling: Coupling, steps: int, scores: Mapping, whole: Coupling
) -> Method:
  """The method as a run describes it.

  Milliseconds are measured once and kept in the run's folder: a run that is resumed
  goes on with the costs that it began with.
  """
  del steps, scores, whole
  o, known = config.options, config.path / 'costs.json'
  measured = o.cost == 'milliseconds'
  before = record.read(known) if measured else None
  c = np.array(before[o.cost]) if before else cost_of_exits(coupling, o.cost)
  c = hosts.agreed(c)
  if measured:
    record.write(known, {o.cost: c.tolist()})
  return netcut(
    coupling,
    o.beta,
    o.aggregate,
    o.gamma,
    c,
    o.tolerance,
    o.force,
    o.importance_learning_rate,
  )


def _said(exits: tuple[str, ...], w: jax.Array, c: np.ndarray) -> Tree:
  """Importance and cost by exit; the maximum; entropy as a share of the possible."""
  entropy = -jnp.sum(w * jnp.log(jnp.maximum(w, 1e-30))) / np.log(len(exits))
  return {
    'importance': {name: w[k] for k, name in enumerate(exits)},
    'cost': {name: jnp.float32(c[k]) for k, name in enumerate(exits)},
    'max_importance': w.max(),
    'entropy': entropy,
  }


def _worth_it(said: Tree, kept: str, evaluate, keep: Tree, tolerance, force) -> None:
  """Raises CutRefused where held-out accuracy falls by more than the tolerance."""
  before, after = (100 * evaluate(k)['accuracy'] for k in ({}, keep))
  if before - after > tolerance and not force:
    raise CutRefused(
      f'netcut: cut at {kept} (importance {said["max_importance"]:.2f}, entropy '
      f'{said["entropy"]:.2f} of the possible), held-out accuracy falls from '
      f'{before:.2f} to {after:.2f} %, by more than {tolerance:g} points: train '
      "longer, use aggregate='log', or cut anyway: force=True (--force)"
    )


def _milliseconds(coupling: Coupling) -> np.ndarray:
  """Medians of the networks up to each exit, on arrays of ones."""
  ones = lambda tree: jax.tree.map(lambda s: jnp.ones(s.shape, s.dtype), tree)
  inputs = [jnp.ones((BATCH, *x.shape[1:]), x.dtype) for x in coupling.inputs]
  variables = ones(coupling.variables)
  upto = lambda name: jax.jit(
    lambda variables, *inputs: coupling.fn(variables, *inputs, **coupling.kwargs)[name]
  )
  networks = [upto(name) for name in coupling.exits]
  calls = [lambda f=f: f(variables, *inputs) for f in networks]
  return np.median(clock.interleave(calls), axis=1)


def _not_negative(name: str, value) -> None:
  if not (np.isfinite(value).all() and (np.asarray(value) >= 0).all()):
    raise ValueError(f'netcut: {name} must be finite and not negative, got {value}')
