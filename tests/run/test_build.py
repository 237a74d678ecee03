"""Networks that write, in runs: their sizes, their texts, and what is refused."""

import json

import jax
import numpy as np
import pytest

from depthprune.data.dataset import DataError
from depthprune.methods import netcut
from depthprune.models import llamacpp
from depthprune.models.decoder import Decoder
from depthprune.report import tables
from depthprune.run import build, rounds
from depthprune.run.config import default
from depthprune.run.job import prepare
from depthprune.train.options import ConfigError

tokenizers = pytest.importorskip('tokenizers')
WORDS = 'the cut network writes what a whole one would have written'.split()


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  """40 texts of ten words each, and a tokenizer with a token for each word."""
  path = tmp_path_factory.mktemp('texts')
  rng = np.random.default_rng(0)
  for i in range(40):
    (path / f'{i}.txt').write_text(' '.join(rng.choice(WORDS, 10)))
  vocab = {word: i for i, word in enumerate(['<|endoftext|>', *WORDS])}
  made = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab, '<|endoftext|>'))
  made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
  made.save(str(path / 'tokenizer.json'))
  return path


def config(folder, method='gates', **more):
  epochs = {'train_epochs': 1, 'gate_epochs': 1, 'finetune_epochs': 1}
  same = {
    'model': 'decoder_tiny',
    'data': str(folder),
    'tokenizer': str(folder / 'tokenizer.json'),
    'length': 8,
    'batch': 8,
    'optimizer': 'sgd',
    'learning_rate': 0.2,
  }
  return default(method, **{**same, **epochs, **more})


@pytest.mark.parametrize('method', ['gates', 'implosion'])
def test_a_network_that_writes_is_trained_cut_and_reported(method, folder, tmp_path):
  before_it = 0 if method == 'implosion' else 1
  own = config(folder, method, workdir=str(tmp_path), train_epochs=before_it)
  result = rounds.run(own, show=False)
  assert result.flops.after < result.flops.before
  before, after = (result.scores[when]['perplexity'] for when in ('before', 'after'))
  assert before and after and 1 < after < before < 64
  names = [row[0] for row in tables.costs(result).rows]
  assert names[0] == 'perplexity, test'
  assert len(result.samples) == 3 and set(result.samples[0].healed.split()) <= {
    '<|endoftext|>',
    *WORDS,
  }


@pytest.mark.slow
@jax.numpy_dtype_promotion('standard')  # optax.adam needs it
def test_a_network_that_writes_finds_its_depth(folder, tmp_path):
  options = netcut.NetCutOptions(force=True)
  more = {'workdir': str(tmp_path), 'train_epochs': 0, 'finetune_epochs': 0}
  result = rounds.run(config(folder, 'netcut', options=options, **more), show=False)
  (kept,) = result.rounds[-1].exits
  assert kept in {'exit1', 'exit2', 'exit3', 'exit4'} and not result.samples
  assert 1 < (result.scores['after']['perplexity'] or 0) < 64


def test_weights_say_the_sizes(folder, tmp_path):
  sizes = {'hidden_size': 16, 'num_hidden_layers': 3, 'intermediate_size': 24}
  heads = {'num_attention_heads': 4, 'num_key_value_heads': 2, 'vocab_size': 30}
  more = {'model_type': 'llama', 'max_position_embeddings': 64, 'rms_norm_eps': 1e-5}
  (tmp_path / 'config.json').write_text(json.dumps({**sizes, **heads, **more}))
  model = build.alone(config(folder, pretrained=str(tmp_path), train_epochs=0), 1)
  assert isinstance(model, Decoder)
  assert (model.depth, model.width, model.vocab) == (3, 16, 30)


def test_a_gguf_file_brings_its_tokenizer(folder, monkeypatch):
  read = tokenizers.Tokenizer.from_file(str(folder / 'tokenizer.json'))
  monkeypatch.setattr(llamacpp, 'tokenizer', lambda path: {'small.gguf': read}[path])
  monkeypatch.setattr(build, 'alone', lambda config, classes: Decoder(vocab=64))
  own = config(folder, pretrained='small.gguf', tokenizer=None, train_epochs=0)
  assert prepare(own, show=False).images.classes == 64


@pytest.mark.parametrize(
  ('more', 'error', 'message'),
  [
    ({'tokenizer': None}, DataError, 'texts need the tokenizer.json that belongs to'),
    ({'data': 'digits'}, DataError, 'decoder_tiny writes texts: expected a file or a'),
    ({'resize': 8}, DataError, 'resize: for images, these are texts: leave it out'),
    (
      {'metric': 'f1'},
      DataError,
      'metric, class_weights: for classes, these are texts',
    ),
    ({'model': 'resnet8'}, DataError, 'expected'),
    ({'length': 33}, DataError, 'length: expected at most 32 tokens, as many as dec'),
  ],
)
def test_what_does_not_suit_texts_to_write(more, error, message, folder):
  with pytest.raises(error, match=message):
    prepare(config(folder, **more), show=False)


def test_a_file_of_text_is_not_for_classes(folder):
  own = config(folder, data=str(folder / '0.txt'), model='bert_tiny')
  with pytest.raises(DataError, match='without classes are for a network that writes'):
    prepare(own, show=False)


@pytest.mark.parametrize(
  ('method', 'message'),
  [
    (
      'auxiliary',
      'exits of auxiliary tell classes: choose one of implosion, netcut, sidenet, gat',
    ),
  ],
)
def test_exits_that_classify_are_not_for_texts(method, message, folder, tmp_path):
  own = config(folder, method, workdir=str(tmp_path), train_epochs=0)
  with pytest.raises(ConfigError, match=message):
    rounds.run(own, show=False)
