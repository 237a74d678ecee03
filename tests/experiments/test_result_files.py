"""Result files: rows continue where they ended, and never mix configs."""

import json

import pytest

from depthprune.run.config import default
from depthprune.storage.checkpoint import CheckpointError
from experiments.result_files import Rows, files_with, path_of


def test_rows_go_on_where_they_ended(tmp_path):
  path, keys = tmp_path / 'rows.json', ('seed', 'method')
  rows = Rows(path, {'epochs': 3}, keys)
  assert rows.missing(seed=0, method='a')
  rows.add({'seed': 0, 'method': 'a', 'accuracy': 0.5})
  again = Rows(path, {'epochs': 3}, keys)
  assert not again.missing(seed=0, method='a') and again.missing(seed=1, method='a')
  again.add({'seed': 1, 'method': 'a', 'accuracy': 0.6})
  found = json.loads(path.read_text())
  assert [row['accuracy'] for row in found['rows']] == [0.5, 0.6]
  assert {'config', 'command', 'versions', 'device'} <= set(found)


def test_rows_of_another_config_are_never_mixed(tmp_path):
  path = tmp_path / 'rows.json'
  Rows(path, {'epochs': 3}, ('seed',)).add({'seed': 0})
  with pytest.raises(CheckpointError, match=r'epochs \(asked for 4, there 3\)'):
    Rows(path, {'epochs': 4}, ('seed',))


def test_a_field_that_a_later_version_added_had_its_default_then(tmp_path):
  config = default('gates').to_json()
  old = {k: v for k, v in config.items() if k != 'length'}
  old['options'] = {k: v for k, v in old['options'].items() if k != 'latency_batch'}
  path = tmp_path / 'rows.json'
  for stored, now in (
    (old, config),
    ({'small': old, 'n': 2}, {'small': config, 'n': 2}),
  ):
    path.write_text(json.dumps({'config': stored, 'rows': [{'seed': 0}]}))
    assert not Rows(path, now, ('seed',)).missing(seed=0)
  with pytest.raises(CheckpointError, match=r'length \(asked for 64, there 128\)'):
    path.write_text(json.dumps({'config': old, 'rows': []}))
    Rows(path, {**config, 'length': 64}, ('seed',))


def test_files_are_found_by_the_keys_of_their_rows(netcut_file, sidenet_file):
  assert [*files_with('netcut', 'beta', 'kept')] == [netcut_file]
  assert files_with('netcut', 'beta', 'regime') == {}
  assert [*files_with('sidenet', 'regime')] == [sidenet_file]


def test_each_size_has_its_file(results):
  folder = results / 'paper' / 'results'
  assert path_of('paper', 'name', full=True) == folder / 'name_full.json'
  assert path_of('paper', 'name', full=False) == folder / 'name.json'
