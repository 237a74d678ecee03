"""Experiments that decide on test images the network has not seen, small."""

import json

import numpy as np
import pytest

from depthprune.methods.implosion import ImplosionOptions
from depthprune.run.config import default
from depthprune.run.job import prepare
from experiments import result_files
from experiments.implosion import retraining
from experiments.run import Arguments, on_unseen
from experiments.trainable_gates import ablation, comparison
from tests.run.test_sweep import SMALL

ONE = Arguments(seeds=(0,))


def rows_of(path) -> list[dict]:
  return json.loads(path.read_text())['rows']


def test_the_first_half_of_the_test_images_decides_and_the_second_reports(tmp_path):
  job = prepare(default('gates', model='mlp', workdir=str(tmp_path)), show=False)
  test = job.images.test
  unseen, few = on_unseen(job).images, on_unseen(job, 10).images
  halves = [unseen.held_out['label'], unseen.test['label']]
  np.testing.assert_array_equal(np.concatenate(halves), test['label'])
  assert len(halves[0]) == len(test['label']) // 2
  np.testing.assert_array_equal(few.held_out['image'], test['image'][:10])
  np.testing.assert_array_equal(few.test['image'], unseen.test['image'])


@pytest.mark.slow
def test_an_ablation_changes_one_thing_a_row(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  monkeypatch.setattr(result_files, 'HERE', tmp_path)
  comparison._base.cache_clear()
  changes = {
    'nothing': {},
    'by loss': {'by_loss': True},
    'no gates': {'gate_epochs': 0},
  }
  assert ablation.run('digits', SMALL, changes, ONE) == []
  rows = rows_of(tmp_path / 'trainable_gates/results/digits.json')
  assert [row['changed'] for row in rows] == [*changes]
  assert all(abs(r['flops'] / r['flops_unpruned'] - 0.5) < 0.02 for r in rows)
  assert len({row['accuracy_cut'] for row in rows}) == 3


@pytest.mark.slow
def test_units_are_erased_by_the_loss_and_scratch_has_the_same_shape(
  tmp_path, monkeypatch
):
  monkeypatch.chdir(tmp_path)
  monkeypatch.setattr(result_files, 'HERE', tmp_path)
  config = default(
    'implosion',
    ImplosionOptions(depth=4, per_round=2, importance='greedy'),
    model='resnet14',
    subset=256,
    batch=64,
    gate_epochs=0,
    finetune_epochs=1,
  )
  about = 'digits', config, {}, ('greedy', 'random', 'scratch'), ONE
  assert retraining.run(*about, deciding=64) == []
  rows = {r['method']: r for r in rows_of(tmp_path / 'implosion/results/digits.json')}
  assert rows['greedy']['units'] == rows['random']['units'] == [6, 4]
  assert rows['greedy']['epochs'] == rows['scratch']['epochs'] == 1
  assert (
    rows['scratch']['flops'] == rows['greedy']['flops'] < rows['greedy']['flops_full']
  )
