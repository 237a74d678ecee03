"""Milliseconds on the device at hand as a cost: a table per layer, over its widths.

Every equation that contracts (a convolution, a product, a loop around some) is a layer.
It is timed alone at some widths of each axis that can be cut, and so is the network,
narrowed evenly, and as it is; all of them take turns.

  C(n)     = f(sum_l t_l(n)), of the network as it is what was measured
  t_l(n)   table of layer l, linear between the widths that were timed, and what was
           measured of the whole layer
  n        slices that are kept of every group
  f        from the layers' sum to the network's time, which has what lies between
           layers (element-wise work, launches) and what XLA fuses: through the evenly
           narrowed networks, linear in between

Tables per layer are those of NetAdapt (Yang et al., arXiv 1804.03230); f is ours. No
layer is counted slower for being narrower: where noise says so, a table is taken half
way between the rising ones around it. But kernels like some widths more, mostly those
that networks are built with, so what loses a channel can be slower than it was (or
much faster, where a cache did not like it); where widths are not rounded, odd ones are
timed. For gates, f has the value above and one slope, the mean one: where launches hide
what narrower layers save, gates would otherwise have nothing to follow.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from depthprune.program.couple import Coupling


class Table(NamedTuple):
  """Milliseconds of a layer.

  Attributes:
    widths: those that were timed [n], rising, of each axis that can be cut.
    taken: milliseconds [n, ...], rising along every axis.
    full: its widths as it is, of each axis; whole: milliseconds of it so.
  """

  widths: tuple[np.ndarray, ...]
  taken: np.ndarray
  full: tuple[int, ...]
  whole: float


class Milliseconds(NamedTuple):
  """The cost C of one network: C(coupling, gates), as `cost.flops` is.

  gates: None for the whole network, bool for a float, float for a float32 scalar with
  a derivative. Of a keep tree the channels count; branches and exits count as kept.

  Attributes:
    batch: examples in a call.
    layers: (axes, table) of every layer, table among `tables`; an axis is the groups
      that are concatenated in it, counted by their sum.
    network: (sums of the layers [k], milliseconds [k]) of the narrowed networks.
    whole: milliseconds of the network as it is.
  """

  batch: int
  layers: tuple[tuple[tuple[tuple[str, ...], ...], int], ...]
  tables: tuple[Table, ...]
  network: tuple[np.ndarray, np.ndarray]
  whole: float

  def __call__(self, coupling: Coupling, gates: Mapping | None = None) -> Any:
    channels = (gates or {}).get('channels', {})
    hard = all(isinstance(g, np.ndarray) and g.dtype == bool for g in channels.values())
    if hard and all(map(np.all, channels.values())):
      return self.whole
    xp = np if hard else jnp
    n = {group: group_.size for group, group_ in coupling.groups.items()}
    n |= {group: xp.sum(gate) for group, gate in channels.items()}
    total = sum_of(self.layers, self.tables, n, xp)
    sums, taken = self.network
    value = between(total, sums, taken, xp)
    if hard:
      return float(value)
    slope = np.float32((taken[-1] - taken[0]) / max(sums[-1] - sums[0], 1e-30))
    return slope * total + jax.lax.stop_gradient(value - slope * total)


def between(x: Any, points: np.ndarray, table: np.ndarray, xp: Any = np) -> Any:
  """table[..., rest] at x, linear between points [n] and beyond them."""
  table = xp.asarray(table, np.float32)
  points = np.asarray(points, np.float32)
  low, high = np.tile(np.array([[0], [1]], np.float32), len(points) - 1)
  low[:1], high[-1:] = -np.inf, np.inf
  passed = xp.clip((x - points[:-1]) / np.diff(points), low, high)
  return table[0] + xp.tensordot(passed, xp.diff(table, axis=0), 1)


def rising(table: np.ndarray) -> np.ndarray:
  """Half way between the lowest table above and the highest below that rise along every
  axis; a table that does so is left as it is. float32."""
  for axis in range(table.ndim):
    above = np.maximum.accumulate(table, axis)
    below = np.flip(np.minimum.accumulate(np.flip(table, axis), axis), axis)
    table = (above + below) / 2
  return table.astype(np.float32)


def sum_of(layers, tables, n: Mapping[str, Any], xp: Any) -> Any:
  """sum_l t_l at n slices of every group; layers, tables: as in Milliseconds."""
  total = np.float32(0)
  for axes, index in layers:
    table = tables[index]
    counts = [sum(n[g] for g in groups) for groups in axes]
    value = table.taken
    for count, points in zip(counts, table.widths, strict=True):
      value = between(count, points, value, xp)
    total = total + _jumped(value, counts, table, xp)
  return total


def _jumped(value: Any, counts: Sequence, table: Table, xp: Any) -> Any:
  """The value of a layer, that of the whole one where nothing of it was cut; the
  derivative is that of narrower ones there, too."""
  is_whole = [count == full for count, full in zip(counts, table.full, strict=True)]
  if xp is np:
    return table.whole if all(is_whole) else value
  jump = jnp.where(jnp.stack(is_whole).all(), table.whole - value, 0)
  return value + jax.lax.stop_gradient(jump)
