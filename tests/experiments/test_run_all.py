"""All accelerator-sized experiments: the first that is not done, until time is up."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from experiments import run_all
from experiments.pieces import Arguments

SECOND = 1 / 60


class Clock:
  now = 0.0

  def monotonic(self) -> float:
    return self.now


class Experiment:
  """Has rows to add, each takes a second, in a file as experiments have."""

  def __init__(self, clock: Clock, path: Path, rows: int):
    self.clock, self.path, self.todo = clock, path, rows
    self.given: list[Arguments] = []

  def run(self, given: Arguments) -> list[dict]:
    self.given.append(given)
    end = self.clock.now + 60 * (given.minutes or 60)
    found = json.loads(self.path.read_text())['rows'] if self.path.is_file() else []
    while not given.left and len(found) < self.todo and self.clock.now < end:
      self.clock.now += 1
      if self.clock.now <= end:
        found.append({})
    if found:
      self.path.parent.mkdir(parents=True, exist_ok=True)
      self.path.write_text(json.dumps({'rows': found, 'device': 'a GPU'}))
    return [{}] * (self.todo - len(found))


@pytest.fixture
def experiments(results, monkeypatch):
  """{name: so many rows to add} -> {name: what stands for its module}."""
  clock = Clock()
  monkeypatch.setattr(run_all, 'HERE', results)
  monkeypatch.setattr(run_all, 'time', clock)
  folder = lambda name: results / name.replace('.', '/results/')
  path = lambda name: folder(name).with_name(f'{folder(name).name}_full.json')
  return lambda **rows: {
    f'paper.{name}': Experiment(clock, path(f'paper.{name}'), n)
    for name, n in rows.items()
  }


def test_each_call_goes_on_with_the_first_that_is_not_done(experiments):
  every = experiments(one=2, two=2, three=2)
  done = run_all.run(every, Arguments(minutes=3.5 * SECOND, seeds=(0, 3)))
  assert [d.rows for d in done.values()] == [2, 1, 0]
  assert [d.left for d in done.values()] == [0, 1, 2]
  done = run_all.run(every, Arguments())
  assert [d.rows for d in done.values()] == [0, 1, 2]
  assert [d.left for d in done.values()] == [0, 0, 0]
  asked = every['paper.one'].given
  assert [given.left for given in asked] == [True, False, True]
  assert all(given.full for given in asked)
  assert [given.seeds for given in asked] == [(0, 3), (0, 3), ()]


def test_what_fails_is_left_out_and_said(experiments, capsys):
  every = experiments(two=1)
  done = run_all.run({'paper.one': SimpleNamespace(), **every}, Arguments())
  assert done == {'paper.one': run_all.Done(0, None), 'paper.two': run_all.Done(1, 0)}
  assert "no attribute 'run'" in capsys.readouterr().err
  assert run_all.said(done).splitlines() == [
    'paper.one   +0 rows, failed, see above',
    'paper.two   +1 rows, 0 left',
  ]


def test_left_only_asks(experiments):
  done = run_all.run(experiments(one=3), Arguments(left=True))
  assert done == {'paper.one': run_all.Done(0, 3)}


def test_progress_has_a_dash_where_there_is_no_result(experiments, monkeypatch):
  every = experiments(one=2, two=2)
  every['paper.one'].run(Arguments(minutes=SECOND))
  monkeypatch.setattr(run_all, 'modules', lambda names: every)
  assert run_all.progress().splitlines()[-2:] == [
    '| paper.one | 1 | 1 | a GPU |',
    '| paper.two | – | 2 | – |',
  ]


def test_every_experiment_with_an_accelerators_size_is_among_them():
  there = {
    f'{path.parent.name}.{path.stem}'
    for path in Path(run_all.__file__).parent.glob('*/*.py')
    if 'main(__doc__, run)' in path.read_text()
  }
  small_only = {'trainable_gates.fashion_mnist', 'sidenet.composed'}
  assert there - small_only == {*run_all.EXPERIMENTS}
