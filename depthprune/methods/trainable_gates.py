"""Trainable gates: channels are opened and closed by gradient descent.

Kim, Park, Jung, Choe: "Differentiable Pruning Method for Neural Networks" (arXiv
1904.10921; v2 "Plug-in, Trainable Gate for Streamlining Arbitrary Neural Networks",
AAAI 2020). The gate is the paper's; how the target enters, and how gates start and
move, is ours:

  b(w)     = 1[w > 0]              forward
  db / dw  = g(w)                  backward: the paper's limit of a steep sawtooth
  L        = task + lambda (rho_t - C(b) / C_0)^2
  w       <- w - eta_t (dL / dw) / c
  rho_t    = 1 + (rho - 1) min(1, 2 t / T)
  eta_t    = eta min(1, max(0, 3 - 4 t / T))

  w        one gate weight per channel of every coupled group
  b(w)     the gate: multiplies the channel wherever it is read
  g        surrogate derivative: constant 1, or that of sigmoid or tanh
  C, C_0   FLOPs (or parameters, or milliseconds) of the network as it would be cut, and
           of the full one
  c        d(C / C_0) / db in the full network, the price of a channel of the group
  rho      the fraction of C_0 that is to remain; rho_t: on the way there, in step t
  lambda   strength
  eta      learning rate of the gates; they rest in the last quarter of the T steps

The penalty is two-sided, so channels can reopen. Divided by the price it moves all
gates alike, and what the task says counts per unit of cost; otherwise the first layers,
whose channels are dear, would go first. Milliseconds are measured, and noise may make a
channel seem free: no price is below LEAST of the mean. All gates start open, evenly
spaced in their group: equal ones would close in one step. The largest gate of a group
stays open whatever its weight: a network with an empty layer has no gradient to lead it
back. Where widths are rounded, the gates are so in training too, with the same
gradient.
"""

from collections.abc import Callable, Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax

from depthprune import distributed as hosts
from depthprune.gates import Surrogate, straight_through
from depthprune.program import cost
from depthprune.program.coupling import Coupling
from depthprune.run.config import Config
from depthprune.storage import directory as record
from depthprune.timing import latency
from depthprune.timing.layers import TIME, Cost, Milliseconds, Session, counted, session
from depthprune.train.method import Method, apart, openness, spare_closed, supervised
from depthprune.train.target import on_target, reachable
from depthprune.train.task import Tree

START = 0.1  # mean gate weight of a group at the start
LEAST = 0.1  # of the mean price of a channel, where prices are measured


def trainable_gates(
  coupling: Coupling,
  target: float = 0.5,
  of: str | Cost = 'flops',
  strength: float = 200.0,
  gate_lr: float = 2e-4,
  surrogate: Surrogate = 'constant',
  round_to: int = 1,
  steps: int = 0,
  scores: Mapping[str, np.ndarray] | None = None,
) -> Method:
  """The method for one network.

  Args:
    coupling: of the network, from `couple`.
    target: rho in (0, 1], the fraction of the cost that is to remain.
    of: 'flops' (1 MAC = 2 FLOPs), 'params', or 'milliseconds', measured now on this
      device for a batch of 128; for another,
      `milliseconds(coupling, batch, round_to=round_to)`.
    strength: lambda. gate_lr: eta. surrogate: g.
    round_to: widths are multiples of this.
    steps: T, the length of the training; 0 asks for rho at once and lets no gate rest.
    scores: {group: [n]} (`oneshot.rank`), which channels start nearer to closing; by
      default they start in an arbitrary order.

  Raises: ValueError when no channel can be gated, or when the target is not in (0, 1]
    or below the cost with one channel (one multiple of round_to) left per group.
  """
  name, C = counted(coupling, of, round_to)
  reachable(coupling, target, C, round_to)
  rho = target
  start = coupling.gates()['channels']
  C_0 = float(C(coupling, None))  # of a ResNet-50 it is no int32
  c = jax.grad(lambda b: C(coupling, b) / C_0)({'channels': start})
  if name == TIME:
    c = _not_free(c)

  def forward(theta, key=None, step=None):
    del key, step
    return jax.tree.map(lambda w: gate(w, surrogate, round_to), theta)

  share = lambda theta: C(coupling, forward(theta)) / C_0
  passed = lambda step: step.astype(jnp.float32) / steps if steps else jnp.float32(0.5)
  rho_t = lambda step: 1 + (rho - 1) * jnp.minimum(1, 2 * passed(step))
  eta_t = lambda step: gate_lr * jnp.clip(3 - 4 * passed(step), 0, 1)

  def objective(task, outputs, batch, theta, step):
    loss, metrics = supervised(task, outputs, batch, theta, step)
    return loss, {**metrics, name: share(theta), 'target': rho_t(step)}

  def open_part(trained):
    params = openness(coupling, forward(trained['theta']), trained['params'])
    return {'params': params, 'theta': jax.tree.map(jnp.ones_like, trained['theta'])}

  return Method(
    objective=objective,
    decide=lambda theta, stats, evaluate: on_target(
      coupling, theta['channels'], rho, C, round_to
    ),
    penalty=lambda theta, step: strength * (rho_t(step) - share(theta)) ** 2,
    init=lambda gates, outputs: {'channels': _spread(start, scores or {})},
    forward=forward,
    report=lambda theta: {'open': jax.tree.map(jnp.sum, forward(theta)['channels'])},
    transform=lambda tx: spare_closed(apart(tx, _gate_tx(c, eta_t)), open_part),
  )


def gate(
  w: jax.Array, surrogate: Surrogate = 'constant', round_to: int = 1
) -> jax.Array:
  """b(w) with derivative g(w), [channels].

  Of the open gates the largest are left open, as many as make a width that can be
  built: a multiple of round_to, and at least one whatever their weights.
  """
  b = straight_through(w, surrogate)
  width = cost.multiple(jnp.maximum(b.sum(), 1), w.size, round_to, jnp)
  rank = jnp.argsort(jnp.argsort(-w, stable=True), stable=True)
  built = (rank.astype(w.dtype) < width).astype(w.dtype)
  return b + jax.lax.stop_gradient(built - b)


def configured(
  config: Config, coupling: Coupling, steps: int, scores: Mapping, whole: Coupling
) -> Method:
  """The method as a run describes it."""
  del whole
  options = config.options
  return trainable_gates(
    coupling,
    options.target,
    _cost(config, coupling),
    options.strength,
    options.gate_learning_rate,
    round_to=options.round_to,
    steps=steps,
    scores=scores,
  )


def _cost(config: Config, coupling: Coupling) -> str | Milliseconds:
  """What the target counts.

  Milliseconds are measured once, by process 0, and kept in the run's folder: a run that
  is resumed goes on with the table that it began with.
  """
  options, known = config.options, config.path / 'costs.json'
  if options.of != TIME:
    return options.of
  timed = session(coupling, options.latency_batch, options.round_to)
  found = _kept(known, timed)
  measured = hosts.agreed(timed.measure() if found is None else found)
  if found is None:
    table = [
      {'layer': layer or 'network', 'widths': widths, TIME: float(taken)}
      for (layer, widths), taken in zip(timed.rows, measured, strict=True)
    ]
    told = {'device': latency.device(), 'batch': timed.batch, 'table': table}
    record.write(known, told)
  return timed.cost(measured)


def _kept(known: Path, timed: Session) -> np.ndarray | None:
  """The table of a run that was stopped [rows]; None if it is of something else."""
  told = record.read(known) or {}
  table = told.get('table', [])
  same = [row['widths'] for row in table] == [widths for _, widths in timed.rows]
  if not same or told['batch'] != timed.batch:
    return None
  return np.array([row[TIME] for row in table])


def _not_free(c: Tree) -> Tree:
  """Prices of channels, none below LEAST of the mean one."""
  prices = [price.mean() for price in jax.tree.leaves(c)]
  least = max(LEAST * float(np.mean(prices)), 1e-12)
  return jax.tree.map(lambda price: jnp.maximum(price.mean(), least), c)


def _spread(start: Mapping, scores: Mapping) -> dict[str, jax.Array]:
  """Gate weights in (0, 2 START), evenly spaced in every group, ordered by score.

  Groups are out of step with each other, so that their gates close one by one.
  """
  spread = {}
  for i, (group, b) in enumerate(start.items()):
    score = scores.get(group, np.random.RandomState(i).permutation(b.size))
    rank = np.argsort(np.argsort(score, kind='stable'), kind='stable')
    w = 2 * START * (rank + (i + 0.5) / len(start)) / b.size
    spread[group] = jnp.asarray(w, jnp.float32)
  return spread


def _gate_tx(c: Tree, eta: Callable) -> optax.GradientTransformation:
  """SGD on theta, with the gradient divided by the price of a channel."""

  def divided(updates, params):
    del params
    theta = jax.tree.map(lambda u, c: u / c.mean(), updates['theta'], c)
    return {**updates, 'theta': theta}

  return optax.chain(optax.stateless(divided), optax.sgd(eta))
