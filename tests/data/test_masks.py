"""Images with a class for every pixel: read, augmented, batched and learnt from."""

from types import SimpleNamespace

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from depthprune.data import images as catalogue
from depthprune.data import images as data
from depthprune.data import masks
from depthprune.data import tfds as prepared
from depthprune.data.images import Augment, DataError, Normalisation
from depthprune.train import task as tasks
from depthprune.train.evaluate import evaluate
from depthprune.train.loop import fit
from depthprune.train.method import plain
from depthprune.train.step import init_state, make_step

PLAIN = Normalisation((0.0,), (1.0,), 1.0)


def images(n: int, side: int = 6) -> data.Split:
  """Random images whose mask is a function of each pixel: its value, 1 to 9."""
  image = np.random.RandomState(0).randint(1, 10, (n, side, side + 2, 1))
  return {'image': image.astype(np.uint8), 'label': image[..., 0].astype(np.uint8)}


class Records(list):
  def __getitems__(self, rows):
    return [self[row] for row in rows]


def builder(
  tmp_path, splits, names=('sky', 'road', 'void'), supervised=('image', 'mask')
):
  """A set of TFDS as far as it is looked at, its records in files of two."""
  tfds = pytest.importorskip('tensorflow_datasets', reason="needs 'depthprune[data]'")
  kinds, told = tfds.features, {}
  for name, records in splits.items():
    files = -(-len(records) // 2)
    paths = [f'{name}-{i}' for i in range(files)]
    told[name] = SimpleNamespace(filepaths=paths, shard_lengths=[2] * files)
  if names:
    (tmp_path / 'mask.labels.txt').write_text('\n'.join(names) + '\n')
  features = {
    'image': kinds.Image(shape=(4, 6, 3), dtype=np.uint8),
    'mask': kinds.Image(shape=(4, 6, 1), dtype=np.uint8),
  }
  info = SimpleNamespace(supervised_keys=supervised, features=features, splits=told)
  as_source = lambda split, **how: Records(splits[split])
  return SimpleNamespace(info=info, data_path=tmp_path, as_data_source=as_source)


def record(label=0, size=(4, 6)):
  image = np.full((4, 6, 3), 7, np.uint8)
  return {'image': image, 'mask': np.full((*size, 1), label, np.uint8)}


@pytest.fixture
def loaded(tmp_path, monkeypatch):
  """(splits, ...) -> the data set of such a builder."""

  def load(splits, resize=None, **kwargs):
    made = builder(tmp_path, splits, **kwargs)
    monkeypatch.setattr(catalogue, 'find', lambda *_: made)
    return data.load('mine', resize=resize)

  return load


def test_classes_are_those_named_and_the_void_is_none(loaded):
  found = loaded({'train': [record(0), record(1)] * 10, 'test': [record(2)] * 3})
  assert (found.classes, found.ignore, found.names) == (2, 2, ('sky', 'road'))
  assert found.train['label'].dtype == np.uint8
  assert found.train['label'].shape == (18, 4, 6)
  assert [len(found.held_out['label']), len(found.test['label'])] == [2, 3]
  assert found.augment == Augment(1, True, 2)


def test_without_names_classes_are_counted_and_that_is_said(loaded):
  splits = {'train': [record(0), record(255)] * 10, 'test': [record(4)]}
  found = loaded(splits, names=(), supervised=None)
  assert (found.classes, found.ignore) == (5, 255)
  assert 'the set names no classes: 5 are those that its labels show' in found.notes


def test_a_validation_split_is_held_out_and_nothing_of_train(loaded):
  splits = {'train': [record(0)] * 9, 'validation': [record(1)] * 2}
  found = loaded({**splits, 'test': [record(1)] * 3})
  sizes = [len(s['label']) for s in (found.train, found.held_out, found.test)]
  assert sizes == [9, 2, 3]
  assert (found.held_out['label'] == 1).all()
  assert any('validation split' in note for note in found.notes)
  absent = 'class road is in no label of train: mIoU leaves it out there'
  assert any(absent in note for note in found.notes)
  # Without a test split, validation is the test.
  found = loaded(splits)
  sizes = [len(s['label']) for s in (found.train, found.held_out, found.test)]
  assert sizes == [9, 0, 2]


def test_a_mask_of_another_size_names_its_record(loaded):
  splits = {'train': [record(), record(), record(), record(size=(4, 5))]}
  with pytest.raises(DataError) as error:
    loaded({**splits, 'test': [record()]})
  assert "data 'mine': train-1, record 1: the image is (4, 6), its mask (4, 5)" in str(
    error.value
  )


def test_a_label_outside_the_classes_names_file_and_value(loaded):
  with pytest.raises(
    DataError, match='test-1, record 0: mask has the label 3, expected 0 to 2: name'
  ):
    loaded({'train': [record()] * 3, 'test': [record(2), record(1), record(3)]})


def test_resizing_never_mixes_classes(loaded):
  striped = record()
  striped['mask'][:, ::2] = 1
  found = loaded({'train': [striped] * 4, 'test': [striped]}, resize=3)
  assert found.shape == (3, 3, 3) and found.train['label'].shape == (4, 3, 3)
  assert set(np.unique(found.train['label'])) <= {0, 1}
  wide = np.arange(36, dtype=np.uint8).reshape(6, 6, 1)
  assert set(prepared.sized(wide, 3, nearest=True).ravel()) <= set(wide.ravel())


@pytest.mark.parametrize('flip', [True, False])
def test_image_and_mask_move_together(flip):
  """The mask is a function of the image, and stays so; padding is ignored."""
  split, by = images(12), Augment(2, flip, ignore=0)
  get = jax.jit(data.batch, static_argnums=(3, 4, 5))
  moved = False
  for step in range(4):
    found = get(split, step, jax.random.key(0), 6, PLAIN, by)
    assert found['label'].dtype == jnp.int32
    np.testing.assert_array_equal(found['image'][..., 0], found['label'])
    moved |= bool((found['label'] == 0).any())
  assert moved
  ignored = get(split, 0, jax.random.key(0), 6, PLAIN, by._replace(ignore=99))
  zeros = get(split, 0, jax.random.key(0), 6, PLAIN, by)['image'][..., 0] == 0
  np.testing.assert_array_equal(ignored['label'] == 99, zeros)


def test_without_augmentation_nothing_moves_and_padding_counts_for_nothing():
  split = images(5)
  sampler = data.ImageSampler(jax.random.key(0), 5, PLAIN)
  found = sampler(split, 0)
  assert sorted(x.tobytes() for x in np.asarray(found['label'], np.uint8)) == sorted(
    x.tobytes() for x in split['label']
  )
  stepwise = sampler.stepwise()(split, 0)
  np.testing.assert_array_equal(found['label'], stepwise['label'])
  batches = list(data.batches(split, 3, PLAIN))
  assert [b['label'].shape for b in batches] == [(3, 6, 8)] * 2
  assert batches[1]['weight'].tolist() == [1, 1, 0]


class Tiny(nn.Module):
  classes: int

  @nn.compact
  def __call__(self, x, train=False):
    del train
    x = nn.relu(nn.Conv(8, (3, 3))(x))
    return {'main': nn.Conv(self.classes, (1, 1))(x)}


def test_camvid_is_learnt_from(tfds_data):
  if not (tfds_data / 'camvid').exists():
    pytest.skip(f'no camvid in {tfds_data}')
  camvid = data.load('camvid', subset=16, held_out=6, resize=24)
  assert isinstance(camvid, data.ImageSet)
  assert (camvid.classes, camvid.ignore, camvid.names[10]) == (11, 11, 'Bicyclist')
  assert camvid.shape == (24, 24, 3) and len(camvid.test['label']) == 233
  task, model, tx = tasks.task_of(camvid), Tiny(11), optax.sgd(0.1, momentum=0.9)
  variables = model.init(jax.random.key(0), *camvid.example())
  held_out = lambda: camvid.batches(camvid.held_out, 4)
  before = evaluate(model, variables, held_out(), task)
  step = make_step(model, plain(), task, tx)
  state = init_state(model, plain(), tx, variables)
  sampler = camvid.sampler(jax.random.key(1), 8, augment=True)
  state = fit(
    step, state, jax.random.key(2), sampler, camvid.on_device(), steps=12, show=False
  )
  after = evaluate(model, state.variables, held_out(), task)
  assert after['loss'] < before['loss']
  assert 0 < after['miou'] < after['accuracy'] < 1
  assert 1 < after['classes'] <= 11 and 'iou_Sky' in after


def test_camvid_says_that_its_validation_images_are_skewed(tfds_data):
  if not (tfds_data / 'camvid').exists():
    pytest.skip(f'no camvid in {tfds_data}')
  camvid = data.load('camvid')
  sizes = [len(s['label']) for s in (camvid.train, camvid.held_out, camvid.test)]
  assert sizes == [367, 101, 233] and camvid.shape == (180, 240, 3)
  assert any('Bicyclist' in n and '2.3 % in held_out' in n for n in camvid.notes)


def test_shares_leave_unlabelled_pixels_out():
  split = {'label': np.asarray([[[0, 1, 1, 255]]], np.uint8)}
  np.testing.assert_allclose(masks.shares(split, 3), [1 / 3, 2 / 3, 0])


def test_unlabelled_may_stand_anywhere_among_the_labels():
  listed = ('void', 'road', 'Unlabelled', 'sky')
  numbers = masks.numbered(listed, ignore=2)
  assert numbers[:4].tolist() == [2, 0, 2, 1] and numbers[255] == 255
  assert masks.numbered((), 255).tolist() == [*range(256)]
  assert masks.numbered(('a', 'b', 'void'), 2)[:3].tolist() == [0, 1, 2]
