"""Decoders whose layers are stacks: their cache is one too, and is cut with them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from depthprune.models.decoder import Decoder
from depthprune.models.generation import generate
from depthprune.program.coupling import couple
from depthprune.program.trace import paths_of
from depthprune.surgery.prune import prune
from tests import masking as m
from tests import zoo

UNROLLED = Decoder(
  vocab=20, positions=12, width=8, depth=4, heads=4, groups=2, size=4, inner=6
)
STACKED = UNROLLED.clone(scan=True, segments=2)
X = zoo.tokens(2)
STEPS = (5, 1, 1, 2)


def stacked(tree):
  """What belongs to layers 0 to 3, as stacks of two."""
  layers = [tree[f'layer{i}'] for i in range(4) if f'layer{i}' in tree]
  pairs = {'layers0': layers[:2], 'layers1': layers[2:]} if layers else {}
  stacks = {n: jax.tree.map(lambda *xs: jnp.stack(xs), *p) for n, p in pairs.items()}
  return {n: x for n, x in tree.items() if not n.startswith('layer')} | stacks


@pytest.fixture(scope='module')
def arrays():
  shapes = jax.eval_shape(UNROLLED.init, jax.random.key(0), X)
  unrolled = zoo.randomised(shapes)
  return unrolled, {name: stacked(part) for name, part in unrolled.items()}


@pytest.fixture(scope='module')
def couplings(arrays):
  """Without a cache, with one for a prompt, and for one token."""
  cache = STACKED.empty_cache(2, 9)
  calls = ((X, {}), (X[:, :5], {'cache': cache}), (X[:, :1], {'cache': cache}))
  return [couple(STACKED, arrays[1], x, **kwargs) for x, kwargs in calls]


def test_a_stack_writes_what_its_layers_write(arrays):
  (one, one_cache), (two, two_cache) = (
    m.in_calls(m.quick(model.apply), variables, X, model.empty_cache(2, 10), STEPS)
    for model, variables in zip((UNROLLED, STACKED), arrays)
  )
  assert m.difference(one, two) <= 1e-5
  assert m.difference(one, m.quick(STACKED.apply)(arrays[1], X)['main']) <= 1e-5
  close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
  jax.tree.map(close, stacked(one_cache), two_cache)
  assert two_cache['layers1']['key'].shape == (2, 2, 10, 2, 4)
  text, other = (
    generate(model, variables, X[:, :5], 6)
    for model, variables in zip((UNROLLED, STACKED), arrays)
  )
  np.testing.assert_array_equal(text, other)


def test_groups_are_the_same_in_every_mode(couplings):
  plain, prompt, token = couplings
  assert plain.groups == prompt.groups == token.groups
  layers = [name for name, g in token.groups.items() if g.kind == 'layer']
  assert layers == ['layers0/attention/query:0', 'layers1/attention/query:0']
  inside = {f'cache/layers{i}/{part}' for i in (0, 1) for part in ('key', 'value')}
  assert {*token.carried} == {'cache/length', *inside}


def closed(*layers):
  """The layers of the first stack that stay, and no attention in the second one."""
  both = [f'layers0/{part}/branch' for part in ('attention', 'mlp')]
  stay = ~np.isin(np.arange(2), layers)
  return {**dict.fromkeys(both, stay), 'layers1/attention/branch': np.zeros(2, bool)}


@pytest.mark.parametrize('mode', [0, 1, 2], ids=['no cache', 'prompt', 'token'])
def test_the_cache_is_cut_with_heads_groups_and_layers(mode, arrays, couplings):
  """The text is that of the masked network, layer by layer and as a stack."""
  coupling = couplings[mode]
  keep = {**m.random_keep(coupling, seed=3, gated=True), 'branches': closed(0)}
  pruned = prune(STACKED, arrays[1], keep, coupling.inputs, coupling=coupling)
  assert pruned.report['verify']['difference'] <= 1e-5
  assert pruned.report['verify']['moved'] > 1e-3 and not pruned.report['notes']
  masked = paths_of(m.zeroed(coupling, arrays[1], keep))
  for name, kept in keep['branches'].items():
    masked[f'branches/{name}'] *= jnp.float32(kept)
  masked = jax.tree.unflatten(jax.tree.structure(arrays[1]), [*masked.values()])
  whole, _ = m.in_calls(
    m.quick(STACKED.apply), masked, X, STACKED.empty_cache(2, 9), STEPS
  )
  small = pruned.model.empty_cache(2, 9)
  assert {n: x.shape for n, x in small['layers0'].items()} == {
    'key': (1, 2, 9, 1, 4), 'value': (1, 2, 9, 1, 2)
  }  # fmt: skip
  assert {*small} == {'length', 'layers0'}
  runs = [(pruned.model.apply, small)]
  if mode:  # coupled with a cache, the function cuts that of the full network too
    runs += [(pruned.apply, small), (pruned.apply, STACKED.empty_cache(2, 9))]
  for run, cache in runs:
    logits, after = m.in_calls(m.quick(run), pruned.variables, X, cache, STEPS)
    assert m.difference(whole, logits) <= 1e-5
    assert jax.tree.map(jnp.shape, after) == jax.tree.map(jnp.shape, small)
  text = generate(STACKED, masked, X[:, :5], 6)
  again = generate(pruned.model, pruned.variables, X[:, :5], 6)
  np.testing.assert_array_equal(text, again)


def test_a_stack_without_layers_has_no_cache(arrays, couplings):
  keep = {'branches': closed(0, 1)}
  pruned = prune(STACKED, arrays[1], keep, X[:, :1], coupling=couplings[2])
  assert {*pruned.model.empty_cache(2, 9)} == {'length'}
  logits, cache = m.in_calls(
    pruned.apply, pruned.variables, X, STACKED.empty_cache(2, 9), STEPS
  )
  whole = pruned.model.apply(pruned.variables, X)['main']
  assert m.difference(whole, logits) <= 1e-5 and {*cache} == {'length'}
