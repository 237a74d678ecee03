"""Network Implosion from a pretrained ResNet-56, CIFAR-10: 12 of 27 units erased.

Paper: arXiv 1906.03826. As `resnet56_cifar10`, but from the weights of
akamaster/pytorch_resnet_cifar10 (93.39 %, 200 epochs), so that it fits in ten minutes
of an accelerator: 10 epochs with priorities, then three times 4 units are erased and
the rest is retrained for 15. The control, the same shape from scratch, has the 55
epochs of this run and none of the pretraining; a ResNet-32 (as deep) trained for 200
epochs by the same authors has 92.63 %.

  python -m experiments.implosion.resnet56_pretrained --full --minutes 10

`--seeds 0` and other seeds beside it share a device. The weights have seen the images
that are held out here, so what is said of those is too good; with `priority` they
decide nothing. The size for a CPU (512 images, 1 + 3 × 1 epochs) shows that it runs.
"""

import dataclasses

from experiments.implosion import compare
from experiments.implosion.resnet56_cifar10 import FULL
from experiments.pieces import Arguments, Case, main

PRETRAINED = dataclasses.replace(
  FULL,
  pretrained='../shared/data/checkpoints/resnet56_cifar10.npz',
  gate_epochs=10,
  finetune_epochs=15,
)
SMALL = {'gate_epochs': 1, 'finetune_epochs': 1, 'subset': 512}

METHODS = ('priority', 'scratch', 'random')


def run(given: Arguments) -> list[Case]:
  return compare.main('resnet56_pretrained', PRETRAINED, SMALL, METHODS, given)


if __name__ == '__main__':
  main(__doc__, run)
