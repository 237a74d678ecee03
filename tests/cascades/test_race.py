"""Times of a cascade, and what is decided by them."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from depthprune.cascades import race as timed
from depthprune.cascades.race import merge, race, typical_batches
from tests.cascades.test_cascade import CASCADE, EXITS, X, made

SPENT: list[int] = []


def clocked(monkeypatch) -> None:
  """Replaces the clock by what `priced` cascades say that they spent."""

  def interleave(calls, seconds):
    times = []
    for call in calls:
      SPENT.clear()
      call()
      times.append([float(sum(SPENT))] * 3)
    return np.array(times)

  monkeypatch.setattr(timed.clock, 'interleave', interleave)


def priced(found, stage: float, branch: float, alone: float = 1000.0):
  """The cascade, where a stage that runs, a branch and the network take so long."""
  program = found.program

  def run(variables, settings, inputs, end, merged):
    answer = program(variables, settings, inputs, end, merged)
    if merged is None:
      SPENT.append(alone)
      return answer
    stages = int((np.asarray(answer.rows) > 0).sum())
    asked = [e for e in EXITS[:-1][:stages] if e not in merged]
    SPENT.append(stages * stage + branch * len(asked))
    return answer

  return dataclasses.replace(found, program=run)


def test_single_examples_leave_as_all_of_them_do():
  many = typical_batches(CASCADE, (X,), 1)
  left = np.bincount([int(CASCADE(*part).exit[0]) for part in many], minlength=3) / 8
  every = np.bincount(CASCADE(X).exit, minlength=3) / len(X)
  assert len(many) == 8 and np.abs(left - every).max() <= 1 / 8
  assert [len(x) for (x,) in typical_batches(CASCADE, (X,), 7)] == [7] * 5
  ((every,),) = typical_batches(CASCADE, (X,))
  np.testing.assert_array_equal(every, X)
  with pytest.raises(ValueError, match='at most the 40 examples there are, got 41'):
    typical_batches(CASCADE, (X,), 41)


def test_a_race_of_single_examples_has_their_mean_cost():
  found = dataclasses.replace(CASCADE, thresholds=np.full(2, -1, np.float32))
  one = race(found, X, batch=1, seconds=0.01)
  assert one.batch == 1 and one.compile_s > 0
  assert one.cost.ideal == one.cost.padded == found.stages[0].flops
  assert one.cost.whole == found.stages.whole


@pytest.mark.parametrize(
  ('stage', 'branch', 'thresholds', 'merged'),
  [
    (10, 1, (-1, -1), ()),  # all leave at once: two stages are saved
    (10, 1, (2, 2), ('a', 'b')),  # nobody leaves: to ask costs time and saves none
    (1, 10, (-1, -1), ('a', 'b')),  # all leave, but to ask takes longer than to run
    (10, 4, (2, -1), ('a',)),  # all leave at b, nobody at a
  ],
)
def test_what_saves_less_than_it_costs_is_merged(
  stage, branch, thresholds, merged, monkeypatch
):
  clocked(monkeypatch)
  found = priced(made(thresholds), stage, branch)
  got = merge(found, X, batch=1)
  assert got.merged == {1: merged}
  np.testing.assert_array_equal(got(X[:1]).exit, found(X[:1]).exit)
  other = merge(dataclasses.replace(got, merged={4: ('b',)}), X, batch=1)
  assert other.merged == {4: ('b',), 1: merged}


@pytest.mark.parametrize(('alone', 'merged'), [(29, ('a', 'b')), (28, None)])
def test_what_takes_over_five_percent_longer_than_the_network_is_not_used(
  alone, merged, monkeypatch
):
  clocked(monkeypatch)
  got = merge(priced(made((2, 2)), 10, 1, alone), X, batch=1)  # its heads cost, too
  assert got.merged == {1: merged}


def test_a_measured_merge_is_one_of_the_ways():
  got = merge(CASCADE, jnp.asarray(X), batch=1, seconds=0.05)
  assert {*got.merged} == {1} and {*(got.merged[1] or ())} <= {'a', 'b'}
  if got.merged[1] is None:
    assert got(X[:1]).exit == 2
    return
  answers = jax.tree.map(np.asarray, [got(X[i : i + 1]).exit[0] for i in range(10)])
  np.testing.assert_array_equal(answers, CASCADE(X[:10]).exit)
