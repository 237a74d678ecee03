"""SideNets on a pretrained ResNet-20, CIFAR-10: five heads after blocks 2 to 7 of 9.

As `resnet56_cifar10`, with 91.73 % on the test images. A small network has less to
save: its heads weigh more, and its early blocks know less. CPU-sized: frozen on 20,000
images, mixed on 10,000 for five epochs.

  TFDS_DATA_DIR=../shared/data/tfds python -m experiments.sidenet.resnet20_cifar10
"""

import dataclasses

from experiments.pieces import Arguments, Case, main
from experiments.sidenet import compare
from experiments.sidenet.resnet56_cifar10 import CONFIG, LESS

FULL = dataclasses.replace(
  CONFIG,
  model='resnet20',
  pretrained='../shared/data/checkpoints/resnet20_cifar10.npz',
)

SMALL = {
  'frozen': {**LESS, 'subset': 20_000},
  'mixed': {**LESS, 'subset': 10_000, 'finetune_epochs': 5},
}


def run(given: Arguments) -> list[Case]:
  return compare.main('resnet20_cifar10', FULL, SMALL, given)


if __name__ == '__main__':
  main(__doc__, run)
