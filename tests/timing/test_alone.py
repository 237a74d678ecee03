"""Layers timed alone: each once, at its shapes, as often as it is called."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from depthprune.program import cost
from depthprune.program.coupling import couple
from depthprune.timing import alone
from depthprune.timing.alone import milliseconds_alone
from tests import zoo

X = jnp.ones((4, 6))


def net(p, x):
  """Two products of the same shapes, one of them three times in a loop, and a last."""
  x = jnp.tanh(x @ p['a'])
  x, _ = jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, p['loop'])
  return x @ p['last']


def coupled(last=3):
  shapes = {'a': (6, 6), 'loop': (3, 6, 6), 'last': (6, last)}
  return couple(net, {k: jnp.ones(s) for k, s in shapes.items()}, X)


def test_layers_of_the_same_shapes_are_timed_once_and_count_by_their_calls(monkeypatch):
  seen = []

  def took(calls, seconds, **_):
    """A millisecond for every column of what a call returns, and one noisy turn."""
    shapes = [np.shape(call()[0]) for call in calls]
    seen.append(shapes)
    return np.array([[n, 100, n] for _, n in shapes], float)

  monkeypatch.setattr(alone.clock, 'interleave', took)
  before, after = milliseconds_alone([coupled(), coupled(last=2)])
  assert seen == [[(4, 6), (4, 3), (4, 2)]]
  assert before == {'a': 6.0, 'loop': 18.0, 'last': 3.0}
  assert after == {'a': 6.0, 'loop': 18.0, 'last': 2.0}


@pytest.mark.parametrize('name', ['resnet option A', 'vit', 'vit scanned', 'gru'])
def test_every_layer_has_a_time(name, monkeypatch):
  """Of convolutions, of products of activations, and of loops, really run."""
  turns = alone.clock.interleave
  once = lambda calls, seconds, **_: turns(calls, 0.0, least=1, warmup=1)
  monkeypatch.setattr(alone.clock, 'interleave', once)
  case = zoo.NETWORKS[name]
  variables = jax.eval_shape(case.model.init, jax.random.key(0), case.inputs(2))
  coupling = couple(case.model, variables, case.inputs(2))
  (found,) = milliseconds_alone([coupling])
  assert found.keys() == cost.layers(coupling).keys()
  assert min(found.values()) > 0


def test_a_network_without_layers_has_no_times():
  assert milliseconds_alone([couple(lambda p, x: x * p, jnp.ones(6), X)]) == [{}]
