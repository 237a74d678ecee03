"""All erasures of one unit judged: at once, in a loop, in a loop around the program.

ResNet-20, 32x32x3, float32: each of its 9 branches closed once, batch statistics anew
from one batch of 64, loss on another. One process, calls by turns, medians:

  vmap   the decisions make one larger batch
  map    lax.map over them
  loop   one call per decision, in Python

  python -m experiments.bench.judge

About 1 minute on one core of a CPU; there vmap is the slowest (its copies of the
activations leave the cache) and map as fast as the loop. Expected on an accelerator:
vmap, which fills it.
"""

import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax

import depthprune as dp
from depthprune.methods.implosion import implosion
from depthprune.program.units import closing, units
from depthprune.run import result as results
from depthprune.storage import directory as record
from depthprune.timing import clock, latency
from depthprune.train import task as tasks
from depthprune.train.judge import Judge, judge
from depthprune.train.step import init_state

RESULT = Path(__file__).parent / 'results' / 'judge.json'
BATCH, SHAPE = 64, (32, 32, 3)


def batch(rng: np.random.Generator) -> dict[str, jax.Array]:
  return {
    'image': jnp.asarray(rng.normal(size=(BATCH, *SHAPE)), jnp.float32),
    'label': jnp.asarray(rng.integers(0, 10, BATCH), jnp.int32),
  }


def losses(evaluate: Judge, keeps: list[dict], how: str) -> np.ndarray:
  """Of every decision, [n]."""
  if how == 'loop':
    return np.asarray([evaluate(keep)['loss'] for keep in keeps])
  return evaluate.each(jax.tree.map(lambda *kept: np.stack(kept), *keeps))['loss']


if __name__ == '__main__':
  model, rng = dp.models.build('resnet20', classes=10), np.random.default_rng(0)
  held_out, calibration = [batch(rng)], [batch(rng)]
  example = held_out[0]['image'][:1]
  variables = jax.jit(model.init)(jax.random.key(0), example)
  coupling = dp.couple(model, variables, example)
  method = implosion(coupling)
  state = init_state(model, method, optax.sgd(0.1), variables, coupling)
  keeps = [closing((unit,), coupling) for unit in units(coupling)]
  judges = {
    how: judge(
      model,
      method,
      tasks.classification(10),
      state,
      held_out,
      calibration,
      coupling,
      'map' if how == 'map' else 'vmap',
    )
    for how in ('vmap', 'map', 'loop')
  }
  first, found = {}, {}
  for how, evaluate in judges.items():
    start = time.perf_counter()
    found[how] = losses(evaluate, keeps, how)
    first[how] = time.perf_counter() - start
  calls = [lambda how=how: losses(judges[how], keeps, how) for how in judges]
  turns = clock.interleave(calls, seconds=40, least=3, most=21, warmup=0)
  row = {
    how: {'first_s': first[how], **latency.timing(ms)._asdict()}
    for how, ms in zip(judges, turns)
  }
  difference = max(float(np.abs(f - found['loop']).max()) for f in found.values())
  record.write(
    RESULT,
    {
      'command': record.command(),
      **results.surroundings(),
      'model': 'resnet20',
      'batch': BATCH,
      'shape': SHAPE,
      'decisions': len(keeps),
      'milliseconds': row,
      'map_over_vmap': float(np.median(turns[1] / turns[0])),
      'loop_over_vmap': float(np.median(turns[2] / turns[0])),
      'difference': difference,
    },
  )
  print(row, difference)
