"""Auxiliary training of a small ResNet, fashion_mnist, beside its controls.

Paper: arXiv 1909.02214 (compact networks on CIFAR and ImageNet there). ResNet-8, 75,000
parameters, beside a path of 64 channels. CPU-sized: 10,000 images at 14×14, 15 epochs.
`--full`, for an accelerator: all images at 28×28, 20 epochs.

  python -m experiments.auxiliary.resnet8_fashion_mnist

3 seeds, about 20 minutes on one core. TFDS_DATA_DIR says where the data are;
`--minutes 10` stops and goes on with the next call. Goal: `search` above `alone` by
more than a standard deviation. Found: `all` is (86.2 against 85.7 %), `search` (86.0)
is not, and `longer` (86.7), with the same training FLOPs, is ahead of both: 15 short
epochs are far from converged. Searched gates hover about zero but for the last tap's.
"""

import dataclasses

from depthprune.config import RECIPES
from experiments.auxiliary.compare import main

FULL = dataclasses.replace(
  RECIPES['auxiliary'], data='fashion_mnist', model='resnet8', gate_epochs=20
)
SMALL = {'subset': 10_000, 'resize': 14, 'gate_epochs': 15}

if __name__ == '__main__':
  main(__doc__, 'resnet8_fashion_mnist', FULL, SMALL)
