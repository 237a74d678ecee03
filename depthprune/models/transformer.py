"""What transformers share: attention, normalised tokens, chains of layers, `arch`.

A layer has the branches 'attention' and 'mlp', each with a gate. The families differ in
where they normalise.
"""

from collections.abc import Callable
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from depthprune.models.arch import Arch, beneath, within
from depthprune.models.stages import Parts, Stacks, check_tap, layers_left, repeat

xavier = nn.initializers.xavier_uniform()


def layer_norm(
  x: jax.Array, dtype: DTypeLike, epsilon: float = 1e-6, name: str = 'norm'
) -> jax.Array:
  """Normalises every token, computed in float32 and returned as `dtype`."""
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
  """Computes attention among tokens, within a module's compact method.

  The module gets the dense layers 'query', 'key', 'value' and 'out'.

  Args:
    x: tokens [batch, tokens, width].
    scale: factor on the queries. It is that of the full network, which pruning the
      width of queries and keys does not change.
    arch: the width of one head under 'query', 'key' and 'value', the number of heads
      under 'heads', and the width of the result under 'out'.
    dtype: type of the computation.
    mask: bool [batch, tokens], False on padding, which gets no attention.
    init: initializer of the kernels.
    drop: dropout on the attention weights [batch, heads, tokens, tokens].

  Returns:
    [batch, tokens, arch['out']].
  """
  dense = partial(nn.DenseGeneral, kernel_init=init, dtype=dtype)
  q, k, v = (  # [batch, tokens, heads, width of a head]
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


def check_sizes(model: Stacks) -> None:
  """Raises ValueError unless the heads divide the width and the segments the depth."""
  name, m = type(model).__name__, vars(model)
  if m['width'] % m['heads']:
    raise ValueError(f'{name}: {m["heads"]} heads do not divide the width {m["width"]}')
  model.check_segments()


def layer_widths(
  parts: Parts, width: int, heads: int, inner: int, scan: bool
) -> dict[str, int]:
  """Returns the keys that a chain of layers has in `arch`, with their full values."""
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
  """Runs tokens through a chain of layers, within a module's compact method.

  Args:
    layer: makes the module of a layer from its part of `arch`, where the number of
      heads is 'attention/heads', and its name.
    x: tokens [batch, tokens, width].
    arch: the network's complete `arch`.
    parts: the layers, as `stages.parts` lists them.
    scan: whether the layers are stacks.
    until: the last tap to compute; '' for all.
    *args: further arguments of every layer.

  Returns:
    The tokens at the end, and {tap: tokens}.

  Raises:
    ValueError: there is no such tap, or the branches of a stack leave different numbers
      of layers.
  """
  if until:
    check_tap(until, [tap for _, tap, _ in parts])
  taps = {}
  for name, tap, _ in parts:
    part = within(arch, name)
    part['attention/heads'] = part.pop(f'attention/{_heads(scan)}')
    module = layer(part, name)
    x = repeat(module, x, layers_left(name, part), *args) if scan else module(x, *args)
    taps[tap] = x
    if tap == until:
      break
  return x, taps


def _heads(scan: bool) -> str:
  """The key of the number of heads: the axis of the query kernel that they are."""
  return 'query:2' if scan else 'query:1'
