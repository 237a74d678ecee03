"""The experiments of NetCut (arXiv 2004.08172), one function each.

`--full` is the size for an accelerator. A size for a CPU that has one epoch only shows
that all of it runs.
"""

import dataclasses

from depthprune.methods.netcut import NetCutOptions
from depthprune.run.config import default
from experiments.netcut import sweep
from experiments.run import Arguments, Case

RECIPE = default('netcut')
MLP_FASHION_MNIST = dataclasses.replace(
  RECIPE, data='fashion_mnist', model='mlp20x200', gate_epochs=50
)


def mlp_fashion_mnist(arguments: Arguments) -> list[Case]:
  """An MLP 20×200 on fashion_mnist, at the paper's settings (MNIST there).

  Two Adams at 1e-3, batch 128, no weight decay, no augmentation; beta 0, .001, .01, .1,
  and at .01 the aggregates of its ablation. The control is a network with one head, at
  each of the depths that may be chosen.

    TFDS_DATA_DIR=../shared/data/tfds python -m experiments.run netcut.mlp_fashion_mnist

  20 epochs, 3 seeds, 5 of `log`: about 50 minutes on one core. `--full` has 50 epochs
  and 5 seeds. Expected, from the authors' code: depth 4, 4 at beta 0; 3, 2 at .01; 1, 1
  at .1; test accuracy 88.2 to 89.0 %, which the cut changes by 0.06 point at most.
  """
  about = 'mlp_fashion_mnist', MLP_FASHION_MNIST, {'gate_epochs': 20}
  ablation = [{'beta': 0.01, 'aggregate': name} for name in ('linear', 'geometric')]
  left = sweep.run(*about, arguments, ablation, depths=(1, 2, 3, 4, 5, 6))
  arguments = arguments._replace(left=arguments.left or bool(left))
  return left + sweep.run(*about, arguments, sweep.PAPER, seeds=5)


def conv_fashion_mnist(arguments: Arguments) -> list[Case]:
  """A plain convolutional network on fashion_mnist.

  The paper has 15 layers of 50 filters 5×5 on MNIST. The size for a CPU has 10 layers
  of 8 filters 5×5 on 10,000 images of 14×14, and 10 epochs; as these are 780 steps, the
  importance has ten times the learning rate. `--full` has the paper's network and 50
  epochs.

    TFDS_DATA_DIR=../shared/data/tfds \\
      python -m experiments.run netcut.conv_fashion_mnist

  3 seeds, about 30 minutes on one core. Found: max w is above .95 at every beta, so the
  cut changes the accuracy by 0.03 point at most; a layer is worth more than 0.1 nats in
  two of three seeds.
  """
  full = dataclasses.replace(
    RECIPE, data='fashion_mnist', model='convnet15', gate_epochs=50
  )
  small = {
    'options': NetCutOptions(importance_learning_rate=0.01),
    'model': 'convnet10x8',
    'gate_epochs': 10,
    'subset': 10_000,
    'resize': 14,
  }
  return sweep.run('conv_fashion_mnist', full, small, arguments)


def mlp_cifar10(arguments: Arguments) -> list[Case]:
  """An MLP 20×1000 on CIFAR-10.

  The paper's size is `--full`: 150 epochs, beta 0, .001, .01, .1. It has not been run.
  The size for a CPU has 2,000 images and 1 epoch.

    python -m experiments.run netcut.mlp_cifar10 --full
  """
  full = dataclasses.replace(RECIPE, data='cifar10', model='mlp20x1000')
  small = {'gate_epochs': 1, 'subset': 2000}
  return sweep.run('mlp_cifar10', full, small, arguments)


def conv_cifar10(arguments: Arguments) -> list[Case]:
  """20 convolutions of 50 filters 5×5 on CIFAR-10.

  The paper's size is `--full`: 150 epochs, beta 0, .001, .01, .1. It has not been run.
  The size for a CPU has 256 images and 1 epoch.

    python -m experiments.run netcut.conv_cifar10 --full
  """
  full = dataclasses.replace(RECIPE, data='cifar10', model='convnet20')
  small = {'gate_epochs': 1, 'subset': 256}
  return sweep.run('conv_cifar10', full, small, arguments)


def vgg19_cifar10(arguments: Arguments) -> list[Case]:
  """VGG-19 on CIFAR-10.

  The paper's size is `--full`: 150 epochs, beta 0, .001, .01, .1. It has not been run.
  The size for a CPU has 256 images and 1 epoch.

    python -m experiments.run netcut.vgg19_cifar10 --full
  """
  full = dataclasses.replace(RECIPE, data='cifar10', model='vgg19')
  small = {'gate_epochs': 1, 'subset': 256}
  return sweep.run('vgg19_cifar10', full, small, arguments)


def resnet110_cifar10(arguments: Arguments) -> list[Case]:
  """ResNet-110 with 54 heads on CIFAR-10.

  The paper's size is `--full`: 150 epochs, beta 0, .002, .004, .008, .01. It has not
  been run. The size for a CPU has 256 images and 1 epoch.

    python -m experiments.run netcut.resnet110_cifar10 --full
  """
  full = dataclasses.replace(RECIPE, data='cifar10', model='resnet110', augment=True)
  small = {'gate_epochs': 1, 'subset': 256}
  options = [{'beta': beta} for beta in (0.0, 0.002, 0.004, 0.008, 0.01)]
  return sweep.run('resnet110_cifar10', full, small, arguments, options)


def vit_cifar10(arguments: Arguments) -> list[Case]:
  """A vision transformer on CIFAR-10.

  The paper has none: depth, width and the 150 epochs of `--full`, which has not been
  run, are ours. The size for a CPU has 256 images and 1 epoch.

    python -m experiments.run netcut.vit_cifar10 --full
  """
  full = dataclasses.replace(RECIPE, data='cifar10', model='vit_cifar', augment=True)
  small = {'gate_epochs': 1, 'subset': 256}
  return sweep.run('vit_cifar10', full, small, arguments)
