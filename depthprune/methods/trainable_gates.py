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
channel seem free: no price is below LEAST of the mean. All gates start open and evenly
spaced, in their group or in the network: equal ones would close in one step. The
largest gate of a group stays open whatever its weight: a network with an empty layer
has no gradient to lead it back. Where widths are rounded, the gates are so in training
too, with the same gradient.

Also ours: residual branches may have gates of the same kind, so that layers and
channels are weighed against each other. They start in the upper three quarters,
and so close after some of the channels, unless what the task says closes them earlier.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, Literal

from etils import epy

from depthprune.train.method import Method, apart, openness, spare_closed, supervised
from depthprune.train.options import (
  FRACTION,
  MULTIPLES,
  PATTERNS,
  ConfigError,
  Epochs,
  at_least,
  finite,
  fraction,
  one_of,
)
from depthprune.train.recipe import COSTS, TOLERANCE, Chart, Recipe, Setting, Target

with epy.lazy_imports():
  import jax
  import jax.numpy as jnp
  import numpy as np
  import optax

  from depthprune import gates as gating
  from depthprune.gates import Surrogate
  from depthprune.program import arguments, rounding, widths
  from depthprune.program import units as unit_search
  from depthprune.program.coupling import Coupling
  from depthprune.program.rounding import RoundTo
  from depthprune.program.units import ResidualUnit
  from depthprune.program.widths import Count, Counts, Range
  from depthprune.timing import latency
  from depthprune.timing import layers as times
  from depthprune.timing.layers import CostFunction
  from depthprune.train import starts
  from depthprune.train import target as targets
  from depthprune.train.result import Result
  from depthprune.train.task import Tree

LEAST = 0.1  # of the mean price: of what costs nothing, and at least where measured


def trainable_gates(
  coupling: Coupling,
  target: float | Mapping[str, Count] = 0.5,
  of: str | CostFunction = 'flops',
  strength: float = 200.0,
  gate_lr: float = 2e-4,
  surrogate: Surrogate = 'constant',
  round_to: RoundTo = 1,
  steps: int = 0,
  scores: Mapping[str, np.ndarray] | None = None,
  scope: str = 'uniform',
  exclude: str | Sequence[str] = (),
  at_least: Counts | None = None,
  at_most: Counts | None = None,
  layers: bool = False,
) -> Method:
  """Learns by gradient descent which channels, or also layers, of a network may go.

  Every group of coupled channels gets a gate weight per channel; a channel is open
  where it is positive. The weights are trained together with the network's own, with a
  penalty on the distance of its cost to the target. Then
  `prune(model, variables, method.decide(state.theta, {}, None), example)` cuts the
  closed channels out. No code for it is in the model:

    coupling = dp.couple(model, variables, example)
    method = dp.trainable_gates(coupling, target=0.5, steps=1000)
    tx = optax.sgd(0.05, momentum=0.9)
    state = dp.init_state(model, method, tx, variables, coupling)
    step = dp.make_step(model, method, dp.classification(10), tx, coupling)

  Args:
    coupling: what `couple` found in the network.
    target: the part of the cost that is to remain, in (0, 1], or a percentage such as
      '50%'. Or {pattern: channels},
      as in `oneshot`: how many channels the matching arrays are to produce; the gates
      then learn which.
    of: the cost: 'flops' (1 MAC = 2 FLOPs), 'params', 'bytes' (of the variables and of
      a cache with which the network was coupled), or 'milliseconds', measured now on
      this device for a batch of 128; for another batch
      `milliseconds(coupling, batch, round_to=round_to)`. Or a function of (coupling,
      gates), as those in `cost` are: the larger of two costs, say.
    strength: weight of the squared distance to the target in the loss.
    gate_lr: learning rate of the gate weights.
    surrogate: derivative of a gate by its weight in the backward pass: 'constant' (1),
      or that of 'sigmoid' or 'tanh'.
    round_to: widths are multiples of this, counted in the target; or 'auto' for what
      this device is fast at, as in `oneshot`.
    steps: length of the training. The target is approached during its first half, and
      gates rest in its last quarter. 0 asks for the target at once and lets no gate
      rest.
    scores: {group: [n]}, such as `surgery.oneshot.rank` gives: channels of lower scores
      start nearer to closing. By default the order is arbitrary. With `layers` also
      {branch: () or [layers]}. Outside of scans `block_influence` gives these, with
      {branch: [branch]} as blocks. Those of branches that share a gate are added, and
      branches start in the order of their score by what they cost.
    scope: 'uniform' compares the scores within each group, so that at first all groups
      close alike; 'global' compares them throughout the network, divided by what a
      channel of the group costs, and takes scores of all groups for that.
    exclude: patterns of groups, arrays or modules that are left whole, as in `oneshot`.
      They have no gates.
    at_least: fewest channels of every group, or {pattern: channels}, as in `oneshot`.
      So many gates stay open throughout, unless their layer goes.
    at_most: most channels, in the same way. Gates above that close one by one during
      the first half of the training.
    layers: whether layers may go too: every residual branch F of x + F(x) that can be
      erased gets a gate. `trunk` finds the branches of any network, and `branch` writes
      one into a module. The branches of each layer of a scanned stack share a gate.
      Without scores, later layers start nearer to closing.

  Returns:
    The Method. Its `decide` keeps the open channels and layers, corrected to meet the
    target.

  Raises:
    ValueError: no channel can be gated; the target is not in (0, 1], or is out of reach
      with the narrowest widths that round_to, floors and ceilings allow; a pattern that
      matches nothing; a floor above the ceiling; `layers` where none can go, or with a
      target in channels or milliseconds; or scores that are not finite, or of only some
      of the branches that share a gate. From `Method.init`: scores of another shape,
      and with `layers` branches whose gates in the variables are not 1.

  Source: Kim, Park, Jung, Choe, arXiv 1904.10921.
  """
  _check(strength, gate_lr, surrogate, steps, scores, scope, layers)
  for group in {*(scores or {})} - {*arguments.coupling(coupling).branches}:
    coupling.axis(group)
  ratios = target if isinstance(target, Mapping) else None
  limits = widths.ranges(coupling, round_to, exclude, at_least, at_most, ratios)
  if layers and (of == times.TIME or isinstance(of, times.Milliseconds)):
    what = 'milliseconds know the widths of layers, not which are there'
    raise arguments.wrong('layers', what, "write of='flops'")
  if layers and ratios is not None:
    what = 'a target in channels does not say which layers may go'
    raise arguments.wrong('layers', what, 'write a part of the cost: target=0.5')
  name, C = times.counted(coupling, of, round_to)
  units = _may_go(coupling, exclude) if layers else []
  branches = {unit.branches[0]: unit.branches for unit in units}
  scores = starts.shared(scores or {}, branches)
  rho = _remaining(coupling, C, limits) if isinstance(target, Mapping) else target
  if isinstance(rho, str) and rho.strip().endswith('%'):
    rho = fraction(rho, 'trainable_gates: target')
  targets.reachable(coupling, rho, C, round_to, limits, branches)
  C_0 = float(C(coupling, None))  # of a ResNet-50 it is no int32
  shallowest = unit_search.closing(units, coupling)
  fits = lambda keep: C(coupling, {**keep, **shallowest}) <= rho * C_0
  limits = widths.in_multiples(coupling, round_to, limits, fits)
  gates = coupling.gates()
  start = {'channels': {group: gates['channels'][group] for group in limits}}
  if layers:
    start['branches'] = {branch: gates['branches'][branch] for branch in branches}

  def everywhere(gates):
    """Gives all branches that go together their gate."""
    own = gates.get('branches', {})
    each = {path: own[b] for b, paths in branches.items() for path in paths}
    return {**gates, 'branches': each} if each else gates

  c = jax.grad(lambda b: C(coupling, everywhere(b)) / C_0)(start)
  c = _not_free(c, LEAST if name == times.TIME else 0)

  part = lambda step: jnp.asarray(step).astype(jnp.float32) / steps
  passed = lambda step: part(step) if steps else jnp.float32(0.5)
  approach = lambda step: jnp.minimum(1, 2 * passed(step))

  def forward(theta, key=None, step=None):
    del key
    there = 1.0 if step is None else approach(step)

    def one(group, w):
      least, most = limits[group]
      return gate(w, surrogate, round_to, least, w.size + (most - w.size) * there)

    gates = {'channels': {g: one(g, w) for g, w in theta['channels'].items()}}
    if layers:
      step_of = lambda w: gating.straight_through(w, surrogate)
      gates['branches'] = jax.tree.map(step_of, theta['branches'])
    return everywhere(gates)

  share = lambda theta, step=None: C(coupling, forward(theta, None, step)) / C_0
  rho_t = lambda step: 1 + (rho - 1) * approach(step)
  eta_t = lambda step: gate_lr * jnp.clip(3 - 4 * passed(step), 0, 1)

  def objective(task, outputs, batch, theta, step):
    loss, metrics = supervised(task, outputs, batch, theta, step)
    return loss, {**metrics, name: share(theta, step), 'target': rho_t(step)}

  def report(theta):
    found = {'open': jax.tree.map(jnp.sum, forward(theta)['channels'])}
    if layers:
      found['layers'] = {
        u.name: theta['branches'][u.branches[0]][... if u.layer is None else u.layer]
        for u in units
      }
    return found

  def open_part(trained):
    params = openness(coupling, forward(trained['theta']), trained['params'])
    return {'params': params, 'theta': jax.tree.map(jnp.ones_like, trained['theta'])}

  def init(gates, outputs):
    del outputs
    mine = {path for paths in branches.values() for path in paths}
    starts.check_open({p: x for p, x in gates.get('branches', {}).items() if p in mine})
    if scope == 'global':
      return starts.spread_globally(start, scores, c)
    return starts.spread(start, scores, c)

  return Method(
    objective=objective,
    decide=lambda theta, stats, evaluate: targets.on_target(
      coupling,
      {name: w for part in theta.values() for name, w in part.items()},
      rho,
      C,
      round_to,
      limits,
      branches,
    ),
    penalty=lambda theta, step: strength * (rho_t(step) - share(theta, step)) ** 2,
    init=init,
    forward=forward,
    report=report,
    transform=lambda tx: spare_closed(apart(tx, _gate_tx(c, eta_t)), open_part),
  )


def gate(
  w: jax.Array,
  surrogate: Surrogate = 'constant',
  round_to: RoundTo = 1,
  least: int = 1,
  most: jax.Array | float | None = None,
) -> jax.Array:
  """b(w) with derivative g(w), [channels].

  Of the open gates the largest are left open, as many as make a width that can be
  built: a multiple of round_to, and from `least` to `most` whatever their weights.
  """
  b = gating.straight_through(w, surrogate)
  width = jnp.maximum(b.sum(), least)
  width = width if most is None else jnp.minimum(width, most)
  width = rounding.built(width, w.size, round_to, jnp)
  rank = jnp.argsort(jnp.argsort(-w, stable=True), stable=True)
  built = (rank.astype(w.dtype) < width).astype(w.dtype)
  return b + jax.lax.stop_gradient(built - b)


def _check(strength, gate_lr, surrogate, steps, scores, scope, layers) -> None:
  arguments.number('strength', strength, least=0)
  arguments.number('gate_lr', gate_lr, least=0)
  arguments.whole('steps', steps, least=0)
  gating.surrogate_gradient(jnp.zeros(()), surrogate)  # refuses another name
  if scores is not None:
    arguments.kind_of('scores', scores, Mapping, '{group: [slices]}', starts.RANKED)
  arguments.kind_of('layers', layers, bool, 'True or False')
  if scope not in ('uniform', 'global'):
    expected = 'uniform or global'
    raise arguments.refused('scope', expected, scope, kind=ValueError)


def _remaining(
  coupling: Coupling, C: CostFunction, limits: Mapping[str, Range]
) -> float:
  """The part of the cost that remains at the widest widths."""
  kept = {
    group: np.arange(coupling.groups[group].size) < most
    for group, (_, most) in limits.items()
  }
  return C(coupling, {'channels': kept}) / C(coupling, None)


def _not_free(c: Tree, floor: float) -> Tree:
  """Prices; those of at most `floor` times the mean one become LEAST times it."""
  mean = max(float(np.mean([p.mean() for p in jax.tree.leaves(c)])), 1e-12)
  is_low = lambda p: float(p.mean()) <= floor * mean
  return jax.tree.map(lambda p: jnp.full_like(p, LEAST * mean) if is_low(p) else p, c)


def _may_go(coupling: Coupling, exclude: str | Sequence[str]) -> list[ResidualUnit]:
  """The layers that may be closed, those of a scanned stack all or none of them.

  Raises:
    ValueError: there are none.
  """
  present = unit_search.units(coupling)
  closed: list[str] = []
  for branches in dict.fromkeys(u.branches for u in present if not u.why_not):
    gone = unit_search.gone(coupling, [*closed, *branches])
    if not widths.excludes(coupling, exclude, gone):
      closed += branches
  if not closed:
    why = '; '.join(u.why_not for u in present if u.why_not)
    none = f'it has no branches, or exclude leaves none; {unit_search.TRUNK}'
    said = f'layers: no layer of this network may go: {why or none}'
    raise arguments.brief(ValueError(said))
  return [unit for unit in present if unit.branches[0] in closed]


def _gate_tx(c: Tree, eta: Callable) -> optax.GradientTransformation:
  """SGD on theta, with the gradient divided by the price of a channel or layer."""

  def divided(updates, params):
    del params
    theta = jax.tree.map(lambda u, c: u / c.mean(), updates['theta'], c)
    return {**updates, 'theta': theta}

  return optax.chain(optax.stateless(divided), optax.sgd(eta))


# ---- runs and reports ----------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class GateOptions:
  """Trainable gates: which channels may go."""

  target: Annotated[float, FRACTION] = 0.5
  """Part of the network's cost that is to remain: 0.5, or 50%."""

  of: Literal['flops', 'params', 'milliseconds'] = 'flops'
  """The cost that the target counts. 1 MAC = 2 FLOPs; milliseconds are measured on this
  device, layer by layer."""

  latency_batch: int = 128
  """Examples in a call, where the target counts milliseconds."""

  round_to: Annotated[int | Literal['auto'], MULTIPLES] = 'auto'
  """Widths become multiples of this, counted in the target; 1 allows all. auto is what
  the device is fast at: 8 on a CPU or GPU, 128 on a TPU, and less in narrow layers."""

  gate_learning_rate: float = 2e-4
  """Learning rate of the gates."""

  strength: float = 200.0
  """Weight of the distance to the target in the loss."""

  by_loss: bool = False
  """Channels whose closing changes the loss least, for what they cost, start nearest to
  closing, in the whole network; else those of the smallest kernels (with layers those
  that change the loss least), equally many in every group."""

  layers: bool = False
  """Layers may go as well as channels: residual units have gates too."""

  frozen: bool = False
  """Only gates learn before the cut, in part of an epoch: for a network that is already
  trained. The weights that stay are then refitted to do the work of the channels that
  go, where that helps on held-out data."""

  keep: Annotated[tuple[str, ...], PATTERNS] = ()
  """Channels to leave whole: names of modules or arrays, or patterns of them, such as
  head 'stage3/*'."""

  def __post_init__(self):
    if isinstance(self.target, str):
      object.__setattr__(self, 'target', fraction(self.target, 'target'))
    if not 0 < self.target <= 1:
      raise ConfigError(
        f'target: expected a fraction in (0, 1], got {self.target:g}; '
        'it is the part that remains, so 0.5 (or 50%) halves the network'
      )
    one_of(self, 'of', tuple(COSTS))
    if self.layers and self.of == 'milliseconds':
      raise ConfigError(
        'layers: milliseconds know the widths of layers alone; count flops or params'
      )
    at_least(self, 'latency_batch', 1)
    if self.round_to != 'auto':
      at_least(self, 'round_to', 1)
    finite(self, 'strength', positive=False)
    finite(self, 'gate_learning_rate', positive=True)

  @property
  def label(self) -> str:
    batch = f'-batch{self.latency_batch}' if self.of == 'milliseconds' else ''
    return f'{self.of}{100 * self.target:g}{batch}{"-layers" * self.layers}'


def _build(setting: Setting) -> Method:
  o = setting.options
  return trainable_gates(
    setting.coupling,
    target=o.target,
    of=_cost(setting) if o.of == times.TIME else o.of,
    strength=o.strength,
    gate_lr=o.gate_learning_rate,
    round_to=setting.round_to,
    steps=setting.steps,
    scores=setting.scores,
    scope='global' if o.by_loss and setting.scores else 'uniform',
    exclude=o.keep,
    layers=o.layers,
  )


def _cost(setting: Setting) -> CostFunction:
  """Milliseconds, measured once: a run that is resumed goes on with its first table."""
  o = setting.options
  timed = times.session(setting.coupling, o.latency_batch, setting.round_to)

  def to_json(measured: np.ndarray) -> dict[str, Any]:
    table = [
      {'layer': layer or 'network', 'widths': widths, times.TIME: float(taken)}
      for (layer, widths), taken in zip(timed.rows, measured, strict=True)
    ]
    return {'device': latency.device(), 'batch': timed.batch, 'table': table}

  def from_json(known: Mapping[str, Any]) -> np.ndarray | None:
    table = known.get('table', [])
    same = [row['widths'] for row in table] == [widths for _, widths in timed.rows]
    if not same or known['batch'] != timed.batch:
      return None
    return np.array([row[times.TIME] for row in table])

  return timed.cost(setting.remember(timed.measure, to_json, from_json))


def _target(options: Mapping[str, Any]) -> Target:
  of = options.get('of', 'flops')
  batch = options.get('latency_batch') if of == 'milliseconds' else None
  return Target(of, options['target'], batch)


def _question(result: Result, network: str) -> str:
  of, fraction, _ = _target(result.options)
  cost = 'time' if of == 'milliseconds' else COSTS[of]
  return f'how accurate is {network} with {100 * fraction:g} % of its {cost}?'


def _sentence(result: Result) -> str:
  """`requested 50.0 % of the FLOPs, reached 49.8 %`."""
  of, fraction, _ = _target(result.options)
  batch = ''
  if of == 'milliseconds' and result.milliseconds:
    batch = f' at batch {result.milliseconds.batch}'
  kept = ', '.join(result.options.get('keep', ()))
  whole = f', with {kept} left whole' * bool(kept)
  requested = f'requested {100 * fraction:.1f} % of the {COSTS[of]}{batch}'
  cost = getattr(result, of)
  if cost is None:  # milliseconds of a device that measured none
    return f'{requested}{whole}'
  reached = cost.after / cost.before
  missed = ''
  if of != 'milliseconds' and abs(reached - fraction) > TOLERANCE:  # else noted
    off = 100 * abs(reached - fraction)
    missed = f', {off:.2f} points {"above" if reached > fraction else "below"} it'
  return f'{requested}, reached {100 * reached:.2f} %{missed}{whole}'


def _remarks(result: Result) -> Sequence[str]:
  """`widths are multiples of 8, in narrow groups of 4, which suits this CPU; ...`."""
  cut = [
    (result.multiples.get(group, 1), after)
    for group, (before, after) in result.widths.items()
    if 0 < after < before
  ]
  by = sorted({n for n, _ in cut}, reverse=True)
  if not result.multiples or not by or by[-1] < 1:
    return ()
  below = [after for n, after in cut if after < n]
  is_so = not any(after % n for n, after in cut if after >= n)
  if not is_so or any(after & (after - 1) for after in below):
    return ()
  narrow = f', in narrow groups of {" or ".join(map(str, by[1:]))}' if by[1:] else ''
  narrow += ', or less than one' * bool(below)
  device = result.device or ''
  device = 'this CPU' if device.startswith('CPU') else device or 'this device'
  return (
    f'widths are multiples of {by[0]}{narrow}, which suits {device}; --round-to 1 '
    'switches it off',
  )


RECIPE = Recipe(
  options=GateOptions,
  build=_build,
  description=(
    'Train a network, learn with trainable gates which channels may go, cut them out, '
    'fine-tune the small network that remains, and report.'
  ),
  # Sized so that the stages reach their plateau: seconds for the digits, minutes to an
  # hour on a CPU for the TFDS sets at 28x28, an accelerator for the rest.
  epochs={
    'digits': Epochs(train=20, gates=20, finetune=15),
    'fashion_mnist': Epochs(train=12, gates=8, finetune=6),
    '': Epochs(train=60, gates=40, finetune=30),
  },
  peaks=(0.5, 0.5),
  target=_target,
  round_to=lambda o: o.round_to,
  score=lambda o: 'taylor' if o.by_loss or o.layers else 'l1',
  scores_layers=lambda o: o.layers,
  frozen=lambda o: o.frozen,
  refits=lambda o: o.frozen,
  formerly={'round_to': 1, 'frozen': False, 'layers': False},
  name='Trainable gates',
  question=_question,
  legend='cut: right after surgery; after: at the end of the run',
  sentence=_sentence,
  remarks=_remarks,
  charts=(
    Chart('Gates over time', 'channels', 'open', 'open channels'),
    Chart('Layers over time', 'units', 'layers', 'gate weight'),
  ),
)
