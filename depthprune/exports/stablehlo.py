"""Out of the door: networks and cascades as files that run without this library.

  network/           arch.json and weights.safetensors, which `load` reads again
  EXIT.stablehlo     (arrays, *inputs) -> logits, one for every exit
  cascade.stablehlo  (arrays, *inputs) -> {logits, exit, score, rows, broken}
  cascade.json, cascade.safetensors   what was decided, and as arrays
  *.onnx             the same programs, their arrays in them, where that is asked for
  export.json        names, shapes and types

StableHLO is that of `jax.export`: any batch size, cpu, cuda and tpu in one file. Its
`arrays` are a dict of those in the safetensors that export.json lists for it. Those of
the cascade hold its thresholds, so others need no other program.
"""

import functools
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
from depthprune.exports.networks import save_cascade
from depthprune.exports.onnx import ExportError
from depthprune.program import jaxpr as jx
from depthprune.program.jaxpr import run
from depthprune.program.stages import batched, split
from depthprune.program.trace import runnable
from depthprune.storage import checkpoint, directory
from depthprune.surgery.prune import Pruned

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
  arrays, pack = checkpoint.paths(network.variables), _packing(network.variables)

  def early(flat, *inputs):
    chosen = Settings(*(flat.get(f'{CASCADE}/{name}') for name in Settings._fields))
    kind, steps, end = cascade.confidence, cascade.steps, len(stages)
    answer = executor.run(stages, kind, steps, pack(flat), chosen, inputs, end)
    return answer._asdict()

  return {**found, CASCADE: Program(early, arrays | settings(cascade))}


def _exits(fn: Callable, network: Pruned) -> dict[str, Program]:
  inputs, pack = network.coupling.inputs, _packing(network.variables)
  said = jax.eval_shape(fn, network.variables, *inputs)
  names = [*said] if isinstance(said, Mapping) else ['main']
  arrays = dict(sorted(checkpoint.paths(network.variables).items()))

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
  leaves, structure = checkpoint.paths(variables), jax.tree.structure(variables)
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


PLATFORMS = ('cpu', 'cuda', 'tpu')
RECORD, SETTINGS = 'export.json', 'cascade.safetensors'


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
  """Writes the folder `path`, at once, in place of an earlier export.

  Args:
    network: what `prune` left, or `load` read. cascade: of that network.
    onnx: the programs as ONNX too; of the cascade for `batch` inputs, 1 by default.
    batch: the only number of inputs that all programs take. Default: any; what is
      another program at another number has to have one.
    platforms: of StableHLO. tokenizer: copied beside a cascade that reads texts.

  Returns: what export.json says.

  Raises: ExportError for a folder of other files, a network that needs a `batch`,
    and what ONNX cannot say; CheckpointError and ValueError as `save` and
    `save_cascade`.
  """
  path = Path(path)
  ours = (path / RECORD).is_file() or (path.is_dir() and not any(path.iterdir()))
  if path.exists() and not ours:
    raise ExportError(
      f'{path}: expected an earlier export (with {RECORD}) or nothing, got other '
      'files: choose another folder'
    )
  if batch is not None and batch < 1:
    raise ExportError(f'batch: expected a whole number >= 1, got {batch}')
  path.parent.mkdir(parents=True, exist_ok=True)
  with tempfile.TemporaryDirectory(dir=path.parent, prefix='.unfinished-') as scratch:
    fresh = Path(scratch) / path.name
    _save(fresh, network, cascade, tokenizer)
    told = _write(fresh, network, cascade, onnx, batch, platforms)
    if path.exists():
      directory.discard(path)
    fresh.rename(path)
  return told


def _write(
  folder: Path, network: Pruned, cascade: Cascade | None, onnx: bool, batch, platforms
) -> dict[str, Any]:
  """All programs and export.json."""
  inputs = network.coupling.inputs
  several = jax_export.symbolic_shape('batch')[0] if batch is None else batch
  shapes = batched(inputs, several)
  names = ['input'] if len(inputs) == 1 else [f'input{i}' for i in range(len(inputs))]
  told = {}
  for name, program in programs(network, cascade, batch).items():
    told[name] = _stablehlo(folder, name, program, shapes, platforms)
    if onnx:
      fixed = shapes if name != CASCADE else batched(inputs, batch or 1)
      told[name] |= _onnx(folder, name, program, names, fixed)
  described = zip(names, map(_kind, shapes), strict=True)
  content = {
    'inputs': [{'name': name, **kind} for name, kind in described],
    'weights': f'network/{checkpoint.TENSORS}',
    'programs': told,
    'platforms': list(platforms),
    'normalisation': network.report.get('normalisation'),
    'versions': directory.versions(),
  }
  directory.write(folder / RECORD, content)
  return content


# ---- the files -----------------------------------------------------------------------


def _save(
  folder: Path, network: Pruned, cascade: Cascade | None, tokenizer: Any
) -> None:
  if cascade is None:
    networks.save(folder / 'network', network, tensors=True)
    return
  save_cascade(folder, cascade, network, tokenizer=tokenizer, tensors=True)
  checkpoint.save_tensors(folder / SETTINGS, settings(cascade))


def _stablehlo(
  folder: Path, name: str, program: Program, inputs: Sequence, platforms: Sequence[str]
) -> dict[str, Any]:
  kinds = jax.eval_shape(lambda: jax.tree.map(jnp.asarray, program.arrays))
  traced = jax_export.export(jax.jit(program.call), platforms=platforms)
  try:
    exported = traced(kinds, *inputs)
  except Exception as error:  # whatever meets a size that is no number
    if isinstance(inputs[0].shape[0], int):
      raise
    first = (str(error) or type(error).__name__).splitlines()[0]
    raise ExportError(
      f'{name}: cannot be traced for any batch size ({first}): choose one with batch'
    ) from error
  file = f'{_file(name)}.stablehlo'
  (folder / file).write_bytes(exported.serialize())
  outputs = jax.tree.unflatten(exported.out_tree, [*map(_kind, exported.out_avals)])
  return {'stablehlo': file, 'arrays': [*program.arrays], 'outputs': outputs}


def _onnx(
  folder: Path, name: str, program: Program, names: Sequence[str], inputs: Sequence
) -> dict[str, Any]:
  arrays = jax.tree.map(np.asarray, program.arrays)

  def call(*inputs):
    said = checkpoint.paths(
      program.call(arrays, *inputs)
    )  # of one array the path is empty
    return {_file(path or 'logits'): x for path, x in said.items()}

  content, far = converter.convert(call, inputs, names, probe(inputs))
  file = f'{_file(name)}.onnx'
  (folder / file).write_bytes(content)
  shapes = [_kind(x)['shape'] for x in inputs]
  return {'onnx': file, 'onnx_inputs': shapes, 'onnx_distance': far}


def _kind(x: Any) -> dict[str, Any]:
  shape = [n if isinstance(n, int) else str(n) for n in x.shape]
  return {'shape': shape, 'dtype': str(x.dtype)}


def _file(name: Any) -> str:
  return str(name).replace('/', '.')
