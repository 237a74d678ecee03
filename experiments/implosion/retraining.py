"""Network Implosion beside its controls: the same network, depth, epochs and seeds.

  priority   the paper's: trained, the units of smallest |w| erased, retrained, again
  drop, greedy   the same with another importance
  random     the same with units drawn by chance
  scratch    the shape that the row of `priority` ended with, trained from scratch for
             as many epochs as all its stages together

Every (seed, method) is one row. Decisions see held-out images only; the test images are
read once per row.
"""

import dataclasses
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from depthprune.methods.implosion import ImplosionOptions
from depthprune.run import rounds
from depthprune.run.config import Config
from depthprune.run.job import prepare, stage
from depthprune.run.network import network
from depthprune.train.evaluate import evaluator
from depthprune.train.method import plain
from depthprune.train.result import to_json
from experiments.result_files import Row, files_with, link, notes, percent, table
from experiments.run import Arguments, Case, compare, sized

HEAD = (
  *('', 'units', 'epochs', 'held out, last erasure', 'retrained', 'test accuracy'),
  'seeds',
)
NAMES = {'random': 'random erasure', 'scratch': 'same shape from scratch'}


def run(
  name: str,
  full: Config[ImplosionOptions],
  small: Mapping[str, Any],
  methods: Sequence[str],
  arguments: Arguments,
) -> list[Case]:
  """Fills the result file of an experiment and returns the cases that are left.

  Args:
    name: The function in configs.py.
    full: The config for an accelerator.
    small: What differs from `full` at the size for a CPU.
    methods: Those that are compared; `priority` comes before `scratch`.
    arguments: What the experiment is asked.
  """
  path, config = sized('implosion', name, full, small, arguments)
  cases = [{'method': method} for method in methods]
  return compare(path, config, cases, _make_row, arguments)


def _make_row(
  config: Config[ImplosionOptions], case: Case, same_seed: list[Row]
) -> Row:
  if case['method'] == 'scratch':
    (shape,) = (row for row in same_seed if row['method'] == 'priority')
    return _scratch_row(config, shape)
  options: Any = dataclasses.replace(config.options, importance=case['method'])
  return _erased_row(dataclasses.replace(config, options=options))


def _erased_row(config: Config[ImplosionOptions]) -> Row:
  result = to_json(rounds.run(config))
  cuts = result['rounds']
  train, gates, finetune = config.epochs
  return {
    'accuracy': result['accuracy']['after'],
    'accuracy_before': result['accuracy']['before'],
    'held_out': result['held_out']['after'],
    'units': [cuts[0]['units'][0], cuts[-1]['units'][1]],
    'rounds': cuts,
    'epochs': train + gates + len(cuts) * finetune,
    **{k: result[k]['after'] for k in ('flops', 'params')},
    **{f'{k}_full': result[k]['before'] for k in ('flops', 'params')},
    'latency_ms': result['latency_ms'],
    'wall_seconds': round(result['wall_seconds'], 1),
  }


def _scratch_row(config: Config[ImplosionOptions], shape: Mapping[str, Any]) -> Row:
  started = time.monotonic()
  job = prepare(dataclasses.replace(config, pretrained=None))
  erased = [unit for each in shape['rounds'] for unit in each['erased']]
  full = network(job.config, job.images.classes)
  model = full.clone(arch={f'{unit}/branch': 0 for unit in erased})
  variables = jax.jit(model.init)(job.key('init'), *job.inputs)
  # No gates are trained, so none stay: the units are as the erased network has them.
  variables = {k: v for k, v in variables.items() if k != 'branches'}
  epochs, peak = shape['epochs'], config.learning_rate
  state = stage(job, 'train', model, plain(), variables, epochs=epochs, peak=peak)
  measure = evaluator(model, job.task)
  accuracy = lambda split: measure(state.variables, job.batches(split))['accuracy']
  return {
    'accuracy': accuracy(job.images.test),
    'held_out': accuracy(job.images.held_out),
    'epochs': epochs,
    **{k: shape[k] for k in ('flops', 'params')},
    'wall_seconds': round(time.monotonic() - started, 1),
  }


def retraining_tables() -> str:
  """Erased and retrained, beside the controls; a table for each file, or a dash."""
  contents = files_with('implosion', 'method', 'accuracy')
  parts = (_table(*file) for file in contents.items())
  return '\n\n'.join(parts) or 'Network Implosion, erased and retrained: –'


def _table(path: Path, content: dict[str, Any]) -> str:
  rows = content['rows']
  methods = dict.fromkeys(row['method'] for row in rows)
  lines = [
    _line(method, [row for row in rows if row['method'] == method])
    for method in methods
  ]
  uncut = [row['accuracy_before'] for row in rows if row['method'] == 'priority']
  return (
    f'Network Implosion, {subject(content)}: units erased and the rest retrained, in '
    f'rounds; accuracy in %, mean ± standard deviation; uncut {percent(uncut)} '
    f'({link(path)}).{notes(content)}\n\n' + table(HEAD, lines)
  )


def _line(method: str, rows: list[Row]) -> tuple[str, ...]:
  last = [row['rounds'][-1]['held_out'] for row in rows if 'rounds' in row]
  held_out = lambda when: percent(at[when] for at in last) if last else '–'
  return (
    NAMES.get(method, method),
    ' → '.join(map(str, rows[0].get('units', '–'))),
    str(rows[0]['epochs']),
    held_out('recalibrated'),
    held_out('after'),
    percent(row['accuracy'] for row in rows),
    str(len(rows)),
  )


def subject(content: dict[str, Any]) -> str:
  """Which network on which data a result file is about."""
  config = content['config']
  origin = ' from a checkpoint' if config.get('pretrained') else ''
  return f'{config["model"]} on {config["data"]}{origin}'
