"""Any network as a trunk: its values are taps, and its residual units have gates.

A network of NNX, Equinox, haiku, transformers or of your own becomes a linen module
that heads, auxiliary paths and every method take, without a line changed in it.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Collection, Mapping
from typing import Any, ClassVar, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.core import FrozenDict
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.core import Tracer
from jax.typing import DTypeLike

from depthprune.models.arch import Arch, complete
from depthprune.models.layers import Pool
from depthprune.program import axes as ax
from depthprune.program import jaxpr as jx
from depthprune.program import modules, rules
from depthprune.program.arguments import listed
from depthprune.program.carriers import carries
from depthprune.program.deadcode import simplify
from depthprune.program.resize import rebound
from depthprune.program.taps import Inside, gated, inside
from depthprune.program.trace import abstract, is_array, split_arrays

MASKS = ('mask', 'attention_mask')  # arguments that say which tokens are no padding


def trunk(
  model: Any,
  variables: Any,
  *inputs: Any,
  output: Callable[[Any], Any] | None = None,
  mode: Callable[[bool], Mapping[str, Any]] | None = None,
  pool: Pool = 'avg',
  **kwargs: Any,
) -> Trunk:
  """Makes a linen module of any network, with taps and with gates at residual units.

      from depthprune.models.heads import Head, WithHeads
      net = dp.trunk(model, variables, images)
      print(dp.taps(model, variables, images))  # names for heads
      wide = WithHeads(net, {'early': Head('block1', classes=10)})
      wide_variables = wide.init(key, images)  # the arrays of `model`, and new heads
      outputs = wide.apply(wide_variables, images)  # 'main', 'early' and the taps read

  In training, call it with train=True, `mutable` for running statistics and rngs={
  'dropout': key} for all that is random, as `make_step` does; `net.original(variables)`
  gives trained arrays back in the form of `model`. `net.units` names the residual units
  x + F(x) that were found; each has a gate, variables['branches'][UNIT]['branch'], of
  shape () or, in the body of a scan over layers, [layers].

  Args:
    model: a network of any kind, as for `couple`.
    variables: its arrays, with which `init` fills the module. Of abstract arrays these
      are zeros; None, for a linen module, draws them in `init`.
    *inputs: an example of its inputs, arrays [batch, ...] or trees of them.
    output: (what the network returns) -> its logits. By default what it returns, or its
      entry 'main' or 'logits'.
    mode: (train) -> the arguments of the call that tell training from evaluation. By
      default they are found: train, training, is_training, deterministic,
      use_running_average, inference, or the mode of an NNX module.
    pool: how a head turns features into a vector where it does not say so itself; see
      `heads.Head`.
    **kwargs: further arguments of the call. Arrays among them become further inputs of
      the module, in the order given: `trunk(model, variables, tokens,
      attention_mask=mask)` is called as `net.apply(variables, tokens, mask)`, and heads
      leave out what such a mask excludes.

  Returns:
    The Trunk. It returns {'main': logits, and every tap by name}.

  Raises:
    ValueError: `output` is needed to find the logits.
    TypeError: the variables are not those of the model.
  """
  modules.checked(model)
  if variables is not None:
    modules.checked_call(model, variables, inputs)
  named = {name: x for name, x in kwargs.items() if split_arrays(x)[0]}
  static = {name: x for name, x in kwargs.items() if name not in named}
  mode = mode or (lambda train: {'train': train})
  draw = None
  if variables is None:
    draw = functools.partial(_drawn, model, inputs, {**kwargs, **mode(False)})
    variables = jax.eval_shape(draw, jax.random.key(0))
  network = Network(
    call=modules.updating(model, variables),
    joined=functools.partial(modules.joined, model, variables),
    arrays=dict(sorted(modules.collected(model, variables).items())),
    inputs=abstract((*inputs, *named.values())),
    names=tuple(named),
    static=static,
    output=output or _logits,
    mode=mode,
    draw=None if draw is None else lambda key: modules.collected(model, draw(key)),
    foreign=f'{type(model).__module__}.{type(model).__qualname__}',
  )
  with modules.explained(variables, inputs):
    network.inside  # noqa: B018  (traced here, where the mistake would be)
  return Trunk(network, pool=pool)


class Program(NamedTuple):
  """A traced network whose residual units have gates.

  Attributes:
    program: (gates, arrays, inputs, key) -> outputs, taps and updates.
    gates: the program's first inputs, by path. They scale the branches of the units and
      are not part of the network: scalars, or [layers] in a scan.
    arrays: the program's input for each array, by path.
    returns: what each output of the program is: ('output', name), ('tap', name) or
      ('update', path).
  """

  program: jx.Program
  gates: dict[str, jx.Value]
  arrays: dict[str, jx.Value]
  returns: tuple[tuple[str, str], ...]


@dataclasses.dataclass(frozen=True, eq=False)
class Network:
  """A network of any kind, and how a trunk calls it.

  Attributes:
    call: from `modules.updating`.
    joined: (arrays by path) -> the variables of the network in its own form.
    arrays: its arrays by path, 'params/...', in sorted order.
    inputs: an example of all inputs, abstract.
    names: names of the last inputs, which the call takes by keyword.
    static: further arguments of the call.
    output: (what the network returns) -> logits, or outputs by name.
    mode: (train) -> the arguments of the call that say so.
    draw: (key) -> arrays by path, for `init`; None where `arrays` are to be used.
    foreign: full name of its type, for messages, and where it is described in a file.
  """

  call: Callable
  joined: Callable
  arrays: Mapping[str, Any]
  inputs: tuple
  names: tuple[str, ...]
  static: Mapping[str, Any]
  output: Callable
  mode: Callable
  draw: Callable | None
  foreign: str

  def __repr__(self) -> str:
    return f'{self.foreign} with {len(self.arrays)} arrays'

  @functools.cached_property
  def inside(self) -> Inside:
    """The values and units of the network in evaluation."""
    return self._example.inside

  @functools.cached_property
  def logits(self) -> jx.Value:
    """The network's main output for the example."""
    return self._example.outputs['main']

  @functools.cached_property
  def _example(self) -> _Traced:
    return self._traced(self.inputs, False, None)

  @functools.cached_property
  def gates(self) -> dict[str, tuple[str, ...]]:
    """The paths of the gates whose product scales the branch of each unit.

    The first is the gate that is trained, and closed. A cut multiplies its value into
    the arrays of the branch, or into a second gate where none of them can carry it.
    A network that has gates of its own (`gates.branch`) gets no others.
    """
    if mine := [path for path in self.arrays if path.startswith('branches/')]:
      scalars = [path for path in mine if len(self.arrays[path].shape) < 2]
      names = [path.removeprefix('branches/') for path in scalars]
      return {n.removesuffix('/branch'): (path,) for n, path in zip(names, scalars)}
    program, *_, found = self._example
    weights = set(program.inputs[: len(self.arrays)])
    paths = {}
    for unit, (e, side, scan) in found.units.items():
      carried = carries(program, e.inputs[side], weights, scan)
      scale = () if carried else (f'constants/{unit}/scale',)
      paths[unit] = (f'branches/{unit}/branch', *scale)
    return paths

  @functools.cached_property
  def layers(self) -> dict[str, int]:
    """{path of a gate that is trained: for how many layers it is}."""
    shapes = {path: x.shape for path, x in self.arrays.items()}
    found = self.inside.units
    return {
      path: math.prod(shapes[path] if path in shapes else found[unit].shape)
      for unit, (path, *_) in self.gates.items()
    }

  @functools.cached_property
  def _programs(self) -> dict[Any, Program]:
    return {}

  def at(self, inputs: tuple, train: bool, key: Any) -> Program:
    """Returns the program for inputs of these shapes, traced once."""
    shapes = abstract((inputs, key))
    leaves, tree = jax.tree.flatten(shapes)
    kinds = ((x.shape, x.dtype) if hasattr(x, 'shape') else x for x in leaves)
    signature = (tree, train, *kinds)
    if signature in self._programs:
      return self._programs[signature]
    made = self._gated(shapes[0], shapes[1], train)
    if not any(isinstance(x, Tracer) for x in made.program.constants.values()):
      self._programs[signature] = made
    return made

  def _run(self, arrays, inputs: tuple, train: bool, key: Any) -> tuple[dict, dict]:
    """Returns (outputs by name, updates by path)."""
    positional = inputs[: len(inputs) - len(self.names)]
    named = dict(zip(self.names, inputs[len(positional) :], strict=True))
    kwargs = {**self.static, **named, **self.mode(train)}
    raw, updates = self.call(arrays, *positional, key=key, **kwargs)
    outputs = self.output(raw)
    outputs = dict(outputs) if isinstance(outputs, Mapping) else {'main': outputs}
    for name in MASKS:
      if name in named and named[name].ndim == 2:
        outputs['mask'] = named[name].astype(bool)
    return outputs, updates

  def _traced(self, inputs: tuple, train: bool, key: Any) -> _Traced:
    arrays, merge = split_arrays(inputs)
    call = lambda own, arrays, key: self._run(own, merge(arrays), train, key)
    program, tree = jx.trace(call, (abstract(self.arrays), arrays, key))
    outputs, updates = jax.tree.unflatten(tree, program.outputs)
    main = dataclasses.replace(program, outputs=tuple(outputs.values()))
    found = inside(main, dict(zip(self.arrays, program.inputs)))
    return _Traced(program, outputs, updates, found)

  def _gated(self, inputs: tuple, key: Any, train: bool) -> Program:
    traced = self._traced(inputs, train, key)
    units, parts = traced.inside.units, {
      'output': traced.outputs, 'tap': traced.inside.values, 'update': traced.updates
    }  # fmt: skip
    own = any(path in self.arrays for paths in self.gates.values() for path in paths)
    if own:
      units = {}
    elif {*units} != {*self.inside.units}:
      here = ', '.join(str(list(x.shape)) for x in jax.tree.leaves(inputs))
      raise ValueError(
        f'{self.foreign}: at train={train} and inputs {here} it has other residual '
        f'units ({listed(units)}) than for the example '
        f'({listed(self.inside.units)})'
      )
    returns = tuple((what, name) for what, part in parts.items() for name in part)
    outputs = tuple(v for part in parts.values() for v in part.values())
    program = dataclasses.replace(traced.program, outputs=outputs)

    def run(gates, flat):
      factors = {u: [gates[path] for path in self.gates[u]] for u in units}
      values = jx.interpret(program, flat, gated(units, factors))
      axes = traced.inside.channels
      last = lambda x: jnp.moveaxis(x, axes.get(x.ndim, -1), -1)
      return [last(x) if r[0] == 'tap' else x for x, r in zip(values, returns)]

    flat = [jax.ShapeDtypeStruct(v.shape, v.dtype) for v in program.inputs]
    shapes = {path: units[u].shape for u in units for path in self.gates[u]}
    gates = {p: jax.ShapeDtypeStruct(shapes[p], jnp.float32) for p in sorted(shapes)}
    full = jx.trace(run, (gates, flat)).program
    ins = iter(full.inputs)
    return Program(full, dict(zip(gates, ins)), dict(zip(self.arrays, ins)), returns)


class _Traced(NamedTuple):
  program: jx.Program
  outputs: dict[str, jx.Value]
  updates: dict[str, jx.Value]
  inside: Inside


class Trunk(nn.Module):
  """A network of any kind as a trunk; `trunk` makes it.

  It maps the inputs of the network to {'main': logits, and every tap by name}. Features
  have their channels last, also where the network has them first.

  Attributes:
    network: the network.
    arch: what pruning removed: {'UNIT/branch': 0} for a residual unit.
    pool: how a head on a tap reduces it to a vector; see `heads.Head`.
    dtype: type of the computation of heads.
  """

  network: Network
  arch: Arch = FrozenDict()
  pool: Pool = 'avg'
  dtype: DTypeLike = jnp.float32
  exits: ClassVar[tuple[str, ...]] = ('main',)

  def __post_init__(self):
    self.arch = FrozenDict(self.arch)
    super().__post_init__()

  @property
  def classes(self) -> int:
    """The number of logits; 1 where the network returns a number per example."""
    _, *rest = self.network.logits.shape
    return rest[-1] if rest else 1

  @property
  def taps(self) -> tuple[str, ...]:
    """The taps from which all that follows is computed, in order of depth."""
    return self.network.inside.narrow

  @property
  def values(self) -> tuple[str, ...]:
    """All taps, in order of execution."""
    return tuple(self.network.inside.values)

  @property
  def units(self) -> tuple[str, ...]:
    """The names of the residual units, in order of execution."""
    return tuple(self.network.gates)

  @property
  def widths(self) -> dict[str, int]:
    """Every key that `arch` may hold, with its value in the full network."""
    layers = self.network.layers
    return {path.removeprefix('branches/'): n for path, n in layers.items()}

  @nn.compact
  def __call__(
    self, *inputs: Any, train: bool = False, until: str = '', **flags: bool
  ) -> dict[str, jax.Array]:
    """Computes all outputs, or the taps up to `until` if it is not ''.

    Flags are other names for `train`, as networks have them: deterministic=True, ...
    """
    for name, value in flags.items():
      if name not in modules.FLAGS:
        raise TypeError(f'{self.network.foreign}: unexpected argument {name!r}')
      train = value == modules.FLAGS[name]
    arch = complete(self.arch, self.widths, 'Trunk')
    key = self.make_rng('dropout') if train and self.has_rng('dropout') else None
    at = self.network.at(inputs, train, key)
    arguments = {**at.arrays, **at.gates}
    every = (path for paths in self.network.gates.values() for path in paths)
    gates = {path: arguments[path] for path in every}
    left = {gates[f'branches/{name}']: n for name, n in arch.items()}
    erased = {v: 0 for v, n in left.items() if not n}
    dims, kept = _sizes(at, left)
    masks = {v: [ax.mask(d, kept) for d in dims[v]] for v in arguments.values() if kept}
    gone = {v for v, own in masks.items() if not all(m.any() for m in own)}
    if self.is_initializing():
      sized = lambda x, v: x[np.ix_(*masks[v])] if kept else x
      self._fill(at, erased, until, gone, sized)
    own = {'/'.join(p): x for p, x in flatten_dict(dict(self.variables)).items()}
    known = {v: 1 for path, v in gates.items() if path not in own} | erased
    updates = [
      ('update', path)
      for what, path in at.returns
      if what == 'update' and path in own
      if self.is_mutable_collection(path.split('/')[0])
    ]
    program, returns = _reduced(at, known, until, updates)
    _, needed = jx.live(program)
    arrays = [own.get(path) for path in at.arrays]
    for (path, v), x in zip(at.arrays.items(), arrays):
      if v in needed - gone and x is None:
        raise ValueError(f'{path}: missing in the variables of {self.network.foreign}')
    flat = [*map(own.get, at.gates), *arrays, *split_arrays((inputs, key))[0]]
    if kept:  # fewer layers than were traced
      facts = ax.Facts()
      rules.infer(facts, program, [dims[v] for v in program.inputs])
      here: dict[ax.Var, np.ndarray] = {}
      for axis, layers in kept.items():
        ax.assign(axis, layers, here)
      values = rebound(facts, here)(program, flat)
    else:
      values = jx.run(program, flat)
    results = dict(zip(returns, values, strict=True))
    new = {path: x for (what, path), x in results.items() if what == 'update'}
    if not self.is_initializing():
      self._put({**own, **new}, new)
    return {name: x for (what, name), x in results.items() if what != 'update'}

  def original(self, variables: Mapping[str, Any]) -> Any:
    """Returns variables of the trunk in the form that the network has them in.

        state = net.original(variables)  # an nnx.State, say

    Arrays that its evaluation does not need are those that `trunk` was given.

    Args:
      variables: of the trunk, not cut; where heads were put on it, the parts 'trunk'.

    Raises:
      ValueError: variables are missing, for example because they were cut.
    """
    own = flatten_dict(dict(variables), sep='/')
    at = self.network.at(self.network.inputs, False, None)
    _, needed = jx.live(_reduced(at, {}, '')[0])
    for path, v in at.arrays.items():
      if v in needed and path not in own:
        raise ValueError(
          f'{path}: missing; expected the variables of the whole network, since '
          f'{self.network.foreign} itself has no smaller form: run what was cut by its '
          '`apply`'
        )
    return self.network.joined({**self.network.arrays, **own})

  def _fill(
    self, at: Program, erased: Mapping[jx.Value, int], until: str,
    gone: Collection[jx.Value], sized: Callable,
  ) -> None:  # fmt: skip
    """Creates the variables that the outputs need, with the arrays of the network.

    It leaves out those in `gone`, of which no layer is left. `sized(x, v)` cuts the
    array x of an input v of the program to the layers that are left.
    """
    _, needed = jx.live(_reduced(at, erased, until)[0])
    needed -= {*gone}
    draw, held = self.network.draw, self.network.arrays
    own = [path for path, v in at.arrays.items() if v in needed]
    # Training updates the average of a module with others beside it, such as a counter.
    updated = {_parent(path) for path in own if not path.startswith('params/')}
    filled = lambda x: (
      jnp.zeros(x.shape, x.dtype) if isinstance(x, jax.ShapeDtypeStruct) else x
    )
    arrays: dict[str, Any] = {
      path: sized(filled(x), at.arrays[path])
      for path, x in (held if draw is None else draw(self.make_rng('params'))).items()
      if path in own or _parent(path) in updated
    }
    for path, v in at.gates.items():
      if v in needed and v not in erased:
        arrays[path] = sized(jnp.ones(v.shape), v)
    self._put(arrays, arrays)

  def _put(self, arrays: Mapping[str, Any], changed: Collection[str]) -> None:
    """Stores the variables that hold the changed ones of these arrays."""
    nested = unflatten_dict({tuple(path.split('/')): x for path, x in arrays.items()})
    for collection, name in sorted({tuple(path.split('/')[:2]) for path in changed}):
      self.put_variable(collection, name, nested[collection][name])


def _sizes(
  at: Program, left: Mapping[jx.Value, int]
) -> tuple[dict[jx.Value, ax.Dims], ax.Keep]:
  """Returns the axes of the inputs of a program, and which slices are left of each.

  Args:
    at: the whole program.
    left: how many layers are left, by gate; a gate with none does not shorten the scan.

  Raises:
    ValueError: gates of one scan leave different numbers of layers, or the scan is
      also over an input.
  """
  stacked = {v: n for v, n in left.items() if v.shape}
  if all(n == math.prod(v.shape) for v, n in stacked.items()):
    return {}, {}
  own = {*at.arrays.values(), *at.gates.values()}
  pin = lambda v: None if v in own else 'input'
  dims: dict[jx.Value, ax.Dims] = {}
  dims |= {v: ax.fresh(v.shape, pin(v)) for v in at.program.inputs}
  rules.infer(ax.Facts(), at.program, [*dims.values()])
  loops: dict[ax.Axis, set[int]] = {}
  for v, n in stacked.items():
    loops.setdefault(ax.norm(dims[v][0]), set()).add(n)
  kept: dict[ax.Var, Any] = {}
  for loop, counts in loops.items():
    most = max(counts)
    if uneven := counts - {0, most}:
      numbers = ' and '.join(map(str, sorted({*uneven, most})))
      raise ValueError(f'Trunk: arch leaves {numbers} layers of one scan')
    if most < loop.size:
      if any(axis.pins for axis in ax.leaves(loop)):
        raise ValueError('Trunk: arch leaves fewer layers of a scan over an input')
      ax.assign(loop, np.arange(loop.size) < most, kept)
  return dims, kept


def _reduced(
  at: Program,
  known: Mapping[jx.Value, int],
  until: str,
  updates: Collection[tuple[str, str]] = (),
) -> tuple[jx.Program, list[tuple[str, str]]]:
  """Returns the program that computes no more than it has to, and what it returns.

  Args:
    at: the whole program.
    known: gates that are 0 or 1.
    until: the tap that it ends with, '' for the network's own outputs.
    updates: the updates that are wanted.
  """
  program = simplify(at.program, known)
  ends = [
    (r == ('tap', until) or r == ('output', 'mask')) if until else r[0] == 'output'
    for r in at.returns
  ]
  made_by = {v: e for e in program.equations for v in e.outputs}
  last = tuple(v for v, end in zip(program.outputs, ends) if end)
  _, needed = jx.live(dataclasses.replace(program, outputs=last))
  kept, returns = [], []
  for v, r, end in zip(program.outputs, at.returns, ends):
    moved = v in made_by and made_by[v].name == 'transpose'  # channels go last
    source = made_by[v].inputs[0] if moved else v
    passed = r[0] == 'tap' and not needed.isdisjoint((v, source))
    if end or passed or r in updates:
      kept.append(v)
      returns.append(r)
  return jx.lean(dataclasses.replace(program, outputs=tuple(kept))), returns


def _parent(path: str) -> str:
  return path.rpartition('/')[0]


def _drawn(model: Any, inputs: tuple, kwargs: Mapping, key: jax.Array) -> dict:
  """Draws the variables of a linen module."""
  arrays, merge = split_arrays((inputs, kwargs))
  inputs, kwargs = merge([jnp.zeros(x.shape, x.dtype) for x in arrays])
  named = modules.accepted(kwargs, modules.parameters(model))
  drawn = model.init({'params': key, 'dropout': key}, *inputs, **named)
  return {name: x for name, x in drawn.items() if name != 'intermediates'}


def _logits(raw: Any) -> Any:
  """Returns the logits among what a network returns, or its outputs by name.

  Raises:
    ValueError: they cannot be told.
  """
  if is_array(raw):
    return raw
  named = raw if isinstance(raw, Mapping) else getattr(raw, '__dict__', {})
  if isinstance(raw, Mapping) and 'main' in raw:
    return {name: x for name, x in raw.items() if is_array(x)}
  if 'logits' in named:
    return named['logits']
  names = f' of {listed(named)}' if named else ''
  raise ValueError(
    f'the network returns a {type(raw).__name__}{names}: expected logits, or a dict '
    "with 'logits' or 'main'; trunk(..., output=lambda out: out[0]) says which of it "
    'are the logits'
  )
