"""Network Implosion, one full erase and retrain run, CPU-sized: ResNet-20.

Paper: arXiv 1906.03826 (ResNets on CIFAR-10/100 and ImageNet there). fashion_mnist at
14×14, 5,000 images: 10 epochs with priorities, then twice 2 of the 9 units are erased
and the rest is retrained for 4. The controls erase at random, and train the shape that
was found from scratch for all 18 epochs. `--full` has all images at 28×28, 60 + 2 × 20.

  python -m experiments.implosion.resnet20_fashion_mnist

3 seeds, about 25 minutes on one core. TFDS_DATA_DIR says where the data are;
`--minutes 10` stops and goes on with the next call. Found: from scratch (84.5 %) is
ahead of priority (83.2) and random (82.4), as 18 short epochs are far from converged.
"""

import dataclasses

from depthprune.options import Implosion
from depthprune.run.config import RECIPES
from experiments.implosion import compare
from experiments.pieces import Arguments, Case, main

FULL = dataclasses.replace(
  RECIPES['implosion'],
  options=Implosion(depth=5, per_round=2),
  data='fashion_mnist',
  model='resnet20',
  gate_epochs=60,
  finetune_epochs=20,
)
SMALL = {'gate_epochs': 10, 'finetune_epochs': 4, 'subset': 5000, 'resize': 14}


def run(given: Arguments) -> list[Case]:
  return compare.main('resnet20_fashion_mnist', FULL, SMALL, compare.METHODS, given)


if __name__ == '__main__':
  main(__doc__, run)
