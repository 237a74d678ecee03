"""Batch normalisation that training leaves as it is, for `surgery.refit`.

In training a batch is normalised by its own statistics, whatever the stored ones are.
Where a network reads something else than when those were measured, as it does behind
refitted layers, it would be another one from the first step. So they are measured
anew, in evaluation mode, and scale and bias make up for them:

  a (x - m) / s + b  =  a' (x - m') / s' + b'
  a' = a s' / s,  b' = b + a (m' - m) / s,  s = sqrt(var + epsilon)

  m, s     stored mean and deviation;   m', s'   those of what is read
  a, b     scale and bias
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from depthprune.program import jaxpr as jx
from depthprune.program.trace import View
from depthprune.surgery.reads import SUMS

MOVES = frozenset(('broadcast_in_dim', 'convert_element_type', 'copy', 'reshape'))


class Norm(NamedTuple):
  """A batch normalisation in evaluation mode.

  Attributes:
    axis: the axis of what it reads that has the channels.
    epsilon: what is added to the variance.
    mean, var, scale, bias: its arrays, by their paths.
  """

  axis: int
  epsilon: float
  mean: str
  var: str
  scale: str
  bias: str


def norms_of(view: View) -> dict[jx.Equation, Norm]:
  """The batch normalisations of a network, by the equations that subtract the mean.

  They lie outside of scans, and each has a stored mean and variance, a scale and a
  bias, all a real number for each channel, which nothing else reads.
  """
  program, made = view.program, view.facts.made
  path_of = {v: path for path, v in view.leaves.items()}
  uses = Counter(v for e in program.equations for v in e.inputs)
  uses.update(program.outputs)
  reader = {v: e for e in program.equations for v in e.inputs if uses[v] == 1}

  def source(v: jx.Value) -> jx.Value | None:
    """The variable that a value is, but for its shape."""
    while v in made and made[v].name in MOVES and uses[v] == 1:
      v = made[v].inputs[0]
    return v if uses[v] == 1 and v in path_of else None

  def met(v: jx.Value, names: Container) -> tuple[jx.Equation, jx.Value] | None:
    """The equation that reads a value, and what it meets there."""
    e = reader.get(v)
    if e is None or e.name not in names or len(e.inputs) != 2:
      return None
    return e, e.inputs[0] if e.inputs[1] is v else e.inputs[1]

  found: dict[jx.Equation, Norm] = {}
  for e in program.equations:
    if e.name != 'sub' or e.inputs[0] not in view.facts.activations:
      continue
    x, mean = e.inputs
    scaled = met(e.outputs[0], ('mul',))
    shifted = met(scaled[0].outputs[0], SUMS) if scaled else None
    parts = _factor(scaled[1], made, source) if scaled else None
    if not parts or not shifted:
      continue
    var, scale, epsilon = parts
    values = mean, var, scale, shifted[1]
    axis, *others = (_axis(v, made) for v in values)
    if axis is None or {*others} != {axis}:
      continue
    like, is_real = (x.shape[axis],), lambda v: jnp.issubdtype(v.dtype, jnp.floating)
    stored = [v for v in map(source, values) if v and v.shape == like and is_real(v)]
    if len(stored) == len(values):
      found[e] = Norm(axis, epsilon, *(path_of[v] for v in stored))
  return found


def _factor(
  v: jx.Value, made: Mapping[jx.Value, jx.Equation], source: Callable
) -> tuple[jx.Value, jx.Value, float] | None:
  """(variance, scale, epsilon) of scale / sqrt(variance + epsilon), if it is that."""
  product = made.get(v)
  if product is None or product.name != 'mul':
    return None
  for root, scale in (product.inputs, product.inputs[::-1]):
    inverse = made.get(root)
    total = made.get(inverse.inputs[0]) if inverse and inverse.name == 'rsqrt' else None
    if total is None or total.name != 'add' or source(scale) is None:
      continue
    var, epsilon = total.inputs
    if isinstance(epsilon, jx.Literal) and source(var):
      return var, scale, float(np.asarray(epsilon.val))
  return None


def _axis(v: jx.Value, made: Mapping[jx.Value, jx.Equation]) -> int | None:
  """The axis of a value that an array of one axis became; None if that is unclear."""
  while (e := made.get(v)) is not None and e.name in MOVES:
    if e.name == 'broadcast_in_dim' and len(e.inputs[0].shape) == 1:
      return e.params['broadcast_dimensions'][0]
    long = [i for i, n in enumerate(v.shape) if n > 1]
    if e.name == 'reshape' and len(e.inputs[0].shape) == 1:
      return long[0] if len(long) == 1 else None
    if e.name in ('broadcast_in_dim', 'reshape'):
      return None
    v = e.inputs[0]
  return 0 if len(v.shape) == 1 else None


def restated(
  variables: Mapping[str, Any],
  batches: Iterable[tuple[jx.Program, Mapping[jx.Equation, Norm], Sequence, Callable]],
) -> dict[str, np.ndarray]:
  """The arrays of normalisations that store the statistics of what they read.

  Args:
    variables: {path: array}, in the order of the inputs of the network.
    batches: for each of the calibration set, the network, its normalisations, its
      inputs, and how its equations are run: (equation, inputs) -> outputs.

  Returns:
    {path: new array}, with which the network answers as before.
  """
  sums: dict[Norm, np.ndarray] = {}  # of 1, x - mean and its square
  for program, norms, arrays, execute in batches:
    args = [*variables.values(), *arrays]
    for norm, more in _sums(program, norms, args, execute).items():
      sums[norm] = sums.get(norm, 0) + more
  found: dict[str, np.ndarray] = {}
  for norm, (count, first, second) in sums.items():
    stored = (norm.mean, norm.var, norm.scale, norm.bias)
    mean, var, scale, bias = (np.asarray(variables[p]).astype(float) for p in stored)
    moved = first / np.maximum(count, 1)
    spread = second / np.maximum(count, 1) - moved**2
    spread = np.where(spread > 0, spread, var)  # nothing can be told from one number
    # Scale and bias also make up for how the statistics are rounded.
    rounded = lambda path, x: x.astype(variables[path].dtype).astype(float)
    moved = rounded(norm.mean, mean + moved) - mean
    spread = rounded(norm.var, spread)
    before, after = np.sqrt(var + norm.epsilon), np.sqrt(spread + norm.epsilon)
    new = mean + moved, spread, scale * after / before, bias + scale * moved / before
    for path, values in zip(stored, new, strict=True):
      found[path] = values.astype(variables[path].dtype)
  return found


def _sums(
  program: jx.Program,
  norms: Mapping[jx.Equation, Norm],
  args: Sequence,
  execute: Callable,
) -> dict[Norm, np.ndarray]:
  """For each normalisation the sums of 1, x - mean and its square, [3, channels]."""
  found: dict[Norm, np.ndarray] = {}

  def measured(e: jx.Equation, ins: list) -> list:
    outs = execute(e, ins)
    if (norm := norms.get(e)) is not None:
      rows = jnp.moveaxis(outs[0], norm.axis, -1).astype(jnp.float32)
      rows = rows.reshape(-1, rows.shape[-1])
      middle = rows.sum(0) / max(len(rows), 1)  # else float32 loses a small variance
      spread = np.asarray(jnp.square(rows - middle).sum(0), float)
      middle = np.asarray(middle, float)
      ones = np.full(middle.shape, float(len(rows)))
      found[norm] = np.stack([ones, ones * middle, spread + ones * middle**2])
    return outs

  jx.interpret(program, args, measured)
  return found
