"""Experiments in pieces: rows go on where they ended, time is up everywhere."""

import json
import time

import pytest

from depthprune.training.keeper import CheckpointError
from experiments.pieces import Rows, within


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


def test_time_is_up_even_where_errors_are_caught(capsys):
  with within(0.05 / 60):
    while True:
      try:
        time.sleep(1)
      except Exception:
        continue
  assert 'the same command goes on from here' in capsys.readouterr().out
  with within(0):
    time.sleep(0.01)
