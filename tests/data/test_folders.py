"""A folder of images of a user's own: what is read, and what is refused by its name."""

import shutil
from pathlib import Path

import numpy as np
import pytest

from depthprune.data import folders, images
from depthprune.data.dataset import DataError

Image = pytest.importorskip('PIL.Image')


def draw(path: Path, value: int, mode: str = 'RGB', size=(6, 5), **options) -> Path:
  """Writes an image of one value; `size` is (width, height)."""
  path.parent.mkdir(parents=True, exist_ok=True)
  colour = {'RGB': (value, 0, 9), 'RGBA': (value, 0, 9, 128), 'LA': (value, 7)}
  if mode == 'I;16':
    pixels = np.full(size[::-1], value, np.uint16)
    Image.fromarray(pixels).save(path)
  else:
    Image.new(mode, size, colour.get(mode, value)).save(path, **options)
  return path


@pytest.fixture
def root(tmp_path) -> Path:
  """Eight images of each of two classes, whose value is their number."""
  for i in range(16):
    draw(tmp_path / 'mine' / ('cat', 'dog')[i % 2] / f'{i:02}.png', i)
  return tmp_path / 'mine'


def read(source, split):
  count = {'train': source.train, 'test': source.test, 'validation': source.validation}
  return source.read(split, np.arange(count[split]))


def test_every_image_is_in_one_split_with_its_class(root):
  source = folders.source(str(root))
  assert (source.train, source.test, source.validation) == (12, 4, 0)
  assert (source.shape, source.classes, source.names) == ((5, 6, 3), 2, ('cat', 'dog'))
  splits = [read(source, split) for split in ('train', 'test')]
  image = np.concatenate([split['image'] for split in splits])
  label = np.concatenate([split['label'] for split in splits])
  assert image.dtype == np.uint8
  assert sorted(image[:, 0, 0, 0].tolist()) == [*range(16)]
  assert (label == image[:, 0, 0, 0] % 2).all()
  assert np.bincount(splits[1]['label']).tolist() == [2, 2]
  assert (image[..., 2] == 9).all()


def test_it_becomes_a_data_set_like_any_other(root):
  one, other = (images.divided('mine', folders.source(str(root)), s) for s in (0, 1))
  np.testing.assert_array_equal(one.test['image'], other.test['image'])
  assert len(one.train['label']) == 11 and len(one.held_out['label']) == 1
  assert one.names == ('cat', 'dog') and 'set apart' in one.notes[0]


@pytest.mark.parametrize('word', ['validation', 'val', 'Valid'])
def test_folders_for_splits(tmp_path, word):
  for i in range(4):
    for split in ('Train', word, 'test'):
      draw(tmp_path / split / 'ab'[i % 2] / f'{i}.jpg', i)
  source = folders.source(str(tmp_path))
  assert (source.train, source.validation, source.test) == (4, 4, 4)
  data = images.divided('mine', source)
  assert [len(s['label']) for s in (data.train, data.held_out, data.test)] == [4, 4, 4]
  assert data.notes == ()
  shutil.rmtree(tmp_path / 'test')
  source = folders.source(str(tmp_path))
  assert (source.validation, source.test) == (0, 4)
  assert 'validation split is tested on' in source.notes[0]


def test_a_class_may_be_called_train(tmp_path):
  for i, word in enumerate(('bus', 'train')):
    draw(tmp_path / word / '0.png', i)
    draw(tmp_path / word / '1.png', i)
  assert folders.source(str(tmp_path)).names == ('bus', 'train')


def test_hidden_and_other_files_are_left_out_and_nested_ones_found(root):
  draw(root / 'cat' / 'more' / 'deep' / '16.JPG', 16)
  draw(root / 'cat' / '._00.png', 99)
  draw(root / 'cat' / '.hidden' / '0.png', 99)
  draw(root / '.git' / '0.png', 99)
  draw(root / '__MACOSX' / 'cat' / '0.png', 99)
  (root / 'cat' / 'Thumbs.db').write_text('no image')
  (root / 'README.txt').write_text('no image')
  source = folders.source(str(root))
  values = [read(source, s)['image'][:, 0, 0, 0].tolist() for s in ('train', 'test')]
  assert sorted([*values[0], *values[1]]) == [*range(17)]


def test_grey_images_stay_grey_unless_others_are_not(tmp_path):
  for i, mode in enumerate(('L', '1', 'LA', 'L')):
    draw(tmp_path / 'ab'[i % 2] / f'{i}.png', 200, mode)
  source = folders.source(str(tmp_path))
  assert source.shape == (5, 6, 1)
  assert 'the alpha channel of 1 of 4 images is left out' in source.notes
  draw(tmp_path / 'a' / 'rgba.png', 200, 'RGBA')
  palette = draw(tmp_path / 'b' / 'palette.png', 200)
  Image.open(palette).quantize(4).save(palette, transparency=b'\x00\x80')
  source = folders.source(str(tmp_path))
  assert source.shape == (5, 6, 3)
  assert '4 of 6 images are grey, and read as RGB' in source.notes
  image = np.concatenate([read(source, s)['image'] for s in ('train', 'test')])
  assert image.shape == (6, 5, 6, 3)


def test_sixteen_bits_stay(tmp_path):
  for i in range(4):
    draw(tmp_path / 'ab'[i % 2] / f'{i}.png', 300 * i, 'I;16')
  source = folders.source(str(tmp_path))
  values = [read(source, s)['image'].max((1, 2, 3)).tolist() for s in ('train', 'test')]
  assert sorted([*values[0], *values[1]]) == [0, 300, 600, 900]
  draw(tmp_path / 'a' / 'white.png', 255, 'L')
  source = folders.source(str(tmp_path), resize=4)
  splits = [read(source, s)['image'] for s in ('train', 'test')]
  assert {x.dtype for x in splits} == {np.dtype(np.uint16)}
  assert max(x.max() for x in splits) == 65535 and source.shape == (4, 4, 1)
  data = images.divided('deep', source, held_out=0)
  batch = data.sampler(images.jax.random.key(0), len(data.train['label']), False)
  image = np.asarray(batch(data.train, 0)['image'])
  assert abs(image.mean()) < 1e-5 and abs(image.std() - 1) < 1e-5


def test_unlike_sizes_are_cropped_or_refused_with_what_to_write(root):
  odd = draw(root / 'dog' / 'wide.png', 7, size=(12, 5))
  with pytest.raises(DataError, match=r'5x6 pixels, .*wide.png 5x12: pass --resize'):
    folders.source(str(root))
  source = folders.source(str(root), resize=4)
  assert source.shape == (4, 4, 3) and odd.is_file()
  assert read(source, 'train')['image'].shape[1:] == (4, 4, 3)


def test_damaged_files_are_named(root):
  (root / 'cat' / 'broken.png').write_bytes(b'')
  with pytest.raises(DataError, match='cat/broken.png: cannot be read as an image'):
    folders.source(str(root))
  whole = (root / 'cat' / '00.png').read_bytes()
  (root / 'cat' / 'broken.png').write_bytes(whole[:-30])
  source = folders.source(str(root))
  with pytest.raises(DataError, match='cat/broken.png: cannot be read as an image'):
    for split in ('train', 'test'):
      read(source, split)


def test_wrong_folders_are_named(root, tmp_path):
  with pytest.raises(DataError, match='none-here: expected a folder'):
    folders.source(str(tmp_path / 'none-here'))
  (root / 'empty').mkdir()
  with pytest.raises(DataError, match='mine/empty: expected images of this class'):
    folders.source(str(root))
  shutil.rmtree(root / 'empty')
  shutil.rmtree(root / 'dog')
  with pytest.raises(DataError, match='two folders or more.*got cat'):
    folders.source(str(root))
  with pytest.raises(DataError, match='two folders or more.*got none'):
    folders.source(str(root / 'cat'))


def test_a_class_that_is_not_trained_on_is_named(tmp_path):
  for split, classes in {'train': 'ab', 'test': 'abc'}.items():
    for c in classes:
      draw(tmp_path / split / c / '0.png', 1)
  with pytest.raises(DataError, match='test/c: a class that the training split'):
    folders.source(str(tmp_path))
  shutil.rmtree(tmp_path / 'test' / 'c')
  (tmp_path / 'extra').mkdir()
  with pytest.raises(DataError, match='beside train.*got extra'):
    folders.source(str(tmp_path))
