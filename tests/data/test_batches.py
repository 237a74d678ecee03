"""Batches of arrays and iterables: names, orders, padding, iterators that end."""

import jax
import numpy as np
import pytest

from depthprune.data import batches
from depthprune.data.dataset import DataError, inputs_of

X, Y = np.arange(20.0).reshape(10, 2), np.arange(10)
KEY = jax.random.key(0)


class Tensor:
  """What numpy can read of a tensor of PyTorch."""

  def __init__(self, x):
    self.x = x

  def detach(self):
    return self

  def cpu(self):
    return self

  def __array__(self, dtype=None, copy=None):
    return np.asarray(self.x, dtype)


@pytest.mark.parametrize(
  ('given', 'inputs'),
  [
    ((X, Y), 1),
    ([X, Y], 1),
    (((X, X), Y), 2),
    ({'x': X, 'y': Y}, 1),
    ({'image': X, 'labels': Y}, 1),
    ({'images': Tensor(X), 'target': Tensor(Y)}, 1),
    ({'input_ids': X, 'attention_mask': Y, 'label': Y.astype(np.uint8)}, 2),
    ({'input': {'a': X, 'b': X}, 'label': Y}, 1),
  ],
)
def test_batches_get_the_names_that_networks_and_tasks_read(given, inputs):
  made = batches.named(given)
  assert len(inputs_of(made)) == inputs
  assert made['label'].dtype == np.int32 and made['label'].tolist() == Y.tolist()
  np.testing.assert_array_equal(jax.tree.leaves(inputs_of(made)[0])[0], X)
  assert made.get('mask', np.zeros(1, bool)).dtype == bool


def test_a_name_that_is_there_already_is_left():
  made = batches.named({'label': Y, 'target': X, 'image': X})
  assert made['target'].shape == (10, 2) and made['label'].shape == (10,)


def test_arrays_are_shuffled_in_every_epoch():
  batch_at, data = batches.sampled((X, Y), KEY, 4)
  seen = [np.asarray(batch_at(data, i)['label']) for i in range(4)]
  assert all(len({*a, *b}) == 8 for a, b in (seen[:2], seen[2:]))
  assert sorted({*seen[0], *seen[1]}) != sorted({*seen[2], *seen[3]})
  stepwise = batch_at.stepwise()
  for i in range(4):
    made = stepwise(data, i)
    np.testing.assert_array_equal(made['label'], seen[i])
    np.testing.assert_array_equal(made['input'], X[seen[i]])
  with pytest.raises(DataError, match='expected 1 to 10'):
    batch_at, data = batches.sampled((X, Y), KEY, 11)
    batch_at(data, 0)


def test_an_iterable_is_gone_through_again_and_an_iterator_ends():
  pairs = [(X[:4], Y[:4]), (X[4:7], Y[4:7])]
  batch_at, data = batches.sampled(pairs, KEY, 128)
  assert data is None and batch_at.on_host
  sizes = [len(batch_at(None, i)['label']) for i in range(5)]
  assert sizes == [4, 3, 4, 3, 4]
  batch_at, _ = batches.sampled(iter(pairs), KEY, 128)
  assert [len(batch_at(None, i)['label']) for i in range(2)] == [4, 3]
  with pytest.raises(DataError, match='ended after 2 batches, at step 2: expected'):
    batch_at(None, 2)
  batch_at, _ = batches.sampled([], KEY, 128)
  with pytest.raises(DataError, match='ended after 0 batches'):
    batch_at(None, 0)


def test_all_is_judged_once_in_batches_of_one_size():
  made = batches.whole((X, Y), 4)
  assert [len(b['label']) for b in made] == [4, 4, 4]
  assert 'weight' not in made[0]
  assert made[2]['weight'].tolist() == [1, 1, 0, 0]
  assert made[2]['label'].tolist() == [8, 9, 9, 9]
  assert [len(b['label']) for b in batches.whole((X, Y), 5)] == [5, 5]
  assert [len(b['label']) for b in batches.whole((X, Y), 128)] == [10]
  stored = [{'image': X, 'label': Y}, {'image': X[:3], 'label': Y[:3]}]
  stored[1]['weight'] = np.array([1, 0.5, 0])
  made = batches.whole(stored, 2)
  assert made[1]['weight'].tolist() == [1, 0.5] + [0] * 8


def test_batch_statistics_see_no_padding():
  assert [len(b['label']) for b in batches.full((X, Y), 4)] == [4, 4]
  assert [len(b['label']) for b in batches.full((X, Y), 128)] == [10]
  assert batches.full((), 4) == []


@pytest.mark.parametrize(
  ('source', 'said'),
  [
    (X, 'got an array'),
    (None, 'got None'),
    ((X, Y[:3]), r"one length, got {'input': \[10\], 'label': \[3\]}"),
    ([X, Y], 'expected batches .* got an array'),
    ([(X, Y, Y)], 'got a tuple'),
  ],
)
def test_what_is_no_data_is_refused(source, said):
  with pytest.raises(DataError, match=said):
    batches.whole(source, 4)
