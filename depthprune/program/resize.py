"""The small network of any function, which is the same program at its new sizes.

Inputs may have symbolic sizes (`jax.export`). Such an input is traced with a number in
the place of the symbol, at three different numbers: where only sizes differ between the
three programs, the symbol is put back wherever the number was.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from depthprune.program import arguments, routing, rules
from depthprune.program import axes as ax
from depthprune.program import jaxpr as jx
from depthprune.program.coupling import Coupling
from depthprune.program.magnitudes import root
from depthprune.program.modules import runnable
from depthprune.program.trace import (
  GONE,
  View,
  abstract,
  is_array,
  paths_of,
  remembered,
  split_arrays,
)

NUMBER = 3  # stands for a symbol while tracing; 1 could be broadcast
OTHERS = NUMBER + 1, NUMBER + 2


class Origin(NamedTuple):
  """What a function of `slim` was made of; `cut_from` of the function holds it."""

  model: Any
  coupling: Coupling
  keep: Mapping


def origins(model: Any) -> list[Origin]:
  """Returns the cuts that led to a network, first to last; none for a full network."""
  origin = getattr(model, 'cut_from', None)
  return [*origins(origin.model), origin] if isinstance(origin, Origin) else []


def slim(model: Any, coupling: Coupling, keep: Mapping) -> Callable:
  """Returns the network that is left after a decision, as a function.

  The model is traced at its full sizes, once per input shapes and mode. Dead equations
  are removed, and all others run at the sizes that `keep` leaves. `prune` calls this
  and cuts the variables to match.

  Args:
    model: the network that was coupled: a linen module, or a function of (variables,
      *inputs, **kwargs).
    coupling: made by `couple`.
    keep: {'channels': {group: bool [slices]}, 'branches': {path: bool}, 'exits':
      {name: bool}}. What is missing is kept. Branches that are kept count as 1, because
      `prune` has multiplied their gates into the arrays.

  Returns:
    f(small_variables, *inputs, **kwargs), for every input shape and mode of the model;
    sizes of inputs may be symbolic (`jax.export`). What `couple` found to be carried
    from call to call, such as a key/value cache, may be that of the full network too,
    and is returned small. It raises ValueError for a variable that is missing or has
    another shape than `keep` leaves, and where the program depends on a symbolic size
    in more than its shapes.

  Raises:
    KeyError: `keep` has a group that the coupling does not have.
  """
  fn = runnable(model)
  arguments.coupling(coupling)
  arguments.parts('keep', keep, known=('exits',))
  views = remembered(lambda inputs, kwargs: coupling.retrace(fn, inputs, kwargs, keep))
  channels = keep.get('channels', {})
  cut = [group for group, slices in channels.items() if not np.all(slices)]
  for group, slices in channels.items():
    coupling.has_size(group, slices)
  masks = functools.cache(lambda: decided(coupling.view, keep))

  def small(variables, *inputs, **kwargs):
    full, values = _uncut(coupling, masks, inputs, kwargs)
    arrays, merge = split_arrays(full)
    with _explained(coupling, kwargs):
      view = views(*merge([_numbered(x, NUMBER) for x in arrays]))
    coupling.check_view(view, cut)
    kept = decided(view, keep)
    symbols = _symbolic_sizes(view, arrays)
    written = {}
    if symbols:
      # Tracing with the symbols lets jax refuse a program that branches on them.
      call = lambda v, arrays: fn(v, *merge(arrays)[0], **merge(arrays)[1])
      jx.trace(call, (coupling.variables, abstract(arrays)))
      others = (merge([_numbered(x, n) for x in arrays]) for n in OTHERS)
      written = _written(view, [views(*other) for other in others], symbols)
    flat = [*_arguments(view, kept, variables), *values]
    outs = rebound(view.facts, kept, symbols, written)(view.program, flat)
    return view.unpack([GONE if 0 in np.shape(x) else x for x in outs])

  small.cut_from = Origin(model, coupling, keep)
  return small


def decided(view: View, keep: Mapping) -> dict[ax.Var, np.ndarray]:
  """Returns the masks of a view's axis variables for a decision on groups.

  Raises:
    ValueError: the view couples slices that `keep` treats differently.
  """
  kept: dict[ax.Var, np.ndarray] = {}
  for group, slices in keep.get('channels', {}).items():
    try:
      ax.assign(view.groups[group], np.asarray(slices, bool), kept)
    except ax.LayoutError as error:
      raise ValueError(
        f'{group}: {error}; couple() the function in this mode and at these shapes'
      ) from None
  return kept


@contextlib.contextmanager
def _explained(coupling: Coupling, kwargs: dict) -> Iterator[None]:
  """Says of a call that fails which of its arguments were not there at the coupling."""
  try:
    yield
  except Exception as error:
    for name in kwargs.keys() - coupling.kwargs.keys():
      how = f'couple(..., {name}=...) finds how it is cut'
      error.add_note(f'{name}: the network was coupled without it; {how}')
    raise


def _uncut(
  coupling: Coupling, kept: Callable[[], ax.Keep], inputs: tuple, kwargs: dict
) -> tuple[tuple, list]:
  """Returns (inputs, kwargs) of a call at full sizes, and the arrays of the small call.

  They differ in what is carried from call to call. Of that an array that nothing reads
  after the cut may be absent; None takes its place.

  Raises:
    ValueError: an array has neither the size of the full network nor that of the small.
  """
  names = {path.split('/')[0]: None for path in coupling.carried}
  before = {name: coupling.kwargs[name] for name in names if kwargs.get(name)}
  if not before:
    return (inputs, kwargs), split_arrays((inputs, kwargs))[0]
  given = paths_of({name: kwargs[name] for name in before})
  sizes: dict[ax.Axis, Any] = {}  # of the axes that are not cut, as they are here
  for path in given.keys() & coupling.carried.keys():
    sizes |= zip(map(ax.norm, coupling.carried[path]), given[path].shape, strict=True)
  leaves, values = [], {}
  for path, leaf in paths_of(before).items():
    dims, x = coupling.carried.get(path), given.get(path)
    if dims is None:  # an input as any other
      leaves.append(x)
      continue
    masks = [ax.mask(d, kept()) for d in dims]
    uncut = [sizes.get(ax.norm(d), d.size) if m.all() else None
             for d, m in zip(dims, masks, strict=True)]  # fmt: skip
    full = tuple(len(m) if n is None else n for n, m in zip(uncut, masks))
    small = tuple(int(m.sum()) if n is None else n for n, m in zip(uncut, masks))
    if x is not None and np.shape(x) not in (full, small):
      has = f'has shape {np.shape(x)}, expected {small} or {full}'
      raise arguments.wrong(path, has)
    leaves.append(jax.ShapeDtypeStruct(full, leaf.dtype))
    values[f'1/{path}'] = x if x is None or np.shape(x) == small else _take(x, masks)
  whole = jax.tree.unflatten(jax.tree.structure(before), leaves)
  call = inputs, {**kwargs, **whole}
  named = {p: x for p, x in paths_of(call).items() if is_array(x)}
  return call, [values.get(path, x) for path, x in named.items()]


def rebound(
  facts: ax.Facts,
  kept: ax.Keep,
  symbols: Mapping[ax.Var, Any] = jx.NOTHING,
  written: Mapping[jx.Literal, Any] = jx.NOTHING,
) -> Callable:
  """Returns run(program, args), which runs a program at the sizes that `kept` leaves.

  Args:
    facts: the axes of every value of the program.
    kept: bool [size] for each axis variable that is cut.
    symbols: symbolic sizes of axis variables.
    written: values that replace those of some literals.
  """
  derived: dict[jx.Equation, Callable] = {}
  renumbered = routing.experts(facts)  # those that are left are numbered anew

  def masks(v: jx.Value) -> list[np.ndarray]:
    return [ax.mask(d, kept) for d in facts.dims[v]]

  def run(program: jx.Program, args: Sequence) -> list:
    constants = {v: _take(c, masks(v)) for v, c in program.constants.items()}
    resized = jx.Program(program.inputs, constants, program.equations, program.outputs)
    return jx.interpret(resized, args, execute, written)

  def execute(e: jx.Equation, ins: list) -> list:
    outs = [masks(v) for v in e.outputs]
    if e.name in rules.ANY_SHAPE:  # slices of the full network's random bits
      full = jx.bind(e, ins, e.params, run)
      return [_take(x, m) for x, m in zip(full, outs, strict=True)]
    params = _resized(e, masks, facts, lambda axis: ax.count(axis, kept, symbols))
    if e.name == 'iota' and not outs[0][k := params['dimension']].all():
      sizes = list(params['shape'])
      sizes[k] = len(outs[0][k])
      if ax.norm(facts.dims[e.outputs[0]][k]) not in renumbered:
        (full,) = jx.bind(e, ins, {**params, 'shape': tuple(sizes)}, run)
        return [jnp.take(full, np.flatnonzero(outs[0][k]), axis=k)]
    if e.name == 'scan' and params['length'] == 0:  # all layers are gone
      _, carry, _ = jx.scan_parts(e, ins)
      empty = zip(e.outputs[len(carry) :], outs[len(carry) :], strict=True)
      return [*carry, *(jnp.zeros([m.sum() for m in ms], v.dtype) for v, ms in empty)]
    if e.name == 'sqrt' and e.inputs[0] in facts.magnitudes:
      return [root(*ins)]
    return jx.bind(e, ins, params, run, derive)

  def derive(e: jx.Equation) -> Callable:
    if e not in derived:
      derived[e] = _derivative(e, facts, kept, symbols)
    return derived[e]

  return run


def _arguments(view: View, kept: dict, variables: Any) -> list:
  """Returns the leaves of the small variables in the order of the program's inputs."""
  _, needed = jx.live(view.program)
  leaves = paths_of(variables)
  args = []
  for path, v in view.leaves.items():
    leaf = leaves.get(path)
    args.append(leaf)
    if v not in needed:
      continue
    expected = tuple(ax.count(d, kept) for d in view.facts.dims[v])
    if 0 in expected and leaf is None:  # all layers of a scan are gone
      args[-1] = jnp.zeros(expected, v.dtype)
    elif leaf is None:
      raise ValueError(f'{path}: missing in the variables of the small network')
    elif np.shape(leaf) != expected:
      raise ValueError(
        f'{path}: has shape {np.shape(leaf)}, keep leaves {expected} of {v.shape}'
      )
  return args


def _take(x, masks):
  for axis, m in enumerate(masks):
    if not m.all():
      x = jax.numpy.take(x, np.flatnonzero(m), axis=axis)
  return x


def _derivative(
  e: jx.Equation, facts: ax.Facts, kept: ax.Keep, symbols: Mapping[ax.Var, Any]
) -> Callable:
  """Returns the derivative rule of a custom call at its new sizes."""
  program = jx.derivative(e)
  smooth_in = [v for v in e.inputs if jx.differentiable(v)]
  smooth_out = [v for v in e.outputs if jx.differentiable(v)]
  rest = smooth_in if e.name == 'custom_jvp_call' else smooth_out
  memo: dict[ax.Var, ax.Var] = {}
  dims = [[ax.copy(d, memo) for d in facts.dims[v]] for v in (*e.inputs, *rest)]
  inner = ax.Facts()
  rules.infer(inner, program, dims)
  inside: dict[ax.Var, np.ndarray] = {}
  for outer, copied in memo.items():
    if outer in kept:
      ax.assign(copied, kept[outer], inside)
  copies = ((ax.norm(memo.get(v, v)), n) for v, n in symbols.items())
  named = {axis: n for axis, n in copies if isinstance(axis, ax.Var)}
  return functools.partial(rebound(inner, inside, named), program)


def _resized(e: jx.Equation, masks, facts: ax.Facts, count: Callable) -> dict:
  """Returns the parameters of an equation at its new sizes.

  `masks` maps a value to the bool masks of its axes, `count` an axis to its new size.
  """
  p = dict(e.params)
  outs = [[*map(count, facts.dims[v])] for v in e.outputs]
  shape = tuple(outs[0]) if outs else ()
  if e.name in ('broadcast_in_dim', 'iota'):
    p['shape'] = shape
  elif e.name == 'reshape':
    p['new_sizes'] = shape
  elif e.name == 'dynamic_slice':
    p['slice_sizes'] = shape
  elif e.name == 'conv_general_dilated' and e in facts.hidden:
    p['feature_group_count'] = count(facts.hidden[e])
  elif e.name == 'scan':
    p['length'] = count(facts.hidden[e])
  elif e.name == 'tile':
    before = map(count, facts.dims[e.inputs[0]])
    p['reps'] = tuple(n // m if m else 1 for n, m in zip(shape, before, strict=True))
  elif e.name == 'split':
    p['sizes'] = tuple(sizes[p['axis']] for sizes in outs)
  elif e.name == 'gather':
    p['slice_sizes'] = tuple(
      count(d) if n == d.size else n
      for n, d in zip(p['slice_sizes'], facts.dims[e.inputs[0]], strict=True)
    )
  elif e.name == 'slice':
    _resize_slice(p, masks(e.inputs[0]), [*map(count, facts.dims[e.inputs[0]])])
  return p


def _resize_slice(p: dict, masks: list[np.ndarray], sizes: list):
  starts, limits = list(p['start_indices']), list(p['limit_indices'])
  for i, (m, size) in enumerate(zip(masks, sizes, strict=True)):
    if m.all():
      limits[i] = size if limits[i] == m.size else limits[i]
      continue
    if p['strides'] is None or p['strides'][i] == 1:
      starts[i], limits[i] = int(m[: starts[i]].sum()), int(m[: limits[i]].sum())
    else:  # layout.strided allows to cut whole periods only, so the offset stays
      limits[i] = int(m.sum())
  p['start_indices'], p['limit_indices'] = tuple(starts), tuple(limits)


# ---- symbolic sizes ------------------------------------------------------------------


def _numbered(x: Any, number: int) -> Any:
  """The shape of an array with a number for every symbol; x where it has none."""
  if all(isinstance(n, int) for n in getattr(x, 'shape', ())):
    return x
  shape = tuple(n if isinstance(n, int) else number for n in x.shape)
  return jax.ShapeDtypeStruct(shape, x.dtype)


def _symbolic_sizes(view: View, arrays: Sequence) -> dict[ax.Var, Any]:
  """The symbol of each axis variable that has one, for a view of numbered arrays."""
  symbols: dict[ax.Var, Any] = {}
  data = view.program.inputs[len(view.leaves) :]
  for v, x in zip(data, arrays, strict=True):
    for d, n in zip(view.facts.dims[v], x.shape, strict=True):
      if isinstance(n, int):
        continue
      axis = ax.norm(d)
      if not isinstance(axis, ax.Var) or symbols.setdefault(axis, n) != n:
        raise ValueError(f'size {n}: the function divides this axis; choose a number')
  return symbols


def _written(view: View, others: Sequence[View], symbols: Mapping) -> dict:
  """The symbol for every literal in which the size of an input is written.

  `view` was traced with NUMBER in the place of symbols, `others` with OTHERS.
  """
  full = lambda v: [ax.mask(d, {}) for d in view.facts.dims[v]]
  depends = lambda e: ValueError(
    f'{e.where}: depends on the size of an input; choose a number'
  )
  equations = [[*jx.walk(each.program)] for each in (view, *others)]
  if len({tuple(e.name for e in each) for each in equations}) > 1:
    raise ValueError('its equations depend on the size of an input; choose a number')
  literals: set[jx.Literal] = set()
  for e, *same in zip(*equations, strict=True):
    for v, *alike in zip(e.inputs, *(other.inputs for other in same), strict=True):
      if not isinstance(v, jx.Literal) or v.val is None:
        continue
      values = [v.val, *(getattr(other, 'val', None) for other in alike)]
      if v.shape == () and values == [NUMBER, *OTHERS]:
        literals.add(v)
      elif not _alike(*values):
        raise depends(e)
    for number, other in zip(OTHERS, same, strict=True):
      sizes = dict.fromkeys(symbols, number)
      count = functools.partial(ax.count, keep={}, symbols=sizes)
      params = _resized(e, full, view.facts, count)
      plain = {p: x for p, x in other.params.items() if _is_plain(x)}
      if any(x != params.get(p) for p, x in plain.items()):
        raise depends(e)
  constants = [[*each.program.constants.values()] for each in (view, *others)]
  if len({*map(len, constants)}) > 1 or not all(map(_alike, *constants)):
    raise ValueError('a constant depends on the size of an input; choose a number')
  first, *more = dict.fromkeys(symbols.values())
  if literals and more:
    raise ValueError('one of several sizes is written as a number; choose numbers')
  return {literal: jnp.asarray(first).astype(literal.dtype) for literal in literals}


def _alike(first: Any, *others: Any) -> bool:
  same = lambda x: x is first or np.array_equal(x, first)
  return all(map(same, others)) or all(map(np.all, map(np.isnan, (first, *others))))


def _is_plain(x: Any) -> bool:
  """Whether a parameter consists of integers and strings; only these hold sizes."""
  if isinstance(x, tuple):
    return all(map(_is_plain, x))
  return x is None or isinstance(x, int | str | np.integer)
