"""What a network carries from call to call, such as a cache, is cut with it."""

from collections import OrderedDict

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

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
STEPS = (5, 1, 2)  # what calls with a cache read
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
  steps, cache = m.in_calls(run, small.variables, X, cache, STEPS)
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
  steps, _ = m.in_calls(
    lambda v, x, cache: run(v, gates, x, cache=cache), V, X, empty(), STEPS
  )
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


# ---- caches of libraries -------------------------------------------------------------


class Writer(nnx.Module):
  """A decoder of one layer, whose attention keeps its cache in the module."""

  def __init__(self, decode):
    rngs = nnx.Rngs(0)
    self.embed = nnx.Embed(20, 8, rngs=rngs)
    self.attention = nnx.MultiHeadAttention(
      num_heads=4, in_features=8, qkv_features=12, decode=decode, rngs=rngs
    )
    self.up, self.down = nnx.Linear(8, 10, rngs=rngs), nnx.Linear(10, 8, rngs=rngs)
    self.head = nnx.Linear(8, 20, rngs=rngs)
    if decode:
      self.attention.init_cache((2, 9, 8))

  def __call__(self, tokens):
    x = self.embed(tokens)
    mask = None if self.attention.decode else nnx.make_causal_mask(tokens)
    x = x + self.attention(x, mask=mask)
    return self.head(x + self.down(nnx.relu(self.up(x))))


TOKENS = jnp.asarray(DRAW.integers(0, 20, (2, 9)), jnp.int32)
HEADS = {
  'attention/query:1': np.array([True, False, True, True]),
  'attention/query:2': np.array([True, False, True]),
  'attention/value:2': np.array([False, False, True]),
  'up:1': np.arange(10) % 3 == 0,
}


def test_one_token_of_a_module_that_holds_its_cache_has_the_groups_of_all_tokens():
  """And the cache, which is among its variables, is cut with them."""
  (whole, step), sizes = (Writer(False), Writer(True)), []
  for net, tokens in ((whole, TOKENS), (step, TOKENS[:, :1])):
    coupling = dp.couple(net, nnx.state(net), tokens)
    sizes.append({name: group.size for name, group in coupling.groups.items()})
  assert sizes[0] == sizes[1] and {*HEADS} < {*sizes[0]}
  keep = {'channels': HEADS}
  small = dp.prune(step, nnx.state(step), keep, TOKENS[:, :1])
  assert small.variables['attention']['cached_key'].get_value().shape == (2, 9, 3, 2)
  assert small.variables['attention']['cached_value'].get_value().shape == (2, 9, 3, 1)


def test_a_module_that_holds_its_cache_writes_after_a_cut():
  """The cache is an argument, so it is carried; the text is that of the masked one."""
  graph, params, cache = nnx.split(Writer(True), nnx.Param, ...)

  def step(params, tokens, cache):
    net = nnx.merge(graph, params, cache)
    return {'main': net(tokens), 'cache': nnx.state(net, nnx.Not(nnx.Param))}

  net = Writer(False)
  plain = dp.couple(net, nnx.state(net), TOKENS)
  coupling = dp.couple(step, params, TOKENS[:, :1], cache=cache)
  assert coupling.groups == plain.groups and len(coupling.carried) == 3
  keep = {'channels': HEADS}
  small = dp.prune(step, params, keep, TOKENS[:, :1], cache=cache, coupling=coupling)
  masked = m.zeroed(coupling, params, keep)
  whole = dp.prune(net, nnx.state(net), keep, TOKENS, coupling=plain)
  parts, carried = [], cache
  for i in range(9):
    outputs = small.apply(small.variables, TOKENS[:, i : i + 1], cache=carried)
    carried = outputs['cache']
    parts.append(outputs['main'])
  assert carried['attention']['cached_key'].get_value().shape == (2, 9, 3, 2)
  logits = jnp.concatenate(parts, 1)
  assert m.difference(whole.apply(whole.variables, TOKENS), logits) <= 1e-5
  text = dp.generate(small.apply, small.variables, TOKENS[:, :1], 6, cache=cache)
  expected = dp.generate(step, masked, TOKENS[:, :1], 6, cache=cache)
  np.testing.assert_array_equal(text, expected)


class Logits(OrderedDict):
  """Outputs of transformers: a cache may be an entry without being a field."""


jax.tree_util.register_pytree_node(
  Logits, lambda x: ((x['logits'],), None), lambda _, x: Logits(logits=x[0])
)


class Attention(nn.Module):
  """`network`, with its cache in a collection."""

  @nn.compact
  def __call__(self, x):
    params = {n: self.param(n, nn.initializers.normal(), s) for n, s in SHAPES.items()}
    cache = self.variable('cache', 'layer', empty)
    variables = {'params': params, 'branches': V['branches']}
    outputs = network(variables, x, cache.value)
    cache.value = outputs['cache']
    return outputs['main']


class Wrapped:
  """What the Flax models of transformers are: a linen module and its call."""

  def __init__(self):
    self.module, self.params = Attention(), V['params']

  def __call__(self, x, params, past_key_values):
    variables = {'params': params, 'cache': {'layer': past_key_values}}
    logits, new = self.module.apply(variables, x, mutable=['cache'])
    outputs = Logits(logits=logits)
    outputs['past_key_values'] = new['cache']['layer']
    return outputs


@pytest.mark.parametrize('tokens', [1, 5])
def test_a_cache_that_is_no_field_of_the_outputs_is_carried(tokens):
  model, x = Wrapped(), X[:, :tokens]
  coupling = dp.couple(model, model.params, x, past_key_values=empty())
  plain = dp.couple(network, V, X)
  names = lambda coupling: {n: group.size for n, group in coupling.groups.items()}
  assert names(coupling) == names(plain) and coupling.exits == ('logits',)
  assert len(coupling.carried) == 3
  keep = m.random_keep(coupling, gated=True)
  small = dp.prune(
    model, model.params, keep, x, coupling=coupling, past_key_values=empty()
  )

  def run(variables, x, cache):
    outputs = small.apply(variables, x, past_key_values=cache)
    return {'main': outputs['logits'], 'cache': outputs['past_key_values']}

  got, cache = m.in_calls(run, small.variables, X, empty(), STEPS)
  zeroed = {**V, 'params': m.zeroed(coupling, model.params, keep)}
  assert m.difference(network(zeroed, X)['main'], got) <= 1e-5
  assert cache['layer']['key'].shape == (2, 8, 2, 1)
