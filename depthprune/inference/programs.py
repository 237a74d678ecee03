"""What is exported of a network: a program for every exit, and one for its cascade.

A program takes its arrays by name, as a dict without folders: safetensors hold such.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from depthprune.inference import bucketed
from depthprune.inference.bucketed import Settings
from depthprune.inference.cascade import Cascade
from depthprune.inference.onnx import ExportError
from depthprune.program import jaxpr as jx
from depthprune.program.evaluate import run
from depthprune.program.stages import split
from depthprune.program.view import runnable
from depthprune.surgery.cut import Pruned
from depthprune.training import store

CASCADE = 'cascade'


class Program(NamedTuple):
  """call(arrays, *inputs) -> logits [batch, ...], or a dict.

  `arrays`: by name, those that it reads.
  """

  call: Callable[..., Any]
  arrays: dict[str, Any]


def function(network: Pruned) -> Callable:
  """f(variables, *inputs): the module that `arch` builds, else the program itself."""
  keep = network.keep
  parts = (*keep['channels'].values(), *keep['branches'].values())
  whole = all(map(np.all, (*parts, *keep['exits'].values())))
  native = network.arch or whole
  fn = runnable(network.model) if native else network.apply
  return functools.partial(fn, **network.coupling.kwargs)


def programs(
  network: Pruned, cascade: Cascade | None, batch: int | None
) -> dict[str, Program]:
  """A program for every exit, and 'cascade', by name; of any `batch` if it is None.

  Those of exits take arrays of the network, by path; 'cascade' also `settings`.

  Raises: ExportError for an exit called 'cascade'.
  """
  fn = function(network)
  found = _exits(fn, network)
  if cascade is None:
    return found
  if CASCADE in found:
    raise ExportError(f'an exit is called {CASCADE!r}, as the cascade is: rename it')
  stages, inputs = cascade.stages, network.coupling.inputs
  if batch is None:
    stages = split(fn, network.variables, *inputs, exits=cascade.exits)
  arrays, pack = store.paths(network.variables), _packing(network.variables)

  def early(flat, *inputs):
    chosen = Settings(*(flat.get(f'{CASCADE}/{name}') for name in Settings._fields))
    kind, steps, end = cascade.confidence, cascade.steps, len(stages)
    answer = bucketed.run(stages, kind, steps, pack(flat), chosen, inputs, end)
    return answer._asdict()

  return {**found, CASCADE: Program(early, arrays | settings(cascade))}


def _exits(fn: Callable, network: Pruned) -> dict[str, Program]:
  inputs, pack = network.coupling.inputs, _packing(network.variables)
  said = jax.eval_shape(fn, network.variables, *inputs)
  names = [*said] if isinstance(said, Mapping) else ['main']
  arrays = dict(sorted(store.paths(network.variables).items()))

  def program(name: str) -> Program:
    def call(flat, *inputs):
      said = fn(pack(flat), *inputs)
      return said[name] if isinstance(said, Mapping) else said

    traced, _ = jx.trace(call, (arrays, *inputs))
    _, needed = jx.live(traced)
    read = [name for name, v in zip(arrays, traced.inputs) if v in needed]
    return Program(_lean(call), {name: arrays[name] for name in read})

  return {name: program(name) for name in names}


def _packing(variables: Any) -> Callable[[dict], Any]:
  """(arrays by path) -> the tree of variables; zeros for those that are absent."""
  leaves, structure = store.paths(variables), jax.tree.structure(variables)
  absent = lambda leaf: jnp.zeros(leaf.shape, leaf.dtype)
  return lambda flat: jax.tree.unflatten(
    structure, [flat[p] if p in flat else absent(leaf) for p, leaf in leaves.items()]
  )


def _lean(call: Callable) -> Callable:
  """Without what the answer does not need, which `jax.export` would keep."""

  def lean(*args):
    program, tree = jx.trace(call, args)
    return jax.tree.unflatten(tree, run(jx.lean(program), jax.tree.leaves(args)))

  return lean


def settings(cascade: Cascade) -> dict[str, np.ndarray]:
  """Thresholds, temperatures [exits - 1] and what else may change, 'cascade/...'."""
  values = {name: getattr(cascade, name) for name in Settings._fields}
  return {
    f'{CASCADE}/{name}': np.asarray(value, np.float32)
    for name, value in values.items()
    if value is not None
  }


def probe(inputs: Sequence[Any], batch: int = 7) -> list[np.ndarray]:
  """Numbers in the shapes of abstract inputs; `batch` of a symbolic number of them."""
  draw = np.random.default_rng(0)
  made = []
  for x in inputs:
    size = x.shape[0] if isinstance(x.shape[0], int) else batch
    values = draw.normal(size=(size, *x.shape[1:]))
    # Tokens and types that any text can have; most of a mask is open.
    values = values if jnp.issubdtype(x.dtype, jnp.floating) else values > -1
    made.append(values.astype(x.dtype))
  return made
