"""SideNets: what was asked of held-out data, and what was reached on test data."""

import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from depthprune.report.numbers import spread
from experiments.found import files, link, notes, percent, table

HEAD = (
  *('regime', 'asked for', 'reached', 'points lost', 'FLOPs saved, %'),
  *('95 % interval', 'seeds'),
)
ASKED = {  # words, unit on the screen, and what is to be compared with it
  'drop': ('a drop ≤ {:g} points', 1, lambda test: test['drop']),
  'budget': ('FLOPs ≤ {:.0f} %', 100, lambda test: 100 * (1 - test['saved'])),
  'risk': ('risk ≤ {:g} %', 100, lambda test: 100 * test['risk']),
}

COMPOSED = (
  *('MainNet', 'accuracy, %', 'MFLOPs', 'weights, KiB', 'cascade, %'),
  *('points lost', 'FLOPs saved, %', 'seeds'),
)

Rows = list[dict[str, Any]]


def sidenet() -> str:
  """One part per result file; a dash where there is none."""
  found = files('sidenet', 'regime', 'requests')
  return '\n\n'.join(_section(*file) for file in found.items()) or 'SideNet: –'


def _section(path: Path, found: dict[str, Any]) -> str:
  config, rows = found['config'], found['rows']
  lines, said = [], []
  for regime in dict.fromkeys(row['regime'] for row in rows):
    mine = [row for row in rows if row['regime'] == regime]
    lines += [_line(regime, name, mine) for name in _asked(mine)]
    said.append(_said(regime, mine))
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
    + ' '.join(said)
    + notes(found)
  )


def _asked(rows: Rows) -> list[tuple[str, float]]:
  """Every request that any seed could meet."""
  met = [r for row in rows for r in row['requests'] if r['refused'] is None]
  return list(dict.fromkeys((r['kind'], r['requested']) for r in met))


def _line(regime: str, asked: tuple[str, float], rows: Rows) -> tuple[str, ...]:
  kind, value = asked
  words, unit, reached = ASKED[kind]
  every = [(row, r) for row in rows for r in row['requests']]
  mine = [(row, r) for row, r in every if (r['kind'], r['requested']) == asked]
  met = [(row, r) for row, r in mine if r['refused'] is None]
  lost = [100 * (_original(row) - r['test']['accuracy']) for row, r in met]
  met = [r for _, r in met]
  tests = [r['test'] for r in met]
  ends = [r['interval']['saved'] for r in met]
  low, high = min(e[0] for e in ends), max(e[1] for e in ends)
  return (
    regime,
    words.format(value * unit),
    spread(map(reached, tests)),
    spread(lost),
    percent(t['saved'] for t in tests),
    f'{100 * low:.1f} to {100 * high:.1f}',
    f'{len(met)} of {len(mine)}' if len(met) < len(mine) else str(len(met)),
  )


def _said(regime: str, rows: Rows) -> str:
  """What does not fit in the table: the network, its exits, their calibration, time."""
  own = percent(row['accuracy']['before'] for row in rows)
  was = percent(map(_original, rows))
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
  before = f' ({was} % before it was trained with heads)' if was != own else ''
  return (
    f'{regime.capitalize()}: the network alone {own} %{before}; exits {accuracy} %; '
    f'ECE of the exits {ece["before"]} % before and {ece["after"]} % after '
    f'temperature; executed at {gain}× the speed of the network at batch '
    f'{first["batch"]}, {first["device"]}.'
  )


def _original(row: dict[str, Any]) -> float:
  """Accuracy of the network before it was trained together with heads, if it was."""
  return row.get('original', {}).get('test', row['accuracy']['before'])


def _mean(values: Iterable[float]) -> float:
  return statistics.mean(values)


def composed() -> str:
  """On networks that are small already; a dash where there is no result."""
  parts = (_composed(*file) for file in files('sidenet', 'mainnet').items())
  return '\n\n'.join(parts) or 'SideNet on a pruned and on an int8 network: –'


def _composed(path: Path, found: dict[str, Any]) -> str:
  lines = []
  for name in dict.fromkeys(row['mainnet'] for row in found['rows']):
    mine = [row for row in found['rows'] if row['mainnet'] == name]
    tests = [row['test'] for row in mine]
    line = (
      name,
      f'{100 * mine[0]["accuracy"]:.2f}',
      f'{mine[0]["flops"] / 1e6:.1f}',
      f'{mine[0]["bytes"] / 1024:.0f}',
      percent(test['accuracy'] for test in tests),
      spread(test['drop'] for test in tests),
      percent(test['saved'] for test in tests),
      str(len(mine)),
    )
    lines.append(line)
  config = found['config']
  return (
    f'SideNets on networks that are small already, {config["model"]} on '
    f'{config["data"]}, a drop of {config["options"]["drop"]:g} points asked for '
    f'({link(path)}):\n\n' + table(COMPOSED, lines)
  )
