"""Checkpoints of MaxText: read by its equations they compute what was cut, and back."""

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
import yaml

from depthprune.exports import maxtext
from depthprune.models.decoder import Decoder
from depthprune.program.trace import paths_of
from tests import masking as m
from tests import zoo
from tests.exports import decoders

TINY = {
  'vocab': 20, 'positions': 12, 'width': 12, 'depth': 3, 'inner': 6, 'heads': 4,
  'groups': 2, 'size': 4, 'epsilon': 0.05, 'theta': 100.0,
}  # fmt: skip
X = zoo.tokens(2)


def made(**more):
  model = Decoder(**{**TINY, **more})
  variables = zoo.randomised(jax.eval_shape(model.init, jax.random.key(0), X))
  return model, {
    **variables,
    'branches': jax.tree.map(jnp.ones_like, variables['branches']),
  }


def restored(items):
  with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as orbax:
    return orbax.restore(items.absolute())['params']['params']


def forward(tree, config, tokens):
  """The logits of MaxText's llama2 block, from its tree and its config alone.

  Written after its documentation: a scan over axis 1 of the layers, rotations of
  halves with wavelengths up to rope_max_timescale, scores that are not divided.
  """
  size, heads = config['head_dim'], config['base_num_query_heads']
  per_group = heads // config['base_num_kv_heads']

  def norm(x, scale):
    mean = jnp.mean(jnp.square(x), -1, keepdims=True)
    return x / jnp.sqrt(mean + config['normalization_layer_epsilon']) * scale

  def rotate(x):  # [batch, length, heads, size]
    fraction = 2 * jnp.arange(size // 2) / size
    wavelength = config['rope_max_timescale'] ** fraction.astype(jnp.float32)
    angle = jnp.arange(x.shape[1], dtype=jnp.float32)[:, None, None] / wavelength
    first, second = x[..., : size // 2], x[..., size // 2 :]
    sin, cos = jnp.sin(angle), jnp.cos(angle)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], -1)

  def layer(x, p):
    attention, mlp = p['self_attention'], p['mlp']
    y = norm(x, p['pre_self_attention_layer_norm']['scale'])
    q, k, v = (
      jnp.einsum('bte,ehd->bthd', y, attention[name]['kernel'])
      for name in ('query', 'key', 'value')
    )
    q, k = rotate(q), rotate(k)
    k, v = (jnp.repeat(each, per_group, 2) for each in (k, v))
    scores = jnp.einsum('bthd,bshd->bhts', q, k)
    causal = jnp.tril(jnp.ones(scores.shape[-2:], bool))
    weights = jax.nn.softmax(jnp.where(causal, scores, -1e30))
    y = jnp.einsum('bhts,bshd->bthd', weights, v)
    x = x + jnp.einsum('bthd,hde->bte', y, attention['out']['kernel'])
    y = norm(x, p['post_self_attention_layer_norm']['scale'])
    gate, up = y @ mlp['wi_0']['kernel'], y @ mlp['wi_1']['kernel']
    return x + (jax.nn.silu(gate) * up) @ mlp['wo']['kernel']

  table, decoder = tree['token_embedder']['embedding'], tree['decoder']
  x = table[tokens]
  for i in range(config['base_num_decoder_layers']):
    x = layer(x, jax.tree.map(lambda a, i=i: a[:, i], decoder['layers']))
  x = norm(x, decoder['decoder_norm']['scale'])
  if not config['logits_via_embedding']:
    return x @ decoder['logits_dense']['kernel']
  logits = x @ table.T
  return logits / x.shape[-1] ** 0.5 if config['normalize_embedding_logits'] else logits


@pytest.mark.parametrize('more', [{}, {'tied': False, 'scan': True}])
def test_maxtext_computes_what_was_cut(more, tmp_path):
  """The hidden width too, with an epsilon that is too large to be neglected."""
  small = decoders.cut(*made(**more), X)
  path = tmp_path / 'small'
  maxtext.save(path, small.model, small.variables)
  assert {p.name for p in path.iterdir()} == {'0', 'maxtext.yml'}
  config = yaml.safe_load((path / 'maxtext.yml').read_text())
  assert config['base_emb_dim'] == 6 and config['base_num_decoder_layers'] == 2
  tree = restored(path / '0' / 'items')
  assert ('logits_dense' in tree['decoder']) == bool(more)
  attention = tree['decoder']['layers']['self_attention']
  heads, groups = config['base_num_query_heads'], config['base_num_kv_heads']
  assert attention['query']['kernel'].shape == (6, 2, heads, 4)
  assert attention['key']['kernel'].shape == (6, 2, groups, 4)
  assert attention['out']['kernel'].shape == (heads, 2, 4, 6)
  expected = small.model.apply(small.variables, X)['main']
  tree = jax.tree.map(jnp.asarray, tree)
  assert m.difference(expected, forward(tree, config, X)) <= 1e-5
  other = {**config, 'normalization_layer_epsilon': 0.05}
  assert m.difference(expected, forward(tree, other, X)) > 1e-3
  model, variables = maxtext.load(path)
  assert m.difference(expected, model.apply(variables, X)['main']) <= 1e-5


@pytest.mark.parametrize('tied', [True, False])
def test_whole_networks_come_back_to_the_bit(tied, tmp_path):
  model, variables = made(tied=tied, epsilon=1e-5)
  maxtext.save(tmp_path / 'whole', model, variables)
  text = (tmp_path / 'whole' / 'maxtext.yml').read_text()
  assert 'normalization_layer_epsilon: 1.0e-05\n' in text
  again, back = maxtext.load(tmp_path / 'whole')
  assert again == model
  jax.tree.map(np.testing.assert_array_equal, back, variables)
  assert all(isinstance(x, jax.Array) for x in jax.tree.leaves(back))


def test_a_student_comes_back_from_a_run_of_maxtext(tmp_path):
  """Whose checkpoints have the state of the optimizer, too."""
  model, variables = made()
  maxtext.save(tmp_path / 'small', model, variables)
  tree = restored(tmp_path / 'small' / '0' / 'items')
  trained = jax.tree.map(lambda x: x + 1, tree)
  state = {
    'params': {'params': trained},
    'opt_state': {'mu': tree, 'count': np.int32(3)},
    'step': np.int32(3),
  }
  items = tmp_path / 'run' / 'checkpoints' / '3' / 'items'
  with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as orbax:
    orbax.save(items.absolute(), args=ocp.args.PyTreeSave(state))
  _, back = maxtext.load(items, tmp_path / 'small' / 'maxtext.yml')
  before, after = paths_of(variables), paths_of(back)
  for path, x in before.items():
    moved = 0 if path.startswith('branches') else 2 if 'query' in path else 1
    np.testing.assert_allclose(after[path], x + moved, rtol=1e-6)


@pytest.mark.parametrize(
  ('more', 'message'),
  [
    (
      {'arch': {'layer1/mlp/gate': 5, 'layer1/mlp/up': 5}},
      'layer1/mlp/gate is 5, but layer0/mlp/gate is 6; MaxText has one size',
    ),
    (
      {'arch': {'layer1/mlp/branch': 0}},
      'layer1: its mlp is removed .* MaxText has no',
    ),
    ({'bias': True, 'window': 3}, "Llama, which lacks {'bias': True, 'window': 3}"),
  ],
)
def test_what_maxtext_has_not_is_refused(more, message, tmp_path):
  with pytest.raises(ValueError, match=message):
    maxtext.save(tmp_path / 'small', *made(**more))
  assert not [*tmp_path.iterdir()]


def test_what_cannot_be_read_is_said(tmp_path):
  path = tmp_path / 'small'
  model, variables = made()
  maxtext.save(path, model, variables)
  with pytest.raises(ValueError, match='small: expected nothing there'):
    maxtext.save(path, model, variables)
  config = path / 'maxtext.yml'
  text = config.read_text()
  for old, new, message in (
    ('head_dim: 4', 'head_dim: four', "maxtext.yml: head_dim: expected .*'four'"),
    ('head_dim: 4', '', 'maxtext.yml: head_dim: expected'),
    ('head_dim: 4', 'head_dim: 3', 'an even head_dim, got 2, 4 and 3'),
    ('"llama2"', '"gemma"', "decoder_block is 'gemma'; expected 'llama2'"),
    (text, '- 1', 'maxtext.yml'),
    (text, '{', 'maxtext.yml: expected YAML'),
    (
      'base_mlp_dim: 6',
      'base_mlp_dim: 5',
      r'items: decoder/layers/mlp/wi_0/kernel: expected \[12, 3, 5\], got \[12, 3, 6\]',
    ),
    (
      'logits_via_embedding: true',
      'logits_via_embedding: false',
      r'logits_dense/kernel: expected \[12, 20\], got no such array',
    ),
  ):
    config.write_text(text.replace(old, new))
    with pytest.raises(maxtext.CheckpointError, match=message):
      maxtext.load(path)
  config.write_text(text)
  with pytest.raises(maxtext.CheckpointError, match='no such folder'):
    maxtext.load(tmp_path / 'other', config)
  with pytest.raises(maxtext.CheckpointError, match='expected a checkpoint of orbax'):
    maxtext.load(tmp_path, config)
