"""Pretrained networks of torch, read strictly into our own.

Every tensor of the file is used and every array of the model filled, in its shape, or
nothing is. Files are .npz or .safetensors; `models.naming` has the names in them.
"""

import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy

from depthprune.models.bert import BERT
from depthprune.models.resnet import IMAGENET, ResNet
from depthprune.models.stages import STACK

Shapes = Mapping[str, tuple[int, ...]]  # of a model's leaves, by path
Tensors = Mapping[str, np.ndarray]


class Slot(NamedTuple):
  """Where a tensor goes.

  Attributes:
    path: of the leaf that it fills, or a layer of which it fills.
    shape: of the tensor, once its axes are in our order.
    table: its axes are in our order already."""

  path: str
  shape: tuple[int, ...]
  table: bool = False


class Family(NamedTuple):
  """How the files of one family are read.

  Attributes:
    dropped: pattern of the names of tensors that are left out.
    namings: leaf shapes → for each way of naming, {tensor: where it goes}; branch
      gates have no tensor.
    fields: tensors → the fields of the model that can be told from them.
    stated: path of the file → fields that are stated beside it.
    head: start of the paths of leaves that a file may lack, all together; '' if none.
  """

  dropped: str
  namings: Callable[[Shapes], Iterable[dict[str, Slot]]]
  fields: Callable[[Tensors], dict[str, Any]]
  stated: Callable[[Path], dict[str, Any]] = lambda path: {}
  head: str = ''


def family(model: nn.Module) -> Family:
  """How files for `model` are read.

  Raises:
    ValueError: there is no known naming of its tensors."""
  if isinstance(model, ResNet) and not model.preact:
    return Family(r'.*\.num_batches_tracked', _resnet_namings, _resnet_fields)
  if isinstance(model, BERT):
    dropped = r'(bert\.)?embeddings\.position_ids|cls\..*'
    return Family(dropped, _bert_namings, _bert_fields, _bert_stated, 'params/head/')
  raise ValueError(
    f'pretrained: {type(model).__name__} has no known naming of tensors; expected a '
    'BERT, or a ResNet with preact=False'
  )


def _replaced(name: str, pairs: Iterable[tuple[str, str]]) -> str:
  for mine, theirs in pairs:
    name = name.replace(mine, theirs)
  return name


# ---- ResNets -------------------------------------------------------------------------

RESNET_HEADS = {'downsample': 'fc', 'shortcut': 'linear'}  # of torchvision, akamaster


def _resnet_namings(shapes: Shapes) -> Iterable[dict[str, Slot]]:
  for shortcut in RESNET_HEADS:
    wanted = {}
    for path, shape in shapes.items():
      stacked = f'/{STACK}/' in path
      for layer in range(shape[0] if stacked else 1):
        name = _resnet_source(path, shortcut, layer)
        wanted[name] = Slot(path, shape[stacked:])
    yield wanted


def _resnet_source(path: str, shortcut: str, layer: int) -> str:
  """The tensor that fills a leaf, or a layer of it in the stack of a scanned stage.

  'params/stage2/block0/shortcut/conv/kernel' → 'layer2.0.downsample.0.weight'."""
  pairs = (
    ('stem/conv', 'conv1'),
    ('stem/norm', 'bn1'),
    ('shortcut/conv', f'{shortcut}/0'),
    ('shortcut/norm', f'{shortcut}/1'),
    ('stage', 'layer'),
    (STACK, f'{layer + 1}'),  # the first block of a stage is apart
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


def _bert_namings(shapes: Shapes) -> Iterable[dict[str, Slot]]:
  for prefix in ('', 'bert.'):
    for norm in (('weight', 'bias'), ('gamma', 'beta')):
      wanted = {}
      for path, shape in shapes.items():
        stack = re.search(r'/layers(\d+)/', path)
        layers = shape[0] if stack else 1
        # Stacks are of one length, unless pruned: then files are not for this network.
        first = int(stack[1]) * layers if stack else 0
        table = bool(re.search('/(word|position|type)/', path))
        slot = Slot(path, _bert_shape(path, shape[stack is not None :]), table)
        for layer in range(first, first + layers):
          wanted[_bert_source(path, prefix, norm, layer)] = slot
      yield wanted


def _bert_shape(path: str, shape: tuple[int, ...]) -> tuple[int, ...]:
  """That of a matrix or vector: heads and the width of one are a single axis there."""
  if path.endswith('/bias') and len(shape) == 2:
    return (prod(shape),)
  if len(shape) < 3:
    return shape
  inputs = shape[:-1] if path.endswith('/out/kernel') else shape[:1]
  return prod(inputs), prod(shape) // prod(inputs)


def _bert_source(path: str, prefix: str, norm: tuple[str, str], layer: int) -> str:
  """The tensor that fills a leaf, or a layer of it in a stack.

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
  theirs = norm if module.startswith('norm') else ('weight', 'bias')
  name = f'{name.rsplit("/", 1)[0]}/{theirs[leaf == "bias"]}'.replace('/', '.')
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
  found = {
    field: size
    for end, fields in sizes.items()
    for name, tensor in tensors.items()
    if name.endswith(end)
    for field, size in zip(fields, tensor.shape)
  }
  return {**found, 'depth': len(layers)}


def _bert_stated(path: Path) -> dict[str, Any]:
  """The heads, which no tensor tells, from the config.json of transformers.

  Raises:
    ValueError: it states what our BERT does not compute."""
  beside = path.with_name('config.json')
  config = json.loads(beside.read_text()) if beside.is_file() else {}
  computed = {
    'hidden_act': 'gelu', 'layer_norm_eps': 1e-12, 'position_embedding_type': 'absolute'
  }  # fmt: skip
  for key, value in computed.items():
    if config.get(key, value) != value:
      raise ValueError(
        f'{beside}: {key} is {config[key]!r}; models.bert computes {value!r} only'
      )
  heads = config.get('num_attention_heads')
  return {} if heads is None else {'heads': heads}


# What torchvision's ImageNet networks were trained on.
TORCHVISION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), 255.0
SHOWN = 8  # names of each kind in an error


def load(
  path: str | Path, model: nn.Module, image: tuple[int, ...] = (32, 32, 3)
) -> dict[str, Any]:
  """The variables of a ResNet or a BERT from a .npz or .safetensors: float32, gates 1.

  Tensors are dropped by name, and no others: *.num_batches_tracked for a ResNet; for a
  BERT embeddings.position_ids, which counts, and cls.*, heads of pretraining. Where the
  file of a BERT has no classifier.*, and only then, the head is what `model.init` gives
  with jax.random.key(0). How many heads its attention has is not in its tensors: it is
  compared with the config.json beside the file, and taken on trust where there is none.

  Args:
    model: a ResNet that is post-activation, or a BERT. A scanned stage has its layers
      stacked.
    image: height, width and channels of one input; a BERT does not ask.

  Raises:
    ValueError: another kind of model; a file that cannot be read; or one that does not
      fit, with unused tensors, unfilled arrays, differences in shape, and in what the
      network of the file differs from the model.
  """
  theirs = family(model)
  dropped = re.compile(theirs.dropped)
  tensors = {k: v for k, v in read(path).items() if not dropped.fullmatch(k)}
  example = (
    jnp.zeros((1, 1), int) if isinstance(model, BERT) else jnp.zeros((1, *image))
  )
  init = lambda: model.init(jax.random.key(0), example)
  leaves, tree = jax.tree.flatten_with_path(jax.eval_shape(init))
  shapes = {'/'.join(key.key for key in keys): leaf.shape for keys, leaf in leaves}
  wanted = _wanted(theirs, shapes, tensors)
  stated = theirs.stated(Path(path))
  faults = _faults(tensors, wanted)
  if faults or any(v != getattr(model, k) for k, v in stated.items()):
    differences = _differences(theirs.fields(tensors) | stated, model)
    raise ValueError('\n  '.join((f'{path}: does not fit.', *differences, *faults)))
  filled = _filled(tensors, wanted, shapes)
  left = [i for i, k in enumerate(shapes) if k not in filled]
  # Compiled for these alone, gates and a head: the rest of `init` is dead code.
  drawn = jax.jit(lambda: [jax.tree.leaves(init())[i] for i in left])()
  filled |= zip([[*shapes][i] for i in left], drawn)
  return jax.tree.unflatten(tree, [filled[k] for k in shapes])


def _wanted(
  theirs: Family, shapes: Mapping[str, tuple[int, ...]], tensors: Mapping
) -> dict[str, Slot]:
  """Where every tensor goes, by the naming that has most of them."""
  arrays = {k: v for k, v in shapes.items() if not k.startswith('branches/')}
  namings = theirs.namings(arrays)
  wanted = max(namings, key=lambda wanted: len(wanted.keys() & tensors.keys()))
  if not theirs.head:
    return wanted
  rest = {k: v for k, v in wanted.items() if not v.path.startswith(theirs.head)}
  return rest if (wanted.keys() - rest.keys()).isdisjoint(tensors) else wanted


def _filled(
  tensors: Mapping[str, np.ndarray], wanted: Mapping[str, Slot], shapes: Mapping
) -> dict[str, jax.Array]:
  """Every leaf that has tensors, by path; several are the layers of a stack."""
  parts: dict[str, list[np.ndarray]] = {}
  for name, slot in wanted.items():
    parts.setdefault(slot.path, []).append(ours(tensors[name], slot))
  return {
    path: jnp.asarray(np.reshape(arrays, shapes[path]), jnp.float32)
    for path, arrays in parts.items()
  }


def ours(tensor: np.ndarray, slot: Slot) -> np.ndarray:
  """OIHW → HWIO, [out, in] → [in, out]; vectors and tables as they are."""
  if slot.table:
    return tensor
  return tensor.transpose(2, 3, 1, 0) if tensor.ndim == 4 else tensor.T


def read(path: str | Path) -> dict[str, np.ndarray]:
  """The tensors of a file by name.

  Raises:
    ValueError: no such file, another suffix, a damaged file.
  """
  path = Path(path)
  if path.suffix not in ('.npz', '.safetensors'):
    raise ValueError(
      f'{path}: expected .npz or .safetensors; what torch saved becomes the latter by '
      'safetensors.torch.save_file(state_dict, path)'
    )
  if not path.is_file():
    raise ValueError(f'{path}: no such file')
  try:
    if path.suffix == '.safetensors':
      return safetensors.numpy.load_file(path)
    with path.open('rb') as stream, np.load(stream) as file:
      return dict(file)
  except Exception as error:  # damage has many names, and a library of its own each
    raise ValueError(
      f'{path}: cannot be read as {path.suffix} ({error}); get the file again'
    ) from error


def normalisation(path: str | Path) -> tuple[tuple, tuple, float] | None:
  """(mean, std, scale): the network of a file was trained on (x / scale - mean) / std.

  From 'normalisation' in the .json beside the file. Where there is none, torchvision's
  for a ResNet with the 7×7 stem that is for ImageNet, and None for others.

  Raises:
    ValueError: it is not {'mean': [...], 'std': [...], 'scale': 'x/255'}; the file
      cannot be read.
  """
  beside = Path(path).with_suffix('.json')
  entry = json.loads(beside.read_text()) if beside.is_file() else {}
  if (entry := entry.get('normalisation')) is None:
    stem = read(path).get('conv1.weight')
    imagenet = stem is not None and stem.shape[2:] == (7, 7)
    return TORCHVISION if imagenet else None
  try:
    scale = float(entry['scale'].removeprefix('x/'))
    return tuple(map(float, entry['mean'])), tuple(map(float, entry['std'])), scale
  except (AttributeError, KeyError, TypeError, ValueError) as error:
    raise ValueError(
      f"{beside}: expected normalisation with mean, std and scale 'x/255', got {entry}"
    ) from error


# ---- errors --------------------------------------------------------------------------


def _faults(tensors: Mapping[str, np.ndarray], wanted: Mapping[str, Slot]) -> list[str]:
  """What keeps the tensors from filling the slots, a line for each kind."""
  both = [
    (name, ours(v, wanted[name]), wanted[name].path, wanted[name].shape)
    for name, v in tensors.items()
    if name in wanted
  ]
  kinds = {
    'unused tensors': [f'{n} {v.shape}' for n, v in tensors.items() if n not in wanted],
    'unfilled arrays': [
      f'{slot.path} (from {name})'
      for name, slot in wanted.items()
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
  }
  return [
    f'{len(names)} {kind}: {", ".join(names[:SHOWN])}{", …" * (len(names) > SHOWN)}'
    for kind, names in kinds.items()
    if names
  ]


def _differences(fields: Mapping[str, Any], model: nn.Module) -> list[str]:
  """How the network of a file differs from a model, as far as is known of it."""
  held = {k: v for k, v in fields.items() if v != getattr(model, k)}
  theirs = ', '.join(f'{k}={v!r}' for k, v in held.items())
  mine = ', '.join(f'{k}={getattr(model, k)!r}' for k in held)
  kind = type(model).__name__
  return (
    [f'The file holds a {kind} with {theirs}; the model has {mine}.'] if held else []
  )
