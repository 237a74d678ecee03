"""GGUF files of decoders, as llama.cpp has them: dequantised, under other names.

What is read here is what a folder of transformers holds: a config and its tensors.
"""

from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

from depthprune.storage import files
from depthprune.storage.files import CheckpointError

ARCHITECTURES = ('llama', 'qwen2', 'qwen3', 'gemma')  # Mistral's files say llama
ENTRIES = {
  'max_position_embeddings': 'context_length',
  'hidden_size': 'embedding_length',
  'num_hidden_layers': 'block_count',
  'intermediate_size': 'feed_forward_length',
  'num_attention_heads': 'attention.head_count',
  'num_key_value_heads': 'attention.head_count_kv',
  'head_dim': 'attention.key_length',
  'rms_norm_eps': 'attention.layer_norm_rms_epsilon',
  'rope_theta': 'rope.freq_base',
  'rope_scaling': 'rope.scaling.type',
  'sliding_window': 'attention.sliding_window',
}
NAMES = {
  'token_embd': 'model.embed_tokens',
  'output_norm': 'model.norm',
  'output': 'lm_head',
  'attn_norm': 'input_layernorm',
  'attn_q': 'self_attn.q_proj',
  'attn_k': 'self_attn.k_proj',
  'attn_v': 'self_attn.v_proj',
  'attn_output': 'self_attn.o_proj',
  'attn_q_norm': 'self_attn.q_norm',
  'attn_k_norm': 'self_attn.k_norm',
  'ffn_norm': 'post_attention_layernorm',
  'ffn_gate': 'mlp.gate_proj',
  'ffn_up': 'mlp.up_proj',
  'ffn_down': 'mlp.down_proj',
}
SPECIAL = 3  # the type of a token that stands for no text


def config(path: str | Path) -> dict[str, Any]:
  """Returns the entries of config.json that a GGUF file of a decoder states.

  Raises:
    CheckpointError: the file cannot be read, or holds another architecture.
    ModuleNotFoundError: the package gguf is missing.
  """
  _, kind, stated, reader = _opened(Path(path))
  named = {key: stated.get(f'{kind}.{entry}') for key, entry in ENTRIES.items()}
  entries = {key: value for key, value in named.items() if value is not None}
  shapes = {tensor.name: tensor.shape for tensor in reader.tensors}
  rows = shapes.get('token_embd.weight', (0, 0))[-1]  # in the order of GGUF
  return {
    **entries,
    'model_type': 'mistral' if 'sliding_window' in entries else kind,
    'vocab_size': int(rows),
    'tie_word_embeddings': 'output.weight' not in shapes,
  }


def read(path: str | Path) -> dict[str, np.ndarray]:
  """Reads the tensors of a GGUF file of a decoder, dequantised to floats.

  Needs the package gguf (`pip install 'depthprune[gguf]'`). The rows of queries and
  keys, which files of Llama hold in pairs, and the scales of Gemma, which they hold
  with 1 added, are as transformers has them.

  Args:
    path: the file.

  Returns:
    {name in transformers: array}. A tensor that is unknown keeps its name.

  Raises:
    CheckpointError: the file cannot be read, holds another architecture, or a tensor
      whose quantisation is unknown.
    ModuleNotFoundError: the package gguf is missing.
  """
  gguf, kind, stated, reader = _opened(Path(path))
  heads = stated.get(f'{kind}.attention.head_count') or 0
  groups = stated.get(f'{kind}.attention.head_count_kv') or heads
  counts = {'attn_q': heads, 'attn_k': groups}
  tensors = {}
  for tensor in reader.tensors:
    try:
      x = np.asarray(gguf.dequantize(tensor.data, tensor.tensor_type))
    except Exception as error:  # a kind without code, or data that is cut short
      raise CheckpointError(
        f'{path}: {tensor.name}: cannot be read as {tensor.tensor_type.name} '
        f'({error!s:.200})'
      ) from error
    module = tensor.name.split('.')[-2] if '.' in tensor.name else ''
    if kind == 'gemma' and module.endswith('norm'):
      x = x - 1
    if kind == 'llama' and (count := counts.get(module)) and len(x) % (2 * count) == 0:
      pairs = x.reshape(count, len(x) // count // 2, 2, *x.shape[1:])
      x = pairs.swapaxes(1, 2).reshape(x.shape)
    tensors[_name(tensor.name)] = x
  return tensors


def tokenizer(path: str | Path) -> Any:
  """Returns the tokenizer that a GGUF file holds, a `tokenizers.Tokenizer`.

      tokens = tokenizer(path).encode('Once upon a time').ids

  Tokens that stand for no text, such as the end of one, are recognised by their names.
  Needs the packages gguf and tokenizers (`pip install 'depthprune[gguf,text]'`).

  Args:
    path: the file.

  Raises:
    CheckpointError: the file cannot be read, has no tokenizer, or one of another kind
      than byte-level BPE with the splits of GPT-2 or SmolLM.
    ModuleNotFoundError: a package is missing.
  """
  _, _, stated, reader = _opened(Path(path))
  try:
    lib = import_module('tokenizers')
  except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
      f"{path}: its tokenizer needs tokenizers: pip install 'depthprune[text]'",
      name='tokenizers',
    ) from error
  listed = lambda name: reader.fields[f'tokenizer.ggml.{name}'].contents()
  kind = stated.get('tokenizer.ggml.model'), stated.get('tokenizer.ggml.pre', 'gpt-2')
  digits = {'smollm': True, 'gpt-2': False}
  if kind[0] != 'gpt2' or kind[1] not in [*digits]:  # a list has no hash
    raise CheckpointError(
      f'{path}: its tokenizer is {kind[0]!r:.40} with the splits of {kind[1]!r:.40}, '
      "expected 'gpt2' with those of gpt-2 or smollm: read the tokenizer.json of the "
      'network instead'
    )
  try:
    tokens, pairs = listed('tokens'), listed('merges')
    vocab = {token: i for i, token in enumerate(tokens)}
    if strange := [pair for pair in pairs if pair.replace(' ', '') not in vocab]:
      raise ValueError(f'{strange[0]!r} are merged to no token')  # where BPE panics
    merges = [tuple(pair.split(' ')) for pair in pairs]
    made = lib.Tokenizer(lib.models.BPE(vocab, merges))
    types = zip(tokens, listed('token_type'), strict=True)
    special = [token for token, one in types if one == SPECIAL]
  except Exception as error:  # a part is missing, or does not fit the others
    raise CheckpointError(
      f'{path}: its tokenizer cannot be read ({error!s:.200}); get the file again'
    ) from error
  split = lib.pre_tokenizers
  steps = [split.Digits(individual_digits=True)] * digits[kind[1]]
  made.pre_tokenizer = split.Sequence([*steps, split.ByteLevel(add_prefix_space=False)])
  made.decoder = lib.decoders.ByteLevel()
  made.add_special_tokens(special)
  return made


def _opened(path: Path) -> tuple[Any, str, dict[str, Any], Any]:
  """Opens a file: the package, its architecture, what it states but lists, a reader."""
  files.regular(path, CheckpointError)
  try:
    gguf = import_module('gguf')
  except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
      f"{path}: reading it needs gguf: pip install 'depthprune[gguf]'", name='gguf'
    ) from error
  try:
    reader = gguf.GGUFReader(path)
    fields = {k: f for k, f in reader.fields.items() if len(f.data) == 1}
    stated = {key: field.contents() for key, field in fields.items()}
  except Exception as error:  # the reader checks little of what it reads
    raise CheckpointError(
      f'{path}: cannot be read as GGUF ({error!s:.200}); get the file again'
    ) from error
  kind = stated.get('general.architecture')
  if kind not in ARCHITECTURES:
    raise CheckpointError(
      f'{path}: general.architecture is {kind!r:.80}; expected one of '
      f'{", ".join(ARCHITECTURES)}'
    )
  return gguf, kind, stated, reader


def _name(name: str) -> str:
  """'blk.3.attn_q.weight' → 'model.layers.3.self_attn.q_proj.weight'."""
  *start, module, leaf = name.split('.') if '.' in name else ('', name, '')
  layer = f'model.layers.{start[1]}.' if len(start) == 2 and start[0] == 'blk' else ''
  return f'{layer}{NAMES[module]}.{leaf}' if module in NAMES else name
