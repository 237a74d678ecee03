"""The pictures of README and guides: they show the cuts that they are drawn from."""

import pytest

from experiments import picture
from experiments.result_files import read


def run():
  return read('trainable_gates/results/digits.json')['runs'][0]


@pytest.mark.parametrize('page', picture.PAGES)
def test_bars_are_the_widths_before_with_gates_and_after(page):
  axes = picture.cut(run(), *picture.PAGES[page]).axes
  heights = [[bar.get_height() for bar in each.patches] for each in axes]
  full, kept = map(list, zip(*run()['widths'].values()))
  assert heights == [full + full, full + kept, kept + kept]
  assert '269 k parameters, 98.7 %' in axes[0].get_title()


def test_slices_of_a_group_have_its_colour_in_every_kernel():
  """The second kernel loses 2 of its 8 rows and 3 of its 6 columns."""
  before, decided, cut = picture.groups(*picture.PAGES['light']).axes
  cells = lambda axes: [mesh.get_array() for mesh in axes.collections]
  assert [c.shape[:2] for c in cells(before)] == [(5, 8), (8, 6), (6, 4)]
  assert [c.shape[:2] for c in cells(cut)] == [(5, 6), (6, 3), (3, 4)]
  neutral = cells(before)[0][0, 0]
  gone = [(c != neutral).any(-1) for c in cells(decided)]
  assert [g.all(0).sum() for g in gone] == [2, 3, 0]
  assert [g.all(1).sum() for g in gone] == [0, 2, 3]
