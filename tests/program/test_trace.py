"""One function at other shapes, in other modes, with static and array arguments."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from depthprune.program.coupling import couple
from depthprune.program.gating import plug
from depthprune.program.resize import slim
from tests import masking as m
from tests.zoo import randomised

X = jnp.asarray(np.random.default_rng(1).normal(size=(2, 4, 5)), jnp.float32)
P = randomised(
  {n: jax.ShapeDtypeStruct(s, jnp.float32) for n, s in
   {'in': (5, 8), 'square': (8, 8), 'read': (8, 3)}.items()}
)  # fmt: skip


def network(p, x, mode='plain', scale=None, noise=None):
  h = jnp.tanh(x @ p['in'])
  if mode == 'sorted':
    h = jnp.sort(h)
  elif mode == 'normed':
    h = h / h.sum(-1, keepdims=True)
  elif mode == 'residual':
    h = h + h @ p['square']
  elif mode == 'heads':
    h = h.reshape(*h.shape[:-1], 2, 4).max(-2).repeat(2, -1)
  if noise is not None:
    h = h * jax.random.bernoulli(noise, 0.5, h.shape).astype(h.dtype)
  h = h if scale is None else h * scale
  return h @ p['read']


COUPLED = couple(network, P, X)
KEEP = {'channels': {'in:1': np.array([1, 0, 1, 1, 0, 0, 1, 0], bool)}}


def both(**kwargs):
  """(masked, small) at another number of words."""
  x = jnp.tile(X, (2, 3, 1))
  small = {'in': P['in'][:, KEEP['channels']['in:1']], 'square': P['square'],
           'read': P['read'][KEEP['channels']['in:1']]}  # fmt: skip
  closed = plug(network, COUPLED)(P, m.as_gates(KEEP), x, **kwargs)
  return closed, slim(network, COUPLED, KEEP)(small, x, **kwargs)


@pytest.mark.parametrize(
  'kwargs',
  [{}, {'mode': 'plain'}, {'scale': jnp.float32(3)}, {'noise': jax.random.key(3)}],
  ids=['none', 'static', 'array', 'key'],
)
def test_arguments_are_static_or_arrays_as_they_come(kwargs):
  closed, small = both(**kwargs)
  assert m.difference(closed, small) <= 1e-5
  jitted = jax.jit(
    lambda p, x, scale: slim(network, COUPLED, KEEP)(p, x, scale=scale)
  )  # fmt: skip
  cut = m.smaller(COUPLED, {**P}, KEEP)
  plain = slim(network, COUPLED, KEEP)(cut, X)
  assert m.difference(3 * plain, jitted(cut, X, jnp.float32(3))) <= 1e-5


@pytest.mark.parametrize(
  'mode, why', [('sorted', 'sorted along'), ('normed', 'reduced over by reduce_sum')]
)
def test_a_mode_that_forbids_the_cut_is_refused(mode, why):
  message = f'in:1: {why}.*was not so where the function was coupled'
  with pytest.raises(ValueError, match=message):
    plug(network, COUPLED)(P, m.as_gates(KEEP), X, mode=mode)
  with pytest.raises(ValueError, match=message):
    slim(network, COUPLED, KEEP)(P, X, mode=mode)


def test_a_mode_that_couples_more_is_refused():
  """A square kernel takes part in it, or channels are laid out in heads."""
  small = m.smaller(COUPLED, P, KEEP)
  with pytest.raises(ValueError, match=r'square: has shape \(8, 8\), keep leaves'):
    slim(network, COUPLED, KEEP)(small, X, mode='residual')
  gates = {'channels': {'in:1': jnp.ones(8), 'square:0': jnp.ones(8)}}
  differs = 'in this mode and at these shapes'
  with pytest.raises(ValueError, match=differs):
    plug(network, couple(squared, P, X))(P, gates, X, mode='residual')
  with pytest.raises(ValueError, match=differs):
    plug(network, COUPLED)(P, m.as_gates(KEEP), X, mode='heads')
  with pytest.raises(ValueError, match=differs):
    slim(network, COUPLED, KEEP)(small, X, mode='heads')


def squared(p, x, mode='plain'):
  """Reads the square kernel, apart from the hidden channels."""
  return network(p, x) + (x[..., :1] @ jnp.ones((1, 8)) @ p['square'])[..., :3]


def test_coupled_in_its_own_mode_it_works():
  coupling = couple(network, P, X, mode='residual')
  keep = m.random_keep(coupling)
  masked = network(m.zeroed(coupling, P, keep), X, mode='residual')
  small = m.smaller(coupling, P, keep)
  got = slim(network, coupling, keep)(small, X, mode='residual')
  assert m.difference(masked, got) <= 1e-5


def test_integer_outputs_and_structures_come_back_as_they_were():
  def f(p, x):
    h = jnp.tanh(x @ p['in'])
    return {
      'label': (h @ p['read']).argmax(-1),
      'both': (h @ p['read'], x),
    }

  coupling = couple(f, P, X)
  keep = {'channels': {'in:1': KEEP['channels']['in:1']}}
  got = slim(f, coupling, keep)(m.smaller(coupling, P, keep), X)
  expected = f(m.zeroed(coupling, P, keep), X)
  assert jax.tree.structure(got) == jax.tree.structure(expected)
  np.testing.assert_array_equal(got['label'], expected['label'])
  assert m.difference(expected['both'], got['both']) <= 1e-5
