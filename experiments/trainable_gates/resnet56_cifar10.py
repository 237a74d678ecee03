"""Trainable gates, ResNet-56 on CIFAR-10, at 2.1 and 2.57 times fewer FLOPs.

Papers: arXiv 1904.10921 (gates), 2301.05219 (the control). Weights:
akamaster/pytorch_resnet_cifar10, 93.39 % on the test images. `--full`, for an
accelerator: 15 epochs with gates and 30 after the cut; the control cuts by uniform L1
norm and is fine-tuned for 45. Both have a cosine from 0.01 (half of the learning rate).

  python -m experiments.trainable_gates.resnet56_cifar10 --full --minutes 10

TFDS_DATA_DIR says where the data are; each call goes on where the last one ended. The
size for a CPU (512 images, 1 + 1 epochs) shows that all of it runs. Not yet run in
full. Goal: above the control, of which 93.78 -> 93.74 % at 1.99 times is published;
others are 93.53 -> 93.77 / 93.64 % at 2.13 / 2.57 times (DepGraph, sparse learning).
The weights have seen the images that are held out here; neither method decides by them.
"""

from depthprune.run.config import Config
from experiments.pieces import Arguments, Case, main
from experiments.trainable_gates import compare

FULL = Config(
  model='resnet56',
  data='cifar10',
  pretrained='../shared/data/checkpoints/resnet56_cifar10.npz',
  gate_epochs=15,
  finetune_epochs=30,
  learning_rate=0.02,
)
SMALL = {'subset': 512, 'gate_epochs': 1, 'finetune_epochs': 1}
TARGETS = round(1 / 2.1, 4), round(1 / 2.57, 4)
METHODS = 'gates', 'l1'


def run(given: Arguments) -> list[Case]:
  return compare.main('resnet56_cifar10', FULL, SMALL, TARGETS, METHODS, given)


if __name__ == '__main__':
  main(__doc__, run)
