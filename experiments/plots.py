"""Draws the committed result files of the depth methods; nothing is typed.

  python -m experiments.plots

writes SVG files beside the JSON: for NetCut accuracy, cost and depth against beta, and
the importance of the exits over training; for Network Implosion accuracy against the
number of erased units; for SideNet accuracy against FLOPs, and how calibrated its exits
are. Only the charts that README and guides show are committed.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path

from matplotlib.figure import Figure

from depthprune.report import charts, exit_charts, style
from depthprune.train.result import Accuracies, CascadeResult, Change, structured
from experiments.implosion.oneshot import by_importance
from experiments.result_files import Row, files_with

Rows = Sequence[Row]


def figures() -> Iterator[tuple[Path, Figure]]:
  """(path, chart) for every result file that there is."""
  for path, content in files_with('netcut', 'beta').items():
    # The method of the paper; its ablations are in the table.
    rows = content['rows']
    rows = [r for r in rows if r.get('aggregate') == 'log' and not r['gamma']]
    yield _beside(path, 'beta'), charts.against_beta(rows)
    yield _beside(path, 'importance'), charts.exit_map(histories(rows))
  for path, content in files_with('implosion', 'importance', 'erased').items():
    by_name = by_importance(content['rows'])
    chart = charts.erased_curve({name: {'before': c} for name, c in by_name.items()})
    yield _beside(path, 'erased'), chart
  for path, content in files_with('implosion', 'method', 'rounds').items():
    chart = charts.erased_curve(retrained(content['rows']), 'held-out accuracy')
    yield _beside(path, 'erased'), chart
  for path, content in files_with('sidenet', 'regime', 'curve').items():
    yield _beside(path, 'curve'), exit_charts.compute_curve(cascades(content['rows']))
    first = content['rows'][0]
    yield (
      _beside(path, 'reliability'),
      exit_charts.reliability(structured(first, CascadeResult).calibration),
    )


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


def retrained(rows: Rows) -> charts.Curves:
  """{method: {'before', 'after'}} over rounds; the control from scratch has none."""
  runs: dict[str, list] = {}
  for row in rows:
    if row.get('rounds'):
      rounds = [
        (each['units'], structured(each['held_out'], Accuracies))
        for each in row['rounds']
      ]
      runs.setdefault(row['method'], []).append(rounds)
  return {method: charts.collect_curve(*rounds) for method, rounds in runs.items()}


def cascades(rows: Rows) -> dict:
  """{regime: accuracy by cost, over the seeds}."""
  regimes = dict.fromkeys(row['regime'] for row in rows)
  of = lambda regime: [row for row in rows if row['regime'] == regime]
  return {
    regime: exit_charts.collect_series(*map(as_run, of(regime))) for regime in regimes
  }


def as_run(row: Row) -> tuple[CascadeResult, Accuracies, Change]:
  """What `exit_charts.collect_series` draws of a row of a table of cascades."""
  return (
    structured(row, CascadeResult),
    structured(row['accuracy'], Accuracies),
    structured(row['flops'], Change),
  )


def _beside(path: Path, chart: str) -> Path:
  return path.with_name(f'{path.stem}_{chart}.svg')


if __name__ == '__main__':
  for path, figure in figures():
    style.save(figure, path)
    print(path)
