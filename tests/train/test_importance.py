"""The slope of a gate, beside that of a factor that is written into the network."""

import jax
import jax.numpy as jnp
import numpy as np

from depthprune.program.coupling import couple
from depthprune.train.importance import taylor
from depthprune.train.task import classification

TASK = classification(3)


def network(variables, x, gates=(1.0, 1.0), train=False):
  del train
  p = variables['params']
  h = jax.nn.relu(x @ p['first']) * gates[0]
  return (jax.nn.relu(h @ p['second']) * gates[1]) @ p['last']


def test_it_is_the_mean_over_batches_of_the_squared_slope_of_an_explicit_gate():
  keys = jax.random.split(jax.random.key(0), 5)
  sizes = {'first': (5, 8), 'second': (8, 6), 'last': (6, 3)}
  params = {
    n: jax.random.normal(k, sizes[n]) for n, k in zip(sizes, keys, strict=False)
  }
  variables = {'params': params}
  batches = [
    {'image': jax.random.normal(k, (7, 5)), 'label': jnp.arange(7) % 3}
    for k in keys[3:]
  ]
  coupling = couple(network, variables, jnp.ones((1, 5)))
  found = taylor(network, coupling, variables, TASK, batches)

  def loss(gates, batch):
    return TASK.loss(network(variables, batch['image'], gates), batch)

  slopes = [jax.grad(loss)((jnp.ones(8), jnp.ones(6)), batch) for batch in batches]
  for i, group in enumerate(('first:1', 'second:1')):
    expected = np.mean([np.square(each[i]) for each in slopes], axis=0)
    np.testing.assert_allclose(found[group], expected, rtol=1e-4, atol=1e-9)
  assert [*found] == ['first:1', 'second:1']
