"""ResNet-50 on ImageNet-1k, by every method: images are streamed, 224×224.

  TFDS_DATA_DIR=... python -m experiments.imagenet.resnet50 gates --full --workers 12

`--full`: batches of 256, bfloat16, a peak rate of 0.1 and 90 epochs, as is usual for
this network (He et al., arXiv 1512.03385; 76 % top-1), and what the method takes. With
`--pretrained FILE`, torchvision's resnet50 as .safetensors or .npz, it starts there and
images are normalised as torchvision does. Without METHODS all five run. It takes an
accelerator, and imagenet2012 prepared by TFDS with file_format='array_record'.

  python -m experiments.imagenet.resnet50 --generated runs/made-up

shows on a CPU that all of it runs: two steps a stage on a made-up imagenet2012 with the
shapes and dtypes of the real one, which is written when it is not there. What is said
of throughput (runs/imagenet/*/input.jsonl) is of the pipeline, which is the same.
"""

import argparse
import dataclasses
import json
import os
from pathlib import Path
from typing import Any

from depthprune.methods.auxiliary import AuxiliaryOptions
from depthprune.methods.implosion import ImplosionOptions
from depthprune.methods.netcut import NetCutOptions
from depthprune.methods.sidenet import SideNetOptions
from depthprune.methods.trainable_gates import GateOptions
from depthprune.run import rounds
from depthprune.run.config import Config, default
from depthprune.train.result import to_json
from experiments.imagenet import generated
from experiments.run import within

COMMON: dict[str, Any] = {
  'model': 'resnet50',
  'data': 'imagenet2012',
  'resize': 224,
  'stream': 'always',
  'augment': True,
  'batch': 256,
  'bfloat16': True,
  'optimizer': 'sgd',
  'learning_rate': 0.1,
  'weight_decay': 1e-4,
}
FULL: dict[str, dict[str, Any]] = {
  'gates': {
    'options': GateOptions(0.5, round_to=8),
    'gate_epochs': 10,
    'finetune_epochs': 30,
  },
  'netcut': {'options': NetCutOptions(0.01, cost='flops'), 'gate_epochs': 90},
  'implosion': {
    'options': ImplosionOptions(depth=12, per_round=2),
    'gate_epochs': 90,
    'finetune_epochs': 30,
  },
  'sidenet': {
    'options': SideNetOptions(drop=0.5),
    'gate_epochs': 10,
    'finetune_epochs': 5,
  },
  'auxiliary': {'options': AuxiliaryOptions(width=256), 'gate_epochs': 90},
}
TRAINED = {'gates': 90, 'sidenet': 90}  # epochs before, where nothing is pretrained
BRIEF: dict[str, Any] = {
  'batch': 8,
  'subset': 16,
  'bfloat16': False,
  'train_epochs': 0,
  'gate_epochs': 1,
  'finetune_epochs': 1,
}
OTHERWISE: dict[str, dict[str, Any]] = {
  # Two steps train no network, so the answer is known and refused; here all of it runs.
  'netcut': {
    'options': NetCutOptions(0.01, cost='flops', force=True),
    'finetune_epochs': 0,
  },
  'sidenet': {'train_epochs': 1},  # its heads learn from features, not from a stream
}


def config(method: str, full: bool, pretrained: str | None = None, **fields: Any):
  """The Config of a method, with these fields set besides."""
  file = {'gates': 'trainable_gates'}.get(method, method)
  epochs = 0 if pretrained else TRAINED.get(method, 0)
  size = {'train_epochs': epochs} if full else {**BRIEF, **OTHERWISE.get(method, {})}
  values = {**COMMON, **FULL[method], **size, 'pretrained': pretrained, **fields}
  return dataclasses.replace(default(file), **values)


def run(method: str, given: argparse.Namespace) -> dict[str, Any]:
  chosen: Config = config(
    method,
    given.full,
    given.pretrained,
    workers=given.workers,
    seed=given.seed,
    workdir=f'{given.workdir}/{method}-{"full" if given.full else "brief"}{given.seed}',
  )
  result = to_json(rounds.run(chosen))
  print(json.dumps({'method': method, 'accuracy': result['accuracy']}), flush=True)
  return result


def arguments() -> argparse.Namespace:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('methods', nargs='*', help=f'out of {", ".join(FULL)}')
  parser.add_argument('--full', action='store_true', help='the size for an accelerator')
  parser.add_argument('--pretrained', help='weights to start from')
  parser.add_argument('--workers', type=int, help='processes that read images')
  parser.add_argument('--seed', type=int, default=0)
  parser.add_argument('--minutes', type=float, default=0, help='stop after; 0: never')
  parser.add_argument('--workdir', default='runs/imagenet')
  parser.add_argument('--generated', type=Path, help='folder of a made-up imagenet2012')
  given = parser.parse_args()
  if unknown := [method for method in given.methods if method not in FULL]:
    parser.error(f'expected methods out of {", ".join(FULL)}, got {unknown}')
  return given


if __name__ == '__main__':
  given = arguments()
  if given.generated:
    if not (given.generated / 'imagenet2012').is_dir():
      generated.prepare(given.generated, train=64, validation=24)
    os.environ['TFDS_DATA_DIR'] = str(given.generated)
  with within(given.minutes):
    for method in given.methods or FULL:
      run(method, given)
