"""Forged results and histories: a report of what they say, or our error."""

import json
import random
import time

import pytest

from depthprune.report import page, run_files, screen
from tests.mutations import mutated
from tests.report.cascades import made_up_sidenet
from tests.report.runs import (
  made_up_auxiliary,
  made_up_gates,
  made_up_implosion,
  made_up_netcut,
  made_up_result,
  write_run,
)

RUNS = {
  'gates': lambda: (made_up_result(), made_up_gates()),
  'netcut': made_up_netcut,
  'implosion': made_up_implosion,
  'auxiliary': made_up_auxiliary,
  'sidenet': lambda: (made_up_sidenet(), []),
}
SEEDS = pytest.mark.parametrize(
  'seeds', [20, pytest.param(200, marks=pytest.mark.slow)]
)


def reported(path) -> bool:
  """Whether there is a report, soon; if not, our error says why."""
  began = time.monotonic()
  try:
    run = run_files.read(path)
    with run_files.fitting(path):
      screen.screen(run.result)
    written = page.write(path)
  except run_files.RunError as error:
    assert len(str(error)) < 1500 and len(str(error).splitlines()) <= 10
    return False
  finally:
    assert time.monotonic() - began < 60  # drawing takes 1 second
  assert written.read_text().rstrip().endswith('</html>')
  return True


@SEEDS
@pytest.mark.parametrize('name', RUNS)
def test_any_entry_of_a_result_is_checked(tmp_path, name, seeds):
  result, gates = RUNS[name]()
  path = write_run(tmp_path / 'run', result, gates)
  assert reported(path)
  ends = []
  for seed in range(seeds):
    values = mutated(result, random.Random(seed))[1]
    (path / 'result.json').write_text(json.dumps(values))
    ends.append(reported(path))
  assert ends.count(False) > seeds / 9


@SEEDS
@pytest.mark.parametrize('file', ['history.jsonl', 'gates.jsonl'])
def test_any_line_is_checked(tmp_path, file, seeds):
  """A line that is not as expected is skipped and said, or does not fit the others."""
  path = write_run(tmp_path / 'run', *RUNS['gates']())
  lines = (path / file).read_text().splitlines()
  skipped = 0
  for seed in range(seeds):
    rng = random.Random(seed)
    i = rng.randrange(len(lines))
    values = mutated(json.loads(lines[i]), rng)[1]
    changed = [*lines[:i], json.dumps(values), *lines[i + 1 :]]
    (path / file).write_text('\n'.join(changed))
    skipped += not reported(path) or bool(run_files.read(path).notes)
  assert skipped > seeds / 9
