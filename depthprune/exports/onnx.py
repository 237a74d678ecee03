"""Converts functions to ONNX with jax2onnx, and checks the result with onnxruntime.

The converter gets the equations of our own trace, because it replaces functions of
linen and jnp while it traces. Equations that it lacks, or converts to something that
onnxruntime does not run, are replaced by equal ones:

  pad                     constants that are concatenated (it refuses a symbolic batch)
  max and sum of windows  pooling of linen, which it converts for [b, h, w, c]
  cond of n branches      n - 1 conds of two branches
  custom derivatives      the function itself
"""

import contextlib
import importlib.metadata
import logging
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from depthprune.program import jaxpr as jx
from depthprune.program.jaxpr import bind, interpret

CONVERTER = 'jax2onnx'
TOLERANCE = 1e-4  # relative to the largest output, or to 1 if that is more
POOLS = ('reduce_window_max', 'reduce_window_sum')


class ExportError(ValueError):
  """A network that cannot be exported; the message says why and what to do."""


def convert(
  fn: Callable, inputs: Sequence[Any], names: Sequence[str], probe: Sequence[Any]
) -> tuple[bytes, float]:
  """Converts a function to an ONNX model and compares both.

  Args:
    fn: fn(*inputs) -> {name: array}; arrays that it closes over become part of the
      model.
    inputs: abstract inputs; a symbolic batch stays symbolic.
    names: names of the inputs.
    probe: concrete inputs, on which both are run.

  Returns:
    The serialised model, and the largest difference of an output, relative to the
    largest number in it, or to 1 if that is more.

  Raises:
    ExportError: the converter or onnxruntime is not installed, cannot express
      something, or computes something else.
  """
  try:
    import onnxruntime
    from jax2onnx import to_onnx
  except ImportError as error:
    raise ExportError(
      f"onnx: {error}: install the converter, pip install 'depthprune[onnx]'"
    ) from error
  expected = jax.jit(fn)(*probe)
  program, _ = jx.trace(fn, tuple(inputs))
  with _quiet():
    try:
      model = to_onnx(
        lambda *x: _run(program, x),
        [*inputs],
        input_names=[*names],
        output_names=[*expected],
      )
    except Exception as error:  # the converter raises errors of many kinds
      raise _refused('cannot convert this program', error) from error
    del model.graph.value_info[:]  # some shapes are wrong after its own rewriting
    content = model.SerializeToString()
    try:
      options = onnxruntime.SessionOptions()
      options.log_severity_level = 4
      session = onnxruntime.InferenceSession(content, options)
      feed = dict(zip(names, map(np.asarray, probe), strict=True))
      known = {x.name for x in session.get_inputs()}
      outputs = session.run([*expected], {k: x for k, x in feed.items() if k in known})
    except Exception as error:  # onnxruntime has no common class of errors
      raise _refused('made what onnxruntime cannot run', error) from error
  pairs = zip(expected.values(), outputs, strict=True)
  distance = max(_distance(np.asarray(x), np.asarray(y)) for x, y in pairs)
  if not distance <= TOLERANCE:
    raise _refused(
      f'made another network, {distance:.1e} apart where {TOLERANCE:.0e} is allowed', ''
    )
  return content, distance


def _refused(what: str, error: Any) -> ExportError:
  version = importlib.metadata.version(CONVERTER)
  first = next((line for line in str(error).splitlines() if line.strip()), '')
  why = f': {type(error).__name__}: {first}' if first else ''
  return ExportError(
    f'onnx: {CONVERTER} {version} {what}{why}. Leave ONNX out: StableHLO has all of it'
  )


def _distance(expected: np.ndarray, got: np.ndarray) -> float:
  if expected.shape != got.shape:
    return math.inf
  expected, got = expected.astype(np.float64), got.astype(np.float64)
  if not expected.size or not np.array_equal(np.isnan(expected), np.isnan(got)):
    return math.inf if expected.size else 0.0
  distance = np.abs(np.nan_to_num(expected) - np.nan_to_num(got)).max()
  return float(distance / max(1.0, np.abs(np.nan_to_num(expected)).max()))


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
  """Silences the converter's logs and warnings, and undoes what it does to jax.

  It mixes types, which strict promotion would refuse, and it replaces functions of jax
  and does not restore them all (jnp.cumsum).
  """
  before = logging.root.manager.disable
  functions = [(module, dict(vars(module))) for module in (jnp, lax, jax.nn, nn)]
  logging.disable(logging.ERROR)
  try:
    with warnings.catch_warnings(), jax.numpy_dtype_promotion('standard'):
      warnings.simplefilter('ignore')
      yield
  finally:
    logging.disable(before)
    for module, names in functions:
      vars(module).update(names)


# ---- equations that are replaced -----------------------------------------------------


def _run(program: jx.Program, args: Sequence) -> list:
  return interpret(program, args, _equation)


def _equation(e: jx.Equation, ins: list) -> list:
  if e.name == 'pad':
    low, high, holes = zip(*e.params['padding_config'], strict=True)
    if min(*low, *high) >= 0 == max(holes):
      return [_padded(ins[0], ins[1], [*zip(low, high, strict=True)])]
  if e.name in POOLS and _pools_images(e.params):
    return [_pooled(e, ins[0])]
  if e.name == 'cond':
    branches = [lambda *a, body=body: _run(body, a) for body in e.bodies]
    return _chosen(ins[0], branches, ins[1:])
  if e.name in jx.OWN_DERIVATIVE:
    return _run(e.bodies[0], ins)
  return bind(e, ins, e.params, _run)


def _padded(x: jax.Array, value: Any, sides: Sequence[tuple[int, int]]) -> jax.Array:
  for axis, amounts in enumerate(sides):
    shape, value = [*x.shape], jnp.asarray(value, x.dtype)
    before, behind = (
      [jnp.broadcast_to(value, [*shape[:axis], n, *shape[axis + 1 :]])] * bool(n)
      for n in amounts
    )
    x = lax.concatenate([*before, x, *behind], axis) if any(amounts) else x
  return x


def _pools_images(params: dict) -> bool:
  """Tells whether windows extend over the two middle axes of four."""
  window = params['window_dimensions']
  dilations = (*params['base_dilation'], *params['window_dilation'])
  return len(window) == 4 and window[0] == window[3] == 1 == max(dilations)


def _pooled(e: jx.Equation, x: jax.Array) -> jax.Array:
  window, strides = (e.params[k][1:3] for k in ('window_dimensions', 'window_strides'))
  largest = e.name == 'reduce_window_max'
  x = _padded(x, -jnp.inf if largest else 0, e.params['padding'])
  pool: Any = nn.max_pool if largest else nn.avg_pool
  pooled = pool(x, window_shape=window, strides=strides, padding='VALID')
  return pooled if largest else pooled * math.prod(window)


def _chosen(index: jax.Array, branches: Sequence[Callable], args: Sequence) -> list:
  first, *others = branches
  if not others:
    return first(*args)
  rest = lambda *a: _chosen(index - 1, others, a)
  return lax.cond(index < 1, first, rest, *args)
