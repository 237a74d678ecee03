"""The table, the front and the chart of a sweep."""

import io
import json

import numpy as np
import pytest
from rich.console import Console

from depthprune.report import sweep as front
from depthprune.report.run_files import RunError
from depthprune.report.tables import Table


def run(target: float, seed: int, accuracy: float | None, held_out: float = 0) -> dict:
  settings = {'target': target, 'seed': seed}
  name = f'target{target}-seed{seed}'
  row: dict = {'folder': name, 'settings': settings, 'result': None, 'refused': None}
  if accuracy is None:
    return row
  of = lambda after: {'before': 0.95, 'after': after}
  cost = {'before': 2e6, 'after': 2e6 * target}
  row['result'] = {
    'accuracy': of(accuracy), 'held_out': of(held_out or accuracy),
    'flops': cost, 'params': {'before': 1000, 'after': 500},
    'latency_ms': {'128': {'before': 9.0, 'after': 9 * target, 'speedup': 1 / target}},
    'device': 'a CPU',
  }  # fmt: skip
  return row


@pytest.fixture
def sweep() -> dict:
  """0.6 costs more than 0.5 and is worse where it counts, 0.9 is not finished."""
  runs = [
    *(run(0.5, seed, 0.90 + seed / 100) for seed in (0, 1)),
    *(run(0.6, seed, 0.94, held_out=0.9) for seed in (0, 1)),
    run(0.8, 0, 0.95),
    run(0.8, 1, None),
    run(0.9, 0, None),
    run(0.9, 1, None),
  ]
  runs[-1]['refused'] = 'the loss is nan'
  options = {'target': 0.5, 'of': 'flops'}
  config = {
    'method': 'trainable_gates', 'model': 'mlp', 'data': 'digits', 'options': options
  }  # fmt: skip
  swept = {'target': [0.5, 0.6, 0.8, 0.9], 'seed': [0, 1]}
  return {'config': config, 'swept': swept, 'runs': runs}


def table(sweep: dict) -> Table:
  return front.table(front.swept_names(sweep), front.settings(sweep))


def test_a_line_is_a_setting_over_its_seeds_and_a_dash_what_is_not_there(sweep):
  head, lines = table(sweep)
  assert head == (
    *('target', 'test', 'held-out', 'FLOPs', 'params', 'speed', 'runs', ''),
  )
  assert lines == [
    ('0.5', '90.50 ± 0.71', '90.50 ± 0.71', '50.0 ± 0.0', '50.0 ± 0.0',
     '2.00 ± 0.00', '2', '★'),
    ('0.6', '94.00 ± 0.00', '90.00 ± 0.00', '60.0 ± 0.0', '50.0 ± 0.0',
     '1.67 ± 0.00', '2', ''),
    ('0.8', '95.00', '95.00', '80.0', '50.0', '1.25', '1/2', '★'),
    ('0.9', '–', '–', '–', '–', '–', '0/2', ''),
  ]  # fmt: skip


def test_the_front_is_chosen_on_held_out_data(sweep):
  best = front.front(front.settings(sweep))
  assert [setting.values for setting in best] == [(0.8,), (0.5,)]
  for row in sweep['runs'][2:4]:
    row['result']['held_out']['after'] = 0.91
  best = front.front(front.settings(sweep))
  assert [setting.values for setting in best] == [(0.8,), (0.6,), (0.5,)]


def test_the_cost_is_what_the_target_counts(sweep):
  sweep['config']['options']['of'] = 'params'
  (last,) = front.front(front.settings(sweep))  # all have half of the parameters
  assert last.values == (0.8,)


def test_the_screen_says_what_was_refused_and_fits(sweep):
  console = Console(width=80, record=True, file=io.StringIO())
  console.print(front.screen(sweep))
  said = console.export_text()
  assert 'target0.9-seed1: the loss is nan' in ' '.join(said.split())
  assert 'test accuracy 95.00 %, 2.00 M FLOPs' in said
  assert '…' not in said


def test_the_chart_has_all_that_is_there_and_the_front_as_a_line(sweep, tmp_path):
  figure = front.chart(front.settings(sweep))
  (axes,) = figure.axes
  lines = {str(line.get_label()): line for line in axes.lines}
  assert lines['front'].get_xdata() == pytest.approx([0.8, 0.5])
  assert lines['before'].get_ydata()[0] == pytest.approx(0.95)
  assert {text.get_text() for text in axes.texts} == {'0.5', '0.6', '0.8'}
  written = front.draw(sweep, tmp_path)
  assert written.name == 'front.svg' and '</svg>' in written.read_text()


def test_a_sweep_without_a_result_yet_has_dashes_and_an_empty_chart(sweep):
  for row in sweep['runs']:
    row['result'] = None
  assert {line[1] for line in table(sweep).rows} == {'–'}
  assert front.chart(front.settings(sweep)).axes


def test_single_runs_are_not_counted(sweep):
  sweep['runs'] = [row for row in sweep['runs'] if row['result']][::2]
  assert [setting.runs for setting in front.settings(sweep)] == [1, 1, 1]
  assert table(sweep).head[-2:] == ('speed', '')


def test_different_networks_are_compared_by_what_they_cost(sweep):
  """A larger network has half of its FLOPs left, and costs more than 0.8 of another."""
  large = sweep['runs'][0]
  large['result']['flops'] = {'before': 2e7, 'after': 1e7}
  sweep['runs'] = [large, sweep['runs'][4]]
  (best,) = front.front(front.settings(sweep))
  assert best.values == (0.8,)
  (axes,) = front.chart(front.settings(sweep)).axes
  assert axes.get_xlabel() == 'FLOPs that are left'
  assert max(np.max(line.get_xdata()) for line in axes.lines) == 1e7


def test_seeds_alone_are_one_setting(sweep):
  sweep['runs'] = sweep['runs'][:2]
  for row in sweep['runs']:
    del row['settings']['target']
  sweep['swept'] = {'seed': [0, 1]}
  (setting,) = front.settings(sweep)
  assert (setting.name, setting.runs) == ('all seeds', 2)


def test_what_is_no_sweep_is_said(tmp_path):
  (tmp_path / 'sweep.json').write_text('{"runs": ')
  with pytest.raises(RunError, match=r'expected what `depthprune sweep` wrote'):
    front.read(tmp_path)
  (tmp_path / 'sweep.json').write_text(json.dumps({'runs': []}))
  with pytest.raises(RunError, match=r'config: expected an object, got no such entry'):
    front.read(tmp_path)
