"""The report of a sweep: its settings in a table, a chart, and a page with both."""

import math
import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, NotRequired, TypedDict

from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, PercentFormatter
from rich.console import Group
from rich.text import Text

from depthprune import methods
from depthprune.cascades.pareto import efficient
from depthprune.report.exit_charts import name_points
from depthprune.report.numbers import NONE, count, percent, spread
from depthprune.report.run_files import RunError
from depthprune.report.screen import PLAIN, indented, titled_table
from depthprune.report.style import FIRST, INK, LINE, MUTED, WIDE, new_figure, save
from depthprune.report.tables import Table
from depthprune.run import config
from depthprune.storage import files
from depthprune.train.options import shown
from depthprune.train.recipe import COSTS
from depthprune.train.result import Accuracies, Latency, SweepResult, structured

SWEEP, PLOT, PAGE = 'sweep.json', 'front.svg', 'report.html'
FRONT = '★ on the front: no other setting costs less and is as good on held-out data'
SEEDS = 'of several seeds, the mean ± standard deviation'


class SweptRun(TypedDict):
  """One run of a sweep: its settings, and its result or why it was refused."""

  folder: str
  settings: dict[str, Any]
  result: dict[str, Any] | None
  refused: str | None


class SweepFile(TypedDict):
  """The entries of `sweep.json`."""

  config: dict[str, Any]
  swept: dict[str, list[Any]]
  versions: NotRequired[dict[str, str]]
  command: NotRequired[str]
  runs: list[SweptRun]


class SweptSetting(NamedTuple):
  """One setting of a sweep, with the results of its seeds.

  Attributes:
    values: values of the options that were swept, without the seed.
    results: results of the finished runs.
    runs: number of runs, finished or not.
    of: the cost that counts, 'flops' or 'params'.
    label: a name of its own.
  """

  values: tuple[Any, ...]
  results: tuple[SweepResult, ...]
  runs: int
  of: str
  label: str = ''

  @property
  def name(self) -> str:
    return self.label or ' '.join(map(shown, self.values)) or 'all seeds'

  def mean(self, of: Callable[[SweepResult], float]) -> float:
    """Averages a value of every finished run."""
    return statistics.mean(map(of, self.results))

  @property
  def cost(self) -> float:
    """Mean cost that is left."""
    return self.mean(lambda result: getattr(result, self.of).after)


def read(path: str | Path) -> dict[str, Any]:
  """Reads the sweep.json of a directory; raises RunError if there is none."""
  file = Path(path) / SWEEP
  try:
    sweep = files.read_json(file, SweepFile, RunError)
  except RunError as error:
    raise RunError(
      f'{error}; expected what `depthprune sweep` wrote: start the same sweep again, '
      'it goes on from there'
    ) from error
  try:
    config.from_json(sweep['config'])
    for run in sweep['runs']:
      if {*run['settings']} != {*sweep['swept']}:
        raise ValueError(f'settings of {run["folder"]:.40}: expected those of `swept`')
      if run['result']:
        structured(run['result'], SweepResult)
  except ValueError as error:
    raise RunError(
      f'{file}: {error}; it was written by another program or version'
    ) from error
  return dict(sweep)


def settings(sweep: Mapping[str, Any]) -> list[SweptSetting]:
  """Returns all settings of a sweep, in order."""
  first = sweep['config']
  target = methods.recipe(first['method']).target(first['options'])
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


def front(swept: Iterable[SweptSetting]) -> list[SweptSetting]:
  """Returns the settings that no other beats in both cost and held-out accuracy.

  They are sorted by falling cost.
  """
  at = lambda s: (s.cost, -s.mean(lambda r: _after(r.held_out)))
  measured = [setting for setting in swept if setting.results]
  return efficient([s for s in measured if all(map(math.isfinite, at(s)))], at)


def swept_names(sweep: Mapping[str, Any]) -> list[str]:
  """Returns the names of the options that were swept, without the seed."""
  return [name.replace('_', ' ') for name in sweep['swept'] if name != 'seed']


def table(names: Sequence[str], swept: Sequence[SweptSetting]) -> Table:
  """Returns a row for every setting, with dashes for missing results.

  Args:
    names: names of the settings' values.
    swept: the settings.
  """
  best = front(swept)
  counts = any(s.runs > 1 or not s.results for s in swept)
  head = (*names, *('test', 'held-out', 'FLOPs', 'params', 'speed'))
  return Table(
    (*head, *('runs',) * counts, ''),
    [(*_row(s), *(_finished(s),) * counts, '★' if s in best else '') for s in swept],
  )


def screen(sweep: Mapping[str, Any]) -> Group:
  """Returns the table of a sweep and its notes for `rich.print`."""
  head, lines = table(swept_names(sweep), settings(sweep))
  first, swept = sweep['config'], sweep['swept']
  several = lambda key: ', '.join(map(str, swept.get(key, [first[key]])))
  title = f'{first["method"]}, {several("model")} on {several("data")}'
  cells = titled_table(title, **PLAIN)
  for name in head:
    cells.add_column(name, justify='right', no_wrap=True)
  for line in lines:
    cells.add_row(*line)
  said = [*explained(settings(sweep)), *refused(sweep)]
  return Group(cells, Text(), *indented(said))


def refused(sweep: Mapping[str, Any]) -> list[str]:
  """Returns which runs were refused, and why."""
  return [f'{r["folder"]}: {r["refused"]}' for r in sweep['runs'] if r['refused']]


def explained(swept: Sequence[SweptSetting]) -> list[str]:
  """Returns how to read the table: the network before, the front and the seeds."""
  runs = max((len(s.results) for s in swept), default=0)
  return [*_before(swept), FRONT * bool(front(swept)), SEEDS * (runs > 1)]


def chart(swept: Sequence[SweptSetting], width: float = WIDE) -> Figure:
  """Draws test accuracy against the cost that is left: seeds, means and the front.

  A line joins the settings of the front, and the network before pruning is dashed. Of
  one network the cost is the share that is left, of several it is a number.

  Args:
    swept: the settings.
    width: inches of the chart.
  """
  measured = [setting for setting in swept if setting.results]
  best, alike = front(measured), len(networks_before(measured)) == 1
  part = 'kept' if alike else 'after'
  left = lambda s, r: getattr(getattr(r, s.of), part)
  at = lambda s: (s.mean(lambda r: left(s, r)), s.mean(lambda r: _after(r.accuracy)))
  with new_figure(3.4, width) as figure:
    axes = figure.subplots()
    for s in measured:
      points = [(left(s, r), _after(r.accuracy)) for r in s.results]
      axes.plot(*zip(*points), '.', color=MUTED, ms=4, alpha=0.6)
    for s in measured:
      filled = FIRST if s in best else 'none'
      axes.plot(*at(s), 'o', color=FIRST, mfc=filled, ms=6)
    if best:
      axes.plot(*zip(*map(at, best)), color=FIRST, lw=1.5, label='front')
      if alike:
        before = statistics.mean(s.mean(lambda r: r.accuracy.before) for s in measured)
        axes.axhline(before, color=MUTED, lw=1, ls=(0, (4, 3)), label='before')
      axes.legend(loc='lower right', bbox_to_anchor=(1, 1), ncols=2, frameon=False)
    cost = COSTS[measured[0].of] if measured else 'FLOPs'
    axes.set_xlabel(f'{cost}, share that is left' if alike else f'{cost} that are left')
    axes.set_ylabel('test accuracy', color=INK)
    axes.xaxis.set_major_locator(MaxNLocator(round(width), steps=[1, 2, 5, 10]))
    axes.xaxis.set_major_formatter(
      PercentFormatter(1) if alike else FuncFormatter(lambda x, _: count(x))
    )
    axes.yaxis.set_major_formatter(PercentFormatter(1))
    axes.grid(color=LINE, lw=0.5)
    figure.draw_without_rendering()  # lays out: names need to know where points are
    drawn = {s.name: at(s) for s in measured}
    name_points(axes, {k: v for k, v in drawn.items() if all(map(math.isfinite, v))})
  return figure


def draw(sweep: Mapping[str, Any], path: Path) -> Path:
  """Writes the chart beside sweep.json, and returns its file."""
  save(chart(settings(sweep)), path / PLOT)
  return path / PLOT


def _row(s: SweptSetting) -> Sequence[str]:
  of = lambda value, digits=2: (
    spread(map(value, s.results), digits) if s.results else NONE
  )
  times = [r.latency_ms['128'] for r in s.results if '128' in r.latency_ms]
  return (
    *map(shown, s.values),
    _accuracy([r.accuracy for r in s.results]),
    _accuracy([r.held_out for r in s.results]),
    of(lambda r: 100 * r.flops.kept, 1),
    of(lambda r: 100 * r.params.kept, 1),
    _speed(times),
  )


def _finished(s: SweptSetting) -> str:
  finished = len(s.results)
  return f'{finished}' if finished == s.runs else f'{finished}/{s.runs}'


def _before(swept: Sequence[SweptSetting]) -> Iterator[str]:
  """Yields sentences about the network before, and where speed was measured."""
  results = [result for s in swept for result in s.results]
  if not results:
    return
  before = networks_before(swept)
  if len(before) == 1:
    ((flops, params),) = before
    accuracy = percent(statistics.mean(r.accuracy.before for r in results), 2)
    yield (
      f'before: test accuracy {accuracy}, {count(flops)} FLOPs (1 MAC = 2), '
      f'{count(params)} parameters'
    )
  else:
    yield 'FLOPs and params are parts of different networks: each run of its own'
  timed = dict.fromkeys(r.device for r in results if '128' in r.latency_ms)
  speed = f', but for speed: × that before, at batch 128, {"; ".join(timed)}'
  yield f'All in %{speed * bool(timed)}'


def networks_before(swept: Iterable[SweptSetting]) -> set[tuple[float, float]]:
  """Returns (FLOPs, parameters) of the networks that the runs began with."""
  return {(r.flops.before, r.params.before) for s in swept for r in s.results}


def _accuracy(each: Sequence[Accuracies]) -> str:
  """Returns the accuracy after the cut in percent, a dash where it was not measured."""
  after = [accuracy.after for accuracy in each if accuracy.after is not None]
  if not each or len(after) < len(each):
    return NONE
  return spread(100 * value for value in after)


def _speed(times: Sequence[Latency]) -> str:
  """Returns the speed in units of that before, where any seed showed a difference."""
  kinds = {each.difference.kind for each in times}
  if kinds <= {'not measured'}:
    return NONE
  if kinds <= {'no difference', 'not measured'}:
    return 'no difference'
  return spread(each.speedup for each in times)


def _after(accuracy: Accuracies) -> float:
  return math.nan if accuracy.after is None else accuracy.after
