"""Auxiliary overparameterization: a wider path helps to train, and is then dropped.

Liu, Zhuang, Shen, Chen, Yin: "Training Compact Neural Networks via Auxiliary
Overparameterization" (arXiv 1909.02214 v1). The path is `models.auxiliary_path`; gates
on its connections, their price and a weight that decays are ours:

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

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

from etils import epy

from depthprune.train.method import Method, apart, exit_metrics
from depthprune.train.options import ConfigError, Epochs, at_least, finite, one_of
from depthprune.train.recipe import Chart, Recipe, Setting

with epy.lazy_imports():
  import jax
  import jax.numpy as jnp
  import numpy as np
  import optax

  from depthprune import gates as gating
  from depthprune.program import arguments, cost
  from depthprune.program.coupling import Coupling
  from depthprune.train.result import Result
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
  """Trains a compact network with the help of exits that are dropped afterwards.

  The loss of the network's own answer is added to that of a wider path which reads its
  features (`models.auxiliary_path.beside`), or of heads on its layers. `decide` drops
  all of them: what is left is the compact network, its arrays untouched. Where the
  path's connections have gates (`beside(..., search=True)`), they are trained too, so
  that its structure is searched.

  Args:
    coupling: what `couple` found in the network, which returns {exit: logits}.
    weight: of the helping exits' loss; the network's own counts 1.
    decay: how that weight goes to zero over the training: 'constant' (not at all),
      'linear' or 'cosine'.
    price: nats of loss that a connection of mean cost must be worth to stay open.
    gate_lr: learning rate of the gates on connections.
    steps: length of the training; needed where the weight decays or gates are trained.
    aside: names of the exits that only help; None: all but 'main'. Of several tasks,
      with an exit for each, it must be given.

  Returns:
    The Method.

  Raises:
    ValueError: there is no exit that helps, or none that is helped; a weight, price or
      rate is negative or not finite; the decay is unknown; steps are missing.

  Source: Liu, Zhuang, Shen, Chen, Yin, arXiv 1909.02214 v1.
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
    return loss, exit_metrics(task, own, outputs, batch, names)

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
  arguments.coupling(coupling)
  aside = [aside] if isinstance(aside, str) else aside
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
    b = gating.straight_through(one)
    return b + jax.lax.stop_gradient(jnp.where(one >= top, 1.0, b) - b)

  return {path: gate(one) for path, one in w.items()}


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
    arguments.number(name, value, least=0)
  arguments.whole('steps', steps, least=0)
  if decay not in get_args(Decay):
    expected = ', '.join(get_args(Decay))
    raise ValueError(f'auxiliary: decay={decay!r}: expected one of {expected}')
  if decay != 'constant':
    _check_steps(f'a {decay} decay', steps)


def _check_steps(what: str, steps: int) -> None:
  if steps < 1:
    raise ValueError(f'auxiliary: {what} takes steps, got {steps}')


# ---- runs and reports ----------------------------------------------------------------

STRUCTURES = {
  'all': 'a path that every tap feeds',
  'search': 'a path whose connections were searched',
  'deep-supervision': 'linear heads after its stages',
}


@dataclasses.dataclass(frozen=True)
class AuxiliaryOptions:
  """A wider path beside a compact network, for training alone: dropped afterwards."""

  structure: Literal['all', 'search', 'deep-supervision', 'none'] = 'all'
  """all: every tap feeds the stage of the path that it belongs to. search: or any later
  one, by gates that are trained. deep-supervision: a linear head at the end of every
  stage instead of the path. none: the network alone."""

  weight: float = 1.0
  """Weight of the path's loss; the network's own counts 1 (the paper's: both 1)."""

  decay: Literal['constant', 'linear', 'cosine'] = 'constant'
  """How that weight goes to zero over the training, if it does."""

  width: int = 64
  """Channels of the path."""

  price: float = 0.005
  """Nats of loss that a connection of mean cost must be worth to stay open (search)."""

  gate_learning_rate: float = 0.02
  """Learning rate of the gates (search)."""

  control: bool = False
  """Train the network alone too, for as many epochs, and show what it reaches."""

  def __post_init__(self):
    one_of(self, 'structure', (*STRUCTURES, 'none'))
    one_of(self, 'decay', get_args(Decay))
    at_least(self, 'width', 1)
    for name in ('weight', 'price', 'gate_learning_rate'):
      finite(self, name, positive=False)

  @property
  def label(self) -> str:
    decay = '' if self.decay == 'constant' else f'-{self.decay}'
    return f'{self.structure}-weight{self.weight:g}{decay}-width{self.width}'


def _build(setting: Setting) -> Method:
  """The method of a run; plain training of a network that is alone."""
  o, coupling = setting.options, setting.coupling
  if o.structure == 'none':
    return Method()
  return auxiliary(
    coupling,
    weight=o.weight,
    decay=o.decay,
    price=o.price,
    gate_lr=o.gate_learning_rate,
    steps=setting.steps,
    aside=[name for name in coupling.exits if name.startswith(ASIDE)],
  )


def _check_config(config: Any) -> None:
  if config.distill:
    raise ConfigError(
      'distill: expected False for auxiliary: the path teaches the network already'
    )


def _beside(o: AuxiliaryOptions, network: Any, heads: Any) -> Any:
  """The network with what helps to train it on its taps, or on those of its trunk.

  It may have heads of its own: of several tasks, or the exit that NetCut left.
  """
  if o.structure == 'none':
    return network
  own = getattr(network, 'heads', {})
  trunk = network.trunk if own else network
  classes = {name: head.classes for name, head in own.items()} or network.classes
  if len(own) == 1:
    (classes,) = classes.values()
  fields = {'classes': classes, 'width': o.width, 'pool': trunk.pool}
  read = [trunk.taps.index(head.tap) for head in own.values()]
  taps = trunk.taps[: max(read) + 1] if read else trunk.taps
  path = heads.beside(taps, o.structure == 'search', **fields)
  if o.structure != 'deep-supervision':
    return heads.add_heads(network, {ASIDE: path})
  ends = [taps[-1] for taps in path.stages]
  ends = ends[:-1] or ends  # the last of them is what the network's own head reads
  linear = lambda tap: heads.Head(tap, classes, pool=trunk.pool)
  dense = lambda tap: heads.Auxiliary(((tap,),), **fields)  # of pixels
  head = linear if trunk.pool else dense
  aside = {f'{ASIDE}{i}': head(tap) for i, tap in enumerate(ends, 1)}
  return heads.add_heads(network, aside)


def _sentence(result: Result) -> str:
  """`trained beside a path ... (17 of 18 connections open), dropped after ...`."""
  structure = result.options['structure']
  if structure == 'none':
    return 'trained alone, without a path beside it'
  open_ = result.rounds[-1].learned.get('open', {}) if result.rounds else {}
  count = sum(value > 0 for value in open_.values())
  several = '' if len(open_) == 1 else 's'
  connections = f' ({count} of {len(open_)} connection{several} open)' if open_ else ''
  return (
    f'trained beside {STRUCTURES[structure]}{connections}, dropped after training: '
    f'{100 * result.flops.kept:.1f} % of the FLOPs are left'
  )


def _remarks(result: Result) -> Sequence[str]:
  """What nothing was compared with, and a search that decided nothing."""
  remarks = []
  open_ = result.rounds[-1].learned.get('open', {}) if result.rounds else {}
  if len(open_) > 1 and all(value > 0 for value in open_.values()):
    remarks.append(
      'the search closed no connection, so it decided nothing: the path is the one '
      'with all of them'
    )
  if result.options['structure'] != 'none' and not result.control:
    remarks.append(
      'what the network reaches when it is trained alone was not measured; --control '
      'measures it'
    )
  return remarks


RECIPE = Recipe(
  options=AuxiliaryOptions,
  build=_build,
  description=(
    'Train a compact network beside a wider path that reads it everywhere, drop the '
    'path, and report.'
  ),
  epochs={
    'digits': Epochs(train=0, gates=40, finetune=0),
    'fashion_mnist': Epochs(train=0, gates=20, finetune=0),
    '': Epochs(train=0, gates=160, finetune=0),
  },
  peaks=(1.0, 0.1),
  check=_check_config,
  heads=_beside,
  name='Auxiliary path',
  question=lambda result, network: f'does it make {network} more accurate?',
  legend='before: with any path beside it; after: the compact network alone',
  sentence=_sentence,
  control=lambda o: dataclasses.replace(o, structure='none') if o.control else None,
  decides_only=('control',),
  remarks=_remarks,
  charts=(Chart('Connections of the path', 'connections', 'weight', 'gate weight'),),
)
