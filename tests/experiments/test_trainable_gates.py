"""Gates beside all their controls, small: an MLP on the digits."""

import json

import pytest

from experiments import result_files
from experiments.run import Arguments
from experiments.trainable_gates import comparison
from tests.run.test_sweep import SMALL


@pytest.mark.slow
def test_all_methods_reach_the_same_cost_and_scratch_has_the_shape_of_gates(
  tmp_path, monkeypatch
):
  monkeypatch.chdir(tmp_path)
  monkeypatch.setattr(result_files, 'HERE', tmp_path)
  about = 'digits', SMALL, {}, (0.5,), comparison.METHODS
  comparison._base.cache_clear()
  assert comparison.run(*about, Arguments(seeds=(0,))) == []
  found = json.loads((tmp_path / 'trainable_gates/results/digits.json').read_text())
  rows = {row['method']: row for row in found['rows']}
  assert [*rows] == [*comparison.METHODS]
  whole = rows['gates']['flops_unpruned']
  assert all(abs(row['flops'] / whole - 0.5) < 0.01 for row in rows.values())
  assert rows['scratch']['flops'] == rows['gates']['flops']
  assert rows['gates']['arch'] and rows['gates']['difference'] < 1e-5
  before = {rows[m]['accuracy_unpruned'] for m in ('gates', 'l1', 'random')}
  assert len(before) == 1
