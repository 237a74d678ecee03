"""One self-contained HTML page about a run: no script, no font, no outside address."""

import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from html import escape
from importlib import resources
from pathlib import Path
from string import Template
from typing import Any

from matplotlib.figure import Figure

from depthprune.report import asked, cascade, structure, style, tables
from depthprune.report import charts as depth
from depthprune.report import charts as plots
from depthprune.report import exit_charts as curves
from depthprune.report import exit_charts as exits
from depthprune.report import sentences as decision
from depthprune.report.numbers import count, milliseconds, percent, points
from depthprune.report.run_files import Run, read


def write(path: str | Path) -> Path:
  """Writes RUN/report.html from the files in RUN; returns its path.

  Raises artifacts.RunError where the run has not finished or is not one.
  """
  run = read(path)
  written = run.path / 'report.html'
  unfinished = written.with_suffix('.html.part')
  unfinished.write_text(page(run), encoding='utf-8')
  os.replace(unfinished, written)
  return written


def page(run: Run) -> str:
  """The page as text."""
  result = run.result
  sections = [
    _section('What was gained', _summary(result) + _said(result)),
    _notes([*tables.notes(result), *run.notes]),
  ]
  if decision.erasing(result):
    sections.append(_section('Rounds', _rounds(result)))
  if 'cascade' in result:
    sections += [_section(name, body) for name, body in _cascade(result)]
  sections += [_section(name, _chart(figure)) for name, figure in _figures(run)]
  if tables.narrowed(result):
    sections.append(_section('What was kept', _kept(result)))
  sections.append(_section('Run', _run(result)))
  template = resources.files('depthprune.report').joinpath('page.html').read_text()
  return Template(template).substitute(
    title=escape(tables.title(result)),
    lead=escape(_lead(result)),
    tiles=''.join(_tiles(result)),
    sections='\n'.join(sections),
  )


def _figures(run: Run) -> Iterator[tuple[str, Figure]]:
  """The charts that there is data for, with their titles."""
  result, gates = run.result, run.gates
  what = gates[0] if gates else {}
  if decision.erasing(result):
    curves = {'': decision.curve(result['rounds'])}
    yield 'Accuracy by erased units', depth.erased_curve(curves, 'held-out accuracy')
  if 'priority' in what:
    yield 'Priority of the units', depth.priority_map(gates, result['rounds'])
  kept = decision.exit_(result)
  if 'importance' in what and kept:
    chart = depth.importance_map({'': (gates, kept.name)})
    yield 'Importance of the exits', chart
  widths = tables.widths(result)
  if tables.narrowed(result):
    yield 'Widths of the layers', plots.width_chart(widths)
  asked = result['options']
  if run.history:
    goal = asked.get('target'), asked.get('of', 'flops')
    yield 'Training', plots.training_curves(run.history, *goal)
  if 'structure' in asked and structure.weights(result):
    yield 'Connections of the path', structure.connections(result)
  elif 'open' in what:
    yield 'Gates over time', plots.gate_map(gates, widths)


def _lead(result: Mapping[str, Any]) -> str:
  decided = decision.sentence(result)
  if 'cascade' in result:
    return f'{decided[0].upper()}{decided[1:]}. {cascade.accuracy(result)}'
  accuracy = result['accuracy']
  before, after = (percent(accuracy[when]) for when in ('before', 'after'))
  return (
    f'{decided[0].upper()}{decided[1:]}. Test accuracy {before} before, {after} after.'
  )


def _tiles(result: Mapping[str, Any]) -> Iterable[str]:
  if 'cascade' in result:
    yield from (_tile(*tile) for tile in cascade.tiles(result))
    return
  accuracy = result['accuracy']
  change = points(accuracy['before'], accuracy['after'])
  yield _tile(percent(accuracy['after']), 'accuracy', change)
  for key, name in (('flops', 'FLOPs'), ('params', 'parameters')):
    cost = result[key]
    before, after = count(cost['before']), count(cost['after'])
    kept = percent(cost['after'] / cost['before'])
    yield _tile(kept, f'{name} kept', f'{before} → {after}')
  for batch, measured in result.get('latency_ms', {}).items():
    before, after = (milliseconds(measured[w]) for w in ('before', 'after'))
    took = f'{before.removesuffix(" ms")} → {after}'
    yield _tile(f'{measured["speedup"]:.2f} ×', f'speed, batch {batch}', took)


def _tile(value: str, name: str, detail: str) -> str:
  return (
    f'<div class="tile"><b>{escape(value)}</b><span>{escape(name)}</span>'
    f'<small>{escape(detail)}</small></div>'
  )


def _section(name: str, body: str) -> str:
  return f'<section><h2>{escape(name)}</h2>{body}</section>'


def _chart(figure: Figure) -> str:
  return f'<div class="wide chart">{style.svg(figure)}</div>'


def _summary(result: Mapping[str, Any]) -> str:
  return _table(*tables.costs(result))


def _cascade(result: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
  """(title, body) of what only a cascade has: its requests, curve and exits."""
  found = result['cascade']
  refused = _small(*asked.certified(result), *asked.refused(result))
  requests = _table(asked.HEAD, asked.requests(result), 'wide numbers')
  yield 'Requested and reached', requests + refused + _small(asked.READING)
  chart = curves.compute_curve({'': curves.series(result)})
  yield 'Accuracy against FLOPs', _chart(chart) + _small(cascade.CURVE)
  table = _table(cascade.EXIT_HEAD, cascade.exits(result), 'wide numbers tap')
  yield 'Exits', table + _small(cascade.EXITS, cascade.cut(result))
  chart = exits.leaving(found['shares'], cascade.right(result))
  yield 'Where examples leave', _chart(chart) + _small(cascade.LEAVING)
  if found.get('calibration'):
    chart = exits.reliability(found['calibration'])
    yield 'Reliability', _chart(chart) + _small(cascade.RELIABILITY)


def _small(*lines: str) -> str:
  return ''.join(f'<p class="small">{escape(line)}</p>' for line in lines if line)


def _rounds(result: Mapping[str, Any]) -> str:
  said = 'Accuracy of held-out images; FLOPs as part of the whole network.'
  rounds = _table(decision.HEAD, decision.rounds(result), 'wide last-names')
  return rounds + _small(said)


def _table(
  head: Iterable[str], rows: Iterable[Sequence[str]], kind: str = 'wide'
) -> str:
  body = ''.join(
    f'<tr><th scope="row">{escape(row[0])}</th>'
    + ''.join(f'<td>{escape(cell)}</td>' for cell in row[1:])
    + '</tr>'
    for row in rows
  )
  columns = ''.join(f'<th scope="col">{name}</th>' for name in head)
  return (
    f'<div class="{kind}"><table><thead><tr>{columns}</tr></thead>'
    f'<tbody>{body}</tbody></table></div>'
  )


def _said(result: Mapping[str, Any]) -> str:
  return _small(tables.legend(result), *tables.said(result))


def _notes(notes: Iterable[str]) -> str:
  items = ''.join(f'<li>{escape(note)}</li>' for note in notes)
  return _section('To note', f'<ul>{items}</ul>') if items else ''


def _kept(result: Mapping[str, Any]) -> str:
  removed = tables.removed(result)
  gone = f'<p>Removed: {escape(", ".join(removed))}.</p>' if removed else ''
  kept = result.get('report', {}).get('kept', {})
  layers = ''.join(
    f'<dt>{escape(name)}</dt><dd>{escape(_ranges(indices))}</dd>'
    for name, indices in kept.items()
  )
  listed = f'<details><summary>Kept channels by layer</summary><dl>{layers}</dl>'
  where = '<p class="small">As JSON, for every tensor: result.json, "report".</p>'
  return gone + (f'{listed}</details>' if layers else '') + where


def _run(result: Mapping[str, Any]) -> str:
  facts = {
    'command': result.get('command'),
    'device': result.get('device'),
    'time': f'{result["wall_seconds"]:.0f} s' if 'wall_seconds' in result else None,
    'versions': ', '.join(f'{k} {v}' for k, v in result.get('versions', {}).items()),
  }
  rows = ''.join(
    f'<dt>{name}</dt><dd>{escape(str(value))}</dd>'
    for name, value in facts.items()
    if value
  )
  config = escape(json.dumps(result.get('config', {}), indent=2))
  return (
    f'<dl>{rows}</dl><details><summary>Configuration</summary>'
    f'<pre>{config}</pre></details>'
  )


def _ranges(indices: Iterable[int]) -> str:
  """`[0, 1, 2, 5]` as `0–2, 5`."""
  runs: list[list[int]] = []
  for index in sorted(indices):
    if runs and index == runs[-1][1] + 1:
      runs[-1][1] = index
    else:
      runs.append([index, index])
  return ', '.join(f'{a}' if a == b else f'{a}–{b}' for a, b in runs) or 'none'
