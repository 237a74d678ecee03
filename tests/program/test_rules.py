"""One operation at a time between two kernels: what stays free is cut exactly.

Each operation maps activations [2, 4, 8] and, where it wants, arrays of its own.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from depthprune.program.coupling import couple
from depthprune.program.gating import plug
from depthprune.program.resize import slim
from tests import masking as m
from tests.zoo import randomised

WHERE = np.array([[0, 2], [1, 1]])
ORDER = np.array([2, 0, 3, 1, 5, 4, 7, 6])
X = jnp.asarray(np.random.default_rng(1).normal(size=(2, 4, 5)), jnp.float32)

FREE = {
  'cumulative sum over time': lambda h: jnp.cumsum(h, 1),
  'cumulative sum': lambda h: jnp.cumsum(h, -1),
  'softmax over time': lambda h: jax.nn.softmax(h, 1),
  'sort over time': lambda h: jnp.sort(h, 1),
  'reverse in time': lambda h: h[:, ::-1],
  'roll in time': lambda h: jnp.roll(h, 1, 1),
  'take in time': lambda h: jnp.take(h, np.array([3, 1, 1]), axis=1),
  'take with batch': lambda h: jax.vmap(lambda a, i: a[i])(h, jnp.asarray(WHERE)),
  'take along time': lambda h: jnp.take_along_axis(
    h, jnp.broadcast_to(jnp.asarray(WHERE)[..., None], (2, 2, h.shape[-1])), 1
  ) if h.shape[-1] == 8 else h,
  'dynamic slice in time': lambda h: lax.dynamic_slice_in_dim(h, 1, 2, 1),
  'dynamic update in time': lambda h: lax.dynamic_update_slice_in_dim(
    h, 2 * h[:, :1], 2, 1
  ),
  'scatter in time': lambda h: h.at[:, np.array([0, 2])].add(1.5 * h[:, 1:3]),
  'pad in time': lambda h: jnp.pad(h, ((0, 0), (1, 2), (0, 0))),
  'crop in time': lambda h: lax.pad(h, 0.0, ((0, 0, 0), (-1, 0, 0), (0, 0, 0))),
  'dilate in time': lambda h: lax.pad(h, 0.0, ((0, 0, 0), (0, 0, 1), (0, 0, 0))),
  'split in time': lambda h: jnp.multiply(*jnp.split(h, 2, 1)),
  'stack and max': lambda h: jnp.stack([h, 2 * h, -h], 1).max(1),
  'stack and index': lambda h: jnp.stack([h, jnp.sin(h)], 2)[:, :, 1],
  'stack last and index': lambda h: jnp.stack([h, 2 * h], -1)[..., 1],
  'stack and sum': lambda h: jnp.stack([h, jnp.sin(h)], -2).sum(-2),
  'stack last and mean': lambda h: jnp.stack([h, jnp.sin(h)], -1).mean(-1),
  'stack and merge': lambda h: jnp.stack([h, jnp.sin(h)], 2).reshape(2, 4, -1),
  'stack last and merge': lambda h: jnp.stack([h, jnp.sin(h)], -1).reshape(2, 4, -1),
  'stack three and split': lambda h: jnp.prod(
    jnp.stack(jnp.split(jnp.stack([h, 2 * h, jnp.sin(h)], 2).reshape(2, 4, -1), 3, -1)),
    axis=0,
  ),
  'stack and join': lambda h: jnp.concatenate(
    [s := jnp.stack([h, jnp.sin(h)], 1), 2 * s], 1
  ).max(1),
  'stack and unstack': lambda h: jnp.multiply(
    *jnp.unstack(jnp.stack([h, jnp.sin(h)], -1), axis=-1)
  ),
  'stack and mix': lambda h: jnp.einsum(
    'ntsc,sr->ntrc', jnp.stack([h, jnp.sin(h)], 2), jnp.float32([[1, 2], [3, 4]])
  )[:, :, 1],
  'pairs rotated': lambda h: jnp.stack([-h[..., 1::2], h[..., ::2]], -1).reshape(
    h.shape
  ),
  'map over a stack': lambda h: jax.vmap(jnp.tanh)(jnp.stack([h, 2 * h])).sum(0),
  'scan over a stack': lambda h: lax.scan(
    lambda c, x: (c + jnp.sin(x), None), h, jnp.stack([h, 2 * h])
  )[0],
  'unstack': lambda h: jnp.stack(jnp.unstack(h, axis=1)[::2], 1),
  'top 2 in time': lambda h: lax.top_k(h.swapaxes(1, 2), 2)[0].swapaxes(1, 2),
  'max pool in time': lambda h: lax.reduce_window(
    h, -jnp.inf, lax.max, (1, 2, 1), (1, 2, 1), 'VALID'
  ),
  'fourier in time': lambda h: jnp.fft.fft(h.swapaxes(1, 2)).real.swapaxes(1, 2),
  'tile in time': lambda h: jnp.tile(h, (1, 2, 1)),
  'repeat in time': lambda h: jnp.repeat(h, 2, 1),
  'new axes': lambda h: jnp.squeeze(h[:, None, :, :, None], (1, 4)),
  'merge batch and time': lambda h: h.reshape(-1, 8).reshape(h.shape),
  'associative scan': lambda h: lax.associative_scan(jnp.maximum, h, axis=1),
  'map over time': lambda h: lax.map(jnp.tanh, h.swapaxes(0, 1)).swapaxes(0, 1),
  'remat': jax.checkpoint(lambda h: jnp.sin(h) * h),
  'nested jit': jax.jit(lambda h: jax.jit(jnp.tanh)(h) + h),
  'where': lambda h: jnp.where(h > 0, h, 0.1 * h),
  'clamp': lambda h: jnp.clip(h, -0.5, 0.5),
  'stop gradient': lambda h: h + lax.stop_gradient(h),
  'cast': lambda h: h.astype(jnp.bfloat16).astype(h.dtype),
  'inner products': lambda h: jnp.einsum('ntc,nsc->nts', h, h)[..., None] * h[:, None],
  'swapped halves': lambda h: jnp.concatenate([h[..., 4:], h[..., :4]], -1),
  'halves multiplied': lambda h: h[..., :4] * h[..., 4:],
  'heads': lambda h: jnp.tanh(h.reshape(2, 4, 2, 4)).reshape(h.shape),
  'maxout': lambda h: h.reshape(2, 4, 4, 2).max(-1),
  'overlapping parts': lambda h: h[..., :5] + h[..., 3:],
  'pairs': lambda h: h[..., ::2] * h[..., 1::2],
  'channels repeated': lambda h: jnp.tile(h, (1, 1, 2)),
  'channels padded': lambda h: jnp.pad(h, ((0, 0), (0, 0), (2, 1))),
}  # fmt: skip
PINNED = {
  'reverse': lambda h: h[..., ::-1],
  'sort': jnp.sort,
  'take': lambda h: h[..., np.array([1, 0, 7])],
  # -inf has no sine, so it cannot take channels out of a competition (test_routing.py).
  'top 2': lambda h: lax.top_k(jnp.sin(h), 2)[0],
  'fourier': lambda h: jnp.fft.fft(h).real,
  'dynamic slice': lambda h: lax.dynamic_slice_in_dim(h, 1, 3, 2),
  'dynamic update': lambda h: lax.dynamic_update_slice_in_dim(h, h[..., :2], 3, 2),
  'scatter': lambda h: h.at[..., np.array([0, 5])].set(0.0),
  'scatter of itself': lambda h: jnp.ones_like(h).at[..., ORDER].add(h),
  'scatter over it': lambda h: jnp.ones_like(h).at[..., ORDER].set(h),
  'scatter twice to one place': lambda h: jnp.ones_like(h).at[..., ORDER // 2].mul(h),
  'scatter to another width': lambda h: jnp.zeros((2, 4, 12)).at[..., ORDER + 3].max(h),
  'crop': lambda h: lax.pad(h, 0.0, ((0, 0, 0), (0, 0, 0), (-2, 0, 0))),
  'dilate': lambda h: lax.pad(h, 0.0, ((0, 0, 0), (0, 0, 0), (0, 0, 1))),
  'pool': lambda h: lax.reduce_window(h, 0.0, lax.add, (1, 1, 2), (1, 1, 2), 'VALID'),
  'argmax': lambda h: jax.nn.one_hot(jnp.sin(h).argmax(-1), 8),
  'convolved as space': lambda h: lax.conv_general_dilated(
    h[..., None], jnp.ones((2, 2, 1, 1)), (1, 1), 'VALID',
    dimension_numbers=('NHWC', 'HWIO', 'NHWC'),
  )[..., 0],
}  # fmt: skip


def sandwiched(operation):
  """(f, arrays): a kernel, the operation, a kernel that reads its channels."""
  out = jax.eval_shape(operation, jax.ShapeDtypeStruct((2, 4, 8), jnp.float32))
  shapes = {'in': (5, 8), 'bias': (8,), 'read': (out.shape[-1], 3)}
  arrays = {n: jax.ShapeDtypeStruct(s, jnp.float32) for n, s in shapes.items()}
  f = lambda p, x: jnp.tanh(operation(x @ p['in'] + p['bias'])) @ p['read']
  return f, randomised(arrays)


@pytest.mark.parametrize('name', FREE)
def test_channels_stay_free(name):
  f, arrays = sandwiched(FREE[name])
  coupling = couple(f, arrays, X)
  writers = {p for g in coupling.groups.values() for p, _ in g.members}
  assert not coupling.unknown and 'in' in writers
  keep = m.random_keep(coupling, gated=name == 'maxout')  # a maximum feels the others
  small = slim(f, coupling, keep)(m.smaller(coupling, arrays, keep), X)
  masked = f(m.zeroed(coupling, arrays, keep), X)
  assert m.difference(masked, small) <= 1e-5
  assert m.difference(f(arrays, X), masked) > 1e-3
  if keep['channels'].keys() <= coupling.gates()['channels'].keys():
    closed = plug(f, coupling)(arrays, m.as_gates(keep), X)
    assert m.difference(closed, small) <= 1e-5


@pytest.mark.parametrize('name', PINNED)
def test_channels_are_pinned(name):
  """Where an operation tells one channel from another, all of them stay."""
  f, arrays = sandwiched(PINNED[name])
  coupling = couple(f, arrays, X)
  assert not any(p == 'in' for g in coupling.groups.values() for p, _ in g.members)
  assert not coupling.unknown
  [reasons] = [p.reasons for p in coupling.pinned if (p.path, p.axis) == ('in', 1)]
  assert reasons
  keep = m.random_keep(coupling)  # the reader may still be free
  small = slim(f, coupling, keep)(m.smaller(coupling, arrays, keep), X)
  assert m.difference(f(m.zeroed(coupling, arrays, keep), X), small) <= 1e-5


def test_a_scatter_says_where_it_is():
  """In a way that finds the line; the network is cut around it."""
  f, arrays = sandwiched(PINNED['scatter of itself'])
  coupling = couple(f, arrays, X)
  [reason] = {r for p in coupling.pinned if p.path == 'in' for r in p.reasons}
  assert reason.startswith('spread over another axis by scatter-add')
  assert 'test_rules.py' in reason


@pytest.mark.parametrize(
  'accumulate', [lax.cumsum, lax.cumprod, lax.cummax, lax.cummin, lax.cumlogsumexp]
)
def test_what_accumulates_over_channels_is_cut_but_takes_no_gate(accumulate):
  """A channel of zeros still counts in those after it; over time nothing is felt."""
  for axis, reason in ((1, ''), (2, f'accumulated along by {accumulate.__name__}')):
    f, arrays = sandwiched(lambda h, axis=axis: accumulate(h, axis))
    coupling = couple(f, arrays, X)
    [group] = coupling.groups.values()
    assert set(group.members) == {('in', 1), ('bias', 0), ('read', 0)}
    assert group.ungated.startswith(reason) and bool(group.ungated) == bool(reason)
    assert bool(coupling.gates()['channels']) == (not reason)
    small = m.smaller(coupling, arrays, keep := m.random_keep(coupling))
    assert m.difference(f(small, X), slim(f, coupling, keep)(small, X)) <= 1e-5
