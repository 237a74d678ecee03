"""Decoders for transformers: cut, written and read again they compute the same."""

import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from depthprune.exports import huggingface
from depthprune.models import pretrained
from depthprune.models.decoder import Decoder
from tests import masking as m
from tests import zoo
from tests.exports import decoders

TINY = {
  'vocab': 20, 'positions': 12, 'width': 12, 'depth': 3, 'inner': 6, 'heads': 4,
  'groups': 2, 'size': 4, 'epsilon': 0.05,
}  # fmt: skip
KINDS = {
  'llama': {},
  'mistral': {'window': 4, 'tied': False},
  'qwen2': {'bias': True},
  'qwen3': {'query_norm': True, 'tied': False},
  'gemma': {'offset': 1.0, 'scaled': True, 'activation': 'gelu'},
  'gemma untied': {
    'offset': 1.0, 'scaled': True, 'activation': 'gelu', 'tied': False
  },
}  # fmt: skip
LATER = [
  pytest.param(kind, marks=pytest.mark.slow)
  for kind in ('mistral', 'qwen2', 'gemma untied')
]
X = zoo.tokens(2)
run = lambda model, variables: m.quick(model.apply)(variables, X)['main']


def cut(fields, **more):
  model = Decoder(**TINY, **fields, **more)
  shapes = jax.eval_shape(model.init, jax.random.key(0), X)
  return decoders.cut(model, zoo.randomised(shapes), X)


@pytest.mark.parametrize('kind', ['llama', 'qwen3', 'gemma', *LATER])
def test_what_is_written_computes_what_was_cut(kind, tmp_path):
  """The hidden width too, with an epsilon that is too large to be neglected."""
  small = cut(KINDS[kind])
  assert small.arch['embed'] == 6
  path = tmp_path / 'small'
  huggingface.save(path, small.model, small.variables, {'eos_token_id': 2})
  assert {p.name for p in path.iterdir()} == {'config.json', 'model.safetensors'}
  config = json.loads((path / 'config.json').read_text())
  assert config['model_type'] == kind.split()[0] and config['eos_token_id'] == 2
  assert config['hidden_size'] == 6 and config['num_hidden_layers'] == 2
  again = pretrained.decoder(path)
  assert again.arch == {} and again.epsilon == pytest.approx(0.1)
  expected = run(small.model, small.variables)
  assert m.difference(expected, run(again, pretrained.load(path, again))) <= 1e-5


def test_an_epsilon_and_scales_that_stay_would_be_wrong(tmp_path):
  """What the factors of the hidden width are for."""
  small = cut({})
  huggingface.save(tmp_path / 'small', small.model, small.variables)
  again = pretrained.decoder(tmp_path / 'small')
  variables = pretrained.load(tmp_path / 'small', again)
  expected = run(small.model, small.variables)
  other = again.clone(epsilon=small.model.epsilon)
  assert m.difference(expected, run(other, variables)) > 1e-3
  scale = lambda variables: variables['params']['layer0']['mlp']['norm']['scale']
  np.testing.assert_allclose(scale(variables), 2**0.5 * scale(small.variables), 1e-6)


def test_stacks_and_full_networks_are_written_too(tmp_path):
  small = cut({}, scan=True)
  huggingface.save(tmp_path / 'small', small.model, small.variables)
  again = pretrained.decoder(tmp_path / 'small')
  got = run(again, pretrained.load(tmp_path / 'small', again))
  assert m.difference(run(small.model, small.variables), got) <= 1e-5
  model = Decoder(**TINY)
  variables = zoo.randomised(jax.eval_shape(model.init, jax.random.key(0), X))
  variables['branches'] = jax.tree.map(jnp.ones_like, variables['branches'])
  huggingface.save(tmp_path / 'full', model, variables)
  assert pretrained.decoder(tmp_path / 'full') == model
  back = pretrained.load(tmp_path / 'full', model)
  jax.tree.map(np.testing.assert_array_equal, back, variables)


ARCHS = {
  'one width': (
    {'layer1/mlp/gate': 5, 'layer1/mlp/up': 5},
    'layer1/mlp/gate is 5, but layer0/mlp/gate is 6; .* one size for all layers',
  ),
  'one group': (
    {'layer2/attention/query:1': 1},
    'layer2/attention/query:1 is 1, but layer0/attention/query:1 is 2',
  ),
  'values': (
    {f'layer{i}/attention/value': 3 for i in range(3)},
    'layer0/attention/value is 3, and keys are 4 wide',
  ),
  'half a layer': (
    {'layer1/mlp/branch': 0},
    'layer1: its mlp is removed and',
  ),
  'no layer': (
    {f'layer{i}/{part}/branch': 0 for i in range(3) for part in ('attention', 'mlp')},
    'no layer is left',
  ),
}


@pytest.mark.parametrize('case', ARCHS)
def test_shapes_that_transformers_has_not_are_refused(case, tmp_path):
  arch, message = ARCHS[case]
  model = Decoder(**TINY, arch=arch)
  variables = zoo.randomised(jax.eval_shape(model.init, jax.random.key(0), X))
  with pytest.raises(ValueError, match=message):
    huggingface.save(tmp_path / 'small', model, variables)
  assert not [*tmp_path.iterdir()]


def test_what_else_cannot_be_written_is_refused(tmp_path):
  model = Decoder(**TINY)
  variables = zoo.randomised(jax.eval_shape(model.init, jax.random.key(0), X))
  path = tmp_path / 'small'
  with pytest.raises(ValueError, match='branch: expected 1; prune multiplies it into'):
    huggingface.save(path, model, variables)
  params = {'params': variables['params']}
  with pytest.raises(ValueError, match=r'norm/scale: expected shape \(12,\), got none'):
    gone = {k: v for k, v in params['params'].items() if k != 'norm'}
    huggingface.save(path, model, {'params': gone})
  with pytest.raises(ValueError, match="no architecture .* {'bias': True, 'que"):
    odd = model.clone(bias=True, query_norm=True)
    huggingface.save(path, odd, odd.init(jax.random.key(0), X))
  assert not [*tmp_path.iterdir()]
  huggingface.save(path, model, params)
  with pytest.raises(ValueError, match='small: expected nothing there'):
    huggingface.save(path, model, params)


OPEN = """
import json, sys, torch
from transformers import AutoModelForCausalLM
found = {}
for folder in sys.argv[2:]:
  model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation='eager')
  with torch.no_grad():
    found[folder] = model.eval()(torch.tensor(json.loads(sys.argv[1]))).logits.tolist()
print(json.dumps(found))
"""


@pytest.mark.slow
def test_transformers_opens_what_is_written(tmp_path, packages):
  """All kinds at once, in a process of its own that sees torch and transformers."""
  networks = {str(tmp_path / kind): cut(fields) for kind, fields in KINDS.items()}
  for path, small in networks.items():
    huggingface.save(path, small.model, small.variables)
  folders = map(str, (packages('transformers'), packages('torch')))
  done = subprocess.run(
    [sys.executable, '-c', OPEN, json.dumps(X.tolist()), *networks],
    env={**os.environ, 'PYTHONPATH': os.pathsep.join(folders)},
    capture_output=True,
    text=True,
  )
  assert done.returncode == 0, done.stderr[-3000:]
  found = json.loads(done.stdout.splitlines()[-1])
  for path, small in networks.items():
    expected = run(small.model, small.variables)
    np.testing.assert_allclose(found[path], expected, rtol=0, atol=1e-4)
