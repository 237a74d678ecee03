"""What a run decided and reached, in sentences."""

import pytest

from depthprune.report import sentences
from tests.report.cascades import NO_BUDGET, WHOLE, cascade_of, choose
from tests.report.runs import typed


def decided(result: dict) -> str:
  return sentences.decided(typed(result))


def erasing(result: dict) -> bool:
  return sentences.recipe_of(typed(result)).erases_units


def test_requested_and_reached_count_what_the_target_counts(result):
  assert decided(result) == 'requested 50.0 % of the FLOPs, reached 49.95 %'
  result['options']['of'] = 'params'
  said = 'requested 50.0 % of the parameters, reached 48.15 %, 1.85 points below it'
  assert decided(result) == said
  result['options']['of'] = 'milliseconds'
  result['milliseconds'] = {'batch': 128, 'before': 18.4, 'after': 11.9}
  said = 'requested 50.0 % of the milliseconds at batch 128, reached 64.67 %'
  assert decided(result) == said
  assert not erasing(result)
  assert not any('importance' in line for line in sentences.all_of(typed(result)))
  assert sentences.recipe_of(typed(result)).remarks(typed(result)) == ()


@pytest.mark.parametrize(
  ('widths', 'multiples', 'device', 'said'),
  [
    ([(64, 48), (16, 16)], [8, 4], 'CPU, x', 'widths are multiples of 8, which'),
    (
      [(64, 48), (16, 12), (8, 6)],
      [8, 4, 2],
      'CPU, x',
      'widths are multiples of 8, in narrow groups of 4 or 2, which suits this CPU; '
      '--round-to 1 switches it off',
    ),
    ([(64, 48), (64, 2)], [8, 8], 'H200', 'or less than one, which suits H200;'),
    ([(16, 4)], [4], None, 'widths are multiples of 4, which suits this device;'),
  ],
)
def test_widths_that_were_rounded_for_the_device_are_explained(
  widths, multiples, device, said, result
):
  names = 'abc'[: len(widths)]
  result |= {'widths': dict(zip(names, widths)), 'device': device}
  result['multiples'] = dict(zip(names, multiples))
  (line,) = [x for x in sentences.all_of(typed(result)) if 'multiples' in x]
  assert said in line


@pytest.mark.parametrize(
  'change',
  [
    {'multiples': {}},
    {'multiples': {'a': 5}},
    {'multiples': {'a': 0}},
    {'multiples': {'a': -8}},
    {'widths': {'a': (64, 64)}},
    {'widths': {'a': (64, 0)}},
    {'widths': {'a': (64, 47)}},
    {'widths': {'a': (64, 7)}},
    {'widths': {}},
  ],
)
def test_nothing_is_said_of_multiples_that_are_none(change, result):
  result |= {'widths': {'a': (64, 48)}, 'multiples': {'a': 8}, **change}
  assert not any('multiples' in line for line in sentences.all_of(typed(result)))


def test_the_exit_that_was_kept_is_counted_from_the_first(netcut):
  result, _ = netcut
  said = 'kept exit 3 of 20 (exit03) at β = 0.01, cost index, aggregate log'
  assert decided(result) == said
  (certainty,) = sentences.recipe_of(typed(result)).remarks(typed(result))
  assert certainty == (
    'largest importance w 0.958, normalised entropy 0.167 (0: one exit has it all, 1: '
    'all exits have the same)'
  )
  assert sentences.all_of(typed(result))[:2] == [said, certainty]
  result['options']['gamma'] = 1.0
  assert decided(result) == f'{said}, γ = 1'
  assert not erasing(result)


def test_erased_units_and_their_rounds_are_counted(implosion):
  result, _ = implosion
  assert erasing(result)
  said = 'erased 12 of 27 units in 3 rounds, chosen by priority'
  assert decided(result) == said
  result['rounds'] = result['rounds'][:1]
  said = 'erased 4 of 27 units in 1 round, chosen by priority'
  assert decided(result) == f'{said}; 15 were to be left, 23 are'
  del result['options']['depth']
  assert decided(result) == said


def test_what_helped_to_train_is_named_with_its_open_connections(auxiliary):
  result, _ = auxiliary
  dropped = 'dropped after training: 77.5 % of the FLOPs are left'
  path = 'trained beside a path whose connections were searched'
  assert decided(result) == f'{path} (5 of 6 connections open), {dropped}'
  result['rounds'][0]['learned'] = {}
  assert decided(result) == f'{path}, {dropped}'
  result['options']['structure'] = 'all'
  assert decided(result) == f'trained beside a path that every tap feeds, {dropped}'
  result['options']['structure'] = 'none'
  assert decided(result) == 'trained alone, without a path beside it'


def test_a_search_that_closed_nothing_is_no_decision(auxiliary):
  result, _ = auxiliary
  said = lambda: ' '.join(sentences.all_of(typed(result)))
  assert 'decided nothing' not in said()
  open_ = result['rounds'][0]['learned']['open']
  result['rounds'][0]['learned']['open'] = dict.fromkeys(open_, 1.0)
  assert 'the search closed no connection, so it decided nothing' in said()
  result['rounds'][0]['learned'] = {}
  assert 'decided nothing' not in said()


@pytest.mark.parametrize(
  ('largest', 'clear'), [(0.52, False), (0.74, False), (0.76, True)]
)
def test_a_divided_importance_is_no_clear_decision(largest, clear, netcut):
  result, _ = netcut
  result['rounds'][0]['learned']['max_importance'] = largest
  said = ' '.join(sentences.all_of(typed(result)))
  assert ('no clear decision' not in said) == clear


def test_what_auxiliary_is_compared_with_is_the_network_alone(auxiliary):
  result, _ = auxiliary
  said = lambda: ' '.join(sentences.all_of(typed(result)))
  assert '--control measures it' in said()
  result['control'] = {'test': 0.9042, 'held_out': 0.9}
  assert '--control' not in said()
  answer = sentences.answer(typed(result))
  assert answer.endswith('test accuracy 91.0 %, trained alone for as long 90.4 %.')
  result |= {'control': {}, 'options': {'structure': 'none'}}
  assert '--control' not in said()


def test_longer_training_is_said_where_there_was_any(implosion):
  result, _ = implosion
  answer = lambda: sentences.answer(typed(result))
  assert 'epoch' not in answer()
  result['epochs'] = {'before': 10, 'after': 16}
  longer = 'the network after was trained for 6 epochs more than that before'
  assert longer in sentences.all_of(typed(result))
  assert answer().endswith(f'after. T{longer[1:]}.')
  result['epochs']['after'] = 11
  assert 'for 1 epoch more than' in answer()
  result['epochs']['after'] = 10
  assert 'epoch' not in answer()


def test_the_answer_names_the_accuracy_of_the_first_weights(implosion):
  result, _ = implosion
  result['original'] = {'test': 0.9412}
  answer = sentences.answer(typed(result))
  assert answer.endswith(' after. At the start of the run it was 94.1 %.')


def test_the_largest_difference_is_said_and_so_is_its_absence(result):
  assert '4.1e-07' in sentences.proven(typed(result))
  assert 'changed 3.2e-03' in sentences.proven(typed(result))
  del result['verify']
  assert 'not compared' in sentences.proven(typed(result))


def test_of_several_cuts_the_largest_difference_counts(implosion):
  result, _ = implosion
  for each, difference in zip(result['rounds'], (1e-7, 3e-6, 2e-7)):
    each['verify'] = {'difference': difference}
  assert '3.0e-06' in sentences.proven(typed(result))


def test_recalibration_is_told_apart_from_fine_tuning(result):
  said = sentences.recalibrated(typed(result))
  assert 'batch statistics, before any fine-tuning: 97.2 %' in said
  assert len(sentences.all_of(typed(result))) == 4
  del result['accuracy']['recalibrated']
  assert len(sentences.all_of(typed(result))) == 3


def test_what_was_not_touched_after_the_cut_is_not_called_tuned(netcut, result):
  assert sentences.recalibrated(typed(netcut[0])) == ''
  result['accuracy']['after'] = result['accuracy']['recalibrated']
  said = 'test accuracy with fresh batch statistics: 97.2 %'
  assert sentences.recalibrated(typed(result)) == said


def test_a_network_without_batch_statistics_has_no_sentence_about_them(result):
  result['accuracy']['recalibrated'] = result['accuracy']['pruned']
  assert sentences.recalibrated(typed(result)) == ''


def test_the_device_is_named_where_something_was_timed(result, sidenet):
  said = 'measured on CPU, AMD EPYC, 2 cores'
  assert sentences.measured_on(typed(result)) == said
  assert sentences.measured_on(typed(sidenet)) == said
  del result['latency_ms']
  assert sentences.measured_on(typed(result)) == ''


def test_notes_are_of_surgery_and_of_timing(result):
  notes = sentences.notes(typed(result))
  assert len(notes) == 3
  assert notes[-1] == 'batch 128: a note about its timing'


def test_the_page_asks_a_question_in_the_name_of_the_method(result, netcut):
  assert sentences.question(typed(result)) == (
    'Trainable gates: how accurate is resnet20 on digits with 50 % of its FLOPs?'
  )
  assert sentences.question(typed(netcut[0])) == (
    'NetCut: how many of its layers does mlp20x200 on fashion_mnist need?'
  )
  assert sentences.answer(typed(result)).startswith(
    'Requested 50.0 % of the FLOPs, reached 49.95 %; test accuracy 98.3 % before, 98.1'
  )


def test_a_run_without_a_seed_has_none_in_its_title(result):
  assert sentences.title(typed(result)) == 'resnet20 on digits, seed 0'
  del result['seed']
  assert sentences.title(typed(result)) == 'resnet20 on digits'


# ---- cascades ------------------------------------------------------------------------


def test_the_sentence_says_what_was_asked_lost_and_saved(sidenet):
  said = 'asked to lose at most 0.5 point: loses 0.31 point and saves 35.2 % of the '
  assert decided(sidenet) == sentences.all_of(typed(sidenet))[0] == f'{said}FLOPs'


def test_a_gain_is_no_loss_and_dearer_is_no_saving(sidenet):
  sidenet['accuracy']['after'] = 0.9412
  sidenet['flops']['after'] = 1.031 * WHOLE
  said = 'asked to lose at most 0.5 point: gains 0.25 point and spends 3.1 % more FLOPs'
  assert decided(sidenet) == said


@pytest.mark.parametrize(
  ('kind', 'said'),
  [
    (
      'budget',
      'asked to spend at most 67 % of the FLOPs: spends 64.8 %, and loses 0.31 point',
    ),
    (
      'risk',
      'asked to be wrong where the MainNet is right in at most 2 % of the examples: is '
      'so in 1.42 %, loses 0.31 point and saves 35.2 % of the FLOPs',
    ),
  ],
)
def test_the_sentence_of_a_budget_and_of_a_risk(sidenet, kind, said):
  assert decided(choose(sidenet, kind)) == said


def test_the_sentence_of_a_threshold_and_of_no_request(sidenet):
  (request, *_) = sidenet['cascade']['requests'][1:]
  request |= {'kind': 'threshold', 'requested': 0.9}
  reached = 'loses 0.31 point and saves 35.2 % of the FLOPs'
  assert decided(sidenet) == f'asked for a threshold 0.9: {reached}'
  assert sentences.asked(cascade_of(sidenet).requests[1]) == 'threshold 0.9'
  sidenet['cascade']['requests'] = []
  assert decided(sidenet) == reached


def test_the_sentence_of_a_time_is_in_milliseconds_as_executed(sidenet):
  (request, *_) = (r for r in sidenet['cascade']['requests'] if r['chosen'])
  request |= {'kind': 'milliseconds', 'requested': 0.4}
  request['test']['milliseconds'] = 0.4567
  said = 'asked to take at most 0.4 ms an example: takes 0.457 ms, missed, and'
  assert decided(sidenet).startswith(said)


def test_a_refused_request_has_its_reason(sidenet):
  found = sentences.refused(cascade_of(sidenet))
  assert found == [f'cost ≤ 4 % was refused: {NO_BUDGET}']


def test_a_chosen_request_may_be_the_refused_one(sidenet):
  risk = choose(sidenet, 'risk')['cascade']['requests'][4]
  risk |= {'test': None, 'held_out': None, 'interval': None, 'refused': 'too few rows'}
  said = 'asked for risk ≤ 2 %, which was refused: loses 0.31 point and saves 35.2 %'
  assert decided(sidenet).startswith(said)
  assert len(sentences.refused(cascade_of(sidenet))) == 2


def test_a_certificate_says_what_holds_and_how_it_is_known(sidenet):
  risk = next(r for r in sidenet['cascade']['requests'] if r['kind'] == 'risk')
  risk['test']['certificate'] = {
    'loss': 'gap', 'alpha': 0.02, 'delta': 0.1, 'rows': 2500, 'losses': 31,
    'bound': 0.0161,
  }  # fmt: skip
  (said, *_) = sentences.certified(cascade_of(sidenet))
  assert said.startswith('risk ≤ 2 % holds with probability 90.0 %')
  assert '31 of 2,500' in said and 'at most 1.61 %' in said


def test_executed_is_compared_with_simulated(sidenet):
  said = (
    'executed: 3 of 5,000 examples left elsewhere than simulated, 2 of them within '
    '1e-5 of a threshold'
  )
  assert said in sentences.all_of(typed(sidenet))
  assert not any('masked' in line for line in sentences.all_of(typed(sidenet)))
  sidenet['cascade']['executed']['differ'] = 0
  assert sentences.executed(cascade_of(sidenet)) == (
    'executed: all 5,000 examples left where simulated'
  )


def test_where_single_examples_skip_nothing_is_said(sidenet):
  assert sentences.one_by_one(cascade_of(sidenet)) == ''
  one = {'ms': 0.7, 'whole_ms': 0.69, 'speedup': 0.986, 'merged': []}
  sidenet['cascade']['executed']['one'] = one
  assert sentences.one_by_one(cascade_of(sidenet)) == ''
  one['merged'] = ['exit1', 'exit2']
  said = sentences.one_by_one(cascade_of(sidenet))
  assert said.startswith('one example at a time, to skip what is behind exit1, exit2 ')
  assert said in sentences.all_of(typed(sidenet))
  one.update(merged=[], alone=True)
  said = sentences.one_by_one(cascade_of(sidenet))
  assert said.endswith('such an example is answered by the network alone')


def test_the_batch_size_from_which_a_cascade_pays_is_said(sidenet):
  run = sidenet['cascade']['executed']
  times = lambda speedup, batch: {
    'ms': 1.0, 'whole_ms': speedup, 'speedup': speedup, 'batch': batch,
    'ms_quartiles': [0.99, 1.01],
    'whole_ms_quartiles': [speedup - 0.01, speedup + 0.01],
  }  # fmt: skip
  said = lambda: sentences.pays_from(cascade_of(sidenet))
  assert said() == ''
  run |= {**times(1.3, 128), 'one': times(0.9, 1)}
  run['few'] = [times(1.0, 8), times(1.2, 32)]
  assert said() == (
    'the cascade is faster from batches of 32 on (measured: 1, 8, 32, 128)'
  )
  assert said() in sentences.all_of(typed(sidenet))
  run |= times(0.9, 128)
  assert said() == 'the cascade is not faster than the network in batches of 128'


def test_what_was_not_executed_is_not_compared(sidenet):
  del sidenet['cascade']['executed']
  assert sentences.executed(cascade_of(sidenet)) == ''


def test_heads_that_were_cut_away_are_named(sidenet):
  cut = lambda: sentences.cut_heads(cascade_of(sidenet))
  assert cut() == ''
  stages = sidenet['cascade']['stages']
  sidenet['cascade']['stages'] = [s for s in stages if s['exit'] != 'exit2']
  assert cut().startswith('Nobody leaves at exit2, which is cut away')
  sidenet['cascade']['stages'] = stages[2:]
  assert 'Nobody leaves at exit1, exit2, which are cut away' in cut()


def test_the_answer_tells_what_training_with_heads_did_to_the_network(sidenet):
  after = '; test accuracy: MainNet 93.87 %, cascade 93.56 %.'
  assert sentences.answer(typed(sidenet)).endswith(after)
  sidenet['cascade']['original'] = {'test': 0.9412}
  after = (
    'MainNet 93.87 % (94.12 % before it was trained with its heads), cascade 93.56 %.'
  )
  assert sentences.answer(typed(sidenet)).endswith(after)
