"""What layers read and how their weights are fitted to it, for `surgery.refit`."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from depthprune.program import axes as ax
from depthprune.program import jaxpr as jx
from depthprune.program.resize import decided
from depthprune.program.trace import View

MOVES = frozenset(('convert_element_type', 'reshape', 'rev', 'squeeze', 'transpose'))
SUMS = frozenset(('add', 'add_any'))
AFFINE = SUMS | {'convert_element_type', 'div', 'mul', 'neg', 'sub'}  # per element
TINY = 1e-30  # keeps layers solvable that read nothing but zeros


class Sum(NamedTuple):
  """Where the answer of a layer is added to something else, such as a residual stream.

  Attributes:
    way: equations that bring the answer there, affine in each element, in order.
    stream: what it is added to.
  """

  way: tuple[jx.Equation, ...]
  stream: jx.Value


class Read(NamedTuple):
  """An equation that sums over axes that may be cut, of activations and of a weight.

  Attributes:
    path: of the weight.
    loops: number of scans that it lies in, each of which runs over its leading axis.
    moves: equations that bring the weight into the shape that is read, in order.
    source: which input of the equation has the activations.
    over: the axes of the activations that are summed over.
    weight: which input of the equation has the weight.
    summed: the axes of the weight that are summed over, as it is read.
    kept: bool [product of these axes], what stays of them.
    sum: where the answer is added to, if nothing else reads it.
  """

  path: str
  loops: int
  moves: tuple[jx.Equation, ...]
  source: int
  over: tuple[int, ...]
  weight: int
  summed: tuple[int, ...]
  kept: np.ndarray
  sum: Sum | None


def reads_of(view: View, settled: Mapping) -> dict[jx.Equation, Read]:
  """The equations of a network whose weights can be refitted after a decision.

  The weight of each is a variable of real numbers that nothing else reads, and some of
  its inputs stay; also in scans.
  """
  stored = {v: (path, 0) for path, v in view.leaves.items()}
  return dict(_reads(view, view.program, stored, decided(view, settled)))


def _reads(
  view: View,
  program: jx.Program,
  stored: Mapping[jx.Value, tuple[str, int]],
  kept: ax.Keep,
) -> Iterator[tuple[jx.Equation, Read]]:
  """As `reads_of`; `stored` is {value: (path of the variable, scans around it)}."""
  made = view.facts.made
  uses = Counter(v for e in program.equations for v in e.inputs)
  uses.update(program.outputs)
  reader = {v: e for e in program.equations for v in e.inputs}
  for e in program.equations:
    if (sides := _sides(view, e)) is not None:
      source, over, weight, summed = sides
      dims = view.facts.dims[e.inputs[weight]]
      mask = np.ones(1, bool)
      for i in summed:
        mask = np.outer(mask, ax.mask(dims[i], kept)).ravel()
      v, moves = e.inputs[weight], []
      while uses[v] == 1 and v in made and made[v].name in MOVES:
        moves.insert(0, made[v])
        v = made[v].inputs[0]
      real = all(jnp.issubdtype(a.dtype, jnp.floating) for a in (v, *e.outputs))
      if real and uses[v] == 1 and v in stored and mask.any():
        path, loops = stored[v]
        total = _sum(view, e.outputs[0], uses, reader)
        read = path, loops, tuple(moves), source, over, weight, summed, mask, total
        yield e, Read(*read)
    if e.name == 'scan':
      (body,) = e.bodies
      scanned = zip(*(jx.scan_parts(e, x)[2] for x in (e.inputs, body.inputs)))
      inside = {
        inner: (stored[v][0], stored[v][1] + 1)
        for v, inner in scanned
        if v in stored and uses[v] == 1
      }
      yield from _reads(view, body, inside, kept)


def _sum(view: View, v: jx.Value, uses: Counter, reader: Mapping) -> Sum | None:
  """Where a value is added to, if all that is done to it before is affine."""
  way: list[jx.Equation] = []
  while uses[v] == 1 and v in reader:
    e = reader[v]
    others = [x for x in e.inputs if x is not v]
    (out,) = e.outputs
    same = out.shape == v.shape and jnp.issubdtype(out.dtype, jnp.floating)
    if not same or e.name not in AFFINE or (e.name == 'div' and e.inputs[0] is not v):
      return None
    if data := [x for x in others if x in view.facts.activations]:
      alike = e.name in SUMS and data[0].shape == v.shape
      return Sum(tuple(way), data[0]) if alike else None
    way.append(e)
    v = out
  return None


def slope(e: jx.Equation, total: Sum, value: Callable[[jx.Value], Any]) -> jax.Array:
  """How fast what is added to a stream changes with the answer of a layer, per element.

  Args:
    e: the layer.
    total: where its answer is added.
    value: the value of anything that depends on variables alone.
  """
  (answer,) = e.outputs

  def run(x):
    v = answer
    for each in total.way:
      ins = [x if i is v else value(i) for i in each.inputs]
      (x,) = jx.bind(each, ins, each.params, jx.run)
      (v,) = each.outputs
    return x

  start = jnp.zeros(answer.shape, answer.dtype)
  return jax.jvp(run, (start,), (jnp.ones_like(start),))[1]


def _sides(view: View, e: jx.Equation) -> tuple[int, tuple, int, tuple] | None:
  """(input, axes) of activations and of what they meet, if an equation sums over both.

  The window of a convolution counts as axes of its weight.
  """
  if e.name == 'conv_general_dilated':
    (_, channel, *_), (_, *summed), _ = e.params['dimension_numbers']
    if e.params['feature_group_count'] == e.params['batch_group_count'] == 1:
      return 0, (channel,), 1, tuple(summed)
  if e.name == 'dot_general':
    axes, (batch, _) = e.params['dimension_numbers']
    is_data = [v in view.facts.activations for v in e.inputs]
    if not batch and axes[0] and sum(is_data) == 1:
      source = is_data.index(True)
      return source, tuple(axes[source]), 1 - source, tuple(axes[1 - source])
  return None


def row_count(e: jx.Equation, read: Read) -> int:
  """How many rows `rows` returns."""
  return math.prod(e.outputs[0].shape) // max(_outputs(e, read), 1)


def _outputs(e: jx.Equation, read: Read) -> int:
  """How many outputs a layer has."""
  return math.prod(e.inputs[read.weight].shape) // read.kept.size


def rows(e: jx.Equation, read: Read, ins: Sequence) -> jax.Array:
  """What a weight reads, float32 [examples and positions, inputs of the layer]."""
  x = ins[read.source].astype(jnp.float32)
  if e.name == 'conv_general_dilated':
    x = _windows(e, x)
  else:
    x = jnp.moveaxis(x, read.over, range(-len(read.over), 0))
  return x.reshape(-1, read.kept.size)


def answers(e: jx.Equation, read: Read, y: jax.Array) -> jax.Array:
  """An array like what a layer gives, as [examples and positions, outputs]."""
  if e.name == 'conv_general_dilated':
    _, _, (example, channel, *positions) = e.params['dimension_numbers']
    y = y.transpose(example, *positions, channel)
  elif read.source == 1:  # the axes of the weight come first
    own = len(e.inputs[read.weight].shape) - len(read.summed)
    y = jnp.moveaxis(y, range(own), range(-own, 0))
  return y.reshape(-1, _outputs(e, read))


def _windows(e: jx.Equation, x: jax.Array) -> jax.Array:
  """What a convolution reads: [examples, *positions, channels, places in a window]."""
  p = e.params
  axes = p['dimension_numbers']
  (example, channel, *space), (_, _, *window), (_, _, *positions) = axes
  x = x.transpose(example, *space, channel)
  around = zip(p['padding'], p['lhs_dilation'])
  edges = [(low, high, dilation - 1) for (low, high), dilation in around]
  x = jax.lax.pad(x, np.zeros((), x.dtype), [(0, 0, 0), *edges, (0, 0, 0)])
  counts = [e.outputs[0].shape[i] for i in positions]
  places = []
  for place in itertools.product(*(range(e.inputs[1].shape[i]) for i in window)):
    first = [k * dilation for k, dilation in zip(place, p['rhs_dilation'])]
    last = [
      start + (n - 1) * stride + 1
      for start, n, stride in zip(first, counts, p['window_strides'])
    ]
    ends = (0, *first, 0), (x.shape[0], *last, x.shape[-1])
    places.append(jax.lax.slice(x, *ends, (1, *p['window_strides'], 1)))
  return jnp.stack(places, -1)


def as_read(read: Read, stored: Any) -> np.ndarray:
  """A weight as it is read, float64, from how it is stored, without its scans."""
  w = np.asarray(stored).astype(float)
  for move in read.moves:
    if move.name == 'transpose':
      w = w.transpose(move.params['permutation'])
    elif move.name == 'rev':
      w = np.flip(w, move.params['dimensions'])
    w = w.reshape(move.outputs[0].shape)
  return w


def as_stored(read: Read, w: np.ndarray) -> np.ndarray:
  """The inverse of `as_read`, of the same type as `w`."""
  for move in reversed(read.moves):
    if move.name == 'transpose':
      w = w.transpose(np.argsort(move.params['permutation']))
    elif move.name == 'rev':
      w = np.flip(w, move.params['dimensions'])
    w = w.reshape(move.inputs[0].shape)
  return w


def flat(read: Read, w: np.ndarray) -> np.ndarray:
  """A weight that is as it is read, as a matrix [inputs, outputs]."""
  front = range(len(read.summed))
  w = np.moveaxis(w, read.summed, front)
  return w.reshape(read.kept.size, math.prod(w.shape[len(front) :]))


def fitted(
  read: Read, w: np.ndarray, G: np.ndarray, missing: np.ndarray, ridge: float
) -> np.ndarray:
  """The weight that gives nearest to what is asked for, from what a cut leaves to read.

  Args:
    read: the layer.
    w: its weight as it is read, float64.
    G: the sum of z z', where z is what is read after the cut [inputs, inputs].
    missing: the sum of z y', where y is what the rest of `w` lacks [inputs, outputs].
    ridge: as for `refit`.
  """
  kept = read.kept
  G_kk = G[np.ix_(kept, kept)]
  G_kk += (ridge * np.diag(G_kk).mean() + TINY) * np.eye(len(G_kk))
  new = flat(read, w).copy()
  new[kept] += np.linalg.solve(G_kk, missing[kept])
  front = range(len(read.summed))
  shape = np.moveaxis(w, read.summed, front).shape
  return np.moveaxis(new.reshape(shape), front, read.summed)
