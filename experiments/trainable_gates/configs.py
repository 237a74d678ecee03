"""The experiments of trainable gates (arXiv 1904.10921), one function each."""

from depthprune.methods.trainable_gates import GateOptions
from depthprune.run.config import Config
from experiments.run import Arguments, Case
from experiments.trainable_gates import comparison


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

    TFDS_DATA_DIR=../shared/data/tfds \\
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
  methods = comparison.METHODS
  return comparison.run('fashion_mnist', config, {}, targets, methods, arguments)


def resnet56_cifar10(arguments: Arguments) -> list[Case]:
  """ResNet-56 on CIFAR-10, at 2.1 and 2.57 times fewer FLOPs.

  The control is that of arXiv 2301.05219. Weights: akamaster/pytorch_resnet_cifar10,
  93.39 % on the test images. `--full` has 15 epochs with gates and 30 after the cut;
  the control cuts by uniform L1 norm and is fine-tuned for 45. Both have a cosine from
  0.01, half of the learning rate. The size for a CPU (512 images, 1 + 1 epochs) only
  shows that all of it runs.

    python -m experiments.run trainable_gates.resnet56_cifar10 --full --minutes 10

  It has not been run in full. Goal: above the control, of which 93.78 -> 93.74 % at
  1.99 times is published; others are 93.53 -> 93.77 / 93.64 % at 2.13 / 2.57 times
  (DepGraph, sparse learning). The weights have seen the images that are held out here;
  neither method decides by them.
  """
  full = Config(
    GateOptions(round_to=1),
    model='resnet56',
    data='cifar10',
    pretrained='../shared/data/checkpoints/resnet56_cifar10.npz',
    gate_epochs=15,
    finetune_epochs=30,
    learning_rate=0.02,
  )
  small = {'subset': 512, 'gate_epochs': 1, 'finetune_epochs': 1}
  targets = round(1 / 2.1, 4), round(1 / 2.57, 4)
  methods = 'gates', 'l1'
  return comparison.run('resnet56_cifar10', full, small, targets, methods, arguments)
