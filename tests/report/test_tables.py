"""The numbers of a run as text."""

import random

import pytest

from depthprune.report import sentences, tables
from depthprune.report.numbers import in_order
from tests.report.cascades import cascade_of
from tests.report.runs import made_up_round, typed


def costs(result: dict) -> dict[str, tuple[str, ...]]:
  """{name of a row: its other cells}."""
  return {name: tuple(cells) for name, *cells in tables.costs(typed(result)).rows}


def rows(table: tables.Table) -> list[tuple[str, ...]]:
  """Those of a table, each with a cell under every head."""
  assert {len(row) for row in table.rows} == {len(table.head)}
  return [tuple(row) for row in table.rows]


def column(table: tables.Table, name: str) -> list[str]:
  return [row[list(table.head).index(name)] for row in table.rows]


def test_costs_have_accuracy_cost_and_measured_latency(result):
  found = costs(result)
  assert found['accuracy, test'] == ('98.33 %', '93.61 %', '98.06 %', '-0.27 points')
  assert found['FLOPs (1 MAC = 2)'] == ('5.07 M', '', '2.53 M', '49.9 % kept')
  assert found['parameters'][-1] == '48.2 % kept'
  assert found['peak activation bytes'][-1] == '62.5 % kept'
  assert found['median latency, batch 1'][-1] == 'speed-up 1.26 x'
  assert found['median latency, batch 128'][:3] == ('18.4 ms', '', '11.9 ms')


def test_the_first_weights_and_the_network_alone_have_rows_of_their_own(result):
  assert not {'accuracy, at the start', 'accuracy, trained alone'} & {*costs(result)}
  result |= {'original': {'test': 0.9900}, 'control': {'test': 0.9790}}
  found = costs(result)
  start = ('99.00 %', '', '98.06 %', '-0.94 points')
  assert found['accuracy, at the start'] == start
  assert found['accuracy, trained alone'][-1] == '+0.16 points'
  tile, *_ = tables.tiles(typed(result))
  assert tile[:3] == ('98.1 %', 'accuracy, against it alone', '+0.16 points')


def test_tasks_and_pixels_have_rows_of_their_own(result):
  result['scores'] = {
    'before': {'accuracy': 0.5, 'accuracy_left': 0.5, 'loss_left': 1.0, 'miou': 0.25},
    'after': {'accuracy': 0.5, 'accuracy_left': 0.625, 'loss_left': 2.0, 'miou': 0.3},
  }
  found = costs(result)
  before, _, after, _ = found['accuracy of left, test']
  assert (before, after) == ('50.00 %', '62.50 %')
  assert found['mean IoU, test'][-1] == '+5.00 points'
  assert not any('loss' in name for name in found)


def test_what_a_run_did_not_measure_is_left_out(result):
  for key in ('held_out', 'latency_ms', 'report'):
    del result[key]
  names = column(tables.costs(typed(result)), '')
  assert names == ['accuracy, test', 'FLOPs (1 MAC = 2)', 'parameters']
  assert sentences.measured_on(typed(result)) == ''


def test_a_network_that_had_to_be_compiled_says_how_long(netcut):
  found = costs(netcut[0])
  assert found['compile time'] == ('4.31 s', '', '0.982 s', 'speed-up 4.39 x')


def test_the_tiles_of_a_pruned_network_are_its_few_numbers(result):
  assert list(tables.tiles(typed(result))) == [
    ('98.1 %', 'accuracy', '-0.27 points', ''),
    ('49.9 %', 'FLOPs kept', '5.07 M → 2.53 M', ''),
    ('48.2 %', 'parameters kept', '272 k → 131 k', ''),
    ('1.26 ×', 'speed-up, batch 1', '1.21 → 0.960 ms', ''),
    ('1.55 ×', 'speed-up, batch 128', '18.4 → 11.9 ms', ''),
  ]


def test_a_tile_of_speed_has_the_interval_that_quartiles_allow(result):
  quartiles = {'before_quartiles': [18.0, 19.0], 'after_quartiles': [11.8, 12.0]}
  result['latency_ms']['128'] |= quartiles
  *_, tile = tables.tiles(typed(result))
  assert tile == (
    *('1.55 ×', 'speed-up, batch 128', '18.4 → 11.9 ms', 'quartiles: 1.50–1.61'),
  )


def test_the_accuracy_of_examples_has_an_interval_and_that_of_pixels_has_none(result):
  result['images'] = {'test': 360}
  tile, *_ = tables.tiles(typed(result))
  assert tile.interval == '95 %: 96.0–99.1 %'
  result['scores'] = {'before': {}, 'after': {'miou': 0.5}}
  tile, *_ = tables.tiles(typed(result))
  assert tile.interval == ''


def test_widths_are_of_note_where_a_width_changed(result, implosion):
  assert tables.narrowed(typed(result))
  pure, _ = implosion
  assert not tables.narrowed(typed(pure))
  both = pure | {'widths': {**pure['widths'], 'stage2/block1/conv1:3': [32, 31]}}
  assert tables.narrowed(typed(both))
  result['widths'] = {
    'stem/conv:3': [16, 16]
  }  # it was asked for a target, and kept all
  assert tables.narrowed(typed(result))


# ---- rounds of erasure ---------------------------------------------------------------


def test_rounds_are_in_order_and_end_in_a_total(implosion):
  result, _ = implosion
  table = tables.rounds(typed(result))
  found = rows(table)
  assert column(table, 'round') == ['1', '2', '3', 'all']
  assert column(table, 'units') == ['27 → 23', '23 → 19', '19 → 15', '27 → 15']
  assert found[1][2:6] == ('93.60 %', '62.00 %', '81.00 %', '93.40 %')
  assert column(table, 'erased')[1] == ', '.join(result['rounds'][1]['erased'])
  assert found[-1] == (
    *('all', '27 → 15', '93.80 %', '', '', '93.20 %', '56.1 %', '12 units'),
  )


def test_a_single_round_needs_no_total(implosion):
  result, _ = implosion
  result['rounds'] = result['rounds'][:1]
  assert column(tables.rounds(typed(result)), 'round') == ['1']


def scanned(layers: int, per_round: int, rounds: int, seed: int):
  """(rounds with the names of their time, the original names that went)."""
  draw = random.Random(seed)
  left, found, gone = list(range(layers)), [], []
  for _ in range(rounds):
    chosen = sorted(draw.sample(range(len(left)), per_round))
    priority = {f'blocks[{i}]': 1.0 for i in range(len(left))} | {'stage1/block10': 1.0}
    found.append(made_up_round(priority, [f'blocks[{i}]' for i in chosen]))
    gone.append([f'blocks[{left[i]}]' for i in chosen])
    left = [layer for i, layer in enumerate(left) if i not in chosen]
  return found, gone


@pytest.mark.parametrize('seed', range(5))
def test_layers_of_a_stack_keep_the_names_they_had_at_first(seed):
  found, gone = scanned(13, 3, 3, seed)
  assert tables.erased(found, 'priority') == gone
  last = tables.first_names(found, 'priority')[-1]
  assert last['stage1/block10'] == 'stage1/block10'
  assert list(last) == in_order(found[-1].learned['priority'])


# ---- cascades ------------------------------------------------------------------------


def test_the_cost_is_there_three_times_ideal_padded_and_measured(sidenet):
  table = tables.costs(typed(sidenet))
  assert table.head == ('', 'MainNet', 'cascade', '')
  assert rows(table) == [
    ('accuracy, test', '93.87 %', '93.56 %', '-0.31 points'),
    ('accuracy, held-out', '94.12 %', '93.64 %', '-0.48 points'),
    ('FLOPs (1 MAC = 2), ideal', '251 M', '163 M', '64.8 % kept'),
    ('FLOPs, padded to batches', '251 M', '169 M', '67.1 % kept'),
    ('parameters, with heads', '856 k', '1.40 M', '63.9 % more'),
    ('median latency, batch 128', '84.9 ms', '61.2 ms', 'speed-up 1.39 x'),
    ('compile time', '', '7.31 s', ''),
  ]


def test_the_time_of_single_examples_has_a_row(sidenet):
  one = {'ms': 0.8, 'whole_ms': 1.0, 'speedup': 1.25}
  sidenet['cascade']['executed']['one'] = one
  row = ('median latency, one by one', '1.00 ms', '0.800 ms', 'speed-up 1.25 x')
  assert row in rows(tables.costs(typed(sidenet)))


def test_what_was_not_executed_is_left_out(sidenet):
  del sidenet['cascade']['executed'], sidenet['held_out']
  assert column(tables.costs(typed(sidenet)), '') == [
    'accuracy, test',
    'FLOPs (1 MAC = 2), ideal',
    'parameters, with heads',
  ]
  assert [tile.name for tile in tables.tiles(typed(sidenet))] == [
    *('accuracy', 'FLOPs kept, ideal')
  ]


def test_the_tiles_of_a_cascade_are_its_few_numbers(sidenet):
  assert list(tables.tiles(typed(sidenet))) == [
    ('93.56 %', 'accuracy', '-0.31 points', '95 %: 92.85–94.21 %'),
    ('64.8 %', 'FLOPs kept, ideal', '251 M → 163 M', ''),
    ('67.1 %', 'FLOPs kept, padded', '251 M → 169 M', ''),
    ('1.39 ×', 'speed-up, batch 128', '84.9 → 61.2 ms', ''),
  ]


def requests(result: dict) -> list[tuple[str, ...]]:
  return rows(tables.requests(cascade_of(result)))


def test_requested_stands_against_reached_in_the_same_unit(sidenet):
  found = requests(sidenet)
  assert found[1] == (
    *('drop ≤ 0.5, chosen', '0.31', '0.31 (0.10 to 0.52)', '35.2 % (34.6 to 35.8)'),
  )
  assert found[3][:2] == ('cost ≤ 67 %', '65.90 %')
  assert found[4][:2] == ('risk ≤ 2 %', '1.42 %')


def test_what_test_data_did_not_confirm_is_said(sidenet):
  found = requests(sidenet)
  assert found[0][:2] == ('drop ≤ 0', '-0.06')
  assert found[2][:2] == ('drop ≤ 1', '1.12, missed')
  risk = sidenet['cascade']['requests'][4]
  risk['test']['risk'] = 0.0201
  assert requests(sidenet)[4][1] == '2.01 %, missed'


def test_what_was_met_to_the_last_bit_is_met(sidenet):
  budget = sidenet['cascade']['requests'][3]
  budget['test']['saved'] = 1 - 0.67
  assert requests(sidenet)[3][1] == '67.00 %'


def test_a_refused_budget_has_no_numbers(sidenet):
  assert requests(sidenet)[-1] == ('cost ≤ 4 %', 'refused', '–', '–')


def test_numbers_that_are_not_there_leave_a_dash_or_nothing(sidenet):
  drop, *_, risk, _ = sidenet['cascade']['requests']
  drop['test']['drop'], drop['interval'] = None, None
  risk['test']['risk'], risk['interval']['drop'] = None, [None, None]
  found = requests(sidenet)
  assert found[0] == ('drop ≤ 0', '–', '–', '21.2 %')
  assert found[4][1:3] == ('–', '0.74')


def test_a_threshold_is_asked_for_and_cannot_be_missed(sidenet):
  (request, *_) = sidenet['cascade']['requests'][1:]
  request |= {'kind': 'threshold', 'requested': 0.9}
  assert requests(sidenet)[1][:2] == ('threshold 0.9, chosen', '–')


def test_a_time_is_told_in_milliseconds_as_executed(sidenet):
  (request, *_) = (r for r in sidenet['cascade']['requests'] if r['chosen'])
  request |= {'kind': 'milliseconds', 'requested': 0.4}
  request['test']['milliseconds'] = 0.4567
  row = next(row for row in requests(sidenet) if 'chosen' in row[0])
  assert row[:2] == ('time ≤ 0.4 ms, chosen', '0.457 ms, missed')


def test_every_exit_has_a_line_and_the_network_s_own_is_last(sidenet):
  table = tables.exits(cascade_of(sidenet))
  found = rows(table)
  assert column(table, 'exit') == [*(f'exit{k}' for k in range(1, 6)), 'main']
  assert found[0] == (
    *('exit1', 'stage1/block1', '20.0 %', '77.00 %', '0.912', '12.0 %'),
    *('6.2 → 1.1 %', '0.871'),
  )
  assert found[-1][1:] == ('', '101.2 %', '93.87 %', '', '40.0 %', '1.5 %', '0.871')


def test_nulls_are_dashes_and_no_threshold_is_never_or_always(sidenet):
  found = sidenet['cascade']
  found['thresholds'] |= {'exit1': None, 'exit2': None, 'exit3': 1.0, 'exit4': -1.25}
  found['shares']['exit1'] = 0.0
  found['calibration']['exit1']['all']['auroc'] = None
  found['calibration']['exit2']['all']['before']['ece'] = None
  del found['calibration']['exit3']
  table = tables.exits(cascade_of(sidenet))
  assert column(table, 'threshold')[:4] == ['never', 'none', '1', '-1.250']
  assert (column(table, 'ECE')[1], column(table, 'AUROC')[0]) == ('–', '–')
  assert rows(table)[2][-2:] == ('–', '–')


def test_an_exit_of_unknown_accuracy_has_a_dash(sidenet):
  sidenet['cascade']['exit_accuracy']['exit2'] = None
  assert column(tables.exits(cascade_of(sidenet)), 'accuracy')[1] == '–'


@pytest.mark.parametrize(
  ('value', 'shown'),
  [(0.5, '0.500'), (0.99996, '0.99996'), (0.9999999999, '1.0000000'), (1, '1')],
)
def test_a_threshold_below_one_does_not_look_like_one(sidenet, value, shown):
  sidenet['cascade']['thresholds']['exit1'] = value
  assert column(tables.exits(cascade_of(sidenet)), 'threshold')[0] == shown
