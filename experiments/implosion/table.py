"""Network Implosion: erasing without retraining, and with, beside the controls."""

from pathlib import Path
from typing import Any

from experiments.found import files, link, percent, table

COLUMNS = 8  # numbers of erased units that a table shows
NAMES = {
  'priority': 'priority',
  'random': 'random erasure',
  'scratch': 'same shape from scratch',
}


def one_shot() -> str:
  """One table per result file; a dash where there is none."""
  found = files('implosion', 'importance', 'erased')
  parts = (_one_shot(*file) for file in found.items())
  return '\n\n'.join(parts) or 'Network Implosion, erased without retraining: –'


def retrained() -> str:
  """One table per result file; a dash where there is none."""
  found = files('implosion', 'method', 'accuracy')
  parts = (_retrained(*file) for file in found.items())
  return '\n\n'.join(parts) or 'Network Implosion, erased and retrained: –'


def _one_shot(path: Path, found: dict[str, Any]) -> str:
  rows = found['rows']
  counts = sorted({row['erased'] for row in rows})
  shown = counts[:: -(-len(counts) // COLUMNS)]
  lines = []
  for importance in dict.fromkeys(row['importance'] for row in rows):
    of = [row for row in rows if row['importance'] == importance]
    at = [[row['accuracy'] for row in of if row['erased'] == n] for n in shown]
    lines.append([importance, *(percent(each) if each else '–' for each in at)])
  return (
    f'Network Implosion, {_what(found)}: test accuracy in % after erasing so many '
    'residual units, batch statistics recalibrated, not retrained '
    f'({link(path)}):\n\n' + table(['erased', *map(str, shown)], lines)
  )


def _retrained(path: Path, found: dict[str, Any]) -> str:
  rows = found['rows']
  lines = []
  for method in dict.fromkeys(row['method'] for row in rows):
    of = [row for row in rows if row['method'] == method]
    before, after = of[0]['units']
    erased = [row['rounds'][-1]['held_out'] for row in of if row.get('rounds')]
    lines.append(
      (
        NAMES.get(method, method),
        f'{before} → {after}' if before != after else f'{after}',
        percent(last['recalibrated'] for last in erased) if erased else '–',
        percent(last['after'] for last in erased) if erased else '–',
        percent(row['accuracy'] for row in of),
        str(len(of)),
      )
    )
  head = ('', 'units', 'held out, last erasure', 'retrained', 'test accuracy', 'seeds')
  return (
    f'Network Implosion, {_what(found)}: units erased and the rest retrained, in '
    'rounds; accuracy in %, mean ± standard deviation '
    f'({link(path)}):\n\n' + table(head, lines)
  )


def _what(found: dict[str, Any]) -> str:
  config = found['config']
  start = ' from a checkpoint' if config.get('pretrained') else ''
  return f'{config["model"]} on {config["data"]}{start}'
