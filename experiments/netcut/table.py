"""NetCut: the depth that was chosen, and what the cut cost, beside a single head."""

import statistics
from pathlib import Path
from typing import Any

from depthprune.report.numbers import spread
from experiments.found import files, link, percent, table

HEAD = (
  *('β', 'aggregate', 'exit kept', 'max w', 'accuracy, whole', 'cut', 'points'),
  *('a single head there', 'FLOPs, %', 'speed-up', 'seeds'),
)

Rows = list[dict[str, Any]]


def netcut() -> str:
  """One table per result file; a dash where there is none."""
  found = files('netcut', 'beta')
  return '\n\n'.join(_section(*file) for file in found.items()) or 'NetCut: –'


def _section(path: Path, found: dict[str, Any]) -> str:
  rows = [row for row in found['rows'] if 'beta' in row]
  single = [row for row in found['rows'] if row.get('method') == 'single']
  kinds = dict.fromkeys((r['beta'], r['aggregate'], r['gamma']) for r in rows)
  lines = [
    _line([r for r in rows if (r['beta'], r['aggregate'], r['gamma']) == kind], single)
    for kind in sorted(kinds, key=lambda kind: (kind[1] != 'log', kind[2], kind))
  ]
  config = found['config']
  return (
    f'NetCut, {config["model"]} on {config["data"]}, {config["gate_epochs"]} epochs, '
    f'{rows[0]["exits"]} exits, mean ± standard deviation; test accuracy in %; '
    'speed-up at batch 128, '
    f'{found["device"]} ({link(path)}):\n\n' + table(HEAD, lines)
  )


def _line(rows: Rows, single: Rows) -> tuple[str, ...]:
  first = rows[0]
  gamma = f', γ = {first["gamma"]:g}' if first['gamma'] else ''
  speedups = [r['latency_ms']['128']['speedup'] for r in rows if 'latency_ms' in r]
  return (
    f'{first["beta"]:g}',
    f'{first["aggregate"]}{gamma}',
    spread((row['kept'] for row in rows), 1),
    spread(row['max_importance'] for row in rows),
    percent(row['accuracy_before'] for row in rows),
    percent(row['accuracy_cut'] for row in rows),
    spread(100 * (row['accuracy_cut'] - row['accuracy_before']) for row in rows),
    _control(rows, single),
    percent(row['flops'] / row['flops_full'] for row in rows),
    spread(speedups) if speedups else '–',
    str(len(rows)),
  )


def _control(rows: Rows, single: Rows) -> str:
  """Mean accuracy of networks trained with one head, at the depths that were chosen."""
  at = lambda depth: [s['accuracy'] for s in single if s['depth'] == depth]
  depths = [row['kept'] for row in rows]
  if not all(map(at, depths)):
    return '–'
  return f'{100 * statistics.mean(statistics.mean(at(d)) for d in depths):.2f}'
