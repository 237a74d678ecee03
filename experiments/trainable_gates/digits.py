"""The job of `make demo` for three seeds: ResNet-20 on digits to half of its FLOPs.

  python -m experiments.trainable_gates.digits

About 4 minutes on 2 cores. Expected: test accuracy after pruning and fine-tuning at
most 0.5 point below before, in the mean over the seeds.
"""

import dataclasses
import json
from pathlib import Path

from depthprune.options import Gates
from depthprune.run import rounds as recipe
from depthprune.run.config import Config
from depthprune.storage import directory as record

CONFIG = Config(Gates(0.5), model='resnet20', data='digits')
SEEDS = (0, 1, 2)
RESULT = Path(__file__).parent / 'results' / 'digits.json'

if __name__ == '__main__':
  runs = []
  for seed in SEEDS:
    workdir = f'runs/digits/seed{seed}'
    result = recipe.run(dataclasses.replace(CONFIG, seed=seed, workdir=workdir))
    del result['report']  # kept indices; result.json of the run has them
    runs.append(result)
    record.write(RESULT, {'command': record.command(), 'runs': runs})
    print(json.dumps(result['accuracy']))
