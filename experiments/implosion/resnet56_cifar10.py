"""Network Implosion, ResNet-56 on CIFAR-10: 12 of 27 units, 42.86 % of the layers.

Paper: arXiv 1906.03826. `--full`: 182 epochs with priorities, then three times 4 units
are erased and the rest is retrained for 60, at the initial learning rate each time; the
control trains the same shape (the depth of ResNet-32) from scratch for all 362. Goal:
no drop against 93.4 %, and half a point above from scratch. It takes an accelerator;
the size for a CPU (512 images, 2 + 3 × 1 epochs) shows that all of it runs.

  python -m experiments.implosion.resnet56_cifar10 --full --minutes 10

TFDS_DATA_DIR says where the data are. Each call goes on where the last one ended.
"""

import dataclasses

from depthprune.options import Implosion
from depthprune.run.config import RECIPES
from experiments.implosion import compare
from experiments.implosion.compare import METHODS
from experiments.pieces import Arguments, Case, main

FULL = dataclasses.replace(
  RECIPES['implosion'],
  options=Implosion(depth=15, per_round=4),
  data='cifar10',
  model='resnet56',
  gate_epochs=182,
  finetune_epochs=60,
)
SMALL = {'gate_epochs': 2, 'finetune_epochs': 1, 'subset': 512}


def run(given: Arguments) -> list[Case]:
  return compare.main('resnet56_cifar10', FULL, SMALL, (*METHODS, 'greedy'), given)


if __name__ == '__main__':
  main(__doc__, run)
