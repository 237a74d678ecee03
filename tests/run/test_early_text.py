"""Early exits of a language model in a run, against its files and by brute force."""

import dataclasses
import itertools

import jax
import numpy as np
import pytest

import depthprune as dp
from depthprune import cli, models
from depthprune.cascades import thresholds
from depthprune.cascades.generation import (
  early_answers,
  exit_predictions,
  generate_early,
)
from depthprune.cascades.predictions import Predictions
from depthprune.data import tokens
from depthprune.data.dataset import DataError
from depthprune.methods.sidenet import SideNetOptions
from depthprune.models.generation import generate
from depthprune.models.heads import Unembedding, WithHeads, variables_of_trunk
from depthprune.run import data, early_text, rounds
from depthprune.run.config import default, from_json
from depthprune.run.job import prepare
from depthprune.train.language import language_model
from depthprune.train.options import ConfigError
from tests import zoo

tokenizers = pytest.importorskip('tokenizers')
WORDS = 'the cut network writes what a whole one would have written'.split()
MODEL = models.build('decoder_tiny')
EXAMPLE = np.zeros((1, 8), np.int32)


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  """Texts with a token for each word, and a network of random weights for them."""
  path = tmp_path_factory.mktemp('texts')
  rng = np.random.default_rng(0)
  (path / 'texts').mkdir()
  for i in range(40):
    (path / 'texts' / f'{i}.txt').write_text(' '.join(rng.choice(WORDS, 40)))
  vocab = {word: i for i, word in enumerate(['<|endoftext|>', *WORDS])}
  made = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab, '<|endoftext|>'))
  made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
  made.save(str(path / 'tokenizer.json'))
  variables = zoo.randomised(jax.eval_shape(MODEL.init, jax.random.key(0), EXAMPLE))
  dp.save(path / 'whole', dp.prune(MODEL, variables, {}, EXAMPLE))
  return path


def config(folder, workdir, options=None, **more):
  same = {
    'model': 'decoder_tiny',
    'data': str(folder / 'texts'),
    'pretrained': str(folder / 'whole'),
    'tokenizer': str(folder / 'tokenizer.json'),
    'length': 8,
    'batch': 8,
    'gate_epochs': 1,
    'workdir': str(workdir),
  }
  options = options or SideNetOptions(hidden=12, drop=30.0, taught=1.0)
  return default('sidenet', options, **{**same, **more})


@pytest.fixture(scope='module')
def run(folder, tmp_path_factory):
  """A run from the command line, as `load_run` reads it, and its data."""
  workdir = tmp_path_factory.mktemp('run') / 'sidenet'
  own = config(folder, workdir)
  command = (
    f'run sidenet --model decoder_tiny --data {own.data} --pretrained {own.pretrained} '
    f'--tokenizer {own.tokenizer} --length 8 --batch 8 --epochs 4 --hidden 12 '
    f'--drop 30 --taught 1 --workdir {workdir}'
  )
  with jax.numpy_dtype_promotion('standard'):  # optax.adam needs it
    assert cli.main(command.split()) == 0
  found = dp.load_run(workdir)
  return found, data.read(from_json(found.result.config))


def test_a_run_reaches_what_the_saved_network_reaches(run):
  """Costs, too, which the run computes for all exits and the network for its own."""
  found, texts = run
  result, cascade = found.result, found.result.cascade
  early = dp.load_exits(found.path)
  assert early.exits and early.confidence == 'probability'
  own, limits = early[:2], np.array([*early.exits.values()], np.float32)

  def seen(split, labels=None):
    return exit_predictions(*own, split['image'], [*early.exits], labels)

  decided = seen(texts.held_out)
  held_out = thresholds.measured(limits, decided)
  assert 0.7 <= held_out.accuracy < 1 and held_out.cost < decided.whole
  (mine,) = (r for r in cascade.requests if r.chosen)
  assert mine.held_out == {'accuracy': held_out.accuracy, 'cost': held_out.cost}
  test = thresholds.measured(limits, seen(texts.test))
  assert cascade.agreement == test.accuracy
  assert result.flops.after == pytest.approx(test.cost, rel=1e-12)
  assert result.flops.before == decided.whole
  shares = dict(zip((*early.exits, 'main'), test.exits))
  assert cascade.shares == {name: shares.get(name, 0.0) for name in cascade.exits}
  assert sum(cascade.shares.values()) == pytest.approx(1)
  labelled = thresholds.measured(limits, seen(texts.test, texts.test['label']))
  assert result.accuracy.after == pytest.approx(labelled.accuracy)
  trunk = variables_of_trunk(early.variables)
  outputs = early.model.trunk.apply(trunk, texts.test['image'])
  loss = language_model().loss(outputs['main'], texts.test)
  assert result.scores['before']['perplexity'] == pytest.approx(np.exp(loss), rel=1e-5)
  size = lambda variables: sum(x.size for x in jax.tree.leaves(variables['params']))
  sizes = size(trunk), size(early.variables)
  assert (result.params.before, result.params.after) == sizes


def test_what_is_executed_is_what_the_saved_network_answers(run):
  found, texts = run
  executed = found.result.cascade.executed
  early = dp.load_exits(found.path / 'exits')
  rows = texts.test['image'][:16]
  answers, layers = early_answers(early.model, early.variables, rows, early.exits)
  whole = early.model.apply(early.variables, rows)['main'].argmax(-1)
  assert executed.n == rows.size and layers.min() < 4
  assert executed.accuracy == pytest.approx(np.mean(answers == whole))


def test_the_network_itself_stays_as_it_is(run, folder):
  early = dp.load_exits(run[0].path / 'exits')
  whole = dp.load(folder / 'whole').variables['params']
  jax.tree.map(np.testing.assert_array_equal, early.variables['params']['trunk'], whole)
  heads = [k for k in early.variables['params'] if k != 'trunk']
  assert heads == [f'head_{name}' for name in early.exits]
  assert all(early.variables['params'][k]['out']['kernel'].any() for k in heads)


def test_samples_are_what_both_write(run):
  found, texts = run
  early = dp.load_exits(found.path / 'exits')
  prompts = texts.held_out['image'][:1, :4]
  steps = 24
  tokenizer = tokens.read(early.tokenizer)
  assert tokenizer.get_vocab_size() == len(WORDS) + 1
  trunk = variables_of_trunk(early.variables)
  written = {
    'whole': generate(early.model.trunk, trunk, prompts, steps),
    'early': generate_early(
      early.model, early.variables, prompts, steps, early.exits, early.confidence
    ).tokens,
  }
  sample = dataclasses.asdict(found.result.samples[0])
  for name, text in written.items():
    row = np.asarray(text)[0, 4:].tolist()
    assert sample[name] == tokenizer.decode(row, skip_special_tokens=False)
  assert not sample['cut'] and not sample['healed']


def test_the_page_and_the_screen_speak_of_tokens(run):
  found, _ = run
  html = (found.path / 'report.html').read_text()
  for part in (
    'to change at most 30',
    'of the tokens stay the same',
    'Same tokens against FLOPs',
    'Where tokens leave',
    'with early exits',
    'share of the test tokens',
  ):
    assert part in html, part
  assert 'examples leave' not in html and 'ECE' not in html
  screen = str(found)
  changed = 100 * (1 - found.result.cascade.agreement)
  assert f'changes {changed:.2f} % of the tokens' in ' '.join(screen.split())
  assert 'executed token by token on' in ' '.join(screen.split())
  assert 'perplexity, test' in screen and 'same tokens' in screen


# ---- decisions -----------------------------------------------------------------------


@pytest.fixture(scope='module')
def seen():
  """The predictions of three exits on 30 texts, and (network, variables, texts)."""
  taps = {'a': 'layer0', 'b': 'layer1', 'c': 'layer2'}
  heads = WithHeads(MODEL, {k: Unembedding(tap, hidden=3) for k, tap in taps.items()})
  variables = zoo.randomised(jax.eval_shape(heads.init, jax.random.key(0), EXAMPLE))
  texts = np.random.default_rng(0).integers(0, 64, (30, 8))
  found = exit_predictions(heads, variables, texts, [*taps])
  return found, (heads, variables, texts)


@pytest.mark.parametrize('names', [('a',), ('c',), ('a', 'c'), ('b', 'c')])
def test_a_part_of_the_exits_is_a_network_that_has_no_others(names, seen):
  p, network = seen
  found, expected = early_text.among(p, names), exit_predictions(*network, names)
  assert found.exits == expected.exits and found.whole == expected.whole
  np.testing.assert_allclose(found.cost, expected.cost, rtol=1e-12)
  np.testing.assert_array_equal(found.scores, expected.scores)
  np.testing.assert_array_equal(
    found.logits.argmax(-1) == found.labels,
    expected.logits.argmax(-1) == expected.labels,
  )


def table(right, cost, heads=1.0, n=400):
  """Predictions whose exits are right on so many of n samples, the surest ones."""
  scores = np.tile(np.linspace(1, 0, n), (len(right), 1)).astype(np.float32)
  logits = np.zeros((len(right) + 1, n, 2), np.float32)
  for k, share in enumerate(right):
    logits[k, : round(share * n), 0] = 1
    logits[k, round(share * n) :, 1] = 1
  logits[-1, :, 0] = 1
  names = (*(f'exit{i}' for i in range(len(right))), 'main')
  whole = cost[-1] - heads * len(right)
  return Predictions(
    names, logits, np.zeros(n, int), scores, np.asarray(cost, float), whole
  )


def test_the_exits_that_save_most_are_used():
  """The second head costs more than it saves beside the first, or the other way."""
  p = table((0.5, 0.52), (4.0, 11.0, 14.0), heads=2.0)
  used = early_text.decide(p, 'drop', 0.0, shared=False)
  assert [*used] == ['exit0']
  _, reached = early_text.reach(p, used)
  assert reached.accuracy == 1
  assert reached.cost == pytest.approx(0.5 * 4 + 0.5 * 12)
  every = [
    early_text.choose(early_text.among(p, names), 'drop', 0.0)
    for names in early_text.subsets(p)
  ]
  assert reached.cost == min(each.held_out.cost for each in every)


def test_without_an_exit_that_saves_the_network_answers_alone():
  p = table((0.1,), (9.0, 14.0), heads=4.0)
  assert early_text.decide(p, 'drop', 1.0, shared=True) == {}
  part, reached = early_text.reach(p, {})
  assert reached.cost == p.whole == 10 and reached.accuracy == 1
  assert part.exits == ('exit0', 'main')


def test_a_budget_takes_the_exits_that_change_least():
  p = table((0.5, 0.9), (4.0, 7.0, 14.0), heads=2.0)
  used = early_text.decide(p, 'budget', 0.65, shared=False)
  _, reached = early_text.reach(p, used)
  assert reached.cost <= 6.5
  others = []
  for names in early_text.subsets(p):
    part = early_text.among(p, names)
    if part.cost[0] <= 6.5:
      others.append(early_text.choose(part, 'budget', 0.65).held_out.accuracy)
  assert reached.accuracy == max(others) > 0.9
  with pytest.raises(ValueError, match='below the floor'):
    early_text.decide(p, 'budget', 0.3, shared=False)


def test_of_many_exits_pairs_and_all_are_tried():
  p = table((0.5,) * 7, range(1, 9), heads=0.1)
  found = [*early_text.subsets(p)]
  assert sorted({len(names) for names in found}) == [1, 2, 7]
  few = table((0.5,) * 3, range(1, 5), heads=0.1)
  expected = itertools.chain.from_iterable(
    itertools.combinations(few.exits[:-1], k) for k in (1, 2, 3)
  )
  assert [*early_text.subsets(few)] == [*expected]


def test_a_threshold_is_that_of_every_exit():
  p = table((0.5, 0.9), (4.0, 7.0, 14.0))
  assert early_text.decide(p, 'threshold', 0.75, shared=True) == {
    'exit0': 0.75,
    'exit1': 0.75,
  }


# ---- what is refused -----------------------------------------------------------------


@pytest.mark.parametrize(
  ('options', 'message'),
  [
    ({'risk': 0.01}, 'risk: expected a drop, a budget or a threshold for a language'),
    ({'milliseconds': 1.0}, 'milliseconds: expected a drop, a budget or a threshold'),
    ({'confidence': 'patience'}, "entropy or margin for a language .*, got 'patience'"),
    ({'confidence': 'learned'}, "entropy or margin for a language .*, got 'learned'"),
    ({'hidden': 0}, 'hidden: expected 1 or more for a language model, got 0'),
    ({'regime': 'joint', 'dropout': 0.1}, 'regime, dropout: expected the default for'),
    ({'taps': ('layer3',)}, 'expected some of layer0, layer1, layer2, .*, got layer3'),
    ({'taps': ('block1',)}, 'of decoder_tiny before the last, got block1'),
  ],
)
def test_what_does_not_suit_texts_is_refused_before_anything_is_written(
  options, message, folder, tmp_path
):
  own = config(folder, tmp_path / 'run', SideNetOptions(**options))
  with pytest.raises(ConfigError, match=message):
    rounds.run(own, show=False)
  assert not (tmp_path / 'run').exists()


def test_a_network_without_a_tap_before_its_last_is_told_so(folder, tmp_path):
  one = {'scan': True, 'pretrained': None, 'model_args': ('segments=1',)}
  own = config(folder, tmp_path / 'run', **one)
  with pytest.raises(ConfigError, match='no tap before its last, .*leave out --scan'):
    rounds.run(own, show=False)
  assert not (tmp_path / 'run').exists()


def test_test_texts_that_cannot_be_halved_are_refused(folder, tmp_path):
  options = SideNetOptions(decide_on='test')
  job = prepare(config(folder, tmp_path, options), show=False)
  one = {name: rows[:1] for name, rows in job.images.test.items()}
  job = job._replace(images=job.images._replace(test=one))
  with pytest.raises(DataError, match='expected two rows of test texts or more, half'):
    early_text.run(job)
  assert not (tmp_path / 'config.json').exists()
