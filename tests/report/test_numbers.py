"""Numbers as text, and names in order."""

import pytest

from depthprune.report import numbers


@pytest.mark.parametrize(
  ('number', 'text'),
  [
    (81_100_000, '81.1 M'),
    (272_474, '272 k'),
    (999_600, '1.00 M'),
    (125_490_000_000, '125 G'),
    (1000, '1.00 k'),
    (999, '999'),
    (0, '0'),
  ],
)
def test_counts_have_three_digits(number, text):
  assert numbers.count(number) == text


@pytest.mark.parametrize(
  ('value', 'text'), [(0.0123, '0.0123 ms'), (1.0, '1.00 ms'), (1234.5, '1230 ms')]
)
def test_milliseconds_have_three_digits(value, text):
  assert numbers.milliseconds(value) == text


def test_a_change_is_in_percentage_points_with_its_sign():
  assert numbers.points(0.981, 0.9) == '-8.10 points'
  assert numbers.points(0.9, 0.9) == '+0.00 points'


@pytest.mark.parametrize(
  ('values', 'text'),
  [([0.5], '0.50'), ([1, 2], '1.50 ± 0.71'), ([0, 0], '0.00 ± 0.00')],
)
def test_one_value_has_no_deviation(values, text):
  assert numbers.spread(values) == text


def test_names_are_in_the_network_s_order():
  names = [
    'stage1/block10',
    'stage2/block0',
    'stage1/block2',
    'b[11]',
    'b[9]',
    'stage1',
  ]
  assert numbers.in_order(names) == [
    *('b[9]', 'b[11]', 'stage1', 'stage1/block2', 'stage1/block10', 'stage2/block0'),
  ]
