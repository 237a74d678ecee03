"""Charts of cascades and their exits: what they draw is what the runs say."""

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from depthprune.report import exit_charts, style, tables
from tests.report.cascades import OWN, WHOLE, cascade_of, made_up_sidenet
from tests.report.runs import typed


def series_of(*results: dict) -> exit_charts.Series:
  found = [(cascade_of(r), typed(r)) for r in results]
  return exit_charts.collect_series(*((c, r.accuracy, r.flops) for c, r in found))


def drawn(axes: Axes, marker: str) -> list[tuple[float, float]]:
  """Single points with this marker."""
  lines = [l for l in axes.lines if l.get_marker() == marker and l.get_ls() == 'None']
  return [(float(l.get_xdata()[0]), float(l.get_ydata()[0])) for l in lines]


def explained(figure: Figure) -> list[str]:
  return [text.get_text() for text in figure.legends[0].get_texts()]


def names(axes: Axes) -> list[str]:
  return [text.get_text() for text in axes.texts]


def test_one_run_is_its_candidates_the_chosen_one_and_the_single_exits(sidenet):
  figure = exit_charts.compute_curve({'': series_of(sidenet)})
  whole, near = figure.axes
  (curve,) = (line for line in whole.lines if len(line.get_xdata()) == 30)
  points = sidenet['cascade']['curve'][::-1]
  np.testing.assert_allclose(curve.get_xdata(), [p['cost'] / WHOLE for p in points])
  np.testing.assert_allclose(curve.get_ydata(), [p['accuracy'] for p in points])
  assert drawn(whole, '*') == [(pytest.approx(0.648), 0.9356)]
  assert drawn(whole, 'o')[0] == (pytest.approx(0.2), 0.77)
  assert names(whole) == [f'exit{k}' for k in range(1, 6)]
  assert explained(figure) == [
    *('cascades', 'chosen', 'all leave at one exit', 'MainNet')
  ]
  assert near.get_ylim()[0] == pytest.approx(OWN - 0.03)
  assert whole.get_xlabel() == "FLOPs, share of the MainNet's"
  assert whole.get_ylabel() == 'test accuracy'


def test_the_mainnet_is_a_dashed_line_at_its_accuracy(sidenet):
  (axes, _) = exit_charts.compute_curve({'': series_of(sidenet)}).axes
  dashed = [line for line in axes.lines if line.get_linestyle() == '--']
  assert [set(line.get_ydata()) for line in dashed] == [{OWN}]


def test_seeds_are_a_mean_and_a_band_where_all_of_them_reach():
  seeds = [[(0.2, 0.5), (1.0, 0.9)], [(0.4, 0.7), (1.2, 0.9)]]
  series = exit_charts.Series(seeds, [0.9, 0.9])
  (axes, _) = exit_charts.compute_curve({'frozen': series}).axes
  (band,) = axes.collections
  corners = band.get_paths()[0].vertices
  assert corners.min(0) == pytest.approx([0.4, 0.6])
  assert corners.max(0) == pytest.approx([1.0, 0.9])
  _, mean = axes.lines
  assert (mean.get_xdata()[0], mean.get_ydata()[0]) == pytest.approx((0.4, 0.65))
  assert mean.get_ydata()[-1] == pytest.approx((0.9 + 0.85) / 2)


def test_regimes_have_colours_of_their_own_and_one_mainnet_if_it_is_the_same(sidenet):
  series = series_of(sidenet, sidenet, made_up_sidenet())
  same = {'frozen': series, 'entropy': series}
  figure = exit_charts.compute_curve(same)
  assert explained(figure)[:2] == ['frozen', 'entropy']
  assert len(drawn(figure.axes[0], '*')) == 6
  assert names(figure.axes[0]) == []
  dashed = lambda figure: {
    line.get_color() for line in figure.axes[0].lines if line.get_linestyle() == '--'
  }
  assert dashed(figure) == {style.MUTED}
  other = {**same, 'joint': series._replace(own=[0.95] * 3)}
  colours = {style.FIRST, style.SECOND, style.THIRD}
  assert dashed(exit_charts.compute_curve(other)) == colours


def test_more_series_than_colours_are_refused(sidenet):
  series = series_of(sidenet)
  with pytest.raises(ValueError, match='expected at most 4 series, got a, b, c, d, e'):
    exit_charts.compute_curve(dict.fromkeys('abcde', series))


def test_what_lies_near_the_mainnet_needs_no_closer_look():
  series = exit_charts.Series([[(0.7, 0.93), (1.01, 0.94)]], [0.94])
  figure = exit_charts.compute_curve({'': series})
  assert len(figure.axes) == 1
  assert explained(figure) == ['cascades', 'MainNet']


def test_names_that_would_cover_each_other_are_left_out():
  exits = {f'exit{k}': [(0.5 + k / 1000, 0.7)] for k in range(1, 9)}
  series = exit_charts.Series([[(0.2, 0.5), (1.0, 0.9)]], [0.9], exits=exits)
  (axes, _) = exit_charts.compute_curve({'': series}).axes
  assert names(axes) == ['exit1']
  assert len(drawn(axes, 'o')) == 8


def test_points_without_a_number_are_left_out(sidenet):
  sidenet['cascade']['curve'][3]['accuracy'] = None
  series = series_of(sidenet)
  assert len(series.seeds[0]) == 29
  assert '</svg>' in style.svg(exit_charts.compute_curve({'': series}), 'a', 'b')


def test_an_exit_of_unknown_accuracy_has_no_ring(sidenet):
  sidenet['cascade']['exit_accuracy']['exit2'] = None
  series = series_of(sidenet)
  assert list(series.exits) == ['exit1', 'exit3', 'exit4', 'exit5']
  assert '</svg>' in style.svg(exit_charts.compute_curve({'': series}), 'a', 'b')


# ---- single exits --------------------------------------------------------------------


def bars(axes: Axes) -> np.ndarray:
  return np.array([[bar.get_width(), bar.get_height()] for bar in axes.patches])


@pytest.mark.parametrize('count', [1, 5, 8])
def test_every_exit_has_a_diagram(count):
  figure = exit_charts.reliability(cascade_of(made_up_sidenet(count)).calibration)
  panels = [axes for axes in figure.axes if axes.get_visible()]
  titles = [*(f'exit{k}, T 1.40' for k in range(1, count + 1)), 'main']
  assert [axes.get_title() for axes in panels] == titles
  below = [axes.get_xlabel() for axes in panels[-3:]]
  assert below == ['confidence'] * min(3, count + 1)


def test_a_diagram_has_the_diagonal_both_curves_and_the_counts(sidenet):
  axes, *_ = exit_charts.reliability(cascade_of(sidenet).calibration).axes
  diagonal, before, after = axes.lines
  assert list(diagonal.get_xdata()) == list(diagonal.get_ydata()) == [0, 1]
  bins = sidenet['cascade']['calibration']['exit1']['all']['before']['bins']
  np.testing.assert_allclose(before.get_ydata(), bins['accuracy'][2:])  # two are empty
  np.testing.assert_allclose(before.get_xdata(), bins['confidence'][2:])
  assert np.all(after.get_ydata() > before.get_ydata())
  heights = bars(axes)[:, 1]
  assert heights.sum() == pytest.approx(1)
  np.testing.assert_allclose(heights * sum(bins['count']), bins['count'])
  assert names(axes) == ['ECE 6.2 → 1.1 %']


def test_marks_are_as_large_as_their_bins_are_full(sidenet):
  axes, *_ = exit_charts.reliability(cascade_of(sidenet).calibration).axes
  for marks in axes.collections:
    assert np.all(np.diff(marks.get_sizes()) > 0)


def test_the_network_s_own_exit_is_not_scaled(sidenet):
  axes = exit_charts.reliability(cascade_of(sidenet).calibration).axes[5]
  assert len(axes.lines) == 2
  assert names(axes) == ['ECE 1.5 %']


def test_an_exit_that_was_not_measured_has_an_empty_diagram(sidenet):
  calibration = sidenet['cascade']['calibration']
  calibration['exit1'] |= {'all': None}
  calibration['exit2']['all']['after']['ece'] = None
  found = cascade_of(sidenet).calibration
  first, second, *_ = exit_charts.reliability(found).axes
  assert (len(first.lines), names(first)) == (1, [])
  assert names(second) == ['ECE 6.2 → – %']


def test_where_they_leave_is_a_bar_with_its_share(sidenet):
  cascade = cascade_of(sidenet)
  right = tables.accuracy_of_leavers(cascade)
  (axes,) = exit_charts.leaving(cascade.shares, right).axes
  np.testing.assert_allclose(bars(axes)[:, 0], [*[0.12] * 5, 0.4])
  assert [t.get_text() for t in axes.get_yticklabels()] == list(cascade.shares)
  assert names(axes)[:2] == ['12.0 %, 98.4 % of them right', '12.0 %']
  assert axes.yaxis_inverted()


def test_no_share_is_above_all():
  (axes,) = exit_charts.leaving({'exit1': 0.97, 'main': 0.03}, {'exit1': 0.99}).axes
  assert max(axes.get_xticks()) == 1
  assert axes.get_xlim()[1] > 1.3  # room for the text
