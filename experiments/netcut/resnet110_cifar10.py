"""NetCut, ResNet-110 with 54 heads on CIFAR-10.

Paper: arXiv 2004.08172, 150 epochs, beta 0, .002, .004, .008, .01.
`--full` is that size, for an accelerator, and not yet run; the one for a CPU
(256 images, 1 epoch) shows that all of it runs.

  python -m experiments.netcut.resnet110_cifar10 --full

TFDS_DATA_DIR says where the data are; `--minutes 10` stops and goes on with the next
call.
"""

import dataclasses

from depthprune.run.config import RECIPES
from experiments.netcut import sweep
from experiments.pieces import Arguments, Case, main

FULL = dataclasses.replace(
  RECIPES['netcut'], data='cifar10', model='resnet110', augment=True
)
OPTIONS = [{'beta': beta} for beta in (0.0, 0.002, 0.004, 0.008, 0.01)]
SMALL = {'gate_epochs': 1, 'subset': 256}


def run(given: Arguments) -> list[Case]:
  return sweep.main('resnet110_cifar10', FULL, SMALL, given, OPTIONS)


if __name__ == '__main__':
  main(__doc__, run)
