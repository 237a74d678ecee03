"""Values inside a network, by the names of its modules, and its residual units.

Names are read from the traced program. Where a library writes the path of each module
into it, as linen and haiku do, a value is the module's output. Elsewhere (NNX, Equinox,
plain functions) the paths of the arrays that are read say which module computes.

  block1/conv      what the module block1/conv returns
  block1           what block1 returns; without written names, what follows its last
                   array up to the next layer: its activation, a sum with a shortcut
  block1/conv/out  what follows block1/conv up to the next layer, if nothing else has
                   that value
  block1:1         the second call of a module that is called several times

A residual unit is a sum x + F(x), where F reads a layer's arrays. In the body of a scan
over layers, whose arrays are stacked, it is a unit of every layer.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from depthprune.program import axes as ax
from depthprune.program import cost, modules
from depthprune.program import jaxpr as jx
from depthprune.program.deadcode import LAYOUT
from depthprune.program.trace import View, look

LAYERS = ('dot_general', 'conv_general_dilated', 'gather', 'scan', 'while', 'cond')
SELECTING = ('slice', 'dynamic_slice', 'gather')  # one token of a sequence, say
CASTS = frozenset(('add', 'add_any', *LAYOUT))  # what a sum is followed through

Place = tuple[str, ...]  # path of a module


class Tap(NamedTuple):
  """A value inside a network, on which a head can be put.

  Attributes:
    name: path of the module that returns it, see `depthprune.program.taps`.
    shape: its shape, for the inputs that were given.
    dtype: type of its elements.
    flops: FLOPs that lead to it (1 MAC = 2 FLOPs), for the inputs that were given.
    params: number of parameters that it depends on.
    narrow: whether it is the last value between two layers from which everything later
      is computed: a good place for an exit.
  """

  name: str
  shape: tuple[int, ...]
  dtype: Any
  flops: int
  params: int
  narrow: bool


class Taps(tuple[Tap, ...]):
  """The taps of a network in order of execution; `print(taps)` shows a table."""

  def __repr__(self) -> str:
    if not self:
      return 'no taps'
    wide = max(len(tap.name) for tap in self)
    lines = [
      f'{"*" if tap.narrow else " "} {tap.name:{wide}}  {tap.dtype}{list(tap.shape)}: '
      f'{tap.flops:,} FLOPs, {tap.params:,} parameters'
      for tap in self
    ]
    return '\n'.join((*lines, '* all that follows is computed from it'))


class Branch(NamedTuple):
  """The branch F of a residual unit x + F(x): an input of the equation of the sum.

  Attributes:
    sum: that equation.
    side: which of its inputs.
    scan: the scan over layers in whose body it is, or None.
  """

  sum: jx.Equation
  side: int
  scan: jx.Equation | None = None

  @property
  def shape(self) -> tuple[int, ...]:
    """The shape of its gate: (), or [layers] in a scan."""
    return () if self.scan is None else (self.scan.params['length'],)


class Inside(NamedTuple):
  """What a traced network has inside.

  Attributes:
    values: every value that has a name, in order of execution.
    narrow: names of the values that all later ones are computed from, one between any
      two layers.
    units: the residual units, in order of execution.
    channels: by number of axes, which axis of features counts channels.
  """

  values: dict[str, jx.Value]
  narrow: tuple[str, ...]
  units: dict[str, Branch]
  channels: dict[int, int]


def taps(model: Any, variables: Any, *inputs: Any, **kwargs: Any) -> Taps:
  """Lists the values inside a network, where heads can be put, with their cost.

      from depthprune.models.heads import Head, WithHeads
      print(dp.taps(model, variables, images))
      trunk = dp.trunk(model, variables, images)
      network = WithHeads(trunk, {'early': Head('block1', classes=10)})

  Args:
    model: a network of any kind, as for `couple`.
    variables: its arrays or their shapes.
    *inputs: arrays or ShapeDtypeStructs, or trees of them.
    **kwargs: further arguments of the call. The network is in evaluation unless they
      say train=True, which every kind of network understands.

  Returns:
    The Taps. Values inside a scan are not among them: unroll the loop, or scan in
    segments, each of which ends in a tap.
  """
  modules.checked_call(model, variables, inputs)
  shapes, call = modules.collected(model, variables), modules.updating(model, variables)
  run = lambda arrays, *inputs, **kwargs: call(arrays, *inputs, **kwargs)[0]
  arrays = jax.eval_shape(lambda x: x, shapes)
  dims = {path: ax.fresh(x.shape) for path, x in arrays.items()}
  with modules.explained(variables, inputs):
    view = look(run, arrays, tuple(inputs), {'train': False, **kwargs}, dims)
  found = inside(view.program, view.leaves)
  names = {v: name for name, v in reversed(found.values.items())}
  names |= {found.values[name]: name for name in found.narrow}
  costs = _costs(view, names)
  return Taps(
    Tap(name, v.shape, v.dtype, *costs[v], narrow=name in found.narrow)
    for name, v in found.values.items()
    if names[v] == name
  )


def _costs(view: View, values: Collection[jx.Value]) -> dict[jx.Value, tuple[int, int]]:
  """Returns the FLOPs that lead to each of some values, and the parameters."""
  amounts: list[tuple[int, int]] = []
  above: dict[jx.Value, int] = {}  # bit i: amounts[i] is part of the cost
  for path, v in view.leaves.items():
    if path.startswith('params/'):
      above[v] = 1 << len(amounts)
      amounts.append((0, math.prod(v.shape)))
  for e in view.program.equations:
    bits = functools.reduce(int.__or__, (above.get(v, 0) for v in e.inputs), 0)
    alone = dataclasses.replace(view.program, equations=(e,))
    if flops := cost.of_program(view, alone):
      bits |= 1 << len(amounts)
      amounts.append((flops, 0))
    above.update(dict.fromkeys(e.outputs, bits))
  led = {v: [a for i, a in enumerate(amounts) if above[v] >> i & 1] for v in values}
  return {v: (sum(f for f, _ in a), sum(p for _, p in a)) for v, a in led.items()}


def inside(program: jx.Program, leaves: Mapping[str, jx.Value]) -> Inside:
  """Finds the values of a network that have names, and its residual units.

  Args:
    program: the traced network; only what its outputs need is looked at.
    leaves: the program's input for every variable, by path, 'params/MODULE/kernel'. All
      other inputs but random keys are data.
  """
  program = jx.lean(program)
  fed = {v: frozenset((path,)) for path, v in leaves.items()}
  is_key = lambda v: jnp.issubdtype(v.dtype, jax.dtypes.prng_key)
  data = {v for v in program.inputs if v not in fed and not is_key(v)}
  flow = _flow(program, fed, data, set())
  places, written = _places(flow)
  units, hidden = _units(flow)
  narrow = [each for each in _narrow(flow) if flow.made[each[2]] not in hidden]
  named: dict[str, jx.Value] = {}
  for place, first, last in _runs(places):
    v = _returned(flow, first, last)
    below = (places[last] or ())[len(place) : len(place) + 1]
    if not written and below:
      v = next((u for a, b, u in narrow if a <= last < b), v)
      v = None if below[0].isdigit() else v  # a list of modules
    if v is not None:
      _add(named, '/'.join(place), v)
  by_value: dict[jx.Value, str] = {}
  for name, v in named.items():
    if v not in by_value or len(name) < len(by_value[v]):
      by_value[v] = name
  for first, _, v in narrow:
    if v not in by_value:
      since = range(flow.made[v], first - 1, -1)
      owner = next(filter(None, (places[i] for i in since if flow.owner(i))), ())
      by_value[v] = _add(named, '/'.join((*owner, 'out')), v)
  order = lambda item: flow.made[item[1]]
  return Inside(
    values=dict(sorted(named.items(), key=order)),
    narrow=tuple(by_value[v] for _, _, v in narrow),
    units=units,
    channels=_channels(flow),
  )


# ---- what flows where ----------------------------------------------------------------


class _Flow(NamedTuple):
  """How data and variables flow through a program.

  Attributes:
    program: the program.
    made: index of the equation that makes a value, -1 for an input.
    features: values that are computed from data and variables.
    reads: by equation, the paths of the variables that meet data there.
    last_use: index of the last equation that reads a feature.
    fed: for values computed from variables alone, the paths of these.
    data: values that are computed from data.
  """

  program: jx.Program
  made: dict[jx.Value, int]
  features: set[jx.Value]
  reads: tuple[frozenset[str], ...]
  last_use: dict[jx.Value, float]
  fed: dict[jx.Value, frozenset[str]]
  data: set[jx.Value]

  def owner(self, i: int) -> Place:
    """The path of the module whose arrays equation i reads, () if none."""
    parts = (path.split('/')[1:] for path in self.reads[i])
    paths = [[name for name in path if name != '~'] for path in parts]  # of haiku
    return _shared([path[:-1] or path for path in paths])

  def layer(self, i: int) -> bool:
    """Whether equation i is a layer: a product with arrays, or a lookup in them."""
    e = self.program.equations[i]
    return bool(self.reads[i]) and (e.name in LAYERS or bool(e.bodies))


def _flow(
  program: jx.Program,
  fed: Mapping[jx.Value, frozenset[str]],
  data: Collection[jx.Value],
  features: Collection[jx.Value],
) -> _Flow:
  """Follows what is known of the inputs of a program through it."""
  fed, data, features = dict(fed), set(data), set(features)
  made = dict.fromkeys(program.inputs, -1)
  reads, last_use = [], {}
  for i, e in enumerate(program.equations):
    made.update(dict.fromkeys(e.outputs, i))
    last_use.update(dict.fromkeys((v for v in e.inputs if v in features), i))
    paths = frozenset().union(*(fed.get(v, ()) for v in e.inputs))
    meets = any(v in data for v in e.inputs)
    reads.append(paths if meets else frozenset())
    if meets:
      data.update(e.outputs)
    else:
      fed.update(dict.fromkeys(e.outputs, paths))
    if meets and (paths or any(v in features for v in e.inputs)):
      features.update(v for v in e.outputs if jnp.issubdtype(v.dtype, np.inexact))
  last_use.update(
    dict.fromkeys((v for v in program.outputs if v in features), math.inf)
  )
  return _Flow(program, made, features, tuple(reads), last_use, fed, data)


def _body_flow(flow: _Flow, scan: jx.Equation) -> tuple[_Flow, frozenset[str]]:
  """Returns the flow through the body of a scan, and the paths of stacked variables."""
  (body,) = scan.bodies
  pairs = [*zip(body.inputs, scan.inputs, strict=True)]
  _, carry, scanned = jx.scan_parts(scan, pairs)
  state = [v for v, _ in carry]
  fed = {v: flow.fed[outer] for v, outer in pairs if outer in flow.fed}
  data = {v for v, outer in pairs if outer in flow.data}.union(state)
  # What one layer returns is a feature to the next, whatever the first one reads.
  features = {v for v, outer in pairs if outer in flow.features}
  results = zip(state, scan.outputs)
  features |= {v for v, after in results if after in flow.features}
  inner = _flow(body, {v: p for v, p in fed.items() if v not in data}, data, features)
  return inner, frozenset().union(*(fed.get(v, ()) for v, _ in scanned))


def _places(flow: _Flow) -> tuple[list[Place | None], bool]:
  """The module of every equation, and whether the library has written it there.

  Without written names, equations that read no arrays have none.
  """
  stacks = [_stack(e) for e in flow.program.equations]
  owners = [flow.owner(i) for i in range(len(stacks))]
  matches = [
    len(stack) - len(owner)
    for stack, owner in zip(stacks, owners)
    if owner and stack[-len(owner) :] == owner
  ]
  if 2 * len(matches) < sum(map(bool, owners)) or not matches:
    return [owner or None for owner in owners], False
  root = min(matches)
  return [stack[root:] for stack in stacks], True


def _stack(e: jx.Equation) -> Place:
  """The modules in which an equation was traced.

  Names of methods ('block.decode'), transformations ('vmap(block)') and the scopes of
  einsum ('ij,jk->ik') are left out.
  """
  written = '' if e.source is None else str(e.source.name_stack)
  stack: list[str] = []
  for part in written.split('/'):
    if '->' in part or ',' in part:
      continue
    name, method, _ = part.rpartition('(')[2].rstrip(')').partition('.')
    if name and not (method and stack[-1:] == [name]):  # a method that calls another
      stack.append(name)
  return tuple(stack)


def _runs(places: Sequence[Place | None]) -> Iterator[tuple[Place, int, int]]:
  """Yields (module, first equation, last equation) of every call of a module."""
  started: list[int] = []
  before: Place = ()
  last = -1
  for i, place in [*enumerate(places), (len(places), ())]:
    if place is None:
      continue
    same = len(_shared([before, place]))
    for depth in range(len(before), same, -1):
      yield before[:depth], started[depth - 1], last
    started = [*started[:same], *[i] * (len(place) - same)]
    before, last = place, i


def _returned(flow: _Flow, first: int, last: int) -> jx.Value | None:
  """The last feature that some equations make and that others read later."""
  for i in range(last, first - 1, -1):
    for v in flow.program.equations[i].outputs:
      if v in flow.features and flow.last_use.get(v, -1) > last:
        return v
  return None


def _narrow(flow: _Flow) -> list[tuple[int, int, jx.Value]]:
  """The values that all later features come from, one for each layer but the last.

  Returns (index of the layer, index of the next layer, value). Of several between two
  layers it is the last with as many axes as the layer's output, before a part of it is
  selected.
  """
  found, since, ranks = [], -1, set()
  value: jx.Value | None = None
  live: set[jx.Value] = set()
  for i, e in enumerate(flow.program.equations):
    selects = e.name in SELECTING and not flow.layer(i)
    if flow.layer(i):
      if value is not None:
        found.append((since, i, value))
      since, value, ranks = i, None, {len(v.shape) for v in e.outputs}
    live -= {v for v in e.inputs if flow.last_use.get(v) == i}
    live |= {v for v in e.outputs if flow.last_use.get(v, -1) > i}
    moved = e.name in LAYOUT and value in e.inputs
    if len(live) == 1 and since >= 0 and not selects and not moved:
      (only,) = live
      if len(only.shape) in ranks and flow.made[only] >= since:
        value = only
  return found


def _add(named: dict[str, jx.Value], name: str, v: jx.Value) -> str:
  """Adds a value by its name, numbered where the name is taken."""
  number = next(n for n in range(len(named) + 1) if _numbered(name, n) not in named)
  named[_numbered(name, number)] = v
  return _numbered(name, number)


def _numbered(name: str, number: int) -> str:
  return f'{name}:{number}' if number else name


def _channels(flow: _Flow) -> dict[int, int]:
  """By number of axes, which one counts channels, by the first convolution."""
  axes: dict[int, int] = {}
  for e in flow.program.equations:
    if e.name == 'conv_general_dilated':
      axes.setdefault(
        len(e.outputs[0].shape), e.params['dimension_numbers'].out_spec[1]
      )
  return axes


# ---- residual units ------------------------------------------------------------------


class _Found(NamedTuple):
  """A residual unit in a program or in the body of a scan in it.

  Attributes:
    branch: its branch.
    flow: through the program or the body.
    within: indices of the layers in its branch.
  """

  branch: Branch
  flow: _Flow
  within: Sequence[int]

  @property
  def owners(self) -> set[Place]:
    return {*map(self.flow.owner, self.within)}


def _units(flow: _Flow) -> tuple[dict[str, Branch], set[int]]:
  """The residual units by the common path of the layers in their branches.

  Also returns the indices of the equations beside their shortcuts.
  """
  in_order = {unit.branch.sum: [unit] for unit in _sums(flow)}
  for e in flow.program.equations:
    if e.name == 'scan':
      body, layers = _body_flow(flow, e)
      in_order[e] = [
        unit._replace(branch=unit.branch._replace(scan=e))
        for unit in _sums(body)
        if any(body.reads[i] & layers for i in unit.within)
      ]
  found = [u for e in flow.program.equations for u in in_order.get(e, ())]
  names = [_common(unit.flow, unit.within) for unit in found]
  units: dict[str, Branch] = {}
  hidden: set[int] = set()
  for (branch, own, within), name, owners in zip(
    found, names, [unit.owners for unit in found], strict=True
  ):
    alike = (unit.owners for unit, other in zip(found, names) if other == name)
    if not name or any(of != owners for of in alike):
      name = _common(own, within[-1:])  # one of several units of a module
    number = next(n for n in range(len(found)) if _numbered(name, n) not in units)
    units[_numbered(name, number)] = branch
    if own is flow:
      hidden.update(range(within[0], flow.made[branch.sum.outputs[0]]))
  return units, hidden


def _sums(flow: _Flow) -> list[_Found]:
  """The sums x + F(x) of a program, without those in the bodies of its scans."""
  program = flow.program
  count, layers = len(program.equations), []
  # Bit i says that equation i is among what a value is computed from; inputs follow.
  # Above a value is all of it, near it what no product of two features lies between.
  own = {v: 1 << (count + j) for j, v in enumerate(program.inputs)}
  above, near = dict(own), dict(own)
  made_by: dict[jx.Value, jx.Equation] = {}
  found: list[_Found] = []
  for i, e in enumerate(program.equations):
    up, close = (
      functools.reduce(int.__or__, (seen.get(v, 0) for v in e.inputs), 0)
      for seen in (above, near)
    )
    if flow.layer(i):
      layers.append((i, up, close))
    if e.name == 'dot_general' and not flow.reads[i]:
      close = 0  # no layer reads what is added to the scores of an attention
    above.update(dict.fromkeys(e.outputs, up | 1 << i))
    near.update(dict.fromkeys(e.outputs, close | 1 << i))
    own.update(dict.fromkeys(e.outputs, 1 << i))
    made_by.update(dict.fromkeys(e.outputs, e))
    if e.name not in ('add', 'add_any') or e.outputs[0] not in flow.features:
      continue
    for side, (branch, shortcut) in enumerate((e.inputs, e.inputs[::-1])):
      if branch.shape != shortcut.shape or branch not in flow.features:
        continue
      if _replaces(branch, shortcut, made_by):
        continue
      inner = [layer for layer in layers if above[branch] >> layer[0] & 1]
      bits = (own[v] for v in _summands(shortcut, made_by) if v in own)
      read = (bit for bit in bits if any(close & bit for _, _, close in inner))
      if bit := next(read, 0):
        within = [k for k, up, _ in inner if up & bit]
        found.append(_Found(Branch(e, side), flow, within))
        break
  # A shortcut around the whole network is no unit of it.
  spans = [{*unit.within} for unit in found]
  return [
    unit
    for unit, span in zip(found, spans)
    if _common(flow, unit.within) or not any(other < span for other in spans)
  ]


def _common(flow: _Flow, layers: Sequence[int]) -> str:
  return '/'.join(_shared([flow.owner(i) for i in layers]))


def _shared(places: Sequence[Sequence[str]]) -> Place:
  """The path that several paths begin with."""
  alike = itertools.takewhile(lambda parts: len({*parts}) == 1, zip(*places))
  return tuple(parts[0] for parts in alike)


def _summands(v: jx.Value, made_by: Mapping) -> Iterator[jx.Value]:
  """Yields v and what it is a sum of."""
  yield v
  e = made_by.get(v)
  if e is not None and e.name in CASTS:
    for u in e.inputs:
      if u.shape == v.shape:
        yield from _summands(u, made_by)


def _replaces(branch: jx.Value, shortcut: jx.Value, made_by: Mapping) -> bool:
  """Whether a branch is y - x beside the shortcut x: a straight-through estimator."""
  e = made_by.get(branch)
  while e is not None and e.name in LAYOUT:
    e = made_by.get(e.inputs[0])
  return e is not None and e.name == 'sub' and e.inputs[1] is shortcut


def gated(units: Mapping[str, Branch], gates: Mapping[str, Sequence[Any]]) -> Callable:
  """Returns execute(equation, inputs), which scales the branches of residual units.

  Args:
    units: the units of the program.
    gates: the factors of every unit by its name, each of the shape of its gate.
  """
  sides = {b.sum: (b.side, gates[u]) for u, b in units.items() if b.scan is None}
  stacks: dict[jx.Equation, dict[str, Branch]] = {}
  for name, branch in units.items():
    if branch.scan is not None:
      stacks.setdefault(branch.scan, {})[name] = branch._replace(scan=None)

  def execute(e: jx.Equation, ins: list) -> list:
    if inner := stacks.get(e):
      layer = lambda body, ins, own: (jx.interpret(body, ins, gated(inner, own)), None)
      return jx.scan_with(e, ins, e.params, layer, {u: gates[u] for u in inner})[0]
    if e in sides:
      side, factors = sides[e]
      gate = functools.reduce(jnp.multiply, factors)
      ins = list(ins)
      ins[side] = ins[side] * gate.astype(ins[side].dtype)
    return jx.bind(e, ins, e.params, jx.run)

  return execute
