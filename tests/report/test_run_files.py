"""Reading a run: what is there, what is missing, what a kill left behind."""

import json
import re
from typing import Any

import pytest

from depthprune.report.run_files import RunError, read
from depthprune.train.result import SCHEMA, to_json
from tests.report.cascades import made_up_sidenet
from tests.report.runs import (
  made_up_auxiliary,
  made_up_implosion,
  made_up_netcut,
  made_up_result,
  typed,
)

RESULTS = {
  'gates': made_up_result,
  'netcut': lambda: made_up_netcut()[0],
  'implosion': lambda: made_up_implosion()[0],
  'auxiliary': lambda: made_up_auxiliary()[0],
  'sidenet': made_up_sidenet,
}


def holds(found: Any, values: Any) -> bool:
  """Whether all values are found again, but for those that are null."""
  if isinstance(values, dict):
    known = {name: value for name, value in values.items() if value is not None}
    return all(name in found and holds(found[name], known[name]) for name in known)
  if isinstance(values, list):
    return len(found) == len(values) and all(map(holds, found, values))
  return found == values


def test_a_finished_run_is_read(run_directory, result):
  run = read(run_directory)
  assert holds(to_json(run.result), result)
  assert len(run.history) == 63
  assert [line['step'] for line in run.gates] == list(range(0, 101, 4))
  assert run.notes == []


def test_resumed_steps_replace_the_earlier_ones_in_order(run_directory):
  again = {'stage': 'gates', 'step': 50, 'loss': 7.0}
  with (run_directory / 'history.jsonl').open('a') as history:
    history.write(json.dumps(again) + '\n')
  run = read(run_directory)
  assert len(run.history) == 63
  assert run.history[21 + 10] == again
  assert [r['stage'] for r in run.history[::21]] == ['train', 'gates', 'finetune']


def test_a_line_cut_short_by_a_kill_is_skipped_and_said(run_directory):
  with (run_directory / 'history.jsonl').open('a') as history:
    history.write('{"stage": "finetune", "st')
  run = read(run_directory)
  assert len(run.history) == 63
  assert run.notes == ['history.jsonl: 1 unreadable line(s) skipped']


def test_charts_are_optional(run_directory):
  (run_directory / 'history.jsonl').unlink()
  (run_directory / 'gates.jsonl').unlink()
  run = read(run_directory)
  assert (run.history, run.gates) == ([], [])


def test_no_directory(tmp_path):
  with pytest.raises(RunError, match=r'gone: .* found nothing; give the one that'):
    read(tmp_path / 'gone')
  (tmp_path / 'file').touch()
  with pytest.raises(RunError, match='found a file'):
    read(tmp_path / 'file')


def test_an_unfinished_run_says_how_to_go_on(run_directory):
  (run_directory / 'result.json').unlink()
  with pytest.raises(RunError, match=r'has not finished .* continues where it stopped'):
    read(run_directory)


def missing(run_directory) -> set[str]:
  """The entries that the error of a read names as missing."""
  with pytest.raises(RunError, match='written by another program or version') as error:
    read(run_directory)
  return set(re.findall(r'missing @ \$\.([\w.]+)', str(error.value)))


def test_truncated_and_foreign_results(run_directory):
  path = run_directory / 'result.json'
  path.write_text(path.read_text()[:100])
  with pytest.raises(RunError, match=r'result\.json: expected JSON, got'):
    read(run_directory)
  needed = {'accuracy', 'flops', 'params', 'widths', 'data'}
  path.write_text('{"model": "resnet20", "of": "flops", "target": 0.5}')
  assert missing(run_directory) == needed
  path.write_text('{"model": "resnet20", "method": "netcut", "options": {}}')
  assert missing(run_directory) == needed | {'rounds'}


def test_an_old_result_without_its_target_names_it(run_directory, old_result):
  del old_result['target']
  (run_directory / 'result.json').write_text(json.dumps(old_result))
  with pytest.raises(RunError, match='target'):
    read(run_directory)


@pytest.mark.parametrize(
  'entry',
  ['options', 'model', 'data', 'accuracy', 'flops', 'params', 'widths', 'rounds'],
)
def test_every_needed_entry_is_named_where_it_is_missing(sidenet_run, sidenet, entry):
  del sidenet[entry]
  (sidenet_run / 'result.json').write_text(json.dumps(sidenet))
  assert missing(sidenet_run) == {entry}


@pytest.mark.parametrize(
  ('entry', 'value', 'named'),
  [
    ('accuracy', {'before': 'high'}, '$.accuracy.before'),
    ('widths', {'stem/conv:3': [16]}, "$.widths['stem/conv:3']"),
    ('rounds', [{'units': None}], '$.rounds[0].units'),
    ('latency_ms', {'1': {'before': 1.0}}, "$.latency_ms['1'].after"),
    ('cascade', {}, '$.cascade.exits'),
    ('options', 3, '$.options'),
  ],
)
def test_an_entry_of_another_kind_is_named(run_directory, result, entry, value, named):
  (run_directory / 'result.json').write_text(json.dumps(result | {entry: value}))
  with pytest.raises(RunError, match=re.escape(named)):
    read(run_directory)


@pytest.mark.parametrize('text', ['[]', '3', 'null', '"a run"'])
def test_json_that_is_no_object_is_no_result(run_directory, text):
  (run_directory / 'result.json').write_text(text)
  with pytest.raises(RunError, match=r'result\.json: '):
    read(run_directory)


def test_a_schema_from_the_future_is_refused(run_directory, result):
  path = run_directory / 'result.json'
  path.write_text(json.dumps(result | {'schema': SCHEMA}))
  assert read(run_directory).result == typed(result)
  path.write_text(json.dumps(result | {'schema': SCHEMA + 1}))
  expected = f'expected schema {SCHEMA} at most, got {SCHEMA + 1}: read it with the ver'
  with pytest.raises(RunError, match=expected):
    read(run_directory)


def test_an_entry_that_is_not_known_changes_nothing(run_directory, result):
  more = result | {'of_another_version': 1}
  (run_directory / 'result.json').write_text(json.dumps(more))
  assert read(run_directory).result == typed(result)


def test_a_result_from_when_there_was_one_method_is_named(run_directory, old_result):
  (run_directory / 'result.json').write_text(json.dumps(old_result))
  result = read(run_directory).result
  assert result.method == 'trainable_gates'
  assert result.options == {'target': 0.5, 'of': 'flops'}
  assert result == typed(made_up_result())


def test_equal_steps_of_two_rounds_are_both_kept(implosion_run):
  lines = read(implosion_run).gates
  assert [line['step'] for line in lines] == 3 * list(range(5, 101, 5))
  assert [line['stage'] for line in lines[::20]] == ['gates-1', 'gates-2', 'gates-3']


def test_a_cascade_is_read(sidenet_run, sidenet):
  run = read(sidenet_run)
  assert holds(to_json(run.result), sidenet)
  assert (run.gates, run.notes) == ([], [])


@pytest.mark.parametrize('name', RESULTS)
def test_a_result_is_the_same_when_it_is_written_and_read_again(name):
  values = RESULTS[name]()
  written = to_json(typed(values))
  assert holds(written, values)
  assert written['schema'] == SCHEMA
  assert typed(written) == typed(values)


def test_numbers_that_are_not_known_may_be_written_and_read_again(sidenet):
  found = sidenet['cascade']
  found['thresholds']['exit1'] = None
  found['requests'][0]['test']['drop'] = None
  found['requests'][1]['interval']['drop'] = [None, None]
  found['calibration']['exit1']['all'] = None
  found['calibration']['exit2']['all']['auroc'] = None
  assert typed(to_json(typed(sidenet))) == typed(sidenet)


@pytest.mark.parametrize('entry', ['cost', 'accuracy', 'accuracy_held_out'])
def test_a_point_of_the_curve_may_lack_a_number(sidenet, entry):
  sidenet['cascade']['curve'][3][entry] = None
  assert typed(to_json(typed(sidenet))) == typed(sidenet)
