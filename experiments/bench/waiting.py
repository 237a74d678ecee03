"""How long people wait: for groups, decisions, cuts with their proof, and commands.

Every time is the median of some calls in one process, whose compiled programs are
forgotten before each of them. Beside them, the trace of the network by jax and Flax
alone, without which no group is found, the compilation of the whole network, and what
Torch-Pruning takes for its graph and its cut where it is installed.

  python -m experiments.bench.waiting

About 10 minutes on 2 cores.
"""

import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import depthprune as dp
from experiments.bench import measure, pytorch

NETWORKS = {  # the side of an image, and classes
  'resnet20': (32, 10),
  'resnet56': (32, 10),
  'resnet152': (224, 1000),
  'vit_base': (224, 1000),
}
REPEATS = 5
RUN = '--data digits --model mlp --train-epochs 1 --gate-epochs 1 --finetune-epochs 1'


def seconds(call: Callable[[], Any], repeats: int = REPEATS) -> list[float]:
  """Times calls, each without what was compiled before; median, least and most."""
  times = []
  for _ in range(repeats):
    jax.clear_caches()
    began = time.perf_counter()
    call()
    times.append(time.perf_counter() - began)
  return [float(np.median(times)), min(times), max(times)]


def random_variables(model: Any, images: jax.Array) -> Any:
  """Arrays in the order of size that `init` makes them, without compiling it."""
  rng = np.random.default_rng(0)

  def draw(path, x):
    near_one = path[-1].key in ('scale', 'var') or path[0].key == 'branches'
    noise = rng.normal(size=x.shape) / np.sqrt(max(1, np.prod(x.shape[:-1])))
    return jnp.asarray(near_one + (x.ndim > 0) * 0.1 * noise, x.dtype)

  shapes = jax.eval_shape(model.init, jax.random.key(0), images)
  return jax.tree.map_with_path(draw, shapes)


def row(name: str) -> dict[str, Any]:
  """What is waited for with one network."""
  side, classes = NETWORKS[name]
  model = dp.models.build(name, classes=classes)
  images = measure.random_images(1, side, side, 3)
  variables = random_variables(model, images)
  coupling = dp.couple(model, variables, images)
  keep = dp.oneshot(coupling, variables, '50%', scope='uniform')
  whole = lambda: jax.jit(model.apply).lower(variables, images).compile()
  cut = lambda: dp.prune(model, variables, keep, images, coupling=coupling)
  traced = lambda: jax.make_jaxpr(model.apply)(variables, images)
  return {
    'trace': seconds(traced),
    'couple': seconds(lambda: dp.couple(model, variables, images)),
    'oneshot': seconds(lambda: dp.oneshot(coupling, variables, '50%')),
    'prune': seconds(cut, 3),
    'compile': seconds(whole, 3),
    'groups': len(coupling.groups),
    'verify': cut().report['verify'],
  }


def torch_row(name: str) -> dict[str, Any] | None:
  """What Torch-Pruning takes for a CIFAR ResNet; None for others or without it."""
  try:
    import torch  # pyright: ignore[reportMissingImports]
    import torch_pruning  # pyright: ignore[reportMissingImports]
  except ImportError:
    return None
  if NETWORKS[name][0] != 32:
    return None
  images = torch.zeros(1, 3, 32, 32)
  model = pytorch.resnet(torch, int(name.removeprefix('resnet')), 3, 10).eval()
  graph = lambda: torch_pruning.DependencyGraph().build_dependency(model, images)
  *_, last = (m for m in model.modules() if isinstance(m, torch.nn.Linear))
  pruner = torch_pruning.pruner.MetaPruner(
    model,
    images,
    torch_pruning.importance.MagnitudeImportance(p=1),
    pruning_ratio=0.3,
    ignored_layers=[last],
  )
  return {'couple': seconds(graph), 'prune': seconds(pruner.step, 1)}


def commands() -> dict[str, Any]:
  """Seconds of commands that print at once."""
  with tempfile.TemporaryDirectory() as run:
    call('run', 'gates', *RUN.split(), '--workdir', run)
    return {
      'depthprune --help': seconds(lambda: call('--help')),
      'depthprune run gates --help': seconds(lambda: call('run', 'gates', '--help')),
      'depthprune report RUN': seconds(lambda: call('report', run)),
    }


def call(*words: str) -> None:
  command = (sys.executable, '-m', 'depthprune', *words)
  subprocess.run(command, check=True, capture_output=True)


def main(words: Sequence[str]) -> None:
  names = words or [*NETWORKS]
  rows = {}
  for name in names:
    rows[name] = {**row(name), 'torch_pruning': torch_row(name)}
    print(name, rows[name], flush=True)
  told = commands()
  print(told)
  measure.write('waiting_cpu', {'repeats': REPEATS, 'networks': rows, 'commands': told})


if __name__ == '__main__':
  main(sys.argv[1:])
