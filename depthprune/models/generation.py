"""Text from a causal language model, token by token in one compiled loop."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from depthprune.models.decoder import Decoder


def generate(
  model: Decoder | Callable,
  variables: Any,
  tokens: jax.Array,
  steps: int,
  cache: Mapping[str, Any] | None = None,
) -> jax.Array:
  """Continues texts with the most probable token, again and again.

  The first call reads the prompts, and every later one a single token of each::

    text = generate(model, variables, prompts, steps=20)
    text = generate(small.model, small.variables, prompts, steps=20)

  Args:
    model: a Decoder, before or after a cut; or a function of (variables, tokens,
      cache=...) that returns {'main': logits [batch, length, vocab], 'cache': ...},
      such as the `apply` of a Pruned network that was coupled with a cache.
    variables: its arrays.
    tokens: the prompts, int [batch, length], all of one length.
    steps: number of tokens to add, at least 1.
    cache: the empty cache, by default that of the Decoder at the length of the result.

  Returns:
    int [batch, length + steps], the prompts and what follows them.

  Raises:
    ValueError: no step, or the result would be longer than the model's positions.
    TypeError: a function without a cache.
  """
  if steps < 1:
    raise ValueError(f'generate: steps: expected at least 1, got {steps}')
  if cache is None:
    if not isinstance(model, Decoder):
      raise TypeError('generate: cache: expected the empty cache of a function')
    cache = model.empty_cache(tokens.shape[0], tokens.shape[1] + steps)
  return _generated(model, variables, tokens, cache, steps)


@partial(jax.jit, static_argnames=('model', 'steps'))
def _generated(model, variables, tokens, cache, steps: int) -> jax.Array:
  run: Any = model.apply if isinstance(model, Decoder) else model

  def following(tokens, cache):
    outputs = run(variables, tokens, cache=cache)
    best = outputs['main'][:, -1].argmax(-1)
    return best.astype(tokens.dtype), outputs['cache']

  def step(carry, _):
    token, cache = carry
    return following(token[:, None], cache), token

  first = following(tokens, cache)
  (last, _), added = jax.lax.scan(step, first, length=steps - 1)
  return jnp.concatenate([tokens, added.T, last[:, None]], 1)
