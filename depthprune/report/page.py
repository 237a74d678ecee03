"""The report of a run: one HTML page without fonts or external addresses.

Its script shows the facts of a layer that is pointed at, and sorts tables; everything
can be read without it.
"""

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import jinja2
from markupsafe import Markup
from matplotlib.figure import Figure

from depthprune.report import charts, exit_charts, layer_map, sentences, style, tables
from depthprune.report.layers import LayerView, layers
from depthprune.report.run_files import FinishedRun, fitting, read
from depthprune.report.tables import Table, Tile
from depthprune.storage import directory
from depthprune.train.result import Accuracies, CascadeResult, Result, Sample


class Drawn(NamedTuple):
  """A chart as the page shows it.

  Attributes:
    narrow: an <svg> element for a telephone, or to stand beside others.
    wide: the same for a screen; None where it stands beside others.
    name: what tells it apart from those beside it.
  """

  narrow: Markup
  wide: Markup | None = None
  name: str = ''


class Continued(NamedTuple):
  """The beginning of a text, and {network: how it continues the text}."""

  prompt: str
  texts: Mapping[str, str]


class Section(NamedTuple):
  """A section of the page.

  Attributes:
    title: heading of the section.
    table: a table.
    kind: class of the table in the style sheet.
    charts: a chart, or several side by side.
    layers: layers whose facts are shown when they are pointed at.
    samples: texts, each continued by several networks.
    notes: items of a list.
    text: a paragraph.
    small: sentences in small print that explain the rest.
  """

  title: str
  table: Table | None = None
  kind: str = 'wide'
  charts: Sequence[Drawn] = ()
  layers: Sequence[LayerView] = ()
  samples: Sequence[Continued] = ()
  notes: Sequence[str] = ()
  text: str = ''
  small: Sequence[str] = ()


class Picture(NamedTuple):
  """A chart that a run has the data for.

  Attributes:
    title: title of the chart.
    description: a sentence about what it shows.
    draw: (width in inches) -> the figure.
  """

  title: str
  description: str
  draw: Callable[[float], Figure]

  def svg(self, width: float) -> Markup:
    return Markup(style.svg(self.draw(width), self.title, self.description))


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
  result = run.result
  return render(
    title=sentences.question(result),
    answer=sentences.answer(result),
    tiles=[*tables.tiles(result)],
    sections=[*_sections(run)],
    facts=_facts(result),
    config=json.dumps(result.config, indent=2),
  )


def render(
  title: str,
  answer: str,
  sections: Sequence[Section],
  tiles: Sequence[Tile] = (),
  facts: Mapping[str, str | None] = {},
  config: str = '',
) -> str:
  """Returns a page as text.

  Args:
    title: its title.
    answer: its first paragraph.
    sections: its sections.
    tiles: the few numbers at its top.
    facts: {name: value} of how it was made; those without a value are left out.
    config: configuration of a run, as JSON.
  """
  environment = jinja2.Environment(
    loader=jinja2.PackageLoader('depthprune.report', '.'),
    autoescape=True,
    trim_blocks=True,
    lstrip_blocks=True,
    undefined=jinja2.StrictUndefined,
  )
  return environment.get_template('page.html').render(
    title=title,
    answer=answer,
    tiles=tiles,
    sections=sections,
    facts={name: value for name, value in facts.items() if value},
    config=config,
  )


def _sections(run: FinishedRun) -> Iterator[Section]:
  result, recipe = run.result, sentences.recipe_of(run.result)
  small = [sentences.legend(result), *sentences.all_of(result)]
  yield Section('Before and after', tables.costs(result), small=small)
  if notes := [*sentences.notes(result), *run.notes]:
    yield Section('To note', notes=notes)
  if recipe.erases_units and result.rounds:
    rounds = tables.rounds(result)
    yield Section('Rounds', rounds, 'wide last-names', small=[sentences.ROUNDS])
  if result.cascade is not None:
    yield from _cascade(result, result.cascade)
  if result.samples:
    yield _samples(result.samples)
  if shown := layers(result):
    removed = sentences.removed(result) if tables.narrowed(result) else ()
    yield Section(
      'Layers',
      text=f'Removed: {", ".join(removed)}.' if removed else '',
      layers=shown,
      small=[sentences.LAYERS, sentences.layers_timed(result)],
    )
  yield from map(alone, pictures(run))


def _samples(samples: Sequence[Sample]) -> Section:
  names = {
    'whole': 'whole',
    'cut': 'cut',
    'healed': 'trained after the cut',
    'early': 'with early exits',
  }
  shown = [
    Continued(
      each.prompt.strip(),
      {said: text.strip() for n, said in names.items() if (text := getattr(each, n))},
    )
    for each in samples
  ]
  return Section('Samples of text', samples=shown, small=[sentences.SAMPLES])


def _cascade(result: Result, cascade: CascadeResult) -> Iterator[Section]:
  """Yields the sections of a cascade: its requests, curve and exits."""
  said = [*sentences.certified(cascade), *sentences.refused(cascade)]
  yield Section(
    'Requested and reached',
    tables.requests(cascade),
    'wide numbers',
    small=[*said, sentences.reading(cascade)],
  )
  curve, *others = cascade_pictures(result, cascade)
  yield alone(curve)
  yield Section(
    'Exits',
    tables.exits(cascade),
    'wide numbers tap',
    small=[sentences.exits(cascade), sentences.cut_heads(cascade)],
  )
  yield from map(alone, others)


def cascade_pictures(result: Result, cascade: CascadeResult) -> Iterator[Picture]:
  """Yields the charts of a cascade: accuracy against cost first, then its exits."""
  accuracy, what, of = result.accuracy, 'accuracy', 'examples'
  curve, leaving = sentences.CURVE, sentences.LEAVING
  if cascade.agreement is not None:
    accuracy, what, of = Accuracies(1.0, cascade.agreement), 'same tokens', 'tokens'
    curve, leaving = sentences.CURVE_OF_TEXT, sentences.LEAVING_OF_TEXT
  series = exit_charts.collect_series((cascade, accuracy, result.flops))
  yield Picture(
    f'{what.capitalize()} against FLOPs',
    curve,
    lambda width: exit_charts.compute_curve({'': series}, width, f'test {what}'),
  )
  if cascade.shares:
    right = tables.accuracy_of_leavers(cascade)
    yield Picture(
      f'Where {of} leave',
      leaving,
      lambda width: exit_charts.leaving(cascade.shares, right, width, of),
    )
  if cascade.calibration:
    yield Picture(
      'Reliability',
      sentences.RELIABILITY,
      lambda width: exit_charts.reliability(cascade.calibration, width),
    )


def pictures(run: FinishedRun) -> Iterator[Picture]:
  """Yields the charts of what is left, of training, and of what the method learnt."""
  result, recipe = run.result, sentences.recipe_of(run.result)
  if (drawn := layer_map.layer_map(result)) is not None:
    yield Picture(
      'What is left of every layer',
      sentences.LAYER_MAP,
      lambda width: layer_map.chart(drawn, width),
    )
  if recipe.erases_units and result.rounds:
    points = [(each.units, each.held_out) for each in result.rounds]
    curves = {'': charts.collect_curve(points)}
    yield Picture(
      'Accuracy by erased units',
      sentences.ERASED,
      lambda width: charts.erased_curve(curves, 'held-out accuracy', width),
    )
  for chart in recipe.charts:
    if (draw := charts.drawing(chart, run)) is not None:
      yield Picture(chart.title, sentences.LEARNED[chart.kind], draw)
  if run.history:
    target = sentences.target_of(result)
    fraction, cost = (target.fraction, target.cost) if target else (None, 'flops')
    yield Picture(
      'Training',
      sentences.TRAINING,
      lambda width: charts.training_curves(run.history, fraction, cost, width),
    )


def alone(picture: Picture) -> Section:
  """Returns the section of a chart by itself."""
  drawn = Drawn(picture.svg(style.NARROW), picture.svg(style.WIDE))
  return Section(picture.title, charts=[drawn], small=[picture.description])


def _facts(result: Result) -> dict[str, str | None]:
  """Returns how the run was made: command, device, time and versions."""
  seconds = result.wall_seconds
  return {
    'network': sentences.title(result),
    'command': result.command,
    'device': result.device,
    'time': f'{seconds:.0f} s' if seconds and math.isfinite(seconds) else None,
    'versions': listed(result.versions),
  }


def listed(versions: Mapping[str, str]) -> str:
  """Returns `jax 0.10.2, flax 0.12.0`."""
  return ', '.join(f'{name} {version}' for name, version in versions.items())
