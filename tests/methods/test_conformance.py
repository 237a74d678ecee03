"""What every method must do, whatever its paper: found by name, one compiled step."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from depthprune import methods
from depthprune.program.coupling import couple
from depthprune.run.config import default
from depthprune.surgery.oneshot import rank
from depthprune.surgery.prune import prune
from depthprune.train.method import Method
from depthprune.train.step import init_state, make_step
from depthprune.train.task import classification

KEY = jax.random.key(0)
IMAGES = jax.random.normal(KEY, (8, 4, 4, 2))
BATCH = {'image': IMAGES, 'label': jnp.arange(8) % 3}


class Net(nn.Module):
  """A residual unit with a gated branch, an exit before it and one behind."""

  @nn.compact
  def __call__(self, x, train=False):
    norm = lambda: nn.BatchNorm(not train)
    x = nn.relu(norm()(nn.Conv(6, (3, 3), name='stem')(x)))
    early = nn.Dense(3, name='early')(x.mean((1, 2)))
    y = nn.relu(norm()(nn.Conv(8, (3, 3), name='inside')(x)))
    gate = self.variable('branches', 'unit', jnp.ones, ()).value
    x = nn.relu(x + gate * norm()(nn.Conv(6, (3, 3), name='out')(y)))
    return {'early': early, 'main': nn.Dense(3, name='head')(x.mean((1, 2)))}


# optax's Adam raises a float to the power of an integer.
@jax.numpy_dtype_promotion('standard')
@pytest.mark.parametrize('name', methods.names())
def test_a_method_trains_in_one_program_and_decides_what_can_be_cut(name, compilations):
  net = Net()
  variables = net.init(KEY, IMAGES[:1])
  coupling = couple(net, variables, IMAGES[:1])
  scores = rank(coupling, variables, 'l1')
  method = methods.build(default(name).options, coupling, 10, scores)
  assert isinstance(method, Method)
  tx = optax.sgd(0.05)
  state = init_state(net, method, tx, variables, coupling, BATCH)
  start = jax.tree.map(np.asarray, (state.theta, state.params))
  step = make_step(net, method, classification(3), tx, coupling)
  for _ in range(3):
    compilations.clear()
    state, metrics = step(state, BATCH, KEY)
    assert all(np.isfinite(m) for m in jax.tree.leaves(metrics))
  assert not compilations
  learnt = state.theta, state.params
  moved = jax.tree.map(lambda a, b: bool((a != b).any()), start, learnt)
  # What a method trains besides the weights, where it trains anything.
  assert any(jax.tree.leaves(moved[0] if state.theta else moved))
  # Without a key the gates are those of evaluation, the same at every call.
  once, again = (method.forward(state.theta, None, state.step) for _ in range(2))
  jax.tree.map(np.testing.assert_array_equal, once, again)
  evaluate = lambda keep: {'loss': 1.0, 'accuracy': 0.5}
  keep = method.decide(jax.device_get(state.theta), state.stats, evaluate)
  pruned = prune(net, state.variables, keep, IMAGES[:1], coupling=coupling)
  before, after = (pruned.report['flops'][when] for when in ('before', 'after'))
  closes = not all(np.all(kept) for kept in jax.tree.leaves(keep))
  assert after < before if closes else after == before
