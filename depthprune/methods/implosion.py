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
  drop       the held-out loss without unit l, batch statistics measured anew
  greedy     drop, scored again after every single erasure: drops do not add up
  random     a fixed number per name, the control

The loss of all candidates is found in one compiled call; `greedy` uses the same program
again. Of equal importance, the deeper unit goes first.
"""

import difflib
import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from depthprune.program.coupling import Coupling
from depthprune.program.units import Unit, closing
from depthprune.program.units import units as units_of
from depthprune.run.config import Config
from depthprune.train.method import Method, spare_closed
from depthprune.train.task import Tree

IMPORTANCE = ('priority', 'drop', 'greedy', 'random')


def implosion(
  coupling: Coupling,
  depth: int | None = None,
  per_round: int = 1,
  importance: str = 'priority',
  units: Sequence[str] | None = None,
  seed: int = 0,
) -> Method:
  """The method for one network; `rounds` counts those that are left.

  Args:
    coupling: of the network, from `couple`.
    depth: units that are to be left, of all that there are, erasable or not; by default
      three quarters of them.
    per_round: k. importance: one of IMPORTANCE.
    units: names of those that may be erased; by default all that can be. (After a cut,
      the layers of a scanned stack are numbered anew.)
    seed: of 'random'.

  Raises: ValueError for a network without units that can be erased, a depth that is
    above the present one or that cannot be reached, a unit that there is not or that
    cannot be erased, an unknown importance.
  """
  if importance not in IMPORTANCE:
    expected = ', '.join(IMPORTANCE)
    raise ValueError(f'importance={importance!r}: expected one of {expected}')
  if per_round < 1:
    raise ValueError(f'per_round: expected at least 1, got {per_round}')
  present = units_of(coupling)
  erasable = _erasable(present, [u.name for u in present if not u.why_not])
  among = erasable if units is None else _erasable(present, units)
  excess = len(present) - _reachable(depth, present, among)
  k = min(per_round, excess)
  with_priority = {b for unit in erasable for b in unit.branches}

  def init(gates, outputs):
    del outputs
    return {'branches': {b: gates['branches'][b] for b in sorted(with_priority)}}

  def decide(theta, stats, evaluate):
    del stats
    gone = erasure(coupling, among, k, importance, theta, evaluate, seed)
    return closing(gone, coupling)

  def decayed(trained):
    whole = jax.tree.map(jnp.ones_like, trained)
    return {**whole, 'theta': jax.tree.map(jnp.zeros_like, trained['theta'])}

  return Method(
    decide=decide,
    init=init,
    forward=lambda theta, key, step: theta,
    transform=lambda tx: spare_closed(tx, decayed),
    rounds=-(-excess // per_round),
    report=lambda theta: {'priority': {u.name: priority(u, theta) for u in erasable}},
  )


def priority(unit: Unit, theta: Tree) -> jax.Array:
  """|w_l|, a scalar; the mean over its branches where a layer has several."""
  layer = ... if unit.layer is None else unit.layer
  w = jnp.stack([theta['branches'][branch][layer] for branch in unit.branches])
  return jnp.abs(w).mean()


def erasure(
  coupling: Coupling,
  among: Sequence[Unit],
  count: int,
  importance: str,
  theta: Tree,
  evaluate: Any,
  seed: int = 0,
  gone: Sequence[Unit] = (),
) -> tuple[Unit, ...]:
  """The next `count` units that go, in the order in which they go.

  Args:
    coupling: of the network. among: units that can be erased.
    importance: one of IMPORTANCE. theta: with the priorities.
    evaluate: a Judge; only 'drop' and 'greedy' ask it. seed: of 'random'.
    gone: units that are closed already.
  """
  order, at_once = [*gone], 1 if importance == 'greedy' else count
  while len(order) < len(gone) + count:
    left = [unit for unit in among if unit not in order]
    if importance == 'priority':
      scores = [float(priority(unit, theta)) for unit in left]
    elif importance == 'random':
      scores = [_drawn(unit.name, seed) for unit in left]
    else:
      keeps = [closing((*order, unit), coupling) for unit in left]
      keeps = jax.tree.map(lambda *kept: np.stack(kept), *keeps)
      scores = evaluate.each(keeps)['loss']
    order += _smallest(left, scores, at_once)
  return tuple(order[len(gone) :])


def configured(
  config: Config,
  coupling: Coupling,
  steps: int,
  scores: Mapping[str, np.ndarray],
  whole: Coupling,
) -> Method:
  """The method as a run describes it.

  whole: coupling of the network before any cut, which the default depth and the names
    of units are about.
  """
  del steps, scores
  options: Any = config.options
  before = units_of(whole)
  _named_once(options, before)
  named = {u.name for u in _erasable(before, options.units)} & {
    u.name for u in units_of(coupling)
  }
  return implosion(
    coupling,
    options.depth or _three_quarters(before),
    options.per_round,
    options.importance,
    sorted(named) if options.units else None,
    config.seed,
  )


def _named_once(options: Any, present: Sequence[Unit]) -> None:
  """Raises ValueError where layers of a stack are named and several rounds cut."""
  layers = [u.name for u in present if u.name in options.units and u.layer is not None]
  excess = len(present) - (options.depth or _three_quarters(present))
  if layers and excess > options.per_round:
    raise ValueError(
      f'units: {layers[0]} is a layer of a stack, which every cut numbers anew: erase '
      f'all of them in one round (--per-round {excess}), or leave scan off'
    )


def _three_quarters(present: Sequence[Unit]) -> int:
  """The default depth: at least one unit less, and never one that cannot be reached."""
  stay = sum(1 for unit in present if unit.why_not)
  return max(len(present) - max(1, len(present) // 4), stay)


def _erasable(present: Sequence[Unit], names: Sequence[str]) -> tuple[Unit, ...]:
  """The units of these names, in order of execution. Raises ValueError, see above."""
  by_name = {unit.name: unit for unit in present}
  for name in names:
    if name not in by_name:
      near = difflib.get_close_matches(name, by_name, n=1, cutoff=0)
      raise ValueError(
        f'no unit {name!r}; nearest: {near[0]}; all: {", ".join(by_name)}'
      )
    if by_name[name].why_not:
      raise ValueError(f'{name} cannot be erased: {by_name[name].why_not}')
  return tuple(unit for unit in present if unit.name in names)


def _reachable(
  depth: int | None, present: Sequence[Unit], among: Sequence[Unit]
) -> int:
  """The depth, if erasing `among` leads there. Raises ValueError, see above."""
  if not among:
    stay = [f'{unit.name}: {unit.why_not}' for unit in present]
    raise ValueError(
      'implosion: no unit of this network can be erased; '
      + ('; '.join(stay) or 'it has no branch gates (`depthprune.gates.branch`)')
    )
  depth = _three_quarters(present) if depth is None else depth
  least = len(present) - len(among)
  if not least <= depth <= len(present):
    stay = [f'{u.name}: {u.why_not}' for u in present if u.why_not]
    raise ValueError(
      f'depth={depth}: the network has {len(present)} units, {len(among)} of which may '
      f'be erased: expected {least} to {len(present)}'
      + ''.join(f'\n  {why}' for why in stay)
    )
  return depth


def _smallest(
  among: Sequence[Unit], scores: Sequence[float] | np.ndarray, count: int
) -> list[Unit]:
  """In order of importance; of equals the deeper first, what is not a number last."""
  value = np.nan_to_num(np.asarray(scores, np.float64), nan=np.inf)
  order = sorted(range(len(among)), key=lambda i: (value[i], -i))
  return [among[i] for i in order[:count]]


def _drawn(name: str, seed: int) -> float:
  """A number for a name: the same however many other units are left."""
  digest = hashlib.sha256(f'{seed}/{name}'.encode()).digest()
  return float(int.from_bytes(digest[:6], 'big'))
