"""Charts: what they draw is what the run says."""

import numpy as np
import pytest
from matplotlib.figure import Figure

from depthprune.report import charts, tables
from depthprune.report.run_files import read


def texts(figure: Figure) -> list[str]:
  return [text for a in figure.axes for t in a.texts if (text := t.get_text())]


def test_width_chart_has_a_bar_before_and_after_for_every_layer(result):
  widths = tables.widths(result)
  (axes,) = charts.width_chart(widths).axes
  lengths = [bar.get_width() for bar in axes.patches]  # pyright: ignore[reportAttributeAccessIssue]
  assert lengths == [w[0] for w in widths.values()] + [w[1] for w in widths.values()]
  assert [t.get_text() for t in axes.get_yticklabels()] == list(widths)
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


def test_gate_map_is_the_fraction_that_is_open(run_directory):
  run = read(run_directory)
  figure = charts.gate_map(run.gates, tables.widths(run.result))
  values = np.asarray(figure.axes[0].collections[0].get_array())
  assert values.shape == (12, 26)
  np.testing.assert_allclose(values[:, 0], 1)
  assert values[3, -1] == pytest.approx(
    run.gates[-1]['open']['stage1/block2/conv1:3'] / 16
  )


def test_a_gate_history_of_one_line_is_drawn(result):
  line = {'step': 5, 'open': {'stem/conv:3': 8}}
  figure = charts.gate_map([line], tables.widths(result))
  values = np.asarray(figure.axes[0].collections[0].get_array())
  np.testing.assert_array_equal(values, [[0.5]])


def test_stages_follow_each_other_in_the_gate_map_too():
  lines = [
    {'stage': stage, 'step': step, 'open': {'conv': 8}}
    for stage in ('gates-1', 'gates-2')
    for step in (0, 10, 20)
  ]
  mesh = charts.gate_map(lines, {'conv': (16, 8)}).axes[0].collections[0]
  corners = mesh.get_coordinates()[0, :, 0]  # pyright: ignore
  assert list(corners) == [0, 5, 15, 20, 25, 35, 40]
