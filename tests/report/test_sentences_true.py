"""No sentence, tile or cell that the numbers of a result contradict.

Results are made up, with values at the edges of what can happen; what screen and page
say about them is compared with the numbers.
"""

import copy
import dataclasses
import io
import math
import re
from collections.abc import Sequence
from pathlib import Path
from unittest import mock

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from depthprune.report import bench, numbers, page, screen, sentences, sweep, tables
from depthprune.report.run_files import FinishedRun
from depthprune.run.config import default
from depthprune.train.result import (
  Accuracies,
  Change,
  Executed,
  Latency,
  Proof,
  Result,
  SweepResult,
)
from tests.report.cascades import cascade_of, choose, made_up_sidenet
from tests.report.runs import (
  made_up_auxiliary,
  made_up_implosion,
  made_up_netcut,
  made_up_result,
  typed,
)

NAN, INF = math.nan, math.inf
MADE_UP = {
  'gates': lambda: (made_up_result(), []),
  'netcut': made_up_netcut,
  'implosion': made_up_implosion,
  'auxiliary': made_up_auxiliary,
  'sidenet': lambda: (made_up_sidenet(), []),
}
FRACTIONS = st.floats(0, 1)
TIMES = st.floats(1e-3, 1e3)


def on_screen(result: Result) -> str:
  console = Console(width=400, record=True, file=io.StringIO())
  console.print(screen.screen(result))
  return ' '.join(console.export_text().split())


def on_page(result: Result) -> str:
  """The text of the page; charts, which take most of the time, are not drawn."""
  with mock.patch.object(page.Picture, 'svg', lambda picture, width: ''):
    return text_of(result)


def text_of(result: Result, gates: Sequence[dict] = ()) -> str:
  text = page.page(FinishedRun(Path(), result, [], [*gates], []))
  drawn = re.findall('<text[^>]*>([^<]*)', text)
  text = re.sub(
    r'(?s)<style.*?</style>|<pre.*?</pre>|<script.*?</script>|<svg.*?</svg>', ' ', text
  )
  text += ' '.join(drawn)
  return ' '.join(re.sub('<[^>]*>', ' ', text).split())


def everywhere(result: Result) -> str:
  return f'{on_screen(result)} {on_page(result)}'


def pruned(**fields) -> Result:
  return dataclasses.replace(typed(made_up_result()), **fields)


def cascade(result: dict, **fields) -> Result:
  """The result, with other fields in its cascade."""
  made = typed(result)
  assert made.cascade is not None
  return dataclasses.replace(made, cascade=dataclasses.replace(made.cascade, **fields))


# ---- speed ---------------------------------------------------------------------------


def latency(before: float, after: float, **fields) -> Latency:
  return Latency(before, after, speedup=before / after, **fields)


def says(measured: Latency) -> tuple[str, str]:
  """What the table and the tile say of a latency."""
  result = pruned(latency_ms={'1': measured})
  row = next(r for r in tables.costs(result).rows if r[0] == 'median latency, batch 1')
  (tile,) = (t for t in tables.tiles(result) if 'batch 1' in t.name)
  return row[-1], f'{tile.value} {tile.name}'


@given(TIMES, TIMES)
def test_faster_and_slower_agree_with_the_times(before, after):
  for said in says(latency(before, after)):
    if after < 0.99 * before:
      assert 'speed-up' in said
    if after > 1.01 * before:
      assert 'slowdown' in said
    if found := re.search(r'(\d+\.\d\d) [x×]', said):
      factor = max(before, after) / min(before, after)
      assert float(found[1]) == pytest.approx(factor, abs=0.0051)
      assert float(found[1]) > 1


@given(TIMES, st.integers(0, 50))
def test_what_turns_show_as_chance_is_no_difference_in_table_and_tile(time, faster):
  measured = latency(time, 0.9 * time, runs=50, faster=faster)
  for said in says(measured):
    assert ('no difference' in said) == (abs(faster - 25) <= 50**0.5 or faster < 25)


def test_what_the_notes_call_equal_is_called_equal_everywhere():
  from depthprune.timing.latency import Comparison, Timing, to_json

  compared = Comparison(1, Timing(2.0, 1.9, 2.1, 50), Timing(1.94, 1.8, 2.0, 50), 28)
  written = to_json([compared])['1']
  measured = latency(
    *(written['before'], written['after']),
    runs=written['runs'], faster=written['faster'], notes=written['notes'],
  )  # fmt: skip
  assert 'no difference in speed was measured' in written['notes'][0]
  table, tile = says(measured)
  assert table == 'no difference' and tile == '≈ 1 × speed, batch 1: no difference'
  said = everywhere(pruned(latency_ms={'1': measured}))
  assert not re.search('speed-up|slowdown|1.03', said)


def test_a_longer_compile_time_is_a_slowdown():
  def row(before, after):
    rows = tables.costs(pruned(compile_s=Change(before, after))).rows
    return next(row[-1] for row in rows if row[0] == 'compile time')

  assert row(0.8, 1.28) == 'slowdown 1.60 x'
  assert row(1.28, 0.8) == 'speed-up 1.60 x'
  assert row(1.0, 1.001) == 'no difference'
  assert row(1.0, 0.0) == row(NAN, 1.0) == ''


def test_a_cascade_that_is_slower_has_no_speed_up():
  times = {'ms': 80.0, 'whole_ms': 40.0, 'batch': 8, 'device': 'TPU v5'}
  said = everywhere(cascade(made_up_sidenet(), executed=Executed(**times)))
  assert 'slowdown 2.00 x' in said and '2.00 × slowdown, batch 8' in said
  assert 'speed-up' not in said and 'measured on TPU v5' in said
  near = Executed(
    **{**times, 'ms': 39.0}, ms_quartiles=(38, 41), whole_ms_quartiles=(39, 42)
  )
  said = everywhere(cascade(made_up_sidenet(), executed=near))
  assert not re.search('speed-up|slowdown', said) and 'no difference' in said


def test_what_was_not_timed_was_not_measured_anywhere():
  said = everywhere(cascade(made_up_sidenet(), executed=Executed()))
  assert not re.search('measured on|speed|latency', said)


BENCHED = {
  'ms': 2.0, 'ms_quartiles': [1.9, 2.1], 'runs': 50, 'per_second': 4e3, 'roof_ms': 0.5,
  'before_ms_quartiles': [2.0, 2.2],
}  # fmt: skip


@pytest.mark.parametrize(
  ('before', 'faster', 'cell'),
  [
    (2.1, 27, 'no difference'),
    (2.1, 50, 'speed-up 1.05 x'),
    (1.0, 0, 'slowdown 2.00 x'),
    (2.1, None, 'no difference'),
  ],
)
def test_the_bench_says_the_same_as_the_report(before, faster, cell):
  line = {**BENCHED, 'before_ms': before, 'speedup': before / 2, 'faster': faster}
  ((*_, speed, _, _),) = bench.rows({'batches': {'8': line}})
  assert speed == cell


def swept(*measured: Latency, **fields) -> dict:
  accuracy = {'before': 0.9, 'after': 0.9} | fields
  runs = [
    {
      'folder': f'seed{seed}',
      'settings': {'seed': seed},
      'result': dataclasses.asdict(
        SweepResult(
          accuracy=Accuracies(**accuracy),
          flops=Change(2.0, 1.0),
          params=Change(2.0, 1.0),
          held_out=Accuracies(**accuracy),
          device='CPU',
          latency_ms={'128': one},
        )
      ),
      'refused': None,
    }
    for seed, one in enumerate(measured)
  ]
  seeds = [*range(len(measured))]
  return {'config': default('gates').to_json(), 'swept': {'seed': seeds}, 'runs': runs}


def cells_of(values: dict) -> tables.Table:
  return sweep.table(sweep.swept_names(values), sweep.settings(values))


def test_the_sweep_says_the_same_as_the_report():
  def column(*each: Latency) -> dict[str, str]:
    head, (row,) = cells_of(swept(*each))
    return dict(zip(head, row))

  equal = latency(2.0, 1.94, runs=50, faster=28)
  assert column(equal, equal)['speed'] == 'no difference'
  slower = latency(1.0, 2.0, runs=50, faster=0)
  assert column(slower)['speed'] == '0.50'
  assert column(slower, equal)['speed'].startswith('0.77 ±')
  assert column(latency(1.0, NAN))['speed'] == '–'


# ---- accuracy ------------------------------------------------------------------------


def test_an_accuracy_that_is_not_a_number_is_called_so():
  said = everywhere(pruned(accuracy=Accuracies(0.98, NAN, NAN, NAN)))
  assert 'not a number' in said
  assert not re.search(r'\bnan\b|\binf\b', said)
  row = tables.costs(pruned(accuracy=Accuracies(0.98, NAN))).rows[0]
  assert row[1:] == ('98.00 %', '', 'not a number', '')
  (tile, *_) = tables.tiles(pruned(accuracy=Accuracies(0.98, NAN)))
  assert tile[:3] == ('not a number', 'accuracy', '')


def test_an_accuracy_that_was_not_measured_is_not_zero():
  result = pruned(accuracy=Accuracies(0.98))
  (tile, *_) = tables.tiles(result)
  assert tile == ('–', 'accuracy', '', '')
  said = everywhere(result)
  assert 'test accuracy 98.0 % before, – after' in said
  assert not re.search(r'\b0\.00? %|-98', said)


@given(FRACTIONS, FRACTIONS)
def test_fell_and_rose_agree_with_the_accuracies(before, after):
  made = typed(made_up_sidenet())
  result = dataclasses.replace(made, accuracy=Accuracies(before, after))
  said = sentences.decided(result)
  loses, gains = 'loses' in said.split(': ')[1], 'gains' in said
  assert loses != gains
  if found := re.search(r'(loses|gains) (\d+\.\d\d) point', said):
    assert float(found[2]) == pytest.approx(100 * abs(before - after), abs=0.0051)
    assert (found[1] == 'loses') == (before > after)
  else:
    assert 'loses no accuracy' in said and abs(before - after) < 1e-4
  missed = before - after > 0.005 + 1e-9
  assert ('misses it' in said) == missed
  row = tables.costs(pruned(accuracy=Accuracies(before, after))).rows[0]
  change = float(row[-1].split()[0])
  assert change == pytest.approx(100 * (after - before), abs=0.0051)
  assert not row[-1].startswith('-0.00')


@given(FRACTIONS, FRACTIONS)
def test_percentages_are_those_of_the_file_rounded(fraction, other):
  assert float(numbers.percent(fraction, 2)[:-2]) == pytest.approx(
    100 * fraction, abs=0.0051
  )
  result = pruned(
    accuracy=Accuracies(fraction, other), flops=Change(1e6, 1e6 * fraction)
  )
  shown = [float(x) for x in re.findall(r'([\d.]+) %', sentences.answer(result))]
  before, after = shown[-2:]
  assert before == pytest.approx(100 * fraction, abs=0.051)
  assert after == pytest.approx(100 * other, abs=0.051)
  assert shown[1] == pytest.approx(100 * fraction, abs=0.0051)  # reached


@given(st.floats(0, 3))
def test_what_is_more_than_before_is_not_called_kept(part):
  result = pruned(params=Change(1e6, 1e6 * part))
  row = next(r for r in tables.costs(result).rows if r[0] == 'parameters')
  (tile,) = (t for t in tables.tiles(result) if 'parameters' in t.name)
  shown = float(row[-1].split()[0])
  more = 'more' in row[-1]
  assert more == ('more' in tile.name) != ('kept' in tile.name)
  assert shown == float(tile.value.split()[0])
  assert shown == pytest.approx(100 * (part - 1 if more else part), abs=0.051)
  assert more or shown <= 100


# ---- targets, and nothing at all -----------------------------------------------------


@given(st.floats(0.05, 1), st.floats(0.01, 1))
def test_a_target_that_was_missed_is_said_to_be(target, reached):
  result = pruned(
    options={'target': target, 'of': 'flops'}, flops=Change(1e6, 1e6 * reached)
  )
  said = sentences.decided(result)
  off = reached - target
  if abs(off) > 0.0051:
    assert f'points {"above" if off > 0 else "below"} it' in said
  if abs(off) < 0.0049:
    assert 'points' not in said


def test_nothing_cut_is_said_and_something_cut_is_not():
  same = {name: (before, before) for name, (before, _) in pruned().widths.items()}
  report = dataclasses.replace(pruned().report, branches={}, exits={})
  uncut = pruned(
    flops=Change(5.0, 5.0), params=Change(5.0, 5.0), widths=same, report=report
  )
  assert 'nothing was cut' in on_screen(uncut) and 'nothing was cut' in on_page(uncut)
  assert not re.search('[Rr]emoved:', everywhere(uncut))
  for changed in (
    {'flops': Change(5.0, 4.0)},
    {'params': Change(5.0, 4.0)},
    {'widths': {**same, 'stem/conv:3': (16, 15)}},
  ):
    assert 'nothing was cut' not in everywhere(dataclasses.replace(uncut, **changed))


def test_a_thin_layer_is_neither_empty_nor_whole_in_its_bar():
  result = pruned(widths={'thin': (1000, 1), 'nearly': (1000, 999), 'gone': (0, 0)})
  thin, nearly, gone = (
    re.search(f'{name} +\\d+ +\\d+ +([█░]+)', on_screen(result))[1]
    for name in ('thin', 'nearly', 'gone')
  )
  assert thin[0] == '█' and nearly[-1] == '░' and '█' not in gone


def test_a_proof_is_what_it_measured():
  said = lambda difference: sentences.proven(pruned(verify=Proof(difference)))
  assert said(0.0) == 'the masked and the small network give the same output'
  assert said(NAN).endswith('is not a number')
  assert said(2e-7).endswith('2.0e-07 of the output')
  implosion, _ = made_up_implosion()
  for each, value in zip(implosion['rounds'], (1e-7, NAN, 2e-7)):
    each['verify'] = {'difference': value}
  assert sentences.proven(typed(implosion)).endswith('is not a number')


def test_zero_rounds_and_rounds_that_erase_nothing():
  none, _ = made_up_implosion()
  none['rounds'] = []
  assert 'erased no units' in everywhere(typed(none))
  one, _ = made_up_implosion(rounds=1, per_round=4)
  one['rounds'][0] |= {'units': [27, 27], 'erased': []}
  one['options']['depth'] = 27
  said = everywhere(typed(one))
  assert 'erased none of 27 units in 1 round' in said
  assert not re.search('1 rounds|chosen by|were to be left', said)
  one['options']['depth'] = 20
  assert '20 were to be left, 27 are' in everywhere(typed(one))


def test_one_head_and_one_connection_are_singular():
  result, _ = made_up_netcut(exits=1, kept=1)
  result['rounds'][0]['learned']['entropy'] = NAN
  said = everywhere(typed(result))
  assert 'kept the only exit (exit01)' in said
  assert not re.search('entropy|1 of 1', said)
  auxiliary, _ = made_up_auxiliary()
  auxiliary['rounds'][0]['learned'] = {'open': {'stage1/gate': 1.0}, 'weight': {}}
  assert '(1 of 1 connection open)' in everywhere(typed(auxiliary))
  assert 'kept' not in sentences.decided(typed({**result, 'rounds': []}))


# ---- cascades ------------------------------------------------------------------------


def leaving_at(name: str) -> Result:
  made = made_up_sidenet()
  shares = dict.fromkeys(made['cascade']['exits'], 0.0) | {name: 1.0}
  return cascade(made, shares=shares)


def test_a_cascade_that_never_or_always_exits_says_so():
  assert 'no test example leaves early' in everywhere(leaving_at('main'))
  said = everywhere(leaving_at('exit1'))
  assert 'all test examples leave at exit1' in said and 'leaves early' not in said
  said = everywhere(typed(made_up_sidenet()))
  assert not re.search('all test examples leave|leaves early', said)


@given(st.floats(0.01, 2))
def test_saved_and_spent_agree_with_the_flops(kept):
  result = dataclasses.replace(typed(made_up_sidenet()), flops=Change(1.0, kept))
  said = sentences.decided(result)
  if kept > 1.001:
    assert f'spends {100 * (kept - 1):.1f} % more FLOPs' in said
  elif kept < 0.999:
    assert 'saves' in said and 'more FLOPs' not in said
  assert not re.search(r'\b0\.0 %', said)


@pytest.mark.parametrize(
  ('kind', 'reached', 'missed'),
  [('budget', 0.7, True), ('budget', 0.5, False), ('risk', 0.03, True)],
)
def test_a_request_that_was_missed_is_said_to_be(kind, reached, missed):
  made = choose(made_up_sidenet(), kind)
  (request,) = (r for r in made['cascade']['requests'] if r['chosen'])
  request['test'] |= {'risk': reached, 'saved': 1 - reached}
  made['flops'] = {'before': 1.0, 'after': reached}
  said = sentences.decided(typed(made))
  assert bool(re.search('misse[sd]', said)) == missed
  row = next(r for r in tables.requests(cascade_of(made)).rows if 'chosen' in r[0])
  assert ('missed' in row[1]) == missed


def test_what_was_neither_reached_nor_refused_is_not_called_refused():
  made = made_up_sidenet()
  made['cascade']['requests'][0] |= {'test': None, 'refused': None}
  assert tables.requests(cascade_of(made)).rows[0][1] == '–'


def test_examples_are_counted_in_singular_and_plural():
  said = lambda **run: sentences.executed(
    dataclasses.replace(cascade_of(made_up_sidenet()), executed=Executed(**run))
  )
  assert said(differ=0, n=1) == 'executed: the one example left where simulated'
  assert said(differ=0, n=5000) == 'executed: all 5,000 examples left where simulated'
  assert said(differ=1, n=1).startswith('executed: 1 of 1 example left elsewhere')
  assert said(differ=0, n=0) == ''


def test_thresholds_of_the_user_s_own_do_not_come_from_data():
  made = choose(made_up_sidenet(), 'drop')
  assert 'those that were asked for' not in everywhere(typed(made))
  made['cascade']['requests'][0] |= {'kind': 'threshold', 'requested': 0.9}
  assert 'or are those that were asked for' in everywhere(typed(made))
  for request in made['cascade']['requests']:
    request['interval'] = None
  assert 'interval' not in sentences.reading(cascade_of(made))


# ---- anything at all -----------------------------------------------------------------


EDGES = 0.0, 1.0, 1e-9, -2.0, 1e3, NAN, INF, -INF
CHOSEN = {'options', 'config', 'requested', 'edges'}  # what is not measured


def places_of(value, path=()) -> list[tuple]:
  """Places of all floats in plain values."""
  if isinstance(value, float):
    return [path]
  if isinstance(value, dict):
    return [p for key, inner in value.items() for p in places_of(inner, (*path, key))]
  if isinstance(value, list):
    return [p for i, inner in enumerate(value) for p in places_of(inner, (*path, i))]
  return []


def with_edges(value, places, edges):
  value = copy.deepcopy(value)
  for place, edge in zip(places, edges):
    inside = value
    for key in place[:-1]:
      inside = inside[key]
    inside[place[-1]] = edge
  return value


def altered(method: str, data: st.DataObject) -> Result:
  """A made-up result in which some numbers are extreme."""
  result, _ = MADE_UP[method]()
  places = [p for p in places_of(result) if not CHOSEN & {*p}]
  chosen = data.draw(st.lists(st.sampled_from(places), max_size=6, unique=True))
  edges = [data.draw(st.sampled_from(EDGES)) for _ in chosen]
  return typed(with_edges(result, chosen, edges))


@pytest.mark.parametrize('method', MADE_UP)
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_any_number_on_the_screen_may_be_extreme(method, data):
  assert not re.search(r'(?<![\w/])-?(nan|inf)\b', on_screen(altered(method, data)))


@pytest.mark.parametrize('method', MADE_UP)
@pytest.mark.parametrize('edge', [0.0, 1e3, NAN, INF])
def test_every_number_on_the_page_may_be_extreme(method, edge):
  """Also in what charts draw; warnings are errors."""
  result, gates = MADE_UP[method]()
  places = [p for p in places_of(result) if not CHOSEN & {*p}]
  made = typed(with_edges(result, places, [edge] * len(places)))
  assert not re.search(r'(?<![\w/])-?(nan|inf)\b', text_of(made, gates))


@pytest.mark.slow
@pytest.mark.parametrize('method', MADE_UP)
@settings(max_examples=20, deadline=None)
@given(data=st.data())
def test_any_number_on_the_page_may_be_extreme(method, data):
  assert not re.search(r'(?<![\w/])-?(nan|inf)\b', text_of(altered(method, data)))


@pytest.mark.parametrize('method', MADE_UP)
def test_what_a_result_may_lack_is_not_made_up(method):
  made, _ = MADE_UP[method]()
  lean = {
    k: v for k, v in made.items() if k not in ('held_out', 'latency_ms', 'verify')
  }
  lean |= {'accuracy': {'before': 0.9}, 'device': None}
  lean.pop('compile_s', None)
  lean = {k: v for k, v in lean.items() if v is not None}
  said = everywhere(typed(lean))
  assert 'held-out  ' not in said and 'measured on' not in said
  assert not re.search(r'None|\{\}|\[\]| 0\.0+ %', said)


# ---- sweeps --------------------------------------------------------------------------


def sweep_on_screen(values: dict) -> str:
  console = Console(width=400, record=True, file=io.StringIO())
  console.print(sweep.screen(values))
  sweep.chart(sweep.settings(values))
  return ' '.join(console.export_text().split())


FASTER = latency(2.0, 1.0, runs=50, faster=50)


def test_a_sweep_over_networks_names_them_and_has_no_one_network_before():
  one = swept(FASTER, FASTER)
  assert 'trainable_gates, resnet20 on digits' in sweep_on_screen(one)
  assert 'before: test accuracy 90.00 %, 2 FLOPs' in sweep_on_screen(one)
  models = ['mlp', 'resnet8']
  several = {**one, 'swept': {'model': models}}
  for run, model, size in zip(several['runs'], models, (2.0, 4.0)):
    run['settings'] = {'model': model}
    run['result']['flops']['before'] = size
  said = sweep_on_screen(several)
  assert 'trainable_gates, mlp, resnet8 on digits' in said
  assert 'before:' not in said and 'parts of different networks' in said


def test_a_sweep_without_a_front_or_a_time_does_not_explain_them():
  said = sweep_on_screen(swept(FASTER, FASTER))
  assert '★ on the front' in said and 'of several seeds' in said and '× that' in said
  assert 'of several seeds' not in sweep_on_screen(swept(FASTER))
  none = swept(FASTER)
  none['runs'][0] |= {'result': None, 'refused': 'too small'}
  assert not re.search('★|before:|All in', sweep_on_screen(none))
  untimed = swept(FASTER)
  untimed['runs'][0]['result']['latency_ms'] = {}
  assert 'All in %' in sweep_on_screen(untimed)
  assert '×' not in sweep_on_screen(untimed)


@pytest.mark.parametrize(('after', 'cell'), [(None, '–'), (NAN, 'not a number')])
def test_an_unknown_accuracy_of_a_sweep_is_not_zero_and_not_on_the_front(after, cell):
  values = swept(FASTER, FASTER, after=after)
  _, (row,) = cells_of(values)
  assert row[:2] == (cell, cell) and row[-1] == ''
  assert not re.search(r'★|\bnan\b', sweep_on_screen(values))
