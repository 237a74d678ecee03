"""The smoke test of the benchmark writes rows, and the table is made of them."""

import json

import jax
import pytest

from experiments import tables
from experiments.bench import realised

TIMES = {'whole_ms', 'small_ms', 'speedup', 'quartiles', 'realised', 'turns'}


@pytest.fixture
def quick(results) -> dict:
  """What the smoke test writes on one network of each kind."""
  realised.main(['--quick'])
  return json.loads((results / 'bench/results/realised_quick.json').read_text())


@pytest.mark.slow
def test_the_smoke_test_writes_every_kind_and_the_table_shows_it(quick, results):
  rows = {(r['kind'], r['variant']): r for r in quick['rows']}
  assert {*rows} == {
    ('channels', 'any width'),
    ('channels', 'multiples of 8'),
    ('units', 'half of the units'),
    ('exits', 'cut at the half'),
    ('cascade', '50 % leave early'),
  }
  assert quick['device'] and quick['config']['batches'] == [1, 2]
  for (kind, _), row in rows.items():
    assert row['flop_ratio'] > 1 and {*row['batches']} == {'1', '2'}
    assert ('torch' in row) == (kind == 'channels')
    for time in row['batches'].values():
      assert {*time} >= TIMES
      assert time['realised'] == pytest.approx(
        time['speedup'] / row['flop_ratio'], rel=0.5 if kind == 'cascade' else 1e-6
      )
  assert 1.8 < rows['channels', 'any width']['flop_ratio'] < 2.4
  text = tables.realised_bench()
  assert text.count('| channels | ResNet-8 |') == 2
  (line,) = (x for x in text.splitlines() if x.startswith('| exits'))
  row = rows['exits', 'cut at the half']
  assert line.split(' | ')[3] == f'{row["flop_ratio"]:.2f}×'
  assert line.split(' | ')[4].startswith(f'{row["batches"]["1"]["speedup"]:.2f}×')
  before = quick['rows']
  realised.main(['--quick'])  # nothing is missing, so nothing is measured again
  path = results / 'bench/results/realised_quick.json'
  assert json.loads(path.read_text())['rows'] == before


def time_of(speedup: float, **more) -> dict:
  quartiles = [speedup - 0.1, speedup + 0.1]
  return {'speedup': speedup, 'quartiles': quartiles, 'realised': speedup / 2, **more}


def test_the_table_has_what_torch_reached_or_says_that_it_is_not_there(results):
  row = {
    'kind': 'channels',
    'network': 'VGG-16',
    'variant': 'any width',
    'flop_ratio': 2.0,
    'batches': {'1': time_of(1.2), '32': time_of(1.5)},
    'torch': {'flop_ratio': 2.01, 'batches': {b: time_of(1.3) for b in ('1', '32')}},
  }
  other = {
    **row,
    'kind': 'cascade',
    'batches': {'1': time_of(0.98, merged=['early']), '32': time_of(1.4, merged=[])},
    'torch': None,
  }
  content = {'device': 'a CPU', 'config': {'batches': [1, 32]}, 'rows': [row, other]}
  path = results / 'bench' / 'results' / 'realised_cpu.json'
  path.parent.mkdir(parents=True)
  path.write_text(json.dumps(content))
  text = tables.realised_bench()
  assert (
    'On a CPU' in text and '(../experiments/bench/results/realised_cpu.json)' in text
  )
  first, second = (x for x in text.splitlines() if 'VGG-16' in x)
  assert '1.20× (1.10 to 1.30), 0.60 | 1.50× (1.40 to 1.60), 0.75 |' in first
  assert first.endswith('| 1.30×, 1.30× for 2.01× fewer FLOPs |')
  assert '| 0.98×* (0.88 to 1.08), 0.49 | 1.40× (' in second
  assert second.endswith('| not there |')


def test_without_results_it_says_so(results):
  assert tables.realised_bench().endswith('Nothing is measured yet.')


def test_half_of_the_units_go_from_stem_to_head():
  subject = realised.Subject('units', 'ResNet-14', 'resnet14', side=8)
  model, variables = realised.built(subject)
  coupling = realised.dp.couple(model, variables, *realised.inputs_of(subject, 1))
  (keep,) = realised.decisions(subject, model, coupling, variables).values()
  gone = [name for name, kept in keep['branches'].items() if not kept]
  assert len(gone) == 3 and len(keep['branches']) == 6
  assert jax.tree.leaves(keep['branches']) == [True, False] * 3
