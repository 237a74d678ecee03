"""The other way to remove slices: zeros in their place. Independent of the library."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import depthprune as dp
from depthprune.program.coupling import Coupling
from depthprune.program.trace import paths_of
from depthprune.surgery.verify import QUICK


def quick(f: Callable) -> Callable:
  """jit that compiles fast rather than well: tests run many small programs once."""
  return jax.jit(f, compiler_options=QUICK)


def in_calls(run: Callable, variables: Any, tokens: Any, cache: Any, steps: Any) -> Any:
  """Logits of all tokens, from calls that read so many of them each; the last cache."""
  parts, at = [], 0
  for n in steps:
    outputs = run(variables, tokens[:, at : at + n], cache=cache)
    cache, at = outputs['cache'], at + n
    parts.append(outputs['main'])
  return jnp.concatenate(parts, 1), cache


def random_keep(coupling: Coupling, seed: int = 0, gated: bool = False) -> dict:
  """A random half of every channel group. gated: only of those that take a gate."""
  draw = np.random.default_rng(seed)
  channels = {}
  for group in coupling.groups.values():
    kept = np.arange(group.size) < max(1, group.size // 2)
    kept = draw.permutation(kept)
    if group.kind == 'channel' and not (gated and group.ungated):
      channels[group.name] = kept
  return {'channels': channels}


def kept_slices(coupling: Coupling, keep: Mapping) -> dict[str, list[np.ndarray]]:
  """A mask for every axis of every array, by composing the groups' members."""
  masks = {
    path: [np.ones(n, bool) for n in leaf.shape]
    for path, leaf in paths_of(coupling.variables).items()
  }
  for path, axes in masks.items():
    for i, axis in enumerate(coupling.axes[path]):
      axes[i] = _mask(axis, {coupling.axis(g): k for g, k in keep['channels'].items()})
  return masks


def _mask(axis, kept) -> np.ndarray:
  while getattr(axis, 'bound', None) is not None:
    axis = axis.bound
  if not hasattr(axis, 'parts'):
    return np.asarray(kept.get(axis, np.ones(axis.size, bool)))
  parts = [_mask(p, kept) for p in axis.parts]
  if type(axis).__name__ == 'Cat':
    return np.concatenate(parts)
  out = np.ones((), bool)
  for p in parts:
    out = np.logical_and.outer(out, p)
  return out.ravel()


def zeroed(coupling: Coupling, variables: Any, keep: Mapping) -> Any:
  """The variables with zeros in every slice that keep drops."""
  masks = kept_slices(coupling, keep)
  return _each(variables, lambda p, x: x * _grid(masks[p]).astype(x.dtype))


def smaller(coupling: Coupling, variables: Any, keep: Mapping) -> Any:
  """The variables without the slices that keep drops."""
  masks = kept_slices(coupling, keep)
  return _each(variables, lambda p, x: x[np.ix_(*map(np.flatnonzero, masks[p]))])


def _grid(masks) -> np.ndarray:
  out = np.ones((), bool)
  for m in masks:
    out = np.logical_and.outer(out, m)
  return out


def _each(tree: Any, f: Callable) -> Any:
  """f on numpy arrays, which unlike jax's compile nothing."""
  leaves = [jnp.asarray(f(p, np.asarray(x))) for p, x in paths_of(tree).items()]
  return jax.tree.unflatten(jax.tree.structure(tree), leaves)


def as_gates(keep: Mapping) -> dict:
  return {
    'channels': {g: jnp.asarray(k, jnp.float32) for g, k in keep['channels'].items()}
  }


def difference(a: Any, b: Any) -> float:
  """max|a - b| / max|a| over the worst leaf; the trees must have one structure.

  It is NaN where anything is, which is not below any bound.
  """
  found = [0.0]
  jax.tree.map(lambda x, y: None, a, b)  # raises where the structures differ
  for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
    assert x.shape == y.shape, (x.shape, y.shape)
    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    found.append(np.abs(x - y).max() / np.maximum(np.abs(x).max(), 1e-30))
  return float(np.max(found))


def agree(f: Any, variables: Any, x: Any, keep: Mapping | None = None) -> Coupling:
  """Checks that the small network equals the masked one, in value and in gradient.

  By default a random half of every group that takes a gate is closed. Returns the
  coupling.
  """
  coupling = dp.couple(f, variables, x)
  keep = random_keep(coupling, seed=1, gated=True) if keep is None else keep
  small = dp.prune(f, variables, keep, x, coupling=coupling)
  assert small.report['verify']['difference'] < 1e-5
  assert small.report['verify']['moved'] > 1e-3
  gated = dp.plug(f, coupling)
  masked = lambda v: jnp.mean(gated(v, as_gates(keep), x) ** 2)
  full = smaller(coupling, jax.grad(masked)(variables), keep)
  part = jax.grad(lambda v: jnp.mean(small.apply(v, x) ** 2))(small.variables)
  close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)
  jax.tree.map(close, full, part)
  return coupling
