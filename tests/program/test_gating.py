"""Gates at contractions against gates written by hand on the activations."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from depthprune.program.coupling import couple
from depthprune.program.gating import plug
from tests import masking as m
from tests.zoo import NETWORKS, Case, image, randomised
from tests.zoo.functions import convolve


class ByHand(NamedTuple):
  """f(p, x, *gates): with gates given, each activation is gated wherever it is read."""

  f: Callable
  shapes: dict[str, tuple[int, ...]]
  groups: tuple[str, ...]
  x: jax.Array


def square(p, x, g=1.0):
  """A residual stream with a square kernel, and a shared one used twice."""
  h = x @ p['in']
  h = h + jnp.tanh((h * g) @ p['square'])
  for _ in range(2):
    h = h + jax.nn.relu((h * g) @ p['shared'])
  return (h * g) @ p['out']


def convolutions(p, x, g=1.0, k=1.0):
  """Bias and scale between producer and consumer; the first is read by two kernels."""
  h = jax.nn.relu(convolve(x, p['one']) * p['scale'] + p['bias'])
  y = jax.nn.relu(convolve(h * g, p['two']))
  return convolve(y * k, p['three']) + convolve(h * g, p['skip'])


def grouped(p, x, inner=None, groups=None, outer=None):
  """Channels inside the groups of a grouped convolution, whole groups, and outputs."""
  h = jax.nn.relu(convolve(x, p['in']))  # [..., 2 groups x 3]
  y = jax.nn.relu(
    convolve(h if inner is None else h * jnp.tile(inner, 2), p['grouped'], 2)
  )
  if groups is not None:  # [..., 2 groups x 2]
    y = y * jnp.repeat(groups, 2) * jnp.tile(outer, 2)
  return convolve(y, p['out'])


def depthwise(p, x, g=1.0):
  """A depthwise convolution contracts no channels: the gate is the next reader's."""
  h = jax.nn.relu(convolve(x, p['in']))
  h = jax.nn.relu(convolve(h, p['depthwise'], 6))
  return convolve(h * g, p['out'])


def attention(p, x, width=1.0, value=1.0, heads=1.0):
  """Query and key meet each other, never a weight."""
  q, k, v = (jnp.einsum('nld,dhe->nlhe', x, p[name]) for name in ('q', 'k', 'v'))
  weights = jax.nn.softmax(jnp.einsum('nqhe,nkhe->nhqk', q * width, k))
  y = jnp.einsum('nhqk,nkhe->nqhe', weights, v)
  if jnp.ndim(heads):
    heads = heads[:, None]
  return jnp.einsum('nqhe,hed->nqd', y * heads * value, p['out'])


def scanned(p, x, g=1.0):
  """A recurrent state, read by one kernel inside the loop and one outside."""

  def step(h, row):
    h = jnp.tanh(row @ p['in'] + (h * g) @ p['state'])
    return h, h

  last, states = lax.scan(step, jnp.zeros((x.shape[1], 8), x.dtype), x)
  return (last * g) @ p['out'] + (states.max(0) * g) @ p['out']


def joined(p, x, a=1.0, b=1.0):
  """A concatenation read by one kernel."""
  one, two = jax.nn.relu(x @ p['one']), jnp.tanh(x @ p['two'])
  return jnp.concatenate([one * a, two * b, x, one * a], -1) @ p['out']


X = jnp.asarray(np.random.default_rng(1).normal(size=(4, 5)), jnp.float32)
WORDS = jnp.asarray(np.random.default_rng(1).normal(size=(2, 6, 5)), jnp.float32)
CASES = {
  'square': ByHand(
    square, {'in': (5, 8), 'square': (8, 8), 'shared': (8, 8), 'out': (8, 3)},
    ('in:1',), X,
  ),
  'convolutions': ByHand(
    convolutions,
    {
      'one': (3, 3, 3, 6), 'scale': (6,), 'bias': (6,), 'two': (3, 3, 6, 4),
      'three': (1, 1, 4, 3), 'skip': (1, 1, 6, 3),
    },
    ('one:3', 'two:3'), image(2, 4),
  ),
  'grouped': ByHand(
    grouped,
    {'in': (1, 1, 3, 6), 'grouped': (3, 3, 3, 4), 'out': (1, 1, 4, 3)},
    ('in:3.1', 'in:3.0', 'grouped:3.1'), image(2, 4),
  ),
  'depthwise': ByHand(
    depthwise, {'in': (1, 1, 3, 6), 'depthwise': (3, 3, 1, 6), 'out': (1, 1, 6, 3)},
    ('in:3',), image(2, 4),
  ),
  'attention': ByHand(
    attention, {**dict.fromkeys('qkv', (5, 3, 4)), 'out': (3, 4, 5)},
    ('q:2', 'v:2', 'q:1'), WORDS,
  ),
  'scanned': ByHand(
    scanned, {'in': (5, 8), 'state': (8, 8), 'out': (8, 3)}, ('in:1',), WORDS,
  ),
  'joined': ByHand(
    joined, {'one': (5, 4), 'two': (5, 6), 'out': (19, 3)}, ('one:1', 'two:1'), X,
  ),
}  # fmt: skip


def arrays(case: ByHand) -> Any:
  return Case(case.f, image, case.shapes).variables(seed=4)


def soft(coupling, groups) -> list[jax.Array]:
  draw = np.random.default_rng(9)
  sizes = [coupling.groups[g].size for g in groups]
  return [jnp.asarray(draw.uniform(0.1, 0.9, n), jnp.float32) for n in sizes]


@pytest.mark.parametrize('name', CASES)
def test_soft_gates_equal_gated_activations_in_value_and_gradient(name):
  case = CASES[name]
  p = arrays(case)
  coupling = couple(lambda p, x: case.f(p, x), p, case.x)
  assert set(case.groups) == set(coupling.groups)
  gated, gates = plug(coupling.fn, coupling), soft(coupling, case.groups)

  def plugged(p, gates):
    channels = dict(zip(case.groups, gates, strict=True))
    return gated(p, {'channels': channels}, case.x)

  def by_hand(p, gates):
    return case.f(p, case.x, *gates)

  def both(f):
    slopes = jax.grad(lambda p, gates: (f(p, gates) ** 2).sum(), argnums=(0, 1))
    return jax.jit(lambda p, gates: (f(p, gates), slopes(p, gates)))(p, gates)

  assert m.difference(both(by_hand), both(plugged)) <= 2e-5
  assert m.difference(case.f(p, case.x), plugged(p, gates)) > 1e-2
  for i in range(len(gates)):  # each gate is felt
    assert np.abs(both(plugged)[1][1][i]).min() > 0


@pytest.mark.parametrize('name', ['square', 'convolutions', 'attention'])
def test_bfloat16_networks_take_float32_gates(name):
  case = CASES[name]
  half = lambda tree: jax.tree.map(lambda a: a.astype(jnp.bfloat16), tree)
  p, x = half(arrays(case)), half(case.x)
  coupling = couple(lambda p, x: case.f(p, x), p, x)
  gates = soft(coupling, case.groups)
  channels = dict(zip(case.groups, gates, strict=True))
  got = jax.jit(plug(coupling.fn, coupling))(p, {'channels': channels}, x)
  exact = case.f(arrays(case), case.x, *gates)
  assert got.dtype == jnp.bfloat16
  assert m.difference(exact, got) < 0.05


def test_open_gates_change_nothing_and_missing_ones_are_open():
  case = NETWORKS['resnet basic']
  variables, x = case.variables(), case.inputs(2)
  coupling = couple(case.model, variables, x)
  gated = m.quick(plug(case.model, coupling))
  expected = m.quick(case.model.apply)(variables, x)
  np.testing.assert_array_equal(gated(variables, coupling.gates(), x), expected)
  np.testing.assert_array_equal(gated(variables, {}, x), expected)


def test_gates_hold_in_training_and_return_new_statistics():
  case = NETWORKS['vgg']
  variables, x = case.variables(), case.inputs(5)
  coupling = couple(case.model, variables, case.inputs(2))
  keep = m.random_keep(coupling)
  mode = {
    'train': True,
    'mutable': ['batch_stats'],
    'rngs': {'dropout': jax.random.key(1)},
  }
  gated = plug(case.model, coupling)
  out, new = gated(variables, m.as_gates(keep), x, **mode)
  masked = m.zeroed(coupling, variables, keep)
  expected, statistics = case.model.apply(masked, x, **mode)
  assert m.difference(expected, out) <= 1e-5
  cut = lambda s: m.smaller(coupling, {**variables, **s}, keep)['batch_stats']
  assert m.difference(cut(statistics), cut(new)) <= 1e-5


def test_branch_gates_replace_those_of_the_variables():
  def f(v, x):
    return x + v['branches']['unit'] * (x @ v['params']['w'])

  x = jnp.ones((2, 3))
  v = {'params': {'w': jnp.eye(3)}, 'branches': {'unit': jnp.ones(())}}
  coupling = couple(f, v, x)
  assert coupling.branches == ('unit',) and coupling.gates()['branches'].keys() == {
    'unit'
  }
  gated = plug(f, coupling)
  np.testing.assert_array_equal(gated(v, {'branches': {'unit': 0.5}}, x), 1.5 * x)
  with pytest.raises(KeyError, match='units: the variables have no such branch gate'):
    gated(v, {'branches': {'units': 0.5}}, x)


def test_gates_that_cannot_be_are_refused_with_the_reason():
  shapes = jax.eval_shape(lambda: {'in': jnp.ones((5, 8)), 'out': jnp.ones((8, 3))})
  p = randomised(shapes)
  f = lambda p, x: (y := x @ p['in']) / y.sum(-1, keepdims=True) @ p['out']
  coupling = couple(f, p, X)
  with pytest.raises(
    ValueError, match=r'in:1: this group cannot be gated: reduced over'
  ):
    plug(f, coupling)(p, {'channels': {'in:1': jnp.ones(8)}}, X)
  f = lambda p, x: jax.nn.relu(x @ p['in']) @ p['out']
  coupling = couple(f, p, X)
  with pytest.raises(ValueError, match=r'in:1: gate has shape \(7,\), its axis has 8'):
    plug(f, coupling)(p, {'channels': {'in:1': jnp.ones(7)}}, X)
  with pytest.raises(KeyError, match='no such group; nearest: in:1'):
    plug(f, coupling)(p, {'channels': {'inn:1': jnp.ones(8)}}, X)
  g = lambda p, x: jnp.sort(x @ p['in']) @ p['out']
  coupling = couple(g, p, X)
  with pytest.raises(KeyError, match=r'in:1: this axis is pinned \(sorted along\)'):
    plug(g, coupling)(p, {'channels': {'in:1': jnp.ones(8)}}, X)
