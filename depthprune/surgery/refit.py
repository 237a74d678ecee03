"""Weights that make up for what is removed, by least squares: no training, no labels.

Layers are refitted in the order in which they run. Each is to give what it gave before,
from what it still reads:

  V = argmin sum |V' z - t|^2 + lambda |V - W_k|^2
    = W_k + (G + lambda I)^-1 sum z (t - W_k' z)',   G = sum z z'

  W, W_k   its weights, and those of channels that stay
  z        what it reads from channels that stay, behind layers that are refitted, of a
           convolution its whole window
  t        W' x, where x is what it reads in the full network: so it also makes up for
           what layers before it could not. If it is added to a residual stream, what
           that lacks by now is added to t, divided by the slope of what lies between,
           such as a normalisation by stored statistics. With few rows for each of its
           inputs all this would fit noise; then t = W' x of what it reads behind
           refitted layers, from all channels
  lambda   `ridge` times the mean of the diagonal of G

`refitted` takes all layers at once, for many decisions after one measurement: x is that
of the full network, and z the part of it that stays.

The arrays change before the cut, so what `prune` proves stays the same: the small
network is the full one with closed gates.

Sources: He, Zhang, Sun, arXiv 1707.06168, for the fit in order and residual streams;
Chee, Flynn, Damle, De Sa, arXiv 2108.00065, for that at once. There the fit also
chooses the channels that stay; here any decision does. The rule for few rows is ours.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from depthprune.program import arguments, gating
from depthprune.program import jaxpr as jx
from depthprune.program.coupling import Coupling
from depthprune.program.trace import View, paths_of, remembered, split_arrays
from depthprune.surgery.activations import calls
from depthprune.surgery.reads import (
  Read,
  answers,
  as_read,
  as_stored,
  fitted,
  flat,
  reads_of,
  row_count,
  rows,
  slope,
)
from depthprune.surgery.settle import settle
from depthprune.surgery.statistics import norms_of, restated
from depthprune.surgery.verify import mask

ROWS = 64  # examples and positions for each input of a layer: more change little
FEW = 32  # with fewer, errors of layers before would be fitted as noise
FLAT = 0.01  # of the steepest slope: a stream is not made up for where it is flatter


def refit(
  coupling: Coupling,
  variables: Any,
  keep: Mapping,
  batches: Iterable[Any],
  ridge: float = 1e-4,
) -> Any:
  """Makes the weights that stay do the work of what goes, by least squares.

  It takes seconds to minutes, needs neither labels nor gradients, and stands between
  the decision and the cut::

    keep = dp.oneshot(coupling, variables, '50%')
    variables = dp.refit(coupling, variables, keep, [images[:512]])
    pruned = dp.prune(model, variables, keep, images[:1], train=False)

  Layers are refitted in the order in which they run, each on what it reads behind those
  that are refitted already. With at least 32 examples, positions included, for each of
  its inputs, a layer also makes up for what those before it could not, and for what the
  residual stream lacks to which its answer is added: also behind a branch that goes.

  Batch statistics become those of what is read now, and scale and bias make up for
  that: training normalises by those of its batches, and so begins with the network that
  answers here. This is done outside of scans.

  Compare on held-out data where gates learnt together what may go and examples are few:
  a layer may no longer need what closed channels gave, and a refit brings it back.

  Args:
    coupling: of the network, made by `couple` in evaluation mode.
    variables: its arrays.
    keep: the decision that will be cut, as `oneshot` or a method's `decide` returns it.
    batches: the calibration set, in batches of any sizes, as `activations` takes it. It
      should have many times as many examples, positions included, as a layer has
      inputs; of more than 64 times as many, some are drawn.
    ridge: how far the weights are held back, relative to the mean square of what they
      read; above 0.

  Returns:
    The variables, of the same structure and shapes. What is refitted is every dense
    layer, einsum or convolution whose weight is stored as a variable, read once, and
    reads something else than before; layers of a scan too. If a layer is refitted, the
    arrays of batch normalisations are new as well. Grouped convolutions, weights of
    batched products (experts), shared ones and those that are complex or integers are
    as they were.

  Raises:
    KeyError: `keep` has a group, branch or exit that the network does not have.
    ValueError: ridge is not above 0; no batches, one that is not like the inputs with
      which the network was coupled, or one on which a layer reads numbers that are not
      finite.

  Memory: what the full and the cut network hold at one place for the whole calibration
  set, and of one layer all that it reads in one batch and a square matrix of the number
  of its inputs; for a convolution both times its window.

  Source: He, Zhang, Sun, arXiv 1707.06168.
  """
  arguments.number('ridge', ridge, above=0)
  arguments.coupling(coupling).fits(variables)
  settled, _ = settle(coupling, keep, variables)
  cut, gates = mask(coupling, variables, settled)
  closed = {g: jnp.asarray(x) for g, x in gates['channels'].items() if not x.all()}
  cut = gating.with_branches(cut, gates['branches'])
  dead = coupling.decision(settled).dead
  views = remembered(lambda inputs, kw: coupling.retrace(coupling.fn, inputs, kw))
  known: dict[jx.Program, tuple] = {}  # the layers and normalisations of a network
  calibration = []  # of each batch: the network, these, and the arrays
  counts: dict[str, float] = {}  # of rows that a layer reads, for each of its inputs
  for inputs, named in calls(coupling, batches):
    kwargs = {**coupling.kwargs, **named}
    view = views(inputs, kwargs)
    if view.program not in known:
      found = reads_of(view, settled)
      reads = {e: read for e, read in found.items() if read.path not in dead}
      known[view.program] = reads, norms_of(view)
    reads, norms = known[view.program]
    calibration.append((view, reads, norms, split_arrays((inputs, kwargs))[0]))
    for e, read in reads.items():
      more = row_count(e, read) / read.kept.size
      counts[read.path] = counts.get(read.path, 0) + more
  # Batches of another size may be traced in another way.
  layouts = [{_layout(*each) for each in reads.items()} for _, reads, *_ in calibration]
  common = set.intersection(*layouts)
  makes_up = {path for path, count in counts.items() if count >= FEW}
  networks = [(variables, {})] * bool(makes_up) + [(cut, closed)]
  sides = []  # of each batch: the network in full, if it is needed, and cut
  for view, found, _, arrays in calibration:
    reads = {e: read for e, read in found.items() if _layout(e, read) in common}
    for own, shut in networks:
      execute = gating.executor(coupling, view, shut)
      args = [*jax.tree.leaves(own), *arrays]
      program, made = _upto(view.program, reads), view.facts.made
      sides.append(_layers(program, args, reads, made, execute))
  leaves = paths_of(variables)
  changed: dict[str, np.ndarray] = {}
  for layers in zip(*sides, strict=True):
    full, small = layers[:: len(networks)], layers[len(networks) - 1 :: len(networks)]
    _, read, ins, at, _ = layers[0]
    path = read.path
    goals = full if path in makes_up else small
    if read.kept.all() and _read_the_same(goals, small):
      continue
    if path not in changed:
      changed[path] = np.array(leaves[path])
    new = _refit(goals, small, as_read(read, changed[path][at]), ridge)
    changed[path][at] = as_stored(read, new)
    for layer in small:
      layer.ins[layer.read.weight] = jnp.asarray(new, ins[read.weight].dtype)
  if changed:
    now = paths_of(cut) | {k: jnp.asarray(w) for k, w in changed.items()}
    runs = (
      (view.program, norms, arrays, gating.executor(coupling, view, closed))
      for view, _, norms, arrays in calibration
    )
    changed |= restated(now, runs)
  for path, w in changed.items():
    leaves[path] = _placed_like(leaves[path], w)
  return jax.tree.unflatten(jax.tree.structure(variables), list(leaves.values()))


class _Stream(NamedTuple):
  """What the answer of a layer is added to, and how that changes with the answer."""

  value: jax.Array
  slope: Callable[[], jax.Array]


class _Layer(NamedTuple):
  """A layer that a network is about to run.

  Attributes:
    equation: which reads its weight.
    read: how.
    ins: inputs of the equation; what replaces the weight here is run.
    at: index of the layer in each scan that it lies in.
    stream: what its answer is added to; None if that is nothing, or not there yet.
  """

  equation: jx.Equation
  read: Read
  ins: list
  at: tuple[int, ...]
  stream: _Stream | None


def _layers(
  program: jx.Program,
  args: Sequence,
  reads: Mapping[jx.Equation, Read],
  made: Mapping[jx.Value, jx.Equation],
  execute: Callable[[jx.Equation, list], list],
  at: tuple[int, ...] = (),
) -> Generator[_Layer, None, list]:
  """Runs a program, stops before each layer to yield it, and returns the outputs.

  Args:
    program: of a network, or the body of a scan in it.
    args: its inputs.
    reads: the layers that can be refitted, by their equations.
    made: the equation that makes a value, of the whole network.
    execute: (equation, inputs) -> outputs.
    at: index of the body in each scan that it lies in.
  """
  last: dict[jx.Value, jx.Equation | None] = {}  # its last reader
  for e in program.equations:
    total = reads[e].sum if e in reads else None
    last |= dict.fromkeys((*e.inputs, *((total.stream,) if total else ())), e)
  last |= dict.fromkeys(program.outputs)
  given = {**program.constants, **dict(zip(program.inputs, args, strict=True))}
  env = dict(given)

  def value(v: jx.Value) -> Any:
    if isinstance(v, jx.Literal):
      return v.val
    if v not in env:  # a slope may depend on variables that are read later
      e = made[v]
      outs = jx.bind(e, [value(x) for x in e.inputs], e.params, jx.run)
      env.update(zip(e.outputs, outs, strict=True))
    return env[v]

  for e in program.equations:
    ins = [value(v) for v in e.inputs]
    if e in reads:
      stream = None
      if (total := reads[e].sum) and total.stream in env:
        stream = _Stream(env[total.stream], partial(slope, e, total, value))
      yield _Layer(e, reads[e], ins, at, stream)
    if e.name == 'scan' and _has_reads(e, reads):
      outs = yield from _scan_layers(e, ins, reads, made, execute, at)
    else:
      outs = execute(e, ins)
    ins.clear()  # whoever was given the layer still holds this list
    env.update(zip(e.outputs, outs, strict=True))
    for v in (*e.inputs, *e.outputs):
      if last.get(v, e) is e and v not in given:
        env.pop(v, None)
  return [value(v) for v in program.outputs]


def _scan_layers(
  e: jx.Equation,
  ins: list,
  reads: Mapping[jx.Equation, Read],
  made: Mapping[jx.Value, jx.Equation],
  execute: Callable[[jx.Equation, list], list],
  at: tuple[int, ...],
) -> Generator[_Layer, None, list]:
  """As `_layers`, for a scan, whose body is run once for each of its layers."""
  consts, carry, xs = jx.scan_parts(e, ins)
  order = range(e.params['length'])
  stacked = []
  for i in reversed(order) if e.params['reverse'] else order:
    args = [*consts, *carry, *(x[i] for x in xs)]
    outs = yield from _layers(e.bodies[0], args, reads, made, execute, (*at, i))
    carry, ys = outs[: len(carry)], outs[len(carry) :]
    stacked.append(ys)
  along = -1 if e.params['reverse'] else 1
  return [*carry, *(jnp.stack(ys[::along]) for ys in zip(*stacked))]


def _layout(e: jx.Equation, read: Read) -> tuple:
  """What must be the same of a layer in two batches, so that its rows can be joined."""
  return read.path, read.summed, e.inputs[read.weight].shape


def _read_the_same(full: Sequence[_Layer], cut: Sequence[_Layer]) -> bool:
  """Whether layers of two networks read, and add to, the same in all batches."""
  pairs = [(x.ins[x.read.source], z.ins[z.read.source]) for x, z in zip(full, cut)]
  streams = ((x.stream, z.stream) for x, z in zip(full, cut))
  pairs += [(x.value, z.value) for x, z in streams if x and z]
  return all(x is z or jnp.array_equal(x, z) for x, z in pairs)


def _lacking(layer: _Layer, full: _Stream, cut: _Stream) -> jax.Array:
  """What a layer must answer besides, for its sum with a stream to be as in full."""
  slope = cut.slope().astype(jnp.float32)
  is_flat = jnp.abs(slope) <= FLAT * jnp.abs(slope).max(initial=0)
  goal, found = full.value.astype(jnp.float32), cut.value.astype(jnp.float32)
  lost = jnp.where(goal == found, 0, goal - found)  # both may be -inf, in a mask
  more = jnp.where(is_flat, 0, lost / jnp.where(is_flat, 1, slope))
  return answers(layer.equation, layer.read, more)


def _refit(
  goals: Sequence[_Layer], cut: Sequence[_Layer], old: np.ndarray, ridge: float
) -> np.ndarray:
  """The weight with which a layer of the cut network gives nearest to what it should.

  Args:
    goals: the layer in each batch, reading what it should make its outputs of.
    cut: the layer in each batch, in the network that is cut.
    old: its weight as it is read, float64.
    ridge: as for `refit`.
  """
  read = cut[0].read
  inputs = read.kept.size
  counts = [row_count(layer.equation, layer.read) for layer in cut]
  share = ROWS * inputs / max(sum(counts), 1)
  draw = np.random.default_rng(0).choice
  w = flat(read, old).astype(np.float32)
  G, missing = np.zeros((inputs, inputs)), np.zeros(w.shape)
  for goal, layer, count in zip(goals, cut, counts, strict=True):
    drawn = slice(None)
    if share < 1:
      drawn = draw(count, math.ceil(share * count), replace=False)
    z = rows(layer.equation, layer.read, layer.ins)[drawn]
    x, lacking = z, jnp.zeros(())
    if goal is not layer:
      x = rows(goal.equation, goal.read, goal.ins)[drawn]
      if goal.stream and layer.stream:
        lacking = _lacking(layer, goal.stream, layer.stream)[drawn]
    more = _sums(z, x, w, w * read.kept[:, None], lacking)
    G += np.asarray(more[0], float)
    missing += np.asarray(more[1], float)
  _check_finite(read.path, G, missing)
  return fitted(read, old, G, missing, ridge)


@jax.jit
def _sums(
  z: jax.Array, x: jax.Array, w: jax.Array, left: jax.Array, more: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """Sums over rows of z z', and of z times what z' `left` lacks of x' `w` + `more`."""
  with jax.default_matmul_precision('highest'):
    return z.T @ z, z.T @ (x @ w + more - z @ left)


def _upto(program: jx.Program, reads: Mapping[jx.Equation, Read]) -> jx.Program:
  """The program up to the last layer that can be refitted, without outputs."""
  found = (i + 1 for i, e in enumerate(program.equations) if _has_reads(e, reads))
  equations = program.equations[: max(found, default=0)]
  return dataclasses.replace(program, equations=equations, outputs=())


def _has_reads(e: jx.Equation, reads: Mapping[jx.Equation, Read]) -> bool:
  """Whether an equation, or one of its bodies, can be refitted."""
  inner = (each for body in e.bodies for each in body.equations)
  return e in reads or any(_has_reads(each, reads) for each in inner)


def _placed_like(old: Any, new: np.ndarray) -> jax.Array:
  """An array with the sharding of another that may lie on a mesh."""
  place = getattr(old, 'sharding', None)
  return (
    jax.device_put(new, place) if isinstance(place, NamedSharding) else jnp.asarray(new)
  )


def moments(
  coupling: Coupling, variables: Any, batches: Iterable[Any]
) -> dict[str, np.ndarray]:
  """Measures what layers read over a calibration set, for any number of decisions.

  Args:
    coupling: of the network, made by `couple` in evaluation mode.
    variables: its arrays.
    batches: the calibration set, as `refit` takes it.

  Returns:
    {path: float64 [inputs, inputs], in a scan [layers, inputs, inputs]}, for every
    weight that loses inputs: the sum of x x' over what it reads.

  Raises:
    ValueError: no batches, one that is not like the inputs with which the network was
      coupled, or one on which a layer reads numbers that are not finite.
  """
  arguments.coupling(coupling).fits(variables)
  # Every group loses a slice, so every weight that can be cut is.
  groups = coupling.gates()['channels']
  keep = {
    'channels': {g: np.arange(x.size) > 0 for g, x in groups.items() if x.size > 1}
  }
  settled, _ = settle(coupling, keep, variables)
  views = remembered(lambda inputs, kw: coupling.retrace(coupling.fn, inputs, kw))

  @jax.jit
  def measured(variables, inputs, named):
    kwargs = {**coupling.kwargs, **named}
    view = views(inputs, kwargs)
    arrays, _ = split_arrays((inputs, kwargs))
    reads = _cut_reads(view, settled)
    return _moments(view.program, reads, [*jax.tree.leaves(variables), *arrays])

  totals: dict[str, np.ndarray] = {}
  for inputs, named in calls(coupling, batches):
    for path, G in measured(variables, inputs, named).items():
      totals[path] = totals.get(path, 0) + np.asarray(G, float)
  for path, G in totals.items():
    _check_finite(path, G)
  return totals


def _check_finite(path: str, *sums: np.ndarray) -> None:
  """Raises ValueError unless the sums over what a layer reads are finite."""
  if not all(np.isfinite(x).all() for x in sums):
    has = f'what {path} reads is not finite'
    raise arguments.wrong('batches', has, 'look at the inputs and the variables')


def refitted(
  coupling: Coupling,
  variables: Any,
  keep: Mapping,
  moments: Mapping[str, np.ndarray],
  ridge: float = 1e-4,
) -> Any:
  """Refits weights as `refit` does, from what `moments` has measured.

  Args:
    coupling: of the network.
    variables: its arrays.
    keep: the decision that will be cut.
    moments: {path: [inputs, inputs]} of every weight that loses inputs, as `moments`
      returns them.
    ridge: as for `refit`.

  Returns:
    The variables, of the same structure and shapes.

  Raises:
    KeyError: `keep` has a group, branch or exit that the network does not have.
    ValueError: ridge is not above 0.
  """
  arguments.number('ridge', ridge, above=0)
  settled, _ = settle(coupling, keep, variables)
  leaves = paths_of(variables)
  for read in _cut_reads(coupling.view, settled).values():
    stored, G = leaves[read.path], moments[read.path]
    new = np.array(stored)
    for at in np.ndindex(new.shape[: read.loops]):
      w = as_read(read, stored[at])
      missing = G[at][:, ~read.kept] @ flat(read, w)[~read.kept]
      new[at] = as_stored(read, fitted(read, w, G[at], missing, ridge))
    leaves[read.path] = _placed_like(stored, new)
  return jax.tree.unflatten(jax.tree.structure(variables), list(leaves.values()))


def _cut_reads(view: View, settled: Mapping) -> dict[jx.Equation, Read]:
  """The layers that can be refitted and lose inputs."""
  reads = reads_of(view, settled)
  return {e: read for e, read in reads.items() if not read.kept.all()}


def _moments(
  program: jx.Program, reads: Mapping[jx.Equation, Read], args: Sequence
) -> dict[str, jax.Array]:
  """The sum of x x' of what every weight reads, by its path; [layers, ...] in scans."""
  paths = lambda program: [reads[e].path for e in jx.walk(program) if e in reads]

  def run(program: jx.Program, args: Sequence) -> list:
    """The outputs of a program, followed by the moments of `paths(program)`."""
    found: dict[str, jax.Array] = {}

    def execute(e: jx.Equation, ins: list) -> list:
      if e in reads:
        x = rows(e, reads[e], ins)
        found[reads[e].path] = jnp.einsum('ni,nj->ij', x, x, precision='highest')
      if e.name != 'scan':
        return jx.bind(e, ins, e.params, jx.run)
      outputs = jx.bind(e, ins, e.params, run)
      own = len(e.outputs)
      found.update(zip(paths(e.bodies[0]), outputs[own:], strict=True))
      return outputs[:own]

    outputs = jx.interpret(program, args, execute)
    return [*outputs, *(found[path] for path in paths(program))]

  outputs = run(program, args)
  return dict(zip(paths(program), outputs[len(program.outputs) :], strict=True))
