"""Networks in PyTorch, to be timed beside ours; nothing without torch."""

from collections.abc import Callable
from typing import Any


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
