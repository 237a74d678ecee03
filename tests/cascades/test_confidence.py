"""Scores of confidence by hand; that cascades see them is in test_cascade."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from depthprune.cascades import confidence

P = np.array([[0.5, 0.25, 0.25], [1 / 3, 1 / 3, 1 / 3], [0.98, 0.01, 0.01]])
NATS = np.array(
  [1.5 * np.log(2), np.log(3), -0.98 * np.log(0.98) - 0.02 * np.log(0.01)]
)


def scored(kind, weights=None):
  logits = jnp.log(jnp.asarray(P, jnp.float32)) + 7
  return confidence.score(kind, logits, confidence.start(len(P)), weights)[0]


def test_the_higher_a_score_the_surer():
  np.testing.assert_allclose(scored('probability'), [0.5, 1 / 3, 0.98], rtol=1e-5)
  np.testing.assert_allclose(scored('margin'), [0.25, 0, 0.97], atol=1e-6)
  np.testing.assert_allclose(scored('entropy'), 1 - NATS / np.log(3), atol=1e-6)


@pytest.mark.parametrize('at', range(4))
def test_learned_weighs_one_and_what_the_others_see(at):
  seen = [1, P[0].max(), 1 - NATS[0] / np.log(3), 0.25]
  found = scored('learned', 2 * jnp.eye(4)[at])[0]
  assert found == pytest.approx(1 / (1 + np.exp(-2 * seen[at])), rel=1e-5)


def test_what_is_learnt_does_not_depend_on_how_often_it_is_told():
  """The ridge grows with the samples."""
  logits = np.asarray(jax.random.normal(jax.random.key(0), (2, 60, 3)))
  labels = np.where(np.arange(60) % 3, logits[0].argmax(-1), 0)
  once = confidence.learn(logits, labels)
  often = confidence.learn(np.tile(logits, (1, 50, 1)), np.tile(labels, 50))
  np.testing.assert_allclose(once, often, rtol=1e-4, atol=1e-5)


def test_where_the_network_is_wrong_too_nothing_is_lost():
  """Unsure answers are wrong: of a network that is right there, or wrong as well."""
  sure, unsure = np.array([4.0, 0, 0]), np.array([1.0, 0, 0])
  early = np.stack([sure, unsure] * 50)
  wrong = np.arange(100) % 2
  own = np.stack([np.roll(sure, 1) if w else sure for w in wrong])  # always right
  missed = confidence.learn(np.stack([early, own]), wrong)
  shared = confidence.learn(np.stack([early, early]), wrong)
  of = lambda weights: confidence.scores('learned', np.stack([early, own]), weights)[0]
  assert of(missed)[0] > 0.9 > 0.1 > of(missed)[1]
  assert (of(shared) > 0.9).all()


@pytest.mark.parametrize('kind', ['probability', 'entropy', 'margin'])
@pytest.mark.parametrize('n', [7, 64, 500, 1000])
def test_an_answer_that_is_no_number_has_no_score_in_a_batch_of_any_size(kind, n):
  """XLA's maximum over NaN is a number in some of the programs it makes for a CPU."""
  logits = np.random.default_rng(0).normal(size=(2, n, 10)).astype(np.float32)
  logits[0, :5] = np.nan
  (found,) = confidence.scores(kind, logits)
  assert np.isnan(found[:5]).all() and np.isfinite(found[5:]).all()
