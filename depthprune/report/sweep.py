"""What a sweep reached: a table of its settings, and the front of the best."""

import json
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter
from rich.console import Group
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from depthprune.cascade.pareto import efficient
from depthprune.report.exit_charts import name_points
from depthprune.report.numbers import count, spread
from depthprune.report.run_files import RunError
from depthprune.report.sentences import UNITS
from depthprune.report.style import FIRST, INK, LINE, MUTED, save, styled
from depthprune.train.options import shown

SWEEP, PLOT = 'sweep.json', 'front.svg'
NONE = '–'
READING = (
  '★ on the front: no other setting costs less and is as good on held-out data. Of '
  'several seeds the mean ± standard deviation'
)


class Setting(NamedTuple):
  """One setting of a sweep, over its seeds.

  Attributes:
    values: of the options that were swept, but for the seed.
    results: of the runs that are finished, as sweep.json has them. runs: how many there
      are to be. of: the cost that counts, 'flops' or 'params'.
  """

  values: tuple[Any, ...]
  results: tuple[Mapping[str, Any], ...]
  runs: int
  of: str

  @property
  def name(self) -> str:
    return ' '.join(map(shown, self.values)) or 'all seeds'

  def mean(self, key: str, when: str = 'after') -> float:
    return statistics.mean(result[key][when] for result in self.results)

  @property
  def share(self) -> float:
    """Of the cost that is left, in the mean."""
    return statistics.mean(_share(result, self.of) for result in self.results)


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


def settings(sweep: Mapping[str, Any]) -> list[Setting]:
  """All settings of a sweep, in order; results are those of their seeds."""
  options = sweep['config']['options']
  of = options['of'] if options.get('of') in UNITS else 'flops'
  groups: dict[tuple, list[Mapping[str, Any]]] = {}
  for run in sweep['runs']:
    values = tuple(v for name, v in run['settings'].items() if name != 'seed')
    groups.setdefault(values, []).append(run)
  return [
    Setting(values, tuple(r['result'] for r in runs if r['result']), len(runs), of)
    for values, runs in groups.items()
  ]


def front(found: Iterable[Setting]) -> list[Setting]:
  """Those that no other beats in cost and held-out accuracy, by falling cost."""
  there = [setting for setting in found if setting.results]
  return efficient(there, lambda s: (s.share, -s.mean('held_out')))


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
      points = [(_share(r, s.of), r['accuracy']['after']) for r in s.results]
      axes.plot(*zip(*points), '.', color=MUTED, ms=4, alpha=0.6)
    at = lambda s: (s.share, s.mean('accuracy'))
    for s in found:
      filled = FIRST if s in best else 'none'
      axes.plot(*at(s), 'o', color=FIRST, mfc=filled, ms=6)
    if best:
      axes.plot(*zip(*map(at, best)), color=FIRST, lw=1.5, label='front')
      before = statistics.mean(s.mean('accuracy', 'before') for s in found)
      axes.axhline(before, color=MUTED, lw=1, ls=(0, (4, 3)), label='before')
      axes.legend(loc='lower right', bbox_to_anchor=(1, 1), ncols=2, frameon=False)
    axes.set_xlabel(f'{UNITS[found[0].of] if found else "FLOPs"}, share that is left')
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


def _row(s: Setting, mark: str) -> Sequence[str]:
  of = lambda values, digits=2: spread(values, digits) if s.results else NONE
  when = lambda key: of(100 * r[key]['after'] for r in s.results)
  share = lambda key: of((100 * _share(r, key) for r in s.results), 1)
  times = [t for r in s.results if (t := _speedup(r)) is not None]
  return (
    *map(shown, s.values),
    when('accuracy'),
    when('held_out'),
    share('flops'),
    share('params'),
    spread(times) if times else NONE,
    f'{len(s.results)}' if len(s.results) == s.runs else f'{len(s.results)}/{s.runs}',
    mark,
  )


def _before(sweep: Mapping[str, Any]) -> str:
  """What the costs are shares of, and where speed was measured."""
  results = [run['result'] for run in sweep['runs'] if run['result']]
  if not results:
    return ''
  first, device = results[0], results[0]['device']
  accuracy = 100 * statistics.mean(r['accuracy']['before'] for r in results)
  flops, params = (count(first[key]['before']) for key in ('flops', 'params'))
  return (
    f'before: test accuracy {accuracy:.2f} %, {flops} FLOPs (1 MAC = 2), {params} '
    f'parameters. All in %, but for speed-up: × at batch 128, {device}'
  )


def _share(result: Mapping[str, Any], key: str) -> float:
  return result[key]['after'] / result[key]['before']


def _speedup(result: Mapping[str, Any]) -> float | None:
  return result.get('latency_ms', {}).get('128', {}).get('speedup')
