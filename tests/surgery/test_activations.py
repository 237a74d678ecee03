"""Activations at every read, against values by hand and against the network's own."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from depthprune.program.coupling import couple
from depthprune.program.gating import plug
from depthprune.surgery.activations import activations
from depthprune.surgery.oneshot import oneshot
from depthprune.surgery.prune import prune
from tests import zoo

X = jnp.asarray([[1.0, 2.0, -1.0], [0.0, -1.0, 1.0]])
# X @ A is [[1, 0, 4], [0, 1.5, -3]]; rectified [[1, 0, 4], [0, 1.5, 0]].
MLP = {
  'a': jnp.asarray([[1.0, 2.0, 0.0], [0.0, -0.5, 1.0], [0.0, 1.0, -2.0]]),
  'b': jnp.asarray([[1.0, -1.0], [3.0, 5.0], [-1.0, 1.0]]),
}


def mlp(p, x):
  return jax.nn.relu(x @ p['a']) @ p['b']


@pytest.mark.parametrize(
  ('measure', 'expected'),
  [
    ('absolute', [0.5, 0.75, 2]),
    ('square', [0.5, 1.125, 8]),
    ('nonzero', [0.5, 0.5, 0.5]),
  ],
)
def test_the_hidden_units_of_an_mlp_by_hand(measure, expected):
  coupling = couple(mlp, MLP, X)
  scores = activations(coupling, MLP, [X], measure)
  np.testing.assert_allclose(scores['a:1'], expected)
  assert scores['a:1'].dtype == np.float64


def test_batches_of_any_sizes_are_one_mean():
  coupling = couple(mlp, MLP, X)
  x = jax.random.normal(jax.random.key(0), (7, 3))
  at_once = activations(coupling, MLP, [x])['a:1']
  apart = activations(
    coupling, MLP, (x[i] for i in (slice(3), slice(3, 4), slice(4, 7)))
  )
  np.testing.assert_allclose(apart['a:1'], at_once, rtol=1e-6)
  np.testing.assert_allclose(at_once, np.abs(nn.relu(x @ MLP['a'])).mean(0), rtol=1e-6)


def test_a_convolution_reads_what_is_behind_the_pooling():
  """By hand: one channel is the image, the other its negative, and both are pooled."""
  kernel = np.zeros((1, 1, 1, 2), np.float32)
  kernel[..., 0], kernel[..., 1] = 1, -1
  p = {'first': jnp.asarray(kernel), 'last': jnp.ones((2, 2, 2, 4))}
  numbers = ('NHWC', 'HWIO', 'NHWC')

  def net(p, x):
    conv = lambda x, k: jax.lax.conv_general_dilated(
      x, k, (1, 1), 'VALID', dimension_numbers=numbers
    )
    h = nn.max_pool(nn.relu(conv(x, p['first'])), (2, 2), (2, 2))
    return conv(h, p['last'])

  x = np.zeros((1, 4, 4, 1), np.float32)
  x[0, 0, 0], x[0, 3, 3], x[0, 3, 2] = 8, -4, -2  # in two of four windows
  coupling = couple(net, p, x)
  means = {
    m: activations(coupling, p, [x], m)['first:3'] for m in ('absolute', 'square')
  }
  np.testing.assert_allclose(means['absolute'], [8 / 4, 4 / 4])
  np.testing.assert_allclose(means['square'], [64 / 4, 16 / 4])


def test_every_read_of_a_residual_stream_counts():
  """The stream is read before and after a block adds to it."""
  p = {'in': jnp.eye(3), 'w': 2 * jnp.eye(3), 'out': jnp.ones((3, 1))}

  def net(p, x):
    h = x @ p['in']
    return (h + h @ p['w']) @ p['out']

  scores = activations(couple(net, p, X), p, [X])
  reads = np.concatenate([X, 3 * X])
  np.testing.assert_allclose(scores['in:1'], np.abs(reads).mean(0))


def test_groups_and_heads_share_an_axis():
  """Channels of a grouped convolution and the width of heads: factors of one axis."""
  p = {'first': jnp.ones((3, 8)), 'out': jnp.ones((4, 2))}
  x = jnp.arange(6.0).reshape(2, 3)

  def net(p, x):
    h = (x @ p['first']).reshape(2, 2, 4) * jnp.asarray([[[1.0]], [[3.0]]])
    return h @ p['out']

  coupling = couple(net, p, x)
  (name,) = [g.name for g in coupling.groups.values() if not g.ungated]
  expected = np.abs(np.asarray([x[0].sum(), 3 * x[1].sum()])).mean()
  np.testing.assert_allclose(activations(coupling, p, [x])[name], [expected] * 4)


def loop(kind):
  """A stack of layers, whose hidden units are read inside of a loop."""

  def net(p, x):
    layer = lambda h: jax.nn.relu(h @ p['a']) @ p['b']
    if kind == 'unrolled':
      return layer(layer(layer(x)))
    if kind == 'scan':
      return jax.lax.scan(lambda h, _: (layer(h), None), x, None, length=3)[0]
    if kind == 'while':
      step = lambda loop: (loop[0] + 1, layer(loop[1]))
      return jax.lax.while_loop(lambda loop: loop[0] < 3, step, (0, x))[1]
    if kind == 'cond':
      branches = [lambda h: h, lambda h: layer(layer(layer(h)))]
      return jax.lax.switch(jnp.int32(x.shape[0] > 0), branches, x)
    return layer(jax.checkpoint(layer)(jax.jit(layer)(x)))

  return net


@pytest.mark.parametrize('kind', ['scan', 'while', 'cond', 'calls'])
def test_reads_inside_of_loops_and_branches_count(kind):
  p = {
    'a': jax.random.normal(jax.random.key(0), (3, 5)),
    'b': jax.random.normal(jax.random.key(1), (5, 3)),
  }
  found = activations(couple(loop(kind), p, X), p, [X])
  expected = activations(couple(loop('unrolled'), p, X), p, [X])
  assert found.keys() == expected.keys() == {'a:1'}
  np.testing.assert_allclose(found['a:1'], expected['a:1'], rtol=1e-5)


@pytest.mark.parametrize('name', [*zoo.NETWORKS])
def test_no_score_depends_on_how_a_network_is_written(name):
  """All networks have finite scores; a channel never read as other than 0 may go."""
  case = zoo.NETWORKS[name]
  variables, x = case.variables(), case.inputs(2)
  coupling = couple(case.model, variables, x)
  scores = activations(coupling, variables, [x], 'nonzero')
  gates = coupling.gates()['channels']
  assert scores.keys() == gates.keys()
  assert all(s.shape == gates[g].shape for g, s in scores.items())
  assert all(((s >= 0) & (s <= 1)).all() for s in scores.values())
  unread = {g: (s > 0).astype(np.float32) for g, s in scores.items()}
  gated = plug(case.model, coupling)
  out = gated(variables, {'channels': unread}, x)
  for a, b in zip(
    jax.tree.leaves(out), jax.tree.leaves(gated(variables, {}, x)), strict=True
  ):
    np.testing.assert_allclose(a, b, atol=1e-6)


def test_dead_units_go_first_and_the_network_stays_the_same():
  """Half of the units never fire on the data, whatever the norms of their weights."""
  dead = jnp.asarray([1, 0, 1, 0, 0, 1], bool)
  draw = lambda i, *shape: jax.random.normal(jax.random.key(i), shape)
  bias = jnp.where(dead, -100.0, 1.0)
  p = {'a': draw(0, 4, 6) * jnp.where(dead, 9.0, 1.0), 'bias': bias, 'b': draw(1, 6, 2)}
  net = lambda p, x: jax.nn.relu(x @ p['a'] + p['bias']) @ p['b']
  x = draw(2, 32, 4)
  coupling = couple(net, p, x[:1])
  score = activations(coupling, p, [x[:20], x[20:]])
  keep = oneshot(coupling, p, 0.5, score=score)
  np.testing.assert_array_equal(keep['channels']['a:1'], ~dead)
  small = prune(net, p, keep, x[:1])
  np.testing.assert_allclose(small.apply(small.variables, x), net(p, x), atol=1e-4)


def test_arrays_by_keyword_and_several_inputs():
  def net(p, x, y, *, mask, scale=1.0):
    return jax.nn.relu((x + y) @ p['a']) * mask[:, None] * scale @ p['b']

  half, mask = X / 2, jnp.asarray([1.0, 0.0])
  coupling = couple(net, MLP, half, half, mask=mask, scale=3.0)
  scores = activations(coupling, MLP, [((half, half), {'mask': mask})])
  np.testing.assert_allclose(scores['a:1'], [1.5, 0, 6])
  with pytest.raises(ValueError, match=r"is a pair \(inputs, {'mask': ...}\)"):
    activations(coupling, MLP, [(half, half)])


@pytest.mark.parametrize(
  ('batches', 'message'),
  [
    (X, r'batches like the inputs of couple \(float32\[2, 3\]\), got float32\[3\]'),
    ([{'image': X}], 'batches like the inputs'),
    ([(X, X)], 'batches like the inputs'),
    ([X.astype(int)], r'got int32\[2, 3\]'),
    ([], 'at least one batch'),
  ],
)
def test_batches_that_do_not_fit_are_refused(batches, message):
  with pytest.raises(ValueError, match=message):
    activations(couple(mlp, MLP, X), MLP, batches)


def test_an_unknown_measure_names_the_known():
  with pytest.raises(ValueError, match='measure: expected one of absolute, square'):
    activations(couple(mlp, MLP, X), MLP, [X], measure='l1')  # pyright: ignore
