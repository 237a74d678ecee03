"""Milliseconds: exact where they were timed, linear and rising in between."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from depthprune.models.resnet import ResNet
from depthprune.program.coupling import couple
from depthprune.program.rounding import possible
from depthprune.timing import layers as timing
from depthprune.timing.layers import between, rising

SIZES = (5, 16, 12, 3)


def network(variables, x):
  p = variables['params']
  h = jax.nn.relu(x @ p['first'])
  return jax.nn.relu(h @ p['second']) @ p['last']


def arrays(*sizes):
  shapes = zip(('first', 'second', 'last'), sizes, sizes[1:], strict=False)
  return {'params': {name: jnp.ones(shape) for name, *shape in shapes}}


COUPLING = couple(network, arrays(*SIZES), jnp.ones((1, 5)))
SESSION = timing.session(COUPLING, batch=8)


def layers(n, m):
  """What the three layers of n and m hidden channels would take, made up."""
  return (1 + 5 * n) + (2 + n * m) + (1 + 3 * m)


def made_up(network=lambda total: 3 + 0.5 * total):
  """Medians [rows]: layers take what `layers` says, networks f of their sum."""

  def one(layer, widths):
    n, m = widths.get('first:1'), widths.get('second:1')
    if not layer:
      return network(layers(n, m))
    return 2 + n * m if n and m else 1 + 5 * n if n else 1 + 3 * m

  return np.array([one(*row) for row in SESSION.rows], np.float64)


COST = SESSION.cost(made_up())


def keep(n, m):
  return {'channels': {'first:1': np.arange(16) < n, 'second:1': np.arange(12) < m}}


def test_every_layer_is_timed_at_some_widths_and_the_network_last():
  first = [widths for _, widths in SESSION.rows if [*widths] == ['first:1']]
  both = [n for name, n in SESSION.rows if name and len(n) == 2]
  assert first == [{'first:1': n} for n in (1, 3, 7, 11, 15, 16)]
  assert len(both) == 17 and both[-2] == {'first:1': 15, 'second:1': 11}
  *narrowed, whole = [n for name, n in SESSION.rows if not name]
  assert [n['first:1'] for n in narrowed] == [1, 3, 7, 11, 15] and whole[
    'second:1'
  ] == 12
  assert SESSION.layers == (
    ((('first:1',),), 0), ((('first:1',), ('second:1',)), 1), ((('second:1',),), 2),
  )  # fmt: skip


@pytest.mark.parametrize(('n', 'm'), [(16, 12), (1, 1), (8, 6), (11, 5), (2, 12)])
def test_a_bilinear_layer_is_counted_exactly_at_every_width(n, m):
  expected = 3 + 0.5 * layers(n, m)
  assert COST(COUPLING, keep(n, m)) == pytest.approx(expected, rel=1e-5)
  if (n, m) == (16, 12):
    assert COST(COUPLING) == pytest.approx(expected, rel=1e-5)


def test_gates_have_the_same_value_and_its_derivative():
  open_ = {'first:1': jnp.ones(16), 'second:1': jnp.ones(12)}
  gates = {'channels': jax.tree.map(lambda g: 0.7 * g, open_)}
  value, slopes = jax.jit(jax.value_and_grad(lambda g: COST(COUPLING, g)))(gates)
  n, m = 0.7 * 16, 0.7 * 12
  assert float(value) == pytest.approx(3 + 0.5 * layers(n, m), rel=1e-5)
  slopes = slopes['channels']
  np.testing.assert_allclose(slopes['first:1'], 0.5 * (5 + m), rtol=1e-4)
  np.testing.assert_allclose(slopes['second:1'], 0.5 * (n + 3), rtol=1e-4)


def test_gates_are_pulled_where_launches_hide_what_narrower_layers_save():
  flat = SESSION.cost(made_up(lambda total: max(100.0, 0.5 * total)))
  gates = COUPLING.gates()
  slopes = jax.grad(lambda g: flat(COUPLING, {'channels': g}))(gates['channels'])
  assert flat(COUPLING, keep(16, 12)) > flat(COUPLING, keep(1, 1)) == 100
  assert all(float(s.min()) > 0 for s in slopes.values())


def test_between_and_beyond_the_points_it_is_linear():
  points, table = np.array([1, 3, 7]), np.array([2.0, 4.0, 5.0])
  found = [float(between(x, points, table)) for x in (0, 1, 2, 3, 5, 7, 11)]
  np.testing.assert_allclose(found, [1, 2, 3, 4, 4.5, 5, 6])


def test_what_noise_made_fall_rises_and_what_rises_is_left():
  assert rising(np.array([1.0, 3, 2, 4])).tolist() == [1, 2.5, 2.5, 4]
  grid = np.random.default_rng(0).uniform(size=(5, 4, 3))
  once = rising(grid)
  assert all((np.diff(once, axis=axis) >= 0).all() for axis in range(3))
  np.testing.assert_array_equal(rising(once), once)


def test_layers_that_do_the_same_share_a_table():
  model, x = ResNet(depth=14, width=4), jnp.ones((1, 8, 8, 3))
  shapes = jax.eval_shape(model.init, jax.random.key(0), x)
  timed = timing.session(couple(model, shapes, x), batch=2)
  assert len(timed.layers) == 14
  # One of the stem, one of stage 1, of the others three each (the first convolution has
  # a stride, the trunk as input is not the trunk as output), one of the head.
  assert len(timed.grids) == 9


def test_widths_are_timed_that_a_cut_may_leave():
  rounded = timing.session(COUPLING, batch=8, round_to=8)
  found = [[*widths.values()] for name, widths in rounded.rows if not name]
  assert found == [[8, 8], [16, 8], [16, 12], [16, 12]]


def test_with_auto_the_timed_widths_are_those_that_can_be_built():
  timed = timing.session(COUPLING, batch=8, round_to='auto')
  found = [[*widths.values()] for name, widths in timed.rows if not name]
  assert found == [[1, 1], [4, 4], [8, 6], [16, 8], [16, 12], [16, 12]]
  for _, widths in timed.rows:
    for group, width in widths.items():
      assert width in possible(COUPLING.groups[group].size, 'auto')


def test_a_network_that_loses_a_channel_may_be_slower_than_it_was():
  measured = made_up()
  measured[-1] /= 2
  cost = SESSION.cost(measured)
  whole = COST(COUPLING) / 2
  assert cost(COUPLING) == cost(COUPLING, keep(16, 12)) == pytest.approx(whole)
  assert cost(COUPLING, keep(15, 12)) == pytest.approx(COST(COUPLING, keep(15, 12)))


def test_a_layer_of_which_nothing_is_cut_takes_what_it_took():
  measured, rows = made_up(), SESSION.rows
  measured[next(i for i, (_, n) in enumerate(rows) if n == {'first:1': 16})] = 0
  cost = SESSION.cost(measured)
  saved = 0.5 * (1 + 5 * 16)
  for n, less in ((16, saved), (15, 0)):
    expected = COST(COUPLING, keep(n, 6)) - less
    assert cost(COUPLING, keep(n, 6)) == pytest.approx(expected)
    gates = jax.tree.map(lambda k: jnp.asarray(k, jnp.float32), keep(n, 6))
    value, slopes = jax.value_and_grad(lambda g: cost(COUPLING, g))(gates)
    assert value == pytest.approx(expected, rel=1e-5)
    assert (slopes['channels']['first:1'] > 0).all()


def test_axes_that_are_concatenated_are_one_axis_of_a_layer():
  def joined(v, x):
    return jnp.concatenate([jax.nn.relu(x @ v['a']), x @ v['b']], -1) @ v['c']

  v = {'a': jnp.ones((5, 8)), 'b': jnp.ones((5, 4)), 'c': jnp.ones((12, 3))}
  timed = timing.session(couple(joined, v, jnp.ones((1, 5))), batch=2)
  assert timed.layers[-1] == ((('a:1', 'b:1'),), 2)
  np.testing.assert_array_equal(timed.grids[-1][0][0], [2, 4, 8, 10])
  assert timed.grids[-1][1] == (12,)
  assert timed.call(len(timed.rows) - 7)()[0].shape == (2, 3)


def looped(v, x):
  """Layers inside a loop over the second axis of x [batch, steps, 5]."""

  def step(carry, x):
    for w in v.values():
      x = jax.nn.relu(x @ w)
    return carry, x

  return jax.lax.scan(step, jnp.float32(0), jnp.moveaxis(x, 1, 0))[1]


def loop_of(*sizes):
  v = {f'w{i}': jnp.ones(n) for i, n in enumerate(itertools.pairwise(sizes))}
  return couple(looped, v, jnp.ones((1, 2, sizes[0])))


def test_a_loop_is_one_layer_with_few_axes_and_refused_with_many():
  timed = timing.session(loop_of(5, 4, 6, 3), batch=8)
  assert timed.layers == (((('w0:1',), ('w1:1',)), 0),)
  narrow = next(i for i, (_, n) in enumerate(timed.rows) if [*n.values()] == [1, 3])
  assert timed.call(narrow)()[-1].shape == (2, 8, 3)
  with pytest.raises(ValueError, match='scan .* has 6 axes that can be cut, at most 5'):
    timing.session(loop_of(5, *(4,) * 6, 3), batch=8)


def test_a_layer_alone_has_its_own_shapes_and_the_batch(monkeypatch):
  found = []
  bind = timing.rebound
  monkeypatch.setattr(
    timing, 'rebound',
    lambda facts, kept: lambda program, args: (
      found.append([x.shape for x in args]), bind(facts, kept)(program, args)
    )[1],
  )  # fmt: skip
  rows = SESSION.rows
  at = next(i for i, (name, n) in enumerate(rows) if name and [*n.values()] == [3, 5])
  assert SESSION.call(at)()[0].shape == (8, 5)
  assert SESSION.call(len(rows) - 5)()[0].shape == (8, 3)
  assert found == [[(8, 3), (3, 5)], [(5, 3), (3, 3), (3, 3), (8, 5)]]


def test_milliseconds_are_measured():
  """A wide network takes longer than a narrow one, even on a busy machine."""
  wide = couple(network, arrays(64, 1024, 1024, 8), jnp.ones((1, 64)))
  cost = timing.milliseconds(wide, batch=64, seconds=0.2)
  part = lambda n: {
    'channels': {'first:1': np.arange(1024) < n, 'second:1': np.arange(1024) < n}
  }
  assert 0 < cost(wide, part(64)) < 0.7 * cost(wide)
  assert cost.batch == 64


@pytest.mark.parametrize(
  ('fn', 'batch', 'message'),
  [
    (network, 0, 'batch: expected a whole number of 1 or more'),
    (lambda v, x: x @ v['params']['first'], 8, 'no layer of this network can be cut'),
  ],
)
def test_what_cannot_be_timed_is_refused(fn, batch, message):
  with pytest.raises(ValueError, match=message):
    timing.session(couple(fn, arrays(*SIZES), jnp.ones((1, 5))), batch)


def test_inputs_that_all_examples_share_keep_their_size():
  def shifted(variables, x, shift, scale):
    return network(variables, (x + shift) * scale)

  example = jnp.ones((2, 5)), jnp.ones(5), jnp.float32(2)
  found = timing.session(couple(shifted, arrays(*SIZES), *example), batch=8)
  assert found.rows == SESSION.rows
  (answer,) = found.call(len(found.rows) - 1)()
  assert answer.shape == (8, 3)
