"""A cascade on disk: loaded without its config, for our models and for functions."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from depthprune.cascades.cascade import cascade
from depthprune.cascades.confidence import scores
from depthprune.cascades.predictions import leave
from depthprune.cascades.race import exit_milliseconds, race
from depthprune.cascades.thresholds import for_budget
from depthprune.exports.networks import CASCADE_RECORD, load_cascade, save_cascade
from depthprune.models.heads import Head, WithHeads
from depthprune.models.mlp import MLP
from depthprune.program.stages import split
from depthprune.storage.checkpoint import CheckpointError
from depthprune.surgery.prune import prune
from tests import zoo

X = np.random.default_rng(0).normal(size=(12, 6)).astype(np.float32)
HEADS = {'a': Head('layer0', 4, hidden=5), 'b': Head('layer1', 4)}
MODEL = WithHeads(MLP(classes=4, hidden=(7, 7, 7)), HEADS)
VARIABLES = zoo.randomised(jax.eval_shape(MODEL.init, jax.random.key(0), X))
CHAINED = MODEL.clone(
  heads={
    'a': Head('layer0', 4, hidden=5, norm=True),
    'b': Head('layer1', 4, norm=True, after='a'),
  }
)
SETTINGS = {
  'temperatures': {'a': 1.5},
  'confidence': 'learned',
  'weights': np.arange(8, dtype=np.float32).reshape(2, 4) / 8,
  'steps': 3,
}


def saved(path, keep=None, thresholds=None, model=MODEL, **settings):
  variables = zoo.randomised(jax.eval_shape(model.init, jax.random.key(0), X))
  pruned = prune(model, variables, keep or {}, X[:1])
  found = cascade(
    pruned.apply, pruned.variables, X[:1], thresholds=thresholds or {}, **settings
  )
  save_cascade(path, found, pruned)
  return found, pruned


def test_it_comes_back_as_it_was(tmp_path):
  infinite = {'a': float('inf'), 'b': float('-inf')}
  for thresholds in ({'a': 0.7, 'b': 0.9}, infinite):
    found, _ = saved(tmp_path / 'it', thresholds=thresholds, **SETTINGS)
    back = load_cascade(tmp_path / 'it')
    assert (back.exits, back.confidence, back.steps) == (found.exits, 'learned', 3)
    for name in ('thresholds', 'temperatures', 'weights'):
      np.testing.assert_array_equal(getattr(back, name), getattr(found, name))
    one, other = found(X), back(X)
    jax.tree.map(np.testing.assert_array_equal, one, other)


def test_exits_that_were_cut_stay_away(tmp_path):
  found, _ = saved(tmp_path, {'exits': {'b': False}}, {'a': 0.3})
  assert load_cascade(tmp_path).exits == found.exits == ('a', 'main')


@pytest.mark.parametrize('kept', [True, False])
def test_an_answer_that_a_later_exit_reads_is_computed_wherever_it_is_cut(
  kept, tmp_path
):
  limits = {'a': 0.5, 'b': 0.6} if kept else {'b': 0.6}
  found, pruned = saved(
    tmp_path, {'exits': {'a': kept}}, limits, CHAINED, temperatures={'b': 1.5}
  )
  variables = zoo.randomised(jax.eval_shape(CHAINED.init, jax.random.key(0), X))
  outputs = CHAINED.apply(variables, X)
  said = np.stack([outputs[name] for name in found.exits])
  scale = np.append(found.temperatures, np.float32(1))[:, None, None]
  left = leave(scores('probability', said / scale), found.thresholds)
  assert len({*left.tolist()}) > 1
  for cascade_ in (found, load_cascade(tmp_path)):
    answer = cascade_(X)
    np.testing.assert_array_equal(answer.exit, left)
    np.testing.assert_allclose(answer.logits, said[left, np.arange(12)], 1e-4, 1e-5)
  assert found.exits == (('a', 'b', 'main') if kept else ('b', 'main'))
  assert 'head_a' in pruned.variables['params']
  # Both stages together cost the same, wherever the first head is paid for.
  every = split(CHAINED, variables, X[:1])
  assert found.stages.flops[-2:] == every.flops[-2:]


def test_the_tokenizer_comes_along(tmp_path):
  found, pruned = saved(tmp_path / 'it')
  (tmp_path / 'words.json').write_text('{}')
  save_cascade(tmp_path / 'it', found, pruned, tokenizer=tmp_path / 'words.json')
  assert (tmp_path / 'it' / 'tokenizer.json').read_text() == '{}'


def test_a_function_is_given_again(tmp_path):
  def fn(w, x):
    h = jnp.tanh(x @ w)
    return {'early': h, 'main': jnp.tanh(h @ w)}

  w = jnp.asarray(np.random.default_rng(1).normal(size=(6, 6)), jnp.float32)
  pruned = prune(fn, w, {}, X[:1])
  found = cascade(pruned.apply, w, X[:1], thresholds={'early': 0.4})
  save_cascade(tmp_path, found, pruned)
  np.testing.assert_array_equal(load_cascade(tmp_path, fn)(X).logits, found(X).logits)
  with pytest.raises(CheckpointError, match='not a model of depthprune'):
    load_cascade(tmp_path)


def test_arguments_of_the_call_come_back(tmp_path):
  def fn(w, x, scale):
    h = jnp.tanh(x @ w) * scale
    return {'early': h, 'main': jnp.tanh(h @ w)}

  w = jnp.eye(6) / 2
  pruned = prune(fn, w, {}, X[:1], scale=2)
  found = cascade(pruned.apply, w, X[:1], thresholds={'early': 0.4}, scale=2)
  save_cascade(tmp_path, found, pruned)
  np.testing.assert_array_equal(load_cascade(tmp_path, fn)(X).logits, found(X).logits)


def test_saved_over_itself_and_without_what_there_was(tmp_path):
  found, pruned = saved(tmp_path / 'it')
  (tmp_path / 'words.json').write_text('{}')
  save_cascade(tmp_path / 'it', found, pruned, tokenizer=tmp_path / 'words.json')
  mine = tmp_path / 'it' / 'tokenizer.json'
  save_cascade(tmp_path / 'it', found, pruned, tokenizer=mine)
  assert mine.read_text() == '{}'
  save_cascade(tmp_path / 'it', found, pruned)
  assert not mine.exists() and load_cascade(tmp_path / 'it').exits == found.exits


def test_arrays_of_another_network(tmp_path):
  found, pruned = saved(tmp_path / 'it')
  zeros = jax.tree.map(jnp.zeros_like, found.variables)
  other = dataclasses.replace(found, variables=zeros)
  with pytest.raises(ValueError, match='not those of the network'):
    save_cascade(tmp_path / 'it', other, pruned)


def test_what_is_no_cascade(tmp_path):
  with pytest.raises(CheckpointError, match='expected a cascade'):
    load_cascade(tmp_path)
  found, _ = saved(tmp_path / 'it')
  (tmp_path / 'it' / CASCADE_RECORD).write_text('{"exits"')
  with pytest.raises(CheckpointError, match='cascade.json: expected JSON'):
    load_cascade(tmp_path / 'it')
  other = prune(MODEL, VARIABLES, {'exits': {'a': False}}, X[:1])
  with pytest.raises(ValueError, match='the cascade has the exits a, b, main'):
    save_cascade(tmp_path / 'other', found, other)


def test_a_race_says_what_it_cost_and_took(tmp_path):
  found, _ = saved(tmp_path, thresholds={'a': -1.0})
  timed = race(found, X, seconds=0.01)
  assert timed.batch == 12 and timed.compile_s > 0
  assert timed.cost.ideal == timed.cost.padded == found.stages[0].flops
  line = timed.to_json()
  assert json.loads(json.dumps(line)) == line
  assert line['speedup'] == pytest.approx(line['whole_ms'] / line['ms'])


def test_milliseconds_of_exits_are_costs_to_choose_by(tmp_path):
  found, _ = saved(tmp_path)
  ms, whole = exit_milliseconds(found, X, seconds=0.01)
  assert ms.shape == (3,) and (ms > 0).all() and (np.diff(ms) > 0).all()
  assert 0 < whole <= ms[-1]
  seen = found.predictions(np.arange(12) % 4, X)
  rising = np.array([1.0, 2.0, 3.0])
  chosen = for_budget(seen._replace(cost=rising, whole=3.0), 2.5, least=1)
  assert chosen.held_out.cost <= 2.5
  answer = found.choosing(chosen).within(2.5, X, cost=rising)
  assert answer.exit.max() <= 1
