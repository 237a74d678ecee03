"""What a sweep reached: a table of its settings, and the front of the best."""

import json
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter
from rich.console import Group
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from depthprune import methods
from depthprune.cascades.pareto import efficient
from depthprune.report.exit_charts import name_points
from depthprune.report.numbers import count, spread
from depthprune.report.run_files import RunError
from depthprune.report.sentences import NONE
from depthprune.report.style import FIRST, INK, LINE, MUTED, save, styled
from depthprune.train.options import shown
from depthprune.train.recipe import COSTS
from depthprune.train.result import Accuracies, SweepResult, structured

SWEEP, PLOT = 'sweep.json', 'front.svg'
READING = (
  '★ on the front: no other setting costs less and is as good on held-out data. Of '
  'several seeds the mean ± standard deviation'
)


class SweptSetting(NamedTuple):
  """One setting of a sweep, over its seeds.

  Attributes:
    values: of the options that were swept, but for the seed.
    results: of the runs that are finished. runs: how many there are to be.
    of: the cost that counts, 'flops' or 'params'.
  """

  values: tuple[Any, ...]
  results: tuple[SweepResult, ...]
  runs: int
  of: str

  @property
  def name(self) -> str:
    return ' '.join(map(shown, self.values)) or 'all seeds'

  def mean(self, of: Callable[[SweepResult], float]) -> float:
    """Of a value of every run."""
    return statistics.mean(map(of, self.results))

  @property
  def share(self) -> float:
    """Of the cost that is left, in the mean."""
    return self.mean(lambda result: getattr(result, self.of).kept)


def read(path: str | Path) -> dict[str, Any]:
  """sweep.json of a directory. Raises RunError where it is not one."""
  file = Path(path) / SWEEP
  try:
    return json.loads(file.read_text())
  except (OSError, ValueError) as error:
    raise RunError(
      f'{file}: expected what `depthprune sweep` wrote, got {error}; start the same '
      'sweep again, it goes on from there'
    ) from error


def settings(sweep: Mapping[str, Any]) -> list[SweptSetting]:
  """All settings of a sweep, in order; results are those of their seeds."""
  config = sweep['config']
  target = methods.recipe(config['method']).target(config['options'])
  of = 'params' if target and target.cost == 'params' else 'flops'
  groups: dict[tuple, list[Mapping[str, Any]]] = {}
  for run in sweep['runs']:
    values = tuple(v for name, v in run['settings'].items() if name != 'seed')
    groups.setdefault(values, []).append(run)
  return [
    SweptSetting(
      values,
      tuple(structured(r['result'], SweepResult) for r in runs if r['result']),
      len(runs),
      of,
    )
    for values, runs in groups.items()
  ]


def front(found: Iterable[SweptSetting]) -> list[SweptSetting]:
  """Those that no other beats in cost and held-out accuracy, by falling cost."""
  there = [setting for setting in found if setting.results]
  return efficient(there, lambda s: (s.share, -s.mean(lambda r: _after(r.held_out))))


def rows(sweep: Mapping[str, Any]) -> tuple[Sequence[str], list[Sequence[str]]]:
  """Head and lines of the table; a dash where there is no result yet."""
  found = settings(sweep)
  best = front(found)
  options = [name.replace('_', ' ') for name in sweep['swept'] if name != 'seed']
  head = (*options, *('test', 'held-out', 'FLOPs', 'params', 'speed-up'))
  return (*head, 'runs', ''), [_row(s, '★' if s in best else '') for s in found]


def screen(sweep: Mapping[str, Any]) -> Group:
  """The whole sweep for `rich.print`."""
  head, lines = rows(sweep)
  config = sweep['config']
  table = Table(
    title=f'{config["method"]}, {config["model"]} on {config["data"]}',
    title_justify='left',
    title_style='bold',
    box=None,
    pad_edge=False,
    padding=(0, 1),
  )
  for name in head:
    table.add_column(name, justify='right', no_wrap=True)
  for line in lines:
    table.add_row(*line)
  refused = [f'{r["folder"]}: {r["refused"]}' for r in sweep['runs'] if r['refused']]
  said = [_before(sweep), READING, *refused]
  return Group(table, Text(), *(Padding(Text(line), (0, 2)) for line in said if line))


def chart(sweep: Mapping[str, Any]) -> Figure:
  """Test accuracy against the cost that is left: seeds, means, and the front.

  The line joins the settings of the front; the network before is dashed.
  """
  found = [setting for setting in settings(sweep) if setting.results]
  best = front(found)
  with styled():
    figure = Figure(figsize=(7.2, 3.4), layout='constrained')
    axes = figure.subplots()
    for s in found:
      points = [(getattr(r, s.of).kept, _after(r.accuracy)) for r in s.results]
      axes.plot(*zip(*points), '.', color=MUTED, ms=4, alpha=0.6)
    at = lambda s: (s.share, s.mean(lambda r: _after(r.accuracy)))
    for s in found:
      filled = FIRST if s in best else 'none'
      axes.plot(*at(s), 'o', color=FIRST, mfc=filled, ms=6)
    if best:
      axes.plot(*zip(*map(at, best)), color=FIRST, lw=1.5, label='front')
      before = statistics.mean(s.mean(lambda r: r.accuracy.before) for s in found)
      axes.axhline(before, color=MUTED, lw=1, ls=(0, (4, 3)), label='before')
      axes.legend(loc='lower right', bbox_to_anchor=(1, 1), ncols=2, frameon=False)
    axes.set_xlabel(f'{COSTS[found[0].of] if found else "FLOPs"}, share that is left')
    axes.set_ylabel('test accuracy', color=INK)
    for axis in (axes.xaxis, axes.yaxis):
      axis.set_major_formatter(PercentFormatter(1))
    axes.grid(color=LINE, lw=0.5)
    figure.draw_without_rendering()  # lays out: names need to know where points are
    name_points(axes, {s.name: at(s) for s in found})
  return figure


def draw(sweep: Mapping[str, Any], path: Path) -> Path:
  """Writes the chart beside sweep.json; returns its file."""
  save(chart(sweep), path / PLOT)
  return path / PLOT


def _row(s: SweptSetting, mark: str) -> Sequence[str]:
  of = lambda value, digits=2: (
    spread(map(value, s.results), digits) if s.results else NONE
  )
  times = [r.latency_ms['128'].speedup for r in s.results if '128' in r.latency_ms]
  finished = len(s.results)
  return (
    *map(shown, s.values),
    of(lambda r: 100 * _after(r.accuracy)),
    of(lambda r: 100 * _after(r.held_out)),
    of(lambda r: 100 * r.flops.kept, 1),
    of(lambda r: 100 * r.params.kept, 1),
    spread(times) if times else NONE,
    f'{finished}' if finished == s.runs else f'{finished}/{s.runs}',
    mark,
  )


def _before(sweep: Mapping[str, Any]) -> str:
  """What the costs are shares of, and where speed was measured."""
  results = [result for s in settings(sweep) for result in s.results]
  if not results:
    return ''
  first = results[0]
  accuracy = 100 * statistics.mean(r.accuracy.before for r in results)
  return (
    f'before: test accuracy {accuracy:.2f} %, {count(first.flops.before)} FLOPs (1 MAC '
    f'= 2), {count(first.params.before)} parameters. All in %, but for speed-up: × at '
    f'batch 128, {first.device}'
  )


def _after(found: Accuracies) -> float:
  return found.after or 0.0
