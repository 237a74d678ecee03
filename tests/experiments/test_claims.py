"""Rows of claims are run in order, a process for each experiment and seed."""

import os
import subprocess
import threading

import pytest

from experiments import claims, run
from experiments.claims import split, units, work

LEFT = [('paper.first', 0), ('paper.first', 1), ('paper.second', 0)]


class Processes:
  """Stands for subprocess.run: what was started, and how many ran side by side."""

  def __init__(self, waits_for: int = 1):
    self.commands: list[list[str]] = []
    self.environments: list[dict] = []
    self.cores: list[set[int]] = []
    self.together = threading.Barrier(waits_for)

  def __call__(self, command, env, check):
    assert not check  # one that fails does not stop the others
    self.commands.append(command[3:])
    self.environments.append(env)
    self.cores.append(os.sched_getaffinity(0))
    self.together.wait(timeout=5)


@pytest.fixture
def processes(monkeypatch):
  def start(at_once: int) -> Processes:
    made = Processes(at_once)
    monkeypatch.setattr(subprocess, 'run', made)
    return made

  return start


def test_the_most_valuable_runs_first_and_all_have_the_same_end(processes):
  started = processes(1)
  work(LEFT, full=True, minutes=60, at_once=1)
  words = [command[:3] for command in started.commands]
  assert words == [
    ['paper.first', '--seeds', '0'],
    ['paper.first', '--seeds', '1'],
    ['paper.second', '--seeds', '0'],
  ]
  assert all(59 < float(command[4]) <= 60 for command in started.commands)
  assert all(command[5:] == ['--full'] for command in started.commands)


def test_nothing_starts_when_the_minutes_are_over_and_0_is_never(processes):
  started = processes(1)
  work(LEFT, full=False, minutes=1e-4, at_once=1)
  assert started.commands == []
  work(LEFT[:1], full=False, minutes=0, at_once=1)
  assert started.commands == [['paper.first', '--seeds', '0', '--minutes', '0.000']]


def test_so_many_run_side_by_side_and_share_the_memory(processes):
  """Each of the three waits until all of them run."""
  started = processes(3)
  work(LEFT, full=False, minutes=0, at_once=3)
  shared = [e['XLA_PYTHON_CLIENT_PREALLOCATE'] for e in started.environments]
  assert shared == ['false'] * 3


def test_each_process_has_its_own_cores(processes):
  mine = os.sched_getaffinity(0)
  started = processes(2)
  work(LEFT[:2], full=False, minutes=0, at_once=2)
  first, second = started.cores
  assert first | second == mine and (len(mine) == 1 or not first & second)
  assert os.sched_getaffinity(0) == mine  # those of the caller stay


@pytest.mark.parametrize('cores', [[3], [0, 1], [0, 2, 4, 5, 7]])
@pytest.mark.parametrize('parts', [1, 2, 3])
def test_every_core_has_a_process_and_every_process_a_core(cores, parts):
  shares = split(cores, parts)
  assert len(shares) == parts and all(shares)
  assert set().union(*shares) == set(cores)
  assert sum(map(len, shares)) == max(parts, len(cores))


def test_a_unit_is_an_experiment_and_a_seed_with_rows_left(monkeypatch):
  left = {
    'first': [{'seed': 1, 'method': 'a'}, {'seed': 1, 'method': 'b'}, {'seed': 2}],
    'failed': None,
    'done': [],
    'last': [{'seed': 0}],
  }
  progress = {name: run.Progress(0, cases) for name, cases in left.items()}
  monkeypatch.setattr(claims, 'find', lambda names: names)
  monkeypatch.setattr(claims, 'run', lambda chosen, arguments: progress)
  assert units(full=False) == [('first', 1), ('first', 2), ('last', 0)]


@pytest.mark.parametrize('full', [False, True])
def test_every_claim_is_an_experiment(full):
  names = run.BOTH_SIZES if full else claims.ON_A_CPU
  assert [*run.find(names)] == [*names]


def test_less_than_one_process_is_refused(monkeypatch, capsys):
  monkeypatch.setattr('sys.argv', ['claims', '--at-once', '0'])
  with pytest.raises(SystemExit):
    claims.main()
  assert 'at least 1, got 0' in capsys.readouterr().err
