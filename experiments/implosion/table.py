"""Network Implosion: erasing without retraining, and with, beside the controls."""

from pathlib import Path
from typing import Any

from experiments.found import files, link, notes, percent, table

COLUMNS = 8  # numbers of erased units that a table shows
HEAD = (
  *('', 'units', 'epochs', 'held out, last erasure', 'retrained', 'test accuracy'),
  'seeds',
)
NAMES = {'random': 'random erasure', 'scratch': 'same shape from scratch'}

Rows = list[dict[str, Any]]


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


def by_importance(rows: Rows) -> dict[str, dict[int, list[float]]]:
  """{importance: {erased: accuracies}} of one-shot rows; all begin uncut ('none').

  A network that was cut as well as masked counts once, masked.
  """
  curves: dict[str, dict[int, list[float]]] = {}
  for row in rows:
    if not row.get('cut'):
      curve = curves.setdefault(row['importance'], {})
      curve.setdefault(row['erased'], []).append(row['accuracy'])
  uncut = curves.pop('none', {})
  return {importance: {**uncut, **curve} for importance, curve in curves.items()}


def _one_shot(path: Path, found: dict[str, Any]) -> str:
  curves = by_importance(found['rows'])
  counts = sorted({erased for curve in curves.values() for erased in curve})
  shown = counts[:: -(-len(counts) // COLUMNS)]
  at = lambda curve, n: percent(curve[n]) if n in curve else '–'
  lines = [[name, *(at(curve, n) for n in shown)] for name, curve in curves.items()]
  return (
    f'Network Implosion, {_what(found)}: accuracy in %, on test images that decide '
    'nothing, after erasing so many residual units, batch statistics measured anew, '
    f'not retrained{_cut(found["rows"])} ({link(path)}):\n\n'
    + table(['erased', *map(str, shown)], lines)
  )


def _cut(rows: Rows) -> str:
  """What the networks that were really cut score."""
  return ''.join(
    f'; {row["importance"]} with {row["erased"]} units cut out, '
    f'not only masked: {100 * row["accuracy"]:.2f}'
    for row in rows
    if row.get('cut')
  )


def _retrained(path: Path, found: dict[str, Any]) -> str:
  rows = found['rows']
  methods = dict.fromkeys(row['method'] for row in rows)
  lines = [
    _line(method, [row for row in rows if row['method'] == method])
    for method in methods
  ]
  uncut = [row['accuracy_before'] for row in rows if row['method'] == 'priority']
  return (
    f'Network Implosion, {_what(found)}: units erased and the rest retrained, in '
    f'rounds; accuracy in %, mean ± standard deviation; uncut {percent(uncut)} '
    f'({link(path)}).{notes(found)}\n\n' + table(HEAD, lines)
  )


def _line(method: str, rows: Rows) -> tuple[str, ...]:
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


def _what(found: dict[str, Any]) -> str:
  config = found['config']
  start = ' from a checkpoint' if config.get('pretrained') else ''
  return f'{config["model"]} on {config["data"]}{start}'
