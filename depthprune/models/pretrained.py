"""Pretrained networks from torch, read strictly into models of this package.

Files are .npz, .safetensors or .gguf. Every tensor of the file must be used and every
array of the model filled, in its shape; otherwise the error lists what does not fit.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from math import prod
from pathlib import Path
from typing import Annotated, Any, NamedTuple, TypedDict

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy

from depthprune.models import decoder_config, llamacpp
from depthprune.models.bert import BERT
from depthprune.models.decoder import Decoder
from depthprune.models.resnet import IMAGENET, ResNet
from depthprune.models.stages import STACK
from depthprune.storage import files
from depthprune.storage.files import CheckpointError

Shapes = Mapping[str, tuple[int, ...]]  # shapes of a model's leaves, by path
Tensors = Mapping[str, np.ndarray]  # the content of a file
# Mean, standard deviation and scale of the images of torchvision's ImageNet networks.
TORCHVISION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), 255.0
HEADS = range(1, 4097)  # of an attention
INDEX = '.safetensors.index.json'
SHOWN = 8  # names of each kind in an error


def load(
  path: str | Path, model: nn.Module, image: tuple[int, ...] = (32, 32, 3)
) -> dict[str, Any]:
  """Reads the variables of a ResNet, a BERT or a Decoder from a file of torch tensors.

  A few tensors are ignored: '*.num_batches_tracked' for a ResNet; for a BERT
  'embeddings.position_ids', which counts, and 'cls.*', the heads of pretraining; for a
  Decoder the wavelengths '*.rotary_emb.inv_freq', which its fields say. If the file of
  a BERT has no 'classifier.*', its head is initialised with jax.random.key(0). What the
  tensors do not say, such as the number of heads of an attention, is compared with the
  config.json beside the file, if there is one::

    model = pretrained.decoder('SmolLM2-135M/')
    variables = pretrained.load('SmolLM2-135M/', model)

  Args:
    path: a .npz or .safetensors file, with torchvision's, akamaster's or transformers'
      names of tensors; for a Decoder also a .gguf file, the index
      'model.safetensors.index.json' of a split file, or the folder of either.
    model: a ResNet with preact=False, a BERT, or a Decoder. Layers are stacked for a
      scanned one.
    image: height, width and channels of one input; unused for texts.

  Returns:
    The variables, float32. All branch gates are 1.

  Raises:
    ValueError: another kind of model; a file that cannot be read; or one that does not
      fit. The message lists unused tensors, unfilled arrays and differences in shape,
      and the fields in which the network of the file differs from the model.
  """
  naming = _family(model)
  ignored = re.compile(naming.ignored)
  path = _weights(path)
  tensors = {k: v for k, v in read(path).items() if not ignored.fullmatch(k)}
  tokens = isinstance(model, BERT | Decoder)
  example = jnp.zeros((1, 1), int) if tokens else jnp.zeros((1, *image))
  init = lambda: model.init(jax.random.key(0), example)
  leaves, tree = jax.tree.flatten_with_path(jax.eval_shape(init))
  shapes = {'/'.join(key.key for key in keys): leaf.shape for keys, leaf in leaves}
  slots = _assign(naming, shapes, tensors)
  stated = naming.stated(path)
  faults = _faults(tensors, slots)
  if faults or any(v != getattr(model, k) for k, v in stated.items()):
    differences = _differences(naming.fields(tensors) | stated, model)
    raise ValueError('\n  '.join((f'{path}: does not fit.', *differences, *faults)))
  parts: dict[str, list[np.ndarray]] = {}
  for name, slot in slots.items():  # several tensors are the layers of a stack
    parts.setdefault(slot.path, []).append(_transposed(tensors[name], slot))
  filled = {
    path: jnp.asarray(np.reshape(arrays, shapes[path]), jnp.float32)
    for path, arrays in parts.items()
  }
  gates = (path for path in shapes if path.startswith('branches/'))
  filled |= {path: jnp.ones(shapes[path]) for path in gates}
  if left := [i for i, k in enumerate(shapes) if k not in filled]:
    # Compiled for a head alone: the rest of `init` is dead code.
    drawn = jax.jit(lambda: [jax.tree.leaves(init())[i] for i in left])()
    filled |= zip([[*shapes][i] for i in left], drawn)
  return jax.tree.unflatten(tree, [filled[k] for k in shapes])


def read(path: str | Path) -> dict[str, np.ndarray]:
  """Reads the tensors of a .npz, .safetensors or .gguf file by name.

  It may also be the index, '*.safetensors.index.json', of a file that is split.

  Raises:
    ValueError: there is no such file, it has another suffix, or it is damaged; or a
      part of a split file is missing or holds other tensors than its index says.
  """
  path = Path(path)
  if path.name.endswith(INDEX):
    return _read_parts(path)
  if path.suffix not in ('.npz', '.safetensors', '.gguf'):
    raise ValueError(
      f'{path}: expected .npz, .safetensors or .gguf; what torch saved becomes the '
      'second by safetensors.torch.save_file(state_dict, path)'
    )
  if path.suffix == '.npz':
    return files.read_npz(path, CheckpointError)
  if path.suffix == '.gguf':
    return llamacpp.read(path)
  files.regular(path, CheckpointError)
  try:
    return safetensors.numpy.load_file(path)
  except (OSError, ValueError, KeyError, safetensors.SafetensorError) as error:
    raise CheckpointError(
      f'{path}: cannot be read as .safetensors ({error!s:.200}); get the file again'
    ) from error


def _read_parts(index: Path) -> dict[str, np.ndarray]:
  """Reads the tensors of all files that an index names."""
  content = files.read_json(index, dict[str, Any], CheckpointError)
  where = f'{index}: weight_map'
  placed = content.get('weight_map')
  placed = files.checked(placed, dict[str, str], where, CheckpointError)
  tensors: dict[str, np.ndarray] = {}
  for name in sorted({*placed.values()}):
    if Path(name).name != name or not name.endswith('.safetensors'):
      raise CheckpointError(f'{where}: {name!r:.80} is no .safetensors file beside it')
    part = read(index.with_name(name))
    here = {tensor for tensor, file in placed.items() if file == name}
    if odd := sorted(here ^ part.keys()):
      raise CheckpointError(
        f'{index.with_name(name)}: {len(odd)} tensors are there or in the index, but '
        f'not in both: {", ".join(odd[:SHOWN])}'
      )
    tensors |= part
  return tensors


def _weights(path: str | Path) -> Path:
  """Returns the file of weights in a folder as transformers writes it."""
  path = Path(path)
  if not path.is_dir():
    return path
  names = ('model.safetensors', f'model{INDEX}')
  found = [path / name for name in names if (path / name).exists()]
  if len(found) != 1:
    raise CheckpointError(
      f'{path}: expected one of {" and ".join(names)} in it, found {len(found)}'
    )
  return found[0]


def decoder(path: str | Path, **fields: Any) -> Decoder:
  """Returns the Decoder whose weights a file holds, as `load` needs it.

  Args:
    path: a .gguf file; or a folder with config.json, or a file beside it.
    **fields: further fields of the Decoder, such as dtype='bfloat16' or scan=True.

  Raises:
    CheckpointError: there is no config.json, or it describes another architecture.
  """
  path = Path(path)
  if path.suffix == '.gguf':
    config, where = llamacpp.config(path), path
  else:
    where = (path if path.is_dir() else path.parent) / 'config.json'
    config = files.read_json(where, dict[str, Any], CheckpointError)
  return Decoder(**decoder_config.fields(config, str(where)), **fields)


def normalisation(path: str | Path) -> tuple[tuple, tuple, float] | None:
  """Returns how the images were normalised that the network of a file was trained on.

  This is 'normalisation' in the .json file beside the file. If there is none, it is
  torchvision's for a ResNet with the 7×7 stem for ImageNet, and unknown for others.

  Args:
    path: a .npz or .safetensors file.

  Returns:
    (mean, std, scale), where images became (x / scale - mean) / std; None if unknown.

  Raises:
    ValueError: the entry is not {'mean': [...], 'std': [...], 'scale': 'x/255'}, or the
      file cannot be read.
  """
  beside = Path(path).with_suffix('.json')
  if (entry := _beside(beside).get('normalisation')) is None:
    stem = read(path).get('conv1.weight')
    imagenet = stem is not None and stem.shape[2:] == (7, 7)
    return TORCHVISION if imagenet else None
  where = f'{beside}: normalisation'
  stated = files.checked(entry, StatedNormalisation, where, CheckpointError)
  mean, std = tuple(map(float, stated['mean'])), tuple(map(float, stated['std']))
  if len(mean) != len(std):
    raise CheckpointError(f'{where}: expected as many mean as std, got {entry!r:.200}')
  return mean, std, float(stated['scale'].removeprefix('x/'))


def _is_scale(scale: str) -> bool:
  return re.fullmatch(r'(x/)?\d{1,9}(\.\d{1,9})?', scale) is not None and (
    float(scale.removeprefix('x/')) > 0
  )


class StatedNormalisation(TypedDict):
  """How images were normalised, as it is stated beside a file of weights."""

  mean: list[float]
  std: list[Annotated[float, files.Rule('a number above 0', lambda value: value > 0)]]
  scale: Annotated[str, files.Rule("a scale such as 'x/255'", _is_scale)]


def _beside(path: Path) -> dict[str, Any]:
  """Reads a JSON file beside weights, which may be written by anyone; {} if none."""
  return files.read_json(path, dict[str, Any], CheckpointError) if path.exists() else {}


class Slot(NamedTuple):
  """The place of a tensor in a model."""

  path: str  # of the leaf that it fills, or fills one layer of
  shape: tuple[int, ...]  # with its axes in the order of this package
  table: bool = False  # its axes are in that order already


class Naming(NamedTuple):
  """How the files of one family name their tensors.

  Attributes:
    ignored: pattern of the names of tensors that are not read.
    slots: maps the shapes of a model's leaves to {tensor: its slot}, once for every
      naming in use; branch gates have no tensor.
    fields: infers fields of the model from the tensors.
    stated: reads fields of the model that are stated beside the file.
    head: start of the paths of leaves that a file may lack, all together; '' if none.
  """

  ignored: str
  slots: Callable[[Shapes], Iterable[dict[str, Slot]]]
  fields: Callable[[Tensors], dict[str, Any]]
  stated: Callable[[Path], dict[str, Any]] = lambda path: {}
  head: str = ''


def _family(model: nn.Module) -> Naming:
  if isinstance(model, ResNet) and not model.preact:
    return Naming(r'.*\.num_batches_tracked', _resnet_slots, _resnet_fields)
  if isinstance(model, BERT):
    ignored = r'(bert\.)?embeddings\.position_ids|cls\..*'
    return Naming(ignored, _bert_slots, _bert_fields, _bert_stated, 'params/head/')
  if isinstance(model, Decoder):
    ignored = r'.*\.rotary_emb\.inv_freq'
    return Naming(ignored, decoder_slots, _decoder_fields, _decoder_stated)
  raise ValueError(
    f'pretrained: {type(model).__name__} has no known naming of tensors; expected a '
    'BERT, a Decoder, or a ResNet with preact=False'
  )


def _assign(naming: Naming, shapes: Shapes, tensors: Tensors) -> dict[str, Slot]:
  """Returns the slot of every tensor, in the naming that most tensors have."""
  arrays = {k: v for k, v in shapes.items() if not k.startswith('branches/')}
  slots = max(naming.slots(arrays), key=lambda s: len(s.keys() & tensors.keys()))
  if not naming.head:
    return slots
  rest = {k: v for k, v in slots.items() if not v.path.startswith(naming.head)}
  return rest if (slots.keys() - rest.keys()).isdisjoint(tensors) else slots


def _transposed(tensor: np.ndarray, slot: Slot) -> np.ndarray:
  """OIHW becomes HWIO and [out, in] becomes [in, out]; vectors and tables are kept."""
  if slot.table:
    return tensor
  return tensor.transpose(2, 3, 1, 0) if tensor.ndim == 4 else tensor.T


def _replaced(name: str, pairs: Iterable[tuple[str, str]]) -> str:
  for old, new in pairs:
    name = name.replace(old, new)
  return name


# ---- ResNets -------------------------------------------------------------------------

# The name of the head goes with that of shortcuts: torchvision's, then akamaster's.
RESNET_HEADS = {'downsample': 'fc', 'shortcut': 'linear'}


def _resnet_slots(shapes: Shapes) -> Iterable[dict[str, Slot]]:
  for shortcut in RESNET_HEADS:
    slots = {}
    for path, shape in shapes.items():
      stacked = f'/{STACK}/' in path
      for layer in range(shape[0] if stacked else 1):
        name = _resnet_source(path, shortcut, layer)
        slots[name] = Slot(path, shape[stacked:])
    yield slots


def _resnet_source(path: str, shortcut: str, layer: int) -> str:
  """Returns the tensor that fills a leaf, or one layer of a leaf in a scanned stage.

  'params/stage2/block0/shortcut/conv/kernel' → 'layer2.0.downsample.0.weight'.
  """
  pairs = (
    ('stem/conv', 'conv1'),
    ('stem/norm', 'bn1'),
    ('shortcut/conv', f'{shortcut}/0'),
    ('shortcut/norm', f'{shortcut}/1'),
    ('stage', 'layer'),
    (STACK, f'{layer + 1}'),  # the first block of a stage is not in the stack
    ('block', ''),
    ('norm', 'bn'),
    ('head', RESNET_HEADS[shortcut]),
    ('kernel', 'weight'),
    ('scale', 'weight'),
    ('mean', 'running_mean'),
    ('var', 'running_var'),
    ('/', '.'),
  )
  return _replaced(path.split('/', 1)[1], pairs)


def _resnet_fields(tensors: Tensors) -> dict[str, Any]:
  units = {m.groups() for name in tensors if (m := re.match(r'layer(\d)\.(\d+)', name))}
  blocks = tuple(Counter(stage for stage, _ in sorted(units)).values())
  bottleneck = any('.conv3.' in name for name in tensors)
  projected = any(f'.{n}.' in name for n in RESNET_HEADS for name in tensors)
  depths = [d for d, n in IMAGENET.items() if n == blocks and (d >= 50) == bottleneck]
  if len(blocks) == 3 and len({*blocks}) == 1:
    depths = [(9 if bottleneck else 6) * blocks[0] + 2]
  sizes = {'conv1.weight': 'width'}
  sizes |= {f'{head}.bias': 'classes' for head in RESNET_HEADS.values()}
  return {
    **({'depth': depths[0]} if depths else {}),
    'imagenet': len(blocks) == 4,
    'bottleneck': bottleneck,
    'shortcut': 'B' if projected else 'A',
    **{sizes[n]: len(v) for n, v in tensors.items() if n in sizes and v.ndim},
  }


# ---- BERTs ---------------------------------------------------------------------------


def _bert_slots(shapes: Shapes) -> Iterable[dict[str, Slot]]:
  for prefix in ('', 'bert.'):
    for norm in (('weight', 'bias'), ('gamma', 'beta')):
      slots = {}
      for path, shape in shapes.items():
        stack = re.search(r'/layers(\d+)/', path)
        layers = shape[0] if stack else 1
        # Stacks have one length unless they are pruned, and then no file fits.
        first = int(stack[1]) * layers if stack else 0
        table = bool(re.search('/(word|position|type)/', path))
        slot = Slot(path, _bert_shape(path, shape[stack is not None :]), table)
        for layer in range(first, first + layers):
          slots[_bert_source(path, prefix, norm, layer)] = slot
      yield slots


def _bert_shape(path: str, shape: tuple[int, ...]) -> tuple[int, ...]:
  """Returns the shape of the tensor, where heads and their width are a single axis."""
  if path.endswith('/bias') and len(shape) > 1:
    return (prod(shape),)
  if len(shape) < 3:
    return shape
  inputs = shape[:-1] if path.endswith('/out/kernel') else shape[:1]
  return prod(inputs), prod(shape) // prod(inputs)


def _bert_source(path: str, prefix: str, norm: tuple[str, str], layer: int) -> str:
  """Returns the tensor that fills a leaf, or one layer of a leaf in a stack.

  'params/layer3/mlp/up/kernel' → 'encoder.layer.3.intermediate.dense.weight'.
  """
  _, module, leaf = path.rsplit('/', 2)
  name = re.sub(r'^params/layers\d+/', f'params/layer{layer}/', path)
  name = re.sub(r'layer(\d+)', r'encoder/layer/\1', name.split('/', 1)[1])
  pairs = (
    ('attention/out', 'attention/output/dense'),
    ('attention/', 'attention/self/'),
    ('self/output', 'output'),
    ('mlp/up', 'intermediate/dense'),
    ('mlp/down', 'output/dense'),
    ('norm1', 'attention/output/LayerNorm'),
    ('norm2', 'output/LayerNorm'),
    ('pooler', 'pooler/dense'),
  )
  top = {
    'norm': 'embeddings/LayerNorm',
    'word': 'embeddings/word_embeddings',
    'position': 'embeddings/position_embeddings',
    'type': 'embeddings/token_type_embeddings',
    'head': 'classifier',
  }
  start, _, rest = name.partition('/')
  name = f'{top[start]}/{rest}' if start in top else _replaced(name, pairs)
  kernel_bias = norm if module.startswith('norm') else ('weight', 'bias')
  name = f'{name.rsplit("/", 1)[0]}/{kernel_bias[leaf == "bias"]}'.replace('/', '.')
  return name if start == 'head' else prefix + name


def _bert_fields(tensors: Tensors) -> dict[str, Any]:
  layers = {m[1] for n in tensors if (m := re.search(r'encoder\.layer\.(\d+)\.', n))}
  sizes = {
    'word_embeddings.weight': ('vocab', 'width'),
    'position_embeddings.weight': ('positions',),
    'token_type_embeddings.weight': ('types',),
    'layer.0.intermediate.dense.weight': ('inner',),
    'classifier.weight': ('classes',),
  }
  fields = {
    field: size
    for end, names in sizes.items()
    for name, tensor in tensors.items()
    if name.endswith(end)
    for field, size in zip(names, tensor.shape)
  }
  return {**fields, 'depth': len(layers)}


def _bert_stated(path: Path) -> dict[str, Any]:
  """Reads the number of heads, which no tensor shows, from transformers' config.json.

  Raises:
    ValueError: it states something that our BERT does not compute.
  """
  beside = path.with_name('config.json')
  config = _beside(beside)
  computed = {
    'hidden_act': 'gelu', 'layer_norm_eps': 1e-12, 'position_embedding_type': 'absolute'
  }  # fmt: skip
  for key, value in computed.items():
    if config.get(key, value) != value:
      raise ValueError(
        f'{beside}: {key} is {config[key]!r:.80}; models.bert computes {value!r} only'
      )
  heads = config.get('num_attention_heads')
  if heads is None:
    return {}
  few: Any = Annotated[int, files.Rule('a number from 1 to 4096', HEADS.__contains__)]
  where = f'{beside}: num_attention_heads'
  return {'heads': files.checked(heads, few, where, CheckpointError)}


# ---- decoders ------------------------------------------------------------------------


def decoder_slots(shapes: Shapes) -> Iterable[dict[str, Slot]]:
  """Returns where in a Decoder the tensors of transformers are.

  Args:
    shapes: of the leaves of the Decoder, by path, without branch gates.

  Returns:
    One dict {tensor: its slot}.
  """
  slots = {}
  for path, shape in shapes.items():
    stack = re.match(r'params/layers(\d+)/', path)
    layers = shape[0] if stack else 1
    first = int(stack[1]) * layers if stack else 0
    whole = _bert_shape(path, shape[stack is not None :])
    slot = Slot(path, whole, path == 'params/embed/kernel')
    for layer in range(first, first + layers):
      named = re.sub(r'^params/layers\d+/', f'params/layer{layer}/', path)
      slots[_decoder_source(named)] = slot
  return [slots]


def _decoder_source(path: str) -> str:
  """'params/layer3/attention/out/kernel' → 'model.layers.3.self_attn.o_proj.weight'."""
  name = path.removeprefix('params/')
  name = re.sub(r'/(query|key|value|out)/', lambda m: f'/{m[1][0]}_proj/', name)
  name = re.sub(r'/(query|key)_norm/', lambda m: f'/{m[1][0]}_norm/', name)
  name = re.sub(r'/(gate|up|down)/', r'/\1_proj/', name)
  name = re.sub(r'^layer(\d+)/', r'layers/\1/', name)
  pairs = (
    ('attention/norm', 'input_layernorm'),
    ('mlp/norm', 'post_attention_layernorm'),
    ('attention/', 'self_attn/'),
    ('embed/', 'embed_tokens/'),
    ('kernel', 'weight'),
    ('scale', 'weight'),
    ('/', '.'),
  )
  name = _replaced(name, pairs)
  return f'lm_{name}' if name.startswith('head') else f'model.{name}'


def _decoder_fields(tensors: Tensors) -> dict[str, Any]:
  layers = {m[1] for n in tensors if (m := re.match(r'model\.layers\.(\d+)\.', n))}
  sizes = {
    'model.embed_tokens.weight': ('vocab', 'width'),
    'model.layers.0.mlp.gate_proj.weight': ('inner',),
  }
  fields = {
    field: size
    for name, names in sizes.items()
    if name in tensors
    for field, size in zip(names, tensors[name].shape)
  }
  return {**fields, 'depth': len(layers), 'tied': 'lm_head.weight' not in tensors}


def _decoder_stated(path: Path) -> dict[str, Any]:
  beside = path.with_name('config.json')
  if path.suffix != '.gguf' and not beside.exists():
    return {}
  model = decoder(path)
  named = (*decoder_config.SIZES, *decoder_config.PLAIN)
  rest = ('groups', 'size', 'theta', 'epsilon', 'tied', 'window')
  return {name: getattr(model, name) for name in (*named, *rest)}


# ---- errors --------------------------------------------------------------------------


def _faults(tensors: Mapping[str, np.ndarray], slots: Mapping[str, Slot]) -> list[str]:
  """Lists why the tensors do not fill the slots, one line per kind of fault."""
  both = [
    (name, _transposed(v, slots[name]), slots[name].path, slots[name].shape)
    for name, v in tensors.items()
    if name in slots
  ]
  kinds = {
    'unused tensors': [f'{n} {v.shape}' for n, v in tensors.items() if n not in slots],
    'unfilled arrays': [
      f'{slot.path} (from {name})'
      for name, slot in slots.items()
      if name not in tensors
    ],
    'differences in shape': [
      f'{name} as {tensor.shape} for {path} {shape}'
      for name, tensor, path, shape in both
      if tensor.shape != shape
    ],
    'tensors without floats': [
      f'{name} {tensor.dtype}'
      for name, tensor, *_ in both
      if not jnp.issubdtype(tensor.dtype, jnp.floating)
    ],
    'tensors with NaN or infinities': [
      name
      for name, tensor, *_ in both
      if jnp.issubdtype(tensor.dtype, jnp.floating) and not jnp.isfinite(tensor).all()
    ],
  }
  return [
    f'{len(names)} {kind}: {", ".join(names[:SHOWN])}{", …" * (len(names) > SHOWN)}'
    for kind, names in kinds.items()
    if names
  ]


def _differences(fields: Mapping[str, Any], model: nn.Module) -> list[str]:
  """Writes how the network of a file differs from a model, as far as it is known."""
  other = {k: v for k, v in fields.items() if v != getattr(model, k)}
  if not other:
    return []
  in_file = ', '.join(f'{k}={v!r}' for k, v in other.items())
  in_model = ', '.join(f'{k}={getattr(model, k)!r}' for k in other)
  kind = type(model).__name__
  return [f'The file holds a {kind} with {in_file}; the model has {in_model}.']
