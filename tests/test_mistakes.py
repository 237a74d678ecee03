"""Wrong command lines: a few lines with what was typed, and what to type instead."""

import re

import pytest

from depthprune import cli, methods, mistakes
from depthprune.run import rounds

WORDS = sorted(map(methods.word, methods.names()))
COMMANDS = ', '.join(cli.COMMANDS)
GATES = 'see: depthprune run gates --help'


@pytest.fixture(autouse=True)
def nothing_runs(monkeypatch):
  """Whatever is accepted by mistake ends here, and not in minutes of training."""

  def run(config, *_, **__):
    raise AssertionError(f'ran {config}')

  monkeypatch.setattr(rounds, 'run', run)


WRONG = {
  # commands and methods
  '': [f'expected a command: {COMMANDS}; got none', 'see: depthprune --help'],
  'prune': [f'expected a command: {COMMANDS}; got prune', 'nearest: run'],
  'reports x': ['got reports', 'nearest: report'],
  '--versoin': ['got --versoin'],
  '--seed 1 run gates': ['got --seed; the command comes before its options'],
  'run': [f'expected a method: {", ".join(WORDS)}; got none', 'depthprune run --help'],
  'sweep': ['expected a method: ', 'see: depthprune sweep --help'],
  'run gate': ['got gate', 'nearest: gates'],
  'run netcat --seed 1': ['got netcat', 'nearest: netcut'],
  'run --seed 1 gates': ['got --seed; the method comes before its options'],
  # options that there are not
  'run gates --no-epochs': [
    '--no-epochs: there is no such option of `run gates`',
    'nearest: --epochs',
    GATES,
  ],
  'run gates --sede 1': ['--sede: there is no such option', 'nearest: --seed', GATES],
  'run gates --sede=1': ['--sede=1: there is no such option', 'nearest: --seed'],
  'run gates -seed 1': ['-seed: there is no such option', 'nearest: --seed'],
  'run gates --lr 0.1': ['--lr: there is no such option', GATES],
  'run gates --no-seed': ['--no-seed: there is no such option', 'nearest: --seed'],
  'run netcut --target 0.5': ['--target: there is no', 'it is an option of: gates'],
  'run gates --beta 0.1': ['--beta: there is no', 'it is an option of: netcut'],
  'run gates --at-once 2': ['--at-once: there is no such option of `run gates`'],
  'sweep gates --sede 1 2': ['--sede: there is', '--seed', 'depthprune sweep gates'],
  'report x --fast': ['--fast: there is no such option of `report`'],
  'models mlp --clases 3': ['--clases: there is', 'nearest: --classes'],
  'export x --bach 3': ['--bach: there is', 'nearest: --batch'],
  # values of another type
  'run gates --target half': ['--target: expected a fraction', "got 'half'", GATES],
  'run gates --target=half': ['--target: expected a fraction', "got 'half'", GATES],
  'run gates --seed one': ['--seed: expected a whole number, got one', GATES],
  'run gates --seed 1.5': ['--seed: expected a whole number, got 1.5', GATES],
  'run gates --learning-rate fast': ['--learning-rate: expected a number, got fast'],
  'run gates --learning_rate fast': ['--learning_rate: expected a number, got fast'],
  'run gates --optimizer sdg': ['--optimizer: expected sgd or adam or adamw, got sdg'],
  'run gates --metric acc': ['--metric: expected balanced_accuracy or f1, got acc'],
  'run gates --distill yes': ['--distill: expected --distill or --no-distill and no'],
  'run gates --resume=false': ['--resume: expected --resume or --no-resume and no'],
  'run gates --model-args width': ['--model-args: expected KEY=VALUE or a JSON object'],
  'run gates --mesh dat=3': ['--mesh: expected data=N', "got 'dat=3'"],
  'sweep gates --seed 1 two': ['--seed: expected a whole number, got two'],
  'sweep gates --seed 1 2 --at-once x': ['--at-once: expected a whole number, got x'],
  'models --input a': ['--input: expected whole numbers, got a'],
  'models --classes many': ['--classes: expected a whole number, got many'],
  'bench x --batches 1 two': ['--batches: expected whole numbers, got 1 two'],
  'bench x --seconds soon': ['--seconds: expected a number, got soon'],
  # too few words, or too many
  'run gates --data': ['--data: expected a word, got nothing', GATES],
  'export x --to': ['--to: expected a path, got nothing'],
  'run gates --seed 1 2': ['--seed: expected one value, got 1 2', GATES],
  'run gates digits': ['digits: expected an option, got a word by itself', GATES],
  'report': ['report: expected one RUN, got none', 'see: depthprune report --help'],
  'report a b': ['report: expected one RUN, got a b'],
  'export --onnx': ['export: expected one RUN, got none'],
  'export --onnx a b': ['export: expected one RUN, got a b'],
  'bench': ['expected a run or a saved network, got none'],
  'compare': ['expected a run or a sweep, got none'],
  # twice
  # values out of range, and values that do not go together
  'run gates --target 1.5': ['--target: expected a fraction in (0, 1], got 1.5', GATES],
  'run gates --batch 0': ['--batch: expected a whole number >= 1, got 0', GATES],
  'run gates --pretrain_epochs -1': [
    '--pretrain_epochs: expected a finite number >= 0'
  ],
  'run gates --gate_epochs=-1': ['--epochs: expected a finite number >= 0'],
  'run netcut --beta -1': ['--beta: expected a finite number >= 0, got -1'],
  'run netcut --beta nan': ['--beta: expected a finite number >= 0, got nan'],
  'run implosion --depth 0': ['--depth: expected a whole number >= 1, got 0'],
  'run gates --mixup 1 --no-augment': ['--mixup, --randaugment: leave them out'],
  'run netcut --train-epochs 3': ['--pretrain-epochs: expected 0 for netcut, got 3'],
  'run sidenet --distill': ['--distill: expected False for sidenet'],
  'sweep gates --target 0.5 1.5': ['--target: expected a fraction in (0, 1], got 1.5'],
  'sweep gates --seed 3': ['an option with several values'],
  'sweep gates --target 0.5 50%': ['each of them once'],
  'sweep gates --seed 1 2 --at-once 0': ['--at-once: expected a whole number >= 1'],
  'models --classes 0': ['--classes: expected a whole number >= 1, got 0'],
  'models --input 8 8': ['--input: expected height, width and channels', 'got 8 8'],
  'bench x --batches 0': ['--batches: expected whole numbers >= 1, got [0]'],
  'bench x --seconds -1': ['--seconds: expected a finite number > 0, got -1'],
  # what is not there
  'models resnet2': ["no model 'resnet2'", 'resnet20'],
  'report /gone': ['/gone: expected the directory of a run, found nothing'],
  'export /gone': ['/gone: expected the directory of a finished run'],
  'compare /gone': ['/gone: expected the directory of a run, found nothing'],
  'bench /gone': ['/gone: expected the directory of a finished run'],
}


@pytest.mark.parametrize('words', WRONG)
def test_a_wrong_command_line_is_explained_in_a_few_lines(words, capsys):
  assert cli.main(words.split()) == cli.WRONG_INPUT
  said = capsys.readouterr().err
  assert said.startswith('error: ')
  assert len(said.splitlines()) <= 4
  assert [part for part in WRONG[words] if part not in said] == []
  assert re.findall('tyro|Traceback|__|None|╭', said) == []


@pytest.mark.parametrize('word', WORDS)
def test_every_option_of_a_method_is_known_to_what_explains(word):
  """A value that no option takes is refused in the name of that option."""
  syntax = mistakes.syntax_of(['run', word], cli.COMMANDS)
  assert {'seed', 'model', 'workdir'} < {*syntax.options}
  for name, kind in syntax.options.items():
    if kind in (int, float):
      with pytest.raises(mistakes.Mistake, match=f'^--{name}: expected a'):
        cli.parsed(['run', word, f'--{name}', 'many'])


def test_what_is_right_is_not_explained(capsys):
  for words in (
    'report x',
    'export --onnx x',
    'bench a b --batches 1 2',
    'compare a b',
  ):
    assert cli.parsed(words.split()) is not None
  assert capsys.readouterr() == ('', '')


def test_fields_in_a_message_get_the_names_that_were_typed():
  _, given = mistakes.divided('run gates --pretrain_epochs 3 --seed=4'.split())
  assert mistakes.named('train_epochs: no', given) == '--pretrain_epochs: no'
  assert mistakes.named('seed=4: no', given) == '--seed=4: no'
  assert mistakes.named('batch, seed: no', given) == '--batch, --seed: no'
  for kept in ('batch: no', 'seeds: no', 'no seed: no'):
    assert mistakes.named(kept, given) == kept
