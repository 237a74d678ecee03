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

import jax
import numpy as np
import optax

import depthprune as dp
from depthprune.methods.implosion import implosion
from depthprune.program.units import closing, units
from depthprune.timing import clock, latency
from depthprune.train import task as tasks
from depthprune.train.judge import Judge, judge
from depthprune.train.step import init_state
from experiments.bench import measure

BATCH, SHAPE = 64, (32, 32, 3)


def judges() -> tuple[dict[str, Judge], list[dict]]:
  """({how: judge of a network}, the erasures of one unit each)."""
  rng = np.random.default_rng(0)
  shapes = (BATCH, *SHAPE), (BATCH,)
  held_out, calibration = ([measure.random_batch(rng, *shapes)] for _ in range(2))
  images = held_out[0]['image']
  network = measure.initialised(dp.models.build('resnet20', classes=10), images)
  model, variables, coupling = network
  method, task = implosion(coupling), tasks.classification(10)
  state = init_state(model, method, optax.sgd(0.1), variables, coupling)
  about = model, method, task, state, held_out, calibration, coupling
  at_once, mapped = judge(*about, 'vmap'), judge(*about, 'map')
  keeps = [closing((unit,), coupling) for unit in units(coupling)]
  return {'vmap': at_once, 'map': mapped, 'loop': judge(*about, 'vmap')}, keeps


def losses(evaluate: Judge, keeps: list[dict], how: str) -> np.ndarray:
  """The loss of every decision, [decisions]."""
  if how == 'loop':
    return np.asarray([evaluate(keep)['loss'] for keep in keeps])
  return evaluate.each(jax.tree.map(lambda *kept: np.stack(kept), *keeps))['loss']


if __name__ == '__main__':
  evaluate, keeps = judges()
  first, answers = {}, {}
  for how in evaluate:
    start = time.perf_counter()
    answers[how] = losses(evaluate[how], keeps, how)
    first[how] = time.perf_counter() - start
  calls = [lambda how=how: losses(evaluate[how], keeps, how) for how in evaluate]
  turns = clock.interleave(calls, seconds=40, least=3, most=21, warmup=0)
  content = {
    'model': 'resnet20',
    'batch': BATCH,
    'shape': SHAPE,
    'decisions': len(keeps),
    'milliseconds': {
      how: {'first_s': first[how], **latency.timing(ms)._asdict()}
      for how, ms in zip(evaluate, turns)
    },
    'map_over_vmap': float(np.median(turns[1] / turns[0])),
    'loop_over_vmap': float(np.median(turns[2] / turns[0])),
    'difference': max(
      float(np.abs(answer - answers['loop']).max()) for answer in answers.values()
    ),
  }
  measure.write('judge', content)
  print(content['milliseconds'], content['difference'])
