"""Network Implosion beside its controls: the same network, depth, epochs and seeds.

  priority   the paper's: trained, the units of smallest |w| erased, retrained, again
  drop, greedy   the same with another importance
  random     the same with units drawn by chance
  scratch    the shape that the row of the first method ended with, trained from scratch
             for as many epochs as all its stages together

Every (seed, method) is one row. Decisions see held-out images only; the test images are
read once per row. With `deciding`, a pretrained network, which may have seen all
training images, decides on so many of the first half of the test images, and accuracy
is that of the second half.
"""

import dataclasses
import functools
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from depthprune import methods
from depthprune.methods.implosion import ImplosionOptions
from depthprune.run import rounds
from depthprune.run.config import Config
from depthprune.run.job import prepare, stage
from depthprune.run.network import initial_variables, network
from depthprune.storage import directory
from depthprune.train.evaluate import evaluator
from depthprune.train.method import plain
from depthprune.train.result import to_json
from experiments.result_files import Row, files_with, link, notes, percent, table
from experiments.run import Arguments, Case, compare, on_unseen, sized

HEAD = (
  *('', 'units', 'epochs', 'held out, last erasure', 'retrained', 'test accuracy'),
  'seeds',
)
NAMES = {'random': 'random erasure', 'scratch': 'same shape from scratch'}


def run(
  name: str,
  full: Config[ImplosionOptions],
  small: Mapping[str, Any],
  compared: Sequence[str],
  arguments: Arguments,
  deciding: int = 0,
) -> list[Case]:
  """Fills the result file of an experiment and returns the cases that are left.

  Args:
    name: The function in configs.py.
    full: The config for an accelerator.
    small: What differs from `full` at the size for a CPU.
    compared: Methods, of which `scratch` has the shape of the first.
    arguments: What the experiment is asked.
    deciding: How many test images decide; with 0, images held out of the training set.
  """
  path, config = sized('implosion', name, full, small, arguments)
  cases = [{'method': method} for method in compared]
  make_row = functools.partial(_make_row, compared[0], deciding)
  return compare(path, config, cases, make_row, arguments)


def _make_row(
  first: str,
  deciding: int,
  config: Config[ImplosionOptions],
  case: Case,
  same_seed: list[Row],
) -> Row:
  if case['method'] == 'scratch':
    (shape,) = (row for row in same_seed if row['method'] == first)
    return _scratch_row(config, shape, deciding)
  options: Any = dataclasses.replace(config.options, importance=case['method'])
  config = dataclasses.replace(config, options=options)
  return _unseen_row(config, deciding) if deciding else _erased_row(config)


def _erased_row(config: Config[ImplosionOptions]) -> Row:
  result = to_json(rounds.run(config))
  cuts = result['rounds']
  train, gates, finetune = config.epochs
  return {
    'accuracy': result['accuracy']['after'],
    # Of the pretrained weights, where there are any.
    'accuracy_before': result['original'].get('test', result['accuracy']['before']),
    'held_out': result['held_out']['after'],
    'units': [cuts[0]['units'][0], cuts[-1]['units'][1]],
    'rounds': cuts,
    'epochs': train + gates + len(cuts) * finetune,
    **{k: result[k]['after'] for k in ('flops', 'params')},
    **{f'{k}_full': result[k]['before'] for k in ('flops', 'params')},
    'latency_ms': result['latency_ms'],
    'wall_seconds': round(result['wall_seconds'], 1),
  }


def _unseen_row(config: Config[ImplosionOptions], deciding: int) -> Row:
  started = time.monotonic()
  job = on_unseen(prepare(config), deciding)
  whole = network(config, job.images.classes)
  variables = initial_variables(job, whole)
  build = functools.partial(methods.build, config.options, seed=config.seed)
  small = rounds.shrink(job, whole, variables, build)
  accuracy = lambda model, v: job.scores(model)(v, job.images.test)['accuracy']
  first, last = small.reports[0], small.reports[-1]
  _, gates, finetune = config.epochs
  return {
    'accuracy': accuracy(small.model, small.variables),
    'accuracy_before': accuracy(whole, variables),
    'held_out': small.rounds[-1].held_out.after,
    'units': [small.rounds[0].units[0], small.rounds[-1].units[1]],
    'rounds': directory.plain([dataclasses.asdict(each) for each in small.rounds]),
    'epochs': gates + len(small.rounds) * finetune,
    **{k: last[k]['after'] for k in ('flops', 'params')},
    **{f'{k}_full': first[k]['before'] for k in ('flops', 'params')},
    'wall_seconds': round(time.monotonic() - started, 1),
  }


def _scratch_row(
  config: Config[ImplosionOptions], shape: Mapping[str, Any], deciding: int
) -> Row:
  started = time.monotonic()
  job = prepare(dataclasses.replace(config, pretrained=None, distill=False))
  job = on_unseen(job, deciding) if deciding else job
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
  names = [*dict.fromkeys(row['method'] for row in rows)]
  lines = [
    _line(name, [row for row in rows if row['method'] == name]) for name in names
  ]
  uncut = [r['accuracy_before'] for r in rows if r['method'] == names[0]]
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
