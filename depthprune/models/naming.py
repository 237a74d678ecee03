"""What the authors of checkpoints call the arrays of our networks, family by family.

ResNets: as torchvision does (`downsample`, `fc`) or as akamaster/pytorch_resnet_cifar10
does (`shortcut`, `linear`). BERTs: as transformers does, with or without the prefix
`bert.`, and with LayerNorms of `weight` and `bias` or, as once, `gamma` and `beta`.
"""

import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import numpy as np

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
