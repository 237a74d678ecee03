"""Forged networks, with checksums that match: refused by entry, or the very same."""

import json
import random
import shutil
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from depthprune import models
from depthprune.cascades.cascade import cascade
from depthprune.exports.networks import load, load_cascade, save, save_cascade
from depthprune.models.heads import Head, WithHeads
from depthprune.storage import checkpoint
from depthprune.storage.checkpoint import CheckpointError
from depthprune.surgery.prune import prune
from tests.mutations import mutated, sign

TRUNK = models.build('mlp', hidden=(6, 5), classes=3)
MODEL = WithHeads(TRUNK, {'early': Head('layer0', classes=3, hidden=4)})
X = jax.random.normal(jax.random.key(1), (2, 4, 4, 1))
KEEP = {'channels': {'trunk/layer1/dense:1': np.array([1, 0, 1, 1, 0], bool)}}


@pytest.fixture(scope='module')
def stored(tmp_path_factory) -> Path:
  """A cascade of a pruned network with a head."""
  folder = tmp_path_factory.mktemp('stored') / 'it'
  small = prune(MODEL, jax.jit(MODEL.init)(jax.random.key(0), X), KEEP, X)
  made = cascade(small.apply, small.variables, X, thresholds={'early': 0.8})
  save_cascade(folder, made, small, tensors=True)
  return folder


@pytest.fixture
def folder(stored, tmp_path) -> Path:
  return Path(shutil.copytree(stored, tmp_path / 'it'))


def refused_or_same(read, same) -> str:
  """How reading ended: 'refused' or 'same', within 5 seconds."""
  began = time.monotonic()
  try:
    found = read()
  except CheckpointError as error:
    assert len(str(error)) < 1000 and len(str(error).splitlines()) <= 10
    return 'refused'
  finally:
    assert time.monotonic() - began < 5
  assert same(found)
  return 'same'


def answers_as(one):
  outputs = one.apply(one.variables, X)

  def same(other) -> bool:
    jax.tree.map(
      np.testing.assert_array_equal, outputs, other.apply(other.variables, X)
    )
    jax.tree.map(np.testing.assert_array_equal, one.keep, other.keep)
    return one.arch == other.arch or not other.arch

  return same


@pytest.mark.parametrize('seeds', [30, pytest.param(200, marks=pytest.mark.slow)])
def test_any_entry_of_a_network_is_checked(folder, seeds):
  path = folder / 'network' / 'arch.json'
  same = answers_as(load(folder / 'network'))
  record, ends = json.loads(path.read_text()), []
  del record['crc32']
  for seed in range(seeds):
    sign(path, mutated(record, random.Random(seed))[1])
    ends.append(refused_or_same(lambda: load(folder / 'network'), same))
  assert ends.count('refused') > seeds / 2


@pytest.mark.parametrize('seeds', [30, pytest.param(200, marks=pytest.mark.slow)])
def test_any_entry_of_a_cascade_is_checked(folder, seeds):
  path, early = folder / 'cascade.json', load_cascade(folder)
  record, ends = json.loads(path.read_text()), []

  def same(other) -> bool:
    jax.tree.map(np.testing.assert_array_equal, early.variables, other.variables)
    np.testing.assert_array_equal(early.thresholds, other.thresholds)
    return (early.exits, early.confidence) == (other.exits, other.confidence)

  for seed in range(seeds):
    what, values = mutated(record, random.Random(seed))
    if what.split()[0] in ('large', 'negative') and '/early' in what:
      continue  # another threshold or temperature, which one may have
    path.write_text(json.dumps(values))
    ends.append(refused_or_same(lambda: load_cascade(folder), same))
  assert ends.count('refused') > len(ends) / 2


def fields(record) -> dict:
  return record['model']['fields']['trunk']['fields']


FORGED = {
  'format -1': (
    lambda r: r.update(format=-1),
    r'format: expected a number of at least 1',
  ),
  'a size without end': (
    lambda r: fields(r).update(hidden=[10**18, 5]),
    r'model: expected no number above 4096, .* got 1000000000000000000',
  ),
  'another size': (lambda r: fields(r).update(classes=4), 'params/trunk/head'),
  'another arch': (
    lambda r: r['arch'].update({'trunk/layer1/dense': 4}),
    'arch.json: arch: expected the sizes of the arrays',
  ),
  'an arch beyond the model': (
    lambda r: r['arch'].update({'trunk/layer1/dense': 400}),
    'arch.json: arch: .*expected an integer from 1 to 5',
  ),
  'a function for a class': (
    lambda r: r['model']['fields']['trunk'].update(name='pretrained.read'),
    "arch.json: model: no model 'pretrained.read'",
  ),
  'an index beyond the axis': (
    lambda r: r['keep']['channels'].update({'trunk/layer1/dense:1': [0, 2, 90]}),
    'trunk/layer1/dense:1: expected different indices below 5',
  ),
  'a normalisation without scale': (
    lambda r: r['report'].update(normalisation={'mean': [0.0], 'std': [1.0]}),
    'report: normalisation.scale: expected a number above 0, got no such entry',
  ),
  'a type of no numbers': (
    lambda r: next(iter(r['leaves'].values())).update(dtype='object'),
    "dtype: expected the name of a type of numbers, got 'object'",
  ),
}


@pytest.mark.parametrize('what', FORGED)
def test_the_entry_that_is_forged_is_named(folder, what):
  path = folder / 'network' / 'arch.json'
  change, said = FORGED[what]
  record = json.loads(path.read_text())
  change(record)
  sign(path, record)
  with pytest.raises(CheckpointError, match=said):
    load(folder / 'network')


@pytest.mark.parametrize(
  ('entry', 'value', 'said'),
  [
    ('thresholds', {'early': float('nan')}, r"early: expected .*'inf' .*, got nan"),
    ('thresholds', {}, 'thresholds: expected one for each of early, got none'),
    ('temperatures', {'early': 0}, 'temperatures.early: expected a number above 0'),
    ('confidence', 'exec', 'cascade.json: confidence'),
    ('confidence', 'learned', 'weights: expected those of "learned", got null'),
    ('weights', [[1.0]], 'weights: expected 1 lists of 4 numbers or null'),
    ('exits', ['main', 'early'], 'cascade.json: thresholds'),
    ('steps', 10**9, 'steps: expected a number from 1 to 65536'),
  ],
)
def test_settings_of_a_cascade_that_are_forged_are_named(folder, entry, value, said):
  path = folder / 'cascade.json'
  path.write_text(json.dumps({**json.loads(path.read_text()), entry: value}))
  with pytest.raises(CheckpointError, match=said):
    load_cascade(folder)


def reshaped(arrays):
  name = next(iter(arrays))
  return {**arrays, name: arrays[name][..., None]}


BINARY = {
  'truncated': lambda arrays: safetensors.numpy.save(arrays)[:-9],
  'empty': lambda arrays: b'',
  'another dtype': lambda arrays: safetensors.numpy.save(
    {k: v.astype(np.float16) for k, v in arrays.items()}
  ),
  'another shape': lambda arrays: safetensors.numpy.save(reshaped(arrays)),
  'a missing tensor': lambda arrays: safetensors.numpy.save(
    dict([*arrays.items()][1:])
  ),
  'a further tensor': lambda arrays: safetensors.numpy.save(
    {**arrays, 'more': np.zeros(3)}
  ),
  'NaN': lambda arrays: safetensors.numpy.save(
    {k: np.full_like(v, np.nan) for k, v in arrays.items()}
  ),
  'a header without end': lambda arrays: (2**60).to_bytes(8, 'little') + b'{}',
}


@pytest.mark.parametrize('what', BINARY)
def test_arrays_that_are_forged_are_refused(folder, what):
  path = folder / 'network' / 'weights.safetensors'
  path.write_bytes(BINARY[what](safetensors.numpy.load_file(path)))
  record = json.loads((path.parent / 'arch.json').read_text())
  record['files'] = checkpoint.checksums(path)
  sign(path.parent / 'arch.json', record)
  with pytest.raises(CheckpointError):
    load(folder / 'network')


def test_numbers_that_are_not_finite_come_back_where_they_were_saved(tmp_path):
  def masked(v, x):
    return jnp.where(jnp.isfinite(v['mask']), x @ v['w'], 0.0)

  v = {'w': jnp.ones((4, 3)), 'mask': jnp.array([0.0, -jnp.inf, 0.0])}
  x = jnp.ones((2, 4))
  save(tmp_path / 'it', prune(masked, v, {}, x))
  back = load(tmp_path / 'it', masked)
  np.testing.assert_array_equal(back.variables['mask'], v['mask'])
  record = checkpoint.read_record(tmp_path / 'it', 'arch.json')
  assert record['not_finite'] == ['mask']
  record['not_finite'] = []
  sign(tmp_path / 'it' / 'arch.json', record)
  with pytest.raises(CheckpointError, match='mask: expected finite numbers'):
    load(tmp_path / 'it', masked)
