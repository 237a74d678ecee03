"""What version 0.1 stored can still be read, reported on and continued.

Only the command line and the names in `depthprune` itself are used, so that nothing
here has to change when files move within the package. `fixtures/version_0_1/README.md`
says how the fixtures were made. They are what users have on their disks: a test that
fails is repaired in the library, and not by making them anew.
"""

import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import depthprune as dp
from depthprune.cli import main
from depthprune.run import rounds

STORED = Path(__file__).parent / 'fixtures' / 'version_0_1'
PRUNED = 'gates', 'netcut', 'implosion', 'auxiliary'
METHODS = *PRUNED, 'sidenet'


def network_of_ones_own(v, x):
  """The function that was pruned and saved as `networks/foreign` and in `cascade`."""
  h = jnp.tanh(x @ v['first'])
  return {'early': h @ v['early'], 'main': jnp.tanh(h @ v['second']) @ v['last']}


def arithmetic() -> np.ndarray:
  """Numbers whose last bits depend on the processor and on the version of XLA."""
  x = jax.random.normal(jax.random.key(0), (16, 8, 8, 8))
  kernel = jax.random.normal(jax.random.key(1), (5, 5, 8, 8))

  def loss(kernel):
    y = jax.lax.conv_general_dilated(
      x, kernel, (1, 1), 'SAME', dimension_numbers=('NHWC', 'HWIO', 'NHWC')
    )
    return jax.nn.logsumexp(y.mean((1, 2)) / y.std(), axis=-1).mean()

  return np.asarray(jax.jit(jax.grad(loss))(kernel))


def read(path: Path) -> dict:
  return json.loads(path.read_text())


def last_loss(run: Path) -> float:
  return json.loads((run / 'history.jsonl').read_text().splitlines()[-1])['loss']


def words_of(run: Path) -> list[str]:
  """The command that made a run, without `--workdir`, which comes last."""
  words = read(run / 'result.json')['command'].split()
  assert words[:3] == ['python', '-m', 'depthprune.cli']
  assert words[-2] == '--workdir'
  return words[3:-2]


@pytest.fixture
def runs(tmp_path, monkeypatch) -> Path:
  """A copy of all runs, as `runs` in the current directory: commands name them so."""
  monkeypatch.chdir(tmp_path)
  return Path(shutil.copytree(STORED / 'workdirs', tmp_path / 'runs'))


def as_printed(result: dict) -> list[str]:
  """Numbers of result.json, as the screen and the page show them."""
  accuracy, flops = result['accuracy'], result['flops']
  found = [f'{100 * accuracy["after"]:.2f} %']
  if 'cascade' in result:
    share = result['cascade']['cost']['exit1'] / flops['before']
    return [*found, f'{100 * share:.1f} %']
  return [*found, f'{100 * accuracy["before"]:.2f} %']


@pytest.mark.parametrize('name', METHODS)
def test_a_run_is_reported(name, runs, capsys):
  result = read(runs / name / 'result.json')
  assert main(['report', str(runs / name)]) == 0
  said = capsys.readouterr().out
  page = (runs / name / 'report.html').read_text()
  for number in as_printed(result):
    assert number in said
    assert number in page
  assert result['model'] in said
  charts = {'implosion': 3, 'netcut': 2, 'gates': 3, 'sidenet': 2, 'auxiliary': 2}
  assert page.count('<svg') >= charts[name]


def test_a_result_from_when_there_was_one_method_is_reported(runs, capsys):
  """Its options stood beside the rest, and there were no rounds."""
  path = runs / 'gates' / 'result.json'
  result = read(path)
  assert result.pop('method') == 'trainable_gates'
  options = result.pop('options')
  del result['rounds']
  old = {**result, 'target': options['target'], 'of': options['of']}
  path.write_text(json.dumps(old))
  assert main(['report', str(path.parent)]) == 0
  said = capsys.readouterr().out
  assert 'requested 10.0 % of the FLOPs' in said
  assert all(number in said for number in as_printed(result))


@pytest.mark.parametrize('name', PRUNED)
def test_a_pruned_network_computes_what_it_did(name):
  pruned = dp.load(STORED / 'workdirs' / name / 'pruned')
  stored = dict(np.load(STORED / 'outputs' / f'{name}.npz'))
  out = pruned.apply(pruned.variables, stored.pop('x'), train=False)
  assert out.keys() == stored.keys()
  for exit_, logits in stored.items():
    np.testing.assert_allclose(out[exit_], logits, rtol=1e-5, atol=1e-5)
  result = read(STORED / 'workdirs' / name / 'result.json')
  assert pruned.report['flops']['after'] == result['flops']['after']
  assert pruned.report['normalisation'].keys() == {'scale', 'mean', 'std'}


def test_a_network_of_ones_own_computes_what_it_did():
  pruned = dp.load(STORED / 'networks' / 'foreign', network_of_ones_own)
  stored = dict(np.load(STORED / 'outputs' / 'foreign.npz'))
  out = pruned.apply(pruned.variables, stored.pop('x'))
  assert out.keys() == stored.keys() == {'early', 'main'}
  for exit_, logits in stored.items():
    np.testing.assert_allclose(out[exit_], logits, rtol=1e-5, atol=1e-5)


def test_a_network_as_safetensors_computes_what_it_did():
  pruned = dp.load(STORED / 'networks' / 'tensors')
  stored = np.load(STORED / 'outputs' / 'tensors.npz')
  out = pruned.apply(pruned.variables, stored['x'])
  np.testing.assert_allclose(out['main'], stored['main'], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
  ('folder', 'model', 'outputs'),
  [
    ('networks/cascade', network_of_ones_own, 'cascade'),
    ('workdirs/sidenet/cascade', None, 'sidenet'),
  ],
)
def test_a_cascade_answers_as_it_did(folder, model, outputs):
  stored = np.load(STORED / 'outputs' / f'{outputs}.npz')
  said = dp.load_cascade(STORED / folder, model)(stored['x'])
  np.testing.assert_allclose(said.logits, stored['logits'], rtol=1e-5, atol=1e-5)
  np.testing.assert_array_equal(said.exit, stored['exit'])


def test_a_sweep_is_reported_and_its_command_finds_it_finished(runs, capsys):
  sweep = runs / 'sweep'
  before = read(sweep / 'sweep.json')
  assert main(['report', str(sweep)]) == 0
  said = capsys.readouterr().out
  assert (sweep / 'front.svg').is_file()
  words = before['command'].split()[3:]
  assert main(words) == 0
  assert not list(sweep.glob('*/history.jsonl'))  # nothing was trained
  assert read(sweep / 'sweep.json')['runs'] == before['runs']
  again = capsys.readouterr().out
  for run in before['runs']:
    number = f'{100 * run["result"]["accuracy"]["after"]:.2f}'
    assert number in said
    assert number in again


@pytest.mark.parametrize('name', METHODS)
def test_the_config_of_a_finished_run_is_that_of_its_command(name, runs, capsys):
  """A sweep takes what its runs have reached from runs of the same config only."""
  result = read(runs / name / 'result.json')
  folder = runs / 'as_a_sweep'
  for seed in (0, 1):
    there = folder / f'seed{seed}'
    there.mkdir(parents=True)
    config = result['config'] | {'seed': seed}
    (there / 'result.json').write_text(json.dumps({**result, 'config': config}))
  words = ['sweep', *words_of(runs / name)[1:], '--seed', '0', '1']
  assert main([*words, '--workdir', str(folder)]) == 0
  assert 'done' not in capsys.readouterr().out
  assert {path.name for path in folder.glob('seed?/*')} == {'result.json'}
  reached = [run['result'] for run in read(folder / 'sweep.json')['runs']]
  assert [r['accuracy'] for r in reached] == [result['accuracy']] * 2


@pytest.mark.slow
def test_a_finished_run_is_accepted_and_not_trained_again(runs):
  run = runs / 'netcut'
  before, history = read(run / 'result.json'), (run / 'history.jsonl').read_bytes()
  assert main([*words_of(run), '--workdir', str(run)]) == 0
  after = read(run / 'result.json')
  assert (run / 'history.jsonl').read_bytes() == history
  assert after['flops'] == before['flops']
  # To the last bit only where programs are compiled as they were then.
  assert after['accuracy'] == pytest.approx(before['accuracy'], abs=0.01)


def test_another_command_is_refused_a_stored_directory(runs, capsys):
  run = runs / 'netcut'
  assert main([*words_of(run), '--batch', '32', '--workdir', str(run)]) == 2
  said = capsys.readouterr().err
  assert 'batch (asked for 32, there 64)' in said


def test_a_stopped_run_continues_to_the_same_bits(runs, monkeypatch):
  """But for the batch statistics that are measured at the end by now."""
  measured, recalibrate = [], rounds.recalibrate

  def after_the_cut(model, variables, batches):
    measured.append(variables)
    return recalibrate(model, variables, batches) if len(measured) == 1 else variables

  monkeypatch.setattr(rounds, 'recalibrate', after_the_cut)
  run, whole = runs / 'stopped', runs / 'uninterrupted'
  begun = (run / 'history.jsonl').read_text()
  assert main([*words_of(whole), '--workdir', str(run)]) == 0
  history = (run / 'history.jsonl').read_text()
  assert history.startswith(begun)
  went_on = [json.loads(line) for line in history[len(begun) :].splitlines()]
  assert (went_on[0]['stage'], went_on[0]['step']) == ('gates', 6)
  assert len(measured) == 2
  reached, expected = read(run / 'result.json'), read(whole / 'result.json')
  assert reached['options']['round_to'] == expected['options']['round_to'] == 1
  assert not reached['multiples']
  found = reached['accuracy'], reached['held_out'], reached['widths'], last_loss(run)
  asked = expected['accuracy'], expected['held_out'], expected['widths']
  asked = *asked, last_loss(whole)
  if np.array_equal(arithmetic(), np.load(STORED / 'outputs' / 'arithmetic.npy')):
    assert found == asked
    stored = np.load(STORED / 'outputs' / 'uninterrupted.npz')
    pruned = dp.load(run / 'pruned')
    out = pruned.apply(pruned.variables, stored['x'], train=False)
    np.testing.assert_array_equal(out['main'], stored['main'])
  else:  # another processor or another XLA: sums are rounded otherwise
    assert reached['accuracy'] == pytest.approx(expected['accuracy'], abs=0.1)
    assert last_loss(run) == pytest.approx(last_loss(whole), rel=0.2)


def test_a_stored_run_is_exported_and_measured(runs, tmp_path):
  to = tmp_path / 'exported'
  assert main(['export', str(runs / 'netcut'), '--to', str(to)]) == 0
  assert list(to.rglob('*.stablehlo'))
  assert list(to.rglob('*.safetensors'))
  words = ['--batches', '1', '--seconds', '0.05', '--to', str(tmp_path / 'bench.json')]
  assert main(['bench', str(runs / 'netcut'), *words]) == 0
  assert read(tmp_path / 'bench.json')
