"""GGUF files: rows in pairs, scales with 1 added, quantised blocks, bad files."""

import json
import zlib
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from depthprune.models import llamacpp, pretrained
from depthprune.storage.files import CheckpointError
from tests import masking as m

gguf = pytest.importorskip('gguf')
GOLDEN = json.loads((Path(__file__).parent / 'golden' / 'decoders.json').read_text())
OWN = {name: own for own, name in llamacpp.NAMES.items()}


def drawn(name, shape):
  """The tensor of a name; golden/make_decoders.py has the same lines."""
  draw = np.random.default_rng(zlib.crc32(name.encode()))
  return (0.5 * draw.standard_normal(shape)).astype(np.float32)


def paired(x, heads):
  """The rows of a head as llama.cpp has them: each beside the one it is turned with."""
  return x.reshape(heads, 2, -1, x.shape[-1]).swapaxes(1, 2).reshape(x.shape)


def own_name(name):
  """'model.layers.1.mlp.up_proj.weight' → 'blk.1.ffn_up.weight'."""
  start, _, leaf = name.rpartition('.')
  if start in OWN:
    return f'{OWN[start]}.{leaf}'
  layer, module = start.removeprefix('model.layers.').split('.', 1)
  return f'blk.{layer}.{OWN[module]}.{leaf}'


@pytest.fixture
def written(tmp_path):
  """written(kind, **entries) -> the path of a small network, under other names."""

  def write(kind, tensors=(), texts=None, **entries):
    known = GOLDEN['networks'][kind]
    config = {**known['config'], **entries}
    path = tmp_path / 'small.gguf'
    writer = gguf.GGUFWriter(path, config['model_type'])
    for key, entry in llamacpp.ENTRIES.items():
      value, name = config.get(key), f'{config["model_type"]}.{entry}'
      if isinstance(value, float):
        writer.add_float32(name, value)
      elif value is not None:
        writer.add_uint32(name, value)
    for name, shape in known['shapes'].items():
      x = drawn(name, shape)
      if kind == 'gemma' and name.endswith('norm.weight'):
        x = x + 1
      for part, key in (('q', 'num_attention_heads'), ('k', 'num_key_value_heads')):
        if kind == 'llama' and f'{part}_proj' in name:
          x = paired(x, config[key] or config['num_attention_heads'])
      writer.add_tensor(own_name(name), x)
    for name, x, kind_of in tensors:
      writer.add_tensor(name, x, raw_dtype=kind_of)
    if texts:
      writer.add_tokenizer_model(texts['model'])
      if isinstance(texts['pre'], str):
        writer.add_tokenizer_pre(texts['pre'])
      else:
        writer.add_array('tokenizer.ggml.pre', texts['pre'])
      writer.add_token_list(texts['tokens'])
      writer.add_token_types(texts['types'])
      writer.add_token_merges(texts['merges'])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path

  return write


@pytest.mark.parametrize('kind', ['llama', 'qwen2', 'qwen3', 'gemma'])
def test_a_file_holds_the_network_that_was_converted(kind, written):
  path, known = written(kind), GOLDEN['networks'][kind]
  model = pretrained.decoder(path)
  variables = pretrained.load(path, model)
  logits = m.quick(model.apply)(variables, jnp.asarray(GOLDEN['tokens']))['main']
  np.testing.assert_allclose(logits, known['logits'], rtol=0, atol=1e-4)


def test_without_a_number_of_keys_every_head_has_one(written):
  read = llamacpp.read(written('llama', num_key_value_heads=None))
  name = 'model.layers.0.self_attn.k_proj.weight'
  np.testing.assert_array_equal(read[name], drawn(name, read[name].shape))


def test_blocks_are_dequantised_and_left_over_tensors_named(written):
  x = drawn('x', (4, 64))
  kind = gguf.GGMLQuantizationType.Q8_0
  model = pretrained.decoder(written('llama'))
  path = written('llama', [('blk.9.ffn_up.weight', gguf.quantize(x, kind), kind)])
  name = 'model.layers.9.mlp.up_proj.weight'
  got = llamacpp.read(path)[name]
  np.testing.assert_allclose(got, x, rtol=0, atol=0.01)
  assert got.dtype == np.float32 and not np.array_equal(got, x)
  with pytest.raises(ValueError, match=f'1 unused tensors: {name}'):
    pretrained.load(path, model)


def test_a_quantisation_that_is_unknown_is_named(written):
  kind = gguf.GGMLQuantizationType.Q8_1
  block = np.zeros((2, gguf.GGML_QUANT_SIZES[kind][1]), np.uint8)
  path = written('llama', [('blk.0.odd.weight', block, kind)])
  with pytest.raises(ValueError, match=r'blk\.0\.odd\.weight: cannot be read as Q8_1'):
    llamacpp.read(path)


def test_files_of_other_kinds_are_refused(written, tmp_path):
  path = written('llama', model_type='mamba')
  with pytest.raises(ValueError, match="is 'mamba'; expected one of llama"):
    pretrained.decoder(path)
  path = tmp_path / 'other.gguf'
  path.write_bytes(b'GGUF and then nothing of the kind')
  with pytest.raises(ValueError, match=r'other\.gguf: cannot be read as GGUF'):
    llamacpp.config(path)
  with pytest.raises(ValueError, match=r'none\.gguf: expected a file, got none'):
    llamacpp.config(tmp_path / 'none.gguf')


# ---- texts ---------------------------------------------------------------------------


def texts(**other):
  """A tokenizer of all bytes, two merges and a token that ends a text."""
  alphabet = sorted(
    pytest.importorskip('tokenizers').pre_tokenizers.ByteLevel.alphabet()
  )
  tokens = [*alphabet, 'th', 'Ġth', '<|end|>']
  types = [1] * 258 + [llamacpp.SPECIAL]
  same = {'model': 'gpt2', 'pre': 'smollm', 'merges': ['t h', 'Ġ th']}
  return {**same, 'tokens': tokens, 'types': types, **other}


@pytest.mark.parametrize(
  ('pre', 'text', 'expected'),
  [
    ('smollm', 'a the<|end|>', ['a', 'Ġth', 'e', '<|end|>']),
    ('smollm', 'th  th', ['th', 'Ġ', 'Ġth']),
    ('smollm', '\n 1', ['Ċ', 'Ġ', '1']),
    ('gpt-2', 'é', ['Ã', '©']),
  ],
)
def test_texts_become_tokens_and_texts_again(pre, text, expected, written):
  tokenizer = llamacpp.tokenizer(written('llama', texts=texts(pre=pre)))
  encoded = tokenizer.encode(text)
  assert encoded.tokens == expected
  assert tokenizer.decode(encoded.ids, skip_special_tokens=False) == text
  assert max(encoded.ids) < tokenizer.get_vocab_size() == 259


def test_digits_are_apart_where_the_network_has_learnt_them_so(written):
  made = lambda pre: llamacpp.tokenizer(
    written(
      'llama',
      texts=texts(
        pre=pre,
        merges=['1 2'],
        tokens=[*texts()['tokens'][:256], '12'],
        types=[1] * 257,
      ),
    )
  )
  assert made('smollm').encode('12').tokens == ['1', '2']
  assert made('gpt-2').encode('12').tokens == ['12']


@pytest.mark.parametrize(
  ('other', 'message'),
  [
    (None, 'its tokenizer is None with the splits of'),
    (
      {'model': 'llama'},
      "its tokenizer is 'llama' with the splits of 'smollm', expected",
    ),
    ({'pre': 'tekken'}, "with the splits of 'tekken', expected .* tokenizer.json"),
    ({'pre': ['smollm']}, r"with the splits of \['smollm'\], expected"),
    ({'merges': ['t q']}, 'its tokenizer cannot be read'),
    (
      {'tokens': ['a', 'b'], 'types': [1, 1], 'merges': ['a b']},
      r"its tokenizer cannot be read .*'a b' are merged to no token",
    ),
    ({'types': [1] * 258}, 'its tokenizer cannot be read .*shorter'),
  ],
)
def test_a_tokenizer_that_cannot_be_made(other, message, written):
  path = written('llama', texts=other if other is None else texts(**other))
  with pytest.raises(CheckpointError, match=message):
    llamacpp.tokenizer(path)
