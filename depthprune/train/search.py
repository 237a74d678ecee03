"""Layers and widths decided together, under one or several limits on the cost.

A budget can be met with fewer layers, with narrower ones, or with some of both, and
within the widths by heads, by inner units or by the hidden width. A candidate says how
much of it goes where:

  n      the n blocks of the least influence are removed
  kinds  the kinds of channels that are narrowed, until the budget is met: all of them,
         one alone, or all but one

Scores of blocks and of channels are measured once, by whoever calls. The candidates
are judged as masks of the whole network, in one compiled program; costs are counted in
closed form. The number of blocks is searched from coarse to fine.

Sources: Muralidharan et al., arXiv 2407.14679 (Minitron), for candidates over depth,
heads, inner and hidden width that are judged, healed briefly and judged again.
Bercovich et al., arXiv 2411.19146 (Puzzle), for several constraints at once. The order
in which splits of the budget are tried is our own.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
import optax

from depthprune.data import batches
from depthprune.data.dataset import inputs_of
from depthprune.program import arguments
from depthprune.program.coupling import Coupling
from depthprune.program.rounding import RoundTo
from depthprune.program.trace import paths_of
from depthprune.program.widths import Counts, Range, produced, ranges
from depthprune.surgery import refit as least_squares
from depthprune.surgery.budget import Constraint, constraints, fitting, met, reachable
from depthprune.surgery.oneshot import Score, check, closing, left_by, narrowing, rank
from depthprune.surgery.prune import Pruned, prune
from depthprune.timing.layers import CostFunction
from depthprune.train.evaluate import evaluate, recalibrate
from depthprune.train.judge import held_out_of, judge
from depthprune.train.method import plain
from depthprune.train.rounds import are_outdated
from depthprune.train.step import init_state
from depthprune.train.task import Task, Tree, is_task


class Candidate(NamedTuple):
  """A decision about layers and widths, made by `search`.

  Attributes:
    keep: the decision, for `prune`.
    blocks: names of the blocks that go.
    kinds: {kind of channels: the share that is kept, of the blocks that stay}.
    costs: {name: cost} of the constraints.
    scores: of the task on the held-out examples, before the network is healed.
    pruned: the small network with healed variables; None where nothing was healed.
    healed: its scores on the held-out examples.
  """

  keep: dict
  blocks: tuple[str, ...]
  kinds: dict[str, float]
  costs: dict[str, float]
  scores: dict[str, float]
  pruned: Pruned | None = None
  healed: dict[str, float] | None = None

  @property
  def loss(self) -> float:
    """The held-out loss, after healing where that was done."""
    return (self.scores if self.healed is None else self.healed)['loss']

  def __repr__(self) -> str:
    kinds = ', '.join(f'{kind} {100 * part:.0f} %' for kind, part in self.kinds.items())
    costs = ', '.join(f'{cost:,.6g} {name}' for name, cost in self.costs.items())
    healed = '' if self.healed is None else ' healed'
    gone = f'without {arguments.listed(self.blocks)}' if self.blocks else 'all blocks'
    return f'Candidate: loss {self.loss:.4f}{healed}; {gone}; {kinds}; {costs}'


def search(
  coupling: Coupling,
  variables: Any,
  target: float | str | Mapping[Any, float | str],
  influence: Mapping[str, float],
  *,
  task: Task,
  held_out: Any,
  blocks: Mapping[str, Sequence[str]] | None = None,
  score: Score = 'l1',
  scope: str = 'global',
  of: str | CostFunction = 'params',
  kinds: Mapping[str, str | Sequence[str]] | None = None,
  round_to: RoundTo = 1,
  exclude: str | Sequence[str] = (),
  at_least: Counts | None = None,
  at_most: Counts | None = None,
  splits: int = 5,
  refit: Iterable[Any] | None = None,
  heal: Callable[[Pruned], Any] | None = None,
  finalists: int = 3,
  calibration: Any = (),
  batch: int = 128,
) -> list[Candidate]:
  """Decides which layers go and how narrow the others become, by what a task loses.

  Candidates that split the budget differently between depth and width, and between the
  kinds of width, are judged on held-out examples::

    blocks = {
      f'layer{i}': [f'layer{i}/attention/branch', f'layer{i}/mlp/branch']
      for i in range(model.depth)
    }
    influence = dp.block_influence(coupling, variables, texts, blocks)
    score = dp.activations(coupling, variables, texts)
    found = dp.search(
      coupling, variables, {'params': '70%', 'flops': '60%'}, influence, blocks=blocks,
      score=score, task=dp.language_model(), held_out=held_out)
    small = dp.prune(model, variables, found[0].keep, tokens)

  The scores are arguments, so that another budget is solved without measuring them
  again.

  Args:
    coupling: of the network, made by `couple` in evaluation mode.
    variables: its arrays.
    target: what the network may cost at most: a fraction of its cost in (0, 1], a
      percentage such as '50%', or an absolute number above 1. Or several costs at once,
      {'params': '80%', 'flops': '70%'}, each one that `of` may be.
    influence: {block: how much it matters}, as `block_influence` returns it. The blocks
      of the least influence go first; those that are not named stay.
    task: what is measured.
    held_out: what candidates are judged on: arrays or batches, as for `judge`. Report
      the winner on others.
    blocks: {name: the branches of a block}, as for `block_influence`. By default every
      branch is one.
    score: which channels stay, as for `oneshot`: 'l1', 'l2', or {group: [slices]}, as
      `activations` returns.
    scope: 'global' ranks all channels that are narrowed together, 'uniform' keeps the
      same fraction of each group.
    of: the cost of a single target: 'flops' (1 MAC = 2 FLOPs), 'params', 'bytes', or a
      function of (coupling, gates). Milliseconds are refused where blocks can go.
    kinds: {name: patterns}, the groups that are narrowed together, by patterns as
      `exclude` takes them. Groups that no pattern matches stay whole. By default groups
      are one kind if the modules that hold their arrays are called alike but for
      numbers, such as 'layer*/attention', 'layer*/mlp' and 'embed'.
    round_to: widths become multiples of this, as for `oneshot`.
    exclude: patterns of groups, arrays or modules that are left whole.
    at_least: fewest channels, as for `oneshot`.
    at_most: most channels, as for `oneshot`.
    splits: numbers of blocks that are tried at first, from the fewest to the most that
      the target allows; those between are then searched around the best.
    refit: a calibration set, as for `refit`; each candidate is then judged with weights
      that make up for its channels, all layers fitted at once. Finalists are refitted
      in order, as by `refit`.
    heal: (pruned) -> variables, a short training of a small network. The best
      `finalists` are then cut, healed and judged again, and come first.
    finalists: how many candidates are healed.
    calibration: training data as for `judge`, for fresh batch statistics, needed by a
      network that has such statistics.
    batch: examples in a batch of arrays.

  Returns:
    The candidates, best first: by the held-out loss of the task after healing, then by
    that of the masked network. None costs more than a target.

  Raises:
    KeyError: a block, branch or group that there is not.
    ValueError: a target that no candidate meets, with the name of that cost; or what
      `oneshot` and `judge` refuse.
  """
  arguments.coupling(coupling).fits(variables)
  check(score, scope)
  is_task(task)
  arguments.whole('splits', splits, 2)
  arguments.whole('finalists', finalists)
  if heal is not None:
    write = 'write heal=lambda pruned: trained(pruned.apply, pruned.variables)'
    arguments.function('heal', heal, 'a function of the cut network', write)
  held_out = held_out_of(held_out, batch, task)
  calibration = batches.full(calibration, batch)
  order = _ordered(coupling, influence, blocks)
  limits = ranges(coupling, round_to, exclude, at_least, at_most)
  space = Space(
    coupling=coupling,
    asked=constraints(coupling, target, of, round_to, {'branches': order}),
    blocks=order,
    scores=rank(coupling, variables, score, among=limits),
    limits=limits,
    kinds=_kinds(coupling, limits, kinds),
    scope=scope,
    round_to=round_to,
  )
  fewest, most = space.reach()
  model = coupling.model
  known = None if refit is None else [*refit]
  read = None
  if known is not None:
    read = least_squares.moments(coupling, variables, known)
  state = init_state(model, plain(), optax.identity(), variables)
  whole = judge(
    model, plain(), task, state, held_out, calibration, coupling, batch=batch
  )
  judged: dict[tuple, Candidate] = {}  # by number of blocks and all that is kept

  def try_without(count: int) -> None:
    for mix in _mixes([*space.kinds]):
      if keep := space.widest(count, mix):
        key = count, *(kept.tobytes() for kept in keep['channels'].values())
        if key not in judged:
          with_these = whole
          if read is not None:
            fitted = least_squares.refitted(coupling, variables, keep, read)
            with_these = whole.of(fitted)
          # Layers of stacks have no gates of their own: their branches are closed.
          gated = {g: keep['channels'][g] for g in space.limits}
          scores = with_these({**keep, 'channels': gated})
          judged[key] = space.candidate(count, keep, scores)

  counts = np.unique(np.linspace(fewest, most, splits).round().astype(int))
  for count in counts:
    try_without(count)
  stride = int(np.diff(counts).max(initial=1))
  while stride > 1:
    stride = (stride + 1) // 2
    best, *_ = min(judged, key=lambda key: _rank(judged[key]))
    for count in best - stride, best + stride:
      if fewest <= count <= most:
        try_without(count)
  ranked = sorted(judged.values(), key=_rank)
  if heal is None:
    return ranked
  example = _example(coupling, held_out[0])

  def healed(candidate: Candidate) -> Candidate:
    keep = candidate.keep
    left = variables
    if known is not None:
      left = least_squares.refit(coupling, variables, keep, known)
    small = prune(model, left, keep, example, coupling=coupling)
    network = small.model if small.arch else small.apply
    if are_outdated(small):
      fresh = recalibrate(network, small.variables, calibration)
      small = small._replace(variables=fresh)
    trained = heal(small)
    if missing := [p for p in paths_of(small.variables) if p not in paths_of(trained)]:
      expected = f'it to return all variables of the cut network, also {missing[0]}'
      raise arguments.refused('heal', expected, trained, kind=ValueError)
    small = small._replace(variables=trained)
    scores = evaluate(network, small.variables, held_out, task)
    return candidate._replace(pruned=small, healed=scores)

  first = sorted(map(healed, ranked[:finalists]), key=_rank)
  return [*first, *ranked[finalists:]]


class Space(NamedTuple):
  """The decisions that `search` chooses among, under some constraints.

  Attributes:
    coupling: of the network.
    asked: the constraints.
    blocks: {block: (branch, layer in its scan) of its branches}, of the least influence
      first; the layer is ... outside of scans.
    scores: {group: float [slices]}, of the groups that may be cut.
    limits: {group: Range}, of the same groups.
    kinds: {kind: its groups}.
    scope: 'global' or 'uniform', as for `oneshot`.
    round_to: widths are multiples of this, or 'auto'.
  """

  coupling: Coupling
  asked: list[Constraint]
  blocks: dict[str, Sequence[tuple[str, Any]]]
  scores: Mapping[str, np.ndarray]
  limits: Mapping[str, Range]
  kinds: dict[str, set[str]]
  scope: str
  round_to: RoundTo

  def narrowing(
    self, count: int, kinds: Iterable[str]
  ) -> tuple[Callable[[int], dict], int]:
    """Returns ever narrower networks without the least influential blocks.

    Args:
      count: number of blocks that are removed.
      kinds: the kinds of channels that become narrower.

    Returns:
      (number, from 0 to the last) -> decision, which names all branches; the last.
    """
    gates = self.coupling.gates()['branches'] if self.blocks else {}
    branches = {b: np.ones(gate.shape, bool) for b, gate in gates.items()}
    for block in [*self.blocks][:count]:
      for branch, layer in self.blocks[block]:
        branches[branch][layer] = False
    closed = closing(self.coupling, branches)
    free = set[str]().union(*(self.kinds[kind] for kind in kinds))
    limits = {
      g: limit if g in free else limit._replace(least=limit.most)
      for g, limit in left_by(self.coupling, self.limits, closed).items()
    }
    scores = {g: self.scores[g] for g in limits}
    keep_at, steps, _ = narrowing(
      self.coupling, scores, limits, self.asked, self.scope, self.round_to, closed
    )
    return keep_at, steps

  def widest(self, count: int, kinds: Iterable[str]) -> dict | None:
    """Returns the first decision of `narrowing` that meets all constraints, or None."""
    keep_at, steps = self.narrowing(count, kinds)
    if not met(self.coupling, self.asked, keep_at(steps)):
      return None
    return keep_at(fitting(self.coupling, self.asked, keep_at, steps))

  def reach(self) -> tuple[int, int]:
    """Returns the fewest and the most blocks that candidates remove.

    The fewest meet the constraints with all kinds of channels as narrow as they can be,
    the most without narrowing any, or they are all blocks.

    Raises:
      ValueError: the constraints cannot be met.
    """
    last = len(self.blocks)
    keep_at, steps = self.narrowing(last, self.kinds)
    least = 'what influence, exclude and at_least keep'
    reachable(self.coupling, self.asked, keep_at(steps), least)
    fits = lambda count, kinds: self.widest(count, kinds) is not None
    fewest = next(n for n in range(last + 1) if fits(n, self.kinds))
    return fewest, next((n for n in range(fewest, last) if fits(n, ())), last)

  def candidate(self, count: int, keep: dict, scores: dict[str, float]) -> Candidate:
    """Returns a judged decision with what it keeps and costs."""
    left = left_by(self.coupling, self.limits, keep)
    masks = {
      kind: [keep['channels'][g] for g in groups if g in left]
      for kind, groups in self.kinds.items()
    }
    return Candidate(
      keep=keep,
      blocks=(*self.blocks,)[:count],
      kinds={
        k: float(np.concatenate(kept).mean()) for k, kept in masks.items() if kept
      },
      costs={one.name: one.cost(self.coupling, keep) for one in self.asked},
      scores=scores,
    )


def _ordered(
  coupling: Coupling,
  influence: Mapping[str, float],
  blocks: Mapping[str, Sequence[str]] | None,
) -> dict[str, Sequence[tuple[str, Any]]]:
  """{block: (branch, layer) of its branches}, of the least influence first."""
  expected = '{block: influence}, as block_influence returns it'
  arguments.kind_of('influence', influence, Mapping, expected)
  if blocks is None:
    blocks = {b.removesuffix('/branch'): [b] for b in coupling.branches}
  there: dict[str, Sequence[tuple[str, Any]]] = {}
  for name, branches in blocks.items():
    if isinstance(branches, str) or not branches:
      where, expected = f'blocks[{name!r}]', "the block's branches, ['a/branch']"
      raise arguments.refused(where, expected, branches, kind=ValueError)
    for branch in branches:
      if branch not in coupling.branches:
        known = arguments.listed(coupling.branches)
        what = f'no branch {branch!r}; there are: {known}'
        raise arguments.wrong('blocks', what, kind=KeyError)
    layers = coupling.branch_shape(branches[0])[:1]
    for i in range(*layers) if layers else [...]:
      there[name if i is ... else f'{name}[{i}]'] = [(b, i) for b in branches]
  for block in influence:
    arguments.number(f'influence[{block!r}]', influence[block])
    if block not in there:
      what = f'no block {block!r}; there are: {arguments.listed(there)}'
      raise arguments.wrong('influence', what, kind=KeyError)
  return {block: there[block] for block in sorted(influence, key=influence.__getitem__)}


def _kinds(
  coupling: Coupling,
  limits: Mapping[str, Range],
  kinds: Mapping[str, str | Sequence[str]] | None,
) -> dict[str, set[str]]:
  """{kind: the groups that are narrowed together}, of those that may be cut."""
  found: dict[str, set[str]] = {}
  if kinds is None:
    for group in limits:
      path = group.rsplit(':', 1)[0]
      kind = re.sub(r'\d+', '*', path.rpartition('/')[0] or path)
      found.setdefault(kind, set()).add(group)
    return found
  arguments.kind_of('kinds', kinds, Mapping, "{name: patterns}, {'heads': '*/query'}")
  for kind, patterns in kinds.items():
    found[kind] = produced(coupling, patterns, 'kinds') & limits.keys()
  return {kind: groups for kind, groups in found.items() if groups}


def _mixes(kinds: Sequence[str]) -> list[tuple[str, ...]]:
  """All kinds, one alone, and all but one, each once."""
  rest = [tuple(k for k in kinds if k != kind) for kind in kinds]
  return [*dict.fromkeys((tuple(kinds), *((kind,) for kind in kinds), *rest))]


def _rank(candidate: Candidate) -> tuple[bool, float]:
  """Sorts by the loss; one that is not a number comes last."""
  return bool(np.isnan(candidate.loss)), candidate.loss


def _example(coupling: Coupling, batch: Tree) -> tuple:
  """Inputs of as many examples as the network was coupled with."""
  like = lambda x, coupled: x[: len(coupled.shape) and coupled.shape[0]]
  return jax.tree.map(like, inputs_of(batch), coupling.inputs)
