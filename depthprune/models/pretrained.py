"""Pretrained residual networks of torch, read strictly into our own.

Every tensor of the file is used and every array of the model filled, in its shape, or
nothing is. Files are .npz or .safetensors, named as torchvision does (`downsample`,
`fc`) or as akamaster/pytorch_resnet_cifar10 does (`shortcut`, `linear`).
"""

import json
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy

from depthprune.models.resnet import IMAGENET, ResNet
from depthprune.models.stages import STACK

COUNTER = '.num_batches_tracked'  # batches seen; our running averages do not ask
SHOWN = 8  # names of each kind in an error


class Naming(NamedTuple):
  """What the authors of a file call the parts that have no common name."""

  shortcut: str
  head: str


TORCHVISION = Naming('downsample', 'fc')
AKAMASTER = Naming('shortcut', 'linear')
NAMINGS = TORCHVISION, AKAMASTER
Slot = tuple[str, tuple[int, ...]]  # path of a leaf, and shape of the leaf or a layer


def load(
  path: str | Path, model: nn.Module, image: tuple[int, int, int] = (32, 32, 3)
) -> dict[str, Any]:
  """The variables of a ResNet from a .npz or .safetensors: float32, branch gates 1.

  Tensors called *.num_batches_tracked are dropped, and no others.

  Args:
    model: post-activation. A scanned stage has its layers stacked.
    image: height, width and channels of one input.

  Raises:
    ValueError: another kind of model; a file that cannot be read; or one that does not
      fit, with unused tensors, unfilled arrays, differences in shape, and in what the
      network of the file differs from the model.
  """
  if not isinstance(model, ResNet) or model.preact:
    raise ValueError(
      f'pretrained: {type(model).__name__} has no known naming of tensors; expected a '
      'ResNet with preact=False'
    )
  tensors = read(path)
  init = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, *image)))
  leaves, tree = jax.tree.flatten_with_path(init)
  shapes = {'/'.join(key.key for key in keys): leaf.shape for keys, leaf in leaves}
  namings = (slots(shapes, naming) for naming in NAMINGS)
  wanted = max(namings, key=lambda wanted: len(wanted.keys() & tensors.keys()))
  if faults := _faults(tensors, wanted):
    differences = _differences(tensors, model)
    raise ValueError('\n  '.join((f'{path}: does not fit.', *differences, *faults)))

  def filled(path: str) -> jax.Array:
    if path.startswith('branches/'):
      return jnp.ones(shapes[path], jnp.float32)
    arrays = [ours(tensors[name]) for name, (leaf, _) in wanted.items() if leaf == path]
    return jnp.asarray(np.reshape(arrays, shapes[path]), jnp.float32)

  return jax.tree.unflatten(tree, map(filled, shapes))


def source(path: str, naming: Naming, layer: int = 0) -> str:
  """The tensor that fills a leaf, or a layer of it in the stack of a scanned stage.

  'params/stage2/block0/shortcut/conv/kernel' → 'layer2.0.downsample.0.weight'."""
  name = path.split('/', 1)[1]
  for mine, theirs in (
    ('stem/conv', 'conv1'),
    ('stem/norm', 'bn1'),
    ('shortcut/conv', f'{naming.shortcut}/0'),
    ('shortcut/norm', f'{naming.shortcut}/1'),
    ('stage', 'layer'),
    (STACK, f'{layer + 1}'),  # the first block of a stage is apart
    ('block', ''),
    ('norm', 'bn'),
    ('head', naming.head),
    ('kernel', 'weight'),
    ('scale', 'weight'),
    ('mean', 'running_mean'),
    ('var', 'running_var'),
    ('/', '.'),
  ):
    name = name.replace(mine, theirs)
  return name


def slots(shapes: Mapping[str, tuple[int, ...]], naming: Naming) -> dict[str, Slot]:
  """Every tensor that a model needs: {name: where it goes}, gates left out.

  shapes: of the model's leaves, by path."""
  wanted = {}
  for path, shape in shapes.items():
    if path.startswith('branches/'):
      continue
    stacked = f'/{STACK}/' in path
    for layer in range(shape[0] if stacked else 1):
      wanted[source(path, naming, layer)] = (path, shape[stacked:])
  return wanted


def ours(tensor: np.ndarray) -> np.ndarray:
  """OIHW → HWIO, [out, in] → [in, out]; vectors as they are."""
  return tensor.transpose(2, 3, 1, 0) if tensor.ndim == 4 else tensor.T


def read(path: str | Path) -> dict[str, np.ndarray]:
  """The tensors of a file by name, without *.num_batches_tracked.

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
    if path.suffix == '.npz':
      with path.open('rb') as stream, np.load(stream) as file:
        tensors = dict(file)
    else:
      tensors = safetensors.numpy.load_file(path)
  except Exception as error:  # damage has many names, and a library of its own each
    raise ValueError(
      f'{path}: cannot be read as {path.suffix} ({error}); get the file again'
    ) from error
  return {k: v for k, v in tensors.items() if not k.endswith(COUNTER)}


def normalisation(path: str | Path) -> tuple[tuple, tuple, float] | None:
  """(mean, std, scale): the network of a file was trained on (x / scale - mean) / std.

  From 'normalisation' in the .json beside the file; None where there is none.

  Raises:
    ValueError: it is not {'mean': [...], 'std': [...], 'scale': 'x/255'}.
  """
  beside = Path(path).with_suffix('.json')
  entry = json.loads(beside.read_text()) if beside.is_file() else {}
  if (entry := entry.get('normalisation')) is None:
    return None
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
    (name, ours(v), *wanted[name]) for name, v in tensors.items() if name in wanted
  ]
  kinds = {
    'unused tensors': [f'{n} {v.shape}' for n, v in tensors.items() if n not in wanted],
    'unfilled arrays': [
      f'{path} (from {name})'
      for name, (path, _) in wanted.items()
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


def _differences(tensors: Mapping[str, np.ndarray], model: ResNet) -> list[str]:
  """How the network of a file differs from a model, as far as its tensors tell."""
  held = {k: v for k, v in _fields(tensors).items() if v != getattr(model, k)}
  theirs = ', '.join(f'{k}={v!r}' for k, v in held.items())
  mine = ', '.join(f'{k}={getattr(model, k)!r}' for k in held)
  return (
    [f'The file holds a ResNet with {theirs}; the model has {mine}.'] if held else []
  )


def _fields(tensors: Mapping[str, np.ndarray]) -> dict[str, Any]:
  """The fields of `ResNet` that can be told from the tensors of a file."""
  units = {m.groups() for name in tensors if (m := re.match(r'layer(\d)\.(\d+)', name))}
  blocks = tuple(Counter(stage for stage, _ in sorted(units)).values())
  bottleneck = any('.conv3.' in name for name in tensors)
  projected = any(f'.{n.shortcut}.' in name for n in NAMINGS for name in tensors)
  depths = [d for d, n in IMAGENET.items() if n == blocks and (d >= 50) == bottleneck]
  if len(blocks) == 3 and len({*blocks}) == 1:
    depths = [(9 if bottleneck else 6) * blocks[0] + 2]
  sizes = {'conv1.weight': 'width', **{f'{n.head}.bias': 'classes' for n in NAMINGS}}
  return {
    **({'depth': depths[0]} if depths else {}),
    'imagenet': len(blocks) == 4,
    'bottleneck': bottleneck,
    'shortcut': 'B' if projected else 'A',
    **{sizes[n]: len(v) for n, v in tensors.items() if n in sizes and v.ndim},
  }
