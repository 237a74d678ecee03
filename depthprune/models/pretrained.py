"""Pretrained networks of torch, read strictly into our own.

Every tensor of the file is used and every array of the model filled, in its shape, or
nothing is. Files are .npz or .safetensors; `models.naming` has the names in them.
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy

from depthprune.models.bert import BERT
from depthprune.models.naming import Family, Slot, family

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
