"""The numbers of a run as text."""

import io

import pytest
from rich.console import Console

from depthprune.report import tables


@pytest.mark.parametrize(
  ('number', 'text'),
  [
    (81_100_000, '81.1 M'),
    (272_474, '272 k'),
    (999_600, '1.00 M'),
    (125_490_000_000, '125 G'),
    (1000, '1.00 k'),
    (999, '999'),
    (0, '0'),
  ],
)
def test_counts_have_three_digits(number, text):
  assert tables.count(number) == text


@pytest.mark.parametrize(
  ('value', 'text'), [(0.0123, '0.0123 ms'), (1.0, '1.00 ms'), (1234.5, '1230 ms')]
)
def test_milliseconds_have_three_digits(value, text):
  assert tables.milliseconds(value) == text


def test_summary_has_accuracy_cost_and_measured_latency(result):
  rows = {row.name: row[1:] for row in tables.summary(result)}
  assert rows['accuracy, test'] == ('98.33 %', '93.61 %', '98.06 %', '-0.27 points')
  assert rows['FLOPs (1 MAC = 2)'] == ('5.07 M', '', '2.53 M', '49.9 % kept')
  assert rows['parameters'][-1] == '48.2 % kept'
  assert rows['peak activation bytes'][-1] == '62.5 % kept'
  assert rows['median latency, batch 1'][-1] == 'speed-up 1.26 x'
  assert rows['median latency, batch 128'][:3] == ('18.4 ms', '', '11.9 ms')


def test_what_a_run_did_not_measure_is_left_out(result):
  for key in ('held_out', 'latency_ms', 'report'):
    del result[key]
  names = [row.name for row in tables.summary(result)]
  assert names == ['accuracy, test', 'FLOPs (1 MAC = 2)', 'parameters']
  assert tables.measured_on(result) == ''


def test_requested_and_reached_count_what_the_target_counts(result):
  assert tables.requested(result) == 'requested 50.0 % of the FLOPs, reached 49.95 %'
  said = tables.requested(result | {'of': 'params'})
  assert said == 'requested 50.0 % of the parameters, reached 48.15 %'


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
  console = Console(width=100, record=True, file=io.StringIO())
  console.print(tables.screen(result))
  text = console.export_text()
  for name, (before, after) in result['widths'].items():
    line = next(line for line in text.splitlines() if line.strip().startswith(name))
    assert line.split()[1:3] == [str(before), str(after)]
  assert 'removed: stage1/block2/branch' in text
  assert 'requested 50.0 % of the FLOPs, reached 49.95 %' in text
  assert '1 MAC = 2' in text
  assert all(note in text for note in tables.notes(result))
