"""The config.json of transformers for decoders: which fields of `Decoder` it states."""

from collections.abc import Mapping
from typing import Annotated, Any

from depthprune.models.arch import nearest
from depthprune.models.decoder import Decoder
from depthprune.storage import files
from depthprune.storage.files import CheckpointError

# The class of transformers for every model_type, and the fields that it stands for.
CLASSES = {
  'llama': 'LlamaForCausalLM',
  'mistral': 'MistralForCausalLM',
  'qwen2': 'Qwen2ForCausalLM',
  'qwen3': 'Qwen3ForCausalLM',
  'gemma': 'GemmaForCausalLM',
}
PLAIN = {
  'activation': 'silu', 'bias': False, 'query_norm': False, 'offset': 0.0,
  'scaled': False,
}  # fmt: skip
OPTIONS: dict[str, dict[str, Any]] = {
  'llama': PLAIN,
  'mistral': PLAIN,
  'qwen2': {**PLAIN, 'bias': True},
  'qwen3': {**PLAIN, 'query_norm': True},
  'gemma': {**PLAIN, 'activation': 'gelu', 'offset': 1.0, 'scaled': True},
}
ACTIVATIONS = {'silu': 'silu', 'gelu': 'gelu_pytorch_tanh'}
SIZES = {
  'vocab': 'vocab_size', 'positions': 'max_position_embeddings', 'width': 'hidden_size',
  'depth': 'num_hidden_layers', 'heads': 'num_attention_heads',
  'inner': 'intermediate_size',
}  # fmt: skip
# What `Decoder` does not compute, with the values that switch it off.
OFF = {
  'attention_bias': False, 'mlp_bias': False, 'rope_scaling': None,
  'use_sliding_window': False, 'quantization_config': None,
}  # fmt: skip
MOST = 2**24  # of anything
Count = Annotated[int, files.Rule('a number from 1', range(1, MOST).__contains__)]
Positive = Annotated[float, files.Rule('a number above 0', lambda value: value > 0)]


def fields(config: Mapping[str, Any], where: str) -> dict[str, Any]:
  """Returns the fields of the Decoder that a config.json describes.

  Args:
    config: its content.
    where: the path of the file, for errors.

  Raises:
    CheckpointError: an architecture that `Decoder` does not compute, or an entry that
      is missing or of another type.
  """
  kind = config.get('model_type')
  if kind not in CLASSES:
    raise CheckpointError(
      f'{where}: model_type is {kind!r:.80}; expected one of {", ".join(CLASSES)}. '
      f'{nearest(str(kind), CLASSES)}'
    )

  def entry(key: str, of: Any, default: Any = None) -> Any:
    value = config.get(key, default)
    value = default if value is None else value
    return files.checked(value, of, f'{where}: {key}', CheckpointError)

  rope = entry('rope_parameters', dict[str, Any], {})  # as transformers 5 writes it
  off = {**OFF, 'hidden_act': ACTIVATIONS[OPTIONS[kind]['activation']]}
  computed = [(key, config.get(key, value), value) for key, value in off.items()]
  computed.append(('rope_type', rope.get('rope_type', 'default'), 'default'))
  for layer in entry('layer_types', list[str], []):
    computed.append(('layer_types', layer, 'full_attention'))
  for key, value, only in computed:
    if value != only:
      raise CheckpointError(
        f'{where}: {key} is {value!r:.80}; models.decoder computes {only!r} only'
      )
  sizes = {field: entry(key, Count) for field, key in SIZES.items()}
  heads = sizes['heads']
  own = {'llama': heads}.get(kind)  # older files of Llama leave it out
  fixed = kind in ('qwen3', 'gemma')  # whose default is no quotient
  size = None if fixed or sizes['width'] % heads else sizes['width'] // heads
  return {
    **sizes,
    **OPTIONS[kind],
    'groups': entry('num_key_value_heads', Count, own),
    'size': entry('head_dim', Count, size),
    'theta': float(entry('rope_theta', Positive, rope.get('rope_theta', 10_000.0))),
    'epsilon': float(entry('rms_norm_eps', Positive)),
    'tied': entry('tie_word_embeddings', bool, kind == 'gemma'),
    'window': entry('sliding_window', int, 0) if kind == 'mistral' else 0,
  }


def describe(model: Decoder) -> dict[str, Any]:
  """Returns the config.json of a Decoder whose `arch` is empty.

  Raises:
    ValueError: no architecture of transformers has its options together.
  """
  options = {name: getattr(model, name) for name in PLAIN}
  kinds = [kind for kind, value in OPTIONS.items() if value == options]
  if model.window and 'mistral' in kinds:
    kinds = ['mistral']
  if not kinds or (model.window and kinds != ['mistral']):
    chosen = {k: v for k, v in options.items() if v != PLAIN[k]}
    raise ValueError(
      f'no architecture of transformers has {chosen | {"window": model.window}} '
      f'together; expected the options of {", ".join(CLASSES)}'
    )
  kind = kinds[0]
  return {
    'architectures': [CLASSES[kind]],
    'model_type': kind,
    **{key: getattr(model, field) for field, key in SIZES.items()},
    'num_key_value_heads': model.groups,
    'head_dim': model.size,
    'rope_theta': model.theta,
    'rms_norm_eps': model.epsilon,
    'tie_word_embeddings': model.tied,
    'hidden_act': ACTIVATIONS[model.activation],
    **({'sliding_window': model.window} if model.window else {}),
    'torch_dtype': 'float32',
  }
