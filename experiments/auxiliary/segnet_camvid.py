"""Auxiliary training of a light segmentation network, CamVid, beside its controls.

Paper: arXiv 1909.02214 (light segmentation networks there). SegNet of width 8, 190,000
parameters, beside a path of 32 channels that reads encoder and decoder. CPU-sized:
images at 64×64, 40 epochs. `--full`, for an accelerator: 128×128, 150 epochs.

  python -m experiments.auxiliary.segnet_camvid

3 seeds, about an hour on one core. TFDS_DATA_DIR says where the data are;
`--minutes 10` stops and goes on with the next call. The data set's own validation
split is held out.
Goal: mean IoU of `search` above `alone` by more than a standard deviation.

Found (64×64, 3 seeds): it is, 32.0 ± 0.6 against 30.4 ± 1.3; `all` 32.0 ± 1.3. Plain
deep supervision (32.9 ± 0.4) and `longer`, with the same training FLOPs (33.3 ± 0.4),
do as well or better: after 40 short epochs the network is far from converged, and
whatever trains it more helps; distillation, from an answer as far from it, does not.
The search closes one of 50 connections, the same for every seed: at a price of 0.005
nats each of the others is worth more.
"""

import dataclasses

from depthprune.options import Auxiliary
from depthprune.run.config import RECIPES
from experiments.auxiliary import compare
from experiments.pieces import Arguments, Case, main

FULL = dataclasses.replace(
  RECIPES['auxiliary'],
  options=Auxiliary(width=32),
  data='camvid',
  model='segnet8',
  batch=16,
  resize=128,
  gate_epochs=150,
)
SMALL = {'resize': 64, 'gate_epochs': 40}


def run(given: Arguments) -> list[Case]:
  return compare.main('segnet_camvid', FULL, SMALL, given)


if __name__ == '__main__':
  main(__doc__, run)
