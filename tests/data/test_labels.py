"""Labels of a user's own: numbered from 0, refused by name, a test split set apart."""

import numpy as np
import pytest

from depthprune.data import labels
from depthprune.data.dataset import DataError


def numbered(train, **others):
  given = {'train': train, **others}
  return labels.number('mine', {s: np.arange(len(y)) for s, y in given.items()}, given)


@pytest.mark.parametrize(
  ('given', 'names'),
  [
    ([0, 1, 2, 1], ()),
    ([1, 2, 3, 2], ('1', '2', '3')),
    ([-1, 0, 5, 0], ('-1', '0', '5')),
    ([0.0, 1.0, 2.0, 1.0], ()),
    (np.array([[7], [8], [9], [8]], np.uint8), ('7', '8', '9')),
    (['a', 'b', 'ü', 'b'], ('a', 'b', 'ü')),
    (np.array([b'a', b'b', b'c', b'b']), ('a', 'b', 'c')),
    (np.array(['a', 'b', 'c', 'b'], object), ('a', 'b', 'c')),
    (np.eye(3)[[0, 1, 2, 1]], ()),
    (np.eye(3, dtype=bool)[[0, 1, 2, 1]], ()),
  ],
)
def test_classes_are_the_sorted_labels(given, names):
  parts = numbered(given)
  assert parts.labels['train'].tolist() == [0, 1, 2, 1]
  assert parts.labels['train'].dtype == np.int32
  assert (parts.names, parts.classes) == (names, 3)


def test_numbers_that_change_are_told():
  assert numbered([0, 1, 1]).notes == ()
  assert numbered([1, 2, 2]).notes == ('classes 0 to 1 are labels 1, 2',)
  many = numbered(np.arange(5, 105)).notes
  assert many == ('classes 0 to 99 are labels 5, 6, 7, 8, 9, ... (100)',)


def test_all_splits_are_numbered_alike():
  parts = numbered([3, 9, 4], test=[9, 9], validation=[4])
  assert parts.labels['test'].tolist() == [2, 2]
  assert parts.labels['validation'].tolist() == [1]


@pytest.mark.parametrize(
  ('given', 'said'),
  [
    ({'train': [4, 4]}, 'two classes or more, got 4 alone'),
    ({'train': []}, 'expected examples to train on'),
    ({'train': [0, 1], 'test': [1, 7]}, 'the test split has the label 7, of which'),
    ({'train': ['a', 'b'], 'test': ['a', 'A']}, 'test split has the label A'),
    ({'train': [0.0, 1.5]}, 'whole numbers or strings, got 1.5 in row 1'),
    ({'train': [0.0, np.nan]}, 'got nan in row 1'),
    ({'train': [[1, 0], [1, 1]]}, r'one-hot \[n, classes\], got 2 numbers.* row 1'),
    ({'train': [[0.3, 0.7], [0.5, 0.5]]}, 'row 0'),
    ({'train': np.zeros((2, 4, 4))}, r'got float64 \[2, 4, 4\]'),
    ({'train': [None, 3]}, 'got object'),
  ],
)
def test_what_is_no_class_is_refused(given, said):
  with pytest.raises(DataError, match=said):
    labels.number('mine', {s: np.arange(len(y)) for s, y in given.items()}, given)


def test_examples_and_labels_are_counted():
  with pytest.raises(DataError, match='got 3 examples and 2 labels'):
    labels.number('mine', {'train': np.arange(3)}, {'train': [0, 1]})


def test_a_quarter_of_every_class_is_set_apart_by_name_alone():
  y = np.repeat([0, 1, 2], [40, 8, 1])
  keys = np.array([f'{i:02}.png' for i in range(49)])
  order = np.random.default_rng(0).permutation(49)

  def tested(rows):
    parts = labels.number('mine', {'train': keys[rows]}, {'train': y[rows]})
    return labels.tested('mine', parts, keys[rows])

  first, other = tested(np.arange(49)), tested(order)
  assert {*first.items['test']} == {*other.items['test']}
  assert np.bincount(first.labels['test']).tolist() == [10, 2]
  assert np.bincount(first.labels['train']).tolist() == [30, 6, 1]
  assert 'a quarter of every class is set apart' in first.notes[-1]
  # One more image moves no other one out of a split but at the border.
  more = labels.tested(
    'mine',
    labels.number(
      'mine', {'train': np.append(keys, 'z.png')}, {'train': np.append(y, 1)}
    ),
    [*keys, 'z.png'],
  )
  assert len({*first.items['test']} - {*more.items['test']}) <= 1


def test_without_test_examples_those_for_validation_are_tested_on():
  parts = labels.tested('mine', numbered([0, 1], validation=[1]))
  assert parts.labels['test'].tolist() == [1] and 'validation' not in parts.items
  assert parts.notes == ('mine has no test split: its validation split is tested on',)
  whole = numbered([0, 1], validation=[1], test=[0])
  assert labels.tested('mine', whole) is whole
