"""The report of a run: one HTML page without scripts, fonts or external addresses."""

import json
import math
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import jinja2
from markupsafe import Markup
from matplotlib.figure import Figure

from depthprune.report import charts, exit_charts, sentences, style, tables
from depthprune.report.run_files import FinishedRun, fitting, read
from depthprune.report.tables import Table
from depthprune.storage import directory
from depthprune.train.result import CascadeResult, Result


class Section(NamedTuple):
  """A section of the page.

  Attributes:
    title: heading of the section.
    table: a table.
    kind: class of the table in the style sheet.
    chart: an <svg> element.
    notes: items of a list.
    text: a paragraph.
    small: sentences in small print that explain the rest.
    kept: {layer: kept channels}, which is folded up.
  """

  title: str
  table: Table | None = None
  kind: str = 'wide'
  chart: Markup | None = None
  notes: Sequence[str] = ()
  text: str = ''
  small: Sequence[str] = ()
  kept: dict[str, str] | None = None


def write(path: str | Path) -> Path:
  """Writes RUN/report.html from the files in RUN, and returns its path.

  Raises:
    RunError: the run has not finished, or the directory is not that of a run.
  """
  run = read(path)
  written = run.path / 'report.html'
  with fitting(run.path):
    text = page(run)
  directory.write_text(written, text)
  return written


def page(run: FinishedRun) -> str:
  """Returns the page as text."""
  environment = jinja2.Environment(
    loader=jinja2.PackageLoader('depthprune.report', '.'),
    autoescape=True,
    trim_blocks=True,
    lstrip_blocks=True,
    undefined=jinja2.StrictUndefined,
  )
  result = run.result
  return environment.get_template('page.html').render(
    title=sentences.title(result),
    lead=sentences.lead(result),
    tiles=[*tables.tiles(result)],
    sections=[*_sections(run)],
    facts=_facts(result),
    config=json.dumps(result.config, indent=2),
  )


def _sections(run: FinishedRun) -> Iterator[Section]:
  result, recipe = run.result, sentences.recipe_of(run.result)
  small = [recipe.legend, *sentences.all_of(result)]
  yield Section('Before and after', tables.costs(result), small=small)
  if notes := [*sentences.notes(result), *run.notes]:
    yield Section('To note', notes=notes)
  if recipe.erases_units and result.rounds:
    rounds = tables.rounds(result)
    yield Section('Rounds', rounds, 'wide last-names', small=[sentences.ROUNDS])
  if result.cascade is not None:
    yield from _cascade(result, result.cascade)
  for title, figure in _figures(run):
    yield Section(title, chart=_svg(figure))
  if tables.narrowed(result):
    removed = sentences.removed(result)
    yield Section(
      'What was kept',
      text=f'Removed: {", ".join(removed)}.' if removed else '',
      kept={name: _ranges(each) for name, each in result.report.kept.items()},
      small=['As JSON, for every tensor: result.json, "report".'],
    )


def _cascade(result: Result, cascade: CascadeResult) -> Iterator[Section]:
  """Yields the sections of a cascade: its requests, curve and exits."""
  said = [*sentences.certified(cascade), *sentences.refused(cascade)]
  yield Section(
    'Requested and reached',
    tables.requests(cascade),
    'wide numbers',
    small=[*said, sentences.reading(cascade)],
  )
  chart = exit_charts.compute_curve(
    {'': exit_charts.collect_series((cascade, result.accuracy, result.flops))}
  )
  yield Section('Accuracy against FLOPs', chart=_svg(chart), small=[sentences.CURVE])
  yield Section(
    'Exits',
    tables.exits(cascade),
    'wide numbers tap',
    small=[sentences.EXITS, sentences.cut_heads(cascade)],
  )
  if cascade.shares:
    chart = exit_charts.leaving(cascade.shares, tables.accuracy_of_leavers(cascade))
    yield Section('Where examples leave', chart=_svg(chart), small=[sentences.LEAVING])
  if cascade.calibration:
    chart = exit_charts.reliability(cascade.calibration)
    yield Section('Reliability', chart=_svg(chart), small=[sentences.RELIABILITY])


def _figures(run: FinishedRun) -> Iterator[tuple[str, Figure]]:
  """Yields the titles and charts for which the run has data."""
  result, recipe = run.result, sentences.recipe_of(run.result)
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
    target = sentences.target_of(result)
    fraction, cost = (target.fraction, target.cost) if target else (None, 'flops')
    yield 'Training', charts.training_curves(run.history, fraction, cost)


def _svg(figure: Figure) -> Markup:
  return Markup(style.svg(figure))


def _facts(result: Result) -> dict[str, str]:
  """Returns how the run was made: command, device, time and versions."""
  seconds = result.wall_seconds
  facts = {
    'command': result.command,
    'device': result.device,
    'time': f'{seconds:.0f} s' if seconds and math.isfinite(seconds) else None,
    'versions': ', '.join(f'{k} {v}' for k, v in result.versions.items()),
  }
  return {name: value for name, value in facts.items() if value}


def _ranges(indices: Iterable[int]) -> str:
  """Returns `0–2, 5` for `[0, 1, 2, 5]`."""
  runs: list[list[int]] = []
  for index in sorted(indices):
    if runs and index == runs[-1][1] + 1:
      runs[-1][1] = index
    else:
      runs.append([index, index])
  return ', '.join(f'{a}' if a == b else f'{a}–{b}' for a, b in runs) or 'none'
