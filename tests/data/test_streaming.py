"""Images read from disk as they are needed: what is in a batch, and what decides it."""

import dataclasses
import json
import re
import signal
import threading
import time
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from depthprune.data import dataset
from depthprune.data import images as data
from depthprune.data.augment import Augment, Normalisation, normalise
from depthprune.data.dataset import DataError
from depthprune.data.streaming import Share, StreamedImages
from depthprune.methods.trainable_gates import GateOptions
from depthprune.models import pretrained
from depthprune.run import data as datasets
from depthprune.run import rounds
from depthprune.run.config import Config, default
from depthprune.train.result import to_json

pytest.importorskip('tensorflow_datasets', reason="needs 'depthprune[stream]'")
pytest.importorskip('grain', reason="needs 'depthprune[stream]'")
from experiments.imagenet import generated
from tests.train import spmd
from tests.train.test_mesh import SPMD, arrays, close, ended, launch

TRAIN, TEST, SIDE = 30, 10, 16


@pytest.fixture(scope='module')
def made(tmp_path_factory) -> Path:
  """A made-up imagenet2012 of small images; in a split all have their own class."""
  folder = tmp_path_factory.mktemp('tfds')
  return generated.prepare(folder, TRAIN, TEST, side=(20, 60))


@pytest.fixture
def imagenet(made, monkeypatch) -> StreamedImages:
  monkeypatch.setenv('TFDS_DATA_DIR', str(made))
  return loaded()


def loaded(**given) -> StreamedImages:
  found = data.load('imagenet2012', held_out=6, resize=SIDE, stream=True, **given)
  assert isinstance(found, StreamedImages)
  return found


def many(images: StreamedImages, steps: range, size: int = 8, **fields) -> list[dict]:
  """Training batches of some steps, one after the other."""
  sampler = images.sampler(jax.random.key(0), size, True)._replace(**fields)
  batch_at = sampler.stepwise()
  return [jax.device_get(batch_at(images.train, step)) for step in steps]


def labels_of(batches: list[dict]) -> list[int]:
  return np.concatenate([batch['label'] for batch in batches]).tolist()


def same(found, expected) -> None:
  jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_it_is_a_data_set_like_those_in_memory(imagenet):
  assert imagenet.classes == 1000 and imagenet.shape == (SIDE, SIDE, 3)
  splits = imagenet.train, imagenet.held_out, imagenet.test
  assert [dataset.count(split) for split in splits] == [TRAIN - 6, 6, TEST]
  (batch,) = many(imagenet, range(1))
  assert batch['image'].shape == (8, SIDE, SIDE, 3)
  assert (batch['image'].dtype, batch['label'].dtype) == (np.float32, np.int32)
  assert (
    imagenet.augment == Augment(2, True) and 'as they were needed' in imagenet.notes[0]
  )


def test_evaluation_sees_the_centre_of_every_image_once(imagenet, made):
  import tensorflow_datasets as tfds

  batches = [jax.device_get(b) for b in imagenet.batches(imagenet.test, 4)]
  assert [b['weight'].tolist() for b in batches] == [[1] * 4, [1] * 4, [1, 1, 0, 0]]
  source = tfds.builder('imagenet2012', data_dir=str(made)).as_data_source('validation')
  real = np.concatenate([b['weight'] for b in batches]) > 0
  labels = np.concatenate([b['label'] for b in batches])[real]
  assert labels.tolist() == [record['label'] for record in source]
  shown = np.concatenate([b['image'] for b in batches])[real]
  for inputs, record in zip(shown, source, strict=True):
    image = Image.fromarray(record['image'])
    cut = min(image.size) * 7 / 8
    left, top = (image.width - cut) / 2, (image.height - cut) / 2
    box = (left, top, left + cut, top + cut)
    small = np.asarray(image.resize((SIDE, SIDE), Image.Resampling.BILINEAR, box))
    expected = normalise(jnp.asarray(small), imagenet.normalisation)
    np.testing.assert_allclose(inputs, expected, atol=1e-5)


def test_each_epoch_shows_every_image_once_in_its_own_order(imagenet):
  batches = many(imagenet, range(6))
  first, second = labels_of(batches[:3]), labels_of(batches[3:])
  assert sorted(first) == sorted(second) and len({*first}) == TRAIN - 6
  assert first != second


def test_batches_are_cut_from_epochs_laid_end_to_end(imagenet):
  labels = labels_of(many(imagenet, range(12), size=10))
  assert all(labels.count(label) == 5 for label in {*labels}), 'none has its turn less'


def test_a_batch_depends_on_key_and_step_alone(imagenet):
  """Not on where reading began, and not on whether batches were read ahead."""
  whole = many(imagenet, range(5))
  same(many(imagenet, range(3, 5)), whole[3:])
  sampler = imagenet.sampler(jax.random.key(0), 8, True)
  same(jax.device_get(sampler(imagenet.train, 4)), whole[4])
  batch_at = sampler.stepwise()
  for step in (4, 1, 2):  # back and on again
    same(jax.device_get(batch_at(imagenet.train, step)), whole[step])
  other = imagenet.sampler(jax.random.key(1), 8, True)(imagenet.train, 0)
  assert other['label'].tolist() != whole[0]['label'].tolist()
  first, again = (w['image'][np.argsort(w['label'])] for w in (whole[0], whole[3]))
  assert first.shape == again.shape and not np.array_equal(first, again)


def test_workers_read_the_same_batches(imagenet):
  same(many(imagenet, range(1, 4), workers=2), many(imagenet, range(1, 4)))


def reading(own):
  """The placement of a process that reads these rows of every batch."""
  return dataset.HERE._replace(rows=lambda size: own)


def test_processes_share_a_batch(imagenet):
  whole = many(imagenet, range(2, 4))
  for own in (np.arange(3), np.arange(3, 8), np.array([0, 5])):
    batch_at = imagenet.sampler(jax.random.key(0), 8, True).stepwise(reading(own))
    parts = [jax.device_get(batch_at(imagenet.train, step)) for step in range(2, 4)]
    same(parts, [{k: v[own] for k, v in batch.items()} for batch in whole])
  own = np.array([1, 3])
  ours = imagenet.batches(imagenet.test, 4, reading(own))
  theirs = imagenet.batches(imagenet.test, 4)
  for part, batch in zip(ours, theirs, strict=True):
    same(jax.device_get(part), {k: v[own] for k, v in jax.device_get(batch).items()})


def test_nothing_reads_on_when_nobody_listens(imagenet):
  before = threading.active_count()
  batch_at = imagenet.sampler(jax.random.key(0), 8, True).stepwise()
  batch_at(imagenet.train, 0)
  assert threading.active_count() > before
  del batch_at
  deadline = time.monotonic() + 10
  while threading.active_count() > before and time.monotonic() < deadline:
    time.sleep(0.05)
  assert threading.active_count() <= before


# ---- what is streamed, and what is said where it cannot be ---------------------------


def test_what_fills_half_of_the_memory_is_streamed(made, monkeypatch):
  monkeypatch.setenv('TFDS_DATA_DIR', str(made))
  given = {'held_out': 6, 'resize': SIDE}
  assert isinstance(data.load('imagenet2012', **given), data.ImageSet)
  size = (TRAIN + TEST) * SIDE * SIDE * 3
  for memory, kind in ((2 * size, data.ImageSet), (2 * size - 2, StreamedImages)):
    pages = {'SC_PAGE_SIZE': 1, 'SC_PHYS_PAGES': memory}
    monkeypatch.setattr(dataset.os, 'sysconf', pages.__getitem__)
    assert isinstance(data.load('imagenet2012', **given), kind)
  with pytest.raises(DataError, match='expected at most half.*pass subset=N'):
    data.load('imagenet2012', **given, stream=False)


def test_memory_is_what_a_container_leaves_and_a_device_has(tmp_path, monkeypatch):
  machine = dataset.memory_of_process()
  assert dataset.memory_of_device() == machine
  limits = [tmp_path / name for name in ('max', 'none', 'absent')]
  limits[0].write_text('4096\n')
  limits[1].write_text('max\n')
  monkeypatch.setattr(dataset, 'LIMITS', limits)
  assert dataset.memory_of_process() == 4096
  device = types.SimpleNamespace(memory_stats=lambda: {'bytes_limit': 1024})
  monkeypatch.setattr(dataset.jax, 'local_devices', lambda: [device])
  assert dataset.memory_of_device() == 1024


def test_evaluation_decodes_every_image_once_and_fills_its_last_batch(imagenet):
  share = Share(imagenet.records, imagenet.test['record'], 4, np.arange(4))
  assert len(share) == -(-TEST // 4) * 4
  assert share[len(share) - 1][:2] == share[TEST - 1][:2]


def test_what_cannot_be_streamed_is_refused(imagenet, monkeypatch):
  with pytest.raises(DataError, match="'digits': expected a TFDS set of images"):
    data.load('digits', stream=True)
  with pytest.raises(DataError, match='images have one shape.*pass resize=SIDE'):
    data.load('imagenet2012', stream=True)
  monkeypatch.setattr('importlib.util.find_spec', lambda name: None)
  with pytest.raises(DataError, match=r"pip install 'depthprune\[stream\]'"):
    loaded()


def test_other_data_on_another_host_are_seen(imagenet):
  found = datasets.checksums(imagenet)
  assert found == datasets.checksums(loaded())
  swapped = [imagenet.records.test[i] for i in (*range(TEST - 2), TEST - 1, TEST - 2)]
  records = dataclasses.replace(imagenet.records, test=swapped)
  changed = datasets.checksums(imagenet._replace(records=records))
  assert {k for k in found if found[k] != changed[k]} == {'records'}


def test_augmentation_is_for_what_it_is_for(imagenet, monkeypatch):
  config = default('gates', data='imagenet2012', resize=SIDE, mixup=0.2, workers=3)
  streams = dataclasses.replace(config, stream='always', randaugment=9)
  found = datasets.read(streams)
  assert found.augment == Augment(2, True, None, 0.2, 9) and found.workers == 3
  with pytest.raises(DataError, match='randaugment.*--stream always'):
    datasets.read(dataclasses.replace(config, randaugment=9))
  digits = data.source('digits')
  for several in ({'tasks': ('left', 'right')}, {'ignore': 255}):
    monkeypatch.setattr(data, 'source', lambda *_, **__: digits._replace(**several))  # noqa: B023
    with pytest.raises(DataError, match='mixup is for images with one class each'):
      datasets.read(default('gates', mixup=0.2))


# ---- normalisation -------------------------------------------------------------------


def test_the_normalisation_is_that_of_centres_of_training_images(imagenet):
  images = next(imagenet.batches(imagenet.train, TRAIN - 6))['image']
  np.testing.assert_allclose(images.mean((0, 1, 2)), 0, atol=0.05)
  np.testing.assert_allclose(images.std((0, 1, 2)), 1, atol=0.05)


def test_pretrained_imagenet_resnets_are_normalised_as_torchvision_does(
  imagenet, tmp_path
):
  stem = {'conv1.weight': np.zeros((64, 3, 7, 7), np.float32)}
  np.savez(tmp_path / 'resnet50.npz', **stem)
  config = default('gates', data='imagenet2012', resize=SIDE, stream='always')
  config = dataclasses.replace(config, pretrained=str(tmp_path / 'resnet50.npz'))
  by = Normalisation(*pretrained.TORCHVISION)
  assert by == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225), 255.0)
  found = datasets.read(config)
  assert found.normalisation == by and 'normalised' not in found.notes[0]
  other = {'mean': [0.5] * 3, 'std': [0.25] * 3, 'scale': 'x/255'}
  beside = tmp_path / 'resnet50.json'
  beside.write_text(json.dumps({'normalisation': other}))
  assert datasets.read(config).normalisation.mean == (0.5,) * 3
  beside.unlink()
  cifar = {'conv1.weight': np.zeros((16, 3, 3, 3), np.float32)}
  np.savez(tmp_path / 'resnet50.npz', **cifar)
  own = datasets.read(dataclasses.replace(config, pretrained=None)).normalisation
  assert datasets.read(config).normalisation == own != by


# ---- runs ----------------------------------------------------------------------------


def lines(path: Path) -> list[dict]:
  return [json.loads(line) for line in path.read_text().splitlines()]


def trained(folder: Path, devices: int, processes: int, mesh: str) -> Path:
  ended(launch([*SPMD, 'streams', str(folder), mesh], devices, processes))
  return folder


@pytest.fixture(scope='module')
def one(made, tmp_path_factory) -> Path:
  """Nine steps with mixup on one device, here."""
  folder = tmp_path_factory.mktemp('one')
  with pytest.MonkeyPatch.context() as patch:
    patch.setenv('TFDS_DATA_DIR', str(made))
    spmd.streams(folder, None)
  return folder


@pytest.mark.parametrize(
  ('devices', 'processes', 'mesh'),
  [pytest.param(8, 1, 'data=4,model=2', marks=pytest.mark.slow), (1, 2, '')],
)
def test_it_is_the_same_batch_and_training_on_all(
  one, imagenet, tmp_path, devices, processes, mesh
):
  trained(tmp_path, devices, processes, mesh)
  own = [json.loads((tmp_path / f'own{i}.json').read_text()) for i in range(processes)]
  parts = [[*range(8)]] if processes == 1 else [[0, 1, 2, 3], [4, 5, 6, 7]]
  assert own == parts
  assert json.loads((one / 'own0.json').read_text()) == [*range(8)]
  same(*(arrays(folder, 'batch')['label'] for folder in (tmp_path, one)))
  for part in ('batch', 'state', 'test'):
    close(arrays(tmp_path, part), arrays(one, part))


def test_a_run_that_was_killed_goes_on_with_the_same_batches(one, imagenet, tmp_path):
  """To the same bits: the network is what all batches made of it."""
  (process,) = launch([*SPMD, 'streams', str(tmp_path), ''])
  while not [*(tmp_path / 'checkpoints' / 'steps').glob('0000000?')]:
    assert process.poll() is None, process.communicate()
    time.sleep(0.005)
  process.send_signal(signal.SIGKILL)
  process.communicate()
  assert process.returncode == -signal.SIGKILL, 'it ended before it could be killed'
  assert not (tmp_path / 'state.npz').exists()
  spmd.streams(tmp_path, None)
  same(arrays(tmp_path, 'state'), arrays(one, 'state'))
  begun = lines(tmp_path / 'input.jsonl')
  assert [line['stage'] for line in begun] == ['steps', 'steps'], 'it was resumed'


def test_a_whole_run_says_what_it_reads(imagenet, tmp_path, capsys):
  config = Config(
    GateOptions(0.5), 'mlp', 'imagenet2012', resize=8, stream='always', randaugment=5,
    batch=4, train_epochs=0, gate_epochs=1, finetune_epochs=1, learning_rate=0.01,
    workdir=str(tmp_path),
  )  # fmt: skip
  result = to_json(rounds.run(config))
  assert result['images'] == {'train': 27, 'held_out': 3, 'test': TEST}
  assert 'read from disk' in result['data_notes'][0]
  said = capsys.readouterr().out
  for stage in ('gates', 'finetune'):
    assert re.search(rf'{stage}: [\d,]+ images/s are read, the step takes [\d,]+', said)
  found = lines(tmp_path / 'input.jsonl')
  assert all(line['input_bound'] == (line['read'] < line['needed']) for line in found)
