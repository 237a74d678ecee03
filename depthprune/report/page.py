"""One self-contained HTML page about a run: no script, no font, no outside address."""

import json
import os
from collections.abc import Iterable, Mapping
from html import escape
from importlib import resources
from pathlib import Path
from string import Template
from typing import Any

from matplotlib.figure import Figure

from depthprune.report import plots, tables
from depthprune.report.artifacts import Run, read


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
  widths = tables.widths(result)
  sections = [
    _section('What was gained', _table(result) + _said(result)),
    _notes([*tables.notes(result), *run.notes]),
    _section('Widths of the layers', _chart(plots.width_chart(widths))),
  ]
  if run.history:
    curves = plots.training_curves(run.history, result['target'], result['of'])
    sections.append(_section('Training', _chart(curves)))
  if run.gates:
    chart = plots.gate_map(run.gates, widths)
    sections.append(_section('Gates over time', _chart(chart)))
  sections += [_section('What was kept', _kept(result)), _section('Run', _run(result))]
  template = resources.files('depthprune.report').joinpath('page.html').read_text()
  return Template(template).substitute(
    title=escape(tables.title(result)),
    lead=escape(_lead(result)),
    tiles=''.join(_tiles(result)),
    sections='\n'.join(sections),
  )


def _lead(result: Mapping[str, Any]) -> str:
  accuracy = result['accuracy']
  before, after = (tables.percent(accuracy[when]) for when in ('before', 'after'))
  return (
    f'{tables.requested(result)[0].upper()}{tables.requested(result)[1:]}. '
    f'Test accuracy {before} before, {after} after.'
  )


def _tiles(result: Mapping[str, Any]) -> Iterable[str]:
  accuracy = result['accuracy']
  points = 100 * (accuracy['after'] - accuracy['before'])
  yield _tile(tables.percent(accuracy['after']), 'accuracy', f'{points:+.2f} points')
  for key, name in (('flops', 'FLOPs'), ('params', 'parameters')):
    cost = result[key]
    before, after = tables.count(cost['before']), tables.count(cost['after'])
    kept = tables.percent(cost['after'] / cost['before'])
    yield _tile(kept, f'{name} kept', f'{before} → {after}')
  for batch, measured in result.get('latency_ms', {}).items():
    before, after = (tables.milliseconds(measured[w]) for w in ('before', 'after'))
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
  return f'<div class="wide chart">{plots.svg(figure)}</div>'


def _table(result: Mapping[str, Any]) -> str:
  rows = ''.join(
    f'<tr><th scope="row">{escape(row.name)}</th>'
    + ''.join(f'<td>{escape(cell)}</td>' for cell in row[1:])
    + '</tr>'
    for row in tables.summary(result)
  )
  columns = ''.join(
    f'<th scope="col">{name}</th>' for name in ('', 'before', 'cut', 'after', '')
  )
  return (
    f'<div class="wide"><table><thead><tr>{columns}</tr></thead>'
    f'<tbody>{rows}</tbody></table></div>'
  )


def _said(result: Mapping[str, Any]) -> str:
  lines = (tables.LEGEND, *tables.said(result))
  return ''.join(f'<p class="small">{escape(line)}</p>' for line in lines)


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
