"""One device, eight, and two processes: the same training, the same decisions.

The processes are real and talk over loopback; the devices are virtual, of the CPU.
"""

import json
import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from depthprune.run.config import default
from depthprune.run.job import prepare
from depthprune.train import mesh as meshes
from depthprune.train.options import ConfigError, axes
from tests.train import spmd

SPMD = ('-m', 'tests.train.spmd')
ROOT = Path(__file__).parents[2]
METHODS = {
  'gates': '--model resnet8',
  'netcut': '--model mlp20x200 --beta 0.001 --force',
  'implosion': '--model resnet14 --importance greedy --depth 4',
  'sidenet': '--model resnet8',
  'auxiliary': '--model resnet8 --structure search',
}
BRIEF = (
  '--subset 160 --batch 16 --train-epochs 1 --gate-epochs 1 --finetune-epochs 1 '
  '--learning-rate 0.01 --checkpoint-every-s 0'
)


def launch(
  words: Sequence[str], devices: int = 1, processes: int = 1
) -> list[subprocess.Popen]:
  """The processes of one run, each with so many devices."""
  with socket.socket() as probe:
    probe.bind(('127.0.0.1', 0))
    port = probe.getsockname()[1]
  flags = f'{os.environ.get("XLA_FLAGS", "")} --xla_force_host_platform_device_count='
  env = {**os.environ, 'XLA_FLAGS': f'{flags}{devices}', 'PYTHONPATH': str(ROOT)}
  if processes > 1:
    env['JAX_COORDINATOR_ADDRESS'] = f'127.0.0.1:{port}'
    env['JAX_NUM_PROCESSES'] = str(processes)
  pipe = subprocess.PIPE
  return [
    subprocess.Popen(
      [sys.executable, *words], cwd=ROOT, stdout=pipe, stderr=pipe, text=True,
      env={**env, 'JAX_PROCESS_ID': str(i)} if processes > 1 else env,
    )
    for i in range(processes)
  ]  # fmt: skip


def ended(started: list[subprocess.Popen], code: int = 0) -> list[str]:
  """What each process printed; all must end with that exit code."""
  try:
    said = [process.communicate(timeout=400) for process in started]
  finally:
    for process in started:
      process.kill()
  assert [p.returncode for p in started] == [code] * len(started), said
  return [out for out, _ in said]


def trained(folder: Path, devices: int, processes: int, mesh: str = '') -> Path:
  ended(launch([*SPMD, 'train', str(folder), mesh], devices, processes))
  return folder


@pytest.fixture(scope='module')
def one(tmp_path_factory) -> Path:
  """On one device, here."""
  folder = tmp_path_factory.mktemp('one')
  spmd.train(folder, None)
  return folder


@pytest.fixture(scope='module')
def eight(tmp_path_factory) -> Path:
  return trained(tmp_path_factory.mktemp('eight'), 8, 1, 'data,model=2')


@pytest.fixture(scope='module')
def two(tmp_path_factory) -> Path:
  return trained(tmp_path_factory.mktemp('two'), 1, 2)


def arrays(folder: Path, name: str) -> dict[str, np.ndarray]:
  with np.load(folder / f'{name}.npz') as found:
    return dict(found)


def close(found: dict, expected: dict) -> None:
  assert found.keys() == expected.keys()
  for path, value in expected.items():
    np.testing.assert_allclose(found[path], value, rtol=0, atol=1e-5, err_msg=path)


@pytest.fixture(params=['eight', 'two'])
def several(request) -> Path:
  return request.getfixturevalue(request.param)


def test_ten_steps_are_those_of_one_device(one, several):
  """Weights, momentum and the batch statistics, which are of the whole batch."""
  expected = arrays(one, 'state')
  assert int(expected['step']) == spmd.STEPS
  assert {path.split('/')[0] for path in expected} >= {'params', 'model_state'}
  close(arrays(several, 'state'), expected)
  close(arrays(several, 'fused'), expected)


def test_what_is_cut_is_the_same_and_what_is_measured(one, several):
  expected = arrays(one, 'keep')
  assert not all(kept.all() for kept in expected.values())
  for group, kept in arrays(several, 'keep').items():
    np.testing.assert_array_equal(kept, expected[group])
  close(arrays(several, 'found'), arrays(one, 'found'))


def test_batches_and_weights_are_split_over_their_axes(eight, two):
  parts = lambda folder: json.loads((folder / 'parts.json').read_text())
  same = {'of_the_host': {'texts': True, 'features': True}}
  assert parts(eight) == {'image': [4, 8, 8, 1], 'kernel': [3, 3, 8, 8], **same}
  assert parts(two) == {'image': [8, 8, 8, 1], 'kernel': [3, 3, 8, 16], **same}


def test_both_processes_end_with_the_same_bits(two):
  sums = [json.loads((two / f'sums{i}.json').read_text()) for i in range(2)]
  assert sums[0] == sums[1]


def test_a_state_that_was_split_goes_on_on_one_device(one, eight):
  """Restored, not trained again: the checkpoint is of the last step."""
  job = prepare(spmd.config(eight, None), show=False)
  state = spmd.ten(job, spmd.Net().init(jax.random.key(5), *job.inputs))
  close(spmd.checkpoint.paths(jax.device_get(state)), arrays(one, 'state'))
  expected = arrays(eight, 'state')['params/conv1/kernel']
  np.testing.assert_array_equal(state.params['conv1']['kernel'], expected)


def test_processes_that_do_not_belong_together_are_told_so(tmp_path):
  ended(launch([*SPMD, 'strangers', str(tmp_path), ''], 1, 2))
  first, second = (json.loads((tmp_path / f'said{i}.json').read_text()) for i in (0, 1))
  assert first['config'] == second['config']
  assert 'batch (process 0: 16, process 1: 17), options/target' in first['config']
  assert first['data'] == second['data']
  assert "data 'digits': not the same on all hosts: train/image" in first['data']
  assert first['failed'].startswith('HostError: process 1 failed: DataError')
  assert second['failed'].startswith('DataError')
  assert 'steps (process 0: [], process 1: [3])' in first['folder']
  assert 'all must take part' in first['few']
  of_process_0 = np.arange(5) > 0, np.array([-0.0, 1 / 3], np.float32)
  assert first['agreed'] == [x.tobytes().hex() for x in of_process_0]
  assert second['agreed'] == first['agreed']


def test_a_run_of_two_processes_writes_everything_once(tmp_path):
  words = f'-m depthprune.cli run gates --model mlp {BRIEF} --workdir {tmp_path}'
  out, silent = ended(launch(words.split(), 1, 2))
  assert 'report.html' in out and 'report.html' not in silent
  lines = [json.loads(x) for x in (tmp_path / 'history.jsonl').read_text().splitlines()]
  steps = [(line['stage'], line['step']) for line in lines]
  assert len(steps) == len(set(steps)) == 30
  result = json.loads((tmp_path / 'result.json').read_text())
  assert result['mesh'] == {'data': 2, 'model': 1, 'processes': 2}
  assert {p.name for p in tmp_path.iterdir()} == {
    *('.lock', 'checkpoints', 'config.json', 'gates.jsonl', 'history.jsonl'),
    *('pruned', 'report.html', 'result.json', 'rounding.json'),
  }


def test_a_mesh_is_read_from_words():
  read = {'data': (None, 1), 'data=8': (8, 1), 'model=2': (None, 2)}
  read |= {'data=4, model=2': (4, 2), 'model=2,data': (None, 2)}
  assert {text: axes(text) for text in read} == read
  for text in ('', '8', 'data=0', 'model', 'data=2,data=4', 'rows=2', 'data=two'):
    with pytest.raises(ConfigError, match='mesh: expected data=N.*got'):
      default('gates', mesh=text)


@pytest.mark.parametrize(
  ('batch', 'mesh', 'said'),
  [
    (128, 'data=16', r'takes 16 devices, there are 8 .* at most data=8'),
    (128, 'data=8,model=2', r'takes 16 devices, there are 8 .* at most data=4'),
    (128, 'data=1,model=16', r'takes 16 devices, there are 8 .* at most model=8'),
    (100, 'data=8', r'multiple of 8, .* got 100: the nearest is 104'),
    (97, 'data', r'got 97: the nearest is 96'),
    (3, 'data', r'got 3: the nearest is 8'),
  ],
)
def test_a_mesh_that_cannot_be_is_refused(batch, mesh, said, monkeypatch):
  monkeypatch.setattr(jax, 'devices', lambda: jax.local_devices() * 8)
  with pytest.raises(ConfigError, match=said):
    meshes.make_mesh(mesh, batch)


def test_weights_are_split_along_the_last_axis_that_can_be():
  parts = jax.sharding.AbstractMesh((4, 2), meshes.AXES)
  spec = lambda *shape: meshes._spec(parts, shape)
  assert spec(3, 3, 16, 32) == P(None, None, None, 'model')
  assert spec(64, 10, 7) == P(None, 'model')
  assert spec(5, 3) == spec(64) == spec() == P()


# ---- the whole job of every method, by the command line ------------------------------


def cli(folder: Path, method: str, *more: str) -> list[str]:
  words = f'-m depthprune.cli run {method} {METHODS[method]} {BRIEF}'
  if method in ('netcut', 'auxiliary', 'implosion'):
    words = words.replace('--train-epochs 1', '--train-epochs 0')
  return [*words.split(), '--workdir', str(folder), *more]


def decided(folder: Path) -> dict:
  """The architecture that is left, and the thresholds of a cascade."""
  cascade = folder / 'cascade' / 'cascade.json'
  where = folder / 'cascade' / 'network' if cascade.exists() else folder / 'pruned'
  kept = json.loads((where / 'arch.json').read_text())['keep']
  return {'keep': kept, 'exits': cascade.exists() and json.loads(cascade.read_text())}


@pytest.mark.slow
@pytest.mark.parametrize('method', METHODS)
def test_every_method_decides_the_same_on_eight_devices_and_by_two_processes(
  method, tmp_path
):
  ended(launch(cli(tmp_path / 'one', method), 1))
  ended(launch(cli(tmp_path / 'eight', method, '--mesh', 'data,model=2'), 8))
  ended(launch(cli(tmp_path / 'two', method), 1, 2))
  one, *others = (decided(tmp_path / name) for name in ('one', 'eight', 'two'))
  for other in others:
    assert other['keep'] == one['keep']
    if one['exits']:
      assert other['exits']['exits'] == one['exits']['exits']
  results = [
    json.loads((tmp_path / name / 'result.json').read_text())
    for name in ('one', 'eight', 'two')
  ]
  for result in results[1:]:
    assert result['accuracy'] == pytest.approx(results[0]['accuracy'], abs=0.005)
