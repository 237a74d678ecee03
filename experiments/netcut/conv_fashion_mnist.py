"""NetCut, a plain convolutional network on fashion_mnist.

Paper: arXiv 2004.08172 (15 layers of 50 filters 5×5, MNIST). CPU-sized: 10 layers of 8
filters 5×5 on images of 14×14, 10,000 of them, 10 epochs; as these are 780 steps, the
importance has ten times the learning rate. `--full`: the paper's network and 50 epochs.

  TFDS_DATA_DIR=../shared/data/tfds python -m experiments.netcut.conv_fashion_mnist

3 seeds, about 30 minutes on one core; `--minutes 10` stops and goes on with the next
call. Found: max w above .95 at every beta, so the cut moves the accuracy by 0.03 point
at most; a layer is worth more than 0.1 nats in two of three seeds.
"""

import dataclasses

from depthprune.options import NetCut
from depthprune.run.config import RECIPES
from experiments.netcut import sweep
from experiments.pieces import Arguments, Case, main

FULL = dataclasses.replace(
  RECIPES['netcut'], data='fashion_mnist', model='convnet15', gate_epochs=50
)
SMALL = {
  'options': NetCut(importance_learning_rate=0.01),
  'model': 'convnet10x8',
  'gate_epochs': 10,
  'subset': 10_000,
  'resize': 14,
}


def run(given: Arguments) -> list[Case]:
  return sweep.main('conv_fashion_mnist', FULL, SMALL, given)


if __name__ == '__main__':
  main(__doc__, run)
