"""TFDS sets from disk, and what is said where there are none."""

import builtins

import numpy as np
import pytest

from depthprune.data import images
from depthprune.data import tfds as prepared
from depthprune.data.images import Augment, DataError

tfds = pytest.importorskip('tensorflow_datasets', reason="needs 'depthprune[data]'")


def test_fashion_mnist_is_what_was_published(tfds_data):
  source = images.source('fashion_mnist')
  assert source[:5] == (60000, 10000, (28, 28, 1), 10, 255.0)
  few = source.read('train', np.arange(3000))
  assert few['image'].shape == (3000, 28, 28, 1) and few['image'].dtype == np.uint8
  assert few['label'].dtype == np.int32 and set(few['label']) == set(range(10))
  np.testing.assert_allclose(few['image'].mean() / 255, 0.286, atol=0.01)


def test_only_chosen_rows_are_read_and_in_their_order(tfds_data):
  read = images.source('cifar10').read
  some = read('train', np.array([5, 1, 49999]))
  one = read('train', np.array([1]))
  np.testing.assert_array_equal(some['image'][1], one['image'][0])
  assert some['label'].shape == (3,) and some['image'].shape == (3, 32, 32, 3)


def test_a_small_share_of_a_set(tfds_data):
  small = images.load('fashion_mnist', subset=200, held_out=50)
  assert [len(s['label']) for s in (small.train, small.held_out)] == [200, 50]
  assert len(small.test['label']) == 10000
  assert small.augment == Augment(4, True)
  with_version = images.load('fashion_mnist:3.0.1', subset=200, held_out=50)
  np.testing.assert_array_equal(small.train['image'], with_version.train['image'])


def test_resize_scales_the_shorter_side_and_cuts_the_middle(tfds_data):
  read = images.source('fashion_mnist', resize=14).read
  assert read('test', np.arange(2))['image'].shape == (2, 14, 14, 1)
  wide = np.zeros((4, 8, 3), np.uint8)
  wide[:, 2:6] = 200
  assert (prepared.sized(wide, 2) == 200).all()


def test_an_unknown_name_gets_the_nearest_ones_and_not_all(tfds_data):
  with pytest.raises(DataError) as error:
    images.load('fashon_mnist')
  assert 'Nearest names: fashion_mnist' in str(error.value)
  assert len(str(error.value)) < 500
  with pytest.raises(DataError, match='Nearest names: digits'):
    images.load('digit')


def test_a_set_that_is_not_there_says_where_and_how(tmp_path, monkeypatch):
  monkeypatch.setenv('TFDS_DATA_DIR', str(tmp_path))
  with pytest.raises(DataError) as error:
    images.load('mnist')
  text = str(error.value)
  assert f'Looked for {tmp_path}/mnist/3.0.1 (TFDS_DATA_DIR is {tmp_path})' in text
  assert "builder('mnist', file_format='array_record').download_and_prepare()" in text


def test_a_download_that_fails_says_why(tmp_path, monkeypatch):
  monkeypatch.setenv('TFDS_DATA_DIR', str(tmp_path))

  def offline(self, **_):
    raise ConnectionError('no route to host')

  monkeypatch.setattr(
    tfds.core.DatasetBuilder, 'download_and_prepare', offline, raising=True
  )
  with pytest.raises(DataError, match='failed: ConnectionError: no route to host'):
    images.load('mnist', download=True)


@pytest.mark.parametrize('name', ['glue/sst2', 'ag_news_subset'])
def test_what_is_not_image_classification_is_refused(tfds_data, name):
  if not (tfds_data / name).exists():
    pytest.skip(f'{name} is not in {tfds_data}')
  with pytest.raises(DataError, match=f"'{name}': expected an 8-bit image and a class"):
    images.load(name)


def test_without_the_extra_the_error_says_how_to_install_it(monkeypatch):
  real = builtins.__import__

  def fails(name, *args, **kwargs):
    if name == 'tensorflow_datasets':
      raise ImportError('No module named tensorflow_datasets')
    return real(name, *args, **kwargs)

  monkeypatch.setattr(builtins, '__import__', fails)
  with pytest.raises(DataError, match=r"pip install 'depthprune\[data\]'"):
    images.load('cifar10')
