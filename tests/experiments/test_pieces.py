"""Experiments in pieces: rows go on where they ended, time is up everywhere."""

import json
import time

import pytest

from depthprune.run.config import Config
from depthprune.storage.checkpoint import CheckpointError
from experiments.pieces import Arguments, Rows, compare, fill, sized, within


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


def test_cases_are_filled_in_order_and_those_left_are_told(tmp_path):
  rows, made = Rows(tmp_path / 'rows.json', {}, ('seed', 'method')), []

  def cases():  # the second is known once there is a row of the first
    yield {'seed': 0, 'method': 'a'}
    yield from ({'seed': 0, 'method': f'after {len(rows.rows)}'} for _ in rows.rows[:1])

  def make(case):
    made.append(case['method'])
    return {'accuracy': 0.5}

  def scratch(case):
    folder = tmp_path / case['method']
    folder.mkdir()
    return folder

  left = lambda: fill(rows, cases, make, Arguments(left=True), scratch)
  assert left() == [{'seed': 0, 'method': 'a'}] and not made
  assert fill(rows, cases, make, Arguments(), scratch) == [
    {'seed': 0, 'method': 'after 2'}  # as there are two rows now
  ]
  assert made == ['a', 'after 1']
  assert not (tmp_path / 'a').exists()


def test_cases_that_take_too_long_are_left(tmp_path):
  rows = Rows(tmp_path / 'rows.json', {}, ('seed',))
  every = [{'seed': seed} for seed in range(3)]

  def make(case):
    time.sleep(60 if case['seed'] else 0)
    return {}

  given = Arguments(minutes=0.3 / 60)
  left = fill(rows, lambda: every, make, given, lambda case: tmp_path / 'none')
  assert left == every[1:]


def test_a_comparison_has_a_run_for_every_case_beside_the_rows_of_its_seed(tmp_path):
  seen = []

  def row(config, case, found):
    seen.append((config.seed, config.path.name, [r['method'] for r in found]))
    return {'accuracy': 0.5}

  config = Config(workdir=str(tmp_path / 'runs'))
  cases = [{'method': 'a'}, {'method': 'b'}]
  given = Arguments(seeds=(0, 4))
  assert compare(tmp_path / 'rows.json', config, cases, row, given) == []
  assert seen == [
    (0, 'seed0-methoda', []),
    (0, 'seed0-methodb', ['a']),
    (4, 'seed4-methoda', []),
    (4, 'seed4-methodb', ['a']),
  ]
  left = compare(tmp_path / 'rows.json', config, cases, row, Arguments(left=True))
  assert {case['seed'] for case in left} == {1, 2}


def test_an_experiment_has_two_sizes_each_with_its_file():
  full, small = Config(batch=64), {'batch': 8}
  path, config = sized('paper', 'name', full, small, Arguments(full=True))
  assert path.parts[-3:] == ('paper', 'results', 'name_full.json')
  assert (config.batch, str(config.path)) == (64, 'runs/paper/name_full')
  path, config = sized('paper', 'name', full, small, Arguments())
  assert (path.name, config.batch) == ('name.json', 8)
