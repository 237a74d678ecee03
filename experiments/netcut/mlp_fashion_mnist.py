"""NetCut, MLP 20×200 on fashion_mnist, at the paper's settings.

Paper: arXiv 2004.08172 (MNIST there). Two Adams at 1e-3, batch 128, no weight decay, no
augmentation; beta 0, .001, .01, .1, and at .01 the aggregates of its ablation. The
control is a network with one head, at each of the depths that were chosen.

  TFDS_DATA_DIR=../shared/data/tfds python -m experiments.netcut.mlp_fashion_mnist

20 epochs, 3 seeds: about 35 minutes on one core. `--full` (50 epochs, 5 seeds) is for
an accelerator; `--minutes 10` stops and goes on with the next call. The authors' code:
depth 4, 4 at beta 0; 3, 2 at .01; 1, 1 at .1; test accuracy 88.2 to 89.0 %, the cut
moves it by 0.06 point at most.
"""

import dataclasses
from pathlib import Path

from depthprune.config import RECIPES
from depthprune.options import NetCut
from experiments.netcut.sweep import sweep
from experiments.pieces import arguments

CONFIG = dataclasses.replace(
  RECIPES['netcut'],
  data='fashion_mnist',
  model='mlp20x200',
  gate_epochs=20,
  workdir='runs/netcut/mlp_fashion_mnist',
)
OPTIONS = [
  *(NetCut(beta=beta) for beta in (0.0, 0.001, 0.01, 0.1)),
  NetCut(beta=0.01, aggregate='linear'),
  NetCut(beta=0.01, aggregate='geometric'),
]
DEPTHS = (1, 2, 3, 4, 5, 6)
RESULTS = Path(__file__).parent / 'results'

if __name__ == '__main__':
  given = arguments(__doc__)
  if given.full:
    config = dataclasses.replace(CONFIG, gate_epochs=50, workdir=f'{CONFIG.path}_full')
    name, seeds = 'mlp_fashion_mnist_full.json', range(5)
  else:
    config, name, seeds = CONFIG, 'mlp_fashion_mnist.json', range(3)
  sweep(config, OPTIONS, DEPTHS, seeds, RESULTS / name, given.minutes)
