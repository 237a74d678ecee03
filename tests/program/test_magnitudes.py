"""Axes that are normalised by a norm: cut exactly, and gated where the norm reads."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import depthprune as dp
from tests import masking as m

KEY = jax.random.key(0)
X = jax.random.normal(KEY, (3, 5, 6))


def weights(**shapes):
  return {
    name: jax.random.normal(jax.random.fold_in(KEY, i), shape) / 2
    for i, (name, shape) in enumerate(shapes.items())
  }


def rms(x, scale, eps=1e-2):
  """As in Llama, with an epsilon that is felt."""
  mean = jnp.mean(jnp.square(x), axis=-1, keepdims=True)
  return x * jax.lax.rsqrt(mean + jnp.float32(eps)) * scale


NORMS = {
  'l2': lambda h: h / jnp.sqrt((h**2).sum(-1, keepdims=True)),
  'l2, eps': lambda h: h * jax.lax.rsqrt((h * h).sum(-1, keepdims=True) + 0.1),
  'l2, floor': lambda h: h / jnp.maximum(jnp.linalg.norm(h, axis=-1)[..., None], 0.5),
  'l1': lambda h: h / (jnp.abs(h).sum(-1, keepdims=True) + 0.1),
  'largest': lambda h: h / jnp.linalg.norm(h, jnp.inf, -1, keepdims=True),
  'l3': lambda h: h / jnp.cbrt((jnp.abs(h) ** 3).sum(-1, keepdims=True)),
  'mean of squares': lambda h: rms(h, 1),
  'global response': lambda h: h * (
    (n := jnp.linalg.norm(h, axis=1, keepdims=True))
    / (n.mean(-1, keepdims=True) + 0.1)
  ),
  'over all': lambda h: h
  / jnp.linalg.norm(h.reshape(len(h), -1), axis=1)[:, None, None],
  'complex': lambda h: h
  / jnp.linalg.norm(jax.lax.complex(h, jnp.sin(h)), axis=-1, keepdims=True),
  'after a bias': lambda h: NORMS['l2'](jax.nn.relu(h) + jnp.float32(0.3)),
}  # fmt: skip


def sandwiched(norm):
  def f(p, x):
    h = jnp.tanh(x @ p['a'] + p['bias'])
    return jnp.tanh(norm(h)) @ p['b']

  return f, weights(a=(6, 8), bias=(8,), b=(8, 3))


@pytest.mark.parametrize('name', NORMS)
def test_a_norm_reads_its_axis(name):
  f, variables = sandwiched(NORMS[name])
  coupling = m.agree(f, variables, X)
  [group] = coupling.groups.values()
  assert group.size == 8 and not group.ungated


@pytest.mark.parametrize('name', ['l2', 'l1', 'largest', 'l3', 'mean of squares'])
def test_soft_gates_equal_gated_activations(name):
  """The norm sees |g|^d where the activation is multiplied by g."""
  norm = NORMS[name]
  p = weights(a=(6, 8), b=(8, 3))
  f = lambda p, x, g=1.0: norm((x @ p['a']) * g) @ p['b']
  coupling = dp.couple(f, p, X)
  gate = jnp.asarray(np.random.default_rng(0).uniform(0.1, 0.9, 8), jnp.float32)
  gated = lambda p, g: dp.plug(f, coupling)(p, {'channels': {'a:1': g}}, X)
  by_hand = lambda p, g: f(p, X, g)
  both = lambda f: (
    f(p, gate),
    jax.grad(lambda p, g: (f(p, g) ** 2).sum(), argnums=(0, 1))(p, gate),
  )
  assert m.difference(both(by_hand), both(gated)) <= 2e-5


def llama(p, x, offset=0.0):
  """A pre-norm decoder whose output head is its embedding."""
  h = p['embed'][x]
  for block in p['blocks']:
    n = rms(h, offset + block['norm1'])
    q, k, v = (jnp.einsum('btd,dhk->bthk', n, block[name]) for name in 'qkv')
    share = jax.nn.softmax(jnp.einsum('bthk,bshk->bhts', NORMS['l2'](q), k))
    h = h + jnp.einsum('bhts,bshk,hkd->btd', share, v, block['o'])
    n = rms(h, offset + block['norm2'])
    h = h + (jax.nn.silu(n @ block['gate']) * (n @ block['up'])) @ block['down']
  return rms(h, offset + p['norm']) @ p['embed'].T


@pytest.mark.parametrize('offset', [0.0, 1.0])
def test_the_stream_of_a_pre_norm_decoder_is_cut(offset):
  block = lambda i: jax.tree.map(
    lambda x: x + i / 10,
    weights(
      norm1=(8,), q=(8, 2, 4), k=(8, 2, 4), v=(8, 2, 4), o=(2, 4, 8),
      norm2=(8,), gate=(8, 6), up=(8, 6), down=(6, 8),
    ),
  )  # fmt: skip
  variables: Any = {
    **weights(embed=(11, 8), norm=(8,)), 'blocks': [block(0), block(1)],
  }  # fmt: skip
  words = jax.random.randint(KEY, (3, 5), 0, 11)
  f = lambda p, x: llama(p, x, jnp.float32(offset))
  coupling = m.agree(f, variables, words)
  stream = next(g for g in coupling.groups.values() if ('embed', 1) in g.members)
  assert not stream.ungated and stream.size == 8
  assert {('norm', 0), ('blocks/1/down', 1), ('blocks/0/q', 0)} <= {*stream.members}


class Net(nn.Module):
  """Linen's RMSNorm between two layers."""

  @nn.compact
  def __call__(self, x):
    x = nn.RMSNorm(epsilon=0.1)(nn.Dense(8)(x))
    return nn.Dense(3)(x)


def test_the_rms_norms_of_flax_are_cut():
  variables = Net().init(KEY, X)
  variables['params']['Dense_0']['bias'] += jnp.float32(0.3)
  variables['params']['RMSNorm_0']['scale'] *= jnp.arange(8, dtype=jnp.float32)
  assert list(m.agree(Net(), variables, X).groups) == ['Dense_0:1']
  rngs = nnx.Rngs(0)
  net = nnx.Sequential(
    nnx.Linear(6, 8, rngs=rngs), nnx.RMSNorm(8, rngs=rngs), nnx.Linear(8, 3, rngs=rngs)
  )
  coupling = m.agree(net, nnx.state(net), X)
  assert not next(iter(coupling.groups.values())).ungated


def test_a_stack_of_layers_is_normalised_inside_its_scan():
  def f(p, x):
    layer = lambda h, w: (h + jnp.tanh(rms(h, w['scale']) @ w['up']) @ w['down'], None)
    return jax.lax.scan(layer, x @ p['in'], p['layers'])[0] @ p['out']

  variables: Any = weights(out=(8, 3))
  variables |= {
    'in': weights(a=(6, 8))['a'],
    'layers': weights(scale=(2, 8), up=(2, 8, 4), down=(2, 4, 8)),
  }
  keep = {'channels': {'in:1': np.arange(8) % 3 > 0, 'layers/up:2': np.arange(4) > 0}}
  m.agree(f, variables, X, keep)


REFUSED = {
  'layer norm': lambda h: jax.nn.standardize(h, axis=-1),
  'layer norm of squares': lambda h: jax.nn.standardize(h**2, axis=-1),
  'of squares, written out': lambda h: (s := h**2 - (h**2).mean(-1, keepdims=True))
  / jnp.sqrt((s**2).sum(-1, keepdims=True)),
  'a token writes to all channels': lambda h: NORMS['l2'](h + h[..., :1]),
  'the same, broadcast': lambda h: NORMS['l2'](
    h + jnp.broadcast_to(h[..., :1], h.shape)
  ),
  'softmax': lambda h: jax.nn.softmax(jnp.sin(h)),  # -inf would close it, without sine
  'smallest': lambda h: h / (-0.5 * jnp.abs(h)).max(-1, keepdims=True),
  'mean': lambda h: h * h.mean(-1, keepdims=True),
}  # fmt: skip


@pytest.mark.parametrize('name', REFUSED)
def test_what_sees_closed_slices_is_refused(name):
  f, variables = sandwiched(REFUSED[name])
  coupling = dp.couple(f, variables, X)
  for group in coupling.groups.values():
    assert 'reduced over' in group.ungated or 'adds one value to' in group.ungated
    keep = {'channels': {group.name: np.arange(group.size) > 0}}
    with pytest.raises(dp.InexactCut, match=group.name):
      dp.prune(f, variables, keep, X, coupling=coupling)


def test_the_norm_of_a_weight_does_not_see_activations():
  """A closed activation leaves the norm of the kernel that reads it as it was."""
  f = lambda p, x: jnp.tanh(x @ p['a']) @ NORMS['l2'](p['b'].T).T
  coupling = dp.couple(f, weights(a=(6, 8), b=(8, 3)), X)
  assert coupling.groups['a:1'].ungated.startswith('reduced over by reduce_sum')


def test_soft_gates_of_a_norm_cannot_be_folded():
  f, variables = sandwiched(NORMS['l2'])
  half = {'channels': {'a:1': jnp.full(8, 0.5)}}
  with pytest.raises(ValueError, match='Round the gates to 0 or 1'):
    dp.prune(f, variables, {}, X, gates=half)


def test_a_norm_of_closed_channels_has_a_gradient():
  """Only one channel is left, and it is 0 throughout: JAX alone would return NaN."""
  bias = jnp.where(jnp.arange(8) < 1, -9.0, 1.0)

  def f(p, x):
    return NORMS['l2, floor'](jax.nn.relu(jnp.tanh(x @ p['a']) + bias)) @ p['b']

  p = weights(a=(6, 8), b=(8, 3))
  finite = lambda tree: all(np.isfinite(x).all() for x in jax.tree.leaves(tree))
  loss = lambda f: lambda p, *gates: ((f(p, *gates, X) - 1) ** 2).sum()
  assert finite(jax.grad(loss(f))(p))
  coupling = dp.couple(f, p, X)
  one = {'channels': {'a:1': np.arange(8) < 1}}
  small = dp.prune(f, p, one, X, coupling=coupling)
  gated = jax.grad(loss(dp.plug(f, coupling)), argnums=(0, 1))(p, m.as_gates(one))
  assert finite(gated) and finite(jax.grad(loss(small.apply))(small.variables))


def test_a_network_with_a_norm_is_cut_twice():
  f, p = sandwiched(NORMS['global response'])
  first = dp.prune(f, p, {'channels': {'a:1': np.arange(8) < 6}}, X)
  coupling = m.agree(first.apply, first.variables, X)
  assert [g.size for g in coupling.groups.values()] == [6]
