"""Experts go with their column of the router: as if their logits were -inf."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import depthprune as dp
from depthprune.program.coupling import couple
from depthprune.program.gating import plug
from depthprune.surgery.prune import prune
from tests import masking as m

TOKENS, WIDTH, EXPERTS, INNER = 12, 6, 5, 7
DRAW = np.random.default_rng(0)
SHAPES = {
  'in': (3, WIDTH), 'router': (WIDTH, EXPERTS), 'bias': (EXPERTS,),
  'up': (EXPERTS, WIDTH, INNER), 'down': (EXPERTS, INNER, WIDTH), 'out': (WIDTH, 2),
}  # fmt: skip
V = {n: jnp.asarray(DRAW.normal(size=s), jnp.float32) for n, s in SHAPES.items()}
X = jnp.asarray(DRAW.normal(size=(TOKENS, 3)), jnp.float32)
OPEN = np.ones(EXPERTS, bool)
KEPT = np.array([True, False, True, False, True])


def by_codes(v, x, logits):
  """Top-2 with a softmax over both, dispatched by one-hot codes."""
  best, chosen = jax.lax.top_k(logits, 2)
  codes = jax.nn.one_hot(chosen, logits.shape[-1])
  return mixed(v, x, (codes * jax.nn.softmax(best)[..., None]).sum(1))


def by_shares(v, x, logits):
  """The best two of a softmax over all, so that the sum of their shares is 1."""
  shares = jax.nn.softmax(logits)
  best, chosen = jax.lax.top_k(shares, 2)
  codes = jax.nn.one_hot(chosen, logits.shape[-1])
  shares = best / best.sum(-1, keepdims=True)
  return mixed(v, x, jnp.einsum('tke,tk->te', codes, shares))


def one_after_the_other(v, x, logits):
  """As GShard does: the best one, and then the best one of the others."""
  codes = []
  for _ in range(2):
    codes.append(jax.nn.one_hot(logits.argmax(-1), logits.shape[-1]))
    logits = logits - 1e6 * codes[-1]
  return mixed(v, x, codes[0] * 0.75 + codes[1] * 0.25)


def by_threshold(v, x, logits):
  """No numbers at all: whoever is as good as the second best."""
  best, _ = jax.lax.top_k(logits, 2)
  chosen = jnp.where(logits >= best[:, -1:], jnp.exp(logits), 0.0)
  return mixed(v, x, chosen / chosen.sum(-1, keepdims=True))


def by_lookup(v, x, logits):
  """The weights of the best expert are looked up."""
  chosen = logits.argmax(-1)
  h = jax.nn.relu(jnp.einsum('td,tdf->tf', x, v['up'][chosen]))
  return jnp.einsum('tf,tfd->td', h, v['down'][chosen])


def by_runs(v, x, logits):
  """The best two of every token, sorted by expert."""
  best, chosen = jax.lax.top_k(logits, 2)
  chosen = chosen.reshape(-1)
  order = jnp.argsort(chosen)
  sizes = jnp.bincount(chosen, length=logits.shape[-1])
  h = jax.nn.relu(jax.lax.ragged_dot(jnp.repeat(x, 2, 0)[order], v['up'], sizes))
  y = jax.lax.ragged_dot(h, v['down'], sizes)
  y = jnp.zeros_like(y).at[order].set(y).reshape(-1, 2, WIDTH)
  return jnp.einsum('tkd,tk->td', y, jax.nn.softmax(best))


def by_scatter(v, x, logits):
  best, chosen = jax.lax.top_k(logits, 2)
  put = jax.vmap(lambda row, at, share: row.at[at].set(share))
  return mixed(v, x, put(jnp.zeros_like(logits), chosen, jax.nn.softmax(best)))


def by_softmax(v, x, logits):
  """All experts count."""
  return mixed(v, x, jax.nn.softmax(logits))


def mixed(v, x, shares):
  h = jax.nn.relu(jnp.einsum('td,edf->tef', x, v['up']))
  return jnp.einsum('te,tef,efd->td', shares, h, v['down'])


def network(layer, closed=None):
  """closed: experts whose logits are -inf, as an oracle says it."""

  def run(v, x):
    x = x @ v['in']
    logits = x @ v['router'] + v['bias']
    if closed is not None:
      logits = jnp.where(closed, -jnp.inf, logits)
    return (x + layer(v, x, logits)) @ v['out']

  return run


LAYERS = {
  f.__name__: f
  for f in (
    by_codes,
    by_shares,
    one_after_the_other,
    by_threshold,
    by_lookup,
    by_runs,
    by_scatter,
    by_softmax,
  )
}


@pytest.fixture(scope='module', params=LAYERS)
def coupled(request):
  layer = LAYERS[request.param]
  return layer, couple(network(layer), V, X)


def test_an_expert_is_its_column_of_the_router_and_its_weights(coupled):
  _, coupling = coupled
  group = coupling.groups['router:1']
  assert group.kind == 'expert' and 'compete' in group.ungated
  paths = {'router': 1, 'bias': 0, 'up': 0, 'down': 0}
  assert dict(group.members) == paths and coupling.pinned == ()


def test_a_cut_is_the_network_whose_other_logits_are_the_lowest(coupled):
  layer, coupling = coupled
  want = m.quick(network(layer, closed=~KEPT))(V, X)
  full = m.quick(network(layer))(V, X)
  assert m.difference(want, full) > 1e-2
  keep = {'channels': {'router:1': KEPT}}
  pruned = prune(network(layer), V, keep, X, coupling=coupling)
  got = m.quick(pruned.apply)(pruned.variables, X)
  assert m.difference(want, got) <= 1e-5
  assert pruned.variables['up'].shape == (3, WIDTH, INNER)
  assert pruned.variables['router'].shape == (WIDTH, 3)
  np.testing.assert_array_equal(pruned.variables['bias'], V['bias'][KEPT])
  gated = m.quick(plug(network(layer), coupling))
  gates = {'channels': {'router:1': jnp.float32(KEPT)}}
  assert m.difference(want, gated(V, gates, X)) <= 1e-6
  # For another number of tokens, with other groups cut too.
  keep = {
    'channels': {'router:1': KEPT, **m.random_keep(coupling, gated=True)['channels']}
  }
  both = prune(network(layer), V, keep, X, coupling=coupling)
  masked = m.zeroed(coupling, V, {'channels': {**keep['channels'], 'router:1': OPEN}})
  want = network(layer, closed=~KEPT)(masked, X[:5])
  assert m.difference(want, both.apply(both.variables, X[:5])) <= 1e-5


def test_experts_that_are_never_chosen_go_without_a_trace():
  """Of the best two: the network is what it was. Not of a softmax over all."""
  rare = {**V, 'bias': jnp.where(KEPT, 0.0, -20.0)}
  keep = {'channels': {'router:1': KEPT}}
  for layer in (by_codes, by_lookup, by_threshold):
    pruned = prune(network(layer), rare, keep, X)
    want = network(layer)(rare, X)
    assert m.difference(want, pruned.apply(pruned.variables, X)) <= 1e-6


def test_gradients_of_what_is_left_are_those_of_the_masked_network():
  f = network(by_codes)
  pruned = prune(f, V, {'channels': {'router:1': KEPT}}, X)
  loss = lambda run: lambda v: jnp.square(run(v, X)).sum()
  small = jax.grad(loss(pruned.apply))(pruned.variables)
  full = jax.grad(loss(network(by_codes, closed=~KEPT)))(V)
  np.testing.assert_allclose(small['up'], full['up'][KEPT], rtol=1e-4, atol=1e-5)
  np.testing.assert_allclose(
    small['router'], full['router'][:, KEPT], rtol=1e-4, atol=1e-5
  )


def test_experts_go_on_request_only():
  f = network(by_codes)
  coupling = couple(f, V, X)
  keep = dp.oneshot(coupling, V, '60%', of='params')
  assert np.all(keep['channels'].get('router:1', True))
  assert 'router:1' not in coupling.gates()['channels']
  with pytest.raises(ValueError, match=r'router:1: keep leaves 1 experts, and 2 are'):
    prune(f, V, {'channels': {'router:1': np.arange(EXPERTS) == 1}}, X)


def test_as_many_experts_stay_as_are_chosen_at_a_time():
  """Where none would: those of the largest norms, since there is no branch to close."""
  large = V | {n: V[n].at[jnp.array([1, 4])].multiply(9) for n in ('up', 'down')}
  keep = {'channels': {'router:1': ~OPEN}}
  pruned = prune(network(by_codes), large, keep, X)
  np.testing.assert_array_equal(pruned.variables['up'], large['up'][jnp.array([1, 4])])
  assert 'its 2 largest slices stay' in pruned.report['notes'][0]
  pruned = prune(network(by_lookup), large, keep, X)
  assert pruned.variables['up'].shape[0] == 1


def test_layers_of_a_scan_have_experts():
  stack = {n: jnp.stack([V[n], 0.5 * V[n][::-1]]) for n in ('router', 'up', 'down')}
  variables = {'in': V['in'], 'layers': stack, 'out': V['out']}

  def f(v, x, closed=None):
    def body(x, p):
      logits = x @ p['router']
      logits = logits if closed is None else jnp.where(closed, -jnp.inf, logits)
      return x + by_codes(p, x, logits), None

    return jax.lax.scan(body, x @ v['in'], v['layers'])[0] @ v['out']

  coupling = couple(f, variables, X)
  assert coupling.groups['layers/router:2'].kind == 'expert'
  keep = {'channels': {'layers/router:2': KEPT}}
  pruned = prune(f, variables, keep, X, coupling=coupling)
  got = pruned.apply(pruned.variables, X)
  assert m.difference(f(variables, X, closed=~KEPT), got) <= 1e-5


def in_pairs(v, x, logits):
  """Row and expert as one pair of numbers."""
  best, chosen = jax.lax.top_k(logits, 2)
  shares = jnp.zeros_like(logits).at[jnp.arange(TOKENS)[:, None], chosen].set(best)
  return mixed(v, x, shares)


def counted(v, x, logits):
  return x * logits.argmax(-1)[:, None].astype(jnp.float32)


def shifted(v, x, logits):
  return mixed(v, x, jax.nn.one_hot(logits.argmax(-1) + 1, EXPERTS))


def compared_with_others(v, x, logits):
  """The code of the expert before the one that is chosen."""
  chosen = logits.argmax(-1)[:, None] == jnp.arange(EXPERTS) + 1
  return mixed(v, x, chosen.astype(jnp.float32))


def written_elsewhere(v, x, logits):
  """The chosen numbers are values of another table, addressed by themselves."""
  chosen = logits.argmax(-1)
  table = jnp.zeros(EXPERTS, jnp.int32).at[chosen].set(chosen)
  return x * table.sum().astype(jnp.float32)


def returned_by_a_loop(v, x, logits):
  body = lambda c, row: (c, row.argmax(-1))
  _, chosen = jax.lax.scan(body, 0, x @ v['router'])
  return mixed(v, x, jax.nn.one_hot(chosen, EXPERTS))


def least_of(v, x, logits):
  return by_codes(v, x, 3 - logits)


def reversed_by_a_factor(v, x, logits):
  return by_codes(v, x, logits * -0.5)


def squares(v, x, logits):
  return by_codes(v, x, logits * logits)


def clipped(v, x, logits):
  return by_codes(v, x, jnp.clip(logits, -1, 1))


@pytest.mark.parametrize('layer', [least_of, reversed_by_a_factor, squares, clipped])
def test_logits_of_which_minus_infinity_is_not_the_lowest_are_no_routers(layer):
  coupling = couple(network(layer), V, X)
  reasons = [p.reasons for p in coupling.pinned if p.path == 'router' and p.axis == 1]
  assert reasons == [('top_k',)]


@pytest.mark.parametrize(
  'layer',
  [
    in_pairs,
    counted,
    shifted,
    compared_with_others,
    written_elsewhere,
    returned_by_a_loop,
  ],
)
def test_other_uses_of_the_numbers_pin_the_experts(layer):
  coupling = couple(network(layer), V, X)
  reasons = [p.reasons for p in coupling.pinned if p.path == 'router' and p.axis == 1]
  assert reasons and not any(g.kind == 'expert' for g in coupling.groups.values())


def test_numbers_that_are_returned_pin_the_experts():
  f = lambda v, x: {'main': x @ v['in'], 'best': (x @ v['in'] @ v['router']).argmax(-1)}
  coupling = couple(f, V, X, fixed=lambda out: out['main'])
  (pinned,) = (p for p in coupling.pinned if p.path == 'router')
  assert pinned.axis == 1 and pinned.reasons == ('numbers of its slices are returned',)


def test_a_mode_that_returns_the_numbers_refuses_what_was_cut():
  def f(v, x, train=False):
    logits = x @ v['in'] @ v['router']
    y = (x @ v['in'] + by_codes(v, x @ v['in'], logits)) @ v['out']
    return (y, logits.argmax(-1)) if train else y

  pruned = prune(f, V, {'channels': {'router:1': KEPT}}, X)
  with pytest.raises(ValueError, match='router:1: numbers of its slices are returned'):
    pruned.apply(pruned.variables, X, train=True)
