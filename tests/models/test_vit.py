"""Vision transformers: published sizes, the block by hand, stacks and their layers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from depthprune.models import build
from depthprune.models.vit import ViT
from depthprune.program.coupling import couple
from depthprune.program.units import closing, units
from depthprune.surgery.prune import prune
from tests import masking as m
from tests import zoo

X = zoo.image(2)
SMALL = ViT(width=8, depth=2, heads=2, inner=12)


@pytest.mark.parametrize(
  ('name', 'expected'),
  [('vit_tiny', 5_717_416), ('vit_small', 22_050_664), ('vit_base', 86_567_656)],
)
def test_parameters_equal_the_published_counts(name, expected):
  x = jnp.ones((1, 224, 224, 3))
  shapes = jax.eval_shape(build(name).init, jax.random.key(0), x)
  assert sum(leaf.size for leaf in jax.tree.leaves(shapes['params'])) == expected


def test_tokens_are_patches_behind_a_class_token(randomised):
  model = ViT(width=8, depth=0, heads=2)
  variables = jax.tree.map(np.asarray, randomised(model, X))['params']
  outputs, _ = jax.eval_shape(SMALL.init_with_output, jax.random.key(0), X)
  assert outputs['block0'].shape == (2, 1 + 2 * 2, 8)
  patches = np.asarray(X).reshape(2, 2, 4, 2, 4, 3).transpose(0, 1, 3, 2, 4, 5)
  kernel, bias = variables['embed']['kernel'], variables['embed']['bias']
  tokens = patches.reshape(2, 4, -1) @ kernel.reshape(-1, 8) + bias
  first = np.broadcast_to(variables['token'], (2, 1, 8))
  tokens = np.concatenate([first, tokens], 1) + variables['position']
  logits = normed(tokens, variables['norm'])[:, 0] @ variables['head']['kernel']
  got = m.quick(model.apply)({'params': variables}, X)['main']
  got = got - variables['head']['bias']
  np.testing.assert_allclose(got, logits, rtol=1e-4, atol=1e-4)


def normed(x, norm):
  x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)
  return x * norm['scale'] + norm['bias']


def test_a_block_is_attention_then_a_perceptron(randomised):
  """The equations of the paper, with gates, one head at a time."""
  variables = randomised(SMALL, X)
  gates = {'attention': {'branch': jnp.float32(0.7)}}
  gates['mlp'] = {'branch': jnp.float32(-1.3)}
  variables['branches'] = {**variables['branches'], 'block1': gates}
  outputs = m.quick(SMALL.apply)(variables, X)
  x = np.asarray(outputs['block0'])
  p = jax.tree.map(np.asarray, variables['params']['block1'])
  part, total = p['attention'], 0
  y = normed(x, part['norm'])
  for head in range(2):
    q, k, v = (
      y @ part[name]['kernel'][:, head] + part[name]['bias'][head]
      for name in ('query', 'key', 'value')
    )
    weights = np.exp(q @ k.transpose(0, 2, 1) / np.sqrt(4))
    weights /= weights.sum(-1, keepdims=True)
    total = total + weights @ v @ part['out']['kernel'][head]
  x = x + 0.7 * (total + part['out']['bias'])
  y = normed(x, p['mlp']['norm']) @ p['mlp']['up']['kernel'] + p['mlp']['up']['bias']
  y = np.asarray(jax.nn.gelu(y)) @ p['mlp']['down']['kernel'] + p['mlp']['down']['bias']
  np.testing.assert_allclose(outputs['block1'], x - 1.3 * y, rtol=1e-4, atol=1e-4)


def test_dropout_is_on_in_training_only(randomised):
  model = SMALL.clone(dropout=0.5)
  variables = randomised(model, X)
  train = m.quick(lambda key: model.apply(variables, X, True, rngs={'dropout': key}))
  one, again, other = (train(jax.random.key(seed))['main'] for seed in (0, 0, 1))
  np.testing.assert_array_equal(one, again)
  assert not np.allclose(one, other)
  still, plain = (m.quick(net.apply)(variables, X)['main'] for net in (model, SMALL))
  np.testing.assert_array_equal(still, plain)


def test_cut_queries_keep_the_scale_of_the_full_network():
  """Half the width of queries and keys: arch gives the same function as surgery."""
  variables = zoo.randomised(jax.eval_shape(SMALL.init, jax.random.key(0), X))
  coupling = couple(SMALL, variables, X)
  keep = {'channels': {'block0/attention/query:2': np.arange(4) < 2}}
  keep['channels']['block1/attention/query:1'] = np.asarray([False, True])
  pruned = prune(SMALL, variables, keep, X, coupling=coupling)
  assert pruned.arch == {
    'block0/attention/query': 2,
    'block0/attention/key': 2,
    'block1/attention/query:1': 1,
  }
  expected = m.quick(SMALL.apply)(m.zeroed(coupling, variables, keep), X)
  got = m.quick(pruned.model.apply)(pruned.variables, X)
  assert m.difference(expected['main'], got['main']) <= 1e-5


def unrolled(tree, layers):
  """Arrays of a chain of blocks, from those layers of a stack."""
  rest = {name: part for name, part in tree.items() if name != 'blocks0'}
  pick = lambda i: jax.tree.map(lambda leaf: leaf[i], tree['blocks0'])
  return rest | {f'block{j}': pick(i) for j, i in enumerate(layers)}


def test_layers_left_of_a_stack_are_those_of_the_unrolled_network():
  """Layers 0, 2 and 5 of 6: by surgery on the stack, and by hand."""
  model = ViT(width=8, depth=6, heads=2, inner=12, scan=True)
  variables = zoo.randomised(jax.eval_shape(model.init, jax.random.key(0), X))
  coupling = couple(model, variables, X)
  closed = [u for u in units(coupling) if u.layer in (1, 3, 4)]
  assert len(closed) == 3
  pruned = prune(model, variables, closing(closed, coupling), X, coupling=coupling)
  assert pruned.arch == {'blocks0/attention/branch': 3, 'blocks0/mlp/branch': 3}
  assert pruned.report['verify']['difference'] <= 1e-5 and not pruned.report['notes']
  kernel = variables['params']['blocks0']['mlp']['up']['kernel']
  left = pruned.variables['params']['blocks0']['mlp']['up']['kernel']
  np.testing.assert_array_equal(left, kernel[np.asarray([0, 2, 5])])

  chain = ViT(width=8, depth=3, heads=2, inner=12)
  arrays = {name: unrolled(tree, (0, 2, 5)) for name, tree in variables.items()}
  expected = m.quick(chain.apply)(arrays, X)['main']
  full = m.quick(model.apply)(variables, X)['main']
  assert m.difference(full, expected) > 1e-2
  for small in (pruned.apply, pruned.model.apply):
    got = m.quick(small)(pruned.variables, X)['main']
    assert m.difference(expected, got) <= 1e-5


def test_a_branch_closed_in_some_layers_of_a_stack_becomes_zeros_in_them():
  """Attention goes from layers 0 and 1, the perceptron from 1 and 2: 1 is cut."""
  model = ViT(width=8, depth=4, heads=2, inner=12, scan=True)
  variables = zoo.randomised(jax.eval_shape(model.init, jax.random.key(0), X))
  attention, mlp = np.asarray([[False, False, True, True], [True, False, False, True]])
  keep = {'blocks0/attention/branch': attention, 'blocks0/mlp/branch': mlp}
  pruned = prune(model, variables, {'branches': keep}, X)
  assert pruned.arch == {'blocks0/attention/branch': 3, 'blocks0/mlp/branch': 3}
  gates = variables['branches']['blocks0']
  masked = {
    'attention': {'branch': jnp.where(attention, gates['attention']['branch'], 0)},
    'mlp': {'branch': jnp.where(mlp, gates['mlp']['branch'], 0)},
  }
  masked = {**variables, 'branches': {'blocks0': masked}}
  expected = m.quick(model.apply)(masked, X)['main']
  for small in (pruned.apply, pruned.model.apply):
    got = m.quick(small)(pruned.variables, X)['main']
    assert m.difference(expected, got) <= 1e-5


@pytest.mark.parametrize(
  ('fields', 'message'),
  [
    ({'heads': 5}, '5 heads do not divide the width 8'),
    ({'scan': True, 'segments': 3}, '3 segments do not divide the 2 blocks'),
    ({'patch': 3}, r'images \(2, 8, 8, 3\) are not made of patches of 3'),
    (
      {'scan': True, 'arch': {'blocks0/mlp/branch': 1}},
      'blocks0: arch leaves 2 layers of attention/branch and 1 of mlp/branch',
    ),
    ({'arch': {'block0/mlp/down': 7}}, r'block0/mlp: the branch has shape \(2, 5, 7\)'),
  ],
)
def test_impossible_networks_are_refused(fields, message):
  with pytest.raises(ValueError, match=message):
    model = ViT(**{'width': 8, 'depth': 2, 'heads': 2, **fields})
    jax.eval_shape(model.init, jax.random.key(0), X)
