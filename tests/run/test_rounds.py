"""Rounds of a made-up method: what is repeated, what decides, what goes on."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from depthprune import distributed
from depthprune.data.images import Augment, ImageSet, Normalisation
from depthprune.run import rounds
from depthprune.run.config import default
from depthprune.run.job import Job
from depthprune.train import mesh
from depthprune.train.method import Method
from depthprune.train.task import classification

CONFIG = default(
  'gates', batch=8, train_epochs=1, gate_epochs=1, finetune_epochs=1, learning_rate=0.05
)


class Net(nn.Module):
  """Two gated branches with batch statistics, and a module without `arch`."""

  @nn.compact
  def __call__(self, x, train=False):
    x = nn.Dense(6, name='first')(x.reshape(len(x), -1))
    for i in range(2):
      y = nn.relu(
        nn.BatchNorm(not train, name=f'norm{i}')(nn.Dense(8, name=f'in{i}')(x))
      )
      gate = self.variable('branches', f'branch{i}', jnp.ones, ())
      x = x + gate.value * nn.Dense(6, name=f'out{i}')(y)
    return {'main': nn.Dense(3, name='head')(x)}


def images() -> ImageSet:
  rng = np.random.default_rng(0)
  split = lambda n: {
    'image': rng.integers(0, 255, (n, 2, 2, 1)).astype(np.uint8),
    'label': rng.integers(0, 3, n).astype(np.int32),
  }
  how = (3, (2, 2, 1), Normalisation((0.5,), (0.25,)), Augment())
  return ImageSet('made up', split(32), split(8), split(8), *how)


def test_rounds_are_repeated_and_held_out_data_decides(tmp_path, monkeypatch):
  """Closes half of the gated units in each of two rounds, the better half kept."""
  set_, asked, agreed = images(), [], []
  monkeypatch.setattr(
    distributed, 'agreed', lambda tree: (agreed.append(tree), tree)[1]
  )

  def build(coupling, steps, scores, whole):
    assert whole.groups.keys() == coupling.groups.keys()
    group = next(g for g in coupling.groups if g.startswith('in'))
    n = coupling.groups[group].size

    def decide(theta, stats, evaluate):
      halves = [{'channels': {group: np.arange(n) % 2 == half}} for half in (0, 1)]
      losses = [evaluate(keep)['loss'] for keep in halves]
      asked.append((n, scores[group].shape, losses))
      return halves[int(np.argmin(losses))]

    return Method(decide=decide, rounds=2 if n == 8 else 1)

  config = dataclasses.replace(CONFIG, workdir=str(tmp_path))
  train, task = jax.device_put(set_.train), classification(3)
  job = Job(
    config,
    tmp_path,
    set_,
    train,
    task,
    mesh.make_mesh(config.mesh, config.batch),
    show=False,
  )
  variables = Net().init(jax.random.key(0), jnp.zeros((1, 2, 2, 1)))
  small = rounds.shrink(job, Net(), variables, build)
  assert [n for n, _, _ in asked] == [8, 4]
  assert all(shape == (n,) and len(set(losses)) == 2 for n, shape, losses in asked)
  assert small.variables['params']['in0']['kernel'].shape == (6, 2)
  assert small.variables['batch_stats']['norm0']['mean'].shape == (2,)
  assert len(small.rounds) == 2
  decisions = [tree for tree in agreed if isinstance(tree, dict)]
  assert [len(keep['channels']) for keep in decisions] == [1, 1]
  stages = sorted(path.name for path in (tmp_path / 'checkpoints').iterdir())
  assert stages == ['finetune', 'gates-1', 'gates-2']
