"""The experiments of Network Implosion (arXiv 1906.03826), one function each.

The paper has ResNets on CIFAR-10/100 and ImageNet.
"""

import dataclasses

from depthprune.methods.implosion import ImplosionOptions
from depthprune.run.config import default
from experiments.implosion import oneshot, retraining
from experiments.run import Arguments, Case

RECIPE = default('implosion')
WEIGHTS = '../shared/data/checkpoints/resnet56_cifar10.npz'
RESNET56_CIFAR10 = dataclasses.replace(
  RECIPE,
  options=ImplosionOptions(depth=15, per_round=4),
  data='cifar10',
  model='resnet56',
  gate_epochs=182,
  finetune_epochs=60,
)

DISTILLED = dataclasses.replace(
  RECIPE,
  options=ImplosionOptions(depth=15, per_round=12, importance='greedy'),
  data='cifar10',
  model='resnet56',
  pretrained=WEIGHTS,
  batch=64,
  gate_epochs=0,
  finetune_epochs=45,
  learning_rate=0.01,
  distill=True,
)


def resnet20_fashion_mnist(arguments: Arguments) -> list[Case]:
  """One full run of erasing and retraining, sized for a CPU: ResNet-20.

  fashion_mnist at 14×14, 5,000 images: 10 epochs with priorities, then twice 2 of the 9
  units are erased and the rest is retrained for 4. The controls erase at random, and
  train the shape that was found from scratch for all 18 epochs. `--full` has all images
  at 28×28 and 60 + 2 × 20 epochs.

    python -m experiments.run implosion.resnet20_fashion_mnist

  3 seeds, about 25 minutes on one core. Found: from scratch (84.5 %) is ahead of
  priority (83.2) and random (82.4), as 18 short epochs are far from converged.
  """
  full = dataclasses.replace(
    RECIPE,
    options=ImplosionOptions(depth=5, per_round=2),
    data='fashion_mnist',
    model='resnet20',
    gate_epochs=60,
    finetune_epochs=20,
  )
  small = {'gate_epochs': 10, 'finetune_epochs': 4, 'subset': 5000, 'resize': 14}
  methods = 'priority', 'random', 'scratch'
  return retraining.run('resnet20_fashion_mnist', full, small, methods, arguments)


def resnet56_cifar10(arguments: Arguments) -> list[Case]:
  """ResNet-56 on CIFAR-10: 12 of 27 units, 42.86 % of the layers.

  `--full`: 182 epochs with priorities, then three times 4 units are erased and the rest
  is retrained for 60, at the initial learning rate each time; the control trains the
  same shape (the depth of ResNet-32) from scratch for all 362. The size for a CPU (512
  images, 2 + 3 × 1 epochs) only shows that all of it runs.

    python -m experiments.run implosion.resnet56_cifar10 --full --minutes 10

  Goal: no drop against 93.4 %, and half a point above from scratch.
  """
  small = {'gate_epochs': 2, 'finetune_epochs': 1, 'subset': 512}
  about = 'resnet56_cifar10', RESNET56_CIFAR10, small
  methods = 'priority', 'random', 'scratch', 'greedy'
  return retraining.run(*about, methods, arguments)


def resnet56_pretrained(arguments: Arguments) -> list[Case]:
  """A pretrained ResNet-56 on CIFAR-10: 12 of 27 units erased.

  As `resnet56_cifar10`, but from the weights of akamaster/pytorch_resnet_cifar10
  (93.39 %, 200 epochs), so that it fits in ten minutes of an accelerator: 10 epochs
  with priorities, then three times 4 units are erased and the rest is retrained for 15.
  The control, the same shape from scratch, has the 55 epochs of this run and none of
  the pretraining; a ResNet-32 (as deep) trained for 200 epochs by the same authors has
  92.63 %. The size for a CPU (512 images, 1 + 3 × 1 epochs) only shows that it runs.

    python -m experiments.run implosion.resnet56_pretrained --full --minutes 10

  The weights have seen the images that are held out here, so what is said of those is
  too good; with `priority` they decide nothing.
  """
  full = dataclasses.replace(
    RESNET56_CIFAR10, pretrained=WEIGHTS, gate_epochs=10, finetune_epochs=15
  )
  small = {'gate_epochs': 1, 'finetune_epochs': 1, 'subset': 512}
  methods = 'priority', 'scratch', 'random'
  return retraining.run('resnet56_pretrained', full, small, methods, arguments)


def resnet56_distilled(arguments: Arguments) -> list[Case]:
  """A pretrained ResNet-56 on CIFAR-10: units erased at once, by the loss they save.

  The same weights as in `resnet56_pretrained`. No epoch is spent on priorities: units
  go one by one, each time that without which the loss on the first half of the test
  images rises least (`greedy`), and then the rest is trained towards the answers of the
  network before. Accuracy is that of the second half, 93.14 % uncut. The size for a
  CPU: 6 of 27 units, 256 images that decide, 10,000 to train on for 2 epochs. `--full`:
  12 units, 2,500 images that decide, all to train on for 45 epochs.

    python -m experiments.run implosion.resnet56_distilled --seeds 0

  Goal: a drop of at most half a point; in full none.
  """
  small = {
    'options': dataclasses.replace(DISTILLED.options, depth=21, per_round=6),
    'finetune_epochs': 2,
    'subset': 10_000,
  }
  about = 'resnet56_distilled', DISTILLED, small
  deciding = 2500 if arguments.full else 256
  compared = 'greedy', 'random', 'scratch'
  return retraining.run(*about, compared, arguments, deciding)


def resnet56_refitted(arguments: Arguments) -> list[Case]:
  """A pretrained ResNet-56 on CIFAR-10: 6 of 27 units erased, and nothing trained.

  As `resnet56_distilled`; the units that stay are refitted by least squares to 20
  batches of 64 images, without labels.

    python -m experiments.run implosion.resnet56_refitted

  About 10 minutes on one core; there is no other size.
  """
  options = dataclasses.replace(DISTILLED.options, depth=21, per_round=6, refit=True)
  config = dataclasses.replace(
    DISTILLED, options=options, finetune_epochs=0, subset=10_000
  )
  about = 'resnet56_refitted', config, {}
  return retraining.run(*about, ('greedy',), arguments, deciding=256)


def resnet56_oneshot(arguments: Arguments) -> list[Case]:
  """A pretrained ResNet-56 in one shot: 1 to 12 of 27 units erased.

  The paper retrains after erasing; here nothing is retrained, to see what the order is
  worth. Weights: akamaster/pytorch_resnet_cifar10, 93.39 % on the CIFAR-10 test images;
  the first half of these decides, and accuracy is that of the second. Before anything
  is erased, 100 steps of 128 images at 0.01 train priorities and weights together; all
  curves start from that network. The size for a CPU has 256 images that decide, 1,000
  that report, and 2 batches for statistics. `--full` has 10 epochs of priorities, and
  all images of both halves.

    TFDS_DATA_DIR=../shared/data/tfds \\
      python -m experiments.run implosion.resnet56_oneshot

  35 minutes on one core. Found: 92.4 % before; after 12 units (24 of 56 layers, the
  paper's 42.86 %) greedy 77.1, priority 65.3, random 52.6 to 67.8, drop 53.6 %.
  """
  full = dataclasses.replace(
    RECIPE,
    model='resnet56',
    data='cifar10',
    pretrained=WEIGHTS,
    gate_epochs=10,
    learning_rate=0.01,
    weight_decay=1e-4,
  )
  small = {'subset': 12_800, 'gate_epochs': 1}
  sizes = (5000, 5000, 50) if arguments.full else (256, 1000, 2)
  random = [('random', seed) for seed in range(3)]
  series = [('priority', 0), *random, ('drop', 0), ('greedy', 0)]
  about = full, small, oneshot.Sizes(*sizes)
  return oneshot.run('resnet56_oneshot', *about, 12, series, arguments)
