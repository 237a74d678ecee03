"""A cascade against its network, executed: 70 % of a batch leave after a third of it.

  transformer  BERT of 12 layers, 768 wide, 8 tokens, batch 256; an exit after layer 4
  resnet56     32x32x3, batch 256; an exit after block 9 of 27
  trap         the same decision by vmap of lax.cond, on a transformer of 12 layers, 128
               wide: it computes both sides for everybody, and slower

Both run in one process by turns; medians. Weights are random and the threshold is the
30th percentile of the confidence, so that the rate of exits is what is wanted. `excess`
is the part of time that the cascade takes, over the part of FLOPs that it should.

  python -m experiments.bench.cascade

Expected: excess at most 1.25.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from depthprune.cascades.cascade import Cascade, cascade
from depthprune.cascades.race import race
from depthprune.models import build
from depthprune.models.heads import Head, WithHeads
from depthprune.program.modules import runnable
from depthprune.program.stages import split
from depthprune.timing import clock
from experiments.bench import measure

BATCH, TOKENS, LEAVE, SECONDS = 256, 8, 0.7, 40
BERT = {'classes': 2, 'vocab': 1000, 'depth': 12}
SIZES = {
  'transformer': {'width': 768, 'heads': 12, 'inner': 3072},
  'trap': {'width': 128, 'heads': 2, 'inner': 512},
}


def transformer(name: str) -> tuple[Any, tuple]:
  """(network with an exit after a third, texts)."""
  trunk = build('bert_base', **BERT, **SIZES[name])
  tokens = np.random.default_rng(0).integers(0, 1000, (BATCH, TOKENS))
  mask = jnp.ones((BATCH, TOKENS), bool)
  model = WithHeads(trunk, {'early': Head('layer3', 2, hidden=256, pool='cls')})
  return model, (jnp.asarray(tokens, jnp.int32), mask)


def resnet() -> tuple[Any, tuple]:
  """(network with an exit after a third, images)."""
  model = WithHeads(
    build('resnet56'), {'early': Head('stage1/block8', hidden=256, pool='grid4')}
  )
  return model, (measure.random_images(BATCH, 32, 32, 3),)


def build_cascade(model: Any, inputs: tuple) -> Cascade:
  """The cascade that a part LEAVE of these inputs leave early."""
  one = [x[:1] for x in inputs]
  variables = jax.jit(model.init)(jax.random.key(0), *one)
  stages = split(model, variables, *one)
  first = jax.jit(lambda v, *x: stages.runs(BATCH)[0](v, x)[0])(variables, *inputs)
  confidence = np.asarray(jax.nn.softmax(first).max(-1))
  limit = float(np.quantile(confidence, 1 - LEAVE))
  return cascade(model, variables, *one, thresholds={'early': limit})


def raced(model: Any, inputs: tuple) -> dict[str, Any]:
  """Cascade and network by turns, beside the ideal cost of the cascade."""
  early = build_cascade(model, inputs)
  timed = race(early, *inputs, seconds=SECONDS)
  answer = early(*inputs)
  ideal = timed.cost.ideal / timed.cost.whole
  return {
    **timed.to_json(),
    'left': float((np.asarray(answer.exit) == 0).mean()),
    'rows': np.asarray(answer.rows).tolist(),
    'whole': timed.cost.whole,
    'ideal_share': ideal,
    'padded_share': timed.cost.padded / timed.cost.whole,
    'share': timed.share,
    'excess': timed.share / ideal,
  }


def trapped(model: Any, inputs: tuple) -> dict[str, Any]:
  """Cascade, network, and vmap of cond, by turns."""
  early = build_cascade(model, inputs)
  run = runnable(model)
  first, rest = early.stages.runs(1)
  limit = jnp.float32(early.thresholds[0])

  def one(variables, *row):
    logits, crossed = first(variables, [x[None] for x in row])
    sure = jax.nn.softmax(logits).max() > limit
    leave = lambda crossed: logits
    return jax.lax.cond(sure, leave, lambda c: rest(variables, c)[0], crossed)[0]

  trap = jax.jit(lambda v, *x: jax.vmap(functools.partial(one, v))(*x))
  whole = jax.jit(lambda v, *x: run(v, *x)['main'])
  calls = [
    lambda: early(*inputs),
    lambda: whole(early.variables, *inputs),
    lambda: trap(early.variables, *inputs),
  ]
  taken = np.median(clock.interleave(calls, SECONDS, least=5, warmup=2), axis=1)
  logits = early(*inputs).logits
  gap = np.abs(np.asarray(logits - trap(early.variables, *inputs))).max()
  names = ('cascade_ms', 'whole_ms', 'vmap_cond_ms')
  return {**dict(zip(names, taken.tolist())), 'difference': float(gap)}


if __name__ == '__main__':
  rows = {
    'trap': trapped(*transformer('trap')),
    'resnet56': raced(*resnet()),
    'transformer': raced(*transformer('transformer')),
  }
  sizes = {'batch': BATCH, 'tokens': TOKENS, 'leave': LEAVE, 'bert': BERT, **SIZES}
  measure.write('cascade', {'config': sizes, **rows})
  for name, row in rows.items():
    print(name, {k: v for k, v in row.items() if not isinstance(v, list)})
