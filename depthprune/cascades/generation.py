"""Early exits of a causal language model: easy tokens skip the last layers.

Sources: Schuster et al., arXiv 2207.07061 (CALM), for exits by confidence and for
"state copying": skipped layers compute the keys and values that later tokens attend to
from the features at the exit. Elhoushi et al., arXiv 2404.16710 (LayerSkip), for exits
that share the last normalisation and the logits of the network.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from depthprune.cascades import confidence as confidences
from depthprune.cascades.confidence import Kind
from depthprune.cascades.predictions import Predictions
from depthprune.cascades.thresholds import Choice
from depthprune.models.arch import complete
from depthprune.models.decoder import Decoder
from depthprune.models.generation import chosen_tokens
from depthprune.program import arguments, cost
from depthprune.program.coupling import couple

KINDS = tuple(kind for kind in get_args(Kind) if kind != 'learned')


class EarlyText(NamedTuple):
  """Texts, and after how many layers each new token left the network.

  Attributes:
    tokens: int [batch, length + steps], the prompts and what follows them.
    layers: int [batch, steps], how many layers each new token went through.
    executed: share of the layers that were executed, the mean over the new tokens. With
      several texts a layer is executed for all of them until the last one has left.
  """

  tokens: jax.Array
  layers: jax.Array
  executed: float


class Exits(NamedTuple):
  """How tokens leave a network; the same for all of them, so that it compiles once.

  Attributes:
    taps: where tokens may leave, in order.
    layers: [taps + 1], how many layers end at each of them, and how many there are.
    confidence: the kind of score.
  """

  taps: tuple[str, ...]
  layers: tuple[int, ...]
  confidence: Kind


def generate_early(
  model: Decoder,
  variables: Any,
  tokens: jax.Array,
  steps: int,
  exits: Mapping[str, float] | Choice,
  confidence: Kind = 'probability',
  key: jax.Array | None = None,
  temperature: float = 1.0,
) -> EarlyText:
  """Continues texts as `generate` does; a token that is easy to predict skips layers.

  After a layer with an exit, the last normalisation and the logits of the network are
  applied to its features. Where the confidence in the answer is above the threshold of
  the exit, it is the next token, and the layers that follow are not executed: they only
  compute keys and values of these features, which later tokens attend to::

    text = dp.generate_early(model, variables, prompts, 20, {'layer9': 0.9})

    seen = dp.exit_predictions(model, variables, held_out_tokens, ['layer9', 'layer19'])
    chosen = thresholds.for_drop(seen, 2.0)  # at most 2 % of the tokens change
    text = dp.generate_early(model, variables, prompts, 20, chosen)

  `thresholds` is the module `depthprune.cascades.thresholds`.

  The prompts go through all layers, which give the first new token, too. Every text of
  a batch gets the tokens that it would get alone: one that has left keeps its features
  while the layers run for the others. So layers are saved where all have left; texts
  that are written one by one save most.

  Every exit computes the logits of the whole vocabulary, which cost as much as several
  layers of a small network: a few exits save more than one after every layer.

  Args:
    model: the network, before or after a cut.
    variables: its arrays.
    tokens: the prompts, int [batch, length], all of one length.
    steps: number of tokens to add, at least 1.
    exits: {tap: threshold}, such as {'layer9': 0.9}, or what the functions of
      `cascades.thresholds` choose on held-out texts.
    confidence: the kind of score, as `exit_predictions` was given it: 'probability',
      'entropy', 'margin' or 'patience', see `depthprune.cascades.confidence`.
    key: jax random key. With one, tokens are drawn by their probabilities; without, the
      most probable one is taken.
    temperature: logits are divided by it before tokens are drawn; above 0. Scores are
      those of the logits as they are.

  Returns:
    The EarlyText.

  Raises:
    TypeError: the network is no Decoder.
    ValueError: `steps` is below 1, an exit is no layer of the network or its last one,
      a threshold is no number, the confidence is unknown, or the result would be longer
      than the model's positions.
  """
  if isinstance(exits, Choice):
    exits = dict(zip(exits.exits[:-1], exits.thresholds.tolist(), strict=True))
  arguments.kind_of('exits', exits, Mapping, '{tap: threshold}')
  arguments.whole('steps', steps)
  arguments.number('temperature', temperature, above=0)
  for tap, threshold in exits.items():
    if np.ndim(threshold) or np.isnan(threshold):
      raise arguments.refused(f'exits[{tap!r}]', 'a number', threshold, kind=ValueError)
  _checked(model, [*exits], confidence)
  used = [tap for tap in model.taps if exits.get(tap, np.inf) < np.inf]
  limits = jnp.asarray([exits[tap] for tap in used], jnp.float32)
  cache = model.empty_cache(tokens.shape[0], tokens.shape[1] + steps)
  keys = None if key is None else jax.random.split(key, steps)
  setup = _exits(model, used, confidence)
  text, layers = _generated(
    model, variables, tokens, cache, limits, keys, temperature, steps, setup
  )
  executed = np.asarray(layers).max(0).mean() / max(setup.layers[-1], 1)
  return EarlyText(text, layers, float(executed))


def exit_predictions(
  model: Decoder,
  variables: Any,
  tokens: Any,
  exits: Sequence[str],
  labels: Any = None,
  confidence: Kind = 'probability',
  batch: int = 4,
) -> Predictions:
  """Computes what exits predict on held-out texts, so that thresholds can be chosen.

  Here all layers are executed for all tokens. When text is generated, tokens that left
  early have copied keys and values, so it may differ from what thresholds promise here.

  Args:
    model: the network, before or after a cut.
    variables: its arrays.
    tokens: int [texts, length].
    exits: the layers after which tokens may leave, such as ['layer9', 'layer19'].
    labels: int [texts, length], the token that follows each; negative ones are left
      out. None for the answers of the network itself, so that the accuracy is the share
      of the tokens that stay the same.
    confidence: the kind of score, see `generate_early`.
    batch: how many texts are computed at a time.

  Returns:
    The `Predictions` that the functions of `cascades.thresholds` take. Samples are
    tokens. Classes are the answers of the exits and the label, in the order of their
    numbers, since all other logits change nothing. Costs are the FLOPs of one token
    after `length` others, with the logits of every exit that it reaches.

  Raises:
    TypeError: the network is no Decoder.
    ValueError: no exit or text, a layer that the network does not have or that is its
      last, an unknown confidence, or labels of another shape.
  """
  arguments.whole('batch', batch)
  _checked(model, exits, confidence)
  tokens = np.asarray(tokens)
  if tokens.ndim != 2 or not tokens.size:
    raise arguments.refused('tokens', 'int [texts, length]', tokens, kind=ValueError)
  if not exits:
    raise arguments.wrong('exits', f'expected some of {", ".join(model.taps[:-1])}')
  labels = None if labels is None else np.asarray(labels)
  if labels is not None and labels.shape != tokens.shape:
    expected = f'int {list(tokens.shape)}'
    raise arguments.refused('labels', expected, labels, kind=ValueError)
  setup = _exits(model, [tap for tap in model.taps if tap in exits], confidence)
  answers = jax.jit(partial(_answers, model, setup))
  parts = []
  for start in range(0, len(tokens), batch):
    texts, told = (
      None if x is None else jnp.asarray(x[start : start + batch])
      for x in (tokens, labels)
    )
    logits, scores, classes = map(np.asarray, answers(variables, texts, told))
    rows = classes >= 0
    parts.append((logits[:, rows], scores[:, rows], classes[rows]))
  logits, scores, classes = (
    np.concatenate(x, axis) for x, axis in zip(zip(*parts), (1, 1, 0))
  )
  costs = _costs(model, variables, tokens.shape[1], setup)
  return Predictions(
    exits=(*setup.taps, 'main'),
    logits=logits,
    labels=classes,
    scores=scores,
    cost=costs[:-1],
    whole=float(costs[-1]),
  )


def _checked(model: Any, exits: Sequence[str], confidence: str) -> None:
  """Raises an error unless tokens can leave a network after these layers."""
  expected = 'a Decoder, which runs layer by layer'
  arguments.kind_of('model', model, Decoder, expected)
  for tap in exits:
    if tap not in model.taps[:-1]:
      has = f'expected some of {arguments.listed(model.taps[:-1])}, got {tap!r}'
      raise arguments.wrong('exits', has)
  if confidence not in KINDS:
    has = f'expected one of {", ".join(KINDS)}, got {confidence!r}'
    raise arguments.wrong('confidence', has)


def _exits(model: Decoder, taps: Sequence[str], confidence: Kind) -> Exits:
  """The exits at these taps, with the numbers of layers that a cut has left."""
  arch = complete(model.arch, model.widths, 'Decoder')
  count, reached = 0, {}
  for name, tap, _ in model.parts:  # a layer without branches is not counted
    count += bool(arch[f'{name}/attention/branch'] or arch[f'{name}/mlp/branch'])
    reached[tap] = count
  return Exits(tuple(taps), (*(reached[tap] for tap in taps), count), confidence)


def _logits(model: Decoder, variables: Any, x: jax.Array) -> jax.Array:
  """What an exit answers to features [batch, length, width]: [batch, length, vocab]."""
  run: Any = model.apply
  return run(variables, x, since=model.taps[-1])['main']


# ---- generation ----------------------------------------------------------------------


@partial(jax.jit, static_argnames=('model', 'steps', 'setup'))
def _generated(
  model: Decoder,
  variables: Any,
  tokens: jax.Array,
  cache: Any,
  limits: jax.Array,
  keys: jax.Array | None,
  temperature: jax.Array,
  steps: int,
  setup: Exits,
) -> tuple[jax.Array, jax.Array]:
  """The text, and how many layers each new token has gone through."""
  chosen = lambda logits, key: chosen_tokens(logits, key, temperature).astype(
    tokens.dtype
  )

  def step(carry, key):
    token, cache = carry
    choose = lambda logits: chosen(logits, key)
    token, layers, cache = _written(
      model, variables, setup, limits, choose, token, cache
    )
    return (token, cache), (token, layers)

  first, rest = (None, None) if keys is None else (keys[0], keys[1:])
  run: Any = model.apply
  outputs = run(variables, tokens, cache=cache)
  token = chosen(outputs['main'], first)[:, -1]
  _, (added, layers) = lax.scan(step, (token, outputs['cache']), rest, steps - 1)
  whole = jnp.full((1, len(token)), setup.layers[-1], jnp.int32)
  text = jnp.concatenate([tokens, token[:, None], added.T], 1)
  return text, jnp.concatenate([whole, layers]).T


def _written(
  model: Decoder,
  variables: Any,
  setup: Exits,
  limits: jax.Array,
  choose: Callable,
  token: jax.Array,
  cache: Any,
) -> tuple[jax.Array, jax.Array, Any]:
  """The token after each of `token` [batch], its number of layers, and the cache."""
  run: Any = partial(model.apply, variables)
  logits = lambda x: _logits(model, variables, x)[:, 0]
  start, taps = cache['length'], (*setup.taps, model.taps[-1])

  def through(x, cache, left, since, until):
    """The layers between two taps; what has left keeps its features."""
    first, last = model.taps.index(since), model.taps.index(until)
    for before, tap in zip(model.taps[first:last], model.taps[first + 1 : last + 1]):
      outputs = run(x, cache=cache, since=before, until=tap)
      x = jnp.where(left[:, None, None], x, outputs[tap])
      cache = {**cache, **outputs['cache'], 'length': start}
    return x, cache

  def after(index, x, cache, token, layers, memory):
    """The result from an exit or the end on; `layers` is -1 until a text has left."""
    left = layers >= 0
    if index == len(setup.taps):
      token = jnp.where(left, token, choose(logits(x)))
      layers = jnp.where(left, layers, setup.layers[-1])
      return token, layers, {**cache, 'length': start + 1}
    answer = logits(x)
    score, memory = confidences.score(setup.confidence, answer, memory)
    goes = ~left & (score > limits[index])
    token = jnp.where(goes, choose(answer), token)
    layers = jnp.where(goes, setup.layers[index], layers)

    def leave(x, cache, memory):
      skipped = run(x, cache=cache, since=taps[index], skip=True)
      return token, layers, {**cache, **skipped['cache']}

    def stay(x, cache, memory):
      x, cache = through(x, cache, layers >= 0, taps[index], taps[index + 1])
      return after(index + 1, x, cache, token, layers, memory)

    return lax.cond((layers >= 0).all(), leave, stay, x, cache, memory)

  outputs = run(token[:, None], cache=cache, until=taps[0])
  cache = {**cache, **outputs['cache'], 'length': start}
  stays = jnp.full_like(token, -1, jnp.int32)
  memory = confidences.start(len(token))
  return after(0, outputs[taps[0]], cache, token, stays, memory)


# ---- predictions ---------------------------------------------------------------------


def _answers(
  model: Decoder, setup: Exits, variables: Any, tokens: jax.Array, labels: Any
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Logits [exits, n, classes] of n tokens, scores [exits - 1, n] and labels [n]."""
  run: Any = model.apply
  outputs = run(variables, tokens)
  at = lambda tap: _logits(model, variables, outputs[tap])
  flat = lambda x: x.reshape(-1, x.shape[-1])
  every = [*(flat(at(tap)) for tap in setup.taps), flat(outputs['main'])]
  memory, scores = confidences.start(tokens.size), []
  for logits in every[:-1]:
    score, memory = confidences.score(setup.confidence, logits, memory)
    scores.append(score)
  best = [logits.argmax(-1) for logits in every]
  label = best[-1] if labels is None else labels.ravel()
  # In the order of their numbers, so that of equal logits the same one is the first.
  classes = jnp.sort(jnp.stack([*best, label.clip(0)], -1), -1)
  logits = jnp.stack([jnp.take_along_axis(x, classes, -1) for x in every])
  place = (classes == label[:, None]).argmax(-1)
  return logits, jnp.stack(scores), jnp.where(label < 0, -1, place)


def _costs(model: Decoder, variables: Any, length: int, setup: Exits) -> np.ndarray:
  """FLOPs of a token that leaves at each exit, at the end, and of one without exits."""
  token = jax.ShapeDtypeStruct((1, 1), jnp.int32)
  cache = jax.eval_shape(lambda: model.empty_cache(1, length))

  def run(variables, token, cache, taps, end):
    step: Any = partial(model.apply, variables, cache=cache)
    outputs = step(token)
    found = [_logits(model, variables, outputs[tap]) for tap in taps]
    if end:
      return found, outputs['main'], outputs['cache']
    skipped = step(outputs[taps[-1]], since=taps[-1], skip=True)
    return found, {**outputs['cache'], **skipped['cache']}

  ways = [(setup.taps[: i + 1], False) for i in range(len(setup.taps))]
  ways += [(setup.taps, True), ((), True)]
  flops = []
  for taps, end in ways:
    coupling = couple(partial(run, taps=taps, end=end), variables, token, cache)
    flops.append(cost.flops(coupling))
  return np.asarray(flops, np.float64)
