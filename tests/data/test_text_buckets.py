"""Batches of texts: each once, of about one length, a pure function of the step."""

import jax
import numpy as np
import pytest

from depthprune.data import text
from depthprune.data.dataset import DataError
from depthprune.data.text import TextSampler

KEY = jax.random.key(0)


def numbered(lengths, room: int) -> text.Split:
  """A text of each length, whose tokens and label are its own number."""
  lengths = np.asarray(lengths)
  mask = np.arange(room) < lengths[:, None]
  label = np.arange(len(lengths), dtype=np.int32)
  return {'tokens': label[:, None] * mask, 'mask': mask, 'label': label}


def varied(n: int, room: int = 64, seed: int = 0) -> text.Split:
  return numbered(np.random.RandomState(seed).randint(2, room + 1, n), room)


def whole(batch) -> None:
  """Every row of a batch is whole: nothing is cut off, no row has another's label."""
  tokens, mask, label = (np.asarray(batch[k]) for k in ('tokens', 'mask', 'label'))
  assert batch['tokens'].dtype == np.int32 and batch['mask'].dtype == bool
  np.testing.assert_array_equal(tokens, label[:, None] * mask)


@pytest.mark.parametrize(
  ('length', 'expected'),
  [(5, (5,)), (8, (8,)), (72, (8, 16, 32, 64, 72)), (128, (8, 16, 32, 64, 128))],
)
def test_buckets_double_up_to_the_room_there_is(length, expected):
  assert text.buckets(length) == expected


def test_every_text_comes_once_an_epoch_in_an_order_of_its_own():
  split, get = varied(240), TextSampler(KEY, 8).stepwise()
  epochs = [[get(split, i) for i in range(30 * e, 30 * e + 30)] for e in (0, 1)]
  orders = [np.concatenate([b['label'] for b in epoch]).tolist() for epoch in epochs]
  assert sorted(orders[0]) == sorted(orders[1]) == list(range(240))
  assert orders[0] != orders[1]
  for batch in epochs[0]:
    whole(batch)


def test_what_does_not_fill_a_batch_takes_its_turn_in_another_epoch():
  split, seen = varied(7), set()
  get = TextSampler(KEY, 3).stepwise()
  for step in range(12):
    batch = get(split, step)
    assert len(batch['label']) == 3
    seen |= set(np.asarray(batch['label']).tolist())
  assert seen == set(range(7))
  with pytest.raises(DataError, match='expected 1 to 7, .*got 8'):
    TextSampler(KEY, 8)(split, 0)


def test_a_batch_is_a_pure_function_of_key_and_step():
  split, sampler = varied(240), TextSampler(KEY, 8)
  later = sampler.stepwise()  # as in a run that was resumed in the second epoch
  for step in (37, 30, 5):
    one, two = sampler(split, step), later(split, step)
    np.testing.assert_array_equal(one['label'], two['label'])
    np.testing.assert_array_equal(one['tokens'], two['tokens'])
  other = TextSampler(jax.random.key(1), 8)(split, 5)
  assert other['label'].tolist() != sampler(split, 5)['label'].tolist()


def test_a_batch_is_as_long_as_the_smallest_bucket_that_holds_it():
  split, get = varied(800), TextSampler(KEY, 8).stepwise()
  batches = [get(split, i) for i in range(100)]
  shapes, real = [b['tokens'].shape[1] for b in batches], 0
  for batch, width in zip(batches, shapes, strict=True):
    longest = int(batch['mask'].sum(1).max())
    smaller = [b for b in text.buckets(64) if b < width]
    assert max(smaller, default=0) < longest <= width
    real += int(batch['mask'].sum())
  assert set(shapes) == {8, 16, 32, 64}
  assert shapes != sorted(shapes), 'batches are shuffled'
  assert real / (8 * sum(shapes)) > 0.7, 'little is padding'


def test_evaluation_sees_every_text_once_from_short_to_long():
  split = varied(101)
  batches = list(text.batches(split, 8))
  shapes = [b['tokens'].shape for b in batches]
  assert {rows for rows, _ in shapes} == {8}
  assert shapes == sorted(shapes) and {n for _, n in shapes} == {8, 16, 32, 64}
  real = [np.asarray(b['label'])[np.asarray(b['weight']) > 0] for b in batches]
  assert sorted(np.concatenate(real).tolist()) == list(range(101))
  for batch in batches:
    whole(batch)
    assert batch['weight'].dtype == np.float32 and batch['weight'][0] == 1
    assert batch['mask'].any(1).all(), 'a padded row is a text, not padding alone'


def test_evaluation_of_nothing_and_of_one():
  assert list(text.batches(numbered([], 8), 4)) == []
  (batch,) = text.batches(numbered([3], 8), 4)
  assert batch['weight'].tolist() == [1, 0, 0, 0]
  with pytest.raises(DataError, match='at least one text in a batch, got 0'):
    list(text.batches(numbered([3], 8), 0))
