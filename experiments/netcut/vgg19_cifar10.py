"""NetCut, VGG-19 on CIFAR-10.

Paper: arXiv 2004.08172, 150 epochs, beta 0, .001, .01, .1.
`--full` is that size, for an accelerator, and not yet run; the one for a CPU
(256 images, 1 epoch) shows that all of it runs.

  python -m experiments.netcut.vgg19_cifar10 --full

TFDS_DATA_DIR says where the data are; `--minutes 10` stops and goes on with the next
call.
"""

import dataclasses

from depthprune.run.config import RECIPES
from experiments.netcut import sweep
from experiments.pieces import Arguments, Case, main

FULL = dataclasses.replace(RECIPES['netcut'], data='cifar10', model='vgg19')
SMALL = {'gate_epochs': 1, 'subset': 256}


def run(given: Arguments) -> list[Case]:
  return sweep.main('vgg19_cifar10', FULL, SMALL, given)


if __name__ == '__main__':
  main(__doc__, run)
