"""Whole runs from Python: what `depthprune run` does, and what came of a run."""

import dataclasses
import difflib
import functools
import io
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from rich.console import Console

from depthprune import methods
from depthprune.report import charts, page, run_files, screen, style, tables
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
      reads; a cascade is in `path / 'cascade'`, for `load_cascade`, and a language
      model with early exits in `path / 'exits'`, for `load_exits`.
    result: the numbers: `accuracy`, `flops` and `params`, each with `.before` and
      `.after`, `latency_ms` by batch size, `widths` by layer, and more.
  """

  path: Path
  result: Result

  def __str__(self) -> str:
    text = io.StringIO()
    Console(file=text, width=80, color_system=None, force_jupyter=False).print(
      screen.screen(self.result)
    )
    lines = text.getvalue().splitlines()
    return '\n'.join(line.rstrip() for line in lines).rstrip()

  @functools.cached_property
  def charts(self) -> dict[str, Figure]:
    """The charts of the run's report, matplotlib figures by their titles."""
    run, cascade = run_files.read(self.path), self.result.cascade
    pictures = [*page.pictures(run)]
    if cascade:
      pictures = [*page.cascade_pictures(self.result, cascade), *pictures]
    figures = {picture.title: picture.draw(style.WIDE) for picture in pictures}
    if tables.narrowed(self.result):
      figures['Widths of the layers'] = charts.width_chart(self.result.widths)
    return figures


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
