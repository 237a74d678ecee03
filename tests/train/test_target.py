import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from depthprune.program import cost
from depthprune.program.coupling import couple
from depthprune.program.rounding import possible
from depthprune.train.recipe import TOLERANCE
from depthprune.train.target import on_target, reachable


def network(variables, x):
  return x @ variables['params']['first'] @ variables['params']['last']


def coupled(n):
  weights = {'params': {'first': jnp.ones((5, n)), 'last': jnp.ones((n, 3))}}
  return couple(network, weights, jnp.ones((1, 5)))


COUPLING = coupled(100)  # the cost is proportional to the width


def kept(w, target, round_to=1):
  return on_target(COUPLING, {'first:1': w}, target, 'flops', round_to)['channels'][
    'first:1'
  ]


def test_a_decision_on_target_is_the_sign_of_the_weights():
  w = np.random.default_rng(0).permutation(100) - 50.5
  np.testing.assert_array_equal(kept(w, 0.49), w > 0)


@pytest.mark.parametrize(('target', 'expected'), [(0.3, 30), (0.7, 70), (0.31, 31)])
def test_off_target_the_gates_nearest_to_zero_move(target, expected):
  w = np.random.default_rng(0).permutation(100) - 49.5
  keep = kept(w, target)
  assert keep.sum() == expected
  assert w[keep].min() > w[~keep].max()


@pytest.mark.parametrize(
  ('positive', 'expected'), [(507, 507), (517, 517), (506, 507), (518, 517), (200, 507)]
)
def test_half_a_percent_off_the_target_is_near_enough(positive, expected):
  """Of 1024 channels, 507 to 517 meet a target of 0.5: no more of them move."""
  rank = np.arange(1024)
  w = {'first:1': np.where(rank < positive, 2.0, 0.0) - 1 - rank / 1e4}
  keep = on_target(coupled(1024), w, 0.5)['channels']['first:1']
  np.testing.assert_array_equal(keep, rank < expected)


@given(
  st.lists(st.floats(-1, 1, width=32), min_size=100, max_size=100),
  st.floats(0.08, 1.0),
  st.sampled_from([1, 8, 'auto']),
)
@settings(max_examples=40, deadline=None)
def test_every_decision_is_as_near_as_its_widths_allow(w, target, round_to):
  keep = kept(np.asarray(w, np.float32), target, round_to)
  widths = np.asarray(possible(100, round_to))
  nearest = np.abs(widths / 100 - target).min()
  assert keep.sum() in widths
  assert abs(keep.mean() - target) <= max(nearest, TOLERANCE) + 1e-6


def test_at_least_one_channel_is_left():
  assert kept(-np.ones(100), 0.01).sum() == 1


@pytest.mark.parametrize('target', [0.0, -1.0, 1.01])
def test_a_target_that_is_no_fraction(target):
  with pytest.raises(ValueError, match=r'expected a fraction in \(0, 1\]'):
    reachable(COUPLING, target)


def test_a_target_below_the_floor_names_the_floor():
  with pytest.raises(ValueError, match=r'0\.05 .* cannot be reached.* 0\.0800 remain'):
    reachable(COUPLING, 0.05, round_to=8)
  reachable(COUPLING, 0.08, round_to=8)
  assert cost.flops(COUPLING) == 2 * 8 * 100


def test_auto_refuses_no_target_that_one_channel_reaches():
  reachable(COUPLING, 0.01, round_to='auto')
  assert (
    on_target(COUPLING, {'first:1': -np.arange(100)}, 0.01, round_to='auto')[
      'channels'
    ]['first:1'].sum()
    == 1
  )
  with pytest.raises(ValueError, match=r'with 1 channel.* 0\.0100 remain'):
    reachable(COUPLING, 0.005, round_to='auto')


@pytest.mark.parametrize('round_to', [8, 'auto'])
def test_two_groups_move_together_where_one_alone_misses(round_to):
  """Widths (a, b) cost a + a b + b. From (32, 56), at 1880, one group alone comes to
  2144 or 2336, which is farther from 2008 than 1880 is; (40, 48) cost just that."""
  weights = {'a': jnp.ones((1, 64)), 'b': jnp.ones((64, 64)), 'c': jnp.ones((64, 1))}
  net = lambda v, x: jnp.tanh(x @ v['a']) @ v['b'] @ v['c']
  coupling = couple(net, weights, jnp.ones((1, 1)))
  open_ = {'a:1': 32, 'b:1': 56}
  w = {g: np.where(np.arange(64) < n, 1.0, -1.0) for g, n in open_.items()}
  target = (40 + 40 * 48 + 48) / (64 + 64 * 64 + 64)
  keep = on_target(coupling, w, target, round_to=round_to)['channels']
  assert {g: int(kept.sum()) for g, kept in keep.items()} == {'a:1': 40, 'b:1': 48}


def test_an_unknown_cost_names_the_known():
  with pytest.raises(ValueError, match='expected one of flops, params'):
    reachable(COUPLING, 0.5, of='latency')
