"""Reading `arch`."""

import numpy as np
import pytest

from depthprune.models.arch import beneath, complete, nearest, within

WIDTHS = {'stage1/conv': 8, 'stage1/branch': 1, 'stage10/conv': 4, 'exit/early': 1}


def test_what_is_not_mentioned_is_as_in_the_full_network():
  assert complete({}, WIDTHS, 'net') == WIDTHS
  arch = {'stage1/conv': np.int64(3), 'exit/early': 0}
  assert complete(arch, WIDTHS, 'net') == {**WIDTHS, **arch}


@pytest.mark.parametrize(
  ('arch', 'message'),
  [
    ({'stage1/cnv': 3}, r"^net: .*no key 'stage1/cnv'.*Nearest: stage1/conv"),
    ({'stage1/conv': 9}, r"arch\['stage1/conv'\] is 9; expected .* from 1 to 8"),
    ({'stage1/conv': 0}, 'from 1 to 8; to remove a unit, set its branch to 0'),
    ({'stage1/conv': 2.5}, 'is 2.5; expected an integer'),
    ({'stage1/branch': 2}, 'from 0 to 1$'),
    ({'exit/early': -1}, 'from 0 to 1$'),
  ],
)
def test_bad_entries_say_where_expected_and_got(arch, message):
  with pytest.raises(ValueError, match=message):
    complete(arch, WIDTHS, 'net')


def test_within_and_beneath_are_inverse_and_respect_whole_names():
  assert within(WIDTHS, 'stage1') == {'conv': 8, 'branch': 1}
  assert beneath(within(WIDTHS, 'stage10'), 'stage10') == {'stage10/conv': 4}


def test_nearest_lists_what_there_is_when_nothing_is_alike():
  assert nearest('zzz', ['b', 'a']) == 'There are: a, b.'
  assert nearest('zzz', map(str, range(10, 20))).endswith('17, ….')
