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

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Annotated, Any, Literal, get_args

import tyro
from etils import epy

from depthprune.train.method import CutRefused, Method, apart
from depthprune.train.options import ConfigError, Epochs, finite, one_of
from depthprune.train.recipe import Chart, Recipe, Setting

with epy.lazy_imports():
  import jax
  import jax.numpy as jnp
  import numpy as np
  import optax

  from depthprune.program import arguments, trace
  from depthprune.program import cost as costs
  from depthprune.program.coupling import Coupling
  from depthprune.timing import clock
  from depthprune.train import task as tasks
  from depthprune.train.result import Result
  from depthprune.train.task import Task, Tree

Aggregate = Literal['log', 'linear', 'geometric']
DepthCost = Literal['index', 'flops', 'params', 'milliseconds']
BATCH = 128  # examples in a call where milliseconds are measured


def netcut(
  coupling: Coupling,
  beta: float = 0.01,
  aggregate: Aggregate = 'log',
  gamma: float = 0.0,
  cost: DepthCost | np.ndarray = 'index',
  tolerance: float = 0.5,
  force: bool = False,
  importance_lr: float = 1e-3,
) -> Method:
  """Learns which of a network's exits to keep; the network is cut behind it.

  Every exit is a candidate. While the weights are trained, a weight for every exit is
  trained with them, and the loss pushes all of it onto one exit: deeper exits answer
  better, and each unit of depth costs `beta`. Train with `make_step`, then
  `prune(model, variables, method.decide(state.theta, state.stats, evaluate), example)`
  with `evaluate` from `judge`.

  Args:
    coupling: what `couple` found in the network. The network returns {exit: logits
      [batch, classes]}, at least two, in the order of their depth;
      `models.heads.every_tap(model)` puts a linear head on every layer.
    beta: price of a unit of cost (of one layer), in nats of cross-entropy, at least 0.
      A deeper exit is kept only if it lowers the cross-entropy by more than that.
    aggregate: how the answers of the exits are mixed while training. 'log' adds their
      weighted log-probabilities, as in the paper; only it settles on one exit.
      'linear' adds probabilities, 'geometric' normalises the sum of 'log'.
    gamma: share of the mixture's normaliser in the loss of 'log'; 0 in the paper.
    cost: what the depth of an exit costs: 'index' (1, 2, ...), 'flops' (1 MAC = 2
      FLOPs), 'params', or 'milliseconds', measured on this device; all are scaled so
      that the whole network costs its number of exits. Or the costs themselves, an
      array [exits].
    tolerance: percentage points of held-out accuracy, or of what else decides in the
      task (`decides_by`), that the cut may cost; a cut that
      costs more is refused.
    force: cut whatever it costs.
    importance_lr: learning rate of the exits' weights, which Adam trains.

  Returns:
    The Method. Its `decide` keeps the exit of the largest weight.

  Raises:
    ValueError: fewer than two exits; a beta, gamma or cost that is negative, not finite
      or of another shape.
    CutRefused: from `decide`, where held-out accuracy falls by more than `tolerance`.

  Source: Wójcik, Wołczyk, Bałazy, Tabor, arXiv 2004.08172.
  """
  exits = arguments.coupling(coupling).exits
  arguments.number('tolerance', tolerance)
  arguments.number('importance_lr', importance_lr, least=0)
  _check(exits, beta, aggregate, gamma)
  c = cost_of_exits(coupling, cost) if isinstance(cost, str) else np.asarray(cost)
  if c.shape != (len(exits),):
    raise ValueError(f'netcut: cost has shape {c.shape}, expected ({len(exits)},)')
  _check_not_negative('cost', c)
  importance = lambda theta: jax.nn.softmax(theta['importance'])
  answer = partial(_mixture, exits, aggregate)

  def objective(task, outputs, batch, theta, step):
    del step
    if not task.softmax and (aggregate == 'linear' or gamma):
      raise ValueError(
        f'netcut: aggregate={aggregate!r}, gamma={gamma:g} are for classes that '
        "exclude one another, which this task does not have: use 'log' and 0"
      )
    w, s = importance(theta), answer(task, outputs, theta)
    if aggregate == 'log':
      loss = w @ jnp.stack([task.loss(outputs[e], batch) for e in exits])
      if gamma:
        loss += gamma * tasks.mean(jax.nn.logsumexp(s, axis=-1), batch)
    else:
      loss = task.loss(s, batch)  # which normalises s
    return loss, {**task.metrics(s, batch), 'expected_cost': w @ jnp.float32(c)}

  def decide(theta, stats, evaluate):
    del stats
    kept = exits[int(np.argmax(theta['importance']))]
    keep = {'exits': {name: name == kept for name in exits}}
    metric = getattr(evaluate, 'decides_by', 'accuracy')
    before, after = (100 * evaluate(k)[metric] for k in ({}, keep))
    if before - after > tolerance and not force:
      learned = report(theta)
      raise CutRefused(
        f'netcut: cut at {kept} (importance {learned["max_importance"]:.2f}, entropy '
        f'{learned["entropy"]:.2f} of the possible), held-out '
        f'{metric.replace("_", " ")} falls from {before:.2f} to {after:.2f} %, by more '
        f'than {tolerance:g} points: train '
        "longer, use aggregate='log', or cut anyway: force=True (--force)"
      )
    return keep

  def report(theta):
    w = importance(theta)
    entropy = -jnp.sum(w * jnp.log(jnp.maximum(w, 1e-30))) / np.log(len(exits))
    return {
      'importance': {name: w[k] for k, name in enumerate(exits)},
      'cost': {name: jnp.float32(c[k]) for k, name in enumerate(exits)},
      'max_importance': w.max(),
      'entropy': entropy,
    }

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
  _check_not_negative('beta', beta)
  _check_not_negative('gamma', gamma)
  if aggregate != 'log' and gamma:
    raise ValueError(
      f"netcut: gamma is for aggregate='log', got {aggregate!r}: leave gamma at 0"
    )


def _check_not_negative(name: str, value) -> None:
  if not np.issubdtype(np.asarray(value).dtype, np.number):
    raise arguments.refused(name, 'numbers of 0 or more', value)
  if not (np.isfinite(value).all() and (np.asarray(value) >= 0).all()):
    raise ValueError(f'netcut: {name} must be finite and not negative, got {value}')


def _mixture(exits, aggregate: str, task: Task, outputs: Tree, theta: Tree):
  """s, the network's answer before the cut."""
  log_p = jnp.stack([task.log_probs(outputs[e]) for e in exits])
  if aggregate == 'linear':
    log_w = jax.nn.log_softmax(theta['importance'])
    log_w = jnp.expand_dims(log_w, range(1, log_p.ndim))
    return jax.nn.logsumexp(log_w + log_p, axis=0)
  return jnp.tensordot(jax.nn.softmax(theta['importance']), log_p, 1)


def cost_of_exits(coupling: Coupling, of: DepthCost) -> np.ndarray:
  """The costs c of the networks that end at each exit, scaled so that the last is K.

  Args:
    coupling: of a network with K exits.
    of: 'index' (1, 2, ... K), 'flops' (1 MAC = 2 FLOPs), 'params', or 'milliseconds' on
      this device: medians of interleaved calls with BATCH examples.

  Returns:
    float64 [K].

  Raises:
    ValueError: an unknown cost.
  """
  exits = coupling.exits
  if of not in get_args(DepthCost):
    raise ValueError(f'cost={of!r}: expected one of {", ".join(get_args(DepthCost))}')
  if of == 'index':
    return np.arange(1.0, len(exits) + 1)
  if of == 'milliseconds':
    c = _milliseconds(coupling)
  else:
    count = {'flops': costs.flops, 'params': costs.params}[of]
    only = lambda kept: {'exits': {name: name == kept for name in exits}}
    c = np.array([float(count(coupling, only(name))) for name in exits])
  return c * len(exits) / c[-1]


def _milliseconds(coupling: Coupling) -> np.ndarray:
  """Medians of the networks up to each exit, on made-up arrays."""
  arguments = (coupling.inputs, coupling.kwargs)
  arrays, merge = trace.split_arrays(trace.batched(arguments, BATCH, coupling.counts))
  made_up = lambda tree: jax.tree.map(lambda s: clock.made_up(s.shape, s.dtype), tree)
  variables, arrays = made_up(coupling.variables), made_up(arrays)

  def upto(name: str) -> Callable:
    def run(variables, arrays):
      inputs, kwargs = merge(arrays)
      return coupling.fn(variables, *inputs, **kwargs)[name]

    return jax.jit(run)

  networks = [upto(name) for name in coupling.exits]
  calls = [lambda f=f: f(variables, arrays) for f in networks]
  return np.median(clock.interleave(calls), axis=1)


# ---- runs and reports ----------------------------------------------------------------

DECIDED = 0.75  # importance above which the choice of an exit is called clear
BY_MODEL = tyro.conf.arg(
  metavar='{max,avg,cls,grid4}', help_behavior_hint="(default: the network's own)"
)


@dataclasses.dataclass(frozen=True)
class NetCutOptions:
  """NetCut: a head on every layer, and the network finds where to stop."""

  beta: float = 0.01
  """Nats of cross-entropy that a unit of cost (one layer) must be worth to be kept."""

  aggregate: Literal['log', 'linear', 'geometric'] = 'log'
  """How the heads' answers are mixed while training; only `log` settles on one."""

  gamma: float = 0.0
  """Share of the mixture's normaliser in the loss of `log` (0: the paper's)."""

  cost: Literal['index', 'flops', 'params', 'milliseconds'] = 'index'
  """What a depth costs, scaled so that the whole network costs its number of heads."""

  tolerance: float = 0.5
  """Points of held-out accuracy that the cut may cost; above it is refused."""

  force: bool = False
  """Cut whatever it costs."""

  importance_learning_rate: float = 1e-3
  """Learning rate of the heads' importance (Adam)."""

  pool: Annotated[Literal['max', 'avg', 'cls', 'grid4'] | None, BY_MODEL] = None
  """How a head turns positions into one vector."""

  def __post_init__(self):
    one_of(self, 'aggregate', get_args(Aggregate))
    one_of(self, 'cost', get_args(DepthCost))
    for name in ('beta', 'gamma', 'tolerance'):
      finite(self, name, positive=False)
    finite(self, 'importance_learning_rate', positive=True)
    if self.gamma and self.aggregate != 'log':
      raise ConfigError(
        f'gamma: expected 0 for aggregate {self.aggregate!r}, got {self.gamma:g}'
      )

  @property
  def label(self) -> str:
    gamma = f'-gamma{self.gamma:g}' if self.gamma else ''
    cost = '' if self.cost == 'index' else f'-{self.cost}'
    return f'beta{self.beta:g}-{self.aggregate}{gamma}{cost}'


def _build(setting: Setting) -> Method:
  o, coupling = setting.options, setting.coupling
  c = o.cost
  if o.cost == 'milliseconds':
    c = setting.remember(
      measure=lambda: cost_of_exits(coupling, 'milliseconds'),
      to_json=lambda c: {'milliseconds': c.tolist()},
      from_json=lambda known: np.array(known['milliseconds']),
    )
  return netcut(
    coupling,
    beta=o.beta,
    aggregate=o.aggregate,
    gamma=o.gamma,
    cost=c,
    tolerance=o.tolerance,
    force=o.force,
    importance_lr=o.importance_learning_rate,
  )


def _sentence(result: Result) -> str:
  """`kept exit 3 of 20 (exit03) at β = 0.01, cost index, aggregate log`."""
  if not result.rounds:
    return ''
  last, o = result.rounds[-1], result.options
  exits = sorted(last.learned['importance'])  # their numbers are of one length
  kept = last.exits[-1]
  price = ''
  if 'beta' in o:
    gamma = f', γ = {o["gamma"]:g}' if o['gamma'] else ''
    price = (
      f' at β = {o["beta"]:g}, cost {o["cost"]}, aggregate {o["aggregate"]}{gamma}'
    )
  if len(exits) == 1:
    return f'kept the only exit ({kept}){price}'
  return f'kept exit {exits.index(kept) + 1} of {len(exits)} ({kept}){price}'


def _remarks(result: Result) -> Sequence[str]:
  """How decided the choice of the exit was."""
  learned: dict[str, Any] = result.rounds[-1].learned if result.rounds else {}
  if len(learned.get('importance', ())) < 2:
    return []
  largest, entropy = learned['max_importance'], learned['entropy']
  if not (math.isfinite(largest) and math.isfinite(entropy)):
    return []
  remarks = [
    f'largest importance w {largest:.3f}, normalised entropy '
    f'{entropy:.3f} (0: one exit has it all, 1: all exits have the same)'
  ]
  if largest < DECIDED:
    remarks.append(
      'the importance is still divided between exits, so which of them was kept is no '
      'clear decision: another seed or a longer training may keep another'
    )
  return remarks


RECIPE = Recipe(
  options=NetCutOptions,
  build=_build,
  description=(
    'Train a network with a head on every layer, let it find the layer to stop at, cut '
    'it there, and report.'
  ),
  epochs={
    'digits': Epochs(train=0, gates=200, finetune=0),
    'fashion_mnist': Epochs(train=0, gates=20, finetune=0),
    '': Epochs(train=0, gates=150, finetune=0),
  },
  defaults={
    'model': 'mlp20x200',
    'augment': False,
    'learning_rate': 1e-3,
    'optimizer': 'adam',
    'weight_decay': 0.0,
  },
  decides_only=('tolerance', 'force'),
  heads=lambda o, network, heads: heads.every_tap(network, pool=o.pool),
  tells_tokens=True,
  own_exits=True,
  deepest_answers=True,
  name='NetCut',
  question=lambda result, network: f'how many of its layers does {network} need?',
  legend='cut: right after surgery; after: at the end of the run',
  sentence=_sentence,
  remarks=_remarks,
  charts=(Chart('Importance of the exits', 'exits', 'importance', 'importance w'),),
)
