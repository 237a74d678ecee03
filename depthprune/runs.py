"""Whole runs from Python: what `depthprune run` does, and what came of a run."""

import dataclasses
import difflib
import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from rich.console import Console

from depthprune import methods
from depthprune.report import charts, exit_charts, page, run_files, screen, tables
from depthprune.run import rounds
from depthprune.run.config import OPTIONS, Config, default
from depthprune.train.options import ConfigError
from depthprune.train.result import Result


@dataclasses.dataclass(frozen=True)
class Run:
  """A finished run: what it reached, as numbers, as a table and as charts.

  `print(run)` shows the table that the command line ends with.

  Attributes:
    path: the run's directory. The small network is in `path / 'pruned'`, which `load`
      reads; a cascade is in `path / 'cascade'`, for `load_cascade`.
    result: the numbers: `accuracy`, `flops` and `params`, each with `.before` and
      `.after`, `latency_ms` by batch size, `widths` by layer, and more.
  """

  path: Path
  result: Result

  def __str__(self) -> str:
    console = Console(width=80, no_color=True, highlight=False)
    with console.capture() as captured:
      console.print(screen.screen(self.result))
    return captured.get().rstrip()

  @functools.cached_property
  def charts(self) -> dict[str, Figure]:
    """The charts of the run's report, matplotlib figures by their titles."""
    return dict(_charts(run_files.read(self.path)))


def run_method(method: str, show: bool = True, **options: Any) -> Run:
  """Trains a network, makes it smaller by a method, and measures what is left.

  It does what `depthprune run METHOD` does, and takes the same options:

    run = run_method('gates', model='resnet20', data='digits', target=0.5, epochs=20)
    print(run)
    pruned = load(run.path / 'pruned')

  Everything is written into the directory `workdir`, report.html too. A run that was
  stopped there is continued by the same call.

  Args:
    method: 'gates', 'netcut', 'implosion', 'sidenet' or 'auxiliary'.
    show: whether to draw progress bars.
    **options: what `depthprune run METHOD --help` lists, with underscores: `data`,
      `model`, `seed`, `epochs`, `workdir`, ..., and the options of the method.

  Returns:
    The finished `Run`.

  Raises:
    ConfigError: there is no such option, or a value cannot be used.
    ValueError: the method, the model or the data set is unknown, or the target cannot
      be reached.
    CutRefused: the cut costs too much accuracy.
    CheckpointError: the directory belongs to another run.
  """
  config = configured(method, **options)
  rounds.run(config, show)
  page.write(config.path)
  return load_run(config.path)


def load_run(path: str | Path) -> Run:
  """Reads what a finished run reached.

  Args:
    path: the directory that `run_method` or `depthprune run` wrote.

  Raises:
    RunError: the run has not finished, or the directory is not that of a run.
  """
  return Run(Path(path), run_files.read(path).result)


def configured(method: str, **options: Any) -> Config:
  """Returns the configuration of a run whose options have their names on the command
  line, or those of earlier versions.

  Raises:
    ConfigError: there is no such option, or a value cannot be used.
    ValueError: there is no such method.
  """
  kind = methods.recipe(method).options
  own = {field.name for field in dataclasses.fields(kind)}
  fields = {field.name for field in dataclasses.fields(Config)} - {'options'}
  by_option = {option: field for field, option in OPTIONS.items()}
  named = {by_option.get(name, name): value for name, value in options.items()}
  for name in named.keys() - own - fields:
    known = sorted(own | fields - {*OPTIONS} | {*by_option})
    near = difflib.get_close_matches(name, known, 3, cutoff=0)
    raise ConfigError(
      f'{name}: there is no such option of {method!r}; nearest: {", ".join(near)}'
    )
  chosen = {name: value for name, value in named.items() if name in own}
  rest = {name: value for name, value in named.items() if name not in own}
  return default(method, kind(**chosen), **rest)


def _charts(run: run_files.FinishedRun) -> Iterator[tuple[str, Figure]]:
  """Yields the titles and charts for which a run has data, as its page shows them."""
  result, recipe = run.result, methods.recipe(run.result.method)
  if cascade := result.cascade:
    series = exit_charts.collect_series((cascade, result.accuracy, result.flops))
    yield 'Accuracy against FLOPs', exit_charts.compute_curve({'': series})
    if cascade.shares:
      right = tables.accuracy_of_leavers(cascade)
      yield 'Where examples leave', exit_charts.leaving(cascade.shares, right)
  if recipe.erases_units and result.rounds:
    points = [(each.units, each.held_out) for each in result.rounds]
    curves = {'': charts.collect_curve(points)}
    yield 'Accuracy by erased units', charts.erased_curve(curves, 'held-out accuracy')
  for chart in recipe.charts:
    figure = charts.draw(chart, run)
    if figure is not None:
      yield chart.title, figure
  if tables.narrowed(result):
    yield 'Widths of the layers', charts.width_chart(result.widths)
  if run.history:
    target = recipe.target(result.options)
    fraction, cost = (target.fraction, target.cost) if target else (None, 'flops')
    yield 'Training', charts.training_curves(run.history, fraction, cost)
