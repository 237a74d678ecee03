"""Public architectures, tiny and with random weights, cut and used as trunks.

`python -m tests.zoo.public NAME` prints as JSON what was seen. The libraries are no
dependencies: tests/surgery/test_prune_public.py installs them into a folder of its own.
"""

import json
import sys
from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import unflatten_dict

import depthprune as dp
from depthprune.program.modules import runnable
from depthprune.surgery.verify import randomised
from tests import masking as m

TOKENS = np.arange(14).reshape(2, 7) * 5 % 31 + 2
START = {'decoder_input_ids': TOKENS[:, :4]}
DRAW = np.random.default_rng(0)
IMAGES = DRAW.normal(size=(2, 3, 16, 16)).astype(np.float32)  # channels first
NHWC = np.moveaxis(IMAGES, 1, -1)
MEL = DRAW.normal(size=(2, 8, 20)).astype(np.float32)
WAVE = DRAW.normal(size=(2, 400)).astype(np.float32)


class Public(NamedTuple):
  """A network of a library, and what is known about it.

  Attributes:
    build: () -> (model, variables).
    inputs: an example.
    units: names of its residual units; those with {} are in both of its blocks.
    call: further arguments of the call.
    cut: a group that is cut for certain.
    kind: type of the small module that comes back, '' where the sizes are in the code.
    exclude: what is left whole.
  """

  build: Callable[[], tuple]
  inputs: tuple
  units: tuple[str, ...] = ()
  call: Mapping[str, Any] = {}
  cut: str = ''
  kind: str = ''
  exclude: tuple[str, ...] = ()


# ---- transformers --------------------------------------------------------------------

SMALL = {
  'vocab_size': 40, 'hidden_size': 16, 'num_hidden_layers': 2,
  'num_attention_heads': 4, 'intermediate_size': 24, 'max_position_embeddings': 32,
}  # fmt: skip
GPT = {
  'vocab_size': 40, 'n_embd': 16, 'n_layer': 2, 'n_head': 4, 'n_inner': 24,
  'n_positions': 16,
}  # fmt: skip
BART = {
  'vocab_size': 40, 'd_model': 16, 'encoder_layers': 2, 'decoder_layers': 2,
  'encoder_attention_heads': 4, 'decoder_attention_heads': 4, 'encoder_ffn_dim': 24,
  'decoder_ffn_dim': 24, 'pad_token_id': 1, 'decoder_start_token_id': 2,
}  # fmt: skip
T5 = {
  'vocab_size': 40, 'd_model': 16, 'd_kv': 4, 'd_ff': 24, 'num_layers': 2,
  'num_heads': 4, 'decoder_start_token_id': 0, 'feed_forward_proj': 'gated-gelu',
}  # fmt: skip
VIT = {**SMALL, 'image_size': 16, 'patch_size': 8, 'mlp_ratio': 2}
GROUPED = {'num_key_value_heads': 2, 'head_dim': 4}
WHISPER = {
  **BART, 'num_mel_bins': 8, 'max_source_positions': 10, 'max_target_positions': 16,
  'bos_token_id': 2, 'eos_token_id': 3, 'begin_suppress_tokens': None,
}  # fmt: skip
WAV2VEC2 = {
  **SMALL, 'conv_dim': (8, 8, 8), 'conv_kernel': (10, 3, 3), 'conv_stride': (5, 2, 2),
  'num_feat_extract_layers': 3, 'num_conv_pos_embeddings': 4, 'mask_time_prob': 0.0,
  'num_conv_pos_embedding_groups': 2, 'do_stable_layer_norm': True,
  'feat_extract_norm': 'layer',
}  # fmt: skip


def hf(kind: str, task: str, *, shape: tuple = (), **sizes: Any) -> Callable:
  """A Flax model of transformers, Flax`kind``task`, of a small configuration."""

  def build():
    library: Any = import_module('transformers')
    config = getattr(library, f'{kind}Config')(**sizes)
    where = {'input_shape': shape} if shape else {}
    model = getattr(library, f'Flax{kind}{task}')(config, seed=0, **where)
    return model, model.params

  return build


def t5():
  """As a function that returns logits alone, so that no width is that of an output."""
  clip = jnp.clip  # transformers knows its arguments by the names of older versions
  jnp.clip = lambda x, lower=None, upper=None, *, a_max=None: clip(
    x, lower, upper if a_max is None else a_max
  )
  model, params = hf('T5', 'ForConditionalGeneration', **T5)()
  call = lambda params, *inputs, **kwargs: (
    model(*inputs, params=params, **kwargs).logits
  )
  return call, params


CLASSIFIER, CAUSAL = 'ForSequenceClassification', 'ForCausalLM'
SEQ2SEQ, IMAGE = 'ForConditionalGeneration', 'ForImageClassification'


def blocks(path: str, *units: str) -> tuple[str, ...]:
  """Units inside of every block, '' for one that has the block's own name."""
  return tuple('/'.join(filter(None, (path, unit))) for unit in units)


ENCODER_DECODER = (
  *blocks('model/encoder/layers/{}', 'self_attn', ''),
  *blocks('model/decoder/layers/{}', 'self_attn', 'encoder_attn', ''),
)
LLAMA = blocks('model/layers/{}', 'self_attn', 'mlp')
EMBEDDING = 'model/embed_tokens/embedding:1'

TRANSFORMERS = {
  'bert': Public(
    hf('Bert', CLASSIFIER, **SMALL), (TOKENS,),
    blocks('bert/encoder/layer/{}', 'attention', ''),
    {'attention_mask': (TOKENS < 30).astype(np.int32)},
  ),
  'roberta': Public(
    hf('Roberta', CLASSIFIER, **SMALL), (TOKENS,),
    blocks('roberta/encoder/layer/{}', 'attention', ''),
  ),
  'distilbert': Public(
    hf('DistilBert', CLASSIFIER, vocab_size=40, dim=16, n_layers=2, n_heads=4,
       hidden_dim=24), (TOKENS,),
    blocks('distilbert/transformer/layer/{}', 'attention', 'ffn'),
  ),
  'albert': Public(
    hf('Albert', CLASSIFIER, **SMALL, embedding_size=8), (TOKENS,),
    tuple(f'albert/encoder/albert_layer_groups/0/albert_layers/0{unit}'
          for unit in ('/attention', '', '/attention:1', ':1')),
  ),
  'roformer': Public(
    hf('RoFormer', CLASSIFIER, **SMALL), (TOKENS,),
    blocks('roformer/encoder/layer/{}', 'attention', ''),
  ),
  'bigbird': Public(
    hf('BigBird', CLASSIFIER, **SMALL, attention_type='original_full'), (TOKENS,),
    blocks('bert/encoder/layer/{}', 'attention', ''),
  ),
  'gpt2': Public(
    hf('GPT2', 'LMHeadModel', **GPT), (TOKENS,),
    blocks('transformer/h/{}', 'attn', 'mlp'),
  ),
  'gptj': Public(
    hf('GPTJ', CAUSAL, **GPT, rotary_dim=4), (TOKENS,), blocks('transformer/h/{}', ''),
  ),
  'opt': Public(
    hf('OPT', CAUSAL, **SMALL, ffn_dim=24, word_embed_proj_dim=16), (TOKENS,),
    blocks('model/decoder/layers/{}', 'self_attn', ''),
  ),
  'bloom': Public(
    hf('Bloom', CAUSAL, vocab_size=40, hidden_size=16, n_layer=2, n_head=4), (TOKENS,),
    blocks('transformer/h/{}', 'self_attention', 'mlp'),
  ),
  'llama': Public(
    hf('Llama', CAUSAL, **SMALL, num_key_value_heads=2), (TOKENS,), LLAMA,
    cut=EMBEDDING,
  ),
  'mistral': Public(
    hf('Mistral', CAUSAL, **SMALL, **GROUPED), (TOKENS,), LLAMA, cut=EMBEDDING,
  ),
  'gemma': Public(
    hf('Gemma', CAUSAL, **SMALL, **GROUPED), (TOKENS,), LLAMA, cut=EMBEDDING,
  ),
  't5': Public(
    t5, (TOKENS,),
    (*blocks('encoder/block/{}/layer', '0/SelfAttention', '1/DenseReluDense'),
     *blocks('decoder/block/{}/layer', '0/SelfAttention', '1/EncDecAttention',
             '2/DenseReluDense')),
    START, cut='shared/embedding:1',
  ),
  'bart': Public(hf('Bart', SEQ2SEQ, **BART), (TOKENS,), ENCODER_DECODER, START),
  'pegasus': Public(hf('Pegasus', SEQ2SEQ, **BART), (TOKENS,), ENCODER_DECODER, START),
  'whisper': Public(
    hf('Whisper', SEQ2SEQ, shape=(1, 8, 20), **WHISPER), (MEL, TOKENS[:, :4]),
    ENCODER_DECODER,
  ),
  'wav2vec2': Public(
    hf('Wav2Vec2', 'ForCTC', shape=(1, 400), **WAV2VEC2), (WAVE,),
    ('wav2vec2/encoder/pos_conv_embed/conv',
     *blocks('wav2vec2/encoder/layers/{}', 'attention', 'feed_forward')),
  ),
  'vit': Public(
    hf('ViT', IMAGE, **VIT), (IMAGES,), blocks('vit/encoder/layer/{}', 'attention', ''),
  ),
  'beit': Public(
    hf('Beit', IMAGE, **VIT), (IMAGES,),
    blocks('beit/encoder/layer/{}', 'attention', ''),
  ),
  'dinov2': Public(
    hf('Dinov2', IMAGE, **VIT), (IMAGES,),
    blocks('dinov2/encoder/layer/{}', 'attention', 'mlp'),
  ),
  'clip_vision': Public(
    hf('CLIPVision', 'Model', **VIT), (IMAGES,),
    blocks('vision_model/encoder/layers/{}', 'self_attn', 'mlp'),
  ),
  'clip_text': Public(
    hf('CLIPText', 'Model', **SMALL, eos_token_id=39), (TOKENS,),
    blocks('text_model/encoder/layers/{}', 'self_attn', 'mlp'),
  ),
  'resnet': Public(
    hf('ResNet', IMAGE, embedding_size=8, hidden_sizes=[8, 12], depths=[1, 2],
       layer_type='basic'), (IMAGES,),
    tuple(f'resnet/encoder/stages/{i}/layers/{i}/layer' for i in range(2)),
  ),
  'regnet': Public(
    hf('RegNet', IMAGE, embedding_size=8, hidden_sizes=[8, 16], depths=[1, 2],
       groups_width=4), (IMAGES,),
    ('regnet/encoder/stages/1/layers/1/layer',),
  ),
}  # fmt: skip


# ---- haiku ---------------------------------------------------------------------------


def haiku(network: Callable, example: Any) -> Callable:
  """A transform of network(haiku)(example); one with `train=` also has a state."""

  def build():
    hk: Any = import_module('haiku')
    call = network(hk)
    stateful = call.__code__.co_argcount > 1
    transform = hk.transform_with_state if stateful else hk.transform
    model = hk.without_apply_rng(transform(call))
    mode = {'train': True} if stateful else {}
    out = model.init(jax.random.key(0), example, **mode)
    variables = dict(zip(('params', 'state'), out)) if stateful else out
    return model, randomised(variables)  # some scales are 0 at first

  return build


def hk_mobilenet(hk):
  return lambda x, train=False: hk.nets.MobileNetV1((1, 2), (8, 12), 5)(x, train)


def hk_resnet(hk):
  sizes: Any = {'bottleneck': True, 'channels_per_group': (8, 8, 12, 12)}
  sizes |= {'strides': (1, 2, 1, 1)}
  return lambda x, train=False: hk.nets.ResNet([1, 1, 1, 2], 5, **sizes)(x, train)


def hk_vqvae(hk):
  def call(x):
    x = hk.Conv2D(8, 3)(jax.nn.relu(hk.Conv2D(12, 3, stride=2)(x)))
    x = hk.nets.VectorQuantizer(8, 10, 0.25)(x, is_training=False)['quantize']
    return hk.Conv2D(3, 3)(jax.nn.relu(hk.Conv2DTranspose(12, 3, stride=2)(x)))

  return call


def hk_transformer(hk):
  def call(tokens):
    norm = lambda x: hk.LayerNorm(-1, True, True)(x)
    scale = hk.initializers.VarianceScaling(1.0)
    x = hk.Embed(40, 16)(tokens)
    for _ in range(2):
      y = norm(x)
      x = x + hk.MultiHeadAttention(4, 4, w_init=scale, model_size=16)(y, y, y)
      x = x + hk.nets.MLP([24, 16])(norm(x))
    return hk.Linear(5)(x.mean(1))

  return call


HAIKU = {
  'hk_mobilenet': Public(haiku(hk_mobilenet, NHWC), (NHWC,)),
  'hk_resnet': Public(
    haiku(hk_resnet, NHWC), (NHWC,), ('res_net/block_group_3/block_1',)
  ),
  'hk_vqvae': Public(haiku(hk_vqvae, NHWC), (NHWC,)),
  'hk_transformer': Public(
    haiku(hk_transformer, TOKENS), (TOKENS,),
    ('multi_head_attention', 'mlp', 'multi_head_attention_1', 'mlp_1'),
  ),
}  # fmt: skip


# ---- equinox -------------------------------------------------------------------------


def equinox(network: Callable) -> Callable:
  """The module network(equinox, keys)."""

  def build():
    eqx: Any = import_module('equinox')
    model = network(eqx, jax.random.split(jax.random.key(0), 8))
    return model, eqx.filter(model, eqx.is_array)

  return build


def eqx_conv(eqx, keys):
  nn = eqx.nn
  first, second = nn.Conv2d(3, 8, 3, key=keys[0]), nn.Conv2d(8, 12, 3, key=keys[1])
  act, last = nn.Lambda(jax.nn.relu), nn.Linear(12, 5, key=keys[2])
  flat = (nn.AdaptiveAvgPool2d(1), nn.Lambda(jnp.ravel))
  return nn.Sequential([first, act, nn.GroupNorm(2, 8), second, act, *flat, last])


def eqx_vit(eqx, keys):
  class Block(eqx.Module):
    norms: list
    attention: Any
    mlp: Any

    def __init__(self, key):
      self.norms = [eqx.nn.LayerNorm(16), eqx.nn.LayerNorm(16)]
      self.attention = eqx.nn.MultiheadAttention(4, 16, key=key)
      self.mlp = eqx.nn.MLP(16, 16, 24, 1, jax.nn.gelu, key=key)

    def __call__(self, x):
      y = jax.vmap(self.norms[0])(x)
      x = x + self.attention(y, y, y)
      return x + jax.vmap(self.mlp)(jax.vmap(self.norms[1])(x))

  class ViT(eqx.Module):
    patch: Any
    blocks: list
    head: Any

    def __init__(self):
      self.patch = eqx.nn.Conv2d(3, 16, 4, 4, key=keys[0])
      self.blocks = [Block(key) for key in keys[1:3]]
      self.head = eqx.nn.Linear(16, 5, key=keys[3])

    def __call__(self, x):
      x = self.patch(x).reshape(16, -1).T
      for block in self.blocks:
        x = block(x)
      return self.head(x.mean(0))

  return ViT()


EQX_VIT = equinox(eqx_vit), (IMAGES[0],)
UNITS = blocks('blocks/{}', 'attention', 'mlp/layers')

EQUINOX = {
  'eqx_mlp': Public(
    equinox(lambda eqx, keys: eqx.nn.MLP(12, 5, 24, 2, key=keys[0])), (MEL[0, 0, :12],),
    kind='MLP',
  ),
  'eqx_conv': Public(equinox(eqx_conv), (IMAGES[0],), kind='Sequential'),
  'eqx_vit': Public(*EQX_VIT, UNITS),
  'eqx_vit_mlps': Public(*EQX_VIT, UNITS, exclude=('*attention*',), kind='ViT'),
}  # fmt: skip

NETWORKS = {**TRANSFORMERS, **HAIKU, **EQUINOX}


# ---- what is seen --------------------------------------------------------------------


def cut(public: Public, model: Any, variables: Any) -> dict:
  """Cuts a network to 60 % of its FLOPs and compares it with zeros in their place."""
  inputs, call = public.inputs, public.call
  coupling = dp.couple(model, variables, *inputs, **call)
  target = 0.85 if public.exclude else 0.6
  keep = dp.oneshot(coupling, variables, target, exclude=public.exclude)
  pruned = dp.prune(model, variables, keep, inputs, coupling=coupling, **call)
  zeroed = m.zeroed(coupling, variables, pruned.keep)
  of = lambda run: lambda v: run(v, *inputs, **call)
  with jax.default_matmul_precision('highest'):
    expected = m.quick(of(runnable(model)))(zeroed)
    got = m.quick(of(pruned.apply))(pruned.variables)
    own = got if pruned.model is None else pruned.model(*inputs, **call)
  flops, groups = pruned.report['flops'], pruned.report['widths']
  return {
    'difference': m.difference(expected, got),
    'verify': pruned.report['verify'],
    'flops': flops['after'] / flops['before'],
    'cut': [group for group, (before, after) in groups.items() if after < before],
    'kind': '' if pruned.model is None else type(pruned.model).__name__,
    'own': m.difference(got, own),
  }


def erase(public: Public, model: Any, variables: Any) -> dict:
  """Makes a trunk of a network, and erases its last residual unit."""
  inputs = (*public.inputs, *public.call.values())
  trunk = dp.trunk(model, variables, *public.inputs, output=logits, **public.call)

  def answer(trunk, branches=None):
    v = trunk.init(jax.random.key(0), *inputs)
    size = sum(x.size for x in jax.tree.leaves(v['params']))
    gates = {} if branches is None else {'branches': branches}
    return size, m.quick(lambda v: trunk.apply(v, *inputs)['main'])({**v, **gates})

  size, full = answer(trunk)
  own = m.quick(lambda v: runnable(model)(v, *public.inputs, **public.call))(variables)
  seen = {'units': trunk.units, 'main': m.difference(logits(own), full)}
  if not trunk.units:
    return seen
  unit = trunk.units[-1]
  gates = {f'{name}/branch': jnp.float32(name != unit) for name in trunk.units}
  _, masked = answer(trunk, unflatten_dict(gates, sep='/'))
  left, small = answer(trunk.clone(arch={f'{unit}/branch': 0}))
  return seen | {
    'erased': m.difference(masked, small),
    'moved': m.difference(full, masked),
    'params': left / size,
  }


def logits(out: Any) -> Any:
  """The logits, or the pooled features of a network that has none."""
  names = getattr(out, 'keys', list)()
  name = next((name for name in ('logits', 'pooler_output') if name in names), None)
  return out if name is None else out[name]


if __name__ == '__main__':
  network = NETWORKS[sys.argv[1]]
  built = network.build()
  print(json.dumps({'cut': cut(network, *built), 'trunk': erase(network, *built)}))
