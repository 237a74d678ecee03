"""What a run decided: the exit, the rounds, names that outlive renumbering."""

import random

import pytest

from depthprune.report import sentences


def test_requested_and_reached_count_what_the_target_counts(result):
  said = 'requested 50.0 % of the FLOPs, reached 49.95 %'
  assert sentences.requested(result) == sentences.sentence(result) == said
  result['options']['of'] = 'params'
  said = 'requested 50.0 % of the parameters, reached 48.15 %'
  assert sentences.requested(result) == said
  result['options']['of'] = 'milliseconds'
  result['milliseconds'] = {'batch': 128, 'before': 18.4, 'after': 11.9}
  said = 'requested 50.0 % of the milliseconds at batch 128, reached 64.67 %'
  assert sentences.requested(result) == said
  assert not sentences.erasing(result)
  assert sentences.exit_(result) is None
  assert sentences.certainty(result) == ''


def test_the_exit_that_was_kept_is_counted_from_the_first(netcut):
  result, _ = netcut
  exit_ = sentences.exit_(result)
  assert exit_ == (
    'exit03',
    3,
    20,
    pytest.approx(0.958, abs=1e-3),
    pytest.approx(1 / 6),
  )
  said = 'kept exit 3 of 20 (exit03) at β = 0.01, cost index, aggregate log'
  assert sentences.sentence(result) == said
  result['options']['gamma'] = 1.0
  assert sentences.sentence(result) == f'{said}, γ = 1'
  assert not sentences.erasing(result)


def test_rounds_are_in_order_and_end_in_a_total(implosion):
  result, _ = implosion
  rows = list(sentences.rounds(result))
  assert [row.name for row in rows] == ['1', '2', '3', 'all']
  assert [row.units for row in rows] == ['27 → 23', '23 → 19', '19 → 15', '27 → 15']
  assert rows[1][2:6] == ('93.60 %', '62.00 %', '81.00 %', '93.40 %')
  assert rows[1].erased == ', '.join(result['rounds'][1]['erased'])
  assert rows[-1] == (
    *('all', '27 → 15', '93.80 %', '', '', '93.20 %', '56.1 %', '12 units'),
  )
  assert len(sentences.HEAD) == len(rows[0])


def test_a_single_round_needs_no_total(implosion):
  result, _ = implosion
  result['rounds'] = result['rounds'][:1]
  assert [row.name for row in sentences.rounds(result)] == ['1']
  said = 'erased 4 of 27 units in 1 round, chosen by priority'
  assert sentences.sentence(result) == said


def test_the_curve_begins_at_the_whole_network_and_gathers_the_seeds(implosion):
  rounds = implosion[0]['rounds']
  curve = sentences.curve(rounds, rounds)
  assert list(curve['before']) == list(curve['after']) == [0, 4, 8, 12]
  assert curve['before'][0] == curve['after'][0] == [0.938, 0.938]
  assert curve['before'][8] == pytest.approx([0.81, 0.81])
  assert curve['after'][12] == pytest.approx([0.932, 0.932])


def scanned(layers: int, per_round: int, rounds: int, seed: int):
  """(rounds with the names of their time, the original names that went)."""
  draw = random.Random(seed)
  left, found, gone = list(range(layers)), [], []
  for _ in range(rounds):
    chosen = sorted(draw.sample(range(len(left)), per_round))
    priority = {f'blocks[{i}]': 1.0 for i in range(len(left))} | {'stage1/block10': 1.0}
    erased = [f'blocks[{i}]' for i in chosen]
    found.append({'learned': {'priority': priority}, 'erased': erased})
    gone.append([f'blocks[{left[i]}]' for i in chosen])
    left = [layer for i, layer in enumerate(left) if i not in chosen]
  return found, gone


@pytest.mark.parametrize('seed', range(5))
def test_layers_of_a_stack_keep_the_names_they_had_at_first(seed):
  found, gone = scanned(13, 3, 3, seed)
  assert sentences.erased(found) == gone
  last = sentences.first_names(found)[-1]
  assert last['stage1/block10'] == 'stage1/block10'
  assert list(last) == sentences.in_order(found[-1]['learned']['priority'])


def test_names_are_in_the_network_s_order():
  names = [
    'stage1/block10',
    'stage2/block0',
    'stage1/block2',
    'b[11]',
    'b[9]',
    'stage1',
  ]
  assert sentences.in_order(names) == [
    *('b[9]', 'b[11]', 'stage1', 'stage1/block2', 'stage1/block10', 'stage2/block0'),
  ]
