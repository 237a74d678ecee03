"""SideNets of one network, by regime and seed.

  frozen   the paper's: heads alone, on features computed once
  mixed    frozen first, then network and heads together

Every (regime, seed) is one row. Thresholds, temperatures and weights of a learned
confidence see held-out data only; the test data is read once per row.
"""

import dataclasses
import statistics
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from depthprune.methods.sidenet import SideNetOptions
from depthprune.report.numbers import spread
from depthprune.run import rounds
from depthprune.run.config import Config
from depthprune.train.result import to_json
from experiments.result_files import (
  Row,
  Rows,
  files_with,
  link,
  notes,
  percent,
  table,
)
from experiments.run import SEEDS, Arguments, Case, fill, sized

HEAD = (
  *('regime', 'asked for', 'reached', 'points lost', 'FLOPs saved, %'),
  *('95 % interval', 'seeds'),
)
REQUESTS = {  # words, unit on the screen, and what is to be compared with it
  'drop': ('a drop ≤ {:g} points', 1, lambda test: test['drop']),
  'budget': ('FLOPs ≤ {:.0f} %', 100, lambda test: 100 * (1 - test['saved'])),
  'risk': ('risk ≤ {:g} %', 100, lambda test: 100 * test['risk']),
}


def run(
  name: str,
  full: Config[SideNetOptions],
  small: Mapping[str, Mapping[str, Any]],
  arguments: Arguments,
  weights: Callable[[], str] | None = None,
) -> list[Case]:
  """Fills the result file of an experiment and returns the cases that are left.

  Args:
    name: The function in configs.py.
    full: The config for an accelerator.
    small: The regimes, each with what differs from `full` at the size for a CPU.
    arguments: What the experiment is asked.
    weights: Finds weights whose path differs from machine to machine, so that the
      config in the result file does not depend on it.
  """
  first, *_ = small.values()
  path, config = sized('sidenet', name, full, first, arguments)
  described = dataclasses.replace(config, workdir=None).to_json()
  described |= {} if arguments.full else _described_sizes(small)
  seeds = arguments.seeds or range(SEEDS)
  cases = [{'regime': regime, 'seed': seed} for regime in small for seed in seeds]
  folder = lambda case: config.path / f'{case["regime"]}-seed{case["seed"]}'

  def make(case: Case) -> Row:
    regime = case['regime']
    own = dataclasses.replace(full, **({} if arguments.full else small[regime]))
    own = dataclasses.replace(
      own,
      options=dataclasses.replace(own.options, regime=regime),
      seed=case['seed'],
      workdir=str(folder(case)),
      pretrained=weights() if weights else own.pretrained,
    )
    return _make_row(own)

  rows = Rows(path, described, ('regime', 'seed'))
  scratch = lambda case: folder(case) / 'features'
  return fill(rows, lambda: cases, make, arguments, scratch)


def _described_sizes(small: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
  """What the rows of a CPU's size depend on besides the config."""
  plain = lambda v: dataclasses.asdict(v) if isinstance(v, SideNetOptions) else v
  return {
    'small': {
      regime: {key: plain(value) for key, value in changes.items()}
      for regime, changes in small.items()
    }
  }


def _make_row(config: Config[SideNetOptions]) -> Row:
  """What one run reached; only the first seed keeps its reliability diagrams."""
  result = to_json(rounds.run(config))
  cascade = result['cascade']
  if config.seed:
    for entry in cascade['calibration'].values():
      for part in (entry['all'], entry['exited']):
        for when in ('before', 'after') if part else ():
          part[when].pop('bins')
  keys = ('accuracy', 'held_out', 'flops', 'params', 'images', 'wall_seconds', 'device')
  epochs = {'train': config.epochs.train, 'heads': config.epochs.gates}
  if config.options.regime == 'mixed':
    epochs['mixed'] = config.epochs.finetune
  return {'epochs': epochs, **{k: result[k] for k in keys}, **cascade}


def sidenet_tables() -> str:
  """What was asked of held-out data and reached on test data; a dash without a file."""
  contents = files_with('sidenet', 'regime', 'requests')
  return '\n\n'.join(_table(*file) for file in contents.items()) or 'SideNet: –'


def _table(path: Path, content: dict[str, Any]) -> str:
  config, rows = content['config'], content['rows']
  lines, summaries = [], []
  for regime in dict.fromkeys(row['regime'] for row in rows):
    own = [row for row in rows if row['regime'] == regime]
    lines += [_line(regime, request, own) for request in _met_requests(own)]
    summaries.append(_summary(regime, own))
  sizes = {row['images']['train']: None for row in rows if 'images' in row}
  many = f' ({" / ".join(f"{n:,}" for n in sizes)} training examples)' if sizes else ''
  return (
    f'SideNet, {config["model"]} on {config["data"]}{many}: thresholds from held-out '
    'data, everything else measured on test data, points lost against the network as '
    'it was given; mean ± standard deviation over seeds; saved of the FLOPs of the '
    'network alone, heads paid for; the interval is of what is saved (bootstrap, '
    f'widest over seeds) ({link(path)}):\n\n'
    + table(HEAD, lines)
    + '\n\n'
    + ' '.join(summaries)
    + notes(content)
  )


def _met_requests(rows: list[Row]) -> list[tuple[str, float]]:
  """(kind, value) of every request that any seed could meet."""
  met = [r for row in rows for r in row['requests'] if r['refused'] is None]
  return list(dict.fromkeys((r['kind'], r['requested']) for r in met))


def _line(regime: str, request: tuple[str, float], rows: list[Row]) -> tuple[str, ...]:
  kind, value = request
  words, unit, reached = REQUESTS[kind]
  every = [(row, r) for row in rows for r in row['requests']]
  asked = [(row, r) for row, r in every if (r['kind'], r['requested']) == request]
  met = [(row, r) for row, r in asked if r['refused'] is None]
  tests = [r['test'] for _, r in met]
  intervals = [r['interval']['saved'] for _, r in met]
  low, high = min(i[0] for i in intervals), max(i[1] for i in intervals)
  return (
    regime,
    words.format(value * unit),
    spread(map(reached, tests)),
    spread(100 * (_original(row) - r['test']['accuracy']) for row, r in met),
    percent(test['saved'] for test in tests),
    f'{100 * low:.1f} to {100 * high:.1f}',
    f'{len(met)} of {len(asked)}' if len(met) < len(asked) else str(len(met)),
  )


def _summary(regime: str, rows: list[Row]) -> str:
  """What does not fit in the table: the network, its exits, their calibration, time."""
  own = percent(row['accuracy']['before'] for row in rows)
  original = percent(map(_original, rows))
  names = [name for name in rows[0]['exits'] if name != 'main']
  each = lambda values: ' / '.join(f'{100 * v:.1f}' for v in values)
  accuracy = each(_mean(row['exit_accuracy'][name] for row in rows) for name in names)
  ece = {
    when: each(
      _mean(row['calibration'][name]['all'][when]['ece'] for row in rows)
      for name in names
    )
    for when in ('before', 'after')
  }
  gain = spread(row['executed']['speedup'] for row in rows)
  first = rows[0]['executed']
  same = original == own
  before = '' if same else f' ({original} % before it was trained with heads)'
  return (
    f'{regime.capitalize()}: the network alone {own} %{before}; exits {accuracy} %; '
    f'ECE of the exits {ece["before"]} % before and {ece["after"]} % after '
    f'temperature; executed at {gain}× the speed of the network at batch '
    f'{first["batch"]}, {first["device"]}.'
  )


def _original(row: Row) -> float:
  """Accuracy of the network before it was trained together with heads, if it was."""
  return row.get('original', {}).get('test', row['accuracy']['before'])


def _mean(values: Iterable[float]) -> float:
  return statistics.mean(values)
