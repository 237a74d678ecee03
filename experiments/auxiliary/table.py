"""Auxiliary training beside its controls: accuracy, and what training costs."""

from pathlib import Path
from typing import Any

from depthprune.report.numbers import spread
from experiments.found import files, link, notes, percent, table

HEAD = ('', 'test', 'against alone', 'epochs', 'training FLOPs', 'seeds')
NAMES = {
  'alone': 'compact alone',
  'longer': 'compact alone, same training FLOPs as all',
  'distilled': 'distilled from the wide network',
  'deep': 'deep supervision',
  'all': 'auxiliary path, all connections',
  'search': 'auxiliary path, searched',
}

COMPOSED = ('', 'between', 'test', 'MFLOPs', 'seeds')
COMPOSITIONS = {
  ('gates', 'none'): 'alone, then trainable gates to half of the FLOPs',
  ('gates', 'all'): 'beside a path, then trainable gates to half of the FLOPs',
  ('netcut', 'none'): 'NetCut, then trained again alone',
  ('netcut', 'all'): 'NetCut, then trained again beside a path',
}

Rows = list[dict[str, Any]]


def auxiliary() -> str:
  """One table per result file; a dash where there is none."""
  found = files('auxiliary', 'method', 'accuracy')
  return '\n\n'.join(_table(*file) for file in found.items()) or 'Auxiliary path: –'


def _table(path: Path, found: dict[str, Any]) -> str:
  config, rows = found['config'], found['rows']
  # Of pixels it is the mean IoU that counts.
  score = 'miou' if 'miou' in rows[0].get('scores', {}) else 'accuracy'
  rows = [{**row, 'score': row.get('scores', row)[score]} for row in rows]
  alone = {row['seed']: row for row in rows if row['method'] == 'alone'}
  lines = []
  for method, name in NAMES.items():
    mine = [row for row in rows if row['method'] == method]
    if mine:
      lines.append(_line(name, mine, alone))
  images = f', {config["subset"]:,} images' if config['subset'] else ''
  return (
    f'Auxiliary overparameterization, {config["model"]} on {config["data"]}{images}: '
    'what helped to train is cut away, and the same compact network is left; '
    f'{"mean IoU" if score == "miou" else "accuracy"} on test data in %, mean ± '
    'standard deviation; differences in points, seed by seed'
    f'{_searched(rows)} ({link(path)}).{notes(found)}\n\n' + table(HEAD, lines)
  )


def _line(name: str, rows: Rows, alone: dict[int, dict[str, Any]]) -> tuple[str, ...]:
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


def _searched(rows: Rows) -> str:
  """How many connections the search left open."""
  found = [row['structure']['open'] for row in rows if row['method'] == 'search']
  if not found:
    return ''
  open_ = spread(sum(each.values()) for each in found)
  return f'; the search left {open_} of {len(found[0])} connections open'


def composed() -> str:
  """Auxiliary training before and after other methods; a dash without a result."""
  parts = (_composed(*file) for file in files('auxiliary', 'what').items())
  return '\n\n'.join(parts) or 'Auxiliary training composed with other methods: –'


def _composed(path: Path, found: dict[str, Any]) -> str:
  lines = []
  for (what, structure), name in COMPOSITIONS.items():
    mine = [
      row
      for row in found['rows']
      if (row['what'], row['structure']) == (what, structure)
    ]
    if mine:
      scores = ([row[key] for row in mine] for key in ('between', 'accuracy'))
      cost = spread(row['flops'] / 1e6 for row in mine)
      lines.append((name, *map(percent, scores), cost, str(len(mine))))
  config = found['config']['gates0']
  images = f', {config["subset"]:,} images' if config['subset'] else ''
  return (
    f'Auxiliary training composed with other methods, {config["data"]}{images}; '
    f'accuracy after the first and after the second, in % ({link(path)}):\n\n'
    + table(COMPOSED, lines)
  )
