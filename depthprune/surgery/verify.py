"""Compares the small network with the masked one; `prune` always does this."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import jaxlib.version
import numpy as np
from jax.sharding import AxisType, NamedSharding

from depthprune.program import axes as ax
from depthprune.program import jaxpr as jx
from depthprune.program.coupling import Coupling
from depthprune.program.gating import plug
from depthprune.program.resize import slim
from depthprune.program.trace import GONE, paths_of, split_arrays
from depthprune.surgery.plan import gates_of, take, widest

SINGLE, HALF = 1e-4, 5e-2  # tolerances where contractions read 32 and 16 bits
# A deep network may make more of rounding: noise in its arrays as large as the rounding
# of a number is allowed so many times its effect, up to the last.
ROUNDING, AMPLE, LOOSEST = 2.0**-23, 4, 1e-3
# Noise in the arrays, and whether it is in all of them or in those alone that are cut.
# The first is taken that makes nothing overflow and leaves more to see than rounding.
NOISE = 0.3, 0.03, 0.003, 0.0
PROBES = *((noise, True) for noise in NOISE[:-1]), *((noise, False) for noise in NOISE)
PATIENCE_S = 2.0
WAITING = 'depthprune: compiling the masked and the small network, to compare them'
# Compiles three times as fast as XLA:CPU does by itself.
QUICK = {'xla_backend_optimization_level': 0, 'xla_llvm_disable_expensive_passes': True}
if jaxlib.version.__version_info__ < (0, 11):  # the first is gone since, and faster
  QUICK['xla_cpu_use_fusion_emitters'] = False
  QUICK['xla_cpu_parallel_codegen_split_count'] = 1


class Verdict(NamedTuple):
  """How far networks differ: max|a - b| / max|a|, the largest over outputs and probes.

  Attributes:
    difference: of the small network from the masked one.
    settled: of the network masked as settled from the one masked as decided.
    moved: of the masked network from the full one; 0 means that the mask does nothing.
    tolerance: up to this difference the small and the masked network count as the same.
    responsible: where they differ more, one sentence per group that causes it.
    broken: which of the full network's own outputs are not finite; '' if they are.
  """

  difference: float
  settled: float
  moved: float
  tolerance: float
  responsible: tuple[str, ...] = ()
  broken: str = ''


def verify(
  coupling: Coupling,
  variables: Any,
  cut: Any,
  inputs: tuple,
  shrink: Callable[[Any, Mapping], Any],
  asked: Mapping,
  keep: Mapping,
  soft: Mapping,
) -> Verdict:
  """Compares the small network with the masked one, in float32 at highest precision.

  Both run on the given arrays and inputs and on randomised ones, so that zeros hide
  nothing. The mask closes the gates of a group where it can be gated, and zeroes the
  slices of other groups. Two programs are compiled, at once and without optimisation,
  because each of them runs a few times only. Where they differ by more than the
  tolerance, the effect of rounding on the masked network is measured: a deep network
  that amplifies it is allowed more, up to a limit. Beyond that limit the randomised
  arrays are drawn again, nearer to the given ones; in the end only those get noise that
  are cut, as zeros in them could hide something.

  Args:
    coupling: of the network, made by `couple`.
    variables: its arrays.
    cut: the small arrays, shrink(variables, keep).
    inputs: example inputs, arrays or ShapeDtypeStructs.
    shrink: (variables, keep) -> the small variables.
    asked: the complete decision before settling.
    keep: the complete decision after settling.
    soft: {group: [slices]}, values of channel gates that are neither 0 nor 1.
  """
  nothing = {'channels': {}, 'branches': {}}
  (one, tree), (other, settled) = map(jax.tree.flatten, (asked, keep))
  as_asked = tree == settled and all(map(np.array_equal, one, other))
  variables, cut = jax.tree.map(_off_mesh, (variables, cut))
  example = [_off_mesh(x) for x in _concrete(coupling, inputs)]
  masked, small = _compiled(
    (_on_arrays(coupling, plug(coupling.fn, coupling)),
     (*mask(coupling, variables, nothing, {}), example)),
    (_on_arrays(coupling, slim(coupling.fn, coupling, keep)),
     (cut, example)),
  )  # fmt: skip

  def answers(arrays, decision, gates, probe) -> Any:
    outputs = masked(*mask(coupling, arrays, decision, gates), probe)
    return _cut_outputs(coupling, outputs, keep)

  def differences(arrays, cut, probe, reference) -> tuple[float, float]:
    wanted = reference if as_asked else answers(arrays, asked, soft, probe)
    return relative(reference, small(cut, probe)), relative(wanted, reference)

  # The full network has no gates: those of closed channels are 0 and would hide them.
  outputs = answers(variables, nothing, {}, example)
  reference = answers(variables, keep, soft, example)
  moved, given = relative(outputs, reference), reference
  narrow = any(np.dtype(dtype).itemsize < 4 for dtype in _contracted(coupling))
  allowed = HALF if narrow else SINGLE

  def rounding(difference: float, arrays, probe, reference) -> float:
    """The effect of rounding, measured where a difference is too large; else 0."""
    if difference <= allowed:
      return 0.0
    shaken = answers(randomised(arrays, ROUNDING), keep, soft, probe)
    return AMPLE * relative(reference, shaken)

  row = differences(variables, cut, example, reference)
  of_given = rounding(row[0], variables, example, reference)
  small_sizes = {path: np.shape(x) for path, x in paths_of(cut).items()}
  shrunk = {
    path
    for path, x in paths_of(variables).items()
    if small_sizes.get(path) != np.shape(x)
  }
  for noise, everywhere in PROBES:
    arrays = randomised(variables, noise, None if everywhere else shrunk)
    probe = randomised(example, noise)
    reference = answers(arrays, keep, soft, probe)
    if noise and _infinite(reference) > _infinite(given):
      continue
    random_row = differences(arrays, shrink(arrays, keep), probe, reference)
    of_probe = rounding(random_row[0], arrays, probe, reference)
    if of_probe <= LOOSEST:
      break
  difference, changed = map(max, row, random_row)
  if moved == 0:  # where branches begin as 0, for example
    moved = relative(answers(arrays, nothing, {}, probe), reference)
  broken = _broken(outputs, variables)
  tolerance = max(allowed, min(max(of_given, of_probe), LOOSEST))
  verdict = Verdict(difference, changed, moved, tolerance, broken=broken)
  if verdict.difference <= verdict.tolerance:
    return verdict
  if broken:  # no group is to blame
    return verdict._replace(responsible=(broken,))
  blame = _blame(coupling, masked, arrays, probe, shrink, keep, soft, tolerance)
  return verdict._replace(responsible=blame)


def _compiled(*calls: tuple[Callable, tuple]) -> list[Callable]:
  """Compiles functions for their arguments at once, at highest precision.

  Where that takes long, it is said what is waited for.

  Args:
    *calls: (function, its arguments).
  """
  options = QUICK if jax.default_backend() == 'cpu' else None
  said = threading.Timer(PATIENCE_S, print, [WAITING], {'file': sys.stderr})
  said.start()
  try:
    with jax.default_matmul_precision('highest'):
      lowered = [jax.jit(fn).lower(*arguments) for fn, arguments in calls]
    with ThreadPoolExecutor() as pool:
      return [*pool.map(lambda program: program.compile(options), lowered)]
  finally:
    said.cancel()


def _infinite(outputs: Any) -> int:
  """How many numbers among the outputs are not finite."""
  return sum(int((~np.isfinite(widest(x))).sum()) for x in jax.tree.leaves(outputs))


def agrees(coupling: Coupling, fn: Callable, small: Callable, variables: Any) -> bool:
  """Whether a function runs on the small variables and returns what `small` returns.

  Nothing is run where both are the same program. Else they may differ by the rounding
  of the narrowest type that is contracted.
  """
  arrays = _concrete(coupling, coupling.inputs)
  both = [_on_arrays(coupling, run) for run in (fn, small)]
  try:
    # `fn` first: what has its sizes in its code fails before anything is compiled.
    programs = [jx.lean(jx.trace(run, (variables, arrays)).program) for run in both]
    if jx.same(*programs):
      return True
    arguments = variables, arrays
    got, expected = (
      run(*arguments) for run in _compiled(*((run, arguments) for run in both))
    )
  except Exception:  # a network may refuse other sizes in any way
    return False
  floats = (x for x in _contracted(coupling) if jnp.issubdtype(x, jnp.inexact))
  rounding = max((float(jnp.finfo(x).eps) for x in floats), default=0)
  return relative(expected, got) <= min(max(SINGLE, rounding), HALF)


def _contracted(coupling: Coupling) -> set:
  """The types that contractions read."""
  equations = jx.walk(coupling.view.program)
  layers = (e for e in equations if e.name in ('dot_general', 'conv_general_dilated'))
  return {v.dtype for e in layers for v in e.inputs}


def relative(a: Any, b: Any) -> float:
  """Returns max|a - b| / max|a| for the leaf where it is largest.

  It is infinite where only one of the two is finite, or nothing is.
  """
  worst = 0.0
  for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
    x, y = widest(x), widest(y)
    finite = np.isfinite(x)
    alike = np.array_equal(x[~finite], y[~finite], equal_nan=True)
    if not alike or not np.isfinite(y[finite]).all() or (x.size and not finite.any()):
      return np.inf
    if finite.any():
      off, size = np.abs(x[finite] - y[finite]).max(), np.abs(x[finite]).max()
      worst = max(worst, float(off / max(size, 1e-30)))
  return worst


def _broken(outputs: Any, variables: Any) -> str:
  """Says which outputs are NaN somewhere or nowhere finite, and which variables."""

  def names(tree, is_bad):
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    bad = (keys for keys, x in leaves if is_bad(widest(x)))
    name = lambda keys: jax.tree_util.keystr(keys, simple=True, separator='/')
    return ', '.join(name(keys) or 'its only array' for keys in bad)

  useless = lambda x: np.isnan(x).any() or (x.size and not np.isfinite(x).any())
  bad = names(outputs, useless)
  if not bad:
    return ''
  arrays = {p: x for p, x in paths_of(variables).items() if _is_inexact(x)}
  source = names(arrays, lambda x: not np.isfinite(x).all())
  source = f'not finite are the variables {source}' if source else 'look at the inputs'
  return (
    f"the network's own output is not finite before anything is cut ({bad}): {source}"
  )


def randomised(
  variables: Any, noise: float = NOISE[0], paths: Collection[str] | None = None
) -> Any:
  """Returns the arrays with noise, in proportion to their size by default.

  Arrays without negative entries keep that property. Branch gates, integers and keys
  stay, and so do arrays that are not at one of `paths`, where these are given. What
  lies on a mesh stays there.
  """

  def one(seed: int, path: str, x: Any) -> Any:
    stays = paths is not None and path not in paths
    if stays or path.startswith('branches/') or not _is_inexact(x):
      return x
    dtype, wide = x.dtype, np.complex64 if jnp.iscomplexobj(x) else np.float32
    place = getattr(x, 'sharding', None)
    x = np.asarray(x, wide)
    square = float(np.vdot(x, x).real) / max(x.size, 1)
    if not np.isfinite(square):
      finite = np.abs(x[np.isfinite(x)])
      square = float(np.mean(finite**2)) if finite.size else 0.0
    added = _noise(np.random.default_rng(seed), x.shape, wide)
    added *= noise * max(square**0.5, 0.1)
    if wide is np.float32 and (x >= 0).all():
      np.abs(added, out=added)
    added += x
    noisy = added.astype(dtype, copy=False)
    return jax.device_put(noisy, place if isinstance(place, NamedSharding) else None)

  leaves = paths_of(variables)
  with ThreadPoolExecutor() as pool:
    noisy = pool.map(one, range(len(leaves)), *zip(*leaves.items(), strict=True))
    return jax.tree.unflatten(jax.tree.structure(variables), list(noisy))


def _off_mesh(x: Any) -> Any:
  """Returns an array of a mesh with explicit axes as one of a single device.

  The masked and the small network would need other shardings than the given one.
  """
  place = getattr(x, 'sharding', None)
  axes = getattr(getattr(place, 'mesh', None), 'axis_types', ())
  return jnp.asarray(np.asarray(x)) if AxisType.Explicit in axes else x


def _is_inexact(x) -> bool:
  return hasattr(x, 'dtype') and jnp.issubdtype(x.dtype, np.inexact)


def _noise(rng: np.random.Generator, shape: tuple, dtype: Any) -> np.ndarray:
  """Uniform noise of variance 1, of both parts where the dtype is complex."""

  def draw() -> np.ndarray:
    noise = np.asarray(rng.random(shape, np.float32))
    noise -= 0.5
    noise *= 12**0.5
    return noise

  return draw() + 1j * draw() if jnp.issubdtype(dtype, np.complexfloating) else draw()


def _concrete(coupling: Coupling, inputs: tuple) -> list:
  """Returns the arrays of a call; abstract ones and zeros become noise, or 0 and 1."""
  rng = np.random.default_rng(0)

  def one(x):
    if _is_inexact(x) and (isinstance(x, jax.ShapeDtypeStruct) or not np.any(x)):
      return jnp.asarray(_noise(rng, x.shape, x.dtype), x.dtype)
    if not isinstance(x, jax.ShapeDtypeStruct):
      return x
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
      return jnp.broadcast_to(jax.random.key(0), x.shape)
    return jnp.asarray(rng.integers(0, 2, x.shape), x.dtype)

  return [one(x) for x in split_arrays((inputs, coupling.kwargs))[0]]


def _on_arrays(coupling: Coupling, fn: Callable) -> Callable:
  """Returns fn(..., *inputs, **kwargs) as a function of (..., arrays of the call)."""
  _, merge = split_arrays((coupling.inputs, coupling.kwargs))

  def call(*arguments):
    *first, arrays = arguments
    args, named = merge(arrays)
    return fn(*first, *args, **named)

  return call


def mask(
  coupling: Coupling,
  variables: Any,
  keep: Mapping,
  soft: Mapping = MappingProxyType({}),
) -> tuple[Any, dict]:
  """Returns (variables, gates) of the masked network; every gate has an entry."""
  open_ = coupling.gates()
  channels = {
    group: np.asarray(soft.get(group, gate), np.float32)
    for group, gate in open_['channels'].items()
  }
  experts = (g for g in coupling.groups.values() if g.kind == 'expert')
  channels |= {group.name: np.ones(group.size, np.float32) for group in experts}
  zeroed: dict[ax.Var, np.ndarray] = {}
  for name, kept in keep['channels'].items():
    if name in channels:
      channels[name] = channels[name] * np.asarray(kept, np.float32)
      continue
    # A layer that its gates close keeps its arrays, which others may read, too.
    gates = [keep['branches'][b] for b in gates_of(coupling, name)]
    closed = ~np.any(gates, axis=0) if gates else False
    zeroed[coupling.axis(name)] = np.asarray(kept) | closed
  leaves = paths_of(variables)
  branches = {
    b: leaves[f'branches/{b}'] * np.asarray(keep['branches'].get(b, 1), np.float32)
    for b in coupling.branches
  }
  for path, leaf in leaves.items():
    for i, d in enumerate(coupling.axes[path]):
      kept = ax.mask(d, zeroed)
      if not kept.all():
        shape = [-1 if j == i else 1 for j in range(leaf.ndim)]
        leaf = leaf * kept.reshape(shape).astype(leaf.dtype)
    leaves[path] = leaf
  variables = jax.tree.unflatten(jax.tree.structure(variables), list(leaves.values()))
  return variables, {'channels': channels, 'branches': branches}


def _cut_outputs(coupling: Coupling, outputs: Any, keep: Mapping) -> Any:
  """Returns the slices of the outputs that the small network returns."""
  kept = {coupling.axis(g): np.asarray(k) for g, k in keep['channels'].items()}
  leaves = [
    take(x, tuple(ax.mask(d, kept) for d in coupling.view.facts.dims[v]))
    for x, v in zip(jax.tree.leaves(outputs), coupling.view.program.outputs)
  ]
  left = [GONE if 0 in np.shape(x) else x for x in leaves]  # as `slim` returns them
  return coupling.view.outputs_left(coupling.decision(keep), left)


def _blame(
  coupling, masked, arrays, probe, shrink, keep, soft, tolerance
) -> tuple[str, ...]:
  """Names the groups for which the networks differ when they alone are closed."""
  sentences = []
  for name, kept in keep['channels'].items():
    if np.all(kept):
      continue
    branches = {b: keep['branches'][b] for b in gates_of(coupling, name)}
    alone = {'channels': {name: kept}, 'branches': branches, 'exits': keep['exits']}
    small = _on_arrays(coupling, slim(coupling.fn, coupling, alone))
    outputs = masked(*mask(coupling, arrays, alone, soft), probe)
    reference = _cut_outputs(coupling, outputs, alone)
    got = small(shrink(arrays, alone), probe)
    if (difference := relative(reference, got)) > tolerance:
      group = coupling.groups[name]
      tensors = ', '.join(path for path, _ in group.members)
      why = group.ungated or 'something that does not carry the axis writes to it'
      sentences.append(f'{name}: off by {difference:.1e}: {why}. Tensors: {tensors}')
  return tuple(sentences) or ('no group alone differs: only their combination does',)
