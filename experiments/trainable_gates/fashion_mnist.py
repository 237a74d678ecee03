"""Trainable gates on fashion_mnist, CPU-sized: accuracy against FLOPs, with controls.

Paper: arXiv 1904.10921 (no fashion_mnist there; the network and the sizes are ours).
Network: ResNet-8 (CIFAR type, option A, widths 16/32/64), 3,000 training images.
Epochs: 10 before anything is cut, then 3 with gates and 3 of fine-tuning; the controls
are fine-tuned for 6, the network from scratch is trained for 16.

  TFDS_DATA_DIR=../shared/data/tfds python -m experiments.trainable_gates.fashion_mnist

About 25 minutes on 2 busy cores; a call that is stopped goes on where it was.
Found: gates, l1 and random lie within two standard deviations of each other, one to
two points below the unpruned network at 50 %; from scratch is ahead of all, because so
few images and epochs leave the network that is pruned far from converged. A size at
which gates could show an advantage needs an accelerator.
"""

from depthprune.run.config import Config
from experiments.pieces import Arguments, Case, main
from experiments.trainable_gates import compare

CONFIG = Config(
  model='resnet8',
  data='fashion_mnist',
  subset=3000,
  train_epochs=10,
  gate_epochs=3,
  finetune_epochs=3,
)
TARGETS = 0.75, 0.5, 0.25


def run(given: Arguments) -> list[Case]:
  """The only size there is, also with --full."""
  given = given._replace(full=False)
  about = 'fashion_mnist', CONFIG, {}, TARGETS, compare.METHODS
  return compare.main(*about, given)


if __name__ == '__main__':
  main(__doc__, run)
