"""The experiments of trainable gates (arXiv 1904.10921), one function each."""

import dataclasses
from importlib.util import find_spec

from depthprune.methods.trainable_gates import GateOptions
from depthprune.run.config import Config
from experiments.run import Arguments, Case
from experiments.trainable_gates import ablation, comparison

HAS_TORCH = find_spec('torch_pruning') is not None
WEIGHTS = '../shared/data/checkpoints/{}_cifar10.npz'
RESNET20 = Config(
  GateOptions(round_to=1, frozen=True),
  model='resnet20',
  data='cifar10',
  pretrained=WEIGHTS.format('resnet20'),
  subset=5000,
  batch=64,
  gate_epochs=0.5,
  finetune_epochs=1.5,
  learning_rate=0.02,
  distill=True,
)
RESNET20_LONGER = dataclasses.replace(RESNET20, subset=15_000, finetune_epochs=3.5)
RESNET56 = dataclasses.replace(
  RESNET20,
  options=dataclasses.replace(RESNET20.options, by_loss=True),
  model='resnet56',
  pretrained=WEIGHTS.format('resnet56'),
)
METHODS = ('gates', 'l1', 'global', 'uncut', *('torch_pruning',) * HAS_TORCH)
CHANGES = {  # each differs from the base, which is the first, in one thing
  'nothing': {},
  'weights learn with the gates': {'frozen': False},
  'all epochs after the cut': {'gate_epochs': 0, 'finetune_epochs': 2},
  '0.25 epochs with gates': {'gate_epochs': 0.25, 'finetune_epochs': 1.75},
  '1 epoch with gates': {'gate_epochs': 1, 'finetune_epochs': 1},
  'gates learn faster': {'gate_learning_rate': 8e-4, 'strength': 50.0},
  'learning rate 0.01': {'learning_rate': 0.01},
  'no distillation': {'distill': False},
  'started by loss': {'by_loss': True},
  'residual streams whole': {'keep': ('stem/conv',)},
  'batches of 32': {'batch': 32},
  'batches of 128': {'batch': 128},
}


def digits(arguments: Arguments) -> list[Case]:
  """The run of `make demo` with three seeds: ResNet-20 on digits to half of its FLOPs.

    python -m experiments.run trainable_gates.digits

  About 4 minutes on 2 cores; there is no other size. Expected: test accuracy after
  pruning and fine-tuning at most 0.5 point below before, in the mean over the seeds.
  """
  config = Config(GateOptions(0.5), model='resnet20', data='digits')
  return comparison.demo('digits', config, arguments)


def fashion_mnist(arguments: Arguments) -> list[Case]:
  """ResNet-8 on fashion_mnist, sized for a CPU: accuracy by FLOPs, with controls.

  The paper has no fashion_mnist; the network (CIFAR type, option A, widths 16/32/64)
  and the sizes are ours. 3,000 training images; 10 epochs before anything is cut, then
  3 with gates and 3 of fine-tuning; the controls are fine-tuned for 6, and the network
  from scratch is trained for 16.

    TFDS_DATA_DIR=../shared/data/tfds \
      python -m experiments.run trainable_gates.fashion_mnist

  About 25 minutes on 2 busy cores; there is no other size. Found: gates, l1 and random
  lie within two standard deviations of each other, one to two points below the unpruned
  network at 50 %; from scratch is ahead of all, because so few images and epochs leave
  the network that is pruned far from converged. A size at which gates could show an
  advantage needs an accelerator.
  """
  config = Config(
    GateOptions(round_to=1),
    model='resnet8',
    data='fashion_mnist',
    subset=3000,
    train_epochs=10,
    gate_epochs=3,
    finetune_epochs=3,
  )
  targets = 0.75, 0.5, 0.25
  methods = 'gates', 'l1', 'random', 'scratch'
  return comparison.run('fashion_mnist', config, {}, targets, methods, arguments)


def resnet56_cifar10(arguments: Arguments) -> list[Case]:
  """A pretrained ResNet-56 on CIFAR-10, at 2.1 and 2.57 times fewer FLOPs.

  Weights: akamaster/pytorch_resnet_cifar10, 93.39 % on the test images, 93.14 % on the
  second half of them, which is the one that reports. Gates learn on frozen weights, and
  start in the order of what closing them does to the loss. All networks, also those of
  the controls, are refitted by least squares at the cut, and learn from the uncut one
  besides the labels. `--full` has 1 epoch with gates and 44 after the cut; the controls
  cut by uniform L1 norm (that of arXiv 2301.05219), by global L1 norm and, where it is
  installed, by Torch-Pruning, and are fine-tuned for 45, as the network is that is not
  cut. The size for a CPU: 2.1 times fewer, 10,000 images, 0.5 + 1.5 epochs, at half of
  the learning rate.

    TFDS_DATA_DIR=../shared/data/tfds \
      python -m experiments.run trainable_gates.resnet56_cifar10 --seeds 0

  Goal on a CPU: 91 % (Torch-Pruning's L2 norm, the same weights, images and epochs,
  residual streams left whole, without a teacher: 89.40). In full: above the controls,
  of which 93.78 -> 93.74 % at 1.99 times is published; others are 93.53 -> 93.77 /
  93.64 % at 2.13 / 2.57 times (DepGraph, sparse learning).
  """
  full = dataclasses.replace(RESNET56, subset=None, gate_epochs=1, finetune_epochs=44)
  small = {'subset': 10_000, 'gate_epochs': 0.5, 'finetune_epochs': 1.5}
  small |= {'learning_rate': 0.01}
  targets = [round(1 / 2.1, 4)] + [round(1 / 2.57, 4)] * arguments.full
  return comparison.run('resnet56_cifar10', full, small, targets, METHODS, arguments)


def resnet56_half_an_epoch(arguments: Arguments) -> list[Case]:
  """A pretrained ResNet-56 on CIFAR-10, at 2.1 times fewer FLOPs, hardly trained.

  As `resnet56_cifar10` at the size for a CPU, with half an epoch in all: gates spend it
  before the cut, and what is refitted is the result; the controls spend it after the
  cut.

    TFDS_DATA_DIR=../shared/data/tfds \
      python -m experiments.run trainable_gates.resnet56_half_an_epoch

  About 5 minutes a row on one core; there is no other size.
  """
  config = dataclasses.replace(RESNET56, subset=10_000, finetune_epochs=0)
  about = 'resnet56_half_an_epoch', config, {}, (round(1 / 2.1, 4),)
  return comparison.run(*about, ('gates', 'l1', 'global'), arguments)


def resnet20_cifar10(arguments: Arguments) -> list[Case]:
  """A pretrained ResNet-20 on CIFAR-10, at half of its FLOPs, sized for a CPU.

  As `resnet56_cifar10`, with 91.73 % on the test images: 15,000 training images, 0.5
  epochs with gates and 3.5 after the cut, 4 for the controls.

    TFDS_DATA_DIR=../shared/data/tfds \
      python -m experiments.run trainable_gates.resnet20_cifar10

  There is no other size. Goal: above both controls by more than a standard deviation of
  the difference.
  """
  about = 'resnet20_cifar10', RESNET20_LONGER, {}, (0.5,)
  return comparison.run(*about, METHODS, arguments)


def resnet20_small_drop(arguments: Arguments) -> list[Case]:
  """A pretrained ResNet-20 on CIFAR-10, at 73 % of its FLOPs, sized for a CPU.

  As `resnet20_cifar10`, at a seventh of its learning rate.

    TFDS_DATA_DIR=../shared/data/tfds \
      python -m experiments.run trainable_gates.resnet20_small_drop

  There is no other size. Goal: a drop of at most 0.3 point.
  """
  config = dataclasses.replace(RESNET20_LONGER, learning_rate=0.003)
  about = 'resnet20_small_drop', config, {}, (0.73,)
  return comparison.run(*about, METHODS, arguments)


def resnet20_ablation(arguments: Arguments) -> list[Case]:
  """What each part of the recipe is worth: a pretrained ResNet-20 at half of its FLOPs.

  5,000 training images, 0.5 epochs with gates on frozen weights and 1.5 after the cut;
  accuracy on the first half of the test images, on which nothing is reported.

    TFDS_DATA_DIR=../shared/data/tfds \
      python -m experiments.run trainable_gates.resnet20_ablation
  """
  return ablation.run('resnet20_ablation', RESNET20, CHANGES, arguments)
