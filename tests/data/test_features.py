"""Features computed once: what a head reads, on disk, gone on with after a kill."""

import errno
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from depthprune.data import features
from depthprune.data.features import PROGRESS, FeatureSampler, FeatureSet, collect
from depthprune.models.heads import Head, WithHeads
from depthprune.models.resnet import ResNet
from depthprune.storage.checkpoint import CheckpointError
from depthprune.storage.directory import WriteError
from tests import zoo

X = np.random.default_rng(0).normal(size=(20, 8, 8, 3)).astype(np.float32)
LABEL = np.arange(20, dtype=np.int32)
ABOUT = {'seed': 0}


def batches():
  """Twenty examples in batches of eight, the last one padded."""
  for start in (0, 8, 16):
    rows = np.arange(start, start + 8)
    weight = (rows < 20).astype(np.float32)
    at = rows.clip(max=19)
    yield {'image': X[at], 'label': LABEL[at], 'weight': weight}


def apply(variables, x):
  return {'stage1/block0': x.mean((1, 2)) @ variables, 'main': x[:, 0, 0]}


W = jnp.asarray(np.random.default_rng(1).normal(size=(3, 5)), jnp.float32)


def test_rows_come_in_order_without_padding(tmp_path):
  found = collect(apply, W, batches(), 20, tmp_path, ABOUT)
  assert found['label'].tolist() == list(range(20))
  expected = X.mean((1, 2)) @ W
  np.testing.assert_allclose(found['features']['stage1/block0'], expected, 1e-5, 1e-6)
  np.testing.assert_array_equal(found['features']['main'], X[:, 0, 0])


def test_an_unfinished_collection_is_gone_on_with(tmp_path):
  class Killed(Exception):
    pass

  def some():
    yield from list(batches())[:2]
    raise Killed

  with pytest.raises(Killed):
    collect(apply, W, some(), 20, tmp_path, ABOUT)
  assert json.loads((tmp_path / PROGRESS).read_text())['rows'] == 16
  seen = []

  def counting(variables, x):
    seen.append(len(x))
    return apply(variables, x)

  found = collect(counting, W, batches(), 20, tmp_path, ABOUT)
  assert len(seen) == 1  # traced for the one batch that was missing
  assert found['label'].tolist() == list(range(20))
  again = collect(counting, W, batches(), 20, tmp_path, ABOUT)
  assert len(seen) == 1
  np.testing.assert_array_equal(again['features']['main'], found['features']['main'])


def test_damaged_features_are_computed_again_or_said_to_be(tmp_path):
  found = collect(apply, W, batches(), 20, tmp_path, ABOUT)
  (tmp_path / PROGRESS).write_text('{')
  with pytest.warns(UserWarning, match='features.json: damaged'):
    again = collect(apply, W, batches(), 20, tmp_path, ABOUT)
  jax.tree.map(np.testing.assert_array_equal, again, found)
  file = tmp_path / '0.npy'
  file.write_bytes(file.read_bytes()[:-4])
  with pytest.raises(CheckpointError, match='damaged: .* Delete the folder'):
    collect(apply, W, batches(), 20, tmp_path, ABOUT)


def test_features_without_room_are_refused_before_any_is_computed(
  tmp_path, monkeypatch
):
  def full(*args):
    raise OSError(errno.ENOSPC, 'No space left on device')

  monkeypatch.setattr(features.os, 'posix_fallocate', full)
  with pytest.raises(WriteError, match='No space left'):
    collect(apply, W, batches(), 20, tmp_path, ABOUT)
  assert not (tmp_path / PROGRESS).exists()


def test_features_of_something_else_are_refused(tmp_path):
  collect(apply, W, batches(), 20, tmp_path, ABOUT)
  with pytest.raises(CheckpointError, match='seed'):
    collect(apply, W, batches(), 20, tmp_path, {'seed': 1})


def test_what_does_not_fit_in_memory_stays_on_disk(tmp_path, monkeypatch):
  monkeypatch.setattr(features, 'SHARE', 10**12)
  split = collect(apply, W, batches(), 20, tmp_path, ABOUT)
  assert isinstance(split['features']['main'], np.memmap)
  images = FeatureSet('x', split, split, split, 20)
  sampler = images.sampler(jax.random.key(0), 6, augment=True)
  assert images.mapped and sampler.on_host and images.on_device() is split
  in_memory = FeatureSampler(sampler.key, 6)
  small = jax.tree.map(jnp.asarray, split)
  for step in range(7):
    one, other = sampler(split, step), jax.jit(in_memory.__call__)(small, step)
    jax.tree.map(np.testing.assert_array_equal, one, other)


def test_every_row_once_an_epoch_on_the_host_and_inside_jit(tmp_path):
  split = jax.tree.map(jnp.asarray, collect(apply, W, batches(), 20, tmp_path, ABOUT))
  sampler = FeatureSampler(jax.random.key(3), 5)
  host, inside = sampler.stepwise(), jax.jit(sampler.__call__)
  for epoch in range(2):
    seen = []
    for step in range(4 * epoch, 4 * epoch + 4):
      one, other = host(split, step), inside(split, step)
      jax.tree.map(np.testing.assert_array_equal, one, other)
      rows = np.asarray(one['label'])
      np.testing.assert_array_equal(one['features']['main'], X[rows][:, 0, 0])
      seen += rows.tolist()
    assert sorted(seen) == list(range(20))


def test_batches_for_evaluation_are_padded_at_the_end(tmp_path):
  split = collect(apply, W, batches(), 20, tmp_path, ABOUT)
  found = list(FeatureSet('x', split, split, split, 20).batches(split, 8))
  assert [b['label'].shape for b in found] == [(8,)] * 3
  real = [np.asarray(b['label'])[np.asarray(b['weight']) > 0] for b in found]
  assert np.concatenate(real).tolist() == list(range(20))


@pytest.mark.parametrize('more', [{}, {'norm': True, 'after': 'a'}])
def test_heads_alone_on_features_are_the_heads_on_their_trunk(more):
  heads = {
    'a': Head('stage1/block0', hidden=5, pool='grid4'),
    'b': Head('stage2/block0', **more),
  }
  model = WithHeads(ResNet(depth=8, width=4), heads)
  x = jnp.asarray(X)
  variables = zoo.randomised(jax.eval_shape(model.init, jax.random.key(0), x))
  whole = model.apply(variables, x)
  read = model.apply(variables, x, method='features')
  mine = {
    name: {k: v for k, v in tree.items() if k != 'trunk'}
    for name, tree in variables.items()
  }
  found = model.alone.apply(mine, read)
  assert sorted(found) == ['a', 'b', 'main']
  for name, logits in found.items():
    np.testing.assert_allclose(logits, whole[name], 1e-5, 1e-5)
