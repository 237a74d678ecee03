"""Text from a causal language model, token by token in one compiled loop.

Source of `speculate`: Leviathan, Kalman, Matias, arXiv 2211.17192, for greedy decoding;
that the first layers of the network draft is Elhoushi et al., arXiv 2404.16710.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from depthprune.models.decoder import Decoder
from depthprune.program import arguments


def generate(
  model: Decoder | Callable,
  variables: Any,
  tokens: jax.Array,
  steps: int,
  cache: Mapping[str, Any] | None = None,
  key: jax.Array | None = None,
  temperature: float = 1.0,
) -> jax.Array:
  """Continues texts with the most probable token, or one drawn by chance.

  The first call reads the prompts, and every later one a single token of each::

    text = dp.generate(model, variables, prompts, steps=20)
    text = dp.generate(small.model, small.variables, prompts, steps=20)

  Args:
    model: a Decoder, before or after a cut; or a function of (variables, tokens,
      cache=...) that returns {'main': logits [batch, length, vocab], 'cache': ...},
      such as the `apply` of a Pruned network that was coupled with a cache.
    variables: its arrays.
    tokens: the prompts, int [batch, length], all of one length.
    steps: number of tokens to add, at least 1.
    cache: the empty cache, by default that of the Decoder at the length of the result.
    key: jax random key. With one, tokens are drawn by their probabilities; without, the
      most probable one is taken.
    temperature: logits are divided by it before tokens are drawn; above 0.

  Returns:
    int [batch, length + steps], the prompts and what follows them.

  Raises:
    ValueError: no step, a temperature that is not above 0, or the result would be
      longer than the model's positions.
    TypeError: a function without a cache.
  """
  arguments.number('temperature', temperature, above=0)
  if steps < 1:
    raise ValueError(f'generate: steps: expected at least 1, got {steps}')
  if cache is None:
    if not isinstance(model, Decoder):
      raise TypeError('generate: cache: expected the empty cache of a function')
    cache = model.empty_cache(tokens.shape[0], tokens.shape[1] + steps)
  keys = None if key is None else jax.random.split(key, steps)
  return _generated(model, variables, tokens, cache, steps, keys, temperature)


@partial(jax.jit, static_argnames=('model', 'steps'))
def _generated(
  model, variables, tokens, cache, steps: int, keys, temperature
) -> jax.Array:
  first, rest = (None, None) if keys is None else (keys[0], keys[1:])
  choose = partial(_following, model, variables, temperature=temperature)
  token, cache = choose(tokens, cache, first)
  added, _ = _continued(choose, token[:, -1], cache, steps - 1, rest)
  return jnp.concatenate([tokens, token[:, -1:], added], 1)


def _following(
  model, variables, tokens, cache, key=None, temperature=1.0
) -> tuple[jax.Array, Any]:
  """The token after each of `tokens`, drawn by a key if any; the cache with these."""
  run: Any = model.apply if isinstance(model, Decoder) else model
  outputs = run(variables, tokens, cache=cache)
  chosen = chosen_tokens(outputs['main'], key, temperature)
  return chosen.astype(tokens.dtype), outputs['cache']


def chosen_tokens(
  logits: jax.Array,
  key: jax.Array | None = None,
  temperature: jax.typing.ArrayLike = 1.0,
) -> jax.Array:
  """Returns the most probable tokens, or with a key some drawn by their probabilities.

  Args:
    logits: [..., vocab].
    key: jax random key, or None.
    temperature: logits are divided by it before tokens are drawn.

  Returns:
    int [...].
  """
  if key is None:
    return logits.argmax(-1)
  return jax.random.categorical(key, logits / temperature)


def _continued(
  choose: Callable, token, cache, steps: int, keys=None
) -> tuple[jax.Array, Any]:
  """The tokens [batch, steps] after one [batch], and the cache without the last."""

  def step(carry, key):
    token, cache = carry
    chosen, cache = choose(token[:, None], cache, key)
    return (chosen[:, 0], cache), chosen[:, 0]

  (_, cache), added = jax.lax.scan(step, (token, cache), keys, length=steps)
  return added.T, cache


class Speculated(NamedTuple):
  """Texts that a small network has drafted and a large one has checked.

  Attributes:
    tokens: int [batch, length + steps], the prompts and what follows them.
    checks: how often the large network was called after the prompt.
    accepted: share of the drafted tokens that stayed. With several texts those stay
      that all of them agree on.
  """

  tokens: jax.Array
  checks: int
  accepted: float


def speculate(
  model: Decoder,
  variables: Any,
  draft: Decoder,
  draft_variables: Any,
  tokens: jax.Array,
  steps: int,
  ahead: int = 4,
) -> Speculated:
  """Continues texts as `generate` does, with fewer calls of the large network.

  A small network writes a few tokens ahead, and one call of the large one checks them
  all. What stays is exactly what the large network would have written, up to rounding
  where two tokens are equally probable. The small one is what pruning has left, or the
  first layers of the large one::

    text = dp.speculate(model, variables, cut.model, cut.variables, prompts, steps=50)
    draft = model.first(8)  # the first 8 layers read the variables of `model`
    text = dp.speculate(model, variables, draft, variables, prompts, steps=50)

  Args:
    model: the network that decides.
    variables: its arrays.
    draft: the network that writes ahead, of the same tokens.
    draft_variables: its arrays.
    tokens: the prompts, int [batch, length], all of one length.
    steps: number of tokens to add, at least 1.
    ahead: number of tokens between two checks, at least 1.

  Returns:
    The Speculated texts.

  Raises:
    TypeError: a network is no Decoder.
    ValueError: no step, nothing ahead, networks of different tokens, or a network whose
      positions end before the prompts and `steps + ahead` more tokens do.
  """
  for name, network in (('model', model), ('draft', draft)):
    if not isinstance(network, Decoder):
      kind = type(network).__name__
      raise TypeError(f'speculate: {name}: expected a Decoder, got a {kind}')
  for name, count in (('steps', steps), ('ahead', ahead)):
    if count < 1:
      raise ValueError(f'speculate: {name}: expected at least 1, got {count}')
  if model.vocab != draft.vocab:
    raise ValueError(
      f'speculate: draft: expected {model.vocab} different tokens as the network has '
      f'them, got {draft.vocab}'
    )
  batch, length = tokens.shape
  space = length + steps + ahead
  caches = [network.empty_cache(batch, space) for network in (model, draft)]
  both = (variables, draft_variables)
  text, checks, kept = _speculated((model, draft), both, tokens, caches, steps, ahead)
  checks = int(checks)
  return Speculated(text, checks, int(kept) / max(1, checks * ahead))


@partial(jax.jit, static_argnames=('models', 'steps', 'ahead'))
def _speculated(models, variables, tokens, caches, steps: int, ahead: int):
  """The text, the number of checks, and how many drafted tokens stayed in all."""
  by_large = partial(_following, models[0], variables[0])
  by_draft = partial(_following, models[1], variables[1])
  batch, length = tokens.shape
  first, cache = by_large(tokens, caches[0])
  _, drafted = by_draft(tokens, caches[1])
  text = jnp.zeros((batch, length + steps + ahead), tokens.dtype)
  text = jax.lax.dynamic_update_slice(text, tokens, (0, 0))
  text = jax.lax.dynamic_update_slice(text, first[:, -1:], (0, length))

  def step(carry):
    text, known, cache, drafted, checks, kept = carry
    last = jax.lax.dynamic_slice(text, (0, known - 1), (batch, 1))
    # One token more than is checked, so that the cache has seen all that may stay.
    guess, drafted = _continued(by_draft, last[:, 0], drafted, ahead + 1)
    guess = guess[:, :ahead]
    best, cache = by_large(jnp.concatenate([last, guess], 1), cache)
    agreed = jnp.cumprod(guess == best[:, :ahead], axis=1).sum(1).min()
    text = jax.lax.dynamic_update_slice(text, best, (0, known))
    seen = {'length': known + agreed}  # the rest is written over
    known += agreed + 1
    return (
      text,
      known,
      {**cache, **seen},
      {**drafted, **seen},
      checks + 1,
      kept + agreed,
    )

  zero = jnp.zeros((), jnp.int32)
  start = (text, zero + length + 1, cache, drafted, zero, zero)
  end = length + steps
  text, _, _, _, checks, kept = jax.lax.while_loop(lambda c: c[1] < end, step, start)
  return text[:, :end], checks, kept
