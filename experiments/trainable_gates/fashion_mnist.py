"""Trainable gates on fashion_mnist, CPU-sized: accuracy against FLOPs, with controls.

Paper: arXiv 1904.10921 (no fashion_mnist there; the network and the sizes are ours).
Network: ResNet-8 (CIFAR type, option A, widths 16/32/64), 6,000 training images.
Epochs: 6 before anything is cut, then 3 with gates and 3 of fine-tuning; the controls
are fine-tuned for 6, the network from scratch is trained for 12.

  TFDS_DATA_DIR=../shared/data/tfds python -m experiments.trainable_gates.fashion_mnist

About 20 minutes on 2 cores; a call that is stopped goes on where it was.
Expected: at 75 % and 50 % gates and l1 within a point of the unpruned network (about
88 %), random and scratch below them at 25 %.
"""

from pathlib import Path

from depthprune.config import Config
from experiments.trainable_gates.compare import compare

CONFIG = Config(
  model='resnet8',
  data='fashion_mnist',
  subset=6000,
  train_epochs=6,
  gate_epochs=3,
  finetune_epochs=3,
  workdir='runs/fashion_mnist',
)
RESULT = Path(__file__).parent / 'results' / 'fashion_mnist.json'

if __name__ == '__main__':
  compare(CONFIG, targets=(0.75, 0.5, 0.25), seeds=(0, 1, 2), to=RESULT)
