"""What a network carries from call to call, such as a cache, is cut with it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import depthprune as dp
from tests import masking as m

DRAW = np.random.default_rng(0)
SHAPES = {
  'query': (6, 4, 3), 'key': (6, 4, 3), 'value': (6, 4, 5), 'out': (4, 5, 6),
  'head': (6, 7),
}  # fmt: skip
normal = lambda shape: jnp.asarray(DRAW.normal(size=shape), jnp.float32)
V = {
  'params': {name: normal(shape) for name, shape in SHAPES.items()},
  'branches': {'branch': jnp.float32(1)},
}
X = normal((2, 8, 6))
GROUPS = ['query:1', 'query:2', 'value:2', 'out:2']


def network(variables, x, cache=None):
  """Causal attention that adds to its input; with a cache over earlier inputs too."""
  p, start = variables['params'], 0
  q, k, v = (jnp.einsum('btc,chd->bthd', x, p[n]) for n in ('query', 'key', 'value'))
  if cache is not None:
    start, at = cache['length'], (0, cache['length'], 0, 0)
    k = jax.lax.dynamic_update_slice(cache['layer']['key'], k, at)
    v = jax.lax.dynamic_update_slice(cache['layer']['value'], v, at)
  scores = jnp.einsum('bqhd,bkhd->bhqk', q, k)
  seen = jnp.arange(k.shape[1]) <= start + jnp.arange(x.shape[1])[:, None]
  weights = jax.nn.softmax(jnp.where(seen, scores, -1e9))
  y = jnp.einsum('bhqk,bkhd,hdc->bqc', weights, v, p['out'])
  outputs = {'main': (x + variables['branches']['branch'] * y) @ p['head']}
  if cache is None:
    return outputs
  new = {'length': start + x.shape[1], 'layer': {'key': k, 'value': v}}
  return {**outputs, 'cache': new}


def empty(batch=2, length=8):
  shape = (batch, length, 4)
  layer = {'key': jnp.zeros((*shape, 3)), 'value': jnp.zeros((*shape, 5))}
  return {'length': jnp.int32(0), 'layer': layer}


def step_by_step(run, variables, cache, steps=(5, 1, 2)):
  parts, at = [], 0
  for n in steps:
    outputs = run(variables, X[:, at : at + n], cache=cache)
    cache, at = outputs['cache'], at + n
    parts.append(outputs['main'])
  return jnp.concatenate(parts, 1), cache


@pytest.fixture(scope='module', params=[1, 5], ids=['one token', 'prompt'])
def coupling(request):
  return dp.couple(network, V, X[:, : request.param], cache=empty())


def test_groups_are_those_of_the_network_without_a_cache(coupling):
  plain = dp.couple(network, V, X)
  assert coupling.groups == plain.groups and coupling.pinned == plain.pinned
  assert [*coupling.groups][:3] == GROUPS[:3] and coupling.exits == ('main',)
  assert {*coupling.carried} == {'cache/length', 'cache/layer/key', 'cache/layer/value'}


def test_a_cut_cuts_the_cache_and_runs_with_and_without_it(coupling):
  keep = m.random_keep(coupling, gated=True)
  inputs, cache = X[:, : coupling.inputs[0].shape[1]], empty()
  small = dp.prune(network, V, keep, inputs, coupling=coupling)
  assert small.report['verify']['difference'] <= 1e-5
  assert small.report['verify']['moved'] > 1e-3
  masked = m.quick(network)(m.zeroed(coupling, V, keep), X)['main']
  run = m.quick(small.apply)
  assert m.difference(masked, run(small.variables, X)['main']) <= 1e-5
  steps, cache = step_by_step(run, small.variables, cache)
  assert m.difference(masked, steps) <= 1e-5
  assert cache['layer']['key'].shape == (2, 8, 2, 1)
  assert cache['layer']['value'].shape == (2, 8, 2, 2) and cache['length'] == 8
  longer = run(small.variables, X[:1, :3], cache=empty(1, 20))['cache']['layer']
  again = run(small.variables, X[:1, 3:4], cache={'length': 3, 'layer': longer})
  assert m.difference(masked[:1, 3:4], again['main']) <= 1e-5


def test_a_closed_branch_takes_its_cache_along(coupling):
  keep = {'branches': {'branch': np.array(False)}}
  inputs = X[:, : coupling.inputs[0].shape[1]]
  small = dp.prune(network, V, keep, inputs, coupling=coupling)
  assert {*small.variables['params']} == {'head'}
  outputs = small.apply(small.variables, inputs, cache=empty())
  assert {*outputs} == {'main'}
  np.testing.assert_allclose(outputs['main'], inputs @ V['params']['head'], rtol=1e-5)


def test_gates_act_on_a_cache_as_they_do_without(coupling):
  gates = {'channels': {'query:1': jnp.asarray([1.0, 0.0, 0.5, 1.0])}}
  run = dp.plug(network, coupling)
  whole = run(V, gates, X)['main']
  steps, _ = step_by_step(lambda v, x, cache: run(v, gates, x, cache=cache), V, empty())
  assert m.difference(whole, steps) <= 1e-5


def test_a_cache_of_another_size_is_refused(coupling):
  keep = {'channels': {'query:1': np.arange(4) < 2}}
  small = dp.prune(network, V, keep, X[:, :1], coupling=coupling)
  cache = empty()
  cache['layer']['key'] = jnp.zeros((2, 8, 3, 3))
  with pytest.raises(ValueError, match=r'cache/layer/key: has shape \(2, 8, 3, 3\)'):
    small.apply(small.variables, X[:, :1], cache=cache)


def test_a_cache_that_the_coupling_did_not_see_is_named():
  plain = dp.couple(network, V, X)
  keep = {'channels': {'query:1': np.arange(4) < 2}}
  small = dp.prune(network, V, keep, X, coupling=plain)
  cache = jax.tree.map(lambda x: x[:, :, :2] if x.ndim else x, empty())
  with pytest.raises(Exception) as error:
    small.apply(small.variables, X[:, :1], cache=cache)
  notes = '\n'.join(error.value.__notes__)
  assert 'cache: the network was coupled without it; couple(..., cache=...)' in notes


def test_what_changes_its_shape_is_not_carried():
  grows = lambda v, x, cache: {'main': x @ v, 'cache': {'x': jnp.tile(cache['x'], 2)}}
  with pytest.raises(ValueError, match=r'cache/x: goes in as \(3,\) and comes out'):
    dp.couple(grows, jnp.ones((6, 2)), X, cache={'x': jnp.ones(3)})


def test_an_array_by_keyword_is_an_input_as_before():
  """A mask that comes back under its name is no tree that is carried."""
  both = lambda v, x, mask: {'main': (x * mask[..., None]) @ v, 'mask': mask}
  coupling = dp.couple(both, jnp.ones((6, 2)), X, mask=jnp.ones((2, 8)))
  assert coupling.carried == {} and coupling.exits == ('mask', 'main')
