"""What is known of data sets before any is read, and why some cannot be read."""

import json

import numpy as np
import pytest

from depthprune.data import tfds
from depthprune.run.data import Sizes, listed


def test_sizes_of_a_set_that_comes_with_a_library():
  assert dict(listed(['digits'])) == {'digits': Sizes('images 8x8x1', 10, 1797, 0)}


def test_sizes_of_arrays_of_ones_own(tmp_path):
  rng = np.random.default_rng(0)
  path = tmp_path / 'mine.npz'
  image = rng.integers(0, 255, (30, 6, 5, 3)).astype(np.uint8)
  np.savez(path, x=image, y=np.arange(30) % 3)
  assert dict(listed([str(path)])) == {str(path): Sizes('images 6x5x3', 3, 24, 6)}


def test_what_cannot_be_read_has_a_reason(tmp_path):
  gone = str(tmp_path / 'gone')
  known = dict(listed([gone, 'digits', 'net.py']))
  assert 'gone' in known[gone]
  assert isinstance(known['digits'], Sizes)
  assert 'expected FILE.py:NAME' in known['net.py']


def test_sets_of_the_folder_are_found_by_their_names(tmp_path, monkeypatch):
  monkeypatch.setenv('TFDS_DATA_DIR', str(tmp_path))
  assert tfds.prepared() == []
  for version in ('cifar10/3.0.2', 'glue/sst2/2.0.0', 'glue/rte/2.0.0', 'half/1.0.0'):
    (tmp_path / version).mkdir(parents=True)
    if 'half' not in version:
      (tmp_path / version / 'dataset_info.json').write_text(json.dumps({}))
  assert tfds.prepared() == ['cifar10', 'glue/rte', 'glue/sst2']


def test_a_set_of_tfds_has_the_sizes_that_are_stored():
  if 'fashion_mnist' not in tfds.prepared():
    pytest.skip('no fashion_mnist in TFDS_DATA_DIR')
  known = dict(listed(['fashion_mnist']))
  assert known['fashion_mnist'] == Sizes('images 28x28x1', 10, 60_000, 10_000)
