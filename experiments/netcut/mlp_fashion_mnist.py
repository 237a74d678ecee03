"""NetCut, MLP 20×200 on fashion_mnist, at the paper's settings.

Paper: arXiv 2004.08172 (MNIST there). Two Adams at 1e-3, batch 128, no weight decay, no
augmentation; beta 0, .001, .01, .1, and at .01 the aggregates of its ablation. The
control is a network with one head, at each of the depths that may be chosen.

  TFDS_DATA_DIR=../shared/data/tfds python -m experiments.netcut.mlp_fashion_mnist

20 epochs, 3 seeds, 5 of `log`: about 50 minutes on one core. `--full` (50 epochs, 5
seeds) is for an accelerator; `--minutes 10` stops and goes on with the next call. The
authors' code:
depth 4, 4 at beta 0; 3, 2 at .01; 1, 1 at .1; test accuracy 88.2 to 89.0 %, the cut
moves it by 0.06 point at most.
"""

import dataclasses

from depthprune.run.config import RECIPES
from experiments.netcut import sweep
from experiments.pieces import Arguments, Case, main

FULL = dataclasses.replace(
  RECIPES['netcut'], data='fashion_mnist', model='mlp20x200', gate_epochs=50
)
ABLATION = [{'beta': 0.01, 'aggregate': name} for name in ('linear', 'geometric')]


def run(given: Arguments) -> list[Case]:
  about = 'mlp_fashion_mnist', FULL, {'gate_epochs': 20}
  left = sweep.main(*about, given, ABLATION, depths=(1, 2, 3, 4, 5, 6))
  given = given._replace(left=given.left or bool(left))
  return left + sweep.main(*about, given, sweep.PAPER, seeds=5)


if __name__ == '__main__':
  main(__doc__, run)
