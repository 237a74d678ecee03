"""Choosing the thresholds of a cascade on held-out data, from one number a user has.

The number is a threshold, a mean cost, a drop in accuracy, or a level of risk that is
then certified. What the choice reaches is measured on test data, which never chooses.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from depthprune.cascades.drops import (
  candidates,
  cheapest,
  cross_validated,
  lowest,
  worth,
)
from depthprune.cascades.pareto import front as front  # `thresholds.front` is public
from depthprune.cascades.predictions import (
  Measured,
  Predictions,
  digest,
  leave,
  losses,
  measure,
  validate,
)
from depthprune.cascades.risk import Certificate, certify
from depthprune.data.metrics import Metric, name_of
from depthprune.program import arguments

# The share of test data that may look like held-out data, by chance or duplication.
SHARED = 0.5


class Choice(NamedTuple):
  """Thresholds, and how they were chosen.

  Attributes:
    exits: names [K]; the last, the network's own, has no threshold.
    thresholds: float32 [K - 1]; an exit with infinity is never used, and one with
      -infinity lets all samples leave.
    kind: 'fixed', 'budget', 'drop' or 'risk'.
    requested: the threshold, mean cost, drop in percentage points or risk asked for.
    held_out: what they reach on the data they were chosen on, which flatters them.
    risk: the certificate of a level of risk, else None.
    rows: uint32 [n], `predictions.digest` of the data they were chosen on.
  """

  exits: tuple[str, ...]
  thresholds: np.ndarray
  kind: str
  requested: float
  held_out: Measured
  risk: Certificate | None
  rows: np.ndarray

  def __repr__(self) -> str:
    exits = zip(self.exits, self.held_out.exits, strict=True)
    shares = ', '.join(f'{100 * share:.1f} % at {name}' for name, share in exits)
    return (
      f'Choice: {above(self.exits, self.thresholds)}; {self.kind} {self.requested:g}\n'
      f'  held out: accuracy {100 * self.held_out.accuracy:.2f} %, mean cost '
      f'{self.held_out.cost:,.6g}; {shares}'
    )


def above(exits: Sequence[str], thresholds: np.ndarray) -> str:
  """Returns `early above 0.9, late above 0.8, main`."""
  pairs = zip(exits[:-1], thresholds.tolist(), strict=True)
  return ', '.join([*(f'{name} above {t:.4g}' for name, t in pairs), exits[-1]])


class Intervals(NamedTuple):
  """95 % intervals (lower, upper) of what a choice reaches.

  Attributes:
    drop: accuracy lost against the network's own answer, in percentage points.
    saved: share of the cost of the network without heads that is saved.
  """

  drop: tuple[float, float]
  saved: tuple[float, float]


def fixed(p: Predictions, tau: float) -> Choice:
  """Uses one threshold for all exits.

  Args:
    p: predictions on held-out data.
    tau: the threshold; with infinity no exit is used.

  Raises:
    ValueError: tau is nan, or the predictions are invalid.
  """
  p = validate(p)
  if np.isnan(tau):
    raise ValueError('tau=nan: expected a number, or infinity to use no exit')
  return _choice(p, np.full(len(p.exits) - 1, tau), 'fixed', tau)


def for_budget(
  p: Predictions,
  budget: float,
  least: int = 20,
  points: int = 40,
  metric: Metric = 'accuracy',
  shared: bool = False,
) -> Choice:
  """Finds the most accurate thresholds whose mean cost is within a budget.

  Args:
    p: predictions on held-out data, with labels.
    budget: mean cost of a sample, in the unit of `p.cost`.
    least: number of samples that must leave at an exit that is used.
    points: number of prices to try; see `pareto.front`.
    metric: what is to be best instead of the accuracy, see `for_drop`.
    shared: whether all exits have the same threshold, see `for_drop`.

  Raises:
    ValueError: no thresholds cost so little, or the predictions are invalid.
  """
  p = validate(p)
  within = lambda q: q.measured.cost <= budget
  if not budget >= p.cost[0]:
    raise ValueError(
      f'budget {budget:g} is below the floor: exit {p.exits[0]}, the cheapest, costs '
      f'{p.cost[0]:g} a sample'
    )
  found = candidates(p, metric, least, points, within, shared)
  allowed = [q for q in found if within(q)]
  if not allowed:
    floor = min(q.measured.cost for q in found)
    raise ValueError(
      f'budget {budget:g} is below the floor: on the held-out data no thresholds cost '
      f'less than {floor:g} a sample, where at least {least} '
      f'must leave at an exit and a score of nan never leaves'
    )
  value = worth(p, metric)
  best = min(allowed, key=lambda q: (-value(q), q.measured.cost))
  return _choice(p, best.thresholds, 'budget', budget)


def for_drop(
  p: Predictions,
  drop: float,
  least: int = 20,
  points: int = 40,
  metric: Metric = 'accuracy',
  shared: bool = False,
  folds: int = 5,
) -> Choice:
  """Finds the cheapest thresholds that lose at most `drop` points of accuracy.

  A threshold for each exit saves more than one for all, but many thresholds fit the
  samples that chose them, and lose more on others. So each exit has its own where this
  is cheaper and loses at most `drop` in cross-validation: each fold is answered with
  thresholds that the other folds chose, for `drop` or for less. Else all have the same.
  On `p` itself the thresholds lose at most `drop` in both cases.

  Args:
    p: predictions on held-out data, with labels.
    drop: percentage points below the network's own accuracy; 0.5 allows 92.5 % if that
      is 93.0 %.
    least: number of samples that must leave at an exit that is used.
    points: number of prices to try; see `pareto.front`.
    metric: what may drop instead of the accuracy, by so many hundredths:
      'balanced_accuracy', 'f1' (the mean of the classes), or a function (labels [n],
      answers [n]) -> score, higher is better. Where classes are unbalanced, the
      accuracy hardly notices if nobody of a rare one is found any more.
    shared: whether all exits have the same threshold in any case.
    folds: number of folds, each of which takes three searches; with 1 each exit has its
      own threshold, and nothing is cross-validated. Samples with equal answers are in
      one fold, whatever their order.

  Raises:
    TypeError: folds is no whole number.
    ValueError: drop is below 0, folds is below 1, there is no such metric or it is nan,
      or the predictions are invalid.
  """
  p = validate(p)
  if not drop >= 0:
    raise ValueError(f'drop={drop}: expected percentage points, 0 or more')
  folds = arguments.whole('folds', folds, least=1)
  if np.isnan(lowest(p, drop, metric)):
    raise ValueError(f'metric {name_of(metric)!r} is nan of the answers of the network')
  if shared:
    (best,) = cheapest(p, [drop], least, points, metric, shared)
  else:
    best = cross_validated(p, drop, least, points, metric, folds)
  return _choice(p, best, 'drop', drop)


def for_risk(
  p: Predictions,
  alpha: float,
  delta: float = 0.05,
  risk: str = 'gap',
  least: int = 20,
  points: int = 40,
  seed: int = 0,
) -> Choice:
  """Finds the cheapest thresholds whose risk on unseen data is certified.

  The risk is at most alpha with probability 1 - delta over the held-out samples, if
  they are drawn like those in use. One half of them searches and the other half tests.

  Args:
    p: predictions on held-out data.
    alpha: limit of the risk, a share of all samples.
    delta: chance that the certificate is wrong.
    risk: the share of samples where the cascade is wrong ('error'), is wrong and the
      network alone is right ('gap'), or differs from the network alone
      ('disagreement', which needs no labels).
    least: number of samples that must leave at an exit that is used.
    points: number of prices to try; see `pareto.front`.
    seed: seed of the split into halves.

  Raises:
    ValueError: nothing can be certified; the message gives the lowest possible alpha.
  """
  p = validate(p)
  thresholds, certificate = certify(p, alpha, delta, risk, least, points, seed)
  return _choice(p, thresholds, 'risk', alpha, certificate)


def _choice(
  p: Predictions,
  thresholds: Any,
  kind: str,
  requested: float,
  risk: Certificate | None = None,
) -> Choice:
  thresholds = np.asarray(thresholds, np.float32)
  held_out = measure(p, leave(p.scores, thresholds))
  return Choice(p.exits, thresholds, kind, float(requested), held_out, risk, digest(p))


def measured(chosen: Choice | Any, p: Predictions) -> Measured:
  """Measures what a choice, or thresholds [K - 1], reach on any data.

  Raises:
    ValueError: the choice is of other exits, or the predictions are invalid.
  """
  p = validate(p)
  if isinstance(chosen, Choice):
    _check_exits(chosen, p)
    chosen = chosen.thresholds
  return measure(p, leave(p.scores, chosen))


def achieved(chosen: Choice, test: Predictions) -> Measured:
  """Measures what a choice reaches on test data.

  Raises:
    ValueError: more than half of the test data is data that the choice was made on, the
      choice is of other exits, or the predictions are invalid.
  """
  return measured(chosen, _check_test(chosen, test))


def bootstrap(
  chosen: Choice, test: Predictions, resamples: int = 1000, seed: int = 0
) -> Intervals:
  """Computes 95 % intervals on test data of the accuracy lost and the cost saved.

  Samples are drawn with replacement, the same for the cascade and the network alone (a
  paired bootstrap with percentiles).

  Args:
    chosen: the choice.
    test: predictions on test data, with labels.
    resamples: number of draws.
    seed: seed of the draws.

  Raises:
    ValueError: as for `achieved`, or there are no labels or no resamples.
  """
  test = _check_test(chosen, test)
  if resamples < 1:
    raise ValueError(f'resamples={resamples}: expected at least 1')
  left = leave(test.scores, chosen.thresholds)
  wrong, n = losses(test, 'error'), len(left)
  lost = 100.0 * (wrong[left, np.arange(n)].astype(int) - wrong[-1])
  saved = 1 - test.cost[left] / test.whole
  rng = np.random.default_rng(seed)
  means = []
  for _ in range(resamples):
    rows = rng.integers(0, n, n)
    means.append((lost[rows].mean(), saved[rows].mean()))
  low, high = np.percentile(means, (2.5, 97.5), axis=0).tolist()
  return Intervals((low[0], high[0]), (low[1], high[1]))


def _check_test(chosen: Choice, test: Predictions) -> Predictions:
  test = validate(test)
  _check_exits(chosen, test)
  shared = np.isin(digest(test), chosen.rows).mean()
  if shared > SHARED:
    raise ValueError(
      f'{100 * shared:.0f} % of the test data is the held-out data that these '
      'thresholds were chosen on: test data never chooses; give a split that neither '
      'trained nor chose, or call `measured` for the flattered number'
    )
  return test


def _check_exits(chosen: Choice, p: Predictions) -> None:
  if chosen.exits != p.exits:
    raise ValueError(
      f'thresholds were chosen for the exits {", ".join(chosen.exits)}, got data of '
      f'{", ".join(p.exits)}'
    )


def to_json(chosen: Choice) -> dict[str, Any]:
  """Converts a choice to plain JSON data: infinity as text, rows as a hex string."""
  held_out = {**chosen.held_out._asdict(), 'exits': list(chosen.held_out.exits)}
  if np.isnan(chosen.held_out.accuracy):
    held_out['accuracy'] = None
  finite = lambda t: t if np.isfinite(t) else str(t)
  return {
    'kind': chosen.kind,
    'requested': finite(chosen.requested),
    'exits': list(chosen.exits),
    'thresholds': [finite(t) for t in chosen.thresholds.tolist()],
    'held_out': held_out,
    'risk': chosen.risk and chosen.risk._asdict(),
    'rows': chosen.rows.astype('<u4').tobytes().hex(),
  }


def from_json(entry: Mapping[str, Any]) -> Choice:
  """Restores the choice that `to_json` converted, bit for bit."""
  held_out = entry['held_out']
  accuracy = held_out['accuracy']
  return Choice(
    exits=tuple(entry['exits']),
    thresholds=np.array([float(t) for t in entry['thresholds']], np.float32),
    kind=entry['kind'],
    requested=float(entry['requested']),
    held_out=Measured(
      accuracy=float('nan') if accuracy is None else accuracy,
      cost=held_out['cost'],
      exits=tuple(held_out['exits']),
    ),
    risk=entry['risk'] and Certificate(**entry['risk']),
    rows=np.frombuffer(bytes.fromhex(entry['rows']), '<u4'),
  )
