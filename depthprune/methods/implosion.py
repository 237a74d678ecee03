"""Network Implosion: residual units are erased, those of the smallest priority first.

Ida, Fujiwara: "Network Implosion: Effective Model Compression for ResNets via Static
Layer Pruning and Retraining" (IJCNN 2019, arXiv 1906.03826). The priority is the
paper's, and that training and erasing take turns:

  x_{l+1}  = x_l + w_l F_l(x_l)     in training
  gone     = the k units of smallest importance
  x_{l+1}  = x_l                    for l in gone: F_l does not exist any more
  rounds   = ceil((n - depth) / k)  of: train, erase k, retrain

  x_l      what goes into unit l     F_l   its branch
  w_l      its priority, one scalar, 1 at the start, trained with the weights
  k        units per round           n     units that there are
  depth    units that are to be left

Ours: w has no weight decay, and only units whose shortcut is the identity have one; a
unit that changes the resolution stays. Nothing else fixes the scale of w: where F ends
in a normalisation, w repeats its scale. So there are other measures of importance,

  priority   |w_l|, the paper's (of a layer with several branches: their mean)
  drop       the held-out loss without unit l, batch statistics measured anew; where
             the task decides by a metric of its own, minus that metric
  greedy     drop, scored again after every single erasure: drops do not add up
  influence  1 - E[cos(x_l, x_l + w_l F_l(x_l))] over held-out inputs, which needs no
             labels: Men et al., arXiv 2403.03853 (ShortGPT), who measure whole layers.
             Here the attention and the perceptron of a transformer's layer are two
             units, each measured by itself; in a scanned stack they are one.
  random     a fixed number per name, the control

The loss of all candidates is found in one compiled call; `greedy` uses the same program
again. Of equal importance, the deeper unit goes first.
"""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
from collections.abc import Sequence
from typing import Annotated, Any, Literal, get_args

import tyro
from etils import epy

from depthprune.train.method import Method, spare_closed
from depthprune.train.options import PATTERNS, Epochs, at_least, one_of
from depthprune.train.recipe import Chart, Recipe, Setting

with epy.lazy_imports():
  import jax
  import jax.numpy as jnp
  import numpy as np

  from depthprune.program import arguments, widths
  from depthprune.program import units as unit_search
  from depthprune.program.coupling import Coupling
  from depthprune.program.units import ResidualUnit
  from depthprune.train.result import Result
  from depthprune.train.task import Tree

Importance = Literal['priority', 'drop', 'greedy', 'influence', 'random']


def implosion(
  coupling: Coupling,
  depth: int | None = None,
  per_round: int = 1,
  importance: Importance = 'priority',
  units: Sequence[str] | None = None,
  seed: int = 0,
  exclude: str | Sequence[str] = (),
) -> Method:
  """Erases the residual units of the smallest importance, a few in every round.

  A unit x + w F(x) has a trained scalar w, its priority. `dp.trunk` finds the units of
  any network, and `dp.branch` writes one into a module. `dp.shrink` runs the rounds. To
  do so yourself, repeat as often as `Method.rounds` says: train with `make_step`,
  `decide`, `prune`, and make the method again for the smaller network; at last train
  what is left.

  Args:
    coupling: what `couple` found in the network; `program.units.units(coupling)` lists
      its units.
    depth: units that are to be left, of all that there are, erasable or not; by default
      three quarters of them.
    per_round: units that are erased between two trainings.
    importance: which units go first. 'priority': those of the smallest |w|, the
      paper's measure (of a layer with several branches their mean). 'drop': those
      whose absence costs the least held-out loss. 'greedy': as 'drop', but measured
      again after every erasure. 'influence': those that change the direction of what
      goes through them least, on held-out inputs without their labels (see
      `block_influence`); the attention and the perceptron of a transformer's layer are
      a unit each. 'random': a fixed number for every name, the control.
    units: names of those that may be erased; by default all that can be. (After a cut,
      the layers of a scanned stack are numbered anew.)
    seed: of 'random'.
    exclude: units that are never erased: names, or patterns such as 'stage3/*'.

  Returns:
    The Method. `rounds` counts the rounds that are left, this one included.

  Raises:
    ValueError: no unit of the network can be erased; the depth is above the present one
      or cannot be reached; a unit does not exist or cannot be erased; a pattern matches
      no unit; the importance is unknown.

  Source: Ida, Fujiwara, arXiv 1906.03826.
  """
  if importance not in get_args(Importance):
    expected = ', '.join(get_args(Importance))
    raise ValueError(f'importance={importance!r}: expected one of {expected}')
  arguments.whole('per_round', per_round)
  arguments.whole('seed', seed, least=0)
  if depth is not None:
    arguments.whole('depth', depth, least=0)
  present = unit_search.units(coupling)
  erasable = _erasable(present, [u.name for u in present if not u.why_not])
  kept = _matching(present, exclude)
  among = erasable if units is None else _erasable(present, units)
  among = tuple(unit for unit in among if unit.name not in kept)
  excess = len(present) - _reachable(depth, present, among)
  k = min(per_round, excess)
  with_priority = {b for unit in erasable for b in unit.branches}

  def init(gates, outputs):
    del outputs
    return {'branches': {b: gates['branches'][b] for b in sorted(with_priority)}}

  def decide(theta, stats, evaluate):
    del stats
    gone = erasure(coupling, among, k, importance, theta, evaluate, seed)
    return unit_search.closing(gone, coupling)

  def decayed(trained):
    whole = jax.tree.map(jnp.ones_like, trained)
    return {**whole, 'theta': jax.tree.map(jnp.zeros_like, trained['theta'])}

  return Method(
    decide=decide,
    init=init,
    forward=lambda theta, key=None, step=None: theta,
    transform=lambda tx: spare_closed(tx, decayed),
    rounds=-(-excess // per_round),
    report=lambda theta: {'priority': {u.name: priority(u, theta) for u in erasable}},
  )


def priority(unit: ResidualUnit, theta: Tree) -> jax.Array:
  """|w_l|, a scalar; the mean over its branches where a layer has several."""
  layer = ... if unit.layer is None else unit.layer
  w = jnp.stack([theta['branches'][branch][layer] for branch in unit.branches])
  return jnp.abs(w).mean()


def erasure(
  coupling: Coupling,
  among: Sequence[ResidualUnit],
  count: int,
  importance: str,
  theta: Tree,
  evaluate: Any,
  seed: int = 0,
  gone: Sequence[ResidualUnit] = (),
) -> tuple[ResidualUnit, ...]:
  """The next `count` units that go, in the order in which they go.

  Args:
    coupling: of the network. among: units that can be erased.
    importance: as for `implosion`. theta: with the priorities.
    evaluate: a Judge; 'drop', 'greedy' and 'influence' ask it. seed: of 'random'.
    gone: units that are closed already.
  """
  order, at_once = [*gone], 1 if importance == 'greedy' else count
  while len(order) < len(gone) + count:
    left = [unit for unit in among if unit not in order]
    if importance == 'priority':
      scores = [float(priority(unit, theta)) for unit in left]
    elif importance == 'random':
      scores = [_drawn(unit.name, seed) for unit in left]
    elif importance == 'influence':
      # A stack is one block here, and its layers have the names of their units.
      stack = lambda unit: unit.name.removesuffix(f'[{unit.layer}]')
      found = evaluate.influence({stack(unit): unit.branches for unit in left})
      scores = [found[unit.name] for unit in left]
    else:
      keeps = [unit_search.closing((*order, unit), coupling) for unit in left]
      keeps = jax.tree.map(lambda *kept: np.stack(kept), *keeps)
      metric = getattr(evaluate, 'decides_by', 'accuracy')
      judged = evaluate.each(keeps)
      scores = judged['loss'] if metric == 'accuracy' else -judged[metric]
    order += _smallest(left, scores, at_once)
  return tuple(order[len(gone) :])


def _three_quarters(
  present: Sequence[ResidualUnit], among: Sequence[ResidualUnit]
) -> int:
  """The default depth: at least one unit less, and never one that cannot be reached."""
  stay = len(present) - len(among)
  return max(len(present) - max(1, len(present) // 4), stay)


def _erasable(
  present: Sequence[ResidualUnit], names: Sequence[str]
) -> tuple[ResidualUnit, ...]:
  """The units of these names, in order of execution.

  Raises: ValueError for a name that there is not, and a unit that cannot be erased."""
  by_name = {unit.name: unit for unit in present}
  for name in names:
    if name not in by_name:
      near = difflib.get_close_matches(name, by_name, n=1, cutoff=0)
      raise ValueError(
        f'no unit {name!r}; nearest: {near[0]}; all: {arguments.listed(by_name)}'
      )
    if by_name[name].why_not:
      raise ValueError(f'{name} cannot be erased: {by_name[name].why_not}')
  return tuple(unit for unit in present if unit.name in names)


def _matching(
  present: Sequence[ResidualUnit], patterns: str | Sequence[str]
) -> set[str]:
  """Names of the units that some pattern matches; ValueError where one matches none."""
  patterns = [patterns] if isinstance(patterns, str) else patterns
  names = [unit.name for unit in present]
  for pattern in patterns:
    if not any(widths.matches(name, pattern) for name in names):
      near = difflib.get_close_matches(pattern, names, n=3, cutoff=0)
      raise ValueError(
        f'to leave in place: {pattern!r} matches no unit; nearest: {", ".join(near)}'
      )
  return {n for n in names if any(widths.matches(n, p) for p in patterns)}


def _reachable(
  depth: int | None, present: Sequence[ResidualUnit], among: Sequence[ResidualUnit]
) -> int:
  """The depth, if erasing `among` leads there; raises ValueError if it does not."""
  if not among:
    stay = [f'{unit.name}: {unit.why_not}' for unit in present if unit.why_not]
    none = (
      'it has no branch gates. `dp.trunk` puts one on each residual unit x + F(x) that '
      'it finds, those of the layers of a scan too; in your own modules write '
      'x + dp.branch(self, F(x))'
    )
    none = 'units and exclude leave none of them' if present else none
    raise arguments.brief(
      ValueError(
        f'implosion: no unit of this network can be erased; {"; ".join(stay) or none}'
      )
    )
  depth = _three_quarters(present, among) if depth is None else depth
  least = len(present) - len(among)
  if not least <= depth <= len(present):
    stay = [f'{u.name}: {u.why_not}' for u in present if u.why_not]
    raise arguments.brief(
      ValueError(
        f'depth={depth}: the network has {len(present)} units, {len(among)} of which '
        f'may be erased: expected {least} to {len(present)}'
        + ''.join(f'\n  {why}' for why in stay)
      )
    )
  return depth


def _smallest(
  among: Sequence[ResidualUnit], scores: Sequence[float] | np.ndarray, count: int
) -> list[ResidualUnit]:
  """In order of importance; of equals the deeper first, what is not a number last."""
  value = np.nan_to_num(np.asarray(scores, np.float64), nan=np.inf)
  order = sorted(range(len(among)), key=lambda i: (value[i], -i))
  return [among[i] for i in order[:count]]


def _drawn(name: str, seed: int) -> float:
  """A number for a name: the same however many other units are left."""
  digest = hashlib.sha256(f'{seed}/{name}'.encode()).digest()
  return float(int.from_bytes(digest[:6], 'big'))


# ---- runs and reports ----------------------------------------------------------------

THREE_QUARTERS = tyro.conf.arg(
  metavar='INT', help_behavior_hint='(default: three quarters of all)'
)
ANY = tyro.conf.arg(metavar='NAME', help_behavior_hint='(default: any)')


@dataclasses.dataclass(frozen=True)
class ImplosionOptions:
  """Network Implosion: residual units are erased by priority, the rest retrained."""

  depth: Annotated[int | None, THREE_QUARTERS] = None
  """Residual units (or layers of a scanned stack) that are to remain."""

  per_round: int = 1
  """Units erased between two retrainings."""

  importance: Importance = 'priority'
  """priority: |w| of a unit (the paper's). drop: held-out loss without it. greedy:
  drop, scored again after every erasure. influence: how much it changes the direction
  of what goes through it, on held-out inputs. random: the control."""

  units: Annotated[tuple[str, ...], ANY] = ()
  """Units that may be erased, such as stage1/block3."""

  keep: Annotated[tuple[str, ...], PATTERNS] = ()
  """Units that are never erased: names, or patterns of them, such as 'stage3/*'."""

  refit: bool = False
  """After an erasure the weights that stay are refitted to do the work of the units
  that went, where that helps on held-out data."""

  def __post_init__(self):
    one_of(self, 'importance', get_args(Importance))
    for name in ('depth', 'per_round'):
      at_least(self, name, 1)

  @property
  def label(self) -> str:
    depth = 'default' if self.depth is None else self.depth
    return f'depth{depth}by{self.per_round}-{self.importance}'


def _build(setting: Setting) -> Method:
  """The default depth and the names of units are about the network before any cut."""
  o = setting.options
  before = unit_search.units(setting.whole)
  kept = _matching(before, o.keep)
  among = _erasable(before, o.units or [u.name for u in before if not u.why_not])
  depth = o.depth or _three_quarters(before, [u for u in among if u.name not in kept])
  _named_once(o, before, depth)
  present = {u.name for u in unit_search.units(setting.coupling)}
  named = {u.name for u in among} & present
  return implosion(
    setting.coupling,
    depth=depth,
    per_round=o.per_round,
    importance=o.importance,
    units=sorted(named) if o.units else None,
    seed=setting.seed,
    exclude=sorted(kept & present),
  )


def _named_once(
  options: ImplosionOptions, present: Sequence[ResidualUnit], depth: int
) -> None:
  """Raises ValueError where layers of a stack are named and several rounds cut."""
  named = {*options.units, *_matching(present, options.keep)}
  layers = [u.name for u in present if u.name in named and u.layer is not None]
  excess = len(present) - depth
  if layers and excess > options.per_round:
    raise ValueError(
      f'units, keep: {layers[0]} is a layer of a stack, which every cut numbers anew: '
      f'erase all of them in one round (--per-round {excess}), or leave scan off'
    )


def _sentence(result: Result) -> str:
  """`erased 12 of 27 units in 3 rounds, chosen by priority`."""
  rounds = result.rounds
  if not rounds:
    return 'erased no units'
  before, after = rounds[0].units[0], rounds[-1].units[1]
  importance = result.options.get('importance')
  by = f', chosen by {importance}' if importance and after < before else ''
  several = f'{len(rounds)} round{"" if len(rounds) == 1 else "s"}'
  units = f'{before - after or "none"} of {before} unit{"" if before == 1 else "s"}'
  depth = result.options.get('depth')
  missed = ''
  if depth not in (None, after):
    missed = f'; {depth} were to be left, {after} are'
  return f'erased {units} in {several}{by}{missed}'


RECIPE = Recipe(
  options=ImplosionOptions,
  build=_build,
  description=(
    'Train a residual network with a priority on every unit, erase the least '
    'important, retrain, and so on down to the depth that was asked for, and report.'
  ),
  epochs={
    'digits': Epochs(train=0, gates=20, finetune=8),
    'fashion_mnist': Epochs(train=0, gates=12, finetune=4),
    '': Epochs(train=0, gates=160, finetune=60),
  },
  erases_units=True,
  refits=lambda o: o.refit,
  formerly={'refit': False},
  name='Network Implosion',
  question=lambda result, network: f'which units can {network} do without?',
  legend=(
    'before: trained with priorities, before the first erasure; cut: right after the '
    'last erasure; after: at the end of the run'
  ),
  sentence=_sentence,
  charts=(Chart('Priority of the units', 'units', 'priority', 'priority |w|'),),
)
