"""Network Implosion in one shot: a pretrained ResNet-56, 1 to 12 of 27 units erased.

Paper: arXiv 1906.03826 (which retrains after erasing; here nothing is retrained, to see
what the order is worth). Weights: akamaster/pytorch_resnet_cifar10, 93.39 % on the
CIFAR-10 test images; decisions on the first half of these, accuracy on the second.
Before anything is erased, 100 steps of 128 images at 0.01 train priorities and weights
together; all curves start from that network.

  TFDS_DATA_DIR=../shared/data/tfds python -m experiments.implosion.resnet56_oneshot

CPU-sized: 256 images decide, 1,000 report, 2 batches for statistics. `--full`, for an
accelerator: 10 epochs of priorities, and all images of both halves. `--minutes 10`
stops and goes on with the next call. Found, in 35 minutes on one core: 92.4 % before;
after 12 units greedy 77.1, priority 65.3, random 52.6 to 67.8, drop 53.6 %.
"""

import dataclasses
from pathlib import Path

from depthprune.run.config import RECIPES
from experiments.implosion import curve
from experiments.implosion.curve import Sizes
from experiments.pieces import Arguments, Case, main

CONFIG = dataclasses.replace(
  RECIPES['implosion'],
  model='resnet56',
  data='cifar10',
  pretrained='../shared/data/checkpoints/resnet56_cifar10.npz',
  subset=12_800,
  gate_epochs=1,
  learning_rate=0.01,
  weight_decay=1e-4,
  workdir='runs/implosion/resnet56_oneshot',
)
SIZES = Sizes(deciding=256, reporting=1000, calibration=2)
ERASED = 12  # 24 of 56 layers, the paper's 42.86 %
SERIES = (
  ('priority', 0),
  ('random', 0),
  ('random', 1),
  ('random', 2),
  ('drop', 0),
  ('greedy', 0),
)
RESULTS = Path(__file__).parent / 'results'


def run(given: Arguments) -> list[Case]:
  config, sizes, name = CONFIG, SIZES, 'resnet56_oneshot.json'
  if given.full:
    config = dataclasses.replace(
      CONFIG, subset=None, gate_epochs=10, workdir=f'{CONFIG.path}_full'
    )
    sizes, name = Sizes(5000, 5000, 50), 'resnet56_oneshot_full.json'
  return curve.run(config, sizes, ERASED, SERIES, RESULTS / name, given)


if __name__ == '__main__':
  main(__doc__, run)
