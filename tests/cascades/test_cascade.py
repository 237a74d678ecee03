"""Early exits that are executed: the same decisions and answers as simulated ones."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from depthprune.cascades import confidence, executor
from depthprune.cascades.cascade import Cascade, cascade
from depthprune.cascades.executor import sizes
from depthprune.cascades.predictions import leave
from depthprune.models.heads import Head, WithHeads
from depthprune.models.resnet import ResNet
from depthprune.program.stages import split
from tests import zoo

CLASSES, FEATURES = 4, 6
X = np.random.default_rng(0).normal(size=(40, FEATURES)).astype(np.float32)
W = np.random.default_rng(1).normal(size=(3, FEATURES, FEATURES)).astype(np.float32)
HEAD = np.random.default_rng(2).normal(size=(3, FEATURES, CLASSES)).astype(np.float32)
VARIABLES = {'w': jnp.asarray(W), 'head': jnp.asarray(HEAD)}
EXITS = ('a', 'b', 'main')


def network(v, x):
  """Three layers, an exit after each."""
  out = {}
  for k, name in enumerate(EXITS):
    x = jnp.tanh(x @ v['w'][k])
    out[name] = x @ v['head'][k]
  return out


def made(thresholds=(0.5, 0.5), variables=VARIABLES, **kwargs) -> Cascade:
  given_ = dict(zip(EXITS, map(float, thresholds)))
  return cascade(network, variables, X[:1], thresholds=given_, **kwargs)


def simulated(found: Cascade, x, variables=VARIABLES):
  """(exit, logits, scores) without any cascade."""
  out = network(variables, x)
  logits = np.stack([np.asarray(out[name]) for name in EXITS])
  scale = np.append(found.temperatures, 1)[:, None, None].astype(np.float32)
  scores = confidence.scores(found.confidence, logits / scale, found.weights)
  left = leave(scores, found.thresholds)
  return left, logits[left, np.arange(len(x))], scores


CASCADE = made()


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(
  st.sampled_from([0, 1, 2, 3, 7, 40]),
  st.tuples(*[st.floats(-0.5, 1.5, width=32)] * 2),
  st.integers(0, 99),
)
def test_executed_is_simulated_at_any_threshold_and_batch(batch, thresholds, seed):
  x = jnp.asarray(np.random.default_rng(seed).normal(size=(batch, FEATURES)), 'float32')
  settings_ = np.array(thresholds, np.float32)
  found = dataclasses.replace(CASCADE, thresholds=settings_)
  answer = found(x)
  if not batch:
    assert answer.logits.shape == (0, CLASSES) and answer.exit.shape == (0,)
    assert found.cost(answer).ideal == 0
    return
  left, logits, scores = simulated(found, x)
  far = (np.abs(scores - settings_[:, None]) >= 1e-5).all(0)
  np.testing.assert_array_equal(np.asarray(answer.exit)[far], left[far])
  np.testing.assert_allclose(np.asarray(answer.logits)[far], logits[far], atol=1e-5)
  _cost_is_what_was_executed(answer, batch)


def test_a_cascade_says_where_examples_leave_and_what_that_costs():
  shown = repr(made((0.5, 0.25)))
  assert 'above 0.5' in shown and 'above 0.25' in shown and 'array' not in shown
  assert f'{made().stages.whole:,.0f}' in shown


def _cost_is_what_was_executed(answer, batch):
  """Every stage ran on the smallest size that holds those who reached it."""
  left, steps = np.asarray(answer.exit), np.array(sizes(batch, 8))
  reach = np.array([(left >= k).sum() for k in range(3)])
  rows = [int(steps[np.searchsorted(steps, n)]) for n in reach]
  assert np.asarray(answer.rows).tolist() == rows
  flops = np.array([2 * FEATURES * (FEATURES + CLASSES)] * 3)
  cost = CASCADE.cost(answer)
  assert cost.ideal == pytest.approx(flops @ reach / batch)
  assert cost.padded == pytest.approx(flops @ np.array(rows) / batch)
  assert cost.whole == 3 * 2 * FEATURES**2 + 2 * FEATURES * CLASSES


@pytest.mark.parametrize(
  ('thresholds', 'exit'), [((-1, -1), 0), ((2, -1), 1), ((2, 2), 2), ((1, 1), 2)]
)
def test_all_leave_at_one_place(thresholds, exit):
  found = made(thresholds)
  answer = found(X)
  assert np.asarray(answer.exit).tolist() == [exit] * 40
  np.testing.assert_allclose(answer.logits, network(VARIABLES, X)[EXITS[exit]], 1e-5)
  assert np.asarray(answer.rows).tolist() == [40] * (exit + 1) + [0] * (2 - exit)
  assert np.isnan(answer.score).all() == (exit == 2) and answer.broken == 0


def test_a_tie_stays():
  x = np.tile(X[:1], (5, 1))
  score = simulated(CASCADE, x)[2][0, 0]
  assert np.asarray(made((score, 2))(x).exit).tolist() == [2] * 5
  below = np.nextafter(score, np.float32(0))
  assert np.asarray(made((below - 1e-6, 2))(x).exit).tolist() == [0] * 5


def test_a_confidence_that_is_not_a_number_goes_on_and_is_reported():
  x = X[:6].copy()
  x[2] = np.nan
  answer = made((-1, -1))(x)
  assert np.asarray(answer.exit).tolist() == [0, 0, 2, 0, 0, 0]
  assert answer.broken == 2 and np.isnan(answer.logits[2]).all()
  assert np.asarray(answer.rows).tolist() == [6, 1, 1]


@pytest.mark.parametrize('kind', confidence.KINDS)
def test_every_confidence_executed_as_simulated(kind):
  logits = np.stack([np.asarray(v) for v in network(VARIABLES, X).values()])
  labels = logits[-1].argmax(-1)
  weights = confidence.learn(logits, labels) if kind == 'learned' else None
  middle = np.median(confidence.scores(kind, logits, weights), axis=1)
  limits = (0.5, 0.5) if kind == 'patience' else middle + 1e-4
  scale = {'a': 2.0, 'b': 0.5}
  found = made(limits, confidence=kind, weights=weights, temperatures=scale)
  answer = found(X)
  left, expected, _ = simulated(found, X)
  np.testing.assert_array_equal(answer.exit, left)
  np.testing.assert_allclose(answer.logits, expected, atol=1e-5)
  assert len(set(left.tolist())) > 1


def test_patience_goes_with_its_example():
  """Those who stay move to the front, and what they answered before goes with them."""
  answers = np.array([
    [0, 0, 0, 0], [0, 1, 1, 0], [1, 0, 0, 0], [0, 0, 0, 0], [0, 1, 2, 0], [1, 2, 1, 0]
  ])  # fmt: skip
  x = np.eye(3, dtype=np.float32)[answers]
  said = lambda v, x: {name: x[:, k] @ v['one'] for k, name in enumerate('abcd')}
  found = cascade(
    said, {'one': jnp.eye(3)}, x[:1], exits=tuple('abcd'), confidence='patience',
    thresholds=dict.fromkeys('abc', 0.5),
  )  # fmt: skip
  assert np.asarray(found(x).exit).tolist() == [1, 2, 2, 1, 3, 3]


def test_predictions_are_scored_at_the_temperatures_of_the_cascade():
  found = made(temperatures={'a': 2.0, 'b': 0.5})
  np.testing.assert_allclose(
    found.predictions(None, X).scores, simulated(found, X)[2], rtol=1e-5
  )


def test_one_example_and_the_answer_that_a_budget_allows():
  found = made((2, 2))
  assert [int(x) for x in found(X[:1]).rows] == [1, 1, 1]
  first, second, third = found.stages.flops
  for budget, last in ((first, 0), (second - 1, 0), (second, 1), (10 * third, 2)):
    answer = found.within(budget, X[:3])
    assert np.asarray(answer.exit).tolist() == [last] * 3
    assert answer.rows.shape == (last + 1,)
  assert np.asarray(found.within(2.5, X[:3], cost=[1, 2, 3]).exit).tolist() == [1] * 3
  with pytest.raises(ValueError, match=f'below the cheapest exit: a costs {first}'):
    found.within(first - 1, X)
  assert np.asarray(found(X[:2], last='b').exit).tolist() == [1, 1]


def test_one_program_per_batch_size_serves_every_rate_of_exits():
  @chex.assert_max_traces(n=5)
  def run(*arguments):
    return executor.run(CASCADE.stages, 'probability', 8, *arguments)

  program, draw = jax.jit(run, static_argnums=3), np.random.default_rng(3)
  for _ in range(20):
    for batch in (1, 3, 8, 16, 40):
      limits = draw.uniform(0, 1, 2).astype(np.float32)
      found = dataclasses.replace(CASCADE, thresholds=limits, program=program)
      found(X[draw.permutation(40)[:batch]])


@pytest.mark.parametrize('more', [{}, {'norm': True, 'after': 'a'}])
def test_a_network_of_ours_with_convolutions(more):
  heads = {
    'a': Head('stage1/block0', hidden=5, pool='grid4'),
    'b': Head('stage2/block0', **more),
  }
  model = WithHeads(ResNet(depth=8, width=4), heads)
  x = jax.random.normal(jax.random.key(0), (6, 8, 8, 3))
  variables = zoo.randomised(jax.eval_shape(model.init, jax.random.key(1), x))
  out = model.apply(variables, x)
  limits = [float(np.median(jax.nn.softmax(out[name]).max(-1))) for name in 'ab']
  found = cascade(model, variables, x[:1], thresholds=dict(zip('ab', limits)), steps=2)
  answer = found(x)
  stacked = np.stack([np.asarray(out[name]) for name in found.exits])
  left = leave(confidence.scores('probability', stacked), found.thresholds)
  np.testing.assert_array_equal(answer.exit, left)
  assert len({*left.tolist()}) > 1
  expected = stacked[left, np.arange(6)]
  np.testing.assert_allclose(answer.logits, expected, 1e-4, 1e-5)


@pytest.mark.parametrize('batch', [1, 2, 3, 5, 9])
def test_what_is_broadcast_to_the_batch_crosses_at_any_size(batch):
  def prompted(v, x):
    q = jnp.broadcast_to(v['w'][2][:1], x.shape)  # nothing to do for one example
    return network(v, jnp.tanh(x @ v['w'][0]) + q) | {
      'main': (jnp.tanh(x) + q) @ v['head'][2]
    }

  limits = {'a': 0.45, 'b': 0.45}
  found = cascade(prompted, VARIABLES, X[:1], thresholds=limits)
  x = X[:batch]
  out = prompted(VARIABLES, x)
  logits = np.stack([np.asarray(out[name]) for name in EXITS])
  left = leave(confidence.scores('probability', logits), found.thresholds)
  answer = found(x)
  np.testing.assert_array_equal(answer.exit, left)
  np.testing.assert_allclose(answer.logits, logits[left, np.arange(batch)], atol=1e-5)


def test_one_example_that_goes_in_several_times_is_broken_once():
  def prompted(v, x):
    q = jnp.broadcast_to(v['q'], x.shape)  # nothing to do for one example
    x = jnp.tanh(x @ v['w']) + q
    return {'a': x, 'main': (jnp.tanh(x) + q) @ v['w']}

  variables = {'w': jnp.asarray(W[0]), 'q': jnp.asarray(W[1, :1])}
  found = cascade(prompted, variables, X[:1], thresholds={'a': 0.4})
  assert found.stages.least == 2
  assert found(np.full_like(X[:1], np.nan)).broken == 1


def test_temperatures_are_applied_in_single_precision():
  half = lambda v, x: {k: y.astype(jnp.bfloat16) for k, y in network(v, x).items()}
  scale = {'a': 1.7, 'b': 0.6}
  found = cascade(half, VARIABLES, X[:1], thresholds={'a': 0.5}, temperatures=scale)
  said = {k: np.asarray(y, np.float32) for k, y in half(VARIABLES, X).items()}
  logits = np.stack([said[name] for name in EXITS])
  scores = confidence.scores(
    'probability', logits / np.float32([1.7, 0.6, 1])[:, None, None]
  )
  left = leave(scores, found.thresholds)
  answer = found(X)
  np.testing.assert_array_equal(answer.exit, left)
  np.testing.assert_allclose(answer.score[left == 0], scores[0][left == 0], 1e-6)


def test_texts_of_another_length():
  def pooled(v, x):
    return network(v, x.mean(1))

  found = cascade(pooled, VARIABLES, X[:1, None], thresholds={'a': 0.5, 'b': 0.5})
  long = np.stack([X, X, X], 1)
  np.testing.assert_allclose(found(long).logits, found(X[:, None]).logits, atol=1e-5)
  assert found.at(long) is found.at(long[:2])


def test_sizes_are_steps_of_an_eighth():
  assert sizes(256, 8) == (0, 32, 64, 96, 128, 160, 192, 224, 256)
  assert sizes(1, 8) == (0, 1) and sizes(5, 8) == (0, 1, 2, 3, 4, 5)
  assert sizes(0, 8) == (0,)
  assert sizes(10, 8) == (0, 2, 3, 4, 5, 7, 8, 9, 10)  # 10 i / 8, rounded up
  assert sizes(10, 8, least=4) == (0, 4, 5, 7, 8, 9, 10)


# ---- refused -------------------------------------------------------------------------


@pytest.mark.parametrize(
  ('given_', 'message'),
  [
    ({'thresholds': {'c': 0.5}}, "threshold for 'c'.*are: a, b"),
    ({'thresholds': {'main': 0.5}}, "threshold for 'main'"),
    ({'thresholds': {}, 'temperatures': {'a': 0.0}}, 'temperatures are above 0'),
    ({'thresholds': {}, 'temperatures': {'x': 1.0}}, "temperature for 'x'"),
    ({'thresholds': {}, 'confidence': 'luck'}, "'luck'.*probability, entropy"),
    ({'thresholds': {}, 'confidence': 'learned'}, 'needs weights'),
    ({'thresholds': {}, 'steps': 0}, 'steps: expected a whole number'),
  ],
)
def test_settings_nobody_can_use(given_, message):
  with pytest.raises(ValueError, match=message):
    cascade(network, VARIABLES, X[:1], **given_)(X)


def test_inputs_and_exits_that_do_not_fit():
  with pytest.raises(ValueError, match='inputs of one batch'):
    CASCADE(X[None])
  with pytest.raises(ValueError, match="no exit 'c'; there are: a, b, main"):
    CASCADE(X, last='c')
  uneven = lambda v, x: {'a': x @ v['head'][0], 'main': x @ v['w'][0]}
  with pytest.raises(ValueError, match=r'one shape and type at all exits'):
    cascade(uneven, VARIABLES, X[:1], thresholds={})


def test_train_mode_is_refused():
  model = WithHeads(ResNet(depth=8, width=4), {'a': Head('stage1/block0')})
  x = jnp.zeros((2, 8, 8, 3))
  variables = jax.eval_shape(model.init, jax.random.key(0), x)
  train = lambda v, x: {
    k: y
    for k, y in model.apply(v, x, train=True, mutable=['batch_stats'])[0].items()
    if k in model.exits
  }
  with pytest.raises(ValueError, match='train=False'):
    split(train, variables, x)


def shifted(v, x):
  """The network on a dict of its features and of a shift that all examples share."""
  return network(v, x['features'] + x['shift'])


@pytest.mark.parametrize('batch', [0, 1, 6, 40])
def test_inputs_of_which_some_are_shared_answer_at_any_batch(batch):
  shift = np.linspace(0, 1, FEATURES, dtype=np.float32)
  example = {'features': X[:3], 'shift': shift}
  thresholds = {'a': 0.4, 'b': 0.5}
  found = cascade(shifted, VARIABLES, example, thresholds=thresholds)
  known = cascade(network, VARIABLES, X[:1], thresholds=thresholds)
  answer = found({'features': X[:batch], 'shift': shift})
  jax.tree.map(np.testing.assert_array_equal, answer, known(X[:batch] + shift))


def test_inputs_of_another_structure_are_refused_saying_what_is_shared():
  example = {'features': X[:3], 'shift': X[0]}
  found = cascade(shifted, VARIABLES, example)
  with pytest.raises(ValueError, match=r'shared by all examples: \[6\]'):
    found(X)
  with pytest.raises(ValueError, match='expected inputs of one batch'):
    found({'features': X, 'shift': X})


def test_predictions_do_not_depend_on_how_many_are_computed_at_a_time():
  calls = []

  def seen(v, x):
    calls.append(x.shape)
    return network(v, x)

  found = cascade(seen, VARIABLES, X[:1])
  calls.clear()
  labels = np.zeros(40, int)
  parts, at_once = found.predictions(labels, X, batch=7), CASCADE.predictions(labels, X)
  np.testing.assert_allclose(parts.logits, at_once.logits, rtol=1e-5, atol=1e-6)
  np.testing.assert_allclose(parts.scores, at_once.scores, rtol=1e-5, atol=1e-6)
  assert (7, FEATURES) in calls and (40, FEATURES) not in calls
  with pytest.raises(ValueError, match='batch: expected a whole number of 1 or more'):
    found.predictions(labels, X, batch=0)


MERGED = ((), ('a',), ('b',), ('a', 'b'))


@pytest.mark.parametrize('merged', MERGED)
@pytest.mark.parametrize('kind', ['probability', 'patience'])
@pytest.mark.parametrize('batch', [1, 2, 40])
def test_where_nothing_is_skipped_the_answers_are_the_same(batch, kind, merged):
  limits = (0.5, 0.5) if kind == 'probability' else (-0.5, 0.5)
  found = dataclasses.replace(made(limits, confidence=kind), merged={batch: merged})
  for start in range(0, 12 if batch < 40 else 1, batch):
    x = jnp.asarray(X[start : start + batch])
    answer = found(x)
    left, logits, scores = simulated(found, x)
    np.testing.assert_array_equal(answer.exit, left)
    np.testing.assert_allclose(answer.logits, logits, atol=1e-5)
    score = [scores[e, i] if e < 2 else np.nan for i, e in enumerate(left)]
    np.testing.assert_allclose(answer.score, score, atol=1e-5)
    assert answer.broken == 0
    ran = np.asarray(answer.rows)
    for k, name in enumerate(('a', 'b'), 1):
      assert ran[k] == ran[k - 1] if name in merged else ran[k] >= (left >= k).sum()
      assert name in merged or batch > 1 or ran[k] == (left >= k).sum()


def test_other_batches_than_the_measured_one_skip_as_before():
  found = dataclasses.replace(CASCADE, merged={1: ('a', 'b')})
  same = lambda x: chex.assert_trees_all_equal(found(x), CASCADE(x))
  same(jnp.asarray(X))
  always = dataclasses.replace(found, thresholds=np.full(2, -1, np.float32))
  assert always(X[:1]).rows.tolist() == [1, 1, 1]
  assert always(X[:3]).rows.tolist() == [3, 0, 0]
  assert always(X[:1], last='b').rows.tolist() == [1, 1]


@pytest.mark.parametrize('batch', [1, 2])
def test_where_exits_cost_more_than_they_save_the_network_alone_answers(batch):
  found = dataclasses.replace(made((-1, -1)), merged={batch: None})
  x = jnp.asarray(X[:batch])
  answer = found(x)
  assert answer.exit.tolist() == [2] * batch and np.isnan(answer.score).all()
  np.testing.assert_allclose(answer.logits, network(VARIABLES, x)['main'], atol=1e-5)
  assert found.cost(answer) == (found.stages.whole,) * 3
  assert found(x, last='b').exit.tolist() == [0] * batch  # an exit was asked for
  assert found(X[:3]).exit.tolist() == [0] * 3


@pytest.mark.parametrize('merged', MERGED)
def test_a_single_answer_that_is_not_a_number_goes_on_and_is_counted(merged):
  broken = {**VARIABLES, 'head': VARIABLES['head'].at[:2].set(jnp.nan)}
  found = made((-1.0, -1.0), broken)
  answer = dataclasses.replace(found, merged={1: merged})(X[:1])
  assert answer.exit.tolist() == [2] and answer.broken == 2
  np.testing.assert_allclose(answer.logits, network(broken, X[:1])['main'], atol=1e-5)


def test_settings_that_are_changed_in_place_count():
  found = made((2.0, 2.0))
  assert found(X[:3]).exit.tolist() == [2, 2, 2]
  found.thresholds[:] = -1
  assert found(X[:3]).exit.tolist() == [0, 0, 0]
  inside = jax.jit(lambda x: made((-1.0, -1.0))(x).exit)
  assert inside(X[:3]).tolist() == [0, 0, 0]
