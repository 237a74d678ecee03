"""Decoders: caches, windows, and cuts of every kind with and without a cache."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from depthprune.models import build
from depthprune.models.decoder import Decoder
from depthprune.program.coupling import couple
from depthprune.program.trace import paths_of
from depthprune.program.units import units
from depthprune.surgery.prune import prune
from tests import masking as m
from tests import zoo

TINY = {'vocab': 20, 'positions': 12, 'width': 8, 'depth': 2, 'inner': 6}
TINY |= {'heads': 4, 'groups': 2, 'size': 4}
MODELS = {
  'llama': Decoder(**TINY),
  'qwen': Decoder(**TINY, tied=False, bias=True, query_norm=True, window=5),
  'gemma': Decoder(**TINY, offset=1.0, scaled=True, activation='gelu'),
}
X = zoo.tokens(2)
STEPS = (5, 1, 1, 2)  # tokens that calls with a cache read


def arrays(model):
  return zoo.randomised(jax.eval_shape(model.init, jax.random.key(0), X))


def test_parameters_equal_the_published_count():
  shapes = jax.eval_shape(build('decoder_smollm2').init, jax.random.key(0), X)['params']
  assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == 134_515_008


# ---- caches --------------------------------------------------------------------------


@pytest.mark.parametrize('name', MODELS)
def test_a_cache_changes_nothing_but_the_work(name):
  model = MODELS[name]
  variables = arrays(model)
  run = m.quick(model.apply)
  whole = run(variables, X)['main']
  parts, _ = m.in_calls(run, variables, X, model.empty_cache(2, 10), STEPS)
  assert m.difference(whole, parts) <= 1e-5


@pytest.mark.parametrize('name', MODELS)
def test_a_part_of_the_way_after_the_other_is_the_whole_way(name):
  """With a cache, whose layers come from the parts; `skip` changes no features."""
  model = MODELS[name]
  variables, cache = arrays(model), model.empty_cache(2, 10)
  run = jax.jit(model.apply, static_argnames=('since', 'until', 'skip'))
  whole = run(variables, X, cache=cache)
  start = run(variables, X, until='layer0', cache=cache)
  assert {*start} == {'layer0', 'cache'}
  rest = run(variables, start['layer0'], since='layer0', cache=cache)
  assert m.difference(whole['main'], rest['main']) <= 1e-6
  caches = {**start['cache'], **rest['cache']}
  assert m.difference(whole['cache'], caches) <= 1e-6
  passed = run(variables, start['layer0'], since='layer0', skip=True, cache=cache)
  np.testing.assert_array_equal(passed['layer1'], start['layer0'])
  assert m.difference(whole['cache']['layer1'], passed['cache']['layer1']) <= 1e-6


def test_parts_that_there_are_not_are_refused():
  model = MODELS['llama']
  variables = arrays(model)
  with pytest.raises(ValueError, match="no tap 'layer7'"):
    model.apply(variables, X, since='layer7')
  with pytest.raises(ValueError, match='until: expected a tap after layer1, got layer'):
    model.apply(variables, jnp.zeros((2, 3, 8)), since='layer1', until='layer0')
  with pytest.raises(ValueError, match=r'features of layer0 \[batch, length, width\]'):
    model.apply(variables, X, since='layer0')


def test_a_token_sees_those_before_it_and_no_others():
  model = MODELS['llama']
  variables = arrays(model)
  run = m.quick(model.apply)
  one, other = (run(variables, X.at[:, 6].set(t))['main'] for t in (3, 4))
  np.testing.assert_array_equal(one[:, :6], other[:, :6])
  assert all(m.difference(one[:, i], other[:, i]) > 1e-3 for i in (6, 7, 8))


def test_a_window_hides_what_is_further_back():
  model = Decoder(**(TINY | {'depth': 1}), window=3)
  variables = arrays(model)
  run = m.quick(model.apply)
  one, other = (run(variables, X.at[:, 2].set(t))['main'] for t in (3, 4))
  np.testing.assert_array_equal(one[:, 5:], other[:, 5:])
  assert m.difference(one[:, 4], other[:, 4]) > 1e-3


def test_positions_turn_queries_and_keys_against_each_other_only():
  """Scores depend on distances: behind other texts, out of sight, nothing changes."""
  model = Decoder(**(TINY | {'depth': 1}), window=4)
  variables, cache = arrays(model), model.empty_cache(2, 12)
  run = m.quick(model.apply)
  first = run(variables, X[:, :4], cache=cache)['main']
  before = run(variables, X[:, 4:8], cache=cache)
  later = run(variables, X[:, :4], cache=before['cache'])['main']
  assert m.difference(first[:, 3], later[:, 3]) <= 1e-5
  assert m.difference(first[:, 2], later[:, 2]) > 1e-3


# ---- cuts ----------------------------------------------------------------------------

PART = ('query:1', 'query:2', 'value:2')
BRANCHES = 'layer0/mlp/branch', 'layer1/attention/branch'
CLOSED = dict.fromkeys(BRANCHES, np.array(False))
KINDS = {
  'heads': 'query:2', 'groups': 'query:1', 'values': 'value', 'perceptrons': 'mlp',
  'hidden width': 'embed', 'everything': '',
}  # fmt: skip
ALONE = [pytest.param(kind, marks=pytest.mark.slow) for kind in [*KINDS][:4]]


@pytest.fixture(scope='module', params=MODELS)
def coupled(request):
  """A model, its arrays, and its couplings: without a cache, a prompt, one token."""
  model = MODELS[request.param]
  variables, cache = arrays(model), model.empty_cache(2, 9)
  calls = ((X, {}), (X[:, :5], {'cache': cache}), (X[:, :1], {'cache': cache}))
  return model, variables, [couple(model, variables, x, **kw) for x, kw in calls]


def test_groups_are_the_same_in_every_mode(coupled):
  model, _, (plain, prompt, token) = coupled
  inner = [f'attention/{name}' for name in PART] + ['mlp/gate:1']
  names = ['embed:1', *(f'layer{i}/{name}' for i in range(2) for name in inner)]
  assert [*plain.groups] == names and plain.unknown == ()
  assert not any(group.ungated for group in plain.groups.values())
  assert plain.groups == prompt.groups == token.groups
  inside = [p for p in plain.pinned if 'attention' in p.path]
  pinned = {p.path.split('/')[3]: p.reasons for p in inside}
  assert all('iota' in reasons for reasons in pinned.values())
  assert {'query', 'key'} <= {*pinned} <= {'query', 'key', 'query_norm', 'key_norm'}
  assert [u.why_not for u in units(token)] == [''] * 2 * model.depth


@pytest.mark.parametrize('kind', [*ALONE, 'hidden width', 'everything'])
def test_small_is_masked_with_and_without_a_cache(kind, coupled):
  model, variables, couplings = coupled
  keep = m.random_keep(couplings[0], seed=2)
  kept = keep['channels']
  keep['channels'] = {g: k for g, k in kept.items() if KINDS[kind] in g}
  if kind == 'everything':
    keep['branches'] = CLOSED
  pruned = prune(model, variables, keep, X, coupling=couplings[0])
  assert pruned.report['verify']['difference'] <= 1e-5 and not pruned.report['notes']
  masked = m.zeroed(couplings[0], variables, keep)
  masked = with_gates(masked, {p: jnp.float32(0) for p in keep.get('branches', ())})
  whole = m.quick(model.apply)(masked, X)['main']
  run = m.quick(pruned.model.apply)
  assert m.difference(whole, run(pruned.variables, X)['main']) <= 1e-5
  empty = pruned.model.empty_cache(2, 9)
  parts, _ = m.in_calls(run, pruned.variables, X, empty, STEPS)
  assert m.difference(whole, parts) <= 1e-5


def with_gates(variables, gates):
  leaves = paths_of(variables)
  leaves = [gates.get(p.removeprefix('branches/'), x) for p, x in leaves.items()]
  return jax.tree.unflatten(jax.tree.structure(variables), leaves)


@pytest.mark.parametrize('mode', [1, 2], ids=['prompt', 'token'])
def test_what_was_coupled_with_a_cache_is_cut_with_it(mode, coupled):
  """By surgery on the program that reads a cache: the same network again."""
  model, variables, couplings = coupled
  coupling = couplings[mode]
  keep = {**m.random_keep(coupling, seed=3), 'branches': CLOSED}
  pruned = prune(model, variables, keep, coupling.inputs, coupling=coupling)
  assert pruned.report['verify']['difference'] <= 1e-5
  assert pruned.report['verify']['moved'] > 1e-3
  run = m.quick(pruned.apply)
  whole = m.quick(pruned.model.apply)(pruned.variables, X)['main']
  assert m.difference(whole, run(pruned.variables, X)['main']) <= 1e-5
  for cache in (model.empty_cache(2, 9), pruned.model.empty_cache(2, 9)):
    parts, _ = m.in_calls(run, pruned.variables, X, cache, STEPS)
    assert m.difference(whole, parts) <= 1e-5


def test_a_layer_of_a_stack_goes_by_its_branches():
  model = Decoder(**(TINY | {'depth': 4}), scan=True)
  variables = arrays(model)
  coupling = couple(model, variables, X)
  gone = np.arange(4) != 2
  keep = {'branches': {f'layers0/{part}/branch': gone for part in ('attention', 'mlp')}}
  keep['channels'] = {'layers0/attention/query:2': np.array([True, False])}
  pruned = prune(model, variables, keep, X, coupling=coupling)
  assert pruned.report['verify']['difference'] <= 1e-5
  assert pruned.arch['layers0/mlp/branch'] == 3
  assert pruned.arch['layers0/attention/query:2'] == 1
  ours, native = (
    m.quick(run)(pruned.variables, X)['main']
    for run in (pruned.apply, pruned.model.apply)
  )
  assert m.difference(ours, native) <= 1e-6


@pytest.mark.parametrize(
  ('fields', 'message'),
  [
    (
      {'heads': 3},
      'expected groups that divide the heads.* 2 groups, 3 heads',
    ),
    ({'size': 3}, 'an even size, got .* and size 3'),
    ({'scan': True, 'segments': 3}, '3 segments do not divide the 2 layers'),
    ({'positions': 8}, r'at most 8 positions, got \(2, 9\)'),
    ({'arch': {'layer0/mlp/down': 7}}, r'layer0/mlp: the branch has shape \(2, 9, 7\)'),
    ({'arch': {'layer0/attention/query': 2}}, "no key 'layer0/attention/query'"),
  ],
)
def test_impossible_networks_and_texts_are_refused(fields, message):
  with pytest.raises(ValueError, match=message):
    jax.eval_shape(Decoder(**(TINY | fields)).init, jax.random.key(0), X)


def test_impossible_caches_are_refused():
  with pytest.raises(ValueError, match='at most 12 positions, got .* of length 13'):
    MODELS['llama'].empty_cache(1, 13)
