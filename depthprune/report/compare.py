"""The page of several runs: their front, a table that sorts, and their charts."""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from depthprune.report import charts, run_files, sentences, style, sweep
from depthprune.report.numbers import count, percent
from depthprune.report.page import (
  Drawn,
  Picture,
  Section,
  alone,
  listed,
  pictures,
  render,
)
from depthprune.report.run_files import FinishedRun, RunError
from depthprune.report.sweep import SweptSetting
from depthprune.report.tables import Table
from depthprune.storage import directory
from depthprune.train.options import shown
from depthprune.train.result import Accuracies, Latency, Result, SweepResult

FRONT = 'Accuracy against cost'
WIDTHS = 'Channels of every layer before, pale, and after.'
NAMED = 4  # runs that the first paragraph names
UNKNOWN = Accuracies(math.nan)


def write(paths: Sequence[str | Path], to: str | Path) -> Path:
  """Writes the page of several runs to a file, and returns its path.

  Args:
    paths: directories of finished runs, or of sweeps, which stand for their runs.
    to: the file.

  Raises:
    RunError: there is none, or a directory is not that of a finished run or a sweep.
  """
  runs = _named(_directories(paths))
  if not runs:
    raise RunError('compare: expected a run or a sweep, got none')
  options = _options_that_differ([run.result for run in runs.values()])
  swept = [
    SweptSetting((name, *values), (_summary(run.result),), 1, 'flops', label=name)
    for (name, run), values in zip(runs.items(), options.rows, strict=True)
  ]
  table = sweep.table(('run', *options.head), swept)
  data = list(dict.fromkeys(run.result.data for run in runs.values()))
  warning = f'accuracies on different data cannot be compared: {", ".join(data)}'
  text = render(
    title=f'Which of {len(runs)} runs is worth having?',
    answer=_answer(swept),
    sections=[
      *_sections(swept, table, [warning] * (len(data) > 1)),
      *_side_by_side(runs),
    ],
    facts={'runs': ', '.join(str(run.path) for run in runs.values())},
  )
  directory.write_text(Path(to), text)
  return Path(to)


def write_sweep(values: Mapping[str, Any], path: Path) -> Path:
  """Writes the page of a sweep beside its sweep.json, and returns its path.

  It has the charts of the first run of every setting that is still there.

  Args:
    values: what `sweep.read` returned.
    path: directory of the sweep.
  """
  swept, config = sweep.settings(values), values['config']
  several = lambda key: ', '.join(map(str, values['swept'].get(key, [config[key]])))
  names = sweep.swept_names(values)
  seed, *_ = values['swept'].get('seed', [None])
  first = [r for r in values['runs'] if r['settings'].get('seed') == seed]
  folders = [path / run['folder'] for run in first if run['result']]
  there = [folder for folder in folders if (folder / 'result.json').exists()]
  text = render(
    title=f'{sentences.method_name(config["method"])}: which setting of '
    f'{several("model")} on {several("data")} is worth having?',
    answer=_answer(swept, names),
    sections=[
      *_sections(swept, sweep.table(names, swept), sweep.refused(values)),
      *_side_by_side(_named(there)),
    ],
    facts={
      'command': values.get('command', ''),
      'versions': listed(values.get('versions', {})),
    },
  )
  directory.write_text(path / sweep.PAGE, text)
  return path / sweep.PAGE


def _directories(paths: Sequence[str | Path]) -> Iterator[Path]:
  """Yields the directories, and those of the runs of a sweep in its place."""
  for path in map(Path, paths):
    if (path / sweep.SWEEP).exists():
      runs = sweep.read(path)['runs']
      yield from (path / run['folder'] for run in runs if run['result'])
    else:
      yield path


def _named(paths: Iterable[Path]) -> dict[str, FinishedRun]:
  """Reads runs, and names them by as much of their paths as tells them apart."""
  runs = {path.resolve().parts: run_files.read(path) for path in paths}
  depths = range(1, 1 + max(map(len, runs), default=1))
  is_enough = lambda n: len({parts[-n:] for parts in runs}) == len(runs)
  depth = next(filter(is_enough, depths))
  return {'/'.join(parts[-depth:]): run for parts, run in runs.items()}


def _options_that_differ(results: Sequence[Result]) -> Table:
  """Returns what the runs have in common, but with other values, as a column each."""
  of = lambda r: {
    'method': sentences.method_name(r.method),
    'model': r.model,
    'data': r.data,
    **r.options,
  }
  options = [{**of(result), 'seed': result.seed} for result in results]
  names = [
    name
    for name in options[0]
    if all(name in each for each in options)
    and any(each[name] != options[0][name] for each in options)
  ]
  rows = [[each[name] for name in names] for each in options]
  return Table([name.replace('_', ' ') for name in names], rows)


def _summary(result: Result) -> SweepResult:
  """Returns what the table and the front need; of a cascade, its measured times too."""
  latency = dict(result.latency_ms)
  executed = result.cascade.executed if result.cascade else None
  if executed and executed.ms and executed.whole_ms:
    latency[str(executed.batch)] = Latency(
      executed.whole_ms,
      executed.ms,
      executed.whole_ms / executed.ms,
      executed.whole_ms_quartiles,
      executed.ms_quartiles,
      executed.runs,
      executed.faster,
    )
  return SweepResult(
    result.accuracy,
    result.flops,
    result.params,
    result.held_out or UNKNOWN,
    result.device or '',
    latency,
  )


def _answer(swept: Sequence[SweptSetting], names: Sequence[str] = ()) -> str:
  """Returns which settings are on the front, the cheapest first.

  Args:
    swept: the settings.
    names: names of their values, if they have no names of their own.
  """
  best = sweep.front(swept)[::-1]
  if not best:
    return 'Nothing was measured on held-out data, which decides what is worth having.'
  accuracy = lambda s: percent(s.mean(lambda r: r.accuracy.after or math.nan))
  values = lambda s: ', '.join(f'{n} {shown(v)}' for n, v in zip(names, s.values))
  said = [
    f'{values(s) or s.name} ({accuracy(s)}, {count(s.cost)} FLOPs)'
    for s in best[:NAMED]
  ]
  more = f' and {len(best) - NAMED} more' * (len(best) > NAMED)
  return (
    f'On the front of test accuracy against cost: {", ".join(said)}{more}, of '
    f'{len(swept)}.'
  )


def _sections(
  swept: Sequence[SweptSetting], table: Table, notes: Sequence[str]
) -> Iterator[Section]:
  front = Picture(FRONT, sweep.FRONT, lambda width: sweep.chart(swept, width))
  yield alone(front)
  how = [*sweep.explained(swept), 'Click on the name of a column to sort.']
  yield Section('All of them', table, 'wide numbers sortable', small=how)
  if notes:
    yield Section('To note', notes=notes)


def _side_by_side(runs: Mapping[str, FinishedRun]) -> Iterator[Section]:
  """Yields a section for every chart that any of the runs has."""
  drawn: dict[Picture, list[Drawn]] = {}
  titles: dict[str, Picture] = {}
  for name, run in runs.items():
    with run_files.fitting(run.path):
      for picture in (*_widths(run.result), *pictures(run)):
        first = titles.setdefault(picture.title, picture)
        chart = Drawn(picture.svg(style.NARROW), name=name)
        drawn.setdefault(first, []).append(chart)
  for picture, charts_ in drawn.items():
    yield Section(picture.title, charts=charts_, small=[picture.description])


def _widths(result: Result) -> Iterator[Picture]:
  if any(before != after for before, after in result.widths.values()):
    draw = lambda width: charts.width_chart(result.widths, width)
    yield Picture('Widths of the layers', WIDTHS, draw)
