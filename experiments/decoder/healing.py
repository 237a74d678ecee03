"""A cut language model trained on for a little, with the whole one as its teacher.

Every (cut, seed) is one row; cuts are those of pruning.py, all to the same part of the
parameters. The whole network, trained as long on the same texts, is the control: what
it gains comes from the texts.
"""

import functools
import time
from pathlib import Path
from typing import Any

import jax
import optax

import depthprune as dp
from depthprune.models.decoder import Decoder
from depthprune.report.numbers import spread
from depthprune.train.evaluate import evaluator
from depthprune.train.task import Tree
from experiments.decoder.pruning import NETWORK, cut, texts, whole
from experiments.result_files import Case, Row, Rows, files_with, link, path_of, table
from experiments.run import SEEDS, Arguments, fill

STEPS, BATCH, LENGTH, RATE = 60, 4, 128, 5e-5
CUTS: dict[str, dict[str, Any]] = {  # what `cut` is told besides the part
  'whole': {},
  'depth': {'by': 'again', 'refitted': False},
  'width': {'by': 'activation', 'refitted': True},
  'both': {'by': 'search', 'refitted': True},
}


def run(name: str, part: float, arguments: Arguments) -> list[Case]:
  """Fills the result file of an experiment and returns the cases that are left.

  Args:
    name: The function in configs.py.
    part: Part of the parameters that stays.
    arguments: What the experiment is asked.
  """
  config = {'network': NETWORK, 'part': part, 'steps': STEPS, 'batch': BATCH}
  config |= {'length': LENGTH, 'learning_rate': RATE}
  rows = Rows(path_of('decoder', name, arguments.full), config, ('cut', 'seed'))
  seeds = arguments.seeds or range(SEEDS)
  cases = [{'cut': each, 'seed': seed} for seed in seeds for each in CUTS]
  return fill(rows, lambda: cases, lambda case: _row(part, **case), arguments)


def _row(part: float, **case: Any) -> Row:
  started = time.monotonic()
  network, method, task = whole(), dp.distill(dp.Method()), dp.language_model()
  model, variables, before = _cut(part, case['cut'])
  tx = optax.adamw(optax.warmup_cosine_decay_schedule(0, RATE, STEPS // 10, STEPS))
  step = dp.make_step(model, method, task, tx, teacher=network.model.apply)
  state = dp.init_state(model, method, tx, variables)
  rows = texts(5000, 4 * STEPS * BATCH, LENGTH)
  state = dp.fit(
    step,
    state,
    jax.random.key(case['seed']),
    {key: x[: STEPS * BATCH] for key, x in rows.items()},
    batch=BATCH,
    steps=STEPS,
    teacher=network.variables,
  )
  return {
    'perplexity_cut': before,
    'perplexity': _perplexity(model, state.variables),
    'params': sum(x.size for x in jax.tree.leaves(variables['params'])),
    'wall_seconds': round(time.monotonic() - started, 1),
  }


@functools.cache
def _cut(part: float, name: str) -> tuple[Decoder, Tree, float]:
  """A cut, which is the same for all seeds, and its perplexity."""
  network = whole()
  model, variables = network.model, network.variables
  if how := CUTS[name]:
    model, variables = cut(part, **how)
  return model, variables, _perplexity(model, variables)


def _perplexity(model: Decoder, variables: Tree) -> float:
  """The perplexity on the texts that report."""
  measure = evaluator(model, dp.language_model())
  return measure(variables, whole().texts['report'])['perplexity']


def healing_tables() -> str:
  """Perplexity before and after a short training; a table for each file, or a dash."""
  contents = files_with('decoder', 'cut', 'perplexity_cut')
  return '\n\n'.join(_table(*file) for file in contents.items()) or (
    'A cut language model, trained on for a little: –'
  )


def _table(path: Path, content: dict[str, Any]) -> str:
  config, rows = content['config'], content['rows']
  lines = []
  for name in dict.fromkeys(row['cut'] for row in rows):
    own = [row for row in rows if row['cut'] == name]
    of = lambda key, own=own: spread((row[key] for row in own), 1)
    lines.append((name, of('perplexity_cut'), of('perplexity'), str(len(own))))
  tokens = config['steps'] * config['batch'] * config['length']
  return (
    f'{config["network"]} at {100 * config["part"]:g} % of its parameters, then '
    f'trained on {tokens:,} tokens with the whole network as its teacher; the whole '
    f'network, trained as long, beside it; perplexity on other texts '
    f'({link(path)}):\n\n' + table(('cut', 'before', 'after training', 'seeds'), lines)
  )
