"""Gates beside all their controls, small: an MLP on the digits."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import depthprune as dp
from experiments import result_files
from experiments.run import Arguments
from experiments.trainable_gates import comparison, torch_pruned
from tests.run.test_sweep import SMALL


def test_torch_pruning_keeps_the_channels_of_the_largest_norms():
  """Its groups: what a channel is computed by, its scale, and what reads it."""
  pytest.importorskip('torch_pruning')
  model, x = dp.models.build('resnet8'), jnp.ones((1, 32, 32, 3))
  variables = model.init(jax.random.key(0), x)
  keep = torch_pruned.keep(dp.couple(model, variables, x), variables, 0.5)['channels']
  assert len(keep) == 3
  for group, kept in keep.items():
    stage, block, _ = group.split('/')
    own = variables['params'][stage][block]
    squares = [
      np.square(own['conv1']['kernel']).sum((0, 1, 2)),
      np.square(own['norm1']['scale']),
      np.square(own['conv2']['kernel']).sum((0, 1, 3)),
    ]
    order = np.argsort(np.mean(squares, 0))
    assert set(order[-kept.sum() :]) == {*np.flatnonzero(kept)}


@pytest.mark.slow
def test_all_methods_reach_the_same_cost_and_scratch_has_the_shape_of_gates(
  tmp_path, monkeypatch
):
  monkeypatch.chdir(tmp_path)
  monkeypatch.setattr(result_files, 'HERE', tmp_path)
  methods = 'gates', 'l1', 'random', 'scratch', 'uncut'
  about = 'digits', SMALL, {}, (0.5,), methods
  comparison._base.cache_clear()
  assert comparison.run(*about, Arguments(seeds=(0,))) == []
  found = json.loads((tmp_path / 'trainable_gates/results/digits.json').read_text())
  rows = {row['method']: row for row in found['rows']}
  assert [*rows] == [*methods]
  whole = rows['gates']['flops_unpruned']
  assert rows.pop('uncut')['flops'] == whole
  assert all(abs(row['flops'] / whole - 0.5) < 0.01 for row in rows.values())
  assert rows['scratch']['flops'] == rows['gates']['flops']
  assert rows['gates']['arch'] and rows['gates']['difference'] < 1e-5
  before = {rows[m]['accuracy_unpruned'] for m in ('gates', 'l1', 'random')}
  assert len(before) == 1
