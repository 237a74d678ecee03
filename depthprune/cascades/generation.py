"""Early exits of a causal language model: easy tokens skip the last layers.

Sources: Schuster et al., arXiv 2207.07061 (CALM), for exits by confidence and for
"state copying": skipped layers compute the keys and values that later tokens attend to
from the features at the exit. Elhoushi et al., arXiv 2404.16710 (LayerSkip), for exits
that share the last normalisation and the logits of the network. Morisot, arXiv
2007.13512 (SideNet), for exits that are trained while the network stays as it is.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import pairwise
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
from depthprune.models.heads import Unembedding, WithHeads, variables_of_trunk
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
  """Where tokens may leave a network: the static part, for which `jit` compiles.

  Attributes:
    names: the exits, in order of depth.
    taps: the tap of each.
    layers: [exits + 1], how many layers each exit has gone through, and how many there
      are.
    confidence: the kind of score.
  """

  names: tuple[str, ...]
  taps: tuple[str, ...]
  layers: tuple[int, ...]
  confidence: Kind


def generate_early(
  model: Decoder | WithHeads,
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

  Exits on layers need no training. The exits of a network with heads are named after
  their heads. Each head may have a perceptron, which `sidenet` trains while the network
  stays frozen, so that more of its answers are right::

    model = WithHeads(decoder, {'early': Unembedding('layer9', hidden=256)})
    text = dp.generate_early(model, variables, prompts, 20, {'early': 0.9})

  The prompts go through all layers, which give the first new token, too. Every text of
  a batch gets the tokens that it would get alone: one that has left keeps its features
  while the layers run for the others. So layers are saved where all have left; texts
  that are written one by one save most.

  Every exit computes the logits of the whole vocabulary, which cost as much as several
  layers of a small network: a few exits save more than one after every layer.

  Args:
    model: the network, before or after a cut: a Decoder, or a `WithHeads` on one, whose
      heads are of the kind `models.heads.Unembedding`.
    variables: its arrays.
    tokens: the prompts, int [batch, length], all of one length.
    steps: number of tokens to add, at least 1.
    exits: {exit: threshold}, such as {'layer9': 0.9}, or what the functions of
      `cascades.thresholds` choose on held-out texts. The exits of a Decoder are its
      layers, those of a `WithHeads` its heads.
    confidence: the kind of score, the same as for `exit_predictions`: 'probability',
      'entropy', 'margin' or 'patience', see `depthprune.cascades.confidence`.
    key: jax random key. With one, tokens are drawn by their probabilities; without, the
      most probable one is taken.
    temperature: logits are divided by it before tokens are drawn; above 0. Scores are
      those of the logits as they are.

  Returns:
    The EarlyText.

  Raises:
    TypeError: the network is no Decoder, nor a `WithHeads` on one.
    ValueError: `steps` is below 1, an exit is not one of the network or reads its last
      layer, a threshold is no number, the confidence is unknown, or the result would be
      longer than the model's positions.
  """
  arguments.whole('steps', steps)
  arguments.number('temperature', temperature, above=0)
  setup, limits = _used(model, exits, confidence)
  decoder, _ = _bare(model, variables)
  cache = decoder.empty_cache(tokens.shape[0], tokens.shape[1] + steps)
  keys = None if key is None else jax.random.split(key, steps)
  text, layers = _generated(
    model, variables, tokens, cache, limits, keys, temperature, steps, setup
  )
  executed = np.asarray(layers).max(0).mean() / max(setup.layers[-1], 1)
  return EarlyText(text, layers, float(executed))


def early_answers(
  model: Decoder | WithHeads,
  variables: Any,
  tokens: jax.Array,
  exits: Mapping[str, float] | Choice,
  confidence: Kind = 'probability',
) -> tuple[jax.Array, jax.Array]:
  """Predicts the token after each one of given texts, with early exits executed.

  Texts are read token by token, as `generate_early` writes them: tokens after one that
  left early attend to keys and values of its features at that exit. This shows what
  such copies change, which `exit_predictions`, where all layers run, cannot.

  Args:
    model: the network, as for `generate_early`.
    variables: its arrays.
    tokens: the texts, int [texts, length].
    exits: {exit: threshold}, or a Choice, as for `generate_early`.
    confidence: the kind of score, as for `generate_early`.

  Returns:
    (the most probable token after each, how many layers each went through), both int
    [texts, length].

  Raises:
    TypeError, ValueError: as for `generate_early`.
  """
  setup, limits = _used(model, exits, confidence)
  cache = _bare(model, variables)[0].empty_cache(*tokens.shape)
  return _answered(model, variables, tokens, cache, limits, setup)


def exit_predictions(
  model: Decoder | WithHeads,
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
    model: the network, before or after a cut, as for `generate_early`.
    variables: its arrays.
    tokens: int [texts, length].
    exits: where tokens may leave: layers such as ['layer9', 'layer19'], or the names of
      heads.
    labels: int [texts, length], the token that follows each; negative ones are left
      out. None for the answers of the network itself, so that the accuracy is the share
      of the tokens that stay the same.
    confidence: the kind of score, see `generate_early`.
    batch: how many texts are computed at a time.

  Returns:
    The `Predictions` that the functions of `cascades.thresholds` take. Samples are
    tokens. Classes are the answers of the exits and the label, in the order of their
    numbers, since all other logits change nothing. Costs are the FLOPs of one token
    after `length` others, with the head and the logits of every exit that it reaches.

  Raises:
    TypeError: the network is no Decoder, nor a `WithHeads` on one.
    ValueError: no exit or text, an exit that the network does not have or that reads
      its last layer, an unknown confidence, or labels of another shape.
  """
  arguments.whole('batch', batch)
  there = check(model, exits, confidence)
  tokens = np.asarray(tokens)
  if tokens.ndim != 2 or not tokens.size:
    raise arguments.refused('tokens', 'int [texts, length]', tokens, kind=ValueError)
  if not exits:
    raise arguments.wrong('exits', f'expected some of {", ".join(there)}')
  labels = None if labels is None else np.asarray(labels)
  if labels is not None and labels.shape != tokens.shape:
    expected = f'int {list(tokens.shape)}'
    raise arguments.refused('labels', expected, labels, kind=ValueError)
  at = {name: tap for name, tap in there.items() if name in exits}
  setup = _exits(_bare(model, variables)[0], at, confidence)
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
    exits=(*setup.names, 'main'),
    logits=logits,
    labels=classes,
    scores=scores,
    cost=costs[:-1],
    whole=float(costs[-1]),
  )


def exits_of(model: Any) -> dict[str, str]:
  """Returns {exit: its tap} of a language model, in order of depth.

  The exits of a Decoder are its layers before the last, named after their taps; those
  of a `WithHeads` are its heads of the kind `Unembedding` on such layers.

  Raises:
    TypeError: the network is no Decoder, nor a `WithHeads` on one.
  """
  if isinstance(model, WithHeads) and isinstance(model.trunk, Decoder):
    early = model.taps[:-1] if 'main' in model.exits else ()
    at = {
      name: head.tap
      for name, head in model.heads.items()
      if name in model.exits and isinstance(head, Unembedding) and head.tap in early
    }
    return dict(sorted(at.items(), key=lambda pair: early.index(pair[1])))
  expected = 'a Decoder, which runs layer by layer, or heads on one'
  arguments.kind_of('model', model, Decoder, expected)
  return {tap: tap for tap in model.taps[:-1]}


def thresholds_of(exits: Mapping[str, float] | Choice) -> Mapping[str, float]:
  """Returns {exit: threshold} of a mapping or a Choice.

  Raises:
    TypeError: it is neither.
    ValueError: a threshold is no number.
  """
  if isinstance(exits, Choice):
    exits = dict(zip(exits.exits[:-1], exits.thresholds.tolist(), strict=True))
  arguments.kind_of('exits', exits, Mapping, '{exit: threshold}')
  for name, threshold in exits.items():
    if isinstance(threshold, str) or np.ndim(threshold) or np.isnan(threshold):
      place = f'exits[{name!r}]'
      raise arguments.refused(place, 'a number', threshold, kind=ValueError)
  return exits


def check(model: Any, exits: Sequence[str], confidence: str) -> dict[str, str]:
  """Returns `exits_of` a network.

  Raises:
    TypeError: as for `exits_of`.
    ValueError: one of `exits` is not among them, or the confidence is unknown.
  """
  there = exits_of(model)
  for name in exits:
    if name not in there:
      has = f'expected some of {arguments.listed(there)}, got {name!r}'
      if not there:
        has = f'{name!r}: this network has no exit before its last layer'
      raise arguments.wrong('exits', has)
  if confidence not in KINDS:
    has = f'expected one of {", ".join(KINDS)}, got {confidence!r}'
    raise arguments.wrong('confidence', has)
  return there


def _used(
  model: Any, exits: Mapping[str, float] | Choice, confidence: Kind
) -> tuple[Exits, jax.Array]:
  """The exits whose threshold is not infinite, and these thresholds."""
  exits = thresholds_of(exits)
  there = check(model, [*exits], confidence)
  at = {name: tap for name, tap in there.items() if exits.get(name, np.inf) < np.inf}
  limits = jnp.asarray([exits[name] for name in at], jnp.float32)
  return _exits(_bare(model, {})[0], at, confidence), limits


def _exits(model: Decoder, at: Mapping[str, str], confidence: Kind) -> Exits:
  """The exits {name: tap}, with the layers before them that a cut has left."""
  arch = complete(model.arch, model.widths, 'Decoder')
  count, reached = 0, {}
  for name, tap, _ in model.parts:  # a layer without branches is not counted
    count += bool(arch[f'{name}/attention/branch'] or arch[f'{name}/mlp/branch'])
    reached[tap] = count
  layers = (*(reached[tap] for tap in at.values()), count)
  return Exits(tuple(at), tuple(at.values()), layers, confidence)


def _bare(model: Decoder | WithHeads, variables: Any) -> tuple[Decoder, Any]:
  """The network without its heads, and its arrays."""
  if isinstance(model, Decoder):
    return model, variables
  return model.trunk, variables_of_trunk(variables)


def _logits(
  model: Decoder | WithHeads, variables: Any, x: jax.Array, name: str = 'main'
) -> jax.Array:
  """What an exit answers to features [batch, length, width]: [batch, length, vocab]."""
  head = model.heads.get(name) if isinstance(model, WithHeads) else None
  if isinstance(head, Unembedding) and head.hidden:
    perceptron: Any = model.perceptron(name)
    x = perceptron.apply({'params': variables['params'][f'head_{name}']}, x)
  decoder, own = _bare(model, variables)
  run: Any = decoder.apply
  return run(own, x, since=decoder.taps[-1])['main']


# ---- generation ----------------------------------------------------------------------


@partial(jax.jit, static_argnames=('model', 'steps', 'setup'))
def _generated(
  model: Decoder | WithHeads,
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
  decoder, own = _bare(model, variables)
  run: Any = decoder.apply
  outputs = run(own, tokens, cache=cache)
  token = chosen(outputs['main'], first)[:, -1]
  _, (added, layers) = lax.scan(step, (token, outputs['cache']), rest, steps - 1)
  whole = jnp.full((1, len(token)), setup.layers[-1], jnp.int32)
  text = jnp.concatenate([tokens, token[:, None], added.T], 1)
  return text, jnp.concatenate([whole, layers]).T


@partial(jax.jit, static_argnames=('model', 'setup'))
def _answered(
  model: Decoder | WithHeads,
  variables: Any,
  tokens: jax.Array,
  cache: Any,
  limits: jax.Array,
  setup: Exits,
) -> tuple[jax.Array, jax.Array]:
  """The answer after each of `tokens`, and how many layers each went through."""
  choose = lambda logits: logits.argmax(-1).astype(tokens.dtype)

  def step(cache, token):
    answer, layers, cache = _written(
      model, variables, setup, limits, choose, token, cache
    )
    return cache, (answer, layers)

  _, (answers, layers) = lax.scan(step, cache, tokens.T)
  return answers.T, layers.T


def _written(
  model: Decoder | WithHeads,
  variables: Any,
  setup: Exits,
  limits: jax.Array,
  choose: Callable,
  token: jax.Array,
  cache: Any,
) -> tuple[jax.Array, jax.Array, Any]:
  """The token after each of `token` [batch], its number of layers, and the cache."""
  decoder, own = _bare(model, variables)
  run: Any = partial(decoder.apply, own)
  logits = lambda x, name: _logits(model, variables, x, name)[:, 0]
  start, taps = cache['length'], (*setup.taps, decoder.taps[-1])

  def through(x, cache, left, since, until):
    """The layers between two taps; what has left keeps its features."""
    first, last = decoder.taps.index(since), decoder.taps.index(until)
    reached = decoder.taps[first : last + 1]
    for before, tap in pairwise(reached):
      outputs = run(x, cache=cache, since=before, until=tap)
      x = jnp.where(left[:, None, None], x, outputs[tap])
      cache = {**cache, **outputs['cache'], 'length': start}
    return x, cache

  def after(index, x, cache, token, layers, memory):
    """The result from an exit or the end on; `layers` is -1 until a text has left."""
    left = layers >= 0
    if index == len(setup.taps):
      token = jnp.where(left, token, choose(logits(x, 'main')))
      layers = jnp.where(left, layers, setup.layers[-1])
      return token, layers, {**cache, 'length': start + 1}
    answer = logits(x, setup.names[index])
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
  model: Decoder | WithHeads,
  setup: Exits,
  variables: Any,
  tokens: jax.Array,
  labels: Any,
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Logits [exits, n, classes] of n tokens, scores [exits - 1, n] and labels [n]."""
  decoder, own = _bare(model, variables)
  run: Any = decoder.apply
  outputs = run(own, tokens)
  flat = lambda x: x.reshape(-1, x.shape[-1])
  every = [
    flat(_logits(model, variables, outputs[tap], name))
    for name, tap in zip(setup.names, setup.taps)
  ]
  every.append(flat(outputs['main']))
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


def _costs(
  model: Decoder | WithHeads, variables: Any, length: int, setup: Exits
) -> np.ndarray:
  """FLOPs of a token that leaves at each exit, at the end, and of one without exits."""
  decoder, _ = _bare(model, variables)
  token = jax.ShapeDtypeStruct((1, 1), jnp.int32)
  cache = jax.eval_shape(lambda: decoder.empty_cache(1, length))
  exits = tuple(zip(setup.names, setup.taps))

  def run(variables, token, cache, passed, end):
    own = _bare(model, variables)[1]
    step: Any = partial(decoder.apply, own, cache=cache)
    outputs = step(token)
    answers = [_logits(model, variables, outputs[tap], name) for name, tap in passed]
    if end:
      return answers, outputs['main'], outputs['cache']
    _, left = passed[-1]
    skipped = step(outputs[left], since=left, skip=True)
    return answers, {**outputs['cache'], **skipped['cache']}

  ways = [(exits[: i + 1], False) for i in range(len(exits))]
  flops = []
  for passed, end in [*ways, (exits, True), ((), True)]:
    coupling = couple(partial(run, passed=passed, end=end), variables, token, cache)
    flops.append(cost.flops(coupling))
  return np.asarray(flops, np.float64)
