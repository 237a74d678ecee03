"""What a cascade was asked for and reached, in words and rows."""

import pytest

from depthprune.report import asked, sentences
from tests.report.cascades import NO_BUDGET, WHOLE


def choose(result: dict, kind: str) -> dict:
  """The same run, but asked for the first request of another kind."""
  for request in result['cascade']['requests']:
    request['chosen'] = False
  chosen = next(r for r in result['cascade']['requests'] if r['kind'] == kind)
  chosen['chosen'] = True
  return result


def test_the_sentence_says_what_was_asked_lost_and_saved(sidenet):
  said = 'asked to lose at most 0.5 point: loses 0.31 point and saves 35.2 % of the '
  assert sentences.sentence(sidenet) == asked.sentence(sidenet) == f'{said}FLOPs'


def test_a_gain_is_no_loss_and_dearer_is_no_saving(sidenet):
  sidenet['accuracy']['after'] = 0.9412
  sidenet['flops']['after'] = 1.031 * WHOLE
  said = 'asked to lose at most 0.5 point: gains 0.25 point and spends 3.1 % more FLOPs'
  assert asked.sentence(sidenet) == said


@pytest.mark.parametrize(
  ('kind', 'said'),
  [
    (
      'budget',
      'asked to spend at most 67 % of the FLOPs: spends 64.8 %, loses 0.31 point',
    ),
    (
      'risk',
      'asked to be wrong where the MainNet is right in at most 2 % of the examples: is '
      'so in 1.42 %, loses 0.31 point and saves 35.2 % of the FLOPs',
    ),
  ],
)
def test_the_sentence_of_a_budget_and_of_a_risk(sidenet, kind, said):
  assert asked.sentence(choose(sidenet, kind)) == said


def test_the_sentence_of_a_threshold_and_of_no_request(sidenet):
  (request, *_) = sidenet['cascade']['requests'][1:]
  request |= {'kind': 'threshold', 'requested': 0.9}
  reached = 'loses 0.31 point and saves 35.2 % of the FLOPs'
  assert asked.sentence(sidenet) == f'asked for a threshold 0.9: {reached}'
  rows = [row.asked for row in asked.requests(sidenet)]
  assert rows[1] == 'threshold 0.9, chosen'
  sidenet['cascade']['requests'] = []
  assert asked.sentence(sidenet) == reached


def test_requested_stands_against_reached_in_the_same_unit(sidenet):
  rows = list(asked.requests(sidenet))
  assert rows[1] == (
    *('drop ≤ 0.5, chosen', '0.31', '0.31 (0.10 to 0.52)', '35.2 % (34.6 to 35.8)'),
  )
  assert rows[3][:2] == ('cost ≤ 67 %', '65.90 %')
  assert rows[4][:2] == ('risk ≤ 2 %', '1.42 %')
  assert len(asked.HEAD) == len(rows[0])


def test_what_test_data_did_not_confirm_is_said(sidenet):
  rows = list(asked.requests(sidenet))
  assert rows[0][:2] == ('drop ≤ 0', '-0.06')
  assert rows[2][:2] == ('drop ≤ 1', '1.12, missed')
  risk = sidenet['cascade']['requests'][4]
  risk['test']['risk'] = 0.0201
  assert list(asked.requests(sidenet))[4].reached == '2.01 %, missed'


def test_what_was_met_to_the_last_bit_is_met(sidenet):
  budget = sidenet['cascade']['requests'][3]
  budget['test']['saved'] = 1 - 0.67
  assert list(asked.requests(sidenet))[3].reached == '67.00 %'


def test_a_refused_budget_has_its_reason_and_no_numbers(sidenet):
  assert list(asked.requests(sidenet))[-1] == ('cost ≤ 4 %', 'refused', '–', '–')
  assert asked.refused(sidenet) == [f'cost ≤ 4 % was refused: {NO_BUDGET}']


def test_a_chosen_request_may_be_the_refused_one(sidenet):
  risk = choose(sidenet, 'risk')['cascade']['requests'][4]
  risk |= {'test': None, 'held_out': None, 'interval': None, 'refused': 'too few rows'}
  assert 'is so in –, loses' in asked.sentence(sidenet)
  assert len(asked.refused(sidenet)) == 2


def test_numbers_that_are_not_there_leave_a_dash_or_nothing(sidenet):
  drop, *_, risk, _ = sidenet['cascade']['requests']
  drop['test']['drop'], drop['interval'] = None, None
  risk['test']['risk'], risk['interval']['drop'] = None, [None, None]
  rows = list(asked.requests(sidenet))
  assert rows[0] == ('drop ≤ 0', '–', '–', '21.2 %')
  assert rows[4][1:3] == ('–', '0.74')


def test_a_time_is_told_in_milliseconds_as_executed(sidenet):
  (request, *_) = (r for r in sidenet['cascade']['requests'] if r['chosen'])
  request |= {'kind': 'milliseconds', 'requested': 0.4}
  request['test']['milliseconds'] = 0.4567
  said = 'asked to take at most 0.4 ms an example: takes 0.457 ms, missed, loses 0.31'
  assert asked.sentence(sidenet).startswith(said)
  row = next(row for row in asked.requests(sidenet) if 'chosen' in row.asked)
  assert (row.asked, row.reached) == ('time ≤ 0.4 ms, chosen', '0.457 ms, missed')


def test_a_certificate_says_what_holds_and_how_it_is_known(sidenet):
  risk = next(r for r in sidenet['cascade']['requests'] if r['kind'] == 'risk')
  risk['test']['certificate'] = {
    'loss': 'gap', 'alpha': 0.02, 'delta': 0.1, 'rows': 2500, 'losses': 31,
    'bound': 0.0161,
  }  # fmt: skip
  (said, *_) = asked.certified(sidenet)
  assert said.startswith('risk ≤ 2 % holds with probability 90.0 %')
  assert '31 of 2,500' in said and 'at most 1.61 %' in said
