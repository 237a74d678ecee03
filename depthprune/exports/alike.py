"""Pruned Decoders as whole ones, for formats that have one size for all layers.

The layers that are left have to be alike. The hidden width may be smaller than that of
the network it was cut from: there the normalisations still divide by the full width,
and here they must not.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from depthprune.models import stages
from depthprune.models.arch import complete, within
from depthprune.models.decoder import Decoder
from depthprune.program.trace import paths_of

# The sizes that all layers of a file share.
SHARED = ('attention/query:1', 'attention/query:2', 'attention/value', 'mlp/gate')


def alike(
  model: Decoder, variables: Mapping[str, Any], reader: str
) -> tuple[Decoder, dict[str, np.ndarray]]:
  """Returns the Decoder without `arch` that computes the same, and its arrays.

  Args:
    model: the Decoder, whose `arch` gives all layers that are left the same sizes.
      Layers without both branches are left out.
    variables: its arrays. Gates of branches are 1, as `prune` leaves them.
    reader: name of the program that will read them, for errors.

  Returns:
    (Decoder, {path: array}), with layers that are no stacks, 'params/layer0/...'.

  Raises:
    ValueError: sizes that differ between layers, half of a layer that is gone, a width
      of values that is not that of keys, arrays that are not those of the model, or
      gates that are not 1. The message says which.
  """
  arch = complete(model.arch, model.widths, 'Decoder')
  plain, origins = _plain(model, arch, reader)
  leaves = _checked(model, variables)
  arrays = {}
  for path, (origin, layer) in origins.items():
    x = leaves[origin] if layer is None else leaves[origin][layer]
    arrays[path] = _scaled(path, x, plain, model.width)
  return plain, arrays


Origin = tuple[str, int | None]  # path of a leaf, and the layer of the stack that it is


def _plain(
  model: Decoder, arch: Mapping[str, int], reader: str
) -> tuple[Decoder, dict[str, Origin]]:
  """Returns the Decoder without `arch` that has its sizes, and where its arrays are.

  Raises:
    ValueError: there is no such Decoder.
  """
  kept, sizes = [], {}
  for name, *_ in model.parts:
    part = within(arch, name)
    branches = part['attention/branch'], part['mlp/branch']
    if 0 in branches and any(branches):
      gone = ('attention', 'mlp')[branches.index(0)]
      raise ValueError(
        f'{name}: its {gone} is removed and the other branch is not; {reader} has no '
        'such layer: remove both, or keep both'
      )
    times = stages.layers_left(name, part) if model.scan else branches[0]
    kept += [(name, i if model.scan else None) for i in range(times)]
    if times:
      sizes[name] = _shared(part, model.scan)
  if not kept:
    raise ValueError(f'no layer is left; {reader} needs at least one')
  first, *rest = sizes
  for name in rest:
    for key, size in sizes[name].items():
      if size != sizes[first][key]:
        raise ValueError(
          f'{name}/{key} is {size}, but {first}/{key} is {sizes[first][key]}; '
          f'{reader} has one size for all layers: keep as many in each'
        )
  groups, heads, value, inner = (sizes[first][key] for key in SHARED)
  if value != model.size:
    raise ValueError(
      f'{first}/attention/value is {value}, and keys are {model.size} wide; in '
      f'{reader} both are as wide: keep the widths of values whole'
    )
  plain = model.clone(
    arch={},
    scan=False,
    width=arch['embed'],
    depth=len(kept),
    groups=groups,
    heads=groups * heads,
    inner=inner,
    epsilon=model.epsilon * (model.width / arch['embed']),
  )
  origins: dict[str, Origin] = {}
  tokens = jnp.zeros((1, 1), jnp.int32)
  fresh = jax.eval_shape(plain.init, jax.random.key(0), tokens)
  for path in paths_of({'params': fresh['params']}):
    top, name, *inside = path.split('/')
    origins[path] = path, None
    if name.startswith('layer'):
      stack, layer = kept[int(name.removeprefix('layer'))]
      origins[path] = '/'.join((top, stack, *inside)), layer
  return plain, origins


def _shared(part: Mapping[str, int], scan: bool) -> dict[str, int]:
  """The sizes of a layer that others have to share, by their keys without a stack."""
  later = {f'attention/query:{i}': f'attention/query:{i + scan}' for i in (1, 2)}
  return {key: part[later.get(key, key)] for key in SHARED}


def _checked(model: Decoder, variables: Mapping[str, Any]) -> dict[str, np.ndarray]:
  """Returns the arrays of a model by path, if these are all that it has."""
  tokens = jnp.zeros((1, 1), jnp.int32)
  fresh = paths_of(jax.eval_shape(model.init, jax.random.key(0), tokens))
  leaves = paths_of(variables)
  for path in {**fresh, **leaves}:
    if path.startswith('branches/'):
      if path in leaves and not np.all(np.asarray(leaves[path]) == 1):
        raise ValueError(f'{path}: expected 1; prune multiplies it into the arrays')
      continue
    want, got = (np.shape(x[path]) if path in x else 'none' for x in (fresh, leaves))
    if want != got:
      raise ValueError(f'{path}: expected shape {want}, got {got}')
  return {path: np.asarray(x) for path, x in leaves.items()}


def _scaled(path: str, x: np.ndarray, plain: Decoder, width: int) -> np.ndarray:
  """Returns an array for a network whose norms divide by its own width.

  With n of N slices left, sum / N + ε = (sum / n + ε N / n) n / N. So the scale behind
  it becomes √(N / n) times as large, and ε, which `plain` has already, N / n times.
  Two things follow. The norms of queries and keys have the same ε, and their widths are
  not cut: what they read becomes √(N / n) times as large, as the root of ε does. And an
  embedding that is multiplied with √n instead of √N carries the factor itself; if it is
  also the kernel of the logits, the last scale makes up for that.
  """
  factor = np.sqrt(width / plain.width)
  if path.endswith('/norm/scale'):
    last = path == 'params/norm/scale'
    factor = 1.0 if last and plain.scaled and plain.tied else factor
    return (factor * (plain.offset + x) - plain.offset).astype(x.dtype)
  read = plain.query_norm and path.split('/')[-2] in ('query', 'key')
  scaled = plain.scaled and path == 'params/embed/kernel'
  return (factor * x).astype(x.dtype) if read or scaled else x
