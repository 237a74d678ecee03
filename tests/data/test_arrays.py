"""Arrays of a user's own: their names, kinds and splits; the rest is refused."""

import jax
import numpy as np
import pytest

from depthprune.data import arrays, images, text
from depthprune.data.dataset import DataError
from depthprune.data.tfds import ImageSource

X = np.arange(8 * 4 * 4, dtype=np.uint8).reshape(8, 4, 4, 1)
Y = np.array([0, 1] * 4)


def made(given, resize=None) -> ImageSource:
  source = arrays.source('mine', given, resize)
  assert isinstance(source, ImageSource)
  return source


def everything(source) -> dict:
  parts = {'train': source.train, 'test': source.test, 'validation': source.validation}
  return {k: source.read(k, np.arange(n)) for k, n in parts.items() if n}


@pytest.mark.parametrize(
  'keys',
  [
    ('x', 'y'),
    ('X', 'label'),
    ('image', 'labels'),
    ('images', 'targets'),
    ('x_train', 'y_train'),
    ('train_images', 'train_labels'),
    ('features', 'class'),
  ],
)
def test_usual_names_are_read(keys):
  source = made({keys[0]: X, keys[1]: Y, 'something_else': np.zeros(3)})
  assert (source.train, source.test, source.classes) == (6, 2, 2)
  image = np.concatenate([part['image'] for part in everything(source).values()])
  np.testing.assert_array_equal(np.sort(image, 0), X)


@pytest.mark.parametrize('names', ['{}_{}', '{1}_{0}', '{1}/{0}', '{}-{}'])
def test_stored_splits_are_kept(names):
  of = {
    names.format(kind, split): (X if kind == 'x' else Y)[rows]
    for kind in 'xy'
    for split, rows in {'train': slice(4), 'val': slice(4, 6), 'test': [6, 7]}.items()
  }
  parts = everything(made(of))
  np.testing.assert_array_equal(parts['train']['image'], X[:4])
  np.testing.assert_array_equal(parts['validation']['image'], X[4:6])
  np.testing.assert_array_equal(parts['test']['image'], X[6:])


def test_pairs_and_pairs_of_pairs():
  assert (made((X, Y)).train, made([X, Y]).train) == (6, 6)
  two = made(((X[:6], Y[:6]), (X[6:], Y[6:])))
  assert (two.train, two.test) == (6, 2)
  three = made(((X[:4], Y[:4]), (X[4:6], Y[4:6]), (X[6:], Y[6:])))
  assert (three.train, three.validation, three.test) == (4, 2, 2)


@pytest.mark.parametrize(
  ('x', 'shape', 'dtype'),
  [
    (X[..., 0], (4, 4, 1), np.uint8),
    (X.astype(np.int64), (4, 4, 1), np.uint8),
    (X > 50, (4, 4, 1), np.uint8),
    (X.astype(np.int64) - 1, (4, 4, 1), np.float32),
    (X.astype(np.float64), (4, 4, 1), np.float32),
    (X / 255, (4, 4, 1), np.float32),
    (X.repeat(5, -1), (4, 4, 5), np.uint8),
    (X.reshape(8, 16), (16,), np.float32),
  ],
)
def test_inputs_are_normalised_by_the_training_split(x, shape, dtype):
  source = made((x, Y))
  data = images.divided('mine', source, held_out=0)
  assert (data.shape, data.train['image'].dtype) == (shape, dtype)
  sampler = data.sampler(jax.random.key(0), 6, augment=False)
  image = np.asarray(sampler(data.train, 0)['image'])
  assert image.dtype == np.float32 and image.shape == (6, *shape)
  over = tuple(range(image.ndim - 1))
  np.testing.assert_allclose(image.mean(over), 0, atol=1e-5)
  np.testing.assert_allclose(image.std(over), 1, atol=1e-4)
  (batch,) = data.batches(data.test, 4)
  assert batch['image'].shape == (4, *shape)
  assert batch['weight'].tolist() == [1, 1, 0, 0]


def test_a_constant_number_is_left_alone():
  x = np.stack([np.arange(8.0), np.full(8, 0.1)], 1)
  data = images.divided('mine', made((x, Y)), held_out=0)
  image = next(iter(data.batches(data.train, 6)))['image']
  assert np.abs(image[:, 1]).max() < 1e-6


def test_rows_of_numbers_are_not_augmented():
  data = images.divided('mine', made((X.reshape(8, 16), Y)), held_out=0)
  plain, augmented = (
    data.sampler(jax.random.key(0), 6, augment)(data.train, 0)
    for augment in (False, True)
  )
  np.testing.assert_array_equal(plain['image'], augmented['image'])


def test_images_are_resized_whatever_their_type():
  for x in (X, X / 255, X.repeat(7, -1)):
    source = made((x, Y), resize=2)
    image = source.read('train', np.arange(6))['image']
    assert image.shape == (6, 2, 2, x.shape[-1]) == (6, *source.shape)
    whole = made((x, Y)).read('train', np.arange(6))['image']
    np.testing.assert_allclose(
      image.mean((1, 2)), whole.mean((1, 2)), atol=1.0 * x.max() / 255
    )


def test_texts_and_pairs_of_texts():
  single = arrays.source('mine', ([f'text {i}' for i in range(8)], list('ab' * 4)))
  assert isinstance(single, text.TextSource) and not single.pair
  assert (single.train, single.test, single.classes) == (6, 2, 2)
  texts, label = single.read('test', np.arange(2))
  assert all(t.startswith('text ') for t in texts) and label.dtype == np.int32
  pair = arrays.source('mine', ([('a', f'b{i}') for i in range(8)], Y))
  assert isinstance(pair, text.TextSource) and pair.pair
  assert isinstance(pair.read('train', np.arange(1))[0][0], tuple)
  stored = arrays.source('mine', {'text': np.array(['a', 'b'] * 4), 'label': Y})
  assert isinstance(stored, text.TextSource)


@pytest.mark.parametrize(
  ('given', 'said'),
  [
    ({'a': X, 'b': Y}, 'expected the arrays x and y.*got a, b'),
    ({'x': X}, 'expected the arrays x and y'),
    ({'x': X, 'y': Y, 'x_test': X}, 'expected the arrays x and y'),
    ({'x': X, 'image': X, 'y': Y}, 'x and image may both be the examples'),
    (X, 'got a ndarray'),
    ((X, Y, X, Y), r'expected \(x, y\).*got 4 values'),
    ((X, Y[:3]), 'got 8 examples and 3 labels'),
    ((X.reshape(8, 1, 4, 4).repeat(3, 1).repeat(4, 3), Y), r'x.transpose\(0, 2, 3, 1'),
    ((X[:, :, :, None], Y), r'expected images \[n, height.*got \[8, 4, 4, 1, 1\]'),
    ((np.where(X == 17, np.nan, X), Y), 'example 1 has a number that is not finite'),
    ((X.astype(complex), Y), 'expected numbers'),
    (([X[0], X[0, :2]] * 4, Y), 'all examples of one shape'),
    (((X, Y), (X / 255, Y)), 'train: uint8.*test: float32'),
    (((X, Y), (X[:, :2], Y)), r'\[4, 4, 1\], test: uint8 \[2, 4, 1\]'),
    ((X[:0], Y[:0]), 'expected examples to train on'),
  ],
)
def test_what_is_no_data_set_is_refused(given, said):
  with pytest.raises(DataError, match=said):
    arrays.source('mine', given)


def test_an_npz_is_read_or_refused_by_its_name(tmp_path):
  path = str(tmp_path / 'mine.npz')
  with pytest.raises(DataError, match=r'mine.npz: there is no such file'):
    arrays.read_npz(path)
  np.savez(path, x=X, y=Y)
  assert made(arrays.read_npz(path)).train == 6
  np.savez(path, x=np.array([X, None], object), y=Y)
  with pytest.raises(DataError, match=r'mine.npz: .*of plain arrays'):
    arrays.read_npz(path)
  whole = (tmp_path / 'mine.npz').read_bytes()
  for part in (whole[:50], b''):
    (tmp_path / 'mine.npz').write_bytes(part)
    with pytest.raises(DataError, match=r'mine.npz: cannot be read'):
      arrays.read_npz(path)
