"""A bench of what was saved: both networks, their costs, and what is not known."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from depthprune.cascades.cascade import cascade
from depthprune.exports import networks
from depthprune.exports.networks import save_cascade
from depthprune.methods.netcut import NetCutOptions
from depthprune.methods.sidenet import SideNetOptions
from depthprune.methods.trainable_gates import GateOptions
from depthprune.models import build
from depthprune.models.heads import Head, WithHeads, every_tap, multitask
from depthprune.program.coupling import couple
from depthprune.run import bench
from depthprune.run.config import Config
from depthprune.surgery.oneshot import oneshot
from depthprune.surgery.prune import prune
from depthprune.timing import roofline
from depthprune.timing.roofline import Peak
from tests import zoo

DIGITS = jnp.zeros((1, 8, 8, 1))
TRUNK = build('mlp', classes=10)
PEAK = Peak(flops=1e9, side=512, bytes={2**20: 1e9}, dtype='float32')


@pytest.fixture(autouse=True)
def peaks(monkeypatch):
  """A roof that takes no time to measure."""
  monkeypatch.setattr(roofline, 'measure', lambda dtype: PEAK._replace(dtype=dtype))


def cut(model, keep=None, target='50%', x=DIGITS):
  variables = zoo.randomised(jax.eval_shape(model.init, jax.random.key(0), x))
  keep = keep or oneshot(couple(model, variables, x), variables, target)
  return prune(model, variables, keep, x)


def run_of(folder, options=None, **fields):
  folder.mkdir(parents=True)
  config = Config(options or GateOptions(), **{'model': 'mlp', **fields})
  (folder / 'config.json').write_text(json.dumps({'config': config.to_json()}))
  return folder


def test_a_network_takes_turns_with_what_its_run_began_with(tmp_path):
  small = cut(TRUNK)
  networks.save(run_of(tmp_path / 'run') / 'pruned', small)
  result = bench.bench([tmp_path / 'run'], batches=[4, 1, 4], seconds=0.02)
  assert json.loads(json.dumps(result)) == result
  (told,) = result['networks']
  assert result['device'].startswith('CPU') and result['peaks'] == {
    'float32': {**PEAK._asdict(), 'bytes': {'1048576': 1e9}}
  }
  for what in ('flops', 'params'):
    assert told[what] == {k: small.report[what][k] for k in ('before', 'after')}
  assert [*told['batches']] == ['1', '4']
  for batch, line in told['batches'].items():
    assert line['per_second'] == pytest.approx(1e3 * int(batch) / line['ms'])
    assert line['speedup'] == pytest.approx(line['before_ms'] / line['ms'])
    assert line['ms_quartiles'][0] <= line['ms'] <= line['ms_quartiles'][1]
    arrays = 4 * small.report['params']['after']
    moved = arrays + 4 * int(batch) * (64 + 10)
    expected = PEAK.milliseconds(int(batch) * told['flops']['after'], moved)
    assert line['roof_ms'] == pytest.approx(expected)


def test_without_its_run_a_network_is_alone(tmp_path):
  networks.save(tmp_path / 'small', cut(TRUNK))
  (told,) = bench.bench([tmp_path / 'small'], batches=[2], seconds=0.01)['networks']
  assert told['flops']['before'] is None and told['notes'] == []
  assert 'before_ms' not in told['batches']['2']


def test_what_cannot_be_built_any_more_is_said(tmp_path):
  networks.save(run_of(tmp_path / 'run', model='mlpx') / 'pruned', cut(TRUNK))
  (told,) = bench.bench([tmp_path / 'run'], batches=[2], seconds=0.01)['networks']
  assert "cannot be built: model: no model 'mlpx'" in told['notes'][0]
  assert 'before_ms' not in told['batches']['2']


def test_before_a_cut_there_was_the_network_to_its_last_exit(tmp_path):
  whole = every_tap(TRUNK)
  last = whole.exits[-1]
  small = cut(whole, {'exits': {name: name == whole.exits[0] for name in whole.exits}})
  before = bench.original(run_of(tmp_path / 'run', NetCutOptions()), small)
  said = before.network.apply(before.network.variables, DIGITS)
  assert [*said] == [last] and said[last].shape == (1, 10)
  assert np.isfinite(said[last]).all()
  only = cut(whole, {'exits': {name: name == last for name in whole.exits}})
  assert before.flops == only.report['flops']['after']
  most, least = (p.report['params']['after'] for p in (only, small))
  assert before.params == most > least


@pytest.fixture
def early(tmp_path):
  model = WithHeads(TRUNK, {'exit1': Head(TRUNK.taps[0], 10)})
  network = cut(model, {'exits': {}})
  given = network.apply, network.variables, DIGITS
  return network, cascade(*given, thresholds={'exit1': 0.3})


def test_a_cascade_runs_on_the_test_data_of_its_run(tmp_path, early):
  network, found = early
  save_cascade(run_of(tmp_path / 'run', SideNetOptions()) / 'cascade', found, network)
  (told,) = bench.bench([tmp_path / 'run'], batches=[8], seconds=0.02)['networks']
  line = told['batches']['8']
  assert told['kind'] == 'cascade' and told['flops']['before'] == found.stages.whole
  assert told['exits'] == dict(zip(found.exits, found.stages.flops))
  assert found.stages.flops[0] <= line['ideal'] <= line['padded']
  assert line['speedup'] == pytest.approx(line['before_ms'] / line['ms'])


def test_without_data_a_cascade_is_timed_at_each_exit(tmp_path, early):
  network, found = early
  save_cascade(tmp_path / 'it', found, network)
  (told,) = bench.bench([tmp_path / 'it'], batches=[8], seconds=0.02)['networks']
  assert told['batches'] == {} and [*told['exits_ms']] == ['alone', 'exit1', 'main']
  assert all(ms > 0 for ms in told['exits_ms'].values())
  assert 'not in the directory of a run' in told['notes'][0]


@pytest.mark.parametrize(
  ('words', 'said'),
  [
    ({'paths': []}, 'got none'),
    ({'batches': [0]}, 'batches: expected whole numbers >= 1'),
    ({'batches': []}, 'batches: expected whole numbers >= 1'),
    ({'seconds': 0}, 'seconds: expected a finite number > 0'),
  ],
)
def test_nothing_to_measure_is_refused(words, said):
  with pytest.raises(ValueError, match=said):
    bench.bench(**{'paths': ['x'], **words})


def test_several_tasks_are_several_answers_before_too(tmp_path):
  model = multitask(TRUNK, {'left': 10, 'right': 10})
  small = cut(model)
  before = bench.original(run_of(tmp_path / 'run', data='multi_fashion'), small)
  said = before.network.apply(before.network.variables, DIGITS)
  assert {*said} == {'left', 'right'}
  assert before.flops == small.report['flops']['before']
