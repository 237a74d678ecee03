"""Draws the committed result files of the depth methods; nothing is typed.

python -m experiments.plots

writes SVG files beside the JSON: for NetCut accuracy, cost and depth against beta, and
the importance of the exits over training; for Network Implosion accuracy against the
number of erased units; for SideNet accuracy against FLOPs, and how calibrated its
exits are.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from depthprune.report import charts as depth
from depthprune.report import exit_charts as curves
from depthprune.report import exit_charts as exits
from depthprune.report import sentences as decision
from depthprune.report import style
from experiments.found import files
from experiments.implosion.table import by_importance

Rows = Sequence[dict[str, Any]]


def figures() -> Iterator[tuple[Path, Figure]]:
  """(where it goes, chart) for every result file that there is."""
  for path, found in files('netcut', 'beta').items():
    # The method of the paper; its ablations are in the table.
    rows = [r for r in found['rows'] if r.get('aggregate') == 'log' and not r['gamma']]
    yield _beside(path, 'beta'), depth.against_beta(rows)
    yield _beside(path, 'importance'), depth.importance_map(histories(rows))
  for path, found in files('implosion', 'importance', 'erased').items():
    by_name = by_importance(found['rows'])
    chart = depth.erased_curve({name: {'before': c} for name, c in by_name.items()})
    yield _beside(path, 'erased'), chart
  for path, found in files('implosion', 'method', 'rounds').items():
    chart = depth.erased_curve(retrained(found['rows']), 'held-out accuracy')
    yield _beside(path, 'erased'), chart
  for path, found in files('sidenet', 'regime', 'curve').items():
    by_regime: dict[str, list[dict[str, Any]]] = {}
    for row in found['rows']:
      by_regime.setdefault(row['regime'], []).append(row)
    results = {
      regime: curves.series(*({**row, 'cascade': row} for row in rows))
      for regime, rows in by_regime.items()
    }
    yield _beside(path, 'curve'), curves.compute_curve(results)
    first = found['rows'][0]
    yield _beside(path, 'reliability'), exits.reliability(first['calibration'])


def histories(rows: Rows) -> dict[str, tuple[list[dict], str]]:
  """{title: (lines as in gates.jsonl, exit that was kept)}, of the first seed."""
  seed = min(row['seed'] for row in rows)
  name = lambda number: f'exit{number:02}'
  return {
    f'β = {row["beta"]:g}': (
      [
        {'step': step, 'importance': {name(k): w for k, w in enumerate(ws, 1)}}
        for step, ws in row['importance_history']
      ],
      name(row['kept']),
    )
    for row in sorted(rows, key=lambda row: row['beta'])
    if row['seed'] == seed
  }


def retrained(rows: Rows) -> depth.Curves:
  """{method: {'before', 'after'}} over rounds; the control from scratch has none."""
  runs: dict[str, list] = {}
  for row in rows:
    if row.get('rounds'):
      runs.setdefault(row['method'], []).append(row['rounds'])
  return {method: decision.curve(*rounds) for method, rounds in runs.items()}


def _beside(path: Path, what: str) -> Path:
  return path.with_name(f'{path.stem}_{what}.svg')


if __name__ == '__main__':
  for path, figure in figures():
    style.save(figure, path)
    print(path)
