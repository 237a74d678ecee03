"""The picture of the README: bars are the widths of the run that it is drawn from."""

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
