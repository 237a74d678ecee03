"""Refitted weights, against least squares by NumPy and against exact duplicates."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding, PartitionSpec

import depthprune as dp
from depthprune.models.decoder import Decoder
from depthprune.surgery.refit import refit

RIDGE = 1e-12  # none, where float64 solves


def uniform(seed: int, *shape: int) -> jax.Array:
  return jax.random.normal(jax.random.key(seed), shape)


def mlp(p, x):
  return jax.nn.relu(x @ p['a']) @ p['b']


def nearest(rows, kept, w):
  """The weights that read only `kept` and come nearest to what all of them give."""
  rows, w = np.asarray(rows, float), np.asarray(w, float)
  return np.linalg.lstsq(rows[:, kept], rows @ w, rcond=None)[0]


def test_a_dense_layer_is_the_least_squares_fit():
  p = {'a': uniform(0, 5, 8), 'b': uniform(1, 8, 3)}
  x = uniform(2, 64, 5)
  kept = np.arange(8) % 3 > 0
  coupling = dp.couple(mlp, p, x)
  new = refit(coupling, p, {'channels': {'a:1': kept}}, [x[:40], x[40:]], RIDGE)
  expected = nearest(jax.nn.relu(x @ p['a']), kept, p['b'])
  np.testing.assert_allclose(new['b'][kept], expected, rtol=1e-3, atol=1e-4)
  np.testing.assert_array_equal(new['a'], p['a'])
  np.testing.assert_array_equal(new['b'][~kept], p['b'][~kept])


@settings(deadline=None, max_examples=20)
@given(seed=st.integers(0, 1000), closed=st.integers(1, 6))
def test_the_layer_never_gets_further_from_what_it_was(seed, closed):
  p = {'a': uniform(seed, 5, 8), 'b': uniform(seed + 1, 8, 3)}
  x = uniform(seed + 2, 64, 5)
  kept = np.arange(8) >= closed
  keep = {'channels': {'a:1': kept}}
  new = refit(dp.couple(mlp, p, x), p, keep, [x])
  h = np.maximum(x @ p['a'], 0)
  error = lambda b: np.square(h[:, kept] @ b[kept] - h @ p['b']).sum()
  assert error(new['b']) <= error(p['b']) * (1 + 1e-5)


@pytest.mark.parametrize(
  ('strides', 'dilation', 'padding'),
  [((1, 1), (1, 1), 'SAME'), ((2, 2), (1, 1), 'VALID'), ((1, 2), (2, 1), 'SAME')],
)
def test_a_convolution_is_fitted_over_its_window(strides, dilation, padding):
  conv = lambda x, w, s=(1, 1), d=(1, 1), pad='SAME': jax.lax.conv_general_dilated(
    x, w, s, pad, rhs_dilation=d, dimension_numbers=('NHWC', 'HWIO', 'NHWC')
  )
  last = lambda h, w: conv(h, w, strides, dilation, padding)
  net = lambda p, x: last(jax.nn.relu(conv(x, p['a'])), p['b'])
  p = {'a': uniform(0, 3, 3, 2, 4), 'b': uniform(1, 3, 2, 4, 3)}
  x = uniform(2, 8, 9, 8, 2)
  kept = np.array([True, False, True, True])
  coupling = dp.couple(net, p, x)
  new = refit(coupling, p, {'channels': {'a:3': kept}}, [x], RIDGE)
  # What an entry of the kernel reads is the answer of a kernel that is 1 there.
  hidden = jax.nn.relu(conv(x, p['a']))
  units = jnp.eye(p['b'][..., 0].size).reshape(*p['b'].shape[:3], -1)
  rows = last(hidden, units).reshape(-1, units.shape[-1])
  window = np.broadcast_to(kept, (3, 2, 4)).ravel()
  expected = nearest(rows, window, p['b'].reshape(-1, 3))
  got = new['b'][:, :, kept].reshape(-1, 3)
  np.testing.assert_allclose(got, expected, rtol=1e-3, atol=1e-4)


def test_several_axes_are_fitted_together_however_the_weight_is_stored():
  """Heads and their slices are read by one product, of a weight that is turned."""

  def net(p, x):
    h = jnp.tanh(jnp.einsum('ni,iha->nha', x, p['a']))
    return jnp.einsum('nha,aho->no', h, p['b'].reshape(3, 4, 2))

  p = {'a': uniform(0, 5, 4, 3), 'b': uniform(1, 3, 8)}
  x = uniform(2, 64, 5)
  kept = np.array([True, True, False, True])
  coupling = dp.couple(net, p, x)
  new = refit(coupling, p, {'channels': {'a:1': kept}}, [x], RIDGE)
  rows = jnp.tanh(jnp.einsum('ni,iha->nah', x, p['a'])).reshape(64, 12)
  mask = np.tile(kept, 3)
  expected = nearest(rows, mask, p['b'].reshape(12, 2))
  np.testing.assert_allclose(
    new['b'].reshape(12, 2)[mask], expected, rtol=1e-3, atol=1e-4
  )


def test_a_kernel_that_is_turned_around_is_turned_back():
  def net(p, x):
    h = jax.nn.relu(x @ p['a'])
    return jax.lax.conv_transpose(
      h, p['b'], (2,), 'SAME', dimension_numbers=('NHC', 'HIO', 'NHC'),
      transpose_kernel=True,
    )  # fmt: skip

  p = {'a': doubled(uniform(0, 3, 4), 1), 'b': uniform(1, 3, 2, 4)}
  x = uniform(2, 8, 6, 3)
  keep = {'channels': {'a:1': np.arange(4) % 2 == 0}}
  coupling = dp.couple(net, p, x)
  new = refit(coupling, p, keep, [x], ridge=1e-6)
  small = dp.prune(net, new, keep, x, coupling=coupling)
  np.testing.assert_allclose(small.apply(small.variables, x), net(p, x), atol=1e-2)
  assert np.any(new['b'] != p['b'])


def chain(p, x):
  return jnp.tanh(jnp.tanh(x @ p['a']) @ p['b']) @ p['c']


@pytest.mark.parametrize('rows', [64, 300])
def test_a_layer_is_fitted_to_what_it_reads_behind_refitted_ones(rows):
  """With many rows for each input it makes up for the errors of those before, too."""
  p = {'a': uniform(0, 5, 8), 'b': uniform(1, 8, 6), 'c': uniform(2, 6, 3)}
  x = uniform(3, rows, 5)
  first, second = np.arange(8) > 3, np.arange(6) > 1
  keep = {'channels': {'a:1': first, 'b:1': second}}
  new = refit(dp.couple(chain, p, x), p, keep, [x], RIDGE)
  before = np.tanh(x @ p['a'])
  b = nearest(before, first, p['b'])
  np.testing.assert_allclose(new['b'][first], b, rtol=1e-3, atol=1e-4)
  read = np.tanh(before[:, first] @ b)
  goal = np.tanh(before @ p['b']) if rows == 300 else read
  expected = np.linalg.lstsq(read[:, second], goal @ p['c'], rcond=None)[0]
  np.testing.assert_allclose(new['c'][second], expected, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize('are_rows', [True, False])
def test_what_a_stream_lacks_is_made_up_for(are_rows):
  """Behind a factor and a shift for each channel; what a flat one hides is not.

  Examples are rows of the arrays, or columns.
  """
  factor, shift = np.array([2.0, -0.5, 0.0, 3.0]), np.array([1.0, 2.0, 3.0, 4.0])

  def net(p, x):
    stream = x + jnp.tanh(x @ p['a']) @ p['b']
    answer = jnp.tanh(stream @ p['c']) @ p['d']
    return stream, stream + (answer * factor + shift)

  def turned(p, x):
    column = lambda vector: vector[:, None]
    stream = x + p['b'].T @ jnp.tanh(p['a'].T @ x)
    answer = p['d'].T @ jnp.tanh(p['c'].T @ stream)
    return stream, stream + (answer * column(factor) + column(shift))

  p = {'a': uniform(0, 4, 8), 'b': uniform(1, 8, 4)}
  p |= {'c': uniform(2, 4, 6), 'd': uniform(3, 6, 4)}
  x, kept = uniform(4, 300, 4), np.arange(8) > 3
  fn, inputs, group = (net, x, 'a:1') if are_rows else (turned, x.T, 'b:0')
  new = refit(dp.couple(fn, p, inputs), p, {'channels': {group: kept}}, [inputs], RIDGE)
  full, _ = net(p, x)
  stream = x + jnp.tanh(x @ p['a'])[:, kept] @ new['b'][kept]
  lacking = np.where(factor, (full - stream) / np.where(factor, factor, 1), 0)
  asked = jnp.tanh(full @ p['c']) @ p['d'] + lacking
  expected = np.linalg.lstsq(np.tanh(stream @ new['c']), asked, rcond=None)[0]
  np.testing.assert_allclose(new['d'], expected, rtol=1e-2, atol=1e-3)


def stream_and_layer(join, read=lambda x, stream: stream):
  """What is read of a stream behind a layer that may be cut, and another's answer."""

  def net(p, x):
    stream = x + jnp.tanh(x @ p['a']) @ p['b']
    return join(read(x, stream), jnp.tanh(stream @ p['c']) @ p['d'])

  p = {'a': uniform(0, 4, 8), 'b': uniform(1, 8, 4)}
  return net, p | {'c': uniform(2, 4, 6), 'd': uniform(3, 6, 4)}


def test_a_stream_of_what_is_masked_lacks_nothing_there():
  """Infinities are no difference, and others are as with a mask of finite numbers."""
  x, keep = uniform(4, 300, 4), {'channels': {'a:1': np.arange(8) > 3}}

  def last(least):
    masked = lambda x, stream: jnp.where(x > 1, least, stream)
    net, p = stream_and_layer(lambda stream, y: stream + y, masked)
    return refit(dp.couple(net, p, x), p, keep, [x])['d']

  np.testing.assert_array_equal(last(-np.inf), last(-9.0))


def test_a_stream_of_integers_is_not_made_up_for():
  whole = lambda x: (10 * x).astype(jnp.int32)
  join = lambda stream, y: stream + whole(y)
  net, p = stream_and_layer(join, lambda x, stream: whole(stream))
  apart, _ = stream_and_layer(lambda stream, y: (stream, jnp.square(y)))
  x, keep = uniform(4, 300, 4), {'channels': {'a:1': np.arange(8) > 3}}
  found, expected = (refit(dp.couple(f, p, x), p, keep, [x])['d'] for f in (net, apart))
  np.testing.assert_array_equal(found, expected)


def test_of_several_batches_one_may_have_no_examples():
  net, p = stream_and_layer(lambda stream, y: stream + y)
  x, keep = uniform(4, 300, 4), {'channels': {'a:1': np.arange(8) > 3}}
  coupling = dp.couple(net, p, x)
  found, expected = (refit(coupling, p, keep, batches) for batches in ([x, x[:0]], [x]))
  jax.tree.map(np.testing.assert_array_equal, found, expected)


class TwoBranches(nn.Module):
  """x + x A + (x + x A) B, or without the first branch."""

  @nn.compact
  def __call__(self, x):
    dense = lambda name: nn.Dense(4, use_bias=False, name=name)
    x = x + dp.branch(self, dense('a')(x), 'first')
    return x + dense('b')(x)


def test_a_branch_makes_up_for_one_that_goes():
  """Both are linear, so that the second can do the work of both."""
  model, x = TwoBranches(), uniform(0, 200, 4)
  variables = model.init(jax.random.key(0), x)
  coupling = dp.couple(model, variables, x)
  (branch,) = coupling.branches
  keep = {'branches': {branch: np.asarray(False)}}
  new = refit(coupling, variables, keep, [x], RIDGE)
  small = dp.prune(model, new, keep, x, coupling=coupling)
  found, expected = small.apply(small.variables, x), model.apply(variables, x)
  np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize('reverse', [False, True])
def test_layers_of_a_scan_are_fitted_in_their_order(reverse):
  """As layers outside of a scan are, in both directions."""
  layer = lambda x, a, b: x + jnp.tanh(x @ a) @ b
  order = range(3)[:: -1 if reverse else 1]

  def unrolled(p, x):
    for i in order:
      x = layer(x, p[f'a{i}'], p[f'b{i}'])
    return x

  def scanned(p, x):
    step = lambda x, w: (layer(x, *w), None)
    return jax.lax.scan(step, x, (p['a'], p['b']), reverse=reverse)[0]

  p = {'a': uniform(0, 3, 4, 6), 'b': uniform(1, 3, 6, 4)}
  apart = {f'{name}{i}': w for name in p for i, w in enumerate(p[name])}
  x, kept = uniform(2, 250, 4), np.arange(6) > 2
  coupling = dp.couple(unrolled, apart, x)
  keep = {'channels': {f'a{i}:1': kept for i in order}}
  expected = refit(coupling, apart, keep, [x])
  new = refit(dp.couple(scanned, p, x), p, {'channels': {'a:2': kept}}, [x])
  for name in apart:
    np.testing.assert_allclose(new[name[0]][int(name[1])], expected[name], atol=1e-3)
    is_changed = name != f'a{order[0]}'
    assert np.any(expected[name] != apart[name]) == is_changed


def test_experts_that_go_answer_no_more():
  """What is read behind them comes from the experts that stay."""

  def net(p, x, closed=np.zeros(5, bool)):
    shares = jax.nn.softmax(jnp.where(closed, -jnp.inf, x @ p['router']))
    h = jnp.einsum('te,td,edf->tf', shares, x, p['up'])
    return jnp.tanh(h) @ p['out']

  p = {'router': uniform(0, 4, 5), 'up': uniform(1, 5, 4, 6), 'out': uniform(2, 6, 2)}
  x, kept = uniform(3, 300, 4), np.array([True, False, True, False, True])
  new = refit(dp.couple(net, p, x), p, {'channels': {'router:1': kept}}, [x], RIDGE)
  read = net({**p, 'out': jnp.eye(6)}, x, ~kept)
  expected = np.linalg.lstsq(np.asarray(read), np.asarray(net(p, x)), rcond=None)[0]
  np.testing.assert_allclose(new['out'], expected, rtol=1e-2, atol=1e-3)


def test_gates_of_branches_that_stay_keep_their_values():
  """The cut multiplies them into the weights: so there is nothing to make up for."""

  def net(p, x):
    return (x + p['branches']['b'] * jnp.tanh(x @ p['a'])) @ p['c']

  p = {
    'a': uniform(0, 4, 4),
    'c': uniform(1, 4, 3),
    'branches': {'b': jnp.float32(0.3)},
  }
  x = uniform(2, 200, 4)
  new = refit(dp.couple(net, p, x), p, {}, [x])
  jax.tree.map(np.testing.assert_array_equal, new, p)


def test_batches_may_have_any_sizes():
  p = {'a': uniform(0, 5, 8), 'b': uniform(1, 8, 6), 'c': uniform(2, 6, 3)}
  x = uniform(3, 64, 5)
  keep = {'channels': {'a:1': np.arange(8) > 3}}
  coupling = dp.couple(chain, p, x)
  one = refit(coupling, p, keep, [x])
  several = refit(coupling, p, keep, [x[:10], x[10:11], x[11:]])
  for name in p:
    np.testing.assert_allclose(one[name], several[name], rtol=1e-4, atol=1e-5)


def test_a_batch_of_one_may_be_traced_in_another_way():
  """A class token is not broadcast there."""

  def net(p, x):
    token = jnp.broadcast_to(p['token'], (len(x), 1, 5))
    return mlp(p, jnp.concatenate([token, x], 1))

  p = {'a': uniform(0, 5, 8), 'b': uniform(1, 8, 3), 'token': uniform(2, 1, 1, 5)}
  x = uniform(3, 33, 4, 5)
  keep = {'channels': {'a:1': np.arange(8) > 3}}
  coupling = dp.couple(net, p, x)
  one = refit(coupling, p, keep, [x])
  several = refit(coupling, p, keep, [x[:32], x[32:]])
  np.testing.assert_allclose(one['b'], several['b'], rtol=1e-4, atol=1e-5)


def test_batches_without_examples_change_nothing():
  p = {'a': uniform(0, 5, 8), 'b': uniform(1, 8, 3)}
  x = uniform(2, 64, 5)
  keep = {'channels': {'a:1': np.arange(8) > 3}}
  coupling = dp.couple(mlp, p, x)
  new = refit(coupling, p, keep, [x[:0]])
  jax.tree.map(np.testing.assert_array_equal, new, p)


def test_weights_are_not_rounded_to_the_type_in_which_they_are_read():
  half = lambda tree: jax.tree.map(lambda x: x.astype(jnp.bfloat16), tree)
  net = lambda p, x: mlp(half(p), half(x))
  p = {'a': uniform(0, 5, 8), 'b': uniform(1, 8, 3)}
  x, kept = uniform(2, 64, 5), np.arange(8) > 3
  new = refit(dp.couple(net, p, x), p, {'channels': {'a:1': kept}}, [x])
  np.testing.assert_array_equal(new['b'][~kept], p['b'][~kept])
  assert np.any(new['b'][kept] != half(new['b'][kept]).astype(jnp.float32))


def test_of_many_rows_some_are_enough():
  p = {'a': uniform(0, 5, 8), 'b': uniform(1, 8, 3)}
  x = uniform(2, 5000, 5)
  kept = np.arange(8) % 3 > 0
  new = refit(
    dp.couple(mlp, p, x), p, {'channels': {'a:1': kept}}, [x[:4000], x[4000:]]
  )
  read = np.maximum(x @ p['a'], 0)
  error = lambda b: np.square(read[:, kept] @ b[kept] - read @ p['b']).mean()
  best = np.array(p['b'])
  best[kept] = nearest(read, kept, p['b'])
  assert error(best) < error(new['b']) < 1.1 * error(best)


def doubled(p, axis):
  """Every second slice is the one before it."""
  return jnp.repeat(jnp.take(p, np.arange(0, p.shape[axis], 2), axis), 2, axis)


def test_nothing_is_lost_where_channels_are_doubles():
  """Also in the layers of a scan, and with the weights of the small network."""

  def net(p, x):
    layer = lambda x, w: (x + jnp.tanh(x @ w['a']) @ w['b'], None)
    return jax.lax.scan(layer, x, p)[0]

  p = {'a': doubled(uniform(0, 3, 4, 6), 2), 'b': uniform(1, 3, 6, 4)}
  x = uniform(2, 64, 4)
  coupling = dp.couple(net, p, x)
  keep = {'channels': {'a:2': np.arange(6) % 2 == 0}}
  new = refit(coupling, p, keep, [x], ridge=1e-6)
  small = dp.prune(net, new, keep, x, coupling=coupling)
  assert small.variables['a'].shape == (3, 4, 3)
  full = net(p, x)
  np.testing.assert_allclose(small.apply(small.variables, x), full, atol=1e-3)
  plain = dp.prune(net, p, keep, x, coupling=coupling)
  assert np.abs(plain.apply(plain.variables, x) - full).max() > 0.1


@pytest.mark.parametrize(('what', 'part'), [('channels', 0.7), ('branches', 0.99)])
@pytest.mark.parametrize('scan', [False, True])
def test_a_decoder_is_nearer_to_itself(scan, what, part):
  sizes = {'vocab': 50, 'width': 24, 'depth': 3, 'heads': 4, 'groups': 2, 'size': 6}
  model = Decoder(**sizes, inner=32, scan=scan)
  tokens = jax.random.randint(jax.random.key(3), (96, 12), 0, 50)
  variables = model.init(jax.random.key(0), tokens)
  coupling = dp.couple(model, variables, tokens)
  inner = 'layers0/mlp/gate:2' if scan else 'layer0/mlp/gate:1'
  keep: dict = {'channels': {inner: np.arange(32) % 2 == 0}}
  if what == 'branches' and scan:
    keep = {'branches': {'layers0/mlp/branch': np.array([True, False, True])}}
  elif what == 'branches':
    keep = {'branches': {'layer1/mlp/branch': np.asarray(False)}}

  def error(arrays):
    small = dp.prune(model, arrays, keep, tokens, coupling=coupling)
    logits = lambda outputs: outputs['main']
    full = logits(model.apply(variables, tokens))
    return jnp.square(logits(small.apply(small.variables, tokens)) - full).mean()

  assert error(refit(coupling, variables, keep, [tokens])) < part * error(variables)


class Shared(nn.Module):
  """A grouped convolution, a dense layer that is used twice, and one that is not."""

  @nn.compact
  def __call__(self, x):
    x = nn.relu(nn.Conv(8, (1, 1), name='first')(x))
    x = nn.relu(nn.Conv(8, (3, 3), feature_group_count=8, name='depthwise')(x))
    twice = nn.Dense(8, name='twice')
    return nn.Dense(3, name='last')(nn.relu(twice(nn.relu(twice(x)))))


def test_what_cannot_be_fitted_is_as_it_was():
  x = uniform(0, 2, 6, 6, 3)
  variables = Shared().init(jax.random.key(0), x)
  coupling = dp.couple(Shared(), variables, x)
  keep = dp.oneshot(coupling, variables, '60%')
  new, old = refit(coupling, variables, keep, [x])['params'], variables['params']
  changed = [name for name in old if np.any(new[name]['kernel'] != old[name]['kernel'])]
  assert changed == ['last']


def test_types_stay_and_a_whole_network_is_not_touched():
  p = {'a': uniform(0, 5, 8), 'b': uniform(1, 8, 3).astype(jnp.bfloat16)}
  net = lambda p, x: jax.nn.relu(x @ p['a']).astype(jnp.bfloat16) @ p['b']
  x = uniform(2, 64, 5)
  coupling = dp.couple(net, p, x)
  kept = np.arange(8) > 2
  new = refit(coupling, p, {'channels': {'a:1': kept}}, [x])
  assert new['b'].dtype == jnp.bfloat16
  assert np.any(new['b'] != p['b'])
  same = refit(coupling, p, {}, [x])
  jax.tree.map(np.testing.assert_array_equal, same, p)


@pytest.mark.parametrize('kind', [jnp.complex64, jnp.int8])
def test_weights_that_have_no_real_least_squares_are_as_they_were(kind):
  p = {'a': uniform(0, 5, 8).astype(kind), 'b': (9 * uniform(1, 8, 3)).astype(kind)}
  net = lambda p, x: jnp.abs(
    jnp.tanh(x @ p['a'].astype(x.dtype)) @ p['b'].astype(x.dtype)
  )
  x = uniform(2, 64, 5).astype(jnp.complex64 if kind == jnp.complex64 else jnp.float32)
  keep = {'channels': {'a:1': np.arange(8) > 2}}
  new = refit(dp.couple(net, p, x), p, keep, [x])
  jax.tree.map(np.testing.assert_array_equal, new, p)


def test_what_lay_on_a_mesh_lies_on_it_again():
  mesh = jax.sharding.Mesh(np.asarray(jax.devices()[:1]), ('model',))
  place = NamedSharding(mesh, PartitionSpec('model'))
  p = {'a': uniform(0, 5, 8), 'b': uniform(1, 8, 3)}
  x, keep = uniform(2, 64, 5), {'channels': {'a:1': np.arange(8) > 2}}
  coupling = dp.couple(mlp, p, x)
  new = refit(coupling, jax.device_put(p, place), keep, [x])
  assert new['b'].sharding == place
  np.testing.assert_array_equal(new['b'], refit(coupling, p, keep, [x])['b'])


def test_inputs_by_name():
  net = lambda p, x, *, scale: mlp(p, x * scale)
  p = {'a': doubled(uniform(0, 5, 8), 1), 'b': uniform(1, 8, 3)}
  x, scale = uniform(2, 64, 5), jnp.full((64, 1), 2.0)
  coupling = dp.couple(net, p, x, scale=scale)
  keep = {'channels': {'a:1': np.arange(8) % 2 == 0}}
  new = refit(coupling, p, keep, [(x, {'scale': scale})])
  expected = p['b'][::2] + p['b'][1::2]
  np.testing.assert_allclose(new['b'][::2], expected, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize(
  ('batches', 'ridge', 'message'),
  [
    ([], 1e-4, 'expected at least one batch'),
    ([np.ones((2, 3, 5), np.float32)], 1e-4, 'expected batches like the inputs'),
    ([np.ones((2, 5), np.float32)], 0, 'ridge'),
    ([np.full((2, 5), np.nan, np.float32)], 1e-4, 'what b reads is not finite'),
  ],
)
def test_wrong_calls(batches, ridge, message):
  p = {'a': uniform(0, 5, 8), 'b': uniform(1, 8, 3)}
  coupling = dp.couple(mlp, p, uniform(2, 2, 5))
  with pytest.raises(ValueError, match=message):
    refit(coupling, p, {'channels': {'a:1': np.arange(8) > 0}}, batches, ridge)
