"""Running experiments: the first that is not done, in pieces, until time is up."""

import inspect
import json
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from depthprune.run.config import default
from experiments import run
from experiments.result_files import Rows, path_of
from experiments.run import Arguments, compare, fill, sized, within

SECOND = 1 / 60


class Clock:
  now = 0.0

  def monotonic(self) -> float:
    return self.now


class Experiment:
  """Has rows to add, each takes a second, in a file as experiments have."""

  def __init__(self, clock: Clock, path: Path, rows: int):
    self.clock, self.path, self.todo = clock, path, rows
    self.asked: list[Arguments] = []

  def __call__(self, arguments: Arguments) -> list[dict]:
    self.asked.append(arguments)
    end = self.clock.now + 60 * (arguments.minutes or 60)
    rows = json.loads(self.path.read_text())['rows'] if self.path.is_file() else []
    while not arguments.left and len(rows) < self.todo and self.clock.now < end:
      self.clock.now += 1
      if self.clock.now <= end:
        rows.append({})
    if rows:
      self.path.parent.mkdir(parents=True, exist_ok=True)
      self.path.write_text(json.dumps({'rows': rows, 'device': 'a GPU'}))
    return [{}] * (self.todo - len(rows))


@pytest.fixture
def experiments(results, monkeypatch):
  """{name: so many rows to add} -> {name: what stands for its function}."""
  clock = Clock()
  monkeypatch.setattr(run, 'time', clock)
  path = lambda name: path_of('paper', name, full=True)
  return lambda **rows: {
    f'paper.{name}': Experiment(clock, path(name), n) for name, n in rows.items()
  }


def test_each_call_goes_on_with_the_first_that_is_not_done(experiments):
  every = experiments(one=2, two=2, three=2)
  asked = Arguments(full=True, minutes=3.5 * SECOND, seeds=(0, 3))
  progress = run.run(every, asked)
  assert [p.rows for p in progress.values()] == [2, 1, 0]
  assert [p.left for p in progress.values()] == [[], [{}], [{}, {}]]
  progress = run.run(every, Arguments(full=True))
  assert [p.rows for p in progress.values()] == [0, 1, 2]
  assert [p.left for p in progress.values()] == [[], [], []]
  asked = every['paper.one'].asked
  assert [arguments.left for arguments in asked] == [True, False, True]
  assert all(arguments.full for arguments in asked)
  assert [arguments.seeds for arguments in asked] == [(0, 3), (0, 3), ()]


def test_what_fails_is_skipped_and_reported(experiments, capsys):
  every = {'paper.one': SimpleNamespace(), **experiments(two=1)}
  progress = run.run(every, Arguments(full=True))
  assert progress == {
    'paper.one': run.Progress(0, None),
    'paper.two': run.Progress(1, []),
  }
  assert "'types.SimpleNamespace' object is not callable" in capsys.readouterr().err
  assert run.summary(progress).splitlines() == [
    'paper.one   +0 rows, failed, see above',
    'paper.two   +1 rows, 0 left',
  ]


def test_left_only_asks(experiments):
  progress = run.run(experiments(one=3), Arguments(full=True, left=True))
  assert progress == {'paper.one': run.Progress(0, [{}, {}, {}])}
  assert run.summary(progress).splitlines() == [
    'paper.one   +0 rows, 3 left',
    *['  {}'] * 3,
  ]


def test_every_experiment_has_a_place_in_the_order_and_its_size():
  assert {*run.experiments()} == {*run.BOTH_SIZES, *run.CPU_ONLY}
  assert not {*run.BOTH_SIZES} & {*run.CPU_ONLY}


@pytest.mark.parametrize('name', (*run.BOTH_SIZES, *run.CPU_ONLY))
def test_a_docstring_names_the_command_of_its_experiment(name):
  doc = inspect.getdoc(run.find([name])[name]) or ''
  assert f'python -m experiments.run {name}' in doc


@pytest.mark.parametrize('full', [True, False])
@pytest.mark.parametrize('name', run.BOTH_SIZES)
def test_the_result_file_of_an_experiment_has_its_name(
  name, full, results, monkeypatch
):
  """So its rows are counted where it writes them; in an empty folder all are left."""
  paths = []
  monkeypatch.setattr(Rows, '_content', lambda rows: paths.append(rows.path) or {})
  assert run.find([name])[name](Arguments(full=full, left=True))
  assert {*paths} == {path_of(*name.split('.'), full)}


@pytest.mark.parametrize(
  ('words', 'message'),
  [
    ('netcut.mlp', 'no experiment is called netcut.mlp; choose from auxiliary.'),
    ('sidenet.composed --full', 'sidenet.composed: there is no other size'),
  ],
)
def test_a_command_that_cannot_be_run_says_why(words, message, monkeypatch, capsys):
  monkeypatch.setattr('sys.argv', ['run', *words.split()])
  with pytest.raises(SystemExit, match='2'):
    run.main()
  assert message in capsys.readouterr().err


def test_a_failure_is_in_the_exit_status(experiments, monkeypatch, capsys):
  every = {'paper.one': SimpleNamespace(), **experiments(two=1)}
  monkeypatch.setattr(run, 'find', lambda names: {name: every[name] for name in names})
  for name, status in (('paper.one', 1), ('paper.two', 0)):
    monkeypatch.setattr('sys.argv', ['run', name, '--full'])
    with pytest.raises(SystemExit) as ended:
      run.main()
    assert ended.value.code == status
  assert 'paper.two   +1 rows, 0 left' in capsys.readouterr().out


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

  arguments = Arguments(minutes=0.3 / 60)
  left = fill(rows, lambda: every, make, arguments, lambda case: tmp_path / 'none')
  assert left == every[1:]


def test_a_comparison_has_a_run_for_every_case_beside_the_rows_of_its_seed(tmp_path):
  seen = []

  def make_row(config, case, same_seed):
    seen.append((config.seed, config.path.name, [r['method'] for r in same_seed]))
    return {'accuracy': 0.5}

  config = default('gates', workdir=str(tmp_path / 'runs'))
  cases = [{'method': 'a'}, {'method': 'b'}]
  arguments = Arguments(seeds=(0, 4))
  assert compare(tmp_path / 'rows.json', config, cases, make_row, arguments) == []
  assert seen == [
    (0, 'seed0-methoda', []),
    (0, 'seed0-methodb', ['a']),
    (4, 'seed4-methoda', []),
    (4, 'seed4-methodb', ['a']),
  ]
  left = compare(tmp_path / 'rows.json', config, cases, make_row, Arguments(left=True))
  assert {case['seed'] for case in left} == {1, 2}


def test_an_experiment_has_two_sizes_each_with_its_file():
  full, small = default('gates', batch=64), {'batch': 8}
  path, config = sized('paper', 'name', full, small, Arguments(full=True))
  assert path.parts[-3:] == ('paper', 'results', 'name_full.json')
  assert (config.batch, str(config.path)) == (64, 'runs/paper/name_full')
  path, config = sized('paper', 'name', full, small, Arguments())
  assert (path.name, config.batch) == ('name.json', 8)
