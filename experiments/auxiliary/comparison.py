"""Auxiliary training of a compact network beside its controls, on the same images.

  alone      the compact network, as many epochs
  longer     the compact network, as many epochs as cost what `all` costs (FLOPs)
  deep       plain deep supervision: linear heads after its stages
  all        beside a path that every tap feeds
  search     beside a path whose connections are searched
  distilled  the compact network, learning from the answers of the path of `all`

Every (seed, method) is one row. What helped to train is cut away before anything is
measured; the test images are read once per row, and nothing is decided on them.
"""

import dataclasses
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

import depthprune as dp
from depthprune import methods
from depthprune.methods.auxiliary import AuxiliaryOptions
from depthprune.report.numbers import spread
from depthprune.run import result as results
from depthprune.run import rounds
from depthprune.run.config import Config
from depthprune.run.job import Job, prepare, stage
from depthprune.run.network import network
from depthprune.train.distill import Teacher, distill
from depthprune.train.evaluate import evaluator
from depthprune.train.method import plain
from depthprune.train.result import to_json
from depthprune.train.step import State
from experiments.result_files import Row, files_with, link, notes, percent, table
from experiments.run import Arguments, Case, compare, sized

METHODS = ('all', 'search', 'deep', 'alone', 'longer', 'distilled')
STRUCTURES = {'alone': 'none', 'longer': 'none', 'deep': 'deep-supervision'}
HEAD = ('', 'test', 'against alone', 'epochs', 'training FLOPs', 'seeds')
NAMES = {
  'alone': 'compact alone',
  'longer': 'compact alone, same training FLOPs as all',
  'distilled': 'distilled from the wide network',
  'deep': 'deep supervision',
  'all': 'auxiliary path, all connections',
  'search': 'auxiliary path, searched',
}


def run(
  name: str,
  full: Config[AuxiliaryOptions],
  small: Mapping[str, Any],
  arguments: Arguments,
) -> list[Case]:
  """Fills the result file of an experiment and returns the cases that are left.

  Args:
    name: The function in configs.py.
    full: The config for an accelerator.
    small: What differs from `full` at the size for a CPU.
    arguments: What the experiment is asked.
  """
  path, config = sized('auxiliary', name, full, small, arguments)
  cases = [{'method': method} for method in METHODS]
  return compare(path, config, cases, _make_row, arguments)


def _make_row(
  config: Config[AuxiliaryOptions], case: Case, same_seed: list[Row]
) -> Row:
  method = case['method']
  if method == 'distilled':
    return _distilled_row(config)
  structure = STRUCTURES.get(method, method)
  options = dataclasses.replace(config.options, structure=structure)
  config = dataclasses.replace(config, options=options)
  if method == 'longer':
    (wide,) = (row for row in same_seed if row['method'] == 'all')
    part = wide['flops_training'] / wide['flops']
    config = dataclasses.replace(config, gate_epochs=round(config.epochs.gates * part))
  result = to_json(rounds.run(config))
  learned = result['rounds'][0]['learned']
  return {
    'accuracy': result['accuracy']['after'],
    'held_out': result['held_out']['after'],
    'scores': result['scores']['after'],
    'epochs': config.epochs.gates,
    'flops': result['flops']['after'],
    'flops_training': result['flops']['before'],
    'params': result['params']['after'],
    'latency_ms': result['latency_ms'],
    'structure': {k: learned[k] for k in ('weight', 'open') if k in learned},
    'wall_seconds': round(result['wall_seconds'], 1),
  }


def _distilled_row(config: Config[AuxiliaryOptions]) -> Row:
  """The wide network first, trunk and path; then a new trunk towards its answers."""
  started = time.monotonic()
  job = prepare(config)
  wide = network(config, job.images.classes)
  options = dataclasses.replace(config.options, structure='none')
  compact = network(dataclasses.replace(config, options=options), job.images.classes)
  taught = _train(job, 'wide', wide)
  answer = lambda v, *inputs, **mode: wide.apply(v, *inputs, **mode)['aux']
  state = _train(job, 'distilled', compact, Teacher(answer, taught.variables))
  measure = evaluator(compact, job.task)
  scores = lambda split: measure(state.variables, job.batches(split))
  test = results.finite(scores(job.images.test))
  return {
    'accuracy': test['accuracy'],
    'held_out': scores(job.images.held_out)['accuracy'],
    'scores': test,
    'epochs': config.epochs.gates,
    'wall_seconds': round(time.monotonic() - started, 1),
  }


def _train(job: Job, name: str, model: Any, teacher: Teacher | None = None) -> State:
  """Trains beside what helps to train, or towards the answers of a teacher."""
  variables = jax.jit(model.init)(job.key('init'), *job.inputs)
  coupling = dp.couple(model, variables, *job.inputs)
  epochs, peak = job.config.epochs.gates, job.config.learning_rate
  build = lambda: methods.build(job.config, coupling, job.steps(epochs), {})
  method = distill(plain()) if teacher else build()
  return stage(
    job, name, model, method, variables,
    epochs=epochs, peak=peak, coupling=coupling, teacher=teacher,
  )  # fmt: skip


def auxiliary_tables() -> str:
  """Accuracy, and what training costs; a table for each result file, or a dash."""
  contents = files_with('auxiliary', 'method', 'accuracy')
  return '\n\n'.join(_table(*file) for file in contents.items()) or 'Auxiliary path: –'


def _table(path: Path, content: dict[str, Any]) -> str:
  config, rows = content['config'], content['rows']
  # Of pixels it is the mean IoU that counts.
  score = 'miou' if 'miou' in rows[0].get('scores', {}) else 'accuracy'
  rows = [{**row, 'score': row.get('scores', row)[score]} for row in rows]
  alone = {row['seed']: row for row in rows if row['method'] == 'alone'}
  lines = []
  for method, name in NAMES.items():
    own = [row for row in rows if row['method'] == method]
    if own:
      lines.append(_line(name, own, alone))
  images = f', {config["subset"]:,} images' if config['subset'] else ''
  return (
    f'Auxiliary overparameterization, {config["model"]} on {config["data"]}{images}: '
    'what helped to train is cut away, and the same compact network is left; '
    f'{"mean IoU" if score == "miou" else "accuracy"} on test data in %, mean ± '
    'standard deviation; differences in points, seed by seed'
    f'{_searched(rows)} ({link(path)}).{notes(content)}\n\n' + table(HEAD, lines)
  )


def _line(name: str, rows: list[Row], alone: dict[int, Row]) -> tuple[str, ...]:
  gains = [
    100 * (row['score'] - alone[row['seed']]['score'])
    for row in rows
    if row['seed'] in alone
  ]
  base = next(iter(alone.values()), None)
  cost = '–'
  if base and 'flops_training' in rows[0]:
    work = lambda row: row['flops_training'] * row['epochs']
    cost = f'{work(rows[0]) / work(base):.2f}×'
  return (
    name,
    percent(row['score'] for row in rows),
    spread(gains) if gains else '–',
    str(rows[0]['epochs']),
    cost,
    str(len(rows)),
  )


def _searched(rows: list[Row]) -> str:
  """How many connections the search left open."""
  open_gates = [row['structure']['open'] for row in rows if row['method'] == 'search']
  if not open_gates:
    return ''
  left = spread(sum(gates.values()) for gates in open_gates)
  return f'; the search left {left} of {len(open_gates[0])} connections open'
