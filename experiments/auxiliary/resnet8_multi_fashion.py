"""Auxiliary training of one trunk for two tasks, Multi-Fashion, beside its controls.

Papers: arXiv 1909.02214 (hard parameter sharing there); data as arXiv 1810.04650 makes
them: two pieces of clothing in one image, and a class to tell of each. ResNet-8 with
two heads, beside a path of 64 channels that answers both tasks too. CPU-sized: 10,000
images at 18×18, 15 epochs. `--full`, for an accelerator: all images at 36×36, 20
epochs.

  python -m experiments.auxiliary.resnet8_multi_fashion

3 seeds, about 30 minutes on one core. TFDS_DATA_DIR says where fashion_mnist is;
`--minutes 10` stops and goes on with the next call. Goal: the mean accuracy of both
tasks with `search` above `alone` by more than a standard deviation.

Found on all images (`--full`, 3 seeds, H100): it is, 91.00 ± 0.11 against 90.72 ± 0.12,
and against the same training FLOPs (90.75) too. All seeds find the same structure as
with one task: the path reads the ends of the second and third stage only.
"""

import dataclasses

from depthprune.run.config import RECIPES
from experiments.auxiliary import compare
from experiments.pieces import Arguments, Case, main

FULL = dataclasses.replace(
  RECIPES['auxiliary'], data='multi_fashion', model='resnet8', gate_epochs=20
)
SMALL = {'subset': 10_000, 'resize': 18, 'gate_epochs': 15}


def run(given: Arguments) -> list[Case]:
  return compare.main('resnet8_multi_fashion', FULL, SMALL, given)


if __name__ == '__main__':
  main(__doc__, run)
