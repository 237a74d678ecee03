"""Packed texts: every token is followed by the right one."""

import numpy as np
import pytest

from depthprune.data.packed import pack


def test_rows_go_on_where_the_last_one_ended():
  packed = pack([[1, 2, 3], [4], [5, 6, 7, 8]], length=3, separator=0)
  np.testing.assert_array_equal(packed['image'], [[1, 2, 3], [0, 4, 0], [5, 6, 7]])
  np.testing.assert_array_equal(packed['label'], [[2, 3, 0], [4, 0, 5], [6, 7, 8]])
  assert packed['image'].dtype == packed['label'].dtype == np.int32


def test_texts_that_fill_no_row_are_refused():
  assert len(pack([[1, 2, 3]], 3, 0)['image']) == 1
  with pytest.raises(ValueError, match='expected more than 4 tokens, got 4'):
    pack([[1, 2, 3]], 4, 0)
