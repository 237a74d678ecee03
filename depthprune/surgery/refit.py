"""Weights that make up for removed channels, by least squares: no training, no labels.

What a layer reads from channels that go is predicted from what it reads from those that
stay, and the prediction is folded into its weights:

  y = W_k x_k + W_r x_r,   x_r ~ A x_k,   A = G_rk (G_kk + lambda I)^-1
  W_k <- W_k + W_r A

  x        what the layer reads, of a convolution its whole window: x_k from channels
           that stay, x_r from those that go
  G        the mean of x x' over a calibration set
  lambda   `ridge` times the mean of the diagonal of G_kk

Only the full network is run, once, in batches. The arrays change before the cut, so
what `prune` proves stays the same: the small network is the full one with closed gates.
Where gates were trained, the network has learnt to do without what they closed, and
there is nothing to make up for.

Source: Chee, Flynn, Damle, De Sa, arXiv 2108.00065, for the folding. There a
decomposition also chooses the channels that stay; here any decision does.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from depthprune.program import arguments
from depthprune.program import axes as ax
from depthprune.program import jaxpr as jx
from depthprune.program.coupling import Coupling
from depthprune.program.resize import decided
from depthprune.program.trace import View, paths_of, remembered, split_arrays
from depthprune.surgery.activations import calls
from depthprune.surgery.settle import settle

MOVES = frozenset(('convert_element_type', 'reshape', 'rev', 'squeeze', 'transpose'))
TINY = 1e-30  # keeps layers solvable that read nothing but zeros


class Read(NamedTuple):
  """An equation that sums over axes that are cut, of activations and of a weight.

  Attributes:
    path: of the weight.
    loops: number of scans that it lies in, each of which runs over its leading axis.
    moves: equations that bring the weight into the shape that is read, in order.
    source: which input of the equation has the activations.
    over: the axes of the activations that are summed over.
    summed: the axes of the weight that are summed over, as it is read.
    kept: bool [product of these axes], what stays of them.
  """

  path: str
  loops: int
  moves: tuple[jx.Equation, ...]
  source: int
  over: tuple[int, ...]
  summed: tuple[int, ...]
  kept: np.ndarray


def refit(
  coupling: Coupling,
  variables: Any,
  keep: Mapping,
  batches: Iterable[Any],
  ridge: float = 1e-4,
) -> Any:
  """Makes the weights that stay do the work of the channels that go, by least squares.

  It takes seconds, needs neither labels nor gradients, and stands between the decision
  and the cut of a network that was trained without gates::

    keep = dp.oneshot(coupling, variables, '50%')
    variables = dp.refit(coupling, variables, keep, [images[:512]])
    pruned = dp.prune(model, variables, keep, images[:1], train=False)

  Batch statistics are those of before: `recalibrate` measures them anew, as after any
  cut.

  Layers are refitted one by one, each as if what it reads were still that of the full
  network. Compare on held-out data: where gates learnt together what may go, a layer
  may no longer need what another no longer writes, and a refit can do harm.

  Args:
    coupling: of the network, made by `couple` in evaluation mode.
    variables: its arrays.
    keep: the decision that will be cut, as `oneshot` or a method's `decide` returns it.
    batches: the calibration set, in batches of any sizes, as `activations` takes it. It
      should have several times as many examples, positions included, as a layer has
      inputs.
    ridge: how far the weights are held back, relative to the mean square of what they
      read; above 0.

  Returns:
    The variables, of the same structure and shapes. What is refitted is every dense
    layer, einsum or convolution whose weight is stored as a variable, read once, and
    loses inputs; layers of a scan too. Grouped convolutions, weights of batched
    products (experts), shared ones and those that are complex or integers are as they
    were.

  Raises:
    KeyError: `keep` has a group, branch or exit that the network does not have.
    ValueError: ridge is not above 0; no batches, one that is not like the inputs with
      which the network was coupled, or one on which a layer reads numbers that are not
      finite.

  Memory: a square matrix for every layer that is refitted, of its number of inputs, for
  a convolution times its window.

  Source: Chee, Flynn, Damle, De Sa, arXiv 2108.00065.
  """
  arguments.number('ridge', ridge, above=0)
  measured = moments(coupling, variables, batches, keep)
  return refitted(coupling, variables, keep, measured, ridge)


def moments(
  coupling: Coupling,
  variables: Any,
  batches: Iterable[Any],
  keep: Mapping | None = None,
) -> dict[str, np.ndarray]:
  """Measures what layers read over a calibration set, for any number of decisions.

  Args:
    coupling: of the network, made by `couple` in evaluation mode.
    variables: its arrays.
    batches: the calibration set, as `refit` takes it.
    keep: the decision that will be cut; None to measure for any decision.

  Returns:
    {path: float64 [inputs, inputs], in a scan [layers, inputs, inputs]}, for every
    weight that loses inputs: the sum of x x' over what it reads.

  Raises:
    ValueError: no batches, one that is not like the inputs with which the network was
      coupled, or one on which a layer reads numbers that are not finite.
  """
  arguments.coupling(coupling).fits(variables)
  if keep is None:  # every group loses a slice, so every weight that can be cut is
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
    reads = _reads_of(view, settled)
    return _moments(view.program, reads, [*jax.tree.leaves(variables), *arrays])

  totals: dict[str, np.ndarray] = {}
  for inputs, named in calls(coupling, batches):
    for path, G in measured(variables, inputs, named).items():
      totals[path] = totals.get(path, 0) + np.asarray(G, float)
  for path, G in totals.items():
    if not np.isfinite(G).all():
      has = f'what {path} reads is not finite'
      raise arguments.wrong('batches', has, 'look at the inputs and the variables')
  return totals


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
  for read in _reads_of(coupling.view, settled).values():
    stored = leaves[read.path]
    new = _refitted(read, stored, moments[read.path], ridge)
    place = getattr(stored, 'sharding', None)
    on_mesh = isinstance(place, NamedSharding)
    leaves[read.path] = jax.device_put(new, place) if on_mesh else new
  return jax.tree.unflatten(jax.tree.structure(variables), list(leaves.values()))


def _reads_of(view: View, settled: Mapping) -> dict[jx.Equation, Read]:
  """The equations of a network whose weights can be refitted after a decision."""
  return dict(_reads(view, view.program, _stored(view), decided(view, settled)))


def _stored(view: View) -> dict[jx.Value, tuple[str, int]]:
  """{value: (path of the variable, number of scans that it lies in)}."""
  return {v: (path, 0) for path, v in view.leaves.items()}


def _reads(
  view: View,
  program: jx.Program,
  stored: Mapping[jx.Value, tuple[str, int]],
  kept: ax.Keep,
) -> Iterator[tuple[jx.Equation, Read]]:
  """Yields the equations whose weights can be refitted, also those in scans."""
  made_by = {v: e for e in program.equations for v in e.outputs}
  uses = Counter(v for e in program.equations for v in e.inputs)
  for e in program.equations:
    if (sides := _sides(view, e)) is not None:
      source, over, weight, summed = sides
      dims = view.facts.dims[e.inputs[weight]]
      mask = np.ones(1, bool)
      for i in summed:
        mask = np.outer(mask, ax.mask(dims[i], kept)).ravel()
      v, moves = e.inputs[weight], []
      while uses[v] == 1 and v in made_by and made_by[v].name in MOVES:
        moves.insert(0, made_by[v])
        v = made_by[v].inputs[0]
      real = all(jnp.issubdtype(a.dtype, jnp.floating) for a in (v, *e.outputs))
      if real and uses[v] == 1 and v in stored and mask.any() and not mask.all():
        path, loops = stored[v]
        yield e, Read(path, loops, tuple(moves), source, over, summed, mask)
    if e.name == 'scan':
      (body,) = e.bodies
      scanned = zip(*(jx.scan_parts(e, x)[2] for x in (e.inputs, body.inputs)))
      inside = {
        inner: (stored[v][0], stored[v][1] + 1)
        for v, inner in scanned
        if v in stored and uses[v] == 1
      }
      yield from _reads(view, body, inside, kept)


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
        x = _rows(e, reads[e], ins)
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


def _rows(e: jx.Equation, read: Read, ins: Sequence) -> jax.Array:
  """What a weight reads, float32 [examples and positions, inputs of the layer]."""
  x = ins[read.source].astype(jnp.float32)
  over = read.over
  if e.name == 'conv_general_dilated':
    p = e.params
    lhs, rhs, _ = p['dimension_numbers']
    n = len(rhs) - 2
    x = jax.lax.conv_general_dilated_patches(
      x,
      [ins[1].shape[i] for i in rhs[2:]],
      p['window_strides'],
      p['padding'],
      p['lhs_dilation'],
      p['rhs_dilation'],
      jax.lax.ConvDimensionNumbers(lhs, (n + 1, n, *range(n)), lhs),
      precision=jax.lax.Precision.HIGHEST,
    )
  return jnp.moveaxis(x, over, range(-len(over), 0)).reshape(-1, read.kept.size)


def _refitted(read: Read, stored: Any, G: np.ndarray, ridge: float) -> jax.Array:
  """The weight as it is stored, with what it reads from removed channels folded in."""
  if read.loops:
    inner = read._replace(loops=read.loops - 1)
    layers = zip(stored, G, strict=True)
    return jnp.stack([_refitted(inner, w, g, ridge) for w, g in layers])
  w = np.asarray(stored).astype(float)
  for move in read.moves:
    if move.name == 'transpose':
      w = w.transpose(move.params['permutation'])
    elif move.name == 'rev':
      w = np.flip(w, move.params['dimensions'])
    w = w.reshape(move.outputs[0].shape)
  front = range(len(read.summed))
  w = np.moveaxis(w, read.summed, front)
  kept = read.kept
  flat = w.reshape(kept.size, math.prod(w.shape[len(front) :]))
  G_kk = G[np.ix_(kept, kept)]
  G_kk += (ridge * np.diag(G_kk).mean() + TINY) * np.eye(len(G_kk))
  A = np.linalg.solve(G_kk, G[np.ix_(kept, ~kept)])
  flat[kept] += A @ flat[~kept]
  w = np.moveaxis(flat.reshape(w.shape), front, read.summed)
  for move in reversed(read.moves):
    if move.name == 'transpose':
      w = w.transpose(np.argsort(move.params['permutation']))
    elif move.name == 'rev':
      w = np.flip(w, move.params['dimensions'])
    w = w.reshape(move.inputs[0].shape)
  return jnp.asarray(w.astype(stored.dtype))
