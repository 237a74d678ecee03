"""The numbers of a run as text."""

import io
import re

from rich.console import Console

from depthprune.report import tables


def test_summary_has_accuracy_cost_and_measured_latency(result):
  rows = {row.name: row[1:] for row in tables.summary(result)}
  assert rows['accuracy, test'] == ('98.33 %', '93.61 %', '98.06 %', '-0.27 points')
  assert rows['FLOPs (1 MAC = 2)'] == ('5.07 M', '', '2.53 M', '49.9 % kept')
  assert rows['parameters'][-1] == '48.2 % kept'
  assert rows['peak activation bytes'][-1] == '62.5 % kept'
  assert rows['median latency, batch 1'][-1] == 'speed-up 1.26 x'
  assert rows['median latency, batch 128'][:3] == ('18.4 ms', '', '11.9 ms')


def test_tasks_and_pixels_have_rows_of_their_own(result):
  result['scores'] = {
    'before': {'accuracy': 0.5, 'accuracy_left': 0.5, 'loss_left': 1.0, 'miou': 0.25},
    'after': {'accuracy': 0.5, 'accuracy_left': 0.625, 'loss_left': 2.0, 'miou': 0.3},
  }
  rows = {row.name: row for row in tables.summary(result)}
  left = rows['accuracy of left, test']
  assert (left.before, left.after) == ('50.00 %', '62.50 %')
  assert rows['mean IoU, test'][-1] == '+5.00 points'
  assert not any('loss' in name for name in rows)


def test_what_a_run_did_not_measure_is_left_out(result):
  for key in ('held_out', 'latency_ms', 'report'):
    del result[key]
  names = [row.name for row in tables.summary(result)]
  assert names == ['accuracy, test', 'FLOPs (1 MAC = 2)', 'parameters']
  assert tables.measured_on(result) == ''


def test_the_largest_difference_is_said_and_so_is_its_absence(result):
  assert '4.1e-07' in tables.verified(result)
  assert 'changed 3.2e-03' in tables.verified(result)
  del result['verify']
  assert 'not compared' in tables.verified(result)


def test_recalibration_is_told_apart_from_fine_tuning(result):
  assert 'not yet tuned: 97.2 %' in tables.recalibrated(result)
  assert len(tables.said(result)) == 4
  del result['accuracy']['recalibrated']
  assert len(tables.said(result)) == 3


def test_notes_are_of_surgery_and_of_timing(result):
  assert len(tables.notes(result)) == 3
  assert tables.notes(result)[-1] == 'batch 128: a note about its timing'


def test_the_screen_shows_every_layer_and_everything_to_note(result):
  text = screen_of(result)
  for name, (before, after) in result['widths'].items():
    line = next(line for line in text.splitlines() if line.strip().startswith(name))
    assert line.split()[1:3] == [str(before), str(after)]
  assert 'removed: stage1/block2/branch' in text
  assert 'requested 50.0 % of the FLOPs, reached 49.95 %' in text
  assert '1 MAC = 2' in text
  assert all(note in text for note in tables.notes(result))


def screen_of(result, width: int = 120) -> str:
  console = Console(width=width, record=True, file=io.StringIO())
  console.print(tables.screen(result))
  return console.export_text()


def test_the_screen_of_netcut_names_the_exit_and_leaves_out_widths(netcut):
  result, _ = netcut
  text = screen_of(result)
  assert 'kept exit 3 of 20 (exit03) at β = 0.01' in text
  assert 'largest importance w 0.958, normalised entropy 0.167' in text
  assert 'stage1/block0/conv1:3' not in text
  assert 'recalibrated' not in text
  assert '88.71 %   88.66 %    88.66 %   -0.05 points' in text


def test_the_screen_of_implosion_has_its_rounds_and_their_total(implosion):
  result, _ = implosion
  text = screen_of(result)
  assert 'erased 12 of 27 units in 3 rounds, chosen by priority' in text
  for round_ in result['rounds']:
    assert all(unit in text for unit in round_['erased'])
  assert re.search(r'all +27 → 15 +93.80 % +93.20 % +56.1 % +12 units', text)
  assert 'stage1/block0/conv1:3' not in text


def test_eighty_columns_hold_the_names_of_erased_units(implosion):
  result, _ = implosion
  text = screen_of(result, width=80)
  assert all(unit in text for round_ in result['rounds'] for unit in round_['erased'])
  assert '…' not in text


def test_a_network_that_had_to_be_compiled_says_how_long(netcut):
  rows = {row.name: row for row in tables.summary(netcut[0])}
  assert rows['compile time'][1:] == ('4.31 s', '', '0.982 s', 'speed-up 4.39 x')


def test_what_was_not_touched_after_the_cut_is_not_called_tuned(netcut, result):
  assert tables.recalibrated(netcut[0]) == ''
  result['accuracy']['recalibrated'] = result['accuracy']['pruned']
  assert tables.recalibrated(result)  # it was tuned later


def test_widths_are_shown_where_a_width_changed(result, implosion):
  assert tables.narrowed(result)
  pure, _ = implosion
  assert not tables.narrowed(pure)
  both = pure | {'widths': {**pure['widths'], 'stage2/block1/conv1:3': [32, 31]}}
  assert tables.narrowed(both)
  assert 'stage2/block1/conv1:3' in screen_of(both)
