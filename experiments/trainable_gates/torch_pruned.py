"""What Torch-Pruning keeps of a CIFAR ResNet: a control with the same weights.

It scores groups by their L2 norm, which is its default, and takes the same part of
every layer. It breaks padded shortcuts when it cuts residual streams, so these stay
whole, and the first convolution of every block is cut.
"""

import numpy as np

import depthprune as dp
from depthprune.program.coupling import Coupling
from depthprune.train.task import Tree
from experiments.bench import pytorch


def keep(coupling: Coupling, variables: Tree, target: float) -> Tree:
  """Returns the keep tree whose FLOPs are nearest to `target`, for `prune`.

  Args:
    coupling: of a CIFAR ResNet.
    variables: its arrays.
    target: part of the FLOPs, as near as the same part of every layer can be.

  Raises:
    ModuleNotFoundError: torch or torch_pruning is missing.
  """
  inner = [group for group in coupling.groups if group.endswith('/conv1:3')]
  parts = np.arange(0.01, 1, 0.01)
  found = [{'channels': _kept(inner, variables['params'], part)} for part in parts]
  flops = np.asarray([dp.cost.flops(coupling, each) for each in found])
  return found[np.abs(flops - target * dp.cost.flops(coupling)).argmin()]


def _kept(inner: list[str], params: Tree, part: float) -> dict[str, np.ndarray]:
  """Which channels of each group are left without a part of them."""
  import torch  # pyright: ignore[reportMissingImports]
  import torch_pruning as tp  # pyright: ignore[reportMissingImports]

  network = pytorch.resnet(torch, 2 * len(inner) + 2, channels=3, classes=10)
  blocks = [module for module in network if hasattr(module, 'body')]
  group_of = {}
  for group, block in zip(inner, blocks, strict=True):
    stage, name, _ = group.split('/')
    conv1, norm1, _, conv2, norm2 = block.body
    for conv, own in ((conv1, 'conv1'), (conv2, 'conv2')):
      kernel = np.asarray(params[stage][name][own]['kernel']).transpose(3, 2, 0, 1)
      conv.weight.data = torch.tensor(kernel.copy())
    for norm, own in ((norm1, 'norm1'), (norm2, 'norm2')):
      norm.weight.data = torch.tensor(np.array(params[stage][name][own]['scale']))
    group_of[conv1] = group
  ends = [block.body[3] for block in blocks]  # they write to the streams
  pruner = tp.pruner.MagnitudePruner(
    network, torch.zeros(1, 3, 32, 32), tp.importance.MagnitudeImportance(p=2),
    pruning_ratio=part, ignored_layers=[network[0], *ends, network[-1]],
  )  # fmt: skip
  kept = {group: np.ones(conv.out_channels, bool) for conv, group in group_of.items()}
  for cut in pruner.step(interactive=True):
    kept[group_of[cut[0].dep.target.module]][cut[0].idxs] = False
  return kept
