"""Exports: networks and cascades as files that run without this library.

  network/           arch.json and weights.safetensors, which `load` reads again
  EXIT.stablehlo     (arrays, *inputs, **named) -> logits, one file for every exit
  cascade.stablehlo  (arrays, *inputs) -> {logits, exit, score, rows, broken}
  cascade.json, cascade.safetensors   thresholds and other settings, also as arrays
  *.onnx             the same functions with their arrays inside, if asked for
  export.json        names, shapes and types

StableHLO is that of `jax.export`: one file for any batch size, on cpu, cuda and tpu.
Its `arrays` are a dict of those in the safetensors files that export.json lists for it.
Those of a cascade include its thresholds, which can change without another file.
Inputs are called as the network is, with arrays by keyword where the network has them.
Lists and tuples stay, any other container (a NamedTuple) becomes a dict whose keys are
strings, and what is not an array, such as train=False, is part of the program. Arrays
that do not count examples keep their shapes.
"""

import functools
import glob
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import export as jax_export

from depthprune.cascades import executor
from depthprune.cascades.cascade import Cascade
from depthprune.cascades.executor import Settings
from depthprune.exports import networks
from depthprune.exports import onnx as converter
from depthprune.exports.onnx import ExportError
from depthprune.program import arguments
from depthprune.program import jaxpr as jx
from depthprune.program.coupling import Coupling
from depthprune.program.modules import runnable
from depthprune.program.stages import split
from depthprune.program.trace import batched, split_arrays
from depthprune.storage import checkpoint, directory
from depthprune.surgery.prune import Pruned

CASCADE = 'cascade'
PLATFORMS = ('cpu', 'cuda', 'tpu')
KNOWN = (*PLATFORMS, 'rocm')
RECORD, SETTINGS = 'export.json', 'cascade.safetensors'


class ExportedFunction(NamedTuple):
  """A function that is exported, and the arrays that it reads."""

  call: Callable[..., Any]  # (arrays, *inputs, **named) -> logits, or a dict
  arrays: dict[str, Any]  # by name


def export(
  path: str | Path,
  network: Pruned,
  cascade: Cascade | None = None,
  *,
  onnx: bool = False,
  batch: int | None = None,
  platforms: Sequence[str] = PLATFORMS,
  tokenizer: str | Path | None = None,
) -> dict[str, Any]:
  """Exports a pruned network as StableHLO, and as ONNX if asked for.

      dp.export('exported', small)

  This writes main.stablehlo, which runs without depthprune:

      exported = jax.export.deserialize(Path('exported/main.stablehlo').read_bytes())
      arrays = safetensors.numpy.load_file('exported/network/weights.safetensors')
      record = json.loads(Path('exported/export.json').read_text())
      names = record['programs']['main']['arrays']
      logits = exported.call({name: arrays[name] for name in names}, images)

  Args:
    path: the folder, which appears at once and replaces an earlier export.
    network: the network that `prune` or `load` returned.
    cascade: a cascade of that network, exported besides its exits.
    onnx: whether to write ONNX files too. That of the cascade is for `batch` inputs, 1
      by default.
    batch: the only batch size of all functions; any size by default. A network that
      computes something else at other sizes needs one.
    platforms: the platforms of StableHLO.
    tokenizer: a tokenizer.json, copied beside a cascade that reads texts.

  Returns:
    The content of export.json: inputs, files, shapes and versions.

  Raises:
    ExportError: the folder holds other files, the network needs a `batch`, or ONNX
      cannot express it.
    CheckpointError, ValueError: as for `save` and `save_cascade`.
  """
  path = Path(arguments.path('path', path))
  write = 'write export(path, prune(model, variables, keep, example))'
  arguments.kind_of('network', network, Pruned, 'what prune returned', write)
  if cascade is not None:
    arguments.kind_of('cascade', cascade, Cascade, 'what cascade returned')
  platforms = (platforms,) if isinstance(platforms, str) else tuple(platforms)
  if unknown := [p for p in platforms if p not in KNOWN]:
    raise ExportError(
      f'platforms: expected some of {", ".join(KNOWN)}, got {unknown[0]!r}'
    )
  ours = (path / RECORD).is_file() or (path.is_dir() and not any(path.iterdir()))
  if path.exists() and not ours:
    raise ExportError(
      f'{path}: expected an earlier export (with {RECORD}) or nothing, got other '
      'files: choose another folder'
    )
  is_whole = isinstance(batch, int | np.integer) and not isinstance(batch, bool)
  if batch is not None and not (is_whole and batch >= 1):
    raise ExportError(f'batch: expected a whole number >= 1, got {batch!r:.80}')
  path.parent.mkdir(parents=True, exist_ok=True)
  begun = f'.unfinished-{path.name}-'
  for left in path.parent.glob(f'{glob.escape(begun)}*'):  # by a killed export
    directory.remove(left)
  with tempfile.TemporaryDirectory(dir=path.parent, prefix=begun) as scratch:
    fresh = Path(scratch) / path.name
    if cascade is None:
      networks.save(fresh / 'network', network, tensors=True)
    else:
      networks.save_cascade(fresh, cascade, network, tokenizer=tokenizer, tensors=True)
      checkpoint.save_tensors(fresh / SETTINGS, _settings(cascade))
    record = _write(fresh, network, cascade, onnx, batch, platforms)
    if path.exists():
      directory.discard(path)
    fresh.rename(path)
  return record


def function(network: Pruned) -> Callable:
  """Returns f(variables, *inputs, **arrays) of a pruned network.

  It is the module that `arch` builds, or the cut program if `arch` cannot express it.
  Keyword arguments without arrays are those of its coupling.
  """
  keep = network.keep
  parts = (*keep['channels'].values(), *keep['branches'].values())
  uncut = all(map(np.all, (*parts, *keep['exits'].values())))
  native = network.model is not None and (network.arch or uncut)
  fn = runnable(network.model) if native else network.apply
  kwargs, named = network.coupling.kwargs, network.coupling.named
  static = {name: x for name, x in kwargs.items() if name not in named}
  return functools.partial(fn, **static)


def probe(inputs: Any, batch: int = 7) -> Any:
  """Draws inputs in the shapes of abstract ones, with `batch` for a symbolic size."""
  draw = np.random.default_rng(0)

  def one(x: Any) -> Any:
    shape = tuple(n if isinstance(n, int) else batch for n in x.shape)
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
      return jnp.broadcast_to(jax.random.key(0), shape)
    values = draw.normal(size=shape)
    # Integers are 0 or 1, valid as tokens, as types and as a mask.
    values = values if jnp.issubdtype(x.dtype, jnp.floating) else values > -1
    return np.asarray(values).astype(x.dtype)

  arrays, merge = split_arrays(inputs)
  return merge([*map(one, arrays)])


def _write(
  folder: Path, network: Pruned, cascade: Cascade | None, onnx: bool, batch, platforms
) -> dict[str, Any]:
  """Writes all functions and export.json."""
  any_size = jax_export.symbolic_shape('batch')[0]
  arguments = _arguments(network, any_size if batch is None else batch)
  names, files = _names(arguments), {}
  for name, exported in _functions(network, cascade, batch).items():
    files[name] = _write_stablehlo(folder, name, exported, arguments, platforms)
    if onnx:
      fixed = arguments if name != CASCADE else _arguments(network, batch or 1)
      files[name] |= _write_onnx(folder, name, exported, names, fixed)
  kinds = zip(names, map(_kind, jax.tree.leaves(arguments)), strict=True)
  record = {
    'inputs': [{'name': name, **kind} for name, kind in kinds],
    'weights': f'network/{checkpoint.TENSORS}',
    'programs': files,
    'platforms': list(platforms),
    'normalisation': network.report.get('normalisation'),
    'versions': directory.versions(),
  }
  directory.write(folder / RECORD, record)
  return record


# ---- the inputs ----------------------------------------------------------------------


def _arguments(network: Pruned, batch: Any) -> tuple[tuple, dict[str, Any]]:
  """Returns the abstract inputs of the programs, and those by keyword.

  They are for `batch` examples, or as the network was coupled with.
  """
  coupling = network.coupling
  called = coupling.inputs, coupling.named
  if batch is not None and any(coupling.counts):
    called = batched(called, batch, coupling.counts)
  inputs, named = called
  return tuple(map(_plain, inputs)), {name: _plain(x) for name, x in named.items()}


def _rebuilding(coupling: Coupling) -> Callable[[tuple, dict], tuple[tuple, dict]]:
  """Returns (inputs, named) of a program -> those that the network takes."""
  called = coupling.inputs, coupling.named
  places = [p for p, x in checkpoint.paths(called).items() if split_arrays(x)[0]]
  _, merge = split_arrays(called)

  def rebuilt(inputs, named):
    arrays = checkpoint.paths((inputs, named))
    return merge([arrays[place] for place in places])

  return rebuilt


def _plain(tree: Any) -> Any:
  """Returns an input of dicts, lists and tuples; what is not an array becomes None."""
  if isinstance(tree, jax.ShapeDtypeStruct):
    return tree
  children = jax.tree_util.tree_flatten_with_path(tree, is_leaf=lambda x: x is not tree)
  below = {jax.tree_util.keystr(p, simple=True): _plain(x) for p, x in children[0] if p}
  if type(tree) in (list, tuple):
    return type(tree)(below.values())
  return below or None


def _names(arguments: tuple[tuple, dict[str, Any]]) -> list[str]:
  """Returns the name of every array: input, input0, input0.field, or its keyword."""
  inputs, named = arguments
  several = len(inputs) > 1
  tops = {f'input{i}' if several else 'input': x for i, x in enumerate(inputs)} | named
  return ['.'.join(path.split('/')) for path in checkpoint.paths(tops)]


# ---- the functions -------------------------------------------------------------------


def _functions(
  network: Pruned, cascade: Cascade | None, batch: int | None
) -> dict[str, ExportedFunction]:
  """Returns the function of every exit, and that of the cascade, by name.

  Those of exits read arrays of the network by path; the cascade also reads settings.
  """
  fn, rebuilt = function(network), _rebuilding(network.coupling)
  functions = _exits(fn, network)
  if cascade is None:
    return functions
  if CASCADE in functions:
    raise ExportError(f'an exit is called {CASCADE!r}, as the cascade is: rename it')
  stages, inputs = cascade.stages, network.coupling.inputs
  if batch is None:
    stages = split(fn, network.variables, *inputs, exits=cascade.exits)
  arrays, pack = checkpoint.paths(network.variables), _packing(network.variables)

  def early(flat, *inputs):
    inputs, _ = rebuilt(inputs, {})
    chosen = Settings(*(flat.get(f'{CASCADE}/{name}') for name in Settings._fields))
    kind, steps, end = cascade.confidence, cascade.steps, len(stages)
    answer = executor.run(stages, kind, steps, pack(flat), chosen, inputs, end)
    return answer._asdict()

  return {**functions, CASCADE: ExportedFunction(early, arrays | _settings(cascade))}


def _exits(fn: Callable, network: Pruned) -> dict[str, ExportedFunction]:
  (inputs, named), pack = _arguments(network, None), _packing(network.variables)
  rebuilt = _rebuilding(network.coupling)

  def run(variables, inputs, named):
    inputs, named = rebuilt(inputs, named)
    return fn(variables, *inputs, **named)

  outputs = jax.eval_shape(run, network.variables, inputs, named)
  names = [*outputs] if isinstance(outputs, Mapping) else ['main']
  arrays = dict(sorted(checkpoint.paths(network.variables).items()))

  def of_exit(name: str) -> ExportedFunction:
    def call(flat, inputs, named):
      outputs = run(pack(flat), inputs, named)
      return outputs[name] if isinstance(outputs, Mapping) else outputs

    def lean(flat, *inputs, **named):
      # Without equations that `jax.export` would keep for nothing.
      args = flat, inputs, named
      program, tree = jx.trace(call, args)
      return jax.tree.unflatten(tree, jx.run(jx.lean(program), jax.tree.leaves(args)))

    traced, _ = jx.trace(call, (arrays, inputs, named))
    _, needed = jx.live(traced)
    read = [name for name, v in zip(arrays, traced.inputs) if v in needed]
    return ExportedFunction(lean, {name: arrays[name] for name in read})

  return {name: of_exit(name) for name in names}


def _packing(variables: Any) -> Callable[[dict], Any]:
  """Returns (arrays by path) -> the tree of variables, with zeros for absent arrays."""
  leaves, structure = checkpoint.paths(variables), jax.tree.structure(variables)
  absent = lambda leaf: jnp.zeros(leaf.shape, leaf.dtype)
  return lambda flat: jax.tree.unflatten(
    structure, [flat[p] if p in flat else absent(leaf) for p, leaf in leaves.items()]
  )


def _settings(cascade: Cascade) -> dict[str, np.ndarray]:
  """Returns the settings of a cascade as arrays 'cascade/thresholds', ..."""
  values = {name: getattr(cascade, name) for name in Settings._fields}
  return {
    f'{CASCADE}/{name}': np.asarray(value, np.float32)
    for name, value in values.items()
    if value is not None
  }


# ---- the files -----------------------------------------------------------------------


def _write_stablehlo(
  folder: Path,
  name: str,
  function: ExportedFunction,
  arguments: tuple[tuple, dict[str, Any]],
  platforms: Sequence[str],
) -> dict[str, Any]:
  inputs, named = arguments
  kinds = jax.eval_shape(lambda: jax.tree.map(jnp.asarray, function.arrays))
  traced = jax_export.export(jax.jit(function.call), platforms=platforms)
  try:
    exported = traced(kinds, *inputs, **named)
  except Exception as error:  # a symbolic size can fail in any operation
    sizes = (n for x in jax.tree.leaves(arguments) for n in x.shape)
    if all(isinstance(n, int) for n in sizes):
      raise
    first = (str(error) or type(error).__name__).splitlines()[0]
    raise ExportError(
      f'{name}: cannot be traced for any batch size ({first}): choose one with batch'
    ) from error
  file = f'{_file(name)}.stablehlo'
  (folder / file).write_bytes(exported.serialize())
  outputs = jax.tree.unflatten(exported.out_tree, [*map(_kind, exported.out_avals)])
  return {'stablehlo': file, 'arrays': [*function.arrays], 'outputs': outputs}


def _write_onnx(
  folder: Path,
  name: str,
  function: ExportedFunction,
  names: Sequence[str],
  arguments: tuple[tuple, dict[str, Any]],
) -> dict[str, Any]:
  arrays = jax.tree.map(np.asarray, function.arrays)
  inputs, tree = jax.tree.flatten(arguments)

  def call(*leaves):
    inputs, named = jax.tree.unflatten(tree, leaves)
    outputs = checkpoint.paths(function.call(arrays, *inputs, **named))
    return {_file(path or 'logits'): x for path, x in outputs.items()}

  content, distance = converter.convert(call, inputs, names, probe(inputs))
  file = f'{_file(name)}.onnx'
  (folder / file).write_bytes(content)
  shapes = [_kind(x)['shape'] for x in inputs]
  return {'onnx': file, 'onnx_inputs': shapes, 'onnx_distance': distance}


def _kind(x: Any) -> dict[str, Any]:
  shape = [n if isinstance(n, int) else str(n) for n in x.shape]
  return {'shape': shape, 'dtype': str(x.dtype)}


def _file(name: Any) -> str:
  return str(name).replace('/', '.')
