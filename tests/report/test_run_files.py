"""Reading a run: what is there, what is missing, what a kill left behind."""

import json

import pytest

from depthprune.report.run_files import RunError, read


def test_a_finished_run_is_read(run_directory, result):
  run = read(run_directory)
  assert run.result == result
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


def test_truncated_and_foreign_results(run_directory):
  path = run_directory / 'result.json'
  path.write_text(path.read_text()[:100])
  with pytest.raises(RunError, match=r'result\.json: expected JSON, got'):
    read(run_directory)
  path.write_text('{"model": "resnet20", "of": "flops"}')
  with pytest.raises(RunError, match='accuracy, flops, params, widths, data, target '):
    read(run_directory)
  path.write_text('{"model": "resnet20", "method": "netcut", "options": {}}')
  with pytest.raises(RunError, match='accuracy, flops, params, widths, data, rounds '):
    read(run_directory)


def test_a_result_from_when_there_was_one_method_is_named(run_directory, old_result):
  (run_directory / 'result.json').write_text(json.dumps(old_result))
  result = read(run_directory).result
  assert result['method'] == 'trainable_gates'
  assert result['options'] == {'target': 0.5, 'of': 'flops'}


def test_equal_steps_of_two_rounds_are_both_kept(implosion_run):
  lines = read(implosion_run).gates
  assert [line['step'] for line in lines] == 3 * list(range(5, 101, 5))
  assert [line['stage'] for line in lines[::20]] == ['gates-1', 'gates-2', 'gates-3']


def test_a_cascade_is_read(sidenet_run, sidenet):
  run = read(sidenet_run)
  assert run.result == sidenet
  assert (run.gates, run.notes) == ([], [])
