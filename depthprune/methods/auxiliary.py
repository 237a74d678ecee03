"""Auxiliary overparameterization: a wider path helps to train, and is then dropped.

Liu, Zhuang, Shen, Chen, Yin: "Training Compact Neural Networks via Auxiliary
Overparameterization" (arXiv 1909.02214 v1). The path is `models.auxiliary_path`; gates on
its connections, their price and a weight that decays are ours:

  L        = CE(z, y) + a_t sum_k CE(z_k, y) + lambda sum_j c_j b(w_j)
  b(w)     = 1[w > 0] forward, db/dw = 1 backward        (gates.straight_through)
  a_t      = a                 constant
           = a (1 - t / T)     linear
           = a (1 + cos(pi t / T)) / 2                   cosine
  w_j     <- w_j - eta_t (dL / dw_j) / c_j
  eta_t    = eta min(1, 3 - 4 t / T), not below 0

  z        logits of the network, the exit 'main';  y  the labels. Of several tasks both
           are one for each, and CE is the sum over them
  z_k      logits of every other exit: of the path, or of heads (deep supervision)
  w_j      weight of the gate of connection j; all start open, at START
  c_j      its FLOPs over the mean;  lambda  nats that a mean connection must save
  a, T     auxiliary weight, number of steps
  eta      learning rate of the gates, until half of the steps; the structure is settled
           for the last quarter

In the end all exits that only helped are dropped: what is left is the compact network,
its arrays untouched. The connection of the largest weight stays open whatever it is.
"""

import functools
from collections.abc import Mapping, Sequence
from typing import Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
import optax

from depthprune.gates import straight_through
from depthprune.methods.sidenet import measured
from depthprune.program import cost
from depthprune.program.coupling import Coupling
from depthprune.run.config import Config
from depthprune.train.method import Method, apart
from depthprune.train.task import Tree

Decay = Literal['constant', 'linear', 'cosine']
START = 0.1
ASIDE = 'aux'  # what the exits that only help are called in a run, or begin with


def auxiliary(
  coupling: Coupling,
  weight: float = 1.0,
  decay: Decay = 'constant',
  price: float = 0.005,
  gate_lr: float = 0.02,
  steps: int = 0,
  aside: Sequence[str] | None = None,
) -> Method:
  """The method for a network with an exit 'main' and others that help to train it.

  Or, of several tasks, with an exit for each task, and others that answer all of them:
  those must be named in `aside`.

  Where connections of the path have gates (`models.auxiliary_path.beside(search=True)`),
  they are trained too: the structure is searched.

  Args:
    coupling: of the network, from `couple`. weight: a. decay: of a over the steps.
    price: lambda. gate_lr: eta. steps: T; needed where the weight decays or gates are
    trained. aside: the exits that only help; None: all but 'main'.

  Raises: ValueError without an exit that helps and one that is helped, for a weight,
    price or rate that is negative or not finite, for an unknown decay, and without
    steps where they are needed.
  """
  names = _aside(coupling, aside)
  _check(weight, decay, price, gate_lr, steps)

  def a_t(step):
    t = jnp.minimum(step.astype(jnp.float32) / max(steps, 1), 1)
    shape = {'constant': 1.0, 'linear': 1 - t, 'cosine': (1 + jnp.cos(jnp.pi * t)) / 2}
    return weight * shape[decay]

  def says(task, outputs, theta):
    del theta
    return task.answer({k: v for k, v in outputs.items() if k not in names})

  def objective(task, outputs, batch, theta, step):
    others = jnp.stack([task.loss(outputs[name], batch) for name in names]).sum()
    own = says(task, outputs, theta)
    loss = task.loss(own, batch) + a_t(step) * others
    return loss, measured(task, own, outputs, batch, names)

  gates = connections(coupling, names)
  method = Method()
  if gates:
    _check_steps('a search', steps)
    method = _search(prices(coupling, gates), price, gate_lr, steps)
  keep = {'exits': {name: name not in names for name in coupling.exits}}
  return method._replace(
    objective=objective, answer=says, decide=lambda theta, stats, evaluate: keep
  )


def _aside(coupling: Coupling, aside: Sequence[str] | None) -> tuple[str, ...]:
  """The exits that only help, in the order of depth."""
  given = aside or [name for name in coupling.exits if name != 'main']
  helped = [name for name in coupling.exits if name not in given]
  if {*given} - {*coupling.exits} or not helped or not given:
    raise ValueError(
      "auxiliary: expected a network with an exit 'main' and others that help to train "
      f'it, or aside=those that do, got {", ".join(coupling.exits) or "no exits"} and '
      f'aside={aside}; models.heads.WithHeads has exits on taps'
    )
  return tuple(name for name in coupling.exits if name in given)


def _search(c: Mapping[str, float], price: float, gate_lr: float, steps: int) -> Method:
  """What trains the gates of connections, given their prices."""
  paid = lambda b: jnp.stack([c[path] * b[path] for path in c]).sum()
  start = {path: jnp.full((), START, jnp.float32) for path in c}
  return Method(
    penalty=lambda theta, step: price * paid(opened(theta['branches'])),
    init=lambda given, outputs: {'branches': start},
    forward=lambda theta, key=None, step=None: {'branches': opened(theta['branches'])},
    transform=lambda tx: apart(tx, _gate_tx(c, gate_lr, steps)),
    report=lambda theta: _structure(theta['branches'], c),
  )


def connections(coupling: Coupling, aside: Sequence[str]) -> tuple[str, ...]:
  """Paths of the branch gates that cost something, in nothing but the exits aside."""
  main = {name: name not in aside for name in coupling.exits}
  flops = lambda **keep: cost.flops(coupling, keep)
  whole, alone = flops(), flops(exits=main)
  spares = lambda closed: (
    flops(branches=closed) < whole and flops(exits=main, branches=closed) == alone
  )
  return tuple(path for path in coupling.branches if spares({path: False}))


def prices(coupling: Coupling, gates: Sequence[str]) -> dict[str, float]:
  """{connection: its FLOPs as a multiple of their mean}."""
  ones = {path: jnp.float32(1) for path in gates}
  slope = jax.grad(lambda b: cost.flops(coupling, {'branches': b}))(ones)
  mean = float(np.mean([*slope.values()]))
  return {path: float(slope[path]) / mean for path in gates}


def opened(w: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
  """b(w) of every connection, with its derivative; the largest stays open."""
  top = functools.reduce(jnp.maximum, w.values())

  def gate(one: jax.Array) -> jax.Array:
    b = straight_through(one)
    return b + jax.lax.stop_gradient(jnp.where(one >= top, 1.0, b) - b)

  return {path: gate(one) for path, one in w.items()}


def configured(
  config: Config, coupling: Coupling, steps: int, scores: Mapping, whole: Coupling
) -> Method:
  """The method as a run describes it; plain training of a network that is alone."""
  del scores, whole
  o = config.options
  if o.structure == 'none':
    return Method()
  aside = [name for name in coupling.exits if name.startswith(ASIDE)]
  given = o.weight, o.decay, o.price, o.gate_learning_rate
  return auxiliary(coupling, *given, steps, aside)


def _structure(w: Mapping[str, jax.Array], c: Mapping[str, float]) -> Tree:
  """Weight and price by connection, which are open, and how many."""
  open_ = opened(w)
  return {
    'weight': dict(w),
    'price': {path: jnp.float32(each) for path, each in c.items()},
    'open': open_,
    'connections': jnp.stack([*open_.values()]).sum(),
  }


def _gate_tx(
  c: Mapping[str, float], eta: float, steps: int
) -> optax.GradientTransformation:
  """SGD on the weights of gates, their gradient divided by the price."""

  def divided(updates, params):
    del params
    w = updates['theta']['branches']
    return {**updates, 'theta': {'branches': {path: w[path] / c[path] for path in c}}}

  eta_t = lambda step: eta * jnp.clip(3 - 4 * jnp.asarray(step) / steps, 0, 1)
  return optax.chain(optax.stateless(divided), optax.sgd(eta_t))


def _check(weight: float, decay: str, price: float, gate_lr: float, steps: int) -> None:
  for name, value in (('weight', weight), ('price', price), ('gate_lr', gate_lr)):
    if not (np.isfinite(value) and value >= 0):
      raise ValueError(f'auxiliary: {name} is finite and not negative, got {value}')
  if decay not in get_args(Decay):
    expected = ', '.join(get_args(Decay))
    raise ValueError(f'auxiliary: decay={decay!r}: expected one of {expected}')
  if decay != 'constant':
    _check_steps(f'a {decay} decay', steps)


def _check_steps(what: str, steps: int) -> None:
  if steps < 1:
    raise ValueError(f'auxiliary: {what} takes steps, got {steps}')
