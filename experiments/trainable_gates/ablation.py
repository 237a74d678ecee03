"""What each part of the recipe of trainable gates is worth: one change at a time.

Every (seed, changed) is one row: a pretrained network, cut to one target and tuned,
with one setting that differs from the base. Accuracy is that on the first half of the
test images, which the pretrained network has not seen; the second half is left for
reports.
"""

import dataclasses
import functools
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from depthprune import methods
from depthprune.methods.trainable_gates import GateOptions
from depthprune.report.numbers import spread
from depthprune.run import rounds
from depthprune.run.config import Config
from experiments.result_files import Row, files_with, link, notes, percent, table
from experiments.run import Arguments, Case, compare, sized
from experiments.trainable_gates.comparison import base_of, job_of


def run(
  name: str,
  config: Config[GateOptions],
  changes: Mapping[str, Mapping[str, Any]],
  arguments: Arguments,
) -> list[Case]:
  """Fills the result file of an ablation and returns the cases that are left.

  Args:
    name: The function in configs.py.
    config: The base.
    changes: {what is changed: fields of the config, or of its options, that differ}.
    arguments: What the experiment is asked.
  """
  path, config = sized('trainable_gates', name, config, {}, arguments)
  cases = [{'changed': changed} for changed in changes]
  make_row = functools.partial(_make_row, config, changes)
  return compare(path, config, cases, make_row, arguments)


def changed(config: Config[GateOptions], change: Mapping[str, Any]) -> Config:
  """A config with other fields; names of the method's options are those of these."""
  own = {field.name for field in dataclasses.fields(config.options)}
  options: Any = dataclasses.replace(
    config.options, **{k: v for k, v in change.items() if k in own}
  )
  fields = {k: v for k, v in change.items() if k not in own}
  return dataclasses.replace(config, options=options, **fields)


def _make_row(
  shared: Config[GateOptions],
  changes: Mapping[str, Mapping[str, Any]],
  config: Config[GateOptions],
  case: Case,
  same_seed: list[Row],
) -> Row:
  del same_seed
  started = time.monotonic()
  config = changed(config, changes[case['changed']])
  base = base_of(shared, config)
  job = job_of(base, config)
  build = functools.partial(methods.build, config.options)
  shrunk = rounds.shrink(job, base.model, base.variables, build)
  measure = job.scores(shrunk.model)
  accuracy = lambda v: measure(v, base.job.images.held_out)['accuracy']
  report = shrunk.pruned.report
  return {
    'accuracy': accuracy(shrunk.variables),
    'accuracy_cut': accuracy(shrunk.recalibrated),
    'flops': report['flops']['after'],
    'flops_unpruned': report['flops']['before'],
    'arch': dict(shrunk.pruned.arch),
    'wall_seconds': round(time.monotonic() - started, 1),
  }


def ablation_tables() -> str:
  """Accuracy with one thing changed; a table for each result file, or a dash."""
  contents = files_with('trainable_gates', 'changed')
  return '\n\n'.join(_table(*file) for file in contents.items()) or (
    'The recipe of trainable gates, one thing changed at a time: –'
  )


def _table(path: Path, content: dict[str, Any]) -> str:
  config, rows = content['config'], content['rows']
  base = {r['seed']: r['accuracy'] for r in rows if r['changed'] == rows[0]['changed']}
  lines = []
  for name in dict.fromkeys(row['changed'] for row in rows):
    own = [row for row in rows if row['changed'] == name]
    gains = [100 * (r['accuracy'] - base[r['seed']]) for r in own if r['seed'] in base]
    lines.append((
      name,
      percent(row['accuracy_cut'] for row in own),
      percent(row['accuracy'] for row in own),
      spread(gains) if gains else '–',
      str(len(own)),
    ))  # fmt: skip
  head = ('changed', 'right after the cut', 'fine-tuned', 'gain, points', 'seeds')
  target = 100 * config['options']['target']
  return (
    f'The recipe of trainable gates, one thing changed at a time: {config["model"]} on '
    f'{config["data"]} to {target:g} % of its FLOPs, {config["subset"]:,} training '
    f'images, {config["gate_epochs"]} + {config["finetune_epochs"]} epochs; accuracy '
    f'in % on held-out images ({link(path)}).{notes(content)}\n\n' + table(head, lines)
  )
