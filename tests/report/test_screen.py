"""What a run reached, on the screen."""

import io
import re

import pytest
from rich.console import Console

from depthprune.report import sentences
from depthprune.report.screen import screen
from tests.report.cascades import made_up_sidenet
from tests.report.runs import typed

LONG = 'encoder/stage{}/transformer/block{}/attention_output'


def screen_of(result: dict, width: int = 120) -> str:
  console = Console(width=width, record=True, file=io.StringIO())
  console.print(screen(typed(result)))
  return console.export_text()


def test_the_screen_shows_every_layer_and_everything_to_note(result):
  text = screen_of(result)
  for name, (before, after) in result['widths'].items():
    line = next(line for line in text.splitlines() if line.strip().startswith(name))
    assert line.split()[1:3] == [str(before), str(after)]
  assert 'removed: stage1/block2/branch' in text
  assert 'requested 50.0 % of the FLOPs, reached 49.95 %' in text
  assert '1 MAC = 2' in text
  assert all(note in text for note in sentences.notes(typed(result)))


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


def test_the_screen_of_an_auxiliary_path_says_that_it_was_dropped(auxiliary):
  result, _ = auxiliary
  text = screen_of(result)
  assert '(5 of 6 connections open), dropped after training: 77.5 % of the FLOPs' in (
    ' '.join(text.split())
  )
  assert 'after: the compact network alone' in text
  assert 'rounds:' not in text and 'stage1/block0/conv1:3' not in text


def test_eighty_columns_hold_the_names_of_erased_units(implosion):
  result, _ = implosion
  text = screen_of(result, width=80)
  assert all(unit in text for round_ in result['rounds'] for unit in round_['erased'])
  assert '…' not in text


def test_widths_are_shown_where_a_width_changed(implosion):
  pure, _ = implosion
  both = pure | {'widths': {**pure['widths'], 'stage2/block1/conv1:3': [32, 31]}}
  assert 'stage2/block1/conv1:3' in screen_of(both)


def test_the_screen_has_requests_exits_and_what_was_refused(sidenet):
  shown = screen_of(sidenet, width=80)
  text = ' '.join(shown.split())
  said = 'asked to lose at most 0.5 point: loses 0.31 point and saves 35.2 % of the'
  assert said in text
  assert 'drop ≤ 0.5, chosen 0.31 0.31 (0.10 to 0.52) 35.2 % (34.6 to 35.8)' in text
  assert 'cost ≤ 4 % was refused: budget 1.0e+07 is below the floor' in text
  assert 'exit2 stage1/block3 37.5 % 83.23 % 0.99996 12.0 % 6.2 → 1.1 % 0.871' in text
  assert 'measured on CPU, AMD EPYC' in text
  assert ' before  ' not in shown


@pytest.mark.parametrize(('exits', 'tap'), [(1, 'stage{}/block{}'), (8, LONG)])
def test_eighty_columns_hold_one_exit_or_eight_with_long_taps(exits, tap):
  result = made_up_sidenet(exits, tap)
  text = screen_of(result, width=80)
  assert '…' not in text
  assert sum(line.startswith('exit') for line in text.splitlines()) == exits + 2
  wide = screen_of(result, width=140)
  assert all(name in wide for name in result['cascade']['taps'].values())
