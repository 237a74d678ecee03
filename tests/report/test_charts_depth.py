"""Charts of depth: what they draw is what the run says."""

import numpy as np
import pytest
from matplotlib.axes import Axes

from depthprune.report import charts, sentences


def values(axes: Axes) -> np.ndarray:
  (mesh,) = (c for c in axes.collections if hasattr(c, 'get_coordinates'))
  return np.ma.filled(np.ma.asarray(mesh.get_array()), np.nan)


def labels(axes: Axes) -> list[str]:
  return [label.get_text() for label in axes.get_yticklabels()]


def test_importance_map_has_a_row_per_exit_and_marks_the_kept_one(netcut):
  _, gates = netcut
  axes, bar = charts.importance_map({'': (gates, 'exit03')}).axes
  w = values(axes)
  assert w.shape == (20, 51)
  np.testing.assert_allclose(w[:, 0], 1 / 20)
  np.testing.assert_allclose(w.sum(0), 1)
  assert w[:, -1].argmax() == 2
  assert labels(axes)[2] == 'exit03'
  assert axes.yaxis_inverted()
  assert (axes.get_xlabel(), bar.get_ylabel()) == ('step', 'importance w')


def test_importance_maps_of_several_runs_share_a_scale(netcut):
  _, gates = netcut
  runs = {f'β = {beta:g}': (gates, 'exit03') for beta in (0, 0.01)}
  first, second, _ = charts.importance_map(runs).axes
  assert [a.get_title() for a in (first, second)] == list(runs)
  limits = [next(iter(a.collections)).get_clim() for a in (first, second)]
  assert limits == [(0, 1), (0, 1)]
  assert labels(second) == ['exit03']


def test_priority_map_ends_a_row_where_its_unit_was_erased(implosion):
  result, gates = implosion
  rounds = result['rounds']
  axes, _ = charts.priority_map(gates, rounds).axes
  names, w = labels(axes), values(axes)
  assert w.shape == (25, 60)
  assert names == sentences.in_order(rounds[0]['learned']['priority'])
  drawn = dict(zip(names, (~np.isnan(w)).sum(1)))
  for number, round_ in enumerate(rounds, 1):
    assert {drawn[unit] for unit in round_['erased']} == {20 * number}
  at = names.index('stage2/block3')
  assert w[at, -1] == gates[-1]['priority']['stage2/block3']


def test_priority_map_crosses_out_every_erased_unit_once(implosion):
  result, gates = implosion
  axes, _ = charts.priority_map(gates, result['rounds']).axes
  crosses = [line for line in axes.lines if line.get_marker() == 'x']
  names = labels(axes)
  crossed = [[names[y] for y in np.asarray(line.get_ydata())] for line in crosses]
  assert crossed == [round_['erased'] for round_ in result['rounds']]
  ends = [line.get_xdata()[0] for line in crosses]
  assert ends == [pytest.approx(102.5), pytest.approx(202.5), 300]


def test_priority_map_follows_the_layers_of_a_scanned_stack():
  lines = [
    {'stage': f'gates-{n}', 'step': s, 'priority': {f'blocks[{i}]': w for i, w in at}}
    for n, at in ((1, [(0, 0.1), (1, 0.2), (2, 0.3)]), (2, [(0, 0.1), (1, 0.3)]))
    for s in (0, 1)
  ]
  priority = lines[0]['priority']
  rounds = [
    {'learned': {'priority': priority}, 'erased': ['blocks[1]']},
    {'learned': {'priority': priority}, 'erased': ['blocks[1]']},
  ]
  axes, _ = charts.priority_map(lines, rounds).axes
  nan = np.nan
  expected = [[0.1] * 4, [0.2, 0.2, nan, nan], [0.3] * 4]
  np.testing.assert_array_equal(values(axes), expected)
  crosses = [line.get_ydata()[0] for line in axes.lines if line.get_marker() == 'x']
  assert crosses == [1, 2]


def drawn(axes: Axes) -> list[tuple[str, list, list]]:
  """(dashes, x, mean) of every series."""
  lines = [container[0] for container in axes.containers]
  return [(m.get_linestyle(), list(m.get_xdata()), list(m.get_ydata())) for m in lines]


def test_erased_curve_dashes_what_was_not_retrained(implosion):
  curve = sentences.curve(implosion[0]['rounds'])
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
