"""SideNets on a pretrained ResNet-56, CIFAR-10: five heads after blocks 6 to 22 of 27.

Paper: arXiv 2007.13512 (a head with one hidden layer on a frozen ResNet). Weights:
akamaster/pytorch_resnet_cifar10, 93.39 % on the test images. They have seen all
training images, so the first half of the test images decides and the second reports.

  TFDS_DATA_DIR=../shared/data/tfds python -m experiments.sidenet.resnet56_cifar10

CPU-sized: frozen on 45,000 images and one augmented copy of each, 20 epochs of the
heads, without dropout; mixed on 5,000 images, one epoch of everything together.
`--full`, for an accelerator: 4 views, dropout 0.3, 20 epochs of the heads, 15 epochs
together on all images.
`--minutes 10` stops and goes on with the next call. Expected of frozen: at a drop of
half a point a third of the FLOPs saved (a quick reference run saved 35 %).
"""

import dataclasses

from depthprune.options import SideNet
from depthprune.run.config import RECIPES
from experiments.pieces import Arguments, Case, main
from experiments.sidenet import compare

CONFIG = dataclasses.replace(
  RECIPES['sidenet'],
  options=SideNet(drop=0.5, views=4),
  model='resnet56',
  data='cifar10',
  pretrained='../shared/data/checkpoints/resnet56_cifar10.npz',
  gate_epochs=20,
  finetune_epochs=15,
  learning_rate=0.1,
  weight_decay=5e-4,
)
LESS = {
  'options': SideNet(drop=0.5, views=2, dropout=0.0),
  'gate_epochs': 20,
  'finetune_epochs': 1,
}
SMALL = {'frozen': LESS, 'mixed': {**LESS, 'subset': 5_000}}


def run(given: Arguments) -> list[Case]:
  return compare.main('resnet56_cifar10', CONFIG, SMALL, given)


if __name__ == '__main__':
  main(__doc__, run)
