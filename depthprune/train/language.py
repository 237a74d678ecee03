"""The task of a language model: the token that comes next."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

from depthprune.train.task import Task


def language_model() -> Task:
  """Returns the task of telling the token that follows each token of a text.

  Logits are [batch, length, vocab], and a batch has 'label', int [batch, length], the
  tokens that follow, as `data.packed.pack` gives them; negative ones are left out. The
  loss is cross-entropy in nats, the mean over tokens, and 'accuracy' the share of them
  to which the network gives the highest probability. A label beyond the vocabulary
  makes the loss NaN.

  The scores of a data set also have 'perplexity', e to the loss, and 'likelihood', the
  mean log-probability, by which cuts are decided.
  """

  def weights(batch):  # float32 [batch, length]
    weight = (batch['label'] >= 0).astype(jnp.float32)
    if 'weight' in batch:
      weight *= batch['weight'].astype(jnp.float32)[:, None]
    return weight

  def totals(logits, batch):
    label, weight = batch['label'], weights(batch)
    logits = logits.astype(jnp.float32)
    each = optax.softmax_cross_entropy_with_integer_labels(logits, label.clip(0))
    each = jnp.where(label >= logits.shape[-1], jnp.nan, each)
    right = logits.argmax(-1) == label
    return {
      'tokens': weight.sum(),
      'loss': jnp.where(weight > 0, each * weight, 0).sum(),
      'accuracy': jnp.where(right, weight, 0).sum(),
    }

  def means(logits, batch):
    sums = totals(logits, batch)
    tokens = jnp.maximum(sums.pop('tokens'), 1e-9)
    return {name: total / tokens for name, total in sums.items()}

  def scores(sums):
    tokens = np.maximum(sums['tokens'], 1e-9)
    loss, accuracy = (np.asarray(sums[k] / tokens) for k in ('loss', 'accuracy'))
    return {
      'loss': loss,
      'accuracy': accuracy,
      'perplexity': np.exp(loss),
      'likelihood': -loss,
    }

  return Task(
    loss=lambda logits, batch: means(logits, batch)['loss'],
    metrics=lambda logits, batch: {'accuracy': means(logits, batch)['accuracy']},
    log_probs=jax.nn.log_softmax,
    sums=totals,
    scores=scores,
    decides_by='likelihood',
  )
