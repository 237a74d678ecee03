"""Networks in PyTorch, to be timed beside ours; nothing without torch."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from depthprune.timing import clock


def resnet_step(
  depth: int, batch: int, shape: tuple[int, int, int], classes: int, accelerated: bool
) -> Callable[[], Any] | None:
  """A function that does a training step of the CIFAR ResNet; None without torch.

  Images lie channels last and are there already. An accelerated step is that of a GPU,
  in bfloat16 by autocast and compiled; any other is float32, on as many threads as
  there are cores.
  """
  try:
    import torch  # pyright: ignore[reportMissingImports]
  except ImportError:
    return None
  device = 'cuda' if accelerated else 'cpu'
  height, width, channels = shape
  network = resnet(torch, depth, channels, classes).to(
    device, memory_format=torch.channels_last
  )
  run = torch.compile(network) if accelerated else network
  tx = torch.optim.SGD(network.parameters(), 0.1, 0.9, nesterov=True, weight_decay=5e-4)
  x = torch.randn(batch, channels, height, width, device=device)
  x = x.to(memory_format=torch.channels_last)
  y = torch.arange(batch, device=device) % classes

  def advance():
    tx.zero_grad()
    with torch.autocast(device, torch.bfloat16, enabled=accelerated):
      loss = torch.nn.functional.cross_entropy(run(x), y)
    loss.backward()
    tx.step()
    return loss.item()

  return advance


def resnet(torch: Any, depth: int, channels: int, classes: int) -> Any:
  """CIFAR ResNet: three stages of 16, 32 and 64 channels, shortcuts without weights."""
  nn = torch.nn

  class Block(nn.Module):
    def __init__(self, before, after, stride):
      super().__init__()
      conv = lambda a, b, s: nn.Conv2d(a, b, 3, s, 1, bias=False)
      norm = nn.BatchNorm2d
      first = conv(before, after, stride), norm(after), nn.ReLU()
      self.body = nn.Sequential(*first, conv(after, after, 1), norm(after))
      self.stride, self.pad = stride, (after - before) // 2

    def forward(self, x):
      kept = x[:, :, :: self.stride, :: self.stride]
      kept = nn.functional.pad(kept, (0, 0, 0, 0, self.pad, self.pad))
      return torch.relu(self.body(x) + kept)

  stem = nn.Conv2d(channels, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU()
  widths = [16 * 2**s for s in range(3) for _ in range((depth - 2) // 6)]
  blocks = [Block(a, b, b // a) for a, b in zip([16, *widths], widths)]
  ends = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, classes)
  return nn.Sequential(*stem, *blocks, *ends)


def netcut_steps(
  inputs: int, classes: int, beta: float, steps: int
) -> Callable[[], None] | None:
  """A function that does training steps of NetCut's MLP; None without torch.

  20 layers of 200 units, a head on each, two Adams, on one thread.
  """
  try:
    import torch  # pyright: ignore[reportMissingImports]
  except ImportError:
    return None
  torch.set_num_threads(1)
  nn = torch.nn
  sizes = [inputs, *[200] * 20]
  layers = nn.ModuleList(map(nn.Linear, sizes[:-1], sizes[1:]))
  heads = nn.ModuleList(nn.Linear(200, classes) for _ in layers)
  v = nn.Parameter(torch.zeros(len(layers)))
  cost = torch.arange(1.0, len(layers) + 1)
  weights = torch.optim.Adam([*layers.parameters(), *heads.parameters()], 1e-3)
  both = weights, torch.optim.Adam([v], 1e-3)
  x, y = torch.ones(128, inputs), torch.arange(128) % classes

  def run():
    for _ in range(steps):
      h, answers = x, []
      for layer, head in zip(layers, heads, strict=True):
        h = torch.relu(layer(h))
        answers.append(torch.log_softmax(head(h), -1))
      w = torch.softmax(v, 0)
      s = torch.tensordot(w, torch.stack(answers), 1)
      loss = nn.functional.nll_loss(s, y) + beta * (cost @ w)
      for tx in both:
        tx.zero_grad()
      loss.backward()
      for tx in both:
        tx.step()

  return run


# ---- Torch-Pruning -------------------------------------------------------------------


def pruned_times(
  name: str,
  variables: Mapping[str, Any],
  flop_ratio: float,
  round_to: int,
  batches: Sequence[int],
  seconds: float,
) -> dict[str, Any] | None:
  """Times a network that Torch-Pruning cuts by L1 norms, by turns with the whole.

  Args:
    name: the network, as `models.build` calls it. A VGG-16 and the CIFAR ResNets are
      written here. Torch-Pruning breaks their padded shortcuts when it cuts their
      residual streams, which stay whole therefore.
    variables: its arrays, which the VGG-16 gets; times do not depend on them.
    flop_ratio: of the whole over the small network, which the pruner is to reach.
    round_to: widths are multiples of this.
    batches: batch sizes to time.
    seconds: time to spend on each of them.

  Returns:
    'flop_ratio' that was reached, and for every batch the medians 'whole_ms' and
    'small_ms' and their ratio 'speedup'; None without torch or torch_pruning, or where
    the network is not written in PyTorch.
  """
  try:
    import torch  # pyright: ignore[reportMissingImports]
    import torch_pruning as tp  # pyright: ignore[reportMissingImports]
  except ImportError:
    return None
  if name == 'vgg16':
    made = lambda: _vgg16(torch, variables)
  elif name.startswith('resnet'):
    made = lambda: resnet(torch, int(name.removeprefix('resnet')), 3, 10)
  else:
    return None
  device = 'cuda' if torch.cuda.is_available() else 'cpu'
  drawn = lambda batch: torch.randn(batch, 3, 32, 32, device=device)
  whole = made().to(device).eval()
  flops = lambda network: tp.utils.count_ops_and_params(network, drawn(1))[0]

  def cut(part: float) -> Any:
    network = made().to(device).eval()
    importance = tp.importance.MagnitudeImportance(p=1)
    ends = [m.body[-2] for m in network if hasattr(m, 'body')]  # write to the stream
    ignored = [*ends, *([network[0]] if ends else []), network[-1]]
    tp.pruner.MagnitudePruner(
      network, drawn(1), importance, pruning_ratio=part, round_to=round_to,
      ignored_layers=ignored,
    ).step()  # fmt: skip
    return network

  off = lambda network: abs(flops(whole) / flops(network) - flop_ratio)
  small, times = min(map(cut, np.linspace(0.1, 0.9, 65)), key=off), {}
  for batch in batches:
    x = drawn(batch)

    def call(network, x=x):
      with torch.inference_mode():
        answer = network(x)
      return answer.cpu() if device == 'cuda' else answer

    turns = clock.interleave([lambda: call(whole), lambda: call(small)], seconds)
    taken = np.median(turns, axis=1)
    times[str(batch)] = {
      'whole_ms': float(taken[0]),
      'small_ms': float(taken[1]),
      'speedup': float(np.median(turns[0] / turns[1])),
    }
  return {'flop_ratio': flops(whole) / flops(small), 'batches': times}


def _vgg16(torch: Any, variables: Mapping[str, Any]) -> Any:
  """Our VGG-16 for images of 32×32 with its weights, channels first."""
  nn, layers = torch.nn, []
  tensor = lambda x: torch.tensor(np.asarray(x))
  params, stats = variables['params'], variables['batch_stats']
  for stage in sorted(k for k in params if k.startswith('stage')):
    for block in sorted(params[stage]):
      weights, moments = params[stage][block], stats[stage][block]
      kernel = tensor(weights['conv']['kernel']).permute(3, 2, 0, 1).contiguous()
      conv = nn.Conv2d(kernel.shape[1], kernel.shape[0], 3, 1, 1, bias=False)
      norm = nn.BatchNorm2d(kernel.shape[0])
      conv.weight.data = kernel
      norm.weight.data, norm.bias.data = map(
        tensor, (weights['norm']['scale'], weights['norm']['bias'])
      )
      norm.running_mean, norm.running_var = map(
        tensor, (moments['norm']['mean'], moments['norm']['var'])
      )
      layers += [conv, norm, nn.ReLU()]
    layers.append(nn.MaxPool2d(2))
  kernel, bias = (tensor(params['head'][k]) for k in ('kernel', 'bias'))
  head = nn.Linear(*kernel.shape)
  head.weight.data, head.bias.data = kernel.T.contiguous(), bias
  return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), head)
