"""Charts of single exits: reliability and who leaves where."""

import numpy as np
import pytest
from matplotlib.axes import Axes

from depthprune.report import cascade, exit_charts
from tests.report.cascades import made_up_sidenet


def shown(axes: Axes) -> list[str]:
  return [text.get_text() for text in axes.texts]


def bars(axes: Axes) -> np.ndarray:
  return np.array([[bar.get_width(), bar.get_height()] for bar in axes.patches])


@pytest.mark.parametrize('count', [1, 5, 8])
def test_every_exit_has_a_diagram(count):
  calibration = made_up_sidenet(count)['cascade']['calibration']
  figure = exit_charts.reliability(calibration)
  panels = [axes for axes in figure.axes if axes.get_visible()]
  titles = [*(f'exit{k}, T 1.40' for k in range(1, count + 1)), 'main']
  assert [axes.get_title() for axes in panels] == titles
  below = [axes.get_xlabel() for axes in panels[-3:]]
  assert below == ['confidence'] * min(3, count + 1)


def test_a_diagram_has_the_diagonal_both_curves_and_the_counts(sidenet):
  calibration = sidenet['cascade']['calibration']
  axes, *_ = exit_charts.reliability(calibration).axes
  diagonal, before, after = axes.lines
  assert list(diagonal.get_xdata()) == list(diagonal.get_ydata()) == [0, 1]
  bins = calibration['exit1']['all']['before']['bins']
  np.testing.assert_allclose(before.get_ydata(), bins['accuracy'][2:])  # two are empty
  np.testing.assert_allclose(before.get_xdata(), bins['confidence'][2:])
  assert np.all(after.get_ydata() > before.get_ydata())
  heights = bars(axes)[:, 1]
  assert heights.sum() == pytest.approx(1)
  np.testing.assert_allclose(heights * sum(bins['count']), bins['count'])
  assert shown(axes) == ['ECE 6.2 → 1.1 %']


def test_marks_are_as_large_as_their_bins_are_full(sidenet):
  axes, *_ = exit_charts.reliability(sidenet['cascade']['calibration']).axes
  for marks in axes.collections:
    assert np.all(np.diff(marks.get_sizes()) > 0)


def test_the_network_s_own_exit_is_not_scaled(sidenet):
  axes = exit_charts.reliability(sidenet['cascade']['calibration']).axes[5]
  assert len(axes.lines) == 2
  assert shown(axes) == ['ECE 1.5 %']


def test_an_exit_that_was_not_measured_has_an_empty_diagram(sidenet):
  calibration = sidenet['cascade']['calibration']
  calibration['exit1'] |= {'all': None}
  calibration['exit2']['all']['after']['ece'] = None
  first, second, *_ = exit_charts.reliability(calibration).axes
  assert (len(first.lines), shown(first)) == (1, [])
  assert shown(second) == ['ECE 6.2 → – %']


def test_where_they_leave_is_a_bar_with_its_share(sidenet):
  shares, right = sidenet['cascade']['shares'], cascade.right(sidenet)
  (axes,) = exit_charts.leaving(shares, right).axes
  np.testing.assert_allclose(bars(axes)[:, 0], [*[0.12] * 5, 0.4])
  assert [t.get_text() for t in axes.get_yticklabels()] == list(shares)
  assert shown(axes)[:2] == ['12.0 %, 98.4 % of them right', '12.0 %']
  assert axes.yaxis_inverted()


def test_no_share_is_above_all():
  (axes,) = exit_charts.leaving({'exit1': 0.97, 'main': 0.03}, {'exit1': 0.99}).axes
  assert max(axes.get_xticks()) == 1
  assert axes.get_xlim()[1] > 1.3  # room for the text
