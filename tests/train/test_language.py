"""The task of a language model: values by hand, padding, and a decoder that learns."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import depthprune as dp
from depthprune.data.packed import pack
from depthprune.models.decoder import Decoder
from depthprune.train.evaluate import add_up
from depthprune.train.language import language_model
from depthprune.train.method import plain

TASK = language_model()
RNG = np.random.default_rng(0)
LOGITS = RNG.normal(size=(4, 5, 7)).astype(np.float32)
LABEL = RNG.integers(0, 7, (4, 5)).astype(np.int32)
LABEL[1, 2:], LABEL[3, 0] = -1, -100


def by_hand(rows):
  """Cross-entropy and accuracy of all tokens of some rows that have a label."""
  pairs = [(x, y) for i in rows for x, y in zip(LOGITS[i], LABEL[i]) if y >= 0]
  losses = [np.log(np.exp(x).sum()) - x[y] for x, y in pairs]
  return np.mean(losses), np.mean([x.argmax() == y for x, y in pairs])


def test_means_are_over_tokens_that_have_a_label():
  batch = {'label': jnp.asarray(LABEL)}
  loss, accuracy = by_hand(range(4))
  assert TASK.loss(jnp.asarray(LOGITS), batch) == pytest.approx(loss, rel=1e-5)
  metrics = TASK.metrics(jnp.asarray(LOGITS), batch)
  assert metrics == {'accuracy': pytest.approx(accuracy)}
  batch['weight'] = jnp.asarray([1.0, 1.0, 0.0, 0.0])
  loss, _ = by_hand(range(2))
  assert TASK.loss(jnp.asarray(LOGITS), batch) == pytest.approx(loss, rel=1e-5)


def test_scores_of_a_data_set_do_not_depend_on_its_batches():
  parts = []
  for rows in (slice(0, 3), slice(3, 4)):
    batch = {'label': jnp.asarray(LABEL[rows])}
    parts.append(TASK.sums(jnp.asarray(LOGITS[rows]), batch))
  scores = TASK.scores(add_up(parts))
  loss, accuracy = by_hand(range(4))
  assert scores['perplexity'] == pytest.approx(np.exp(loss), rel=1e-5)
  assert scores['likelihood'] == pytest.approx(-loss, rel=1e-5)
  assert scores['accuracy'] == pytest.approx(accuracy)


def test_a_label_beyond_the_vocabulary_is_no_number():
  batch = {'label': jnp.full((4, 5), 7)}
  assert jnp.isnan(TASK.loss(jnp.asarray(LOGITS), batch))


def test_a_decoder_learns_what_comes_next():
  """A text that counts to five: after some steps it is sure of the next number."""
  data = pack([[1, 2, 3, 4, 5]] * 40, length=12, separator=0)
  data = {name: jnp.asarray(x) for name, x in data.items()}
  model = Decoder(
    vocab=8, positions=12, width=16, depth=1, heads=2, groups=1, size=8, inner=24
  )
  variables = model.init(jax.random.key(0), data['image'])
  tx = optax.adam(1e-2)
  state = dp.init_state(model, plain(), tx, variables)
  step = dp.make_step(model, plain(), TASK, tx)
  before = TASK.loss(model.apply(variables, data['image'])['main'], data)
  with jax.numpy_dtype_promotion('standard'):
    state = dp.fit(
      step, state, jax.random.key(0), lambda d, i: d, data, steps=60, show=False
    )
  after = TASK.loss(model.apply(state.variables, data['image'])['main'], data)
  assert before > 1.5 and after < 0.1
