"""The command line: help a person can read, one clear message when input is wrong."""

import dataclasses
import json
import subprocess
import sys
import types

import jax
import pytest

import depthprune as dp
from depthprune import cli, methods, models
from depthprune.methods.trainable_gates import GateOptions
from depthprune.report.sweep import SweptRun
from depthprune.run.config import OPTIONS, Config, default
from depthprune.timing import roofline
from tests.report.runs import made_up_gates, made_up_result, write_run

METHODS = {methods.word(name): name for name in methods.names()}


@pytest.fixture
def runs(monkeypatch) -> list[Config]:
  """Configs that would have been run."""
  taken: list[Config] = []
  recipe = types.ModuleType('depthprune.run.rounds')
  recipe.run = taken.append  # pyright: ignore[reportAttributeAccessIssue]
  monkeypatch.setitem(sys.modules, recipe.__name__, recipe)
  import depthprune.run

  monkeypatch.setattr(depthprune.run, 'rounds', recipe, raising=False)
  monkeypatch.setattr(cli, '_report', lambda path: None)
  return taken


def exit_code(words) -> int | str | None:
  """What the shell would see, whoever of the parser and `main` noticed."""
  try:
    return cli.main(words)
  except SystemExit as stopped:
    return stopped.code


def test_options_become_the_config(runs):
  words = 'run gates --data fashion_mnist --target 25% --subset 900 --distill'
  assert cli.main([*words.split(), '--workdir', 'here']) == 0
  assert runs == [
    Config(
      GateOptions(0.25), data='fashion_mnist', subset=900, distill=True, workdir='here'
    )
  ]


@pytest.mark.parametrize(
  'words',
  [
    '--pretrain-epochs 1 --epochs 2 --finetune-epochs 3',
    '--train-epochs 1 --gate-epochs 2 --finetune-epochs 3',
    '--train_epochs=1 --gate_epochs=2 --finetune_epochs=3',
  ],
)
def test_epochs_are_read_by_their_former_names_too(words, runs):
  assert cli.main(['run', 'gates', *words.split()]) == 0
  (config,) = runs
  assert config.epochs == (1, 2, 3)
  stored = config.to_json()
  assert (stored['train_epochs'], stored['gate_epochs']) == (1, 2)


@pytest.mark.parametrize('word', METHODS)
def test_help_says_for_how_long_a_method_trains_by_default(word, capsys):
  assert exit_code(['run', word, '--help']) == 0
  said = ' '.join(capsys.readouterr().out.replace('│', ' ').split())
  epochs = default(word).epochs
  assert f'are {epochs.train}, {epochs.gates}, {epochs.finetune} for digits' in said
  own = "(default: the method's own number for this data set)"
  assert said.count(own) == 3
  assert '(default: None)' not in said and '{None' not in said


@pytest.mark.parametrize(
  ('words', 'by'), [('', 'auto'), ('--round-to auto', 'auto'), ('--round-to 1', 1)]
)
def test_widths_are_rounded_for_the_device_or_to_a_number(words, by, runs):
  assert cli.main(['run', 'gates', *words.split()]) == 0
  assert runs == [Config(GateOptions(round_to=by))]


@pytest.mark.parametrize(
  ('wrong', 'expected'),
  [
    ('0', 'expected a whole number >= 1, got 0'),
    ('2.5', 'expected a whole number or auto, got 2.5'),
    ('auto8', 'expected a whole number or auto, got auto8'),
  ],
)
def test_a_rounding_that_is_none_is_refused(wrong, expected, runs, capsys):
  assert exit_code(['run', 'gates', '--round-to', wrong]) == 2
  said = ' '.join(capsys.readouterr().err.replace('│', '').split())
  assert 'round' in said and expected in said
  assert not runs


def test_no_options_are_the_defaults(runs):
  for word, method in METHODS.items():
    for name in (word, method):
      assert cli.main(['run', name]) == 0
      assert runs.pop() == default(method)


def test_the_version_is_that_of_the_package(capsys):
  assert cli.main(['--version']) == 0
  assert capsys.readouterr().out == f'depthprune {dp.__version__}\n'


def test_help_reads_no_comments(capsys):
  assert exit_code(['run', '--help']) == 0
  assert 'pyright' not in capsys.readouterr().out


def test_a_sweep_is_the_runs_of_all_combinations(monkeypatch, tmp_path, capsys):
  from depthprune.report import compare
  from depthprune.report import sweep as front
  from depthprune.run import sweep

  taken = []
  monkeypatch.setattr(sweep, 'run', lambda *given: taken.append(given))
  monkeypatch.setattr(front, 'read', lambda path: path)
  monkeypatch.setattr(front, 'screen', lambda found: f'screen of {found}')
  monkeypatch.setattr(front, 'draw', lambda found, path: path / 'front.svg')
  monkeypatch.setattr(compare, 'write_sweep', lambda found, path: path / 'a.html')
  (tmp_path / 'sweep.json').touch()
  words = f'sweep gates --target 0.3 50% --at-once 3 --seed 0 1 --workdir {tmp_path}'
  assert cli.main(words.split()) == 0
  ((planned, at_once),) = taken
  found = [(config.options.target, config.seed) for config in planned.runs]
  assert found == [(0.3, 0), (0.3, 1), (0.5, 0), (0.5, 1)]
  assert at_once == 3
  said = capsys.readouterr().out
  assert 'front.svg' in said and 'a.html' in said


ONE_WORD = 'run', 'sweep', 'report', 'compare', 'export', 'bench', 'models', 'data'
COMMANDS = [[], *([word] for word in ONE_WORD), ['run', 'gates'], ['sweep', 'gates']]


@pytest.mark.parametrize('command', COMMANDS)
def test_help_explains_every_command(command, capsys):
  assert exit_code([*command, '--help']) == 0
  said = capsys.readouterr().out
  assert ' '.join(['usage: depthprune', *command]) in said
  assert 'tyro' not in said
  assert 'None}' not in said


@pytest.mark.parametrize('word', METHODS)
def test_help_names_every_field_of_the_config_and_no_others_options(word, capsys):
  exit_code(['run', word, '--help'])
  said = capsys.readouterr().out
  names = lambda kind: {field.name for field in dataclasses.fields(kind)}
  of_options = {name: names(each.options) for name, each in methods.all().items()}
  mine = of_options.pop(METHODS[word])
  fields = names(Config) - {'options'} | mine
  option = lambda field: f'--{OPTIONS.get(field, field)} '.replace('_', '-')
  named = lambda field: option(field) in said.replace(',', ' ')
  assert {f for f in fields if not named(f)} == set()
  assert {f for f in set().union(*of_options.values()) - fields if named(f)} == set()


def test_a_report_of_nothing_is_one_message(tmp_path, capsys):
  assert cli.main(['report', str(tmp_path / 'gone')]) == 2
  printed = capsys.readouterr()
  assert printed.err.startswith('error: ')
  assert printed.err.count('\n') == 1
  assert printed.out == ''


@pytest.mark.parametrize('command', ['export', 'bench'])
def test_a_network_that_is_not_there_is_one_message(command, tmp_path, capsys):
  assert cli.main([command, str(tmp_path)]) == 2
  printed = capsys.readouterr().err
  assert 'expected the directory of a finished run' in printed
  assert printed.count('\n') == 1


def test_a_saved_network_goes_out_of_the_door(tmp_path, capsys, monkeypatch):
  monkeypatch.setattr(roofline, 'ENOUGH', 0.0)
  model = models.build('mlp', classes=3, hidden=(5, 4))
  x = jax.numpy.ones((1, 6))
  variables = model.init(jax.random.key(0), x)
  dp.save(tmp_path / 'run' / 'pruned', dp.prune(model, variables, {}, x))
  assert cli.main(['export', str(tmp_path / 'run'), '--batch', '2']) == 0
  assert 'main: main.stablehlo' in capsys.readouterr().out
  exported = tmp_path / 'run' / 'exported'
  told = json.loads((exported / 'export.json').read_text())
  assert told['inputs'][0]['shape'] == [2, 6]
  to = str(tmp_path / 'bench.json')
  words = ['bench', str(exported), '--batches', '1', '4', '--seconds', '0.01']
  assert cli.main([*words, '--to', to]) == 0
  assert f'{exported}' in capsys.readouterr().out.replace('\n', '')
  (measured,) = json.loads((tmp_path / 'bench.json').read_text())['networks']
  assert [*measured['batches']] == ['1', '4']


def test_an_unknown_model_is_one_message_with_the_nearest_names(tmp_path, capsys):
  words = ['run', 'gates', '--model', 'resnet21', '--workdir', str(tmp_path / 'run')]
  assert cli.main(words) == 2
  printed = capsys.readouterr().err
  assert printed.startswith("error: --model: no model 'resnet21'")
  assert 'resnet20' in printed
  assert printed.count('\n') == 1


def test_a_run_ends_with_the_commands_that_go_on_from_it(runs, capsys):
  assert cli.main('run gates --workdir here'.split()) == 0
  said = capsys.readouterr().out
  assert said == '  next: depthprune report here\n  next: depthprune export here\n'


def test_data_lists_sets_with_their_sizes(capsys, tmp_path, monkeypatch):
  monkeypatch.setenv('TFDS_DATA_DIR', str(tmp_path))
  assert cli.main(['data']) == 0
  head, digits, multi, *_, last = capsys.readouterr().out.splitlines()
  assert head.split() == ['classes', 'train', 'test']
  assert digits.split() == ['digits', 'images', '8x8x1', '10', '1,797', '0']
  assert 'multi_fashion' in multi and 'TFDS_DATA_DIR' in last
  assert max(map(len, (head, digits, last))) <= 80
  assert cli.main(['data', 'gone.npz']) == 0
  assert 'gone.npz' in capsys.readouterr().out


def test_a_mistake_of_ours_keeps_its_traceback(monkeypatch):
  def broken(config):
    return [][1]

  monkeypatch.setattr(cli, '_run', broken)
  with pytest.raises(IndexError):
    cli.main(['run', 'gates'])


def test_an_error_from_below_keeps_its_traceback(monkeypatch):
  monkeypatch.setattr(cli, '_run', lambda config: int('x'))
  with pytest.raises(ValueError, match='invalid literal'):
    cli.main(['run', 'gates'])


@pytest.mark.parametrize(
  ('words', 'continues'),
  [
    ('run gates', 'the same command continues'),
    ('run gates --no-resume', 'the same command without --no-resume continues'),
  ],
)
def test_interrupting_says_how_to_go_on(words, continues, monkeypatch, capsys):
  def interrupted(config):
    raise KeyboardInterrupt('gates: saved at step 3')

  monkeypatch.setattr(cli, '_run', interrupted)
  assert cli.main(words.split()) == cli.INTERRUPTED
  said = capsys.readouterr().err
  assert said == f'gates: saved at step 3; {continues} from there\n'


def test_what_has_nothing_to_continue_says_that_it_stopped(monkeypatch, capsys):
  def interrupted(*_):
    raise KeyboardInterrupt

  monkeypatch.setattr(cli, '_models', interrupted)
  assert cli.main(['models']) == cli.INTERRUPTED
  assert capsys.readouterr().err == 'stopped\n'


HEAVY = {'jax', 'flax', 'optax', 'orbax', 'numpy', 'matplotlib', 'sklearn', 'cattrs'}
DRAWING = {'numpy', 'matplotlib', 'cattrs'}


def loaded_by(code: str) -> set[str]:
  """Names of all modules in a process that has run this code and nothing before."""
  code = f'import atexit, sys; atexit.register(lambda: print(*sys.modules)); {code}'
  done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
  assert done.returncode == 0, done.stderr
  return {*done.stdout.splitlines()[-1].split()}


def words_of(words: list[str]) -> str:
  return f'from depthprune import cli; cli.main({words})'


@pytest.mark.parametrize(
  'code',
  [
    'import depthprune',
    words_of(['--help']),
    *(words_of(['run', word, '--help']) for word in METHODS),
    words_of(['sweep', 'netcut', '--help']),
  ],
)
def test_help_answers_without_jax(code):
  """Importing jax takes a second."""
  loaded = loaded_by(code)
  assert 'depthprune' in loaded
  assert loaded & HEAVY == set()


def test_a_report_is_made_without_jax(tmp_path):
  run = write_run(tmp_path / 'run', made_up_result(), made_up_gates())
  loaded = loaded_by(words_of(['report', str(run)]))
  assert (run / 'report.html').is_file()
  assert loaded > DRAWING and loaded & (HEAVY - DRAWING) == set()


def test_runs_are_compared_without_jax(tmp_path):
  runs = [
    str(write_run(tmp_path / name, made_up_result(), made_up_gates())) for name in 'ab'
  ]
  to = tmp_path / 'page.html'
  loaded = loaded_by(words_of(['compare', *runs, '--to', str(to)]))
  assert 'Which of 2 runs' in to.read_text()
  assert loaded > DRAWING and loaded & (HEAVY - DRAWING) == set()


def test_the_report_of_a_sweep_is_made_without_jax(tmp_path):
  run = SweptRun(folder='a', settings={'seed': 0}, result=None, refused='too small')
  sweep = {'config': default('gates').to_json(), 'swept': {'seed': [0]}, 'runs': [run]}
  (tmp_path / 'sweep.json').write_text(json.dumps(sweep))
  loaded = loaded_by(words_of(['report', str(tmp_path)]))
  assert (tmp_path / 'front.svg').is_file()
  assert (tmp_path / 'report.html').is_file()
  assert loaded & (HEAVY - DRAWING) == set()


def test_the_public_names_are_all_there_and_documented():
  """They are imported when they are first used, so a wrong one would go unnoticed."""
  for name in dp.__all__:
    assert getattr(dp, name).__doc__, name
  assert {*dp.__all__} <= {*dir(dp)}
  with pytest.raises(AttributeError, match='no attribute .prunes'):
    dp.prunes  # noqa: B018


def test_models_lists_networks_with_their_size(capsys):
  """An MLP and a decoder by hand: their products, biases and scales."""
  words = 'models mlp vit_tiny bert_tiny --input 8 8 1 --classes 3'
  assert cli.main(words.split()) == 0
  head, mlp, vit, bert = capsys.readouterr().out.splitlines()
  products = 64 * 200 + 200 * 200 + 200 * 3
  assert mlp.split() == ['mlp', f'{(products + 403) / 1e3:.1f}', 'k', '107', 'k']
  assert round(2 * products / 1e3) == 107 and '8x8x1' in head
  assert 'cannot read it' in vit and 'reads texts' in bert
  assert cli.main('models decoder_tiny mlp --input 9'.split()) == 0
  _, decoder, mlp = capsys.readouterr().out.splitlines()
  layer = 2 * 16 * (16 + 8) + 3 * 16 * 24 + 2 * 16  # attention, perceptron, norms
  assert decoder.split()[1] == f'{(64 * 16 + 4 * layer + 16) / 1e3:.2f}'
  assert 'reads images' in mlp
  assert cli.main(['models', 'mlpp']) == cli.WRONG_INPUT
  assert 'Nearest: mlp' in capsys.readouterr().err
