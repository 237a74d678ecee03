"""What a choice is, what it gives on test data, and the data it refuses."""

import json

import numpy as np
import pytest

from depthprune.cascades import predictions, thresholds
from tests.cascades.answers import answers, drawn

HELD_OUT, TEST = drawn(400), drawn(500, seed=1)
INF = np.inf


def rows(p, at):
  return predictions.take(predictions.validate(p), np.asarray(at))


def both(one, other):
  """The samples of two data sets."""
  return one._replace(
    logits=np.concatenate([one.logits, other.logits], 1),
    labels=np.concatenate([one.labels, other.labels]),
    scores=np.concatenate([one.scores, other.scores], 1),
  )


def test_a_choice_says_what_it_gives_on_the_data_it_was_made_on():
  chosen = thresholds.fixed(HELD_OUT, 0.7)
  assert chosen.held_out == thresholds.measured(chosen, HELD_OUT)
  assert chosen.held_out == thresholds.measured([0.7, 0.7], HELD_OUT)
  assert chosen.thresholds.dtype == np.float32
  assert chosen.exits == HELD_OUT.exits
  assert chosen.risk is None


def test_test_data_gives_a_number_by_hand():
  chosen = thresholds.fixed(HELD_OUT, 0.7)
  exits = [[1, 0, 1], [1, 1, 0], [0, 0, 0]]
  test = answers(exits, [[0.9, 0.1, 0.7], [0.9, 0.8, 0.7]], [1, 2, 4], seed=5)
  # 0 leaves first and is right, 1 second and is right, 2 is at the threshold, stays
  assert thresholds.achieved(chosen, test) == predictions.Measured(
    2 / 3, 7 / 3, (1 / 3,) * 3
  )


@pytest.mark.parametrize('measure', [thresholds.achieved, thresholds.bootstrap])
def test_data_that_chose_is_refused_as_test_data(measure):
  chosen = thresholds.fixed(HELD_OUT, 0.7)
  for again in (
    HELD_OUT,
    rows(HELD_OUT, np.random.default_rng(0).permutation(400)),
    rows(HELD_OUT, range(7)),
  ):
    with pytest.raises(ValueError, match='100 % of the test data.*never chooses'):
      measure(chosen, again)
  mostly = both(rows(HELD_OUT, range(51)), rows(TEST, range(49)))
  with pytest.raises(ValueError, match='51 %'):
    measure(chosen, mostly)


def test_test_data_may_share_some_samples_with_what_chose():
  chosen = thresholds.fixed(HELD_OUT, 0.7)
  half = both(rows(HELD_OUT, range(50)), rows(TEST, range(50)))
  assert thresholds.achieved(chosen, half) == thresholds.measured(chosen, half)
  assert thresholds.achieved(chosen, TEST) == thresholds.measured(chosen, TEST)


@pytest.mark.parametrize(
  'measure', [thresholds.achieved, thresholds.bootstrap, thresholds.measured]
)
def test_data_of_other_exits_is_refused(measure):
  other = TEST._replace(exits=('exit0', 'another', 'main'))
  with pytest.raises(ValueError, match='for the exits exit0, exit1, main, got .*other'):
    measure(thresholds.fixed(HELD_OUT, 0.7), other)


@pytest.mark.parametrize(
  'measure', [thresholds.achieved, thresholds.bootstrap, thresholds.measured]
)
def test_data_that_does_not_fit_is_refused(measure):
  with pytest.raises(ValueError, match='cost: expected'):
    measure(thresholds.fixed(HELD_OUT, 0.7), TEST._replace(cost=[1, 2]))


def test_intervals_are_those_of_the_normal_limit():
  test = drawn(4000, seed=1)._replace(whole=2.9)
  chosen = thresholds.fixed(HELD_OUT, 0.7)
  drop, saved = thresholds.bootstrap(chosen, test, resamples=2000)
  found = thresholds.measured(chosen, test)
  left, wrong = (
    predictions.leave(test.scores, chosen.thresholds),
    predictions.losses(test, 'error'),
  )
  lost = 100 * (wrong[left, np.arange(4000)].astype(int) - wrong[-1])
  share = 1 - test.cost[left] / 2.9
  for (low, high), values, middle in (
    (drop, lost, predictions.drop(found, test)),
    (saved, share, predictions.saved(found, test)),
  ):
    assert middle == pytest.approx(values.mean())
    width = 1.96 * values.std() / np.sqrt(4000)
    assert (low + high) / 2 == pytest.approx(middle, abs=0.15 * width)
    assert high - low == pytest.approx(2 * width, rel=0.1)


def test_a_cascade_that_answers_as_the_network_has_lost_nothing_for_certain():
  # paired: the same samples are wrong by both, so no resample shows a difference
  right = np.repeat(np.arange(100)[None] % 3 > 0, 3, axis=0)
  test = answers(right, np.full((2, 100), 0.9), cost=[1, 2, 4], seed=5)
  found = thresholds.bootstrap(thresholds.fixed(HELD_OUT, 0.7), test, resamples=50)
  assert found == thresholds.Intervals((0, 0), (0.75, 0.75))


def test_the_same_seed_draws_the_same():
  one, two, other = (
    thresholds.bootstrap(thresholds.fixed(HELD_OUT, 0.7), TEST, 50, seed)
    for seed in (0, 0, 1)
  )
  assert one == two != other


def test_intervals_need_labels_and_resamples():
  chosen = thresholds.fixed(HELD_OUT, 0.7)
  with pytest.raises(ValueError, match='needs labels'):
    thresholds.bootstrap(chosen, TEST._replace(labels=None))
  with pytest.raises(ValueError, match='resamples=0'):
    thresholds.bootstrap(chosen, TEST, resamples=0)


def unlabelled(p):
  return p._replace(labels=None)


@pytest.mark.parametrize(
  'chosen',
  [
    thresholds.fixed(HELD_OUT, 0.9),
    thresholds.fixed(HELD_OUT, INF),
    thresholds.for_budget(HELD_OUT, 1.0),
    thresholds.for_risk(HELD_OUT, 0.1),
    thresholds.for_risk(unlabelled(HELD_OUT), 0.2, risk='disagreement'),
  ],
  ids=['fixed', 'never', 'budget', 'risk', 'unlabelled'],
)
def test_json_and_back_is_the_same_to_the_last_bit(chosen):
  text = json.dumps(thresholds.to_json(chosen), allow_nan=False)
  back = thresholds.from_json(json.loads(text))
  for field in chosen._fields:
    was, now = getattr(chosen, field), getattr(back, field)
    np.testing.assert_equal(now, was)
    assert type(now) is type(was)
  assert back.thresholds.dtype == np.float32
  with pytest.raises(ValueError, match='never chooses'):
    thresholds.achieved(back, HELD_OUT)


def test_json_is_made_for_reading():
  entry = thresholds.to_json(thresholds.for_budget(HELD_OUT, 1.0))
  assert entry['thresholds'] == ['-inf', 'inf']
  assert (entry['kind'], entry['requested']) == ('budget', 1)
  assert entry['held_out']['exits'] == [1, 0, 0]
  assert entry['exits'] == ['exit0', 'exit1', 'main']
  assert len(entry['rows']) == 8 * 400


def unbalanced(n=400, rare=40):
  """Of the rare class the first exit is sure and wrong, the network's own is right."""
  labels = (np.arange(n) < rare).astype(int)
  one_hot = np.eye(2, dtype=np.float32)
  noise = np.random.default_rng(0).uniform(0, 0.1, (n, 1)).astype(np.float32)
  logits = np.stack([one_hot[np.zeros(n, int)] + noise, one_hot[labels] + noise])
  scores = np.where(labels == 1, 0.8, 0.6)[None] + noise.T
  cost = np.array([1.0, 4.0])
  return predictions.Predictions(('early', 'main'), logits, labels, scores, cost, 4.0)


@pytest.mark.parametrize('metric', ['balanced_accuracy', 'f1', 'own'])
def test_a_rare_class_is_not_given_up_for_the_accuracy(metric):
  p = unbalanced()
  if metric == 'own':
    metric = lambda labels, answers: (answers[labels == 1] == 1).mean()
  given_up = thresholds.for_drop(p, 10.0)
  assert given_up.held_out.exits == (1, 0) and given_up.held_out.accuracy == 0.9
  # All of the rare class have higher scores, so whoever leaves leaves after them.
  kept = thresholds.for_drop(p, 10.0, metric=metric)
  assert kept.held_out.exits == (0, 1)
  allowed = thresholds.for_drop(p, 100.0, metric=metric)
  assert allowed.held_out.exits == (1, 0)
  assert thresholds.for_drop(p, 10.0, metric='accuracy').held_out == given_up.held_out


def test_a_budget_is_spent_on_what_decides():
  """Class 1 is rare; half may stay, and the score says nothing of who is right."""
  p = unbalanced()
  scores = np.where(p.labels == 1, 0.2, 0.6)[None] + p.scores % 0.1
  p = p._replace(scores=scores)
  for metric in ('accuracy', 'balanced_accuracy', 'f1'):
    chosen = thresholds.for_budget(p, 2.5, metric=metric)
    left = predictions.leave(scores, chosen.thresholds)
    assert predictions.scored(predictions.validate(p), left, metric) == 1
  with pytest.raises(ValueError, match="metric='auc': expected 'accuracy'"):
    thresholds.for_budget(p, 2.5, metric='auc')


def test_the_mean_of_balanced_losses_is_the_error_of_the_mean_recall():
  p = predictions.validate(unbalanced())
  lost = predictions.losses(p, 'balanced')
  for k in range(2):
    left = np.full(len(p.labels), k)
    assert 1 - lost[k].mean() == pytest.approx(
      predictions.scored(p, left, 'balanced_accuracy')
    )
  with pytest.raises(ValueError, match="loss='balanced': expected one of error"):
    thresholds.for_risk(p, 0.3, risk='balanced')


@pytest.mark.parametrize('labels', [np.zeros(400), np.zeros((400, 2), int)])
def test_numbers_and_several_labels_have_no_cascade(labels):
  with pytest.raises(ValueError, match='a cascade is for one class per sample'):
    thresholds.for_drop(unbalanced()._replace(labels=labels), 1.0)
