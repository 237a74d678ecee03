"""What transformers share: attention, normalised tokens, chains of layers, `arch`.

A layer is 'attention' and 'mlp', each behind a branch gate. Where the normalisations
stand is a family's own.
"""

from collections.abc import Callable
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from depthprune.models.arch import Arch, beneath, within
from depthprune.models.stages import Parts, check_tap, repeat

xavier = nn.initializers.xavier_uniform()


def layer_norm(
  x: jax.Array, dtype: DTypeLike, epsilon: float = 1e-6, name: str = 'norm'
) -> jax.Array:
  """Normalisation of every token, computed in float32 and returned as `dtype`."""
  norm = nn.LayerNorm(epsilon=epsilon, dtype=jnp.float32, name=name)
  return norm(x.astype(jnp.float32)).astype(dtype)


def attend(
  x: jax.Array,
  scale: float,
  arch: Arch,
  dtype: DTypeLike,
  mask: jax.Array | None = None,
  init: nn.initializers.Initializer = xavier,
  drop: Callable[[jax.Array], jax.Array] = lambda weights: weights,
) -> jax.Array:
  """Attention among tokens [batch, tokens, width], within a module's compact method.

  The module gets the dense layers 'query', 'key', 'value' and 'out'.

  Args:
    scale: what queries are multiplied with. That of the full network: pruning the
      width of queries and keys does not change it.
    arch: 'query', 'key', 'value': width of one head; 'heads'; 'out'.
    mask: bool [batch, tokens], False on padding, which gets no weight at all.
    init: of the kernels. drop: applied to the weights [batch, heads, tokens, tokens].
  """
  dense = partial(nn.DenseGeneral, kernel_init=init, dtype=dtype)
  q, k, v = (  # [batch, tokens, heads, width of one]
    dense((arch['heads'], arch[name]), name=name)(x)
    for name in ('query', 'key', 'value')
  )
  scores = jnp.einsum('bqhd,bkhd->bhqk', q * scale, k)
  weights = scores.astype(jnp.float32)
  if mask is not None:
    lowest = jnp.finfo(jnp.float32).min  # finite: a text of padding alone is no NaN
    weights = jnp.where(mask[:, None, None], weights, lowest)
  weights = drop(nn.softmax(weights).astype(scores.dtype))
  y = jnp.einsum('bhqk,bkhd->bqhd', weights, v)
  return dense(arch['out'], axis=(-2, -1), name='out')(y)


def check_sizes(model: nn.Module, kind: str) -> None:
  """Raises ValueError unless heads divide the width, and segments the depth."""
  name, m = type(model).__name__, vars(model)
  if m['width'] % m['heads']:
    raise ValueError(f'{name}: {m["heads"]} heads do not divide the width {m["width"]}')
  if m['scan'] and m['depth'] % m['segments']:
    raise ValueError(
      f'{name}: {m["segments"]} segments do not divide the {m["depth"]} {kind}s'
    )


def layer_widths(
  parts: Parts, width: int, heads: int, inner: int, scan: bool
) -> dict[str, int]:
  """Every key of `arch` that a chain of layers has, with its value in the full one."""
  size, widths = width // heads, {}
  for name, _, times in parts:
    attention = {'query': size, 'key': size, 'value': size, 'out': width}
    attention |= {_heads(scan): heads, 'branch': times}
    mlp = {'up': inner, 'down': width, 'branch': times}
    unit = beneath(attention, 'attention') | beneath(mlp, 'mlp')
    widths |= beneath(unit, name)
  return widths


def chain(
  layer: Callable[[Arch, str], nn.Module],
  x: jax.Array,
  arch: Arch,
  parts: Parts,
  scan: bool,
  until: str,
  *args,
) -> tuple[jax.Array, dict[str, jax.Array]]:
  """`x` through layers, within a module's compact method → (the end of it, taps).

  Args:
    layer: (its part of arch, name) → module; the part has 'attention/heads'.
    arch: complete, as `arch.complete` gives it.
    parts: as `stages.parts`. scan: each of them is a stack.
    until: the last tap to compute; '' for all.
    *args: what every layer is called with behind x.

  Raises:
    ValueError: no such tap; branches of a stack that do not leave one number of layers.
  """
  if until:
    check_tap(until, [tap for _, tap, _ in parts])
  taps = {}
  for name, tap, _ in parts:
    part = within(arch, name)
    part['attention/heads'] = part.pop(f'attention/{_heads(scan)}')
    module = layer(part, name)
    x = repeat(module, x, _layers(name, part), *args) if scan else module(x, *args)
    taps[tap] = x
    if tap == until:
      break
  return x, taps


def _heads(scan: bool) -> str:
  """The axis of a query kernel that counts the heads."""
  return 'query:2' if scan else 'query:1'


def _layers(name: str, arch: Arch) -> int:
  """The layers of a stack that are left: those of both branches, or of the one left."""
  left = {arch['attention/branch'], arch['mlp/branch']} - {0}
  if len(left) > 1:
    raise ValueError(
      f'{name}: arch leaves {arch["attention/branch"]} layers of attention/branch and '
      f'{arch["mlp/branch"]} of mlp/branch; expected one number, or 0 for a branch '
      'that is gone in all of them'
    )
  return max(left, default=0)
