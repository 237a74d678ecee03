"""Charts: what they draw is what the run says."""

from pathlib import Path

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from depthprune import methods
from depthprune.report import charts, sentences, style
from depthprune.report.names import spoken
from depthprune.report.numbers import in_order
from depthprune.report.run_files import FinishedRun, read
from depthprune.train.recipe import Chart
from depthprune.train.result import Accuracies
from tests.report.runs import (
  made_up_auxiliary,
  made_up_gates,
  made_up_implosion,
  made_up_netcut,
  made_up_result,
  made_up_round,
  typed,
)


def texts(figure: Figure) -> list[str]:
  return [text for a in figure.axes for t in a.texts if (text := t.get_text())]


def values(axes: Axes) -> np.ndarray:
  (mesh,) = (c for c in axes.collections if hasattr(c, 'get_coordinates'))
  return np.ma.filled(np.ma.asarray(mesh.get_array()), np.nan)


def labels(axes: Axes) -> list[str]:
  return [label.get_text() for label in axes.get_yticklabels()]


def test_width_chart_has_a_bar_before_and_after_for_every_layer(result):
  widths = typed(result).widths
  (axes,) = charts.width_chart(widths).axes
  lengths = [bar.get_width() for bar in axes.patches]  # pyright: ignore[reportAttributeAccessIssue]
  assert lengths == [w[0] for w in widths.values()] + [w[1] for w in widths.values()]
  assert labels(axes) == [spoken(name) for name in widths]
  assert '16 → 0' in texts(axes.figure)  # pyright: ignore[reportArgumentType]
  assert axes.yaxis_inverted()


def test_curves_follow_each_other_when_stages_count_from_zero(run_directory):
  run = read(run_directory)
  loss, accuracy, flops = charts.training_curves(run.history, 0.5).axes
  starts = [line.get_xdata()[0] for line in loss.lines[::2][:3]]  # pyright: ignore
  assert starts == [0, 100, 200]
  assert [text.strip() for text in texts(loss.figure)] == [  # pyright: ignore
    *('train', 'gates', 'finetune'),
    'target',
  ]
  assert accuracy.get_ylabel() == 'accuracy'
  assert 0.5 in [line.get_ydata()[0] for line in flops.lines]  # pyright: ignore


def test_the_target_is_drawn_at_the_cost_it_counts():
  history = [{'stage': 'gates', 'step': s, 'params': 0.8, 'flops': 0.7} for s in (0, 1)]
  flops, params = charts.training_curves(history, 0.5, 'params').axes
  assert (flops.get_ylabel(), params.get_ylabel()) == ('FLOPs kept', 'params kept')
  assert len(params.lines) == len(flops.lines) + 1


def test_curves_keep_steps_that_already_count_on():
  history = [
    {'stage': stage, 'step': step, 'loss': 1.0}
    for stage, first in (('train', 0), ('gates', 100))
    for step in range(first, first + 100, 10)
  ]
  (axes,) = charts.training_curves(history).axes
  assert [line.get_xdata()[0] for line in axes.lines[:4:2]] == [0, 100]  # pyright: ignore


def test_curves_without_accuracy_or_cost_have_one_panel():
  history = [{'stage': 'train', 'step': s, 'loss': 1.0, 'flops': None} for s in (0, 1)]
  assert len(charts.training_curves(history, 0.5).axes) == 1


# ---- what a method learns ------------------------------------------------------------


def run_of(result: dict, gates: list[dict]) -> FinishedRun:
  return FinishedRun(Path(), typed(result), [], gates, [])


def chart_of(run: FinishedRun) -> Chart:
  """The first that the method of a run wants."""
  chart, *_ = sentences.recipe_of(run.result).charts
  return chart


CHARTS = {
  'channels': (
    lambda: (made_up_result(), made_up_gates()),
    lambda run: charts.channel_map(run.gates, run.result.widths),
  ),
  'exits': (
    made_up_netcut,
    lambda run: charts.exit_map({'': (run.gates, 'exit03')}),
  ),
  'units': (
    made_up_implosion,
    lambda run: charts.unit_map(run.gates, run.result.rounds),
  ),
  'connections': (
    made_up_auxiliary,
    lambda run: charts.connections(
      run.result.rounds[0].learned['weight'], run.result.rounds[0].learned['open']
    ),
  ),
}
"""By the kind of a Chart: a run whose method wants it, and what draws it."""


@pytest.mark.parametrize('kind', CHARTS)
def test_what_a_method_wants_is_drawn_by_its_kind(kind):
  made_up, expected = CHARTS[kind]
  run = run_of(*made_up())
  chart = chart_of(run)
  assert chart.kind == kind
  draw = charts.drawing(chart, run)
  assert draw is not None
  svg = lambda figure: style.svg(figure, chart.title, chart.label)
  assert svg(draw(style.WIDE)) == svg(expected(run))
  assert draw(style.NARROW).get_figwidth() == style.NARROW


def test_every_method_wants_charts_of_these_kinds():
  wanted = {chart.kind for recipe in methods.all().values() for chart in recipe.charts}
  assert wanted == set(CHARTS)


@pytest.mark.parametrize('kind', CHARTS)
def test_what_a_run_has_nothing_of_is_not_drawn(kind):
  result, _ = CHARTS[kind][0]()
  for each in result['rounds']:
    each['learned'] = {}
  run = run_of(result, [{'step': 0, 'of_another_method': {}}])
  assert charts.drawing(chart_of(run), run) is None


@pytest.mark.parametrize(
  ('kind', 'key'),
  [('channels', 'open'), ('exits', 'importance'), ('units', 'priority')],
)
def test_a_method_names_the_entry_that_is_drawn_and_its_scale(kind, key):
  result, gates = CHARTS[kind][0]()
  run = run_of(result, gates)
  chart = chart_of(run)._replace(key='of_ones_own', label='a scale')
  renamed = [{**line, 'of_ones_own': line[key]} for line in gates]
  for each in result['rounds']:
    each['learned']['of_ones_own'] = each['learned'].get(key)
  draw = charts.drawing(chart, run_of(result, [{**l, key: {}} for l in renamed]))
  expected = charts.drawing(chart_of(run), run)
  assert draw is not None and expected is not None
  axes, bar = draw(style.WIDE).axes
  np.testing.assert_array_equal(values(axes), values(expected(style.WIDE).axes[0]))
  assert bar.get_ylabel() == 'a scale'


def test_channel_map_is_the_fraction_that_is_open(run_directory):
  run = read(run_directory)
  figure = charts.channel_map(run.gates, run.result.widths)
  values = np.asarray(figure.axes[0].collections[0].get_array())
  assert values.shape == (12, 26)
  np.testing.assert_allclose(values[:, 0], 1)
  assert values[3, -1] == pytest.approx(
    run.gates[-1]['open']['stage1/block2/conv1:3'] / 16
  )


def test_a_gate_history_of_one_line_is_drawn(result):
  line = {'step': 5, 'open': {'stem/conv:3': 8}}
  figure = charts.channel_map([line], typed(result).widths)
  values = np.asarray(figure.axes[0].collections[0].get_array())
  np.testing.assert_array_equal(values, [[0.5]])


def test_stages_follow_each_other_in_the_channel_map_too():
  lines = [
    {'stage': stage, 'step': step, 'open': {'conv': 8}}
    for stage in ('gates-1', 'gates-2')
    for step in (0, 10, 20)
  ]
  mesh = charts.channel_map(lines, {'conv': (16, 8)}).axes[0].collections[0]
  corners = mesh.get_coordinates()[0, :, 0]  # pyright: ignore
  assert list(corners) == [0, 5, 15, 20, 25, 35, 40]


def test_exit_map_has_a_row_per_exit_and_marks_the_kept_one(netcut):
  _, gates = netcut
  axes, bar = charts.exit_map({'': (gates, 'exit03')}).axes
  w = values(axes)
  assert w.shape == (20, 51)
  np.testing.assert_allclose(w[:, 0], 1 / 20)
  np.testing.assert_allclose(w.sum(0), 1)
  assert w[:, -1].argmax() == 2
  assert labels(axes)[2] == 'exit03'
  assert axes.yaxis_inverted()
  assert (axes.get_xlabel(), bar.get_ylabel()) == ('step', 'importance w')


def test_exit_maps_of_several_runs_share_a_scale(netcut):
  _, gates = netcut
  runs = {f'β = {beta:g}': (gates, 'exit03') for beta in (0, 0.01)}
  first, second, _ = charts.exit_map(runs).axes
  assert [a.get_title() for a in (first, second)] == list(runs)
  limits = [next(iter(a.collections)).get_clim() for a in (first, second)]
  assert limits == [(0, 1), (0, 1)]
  assert labels(second) == ['exit03']


def test_unit_map_ends_a_row_where_its_unit_was_erased(implosion):
  result, gates = implosion
  rounds = typed(result).rounds
  axes, _ = charts.unit_map(gates, rounds).axes
  names, w = in_order(rounds[0].learned['priority']), values(axes)
  assert w.shape == (25, 60)
  assert labels(axes) == [spoken(name) for name in names]
  drawn = dict(zip(names, (~np.isnan(w)).sum(1)))
  for number, round_ in enumerate(rounds, 1):
    assert {drawn[unit] for unit in round_.erased} == {20 * number}
  at = names.index('stage2/block3')
  assert w[at, -1] == gates[-1]['priority']['stage2/block3']


def test_unit_map_crosses_out_every_erased_unit_once(implosion):
  result, gates = implosion
  rounds = typed(result).rounds
  axes, _ = charts.unit_map(gates, rounds).axes
  crosses = [line for line in axes.lines if line.get_marker() == 'x']
  names = in_order(rounds[0].learned['priority'])
  crossed = [[names[y] for y in np.asarray(line.get_ydata())] for line in crosses]
  assert crossed == [round_.erased for round_ in rounds]
  ends = [line.get_xdata()[0] for line in crosses]
  assert ends == [pytest.approx(102.5), pytest.approx(202.5), 300]


def test_unit_map_follows_the_layers_of_a_scanned_stack():
  lines = [
    {'stage': f'gates-{n}', 'step': s, 'priority': {f'blocks[{i}]': w for i, w in at}}
    for n, at in ((1, [(0, 0.1), (1, 0.2), (2, 0.3)]), (2, [(0, 0.1), (1, 0.3)]))
    for s in (0, 1)
  ]
  rounds = [made_up_round(lines[0]['priority'], ['blocks[1]']) for _ in range(2)]
  axes, _ = charts.unit_map(lines, rounds).axes
  nan = np.nan
  expected = [[0.1] * 4, [0.2, 0.2, nan, nan], [0.3] * 4]
  np.testing.assert_array_equal(values(axes), expected)
  crosses = [line.get_ydata()[0] for line in axes.lines if line.get_marker() == 'x']
  assert crosses == [1, 2]


def test_a_connection_is_a_full_mark_where_open_and_a_ring_where_closed(auxiliary):
  learned = auxiliary[0]['rounds'][0]['learned']
  (axes,) = charts.connections(learned['weight'], learned['open']).axes
  marks = {(l.get_xdata()[0], l.get_ydata()[0]): l for l in axes.lines}
  assert set(marks) == {(stage, tap) for stage in range(3) for tap in range(stage + 1)}
  rings = [at for at, mark in marks.items() if mark.get_mfc() == style.PAPER]
  assert rings == [(2, 0)]
  assert {m.get_mfc() for at, m in marks.items() if at != (2, 0)} == {style.FIRST}
  said = [f'{weight:.3f}' for weight in learned['weight'].values()]
  assert [text.get_text() for text in axes.texts] == said
  assert [t.get_text() for t in axes.get_xticklabels()] == [
    'stage1',
    'stage2',
    'stage3',
  ]
  assert labels(axes) == ['layer1', 'layer2', 'layer3']
  assert axes.yaxis_inverted()


# ---- rounds, and results of several runs ---------------------------------------------


def points_of(result: dict) -> list:
  """(units before and after, held-out accuracies) of every round."""
  return [(each.units, each.held_out) for each in typed(result).rounds]


def test_the_curve_begins_at_the_whole_network_and_gathers_the_seeds(implosion):
  points = points_of(implosion[0])
  curve = charts.collect_curve(points, points)
  assert list(curve['before']) == list(curve['after']) == [0, 4, 8, 12]
  assert curve['before'][0] == curve['after'][0] == [0.938, 0.938]
  assert curve['before'][8] == pytest.approx([0.81, 0.81])
  assert curve['after'][12] == pytest.approx([0.932, 0.932])


def drawn(axes: Axes) -> list[tuple[str, list, list]]:
  """(dashes, x, mean) of every series."""
  lines = [container[0] for container in axes.containers]
  return [(m.get_linestyle(), list(m.get_xdata()), list(m.get_ydata())) for m in lines]


def test_erased_curve_dashes_what_was_not_retrained(implosion):
  curve = charts.collect_curve(points_of(implosion[0]))
  figure = charts.erased_curve({'': curve}, 'held-out accuracy')
  (axes,) = figure.axes
  (before, _, low), (after, _, high) = drawn(axes)
  assert (before, after) == ('--', '-')
  assert low == pytest.approx([0.938, 0.85, 0.81, 0.77])
  assert high == pytest.approx([0.938, 0.936, 0.934, 0.932])
  said = [text.get_text() for text in figure.legends[0].get_texts()]
  assert said == ['right after erasing', 'retrained']
  assert (axes.get_xlabel(), axes.get_ylabel()) == ('erased units', 'held-out accuracy')


def test_erased_curves_of_one_kind_are_solid_and_named():
  curves = {
    'priority': {'before': {1: [0.8], 0: [0.9]}},
    'random': {'before': {0: [0.9, 0.9], 1: [0.5, 0.7]}},
  }
  figure = charts.erased_curve(curves)
  (axes,) = figure.axes
  assert drawn(axes) == [
    ('-', [0, 1], [0.9, 0.8]),
    ('-', [0, 1], [0.9, pytest.approx(0.6)]),
  ]
  bars = axes.containers[1][2][0].get_segments()
  assert bars[1][1][1] - bars[1][0][1] == pytest.approx(2 * np.std([0.5, 0.7], ddof=1))
  assert [text.get_text() for text in figure.legends[0].get_texts()] == list(curves)


def test_a_series_without_a_colour_is_refused():
  with pytest.raises(ValueError, match='at most 4 series, got 0, 1, 2, 3, 4'):
    charts.erased_curve({str(i): {'before': {0: [0.9]}} for i in range(5)})


def row(beta: float, seed: int, kept: int) -> dict:
  return {
    'seed': seed,
    'beta': beta,
    'kept': kept,
    'exits': 20,
    'accuracy_before': 0.89,
    'accuracy_cut': 0.88,
    'flops': 10 * kept,
    'flops_full': 200,
    'params': kept,
    'params_full': 40,
  }


def test_against_beta_has_accuracy_cost_and_depth_at_every_beta():
  rows = [row(0.1, 0, 1), row(0.0, 0, 4), row(0.0, 1, 6)]
  accuracy, cost, kept = charts.against_beta(rows).axes
  assert [t.get_text() for t in accuracy.get_xticklabels()] == ['0', '0.1']
  means = [y for axes in (accuracy, cost, kept) for _, _, y in drawn(axes)]
  assert means == [
    *([0.89, 0.89], [0.88, 0.88]),
    *(pytest.approx([0.25, 0.05]), pytest.approx([0.125, 0.025])),
    [5, 1],
  ]
  assert 'of 20' in kept.get_title(loc='left')


def test_an_accuracy_that_was_not_measured_is_a_gap_and_not_zero():
  rounds = [((9, 7), Accuracies(0.9)), ((7, 5), Accuracies(0.9, 0.8, 0.1, 0.7))]
  curve = charts.collect_curve(rounds)
  assert curve['after'][0] == [0.9] and curve['after'][4] == [0.8]
  assert np.isnan(curve['before'][2]).all() and np.isnan(curve['after'][2]).all()
  assert charts.erased_curve({'': curve}).axes
