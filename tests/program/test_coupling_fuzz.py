"""Random networks: surgery equals masking on every one, and would not if rules lied."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from depthprune.program import axes as ax
from depthprune.program import rules
from depthprune.program.axes import Cat, fresh, norm
from depthprune.program.coupling import couple
from depthprune.program.gating import plug
from depthprune.program.resize import slim
from tests import masking as m
from tests.zoo import image
from tests.zoo.random_networks import random_network

FAST, ALL = 60, 1000


def error(seed: int, gated: bool = False) -> float:
  """Relative difference between the small and the masked network; 0 without groups."""
  f, arrays = random_network(seed)
  x = image(2, 4)
  coupling = couple(f, arrays, x)
  keep = m.random_keep(coupling, seed, gated)
  small = m.quick(slim(f, coupling, keep))(m.smaller(coupling, arrays, keep), x)
  if gated:
    closed = m.quick(plug(f, coupling))(arrays, m.as_gates(keep), x)
    return m.difference(closed, small)
  return m.difference(m.quick(f)(m.zeroed(coupling, arrays, keep), x), small)


def slope_error(seed: int) -> float:
  """The same of the gradients with respect to the arrays that are left.

  It is infinite where a gradient of the masked or of the small network is not finite
  although those of the full network are.
  """
  f, arrays = random_network(seed)
  x = image(2, 4)
  coupling = couple(f, arrays, x)
  keep = m.random_keep(coupling, seed, gated=True)
  gated, small = plug(f, coupling), slim(f, coupling, keep)
  loss = lambda out: jnp.mean(out**2)
  masked = lambda p: loss(gated(p, m.as_gates(keep), x))
  full = m.smaller(coupling, m.quick(jax.grad(masked))(arrays), keep)
  part = m.quick(jax.grad(lambda p: loss(small(p, x))))(
    m.smaller(coupling, arrays, keep)
  )
  if not all(np.isfinite(g).all() for g in (*full.values(), *part.values())):
    whole = m.quick(jax.grad(lambda p: loss(f(p, x))))(arrays)
    return np.inf if all(np.isfinite(g).all() for g in whole.values()) else 0.0
  largest = max(float(jnp.abs(g).max()) for g in full.values())
  return max(
    float(np.abs(full[n] - g).max() / max(np.abs(full[n]).max(), 1e-3 * largest, 1e-30))
    for n, g in part.items()
  )


@pytest.mark.parametrize('first', range(0, FAST, 10))
def test_small_is_masked(first):
  for seed in range(first, first + 10):
    assert error(seed, gated=seed % 2 == 1) <= 1e-4, seed


def test_gradients_agree():
  for seed in range(8):
    assert slope_error(seed) <= 1e-3, seed


@pytest.mark.slow
@pytest.mark.parametrize('first', range(FAST, ALL, 20))
def test_small_is_masked_on_many_more(first):
  for seed in range(first, first + 20):
    assert error(seed) <= 1e-4 and error(seed, gated=True) <= 1e-4, seed
    assert slope_error(seed) <= 1e-3, seed


def test_most_random_networks_can_be_cut():
  """A fuzz of networks that are pinned throughout would prove nothing."""
  groups, pinned = [], 0
  for seed in range(FAST):
    f, arrays = random_network(seed)
    coupling = couple(f, arrays, image(2, 4))
    groups.append(len(coupling.groups))
    pinned += bool(coupling.pinned)
    assert not coupling.unknown
  assert np.mean(groups) > 3 and np.mean(np.array(groups) == 0) < 0.2
  assert 0 < pinned < FAST


def additions_do_not_couple(facts, e, *ins):
  if e.name != 'add':
    return ELEMENTWISE(facts, e, *ins)
  [out] = e.outputs
  return [
    [next((x[i] for x in ins if len(x) == len(out.shape) and x[i].size == n), ax.Var(n))
     for i, n in enumerate(out.shape)]
  ]  # fmt: skip


def concatenated_in_reverse(facts, e, *ins):
  k = e.params['dimension']
  joined = norm(Cat(*(x[k] for x in ins[::-1])))
  return [[joined if i == k else d for i, d in enumerate(ins[0])]]


def grouped_convolutions_do_not_couple(facts, e, lhs, rhs):
  if e.params['feature_group_count'] == 1:
    return CONVOLUTION(facts, e, lhs, rhs)
  dn = e.params['dimension_numbers']
  out = fresh(e.outputs[0].shape, 'spatial')
  out[dn.out_spec[0]], out[dn.out_spec[1]] = lhs[dn.lhs_spec[0]], rhs[dn.rhs_spec[0]]
  facts.hidden[e] = ax.Var(e.params['feature_group_count'])
  return [out]


ELEMENTWISE = rules.elementwise
CONVOLUTION = rules.RULES['conv_general_dilated']


@pytest.mark.parametrize(
  'lie',
  [
    additions_do_not_couple,
    concatenated_in_reverse,
    grouped_convolutions_do_not_couple,
  ],
)
def test_a_wrong_rule_is_caught(lie, monkeypatch):
  """The fuzz has power: one broken rule fails within the fast seeds."""
  if lie is additions_do_not_couple:
    monkeypatch.setattr(rules, 'elementwise', lie)
  else:
    broken = 'concatenate' if lie is concatenated_in_reverse else 'conv_general_dilated'
    monkeypatch.setitem(rules.RULES, broken, lie)

  def fails(seed):
    try:
      return error(seed) > 1e-4
    except (TypeError, ValueError, AssertionError, ZeroDivisionError):
      return True

  assert any(fails(seed) for seed in range(FAST))
