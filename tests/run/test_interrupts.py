"""Ctrl-C and SIGTERM at any moment: one line, the right exit code, and nothing lost.

The processes are real, and so are the signals.
"""

import json
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from depthprune import cli
from depthprune.run import interrupts, rounds
from depthprune.run.interrupts import Preempted
from depthprune.storage import directory
from tests.run import test_job_faults as faults
from tests.run.test_job_faults import assert_same, left, logged, saved
from tests.run.test_job_faults import forks as forks  # the fixture
from tests.train.test_mesh import launch

ROOT = Path(__file__).parents[2]
SIGNALS = signal.SIGINT, signal.SIGTERM


@pytest.fixture(scope='module', autouse=True)
def interrupts_are_not_ignored():
  """As they are where a shell runs the tests in the background."""
  before = signal.signal(signal.SIGINT, signal.default_int_handler)
  yield
  signal.signal(signal.SIGINT, before)


@pytest.fixture(autouse=True)
def handlers_are_as_before():
  before = [signal.getsignal(number) for number in SIGNALS]
  yield
  assert [signal.getsignal(number) for number in SIGNALS] == before


# ---- the contexts --------------------------------------------------------------------


def test_a_signal_is_noted_and_delivered_unless_it_was_acted_on():
  with pytest.raises(KeyboardInterrupt), interrupts.deferred() as request:
    signal.raise_signal(signal.SIGINT)
    assert request and request.signal == signal.SIGINT
  message = '^stopped by SIGTERM now$'
  with pytest.raises(Preempted, match=message), interrupts.deferred() as request:
    assert not request
    signal.raise_signal(signal.SIGTERM)
    assert request.signal
    raise interrupts.stopped(request.signal, ' now')


def test_the_second_signal_does_what_it_would_do_outside(monkeypatch):
  monkeypatch.setattr(interrupts, 'SAME_S', 0.0)
  reached = []
  with pytest.raises(KeyboardInterrupt), interrupts.deferred() as request:
    signal.raise_signal(signal.SIGINT)
    reached.append(request.signal)
    time.sleep(0.01)
    signal.raise_signal(signal.SIGINT)
    reached.append('behind the second')
  assert reached == [signal.SIGINT]


def test_a_signal_that_is_passed_on_is_the_same():
  with pytest.raises(Preempted), interrupts.deferred():
    for _ in range(3):
      signal.raise_signal(signal.SIGTERM)
    raise Preempted


def test_what_a_process_was_started_to_ignore_stays_ignored():
  before = signal.signal(signal.SIGINT, signal.SIG_IGN)
  try:
    with interrupts.deferred() as request:
      signal.raise_signal(signal.SIGINT)
      assert not request
  finally:
    signal.signal(signal.SIGINT, before)


def test_off_the_main_thread_nothing_is_handled():
  found = []

  def work():
    with interrupts.deferred() as request:
      found.extend([bool(request), *map(signal.getsignal, SIGNALS)])

  thread = threading.Thread(target=work)
  thread.start()
  thread.join()
  assert found == [False, *map(signal.getsignal, SIGNALS)]


TWICE = """
import signal, sys, time
from depthprune.run import interrupts
sys.stdout = open(1, 'w', buffering=8192)
with interrupts.ending(lambda: '; ended'), interrupts.deferred() as request:
  print('begun', end='')
  sys.stderr.write('ready')
  while not request:
    time.sleep(0.01)
  print(' and stopping', end='')
  sys.stderr.write('first')
  while True:
    try:
      time.sleep(60)
    except BaseException:
      print('raised')
"""


@pytest.mark.parametrize('number', SIGNALS)
def test_a_second_signal_ends_a_process_that_hangs(number):
  """At once, with what was printed so far."""
  (process,) = launch(['-c', TWICE])
  assert process.stderr is not None and process.stderr.read(5) == 'ready'
  process.send_signal(number)
  assert process.stderr.read(5) == 'first'
  time.sleep(interrupts.SAME_S + 0.1)
  process.send_signal(number)
  out, said = process.communicate(timeout=60)
  assert process.returncode == 128 + number
  assert out == 'begun and stopping'
  assert said == f'stopped by {interrupts.NAMES[number]}; ended\n'


def until_handled(pid: int) -> None:
  """Waits until a process, which Python has just started, handles SIGTERM."""
  caught = 0
  while not caught & 1 << signal.SIGTERM - 1:
    time.sleep(0.001)
    status = Path(f'/proc/{pid}/status').read_text()
    assert 'State:\tZ' not in status, 'it ended and handled none'
    caught = int(status.split('SigCgt:')[1].split()[0], 16)


# ---- commands ------------------------------------------------------------------------


@pytest.mark.parametrize('module', ['depthprune', 'depthprune.cli'])
@pytest.mark.parametrize('seconds', [0.0, 0.3])
def test_while_python_imports_it_ends_in_one_line(module, seconds):
  """A command that has nothing to continue does not say that it continues."""
  (process,) = launch(['-m', module, 'models'])
  until_handled(process.pid)
  time.sleep(seconds)
  process.send_signal(signal.SIGINT)
  assert process.communicate(timeout=60)[1] == 'stopped by Ctrl-C\n'
  assert process.returncode == cli.INTERRUPTED


def test_from_python_it_is_a_keyboard_interrupt_behind_the_save(tmp_path, monkeypatch):
  config = faults.long_config(tmp_path, train_epochs=0, gate_epochs=1)
  append = directory.append

  def pressed(path, line):
    append(path, line)
    if line['step'] == 3:
      signal.raise_signal(signal.SIGINT)

  with monkeypatch.context() as patch:
    patch.setattr(directory, 'append', pressed)
    message = '^gates: stopped by Ctrl-C and saved at step 3 of 10$'
    with pytest.raises(KeyboardInterrupt, match=message):
      rounds.run(config, show=False)
  assert saved(tmp_path)[-1] == 3


def test_ctrl_c_saves_behind_the_step_in_progress(tmp_path):
  """Also between two lines of the history, which are 8 steps apart."""
  (process,) = launch(faults.command(tmp_path, every_s=1000))
  faults.until_gates(tmp_path, process)
  process.send_signal(signal.SIGINT)
  said = process.communicate(timeout=300)[1]
  (step,) = saved(tmp_path)
  assert process.returncode == cli.INTERRUPTED
  assert said == (
    f'gates: stopped by Ctrl-C and saved at step {step} of 400; the same command '
    'continues from there\n'
  )
  assert logged(tmp_path)[-1] == step < 400


# ---- any moment ----------------------------------------------------------------------

BRIEF = '--subset 160 --batch 16 --gate-epochs 1 --finetune-epochs 1'
FAST = '--model mlp --train-epochs 0'
METHODS = {
  'gates': FAST,
  'netcut': f'{FAST} --beta 0.001 --force',
  'implosion': '--model resnet14 --depth 4 --learning-rate 0.01 --train-epochs 0',
  'sidenet': '--model mlp --hidden 16 --regime mixed --train-epochs 1',
  'auxiliary': f'{FAST} --structure search',
}
TIMES = {'wall_seconds', 'compile_s', 'latency_ms', 'config', 'command'}


def program(words: list[str], output: Path, cold: bool) -> None:
  """The program as a shell starts it, or in a process that has imported the library."""
  signal.signal(signal.SIGINT, signal.default_int_handler)
  with output.open('w') as file:
    for stream in (1, 2):
      os.dup2(file.fileno(), stream)
  if cold:
    os.execv(sys.executable, [sys.executable, '-m', 'depthprune', *words])
  from depthprune.__main__ import main

  sys.argv = ['depthprune', *words]
  main()


def words_of(method: str, folder: Path) -> list[str]:
  words = f'run {method} {METHODS[method]} {BRIEF} --checkpoint-every-s 1000'
  return [*words.split(), '--workdir', str(folder)]


def result(folder: Path) -> dict:
  """What a run has reached, without what a clock has measured."""
  found = json.loads((folder / 'result.json').read_text())
  found.get('cascade', {}).pop('executed', None)
  for layer in found.get('layers', {}).values():
    layer.pop('ms', None)
  return {name: value for name, value in found.items() if name not in TIMES}


def interrupted(begin: Callable, folder: Path, number: int, seconds: float) -> bool:
  """Begins a run and sends it a signal; returns whether that came before its end."""
  output = folder.with_suffix('.txt')
  process = begin(folder)
  until_handled(process.pid)
  process.join(seconds)
  if process.exitcode is None:
    os.kill(process.pid, number)
  process.join(120)
  said = output.read_text()
  assert process.exitcode in (128 + number, 0), said
  assert not re.search('Traceback|Segmentation|Exception ignored|Fatal', said)
  if process.exitcode == 0:
    return False
  *_, line = said.splitlines()
  name = interrupts.NAMES[signal.Signals(number)]
  states = [*folder.glob('checkpoints/*/[0-9]*')]
  where = rf'(\S+): stopped by {name} and saved at step (\d+) of [12]0'
  if match := re.fullmatch(f'{where}; the same command continues from there', line):
    stage, step = match[1], int(match[2])
    assert saved(folder, stage)[-1] == logged(folder, stage)[-1] == step
  elif line.endswith('; the same command continues'):
    assert states
  else:
    assert line in (
      f'stopped by {name}',
      f'stopped by {name} before anything was saved',
    )
  return True


@pytest.mark.parametrize(
  ('method', 'count', 'cold'),
  [
    ('gates', 6, False),
    *(pytest.param(m, 40, True, marks=pytest.mark.slow) for m in METHODS),
  ],
)
def test_interrupted_at_any_moment_a_run_ends_with_its_bits(
  method, count, cold, tmp_path, forks
):
  """It continues up to six times, and is then let go."""
  folder = tmp_path / 'whole'

  def begin(folder: Path):
    output = folder.with_suffix('.txt')
    words = words_of(method, folder)
    process = forks.Process(target=program, args=(words, output, cold))
    process.start()
    return process

  def completed(folder: Path) -> float:
    before = time.monotonic()
    process = begin(folder)
    process.join()
    assert process.exitcode == 0, folder.with_suffix('.txt').read_text()
    return time.monotonic() - before

  seconds = completed(folder)  # the next ones do not compile, and are faster
  expected, reached = left(folder), result(folder)
  rng, cut_short = np.random.RandomState(0), 0
  for i in range(count):
    folder, number = tmp_path / f'run{i // 6}', SIGNALS[i % 2]
    cut_short += interrupted(begin, folder, number, rng.uniform(0, seconds) / 2)
    if i % 6 == 5 or i == count - 1:
      completed(folder)
      assert_same(left(folder), expected)
      assert result(folder) == reached
  assert cut_short >= count // 2
