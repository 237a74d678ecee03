"""slim: the small network equals the masked one, at every batch size, in training."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from depthprune.program.coupling import couple
from depthprune.program.gating import plug
from depthprune.program.resize import slim
from tests import masking as m
from tests.zoo import NETWORKS, Case, image
from tests.zoo.functions import convolve

EXACT = 1e-5  # relative, in float32
WITH_INTEGERS = (  # ReLU and BatchNorm only, averages over powers of two
  'resnet basic', 'resnext', 'resnet option A', 'mobilenet', 'densenet', 'vgg',
  'u-net', 'atrous', 'shufflenet', 'torch style', 'channels first',
)  # fmt: skip
IN_TRAINING = (
  'resnet basic', 'densenet', 'vgg', 'u-net', 'shufflenet', 'vit scanned', 'char cnn',
  'recurrent', 'strided', 'own rules', 'own contraction',
)  # fmt: skip


def coupled(name: str) -> tuple[Case, Any, Any]:
  case = NETWORKS[name]
  variables = case.variables()
  return case, variables, couple(case.model, variables, case.inputs(2))


@pytest.mark.parametrize('name', NETWORKS)
def test_small_is_masked_at_another_batch_size(name):
  """Coupled at batch 2, run at batch 7: against zeros and against gates of 0 and 1."""
  case, variables, coupling = coupled(name)
  x, keep = case.inputs(7), m.random_keep(coupling)
  apply, gated = m.quick(case.apply), m.quick(plug(case.model, coupling))
  run = m.quick(slim(case.model, coupling, keep))
  zeroed = apply(m.zeroed(coupling, variables, keep), x)
  small = m.smaller(coupling, variables, keep)
  got = run(small, x)
  assert m.difference(zeroed, got) <= EXACT
  assert m.difference(apply(variables, x), zeroed) > 1e-3
  sizes = [sum(a.size for a in jax.tree.leaves(v)) for v in (small, variables)]
  assert sizes[0] < sizes[1]

  open_ = m.random_keep(coupling, gated=True)
  alike = open_['channels'].keys() == keep['channels'].keys()
  if open_['channels']:
    closed = gated(variables, m.as_gates(open_), x)
    if not alike:
      small = m.smaller(coupling, variables, open_)
      got = m.quick(slim(case.model, coupling, open_))(small, x)
    assert m.difference(closed, got) <= EXACT

  if name in WITH_INTEGERS:  # every sum is exact, so every bit is equal
    variables, x = integers(variables), jnp.round(x)
    zeroed = apply(m.zeroed(coupling, variables, keep), x)
    assert not np.array_equal(apply(variables, x), zeroed)
    assert np.unique(zeroed).size > 3
    got = run(m.smaller(coupling, variables, keep), x)
    np.testing.assert_array_equal(got, zeroed)
    np.testing.assert_array_equal(gated(variables, m.as_gates(keep), x), zeroed)


def integers(variables):
  """Few and small integers for weights, var + eps = 1."""
  draw = np.random.default_rng(3)

  def leaf(path, x):
    if 'var' in str(path[-1]):
      var = np.float32(1) - np.float32(1e-5)
      assert var + np.float32(1e-5) == 1
      return jnp.full(x.shape, var)
    if x.ndim == 1:
      return jnp.asarray(draw.integers(1, 3, x.shape), jnp.float32)
    dense = draw.random(x.shape) < 5 / np.prod(x.shape[:-1])
    return jnp.asarray(dense * draw.choice([-1, 1, 1, 2], x.shape), jnp.float32)

  return jax.tree_util.tree_map_with_path(leaf, variables)


def training(case: Case):
  """(variables, x) -> gradient of a loss by the parameters, outputs, new statistics."""
  if case.shapes is not None:
    mode, split = {}, lambda out: (out, ())
  else:
    mode = {
      'train': True,
      'mutable': ['batch_stats'],
      'rngs': {'dropout': jax.random.key(3)},
    }
    split = lambda out: out

  def gradient(run, variables, x):
    is_flax = case.shapes is None
    params = variables['params'] if is_flax else variables

    def loss(params):
      arrays = {**variables, 'params': params} if is_flax else params
      out, statistics = split(run(arrays, x, **mode))
      weights = jnp.arange(1, out.size + 1).reshape(out.shape) / out.size
      return (weights.astype(out.dtype) * out**2).mean(), (out, statistics)

    return jax.grad(loss, has_aux=True)(params)

  return gradient


def flat(tree) -> jax.Array:
  return jnp.concatenate([leaf.ravel() for leaf in jax.tree.leaves(tree)])


@pytest.mark.parametrize('name', IN_TRAINING)
def test_small_trains_as_the_masked_network_does(name):
  """Coupled in eval mode at batch 2, trained at batch 16: outputs, statistics, slopes.

  Dropout draws the full network's bits, so that kept units are dropped alike."""
  case, variables, coupling = coupled(name)
  x, keep = case.inputs(16), m.random_keep(coupling, seed=2)
  gradient = training(case)
  masked = m.zeroed(coupling, variables, keep)
  slopes, (out, statistics) = m.quick(lambda v, x: gradient(case.apply, v, x))(
    masked, x
  )
  small_fn = slim(case.model, coupling, keep)
  small_slopes, (small_out, small_statistics) = m.quick(
    lambda v, x: gradient(small_fn, v, x)
  )(m.smaller(coupling, variables, keep), x)
  assert m.difference(out, small_out) <= EXACT
  is_flax = case.shapes is None
  trained = {'params': slopes, **dict(statistics)} if is_flax else slopes
  small = (
    {'params': small_slopes, **dict(small_statistics)} if is_flax else small_slopes
  )
  expected = m.smaller(coupling, {**variables, **trained} if is_flax else trained, keep)
  for part in small if is_flax else [None]:
    ours, theirs = (t if part is None else t[part] for t in (small, expected))
    assert jax.tree.map(jnp.shape, ours) == jax.tree.map(jnp.shape, theirs)
    assert m.difference(flat(theirs), flat(ours)) <= 1e-4


def test_own_derivative_rules_stay_in_force():
  """The clipped gradient, and that of a sign, in the small network too."""
  case, variables, coupling = coupled('own rules')
  keep = m.random_keep(coupling)
  small, small_fn = (
    m.smaller(coupling, variables, keep),
    slim(case.model, coupling, keep),
  )

  def slopes(scale):
    return jax.grad(lambda v: (scale * small_fn(v, case.inputs(2))).sum())(small)

  one, ten = slopes(1e6), slopes(1e7)
  assert np.abs(one['next']).max() > 0  # a plain sign would give none
  assert m.difference(10 * one['out'], ten['out']) <= EXACT
  assert m.difference(one['mid'], ten['mid']) <= EXACT  # behind the clipped identity


def test_a_product_that_a_later_equation_cut_is_solved_again():
  """Coupling cuts the groups of the convolution after it; a view starts with the cuts,
  but its groups are whole again: 24 = 3 groups of (4 + 4), met by 4 + 4 + 4 + ..."""

  def f(p, x):
    h = convolve(x, p['in'])
    thirds = jnp.concatenate(jnp.split(h, 3, -1)[::-1], -1)
    out = convolve(h, p['grouped'], 3).mean((1, 2)) @ p['out']
    return out + thirds[..., 12:].mean((1, 2)) @ p['half'] + h.mean((1, 2)) @ p['out']

  shapes = {
    'in': (1, 1, 3, 24), 'grouped': (1, 1, 8, 24), 'out': (24, 5), 'half': (12, 5),
  }  # fmt: skip
  p = Case(f, image, shapes).variables()
  coupling = couple(f, p, image(2, 4))
  assert [g.size for g in coupling.groups.values()] == [4, 4]
  keep, x = m.random_keep(coupling), image(3, 4)
  small = slim(f, coupling, keep)(m.smaller(coupling, p, keep), x)
  assert m.difference(f(m.zeroed(coupling, p, keep), x), small) <= EXACT


def test_a_slice_that_ends_inside_a_head():
  """The first 5 of 3 heads of 4: the cut goes through every head, and is exact."""

  def f(p, x):
    h = jnp.einsum('nc,chd->nhd', x.mean((1, 2)), p['in'])
    return jnp.tanh(h.reshape(-1, 12)[:, :5]) @ p['part'] + h.reshape(-1, 12) @ p['all']

  shapes = {'in': (3, 3, 4), 'part': (5, 2), 'all': (12, 2)}
  p = Case(f, image, shapes).variables()
  coupling = couple(f, p, image(2, 4))
  assert {g: len(v.members) for g, v in coupling.groups.items()} == {'in:2.1': 3}
  [size] = [g.size for g in coupling.groups.values()]
  assert size == 3 and not coupling.unknown
  keep, x = m.random_keep(coupling), image(3, 4)
  small = slim(f, coupling, keep)(m.smaller(coupling, p, keep), x)
  assert m.difference(f(m.zeroed(coupling, p, keep), x), small) <= EXACT


def test_one_trace_serves_every_length_of_a_sequence():
  case, variables, coupling = coupled('gru')
  keep = m.random_keep(coupling)
  masked, small = (f(coupling, variables, keep) for f in (m.zeroed, m.smaller))
  run = slim(case.model, coupling, keep)
  for length in (5, 12):
    x = jnp.tile(case.inputs(3)[:, :1], (1, length))
    assert m.difference(case.model.apply(masked, x), run(small, x)) <= EXACT


@pytest.mark.parametrize('seed', range(3))
def test_every_decision_of_a_scanned_network(seed):
  case, variables, coupling = coupled('vit scanned')
  keep = m.random_keep(coupling, seed=10 + seed)
  one = seed % len(keep['channels'])
  keep['channels'] = dict([list(keep['channels'].items())[one]])
  x = case.inputs(2)
  expected = case.model.apply(m.zeroed(coupling, variables, keep), x)
  run = slim(case.model, coupling, keep)
  assert m.difference(expected, run(m.smaller(coupling, variables, keep), x)) <= EXACT


def test_wrong_arguments_are_refused():
  case, variables, coupling = coupled('square')
  [group] = coupling.groups
  with pytest.raises(KeyError, match='sqare:1: no such group; nearest:'):
    slim(case.model, coupling, {'channels': {'sqare:1': np.ones(8, bool)}})
  run = slim(case.model, coupling, {'channels': {group: np.arange(8) < 3}})
  with pytest.raises(ValueError, match=r'in: has shape \(3, 8\), keep leaves \(3, 3\)'):
    run(variables, case.inputs(2))
  with pytest.raises(ValueError, match='missing in the variables of the small'):
    run({}, case.inputs(2))
