"""What a cascade is and costs, on the screen."""

import io

import pytest
from rich.console import Console

from depthprune.report import cascade, tables
from tests.report.cascades import made_up_sidenet

LONG = 'encoder/stage{}/transformer/block{}/attention_output'


def screen_of(result, width: int = 80) -> str:
  console = Console(width=width, record=True, file=io.StringIO())
  console.print(tables.screen(result))
  return console.export_text()


def test_the_cost_is_there_three_times_ideal_padded_and_measured(sidenet):
  head, rows = tables.costs(sidenet)
  assert head == ('', 'MainNet', 'cascade', '')
  assert rows == [
    ('accuracy, test', '93.87 %', '93.56 %', '-0.31 points'),
    ('accuracy, held-out', '94.12 %', '93.64 %', '-0.48 points'),
    ('FLOPs (1 MAC = 2), ideal', '251 M', '163 M', '64.8 % kept'),
    ('FLOPs, padded to batches', '251 M', '169 M', '67.1 % kept'),
    ('parameters, with heads', '856 k', '1.40 M', '163.9 % kept'),
    ('median latency, batch 128', '84.9 ms', '61.2 ms', 'speed-up 1.39 x'),
    ('compile time', '', '7.31 s', ''),
  ]


def test_what_was_not_executed_is_left_out(sidenet):
  del sidenet['cascade']['executed'], sidenet['held_out']
  names = [row[0] for row in tables.costs(sidenet)[1]]
  assert names == [
    'accuracy, test',
    'FLOPs (1 MAC = 2), ideal',
    'parameters, with heads',
  ]
  assert cascade.executed(sidenet) == ''
  assert [tile[1] for tile in cascade.tiles(sidenet)] == [
    *('accuracy', 'FLOPs kept, ideal')
  ]


def test_the_tiles_are_the_few_numbers(sidenet):
  assert list(cascade.tiles(sidenet)) == [
    ('93.56 %', 'accuracy', '-0.31 points'),
    ('64.8 %', 'FLOPs kept, ideal', '251 M → 163 M'),
    ('67.1 %', 'FLOPs kept, padded', '251 M → 169 M'),
    ('1.39 ×', 'speed, batch 128', '84.9 → 61.2 ms'),
  ]


def test_executed_is_compared_with_simulated(sidenet):
  said = (
    'executed: 3 of 5,000 examples left elsewhere than simulated, 2 of them within '
    '1e-5 of a threshold'
  )
  assert said in tables.said(sidenet)
  assert not any('masked' in line for line in tables.said(sidenet))
  sidenet['cascade']['executed']['differ'] = 0
  assert cascade.executed(sidenet) == (
    'executed: all 5,000 examples left where simulated'
  )


def test_every_exit_has_a_line_and_the_network_s_own_is_last(sidenet):
  rows = list(cascade.exits(sidenet))
  assert [row.name for row in rows] == [*(f'exit{k}' for k in range(1, 6)), 'main']
  assert rows[0] == (
    *('exit1', 'stage1/block1', '20.0 %', '77.00 %', '0.912', '12.0 %'),
    *('6.2 → 1.1 %', '0.871'),
  )
  assert rows[-1][1:] == ('', '101.2 %', '93.87 %', '', '40.0 %', '1.5 %', '0.871')
  assert len(cascade.EXIT_HEAD) == len(rows[0])


def test_nulls_are_dashes_and_no_threshold_is_never_or_always(sidenet):
  found = sidenet['cascade']
  found['thresholds'] |= {'exit1': None, 'exit2': None, 'exit3': 1.0, 'exit4': -1.25}
  found['shares']['exit1'] = 0.0
  found['exit_accuracy']['exit2'] = None
  found['calibration']['exit1']['all']['auroc'] = None
  found['calibration']['exit2']['all']['before']['ece'] = None
  del found['calibration']['exit3']
  rows = list(cascade.exits(sidenet))
  assert [row.threshold for row in rows[:4]] == ['never', 'none', '1', '-1.250']
  assert (rows[1].accuracy, rows[1].ece, rows[0].auroc) == ('–', '–', '–')
  assert rows[2][-2:] == ('–', '–')


@pytest.mark.parametrize(
  ('value', 'shown'),
  [(0.5, '0.500'), (0.99996, '0.99996'), (0.9999999999, '1.0000000'), (1, '1')],
)
def test_a_threshold_below_one_does_not_look_like_one(sidenet, value, shown):
  sidenet['cascade']['thresholds']['exit1'] = value
  assert next(cascade.exits(sidenet)).threshold == shown


def test_heads_that_were_cut_away_are_named(sidenet):
  assert cascade.cut(sidenet) == ''
  stages = sidenet['cascade']['stages']
  sidenet['cascade']['stages'] = [s for s in stages if s['exit'] != 'exit2']
  assert cascade.cut(sidenet).startswith('Nobody leaves at exit2, which is cut away')
  sidenet['cascade']['stages'] = stages[2:]
  assert 'Nobody leaves at exit1, exit2, which are cut away' in cascade.cut(sidenet)


def test_the_screen_has_requests_exits_and_what_was_refused(sidenet):
  text = ' '.join(screen_of(sidenet).split())
  said = 'asked to lose at most 0.5 point: loses 0.31 point and saves 35.2 % of the'
  assert said in text
  assert 'drop ≤ 0.5, chosen 0.31 0.31 (0.10 to 0.52) 35.2 % (34.6 to 35.8)' in text
  assert 'cost ≤ 4 % was refused: budget 1.0e+07 is below the floor' in text
  assert 'exit2 stage1/block3 37.5 % 83.23 % 0.99996 12.0 % 6.2 → 1.1 % 0.871' in text
  assert 'measured on CPU, AMD EPYC' in text
  assert ' before  ' not in text


@pytest.mark.parametrize(('exits', 'tap'), [(1, 'stage{}/block{}'), (8, LONG)])
def test_eighty_columns_hold_one_exit_or_eight_with_long_taps(exits, tap):
  result = made_up_sidenet(exits, tap)
  text = screen_of(result)
  assert '…' not in text
  assert sum(line.startswith('exit') for line in text.splitlines()) == exits + 2
  wide = screen_of(result, width=140)
  assert all(name in wide for name in result['cascade']['taps'].values())
