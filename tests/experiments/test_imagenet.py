"""ImageNet's recipes: they are runs, and all of them run on a set that is made up."""

import json

import jax
import numpy as np
import pytest

from depthprune.run import rounds
from depthprune.train.result import to_json
from experiments.imagenet import generated, resnet50

tfds = pytest.importorskip('tensorflow_datasets', reason="needs 'depthprune[stream]'")


@pytest.mark.parametrize('method', resnet50.FULL)
def test_every_method_has_a_recipe(method):
  """Made without an error, so its values are some that a run can use."""
  full, brief = (resnet50.config(method, size) for size in (True, False))
  assert (full.model, full.data, full.resize) == ('resnet50', 'imagenet2012', 224)
  assert full.stream == brief.stream == 'always'
  assert full.epochs.train + full.epochs.gates >= 90 > sum(brief.epochs)
  assert resnet50.config(method, True, 'resnet50.npz').epochs.train == 0


def test_the_made_up_set_is_read_as_the_real_one(tmp_path):
  generated.prepare(tmp_path, train=6, validation=3, side=(40, 90))
  builder = tfds.builder('imagenet2012', data_dir=str(tmp_path))
  sizes = {name: split.num_examples for name, split in builder.info.splits.items()}
  assert sizes == {'train': 6, 'validation': 3}
  records = [*builder.as_data_source('train')]
  shapes = {record['image'].shape for record in records}
  assert len(shapes) == 6 and all(40 <= n <= 90 for s in shapes for n in s[:2])
  assert {record['image'].dtype for record in records} == {np.dtype(np.uint8)}
  assert all(record['file_name'].endswith(b'.JPEG') for record in records)
  assert len({record['label'] for record in records}) == 6
  assert builder.info.features['label'].num_classes == 1000


@pytest.mark.slow
@pytest.mark.parametrize('method', resnet50.FULL)
def test_every_method_runs_on_it(method, tmp_path, monkeypatch):
  generated.prepare(tmp_path / 'data', train=40, validation=12, side=(60, 160))
  monkeypatch.setenv('TFDS_DATA_DIR', str(tmp_path / 'data'))
  given = {'resize': 64, 'workdir': str(tmp_path / 'run')}
  with jax.numpy_dtype_promotion('standard'):  # as a reader has it; Adam needs it
    result = to_json(rounds.run(resnet50.config(method, False, **given), show=False))
  assert result['images'] == {'train': 16, 'held_out': 4, 'test': 12}
  said = (tmp_path / 'run' / 'input.jsonl').read_text().splitlines()
  assert said and all(json.loads(line)['read'] > 0 for line in said)
